"""The explorers' pure functions and their shells, without a browser (the browser's part is test_browser_family.py)."""

import base64
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

from beit_nb import explorers as E
from beit_nb.dalle import DalleDecoder, DalleEncoder, DalleVAE
from beit_nb.dvae import DiscreteVAE
from beit_nb.images import house_pictures, normalize
from beit_nb.mim import BeitForMaskedImageModeling
from beit_nb.patches import patchify
from beit_nb.recipes import RECIPES, recipe_named
from beit_nb.tokens import Tokenizer

rgb = lambda picture: np.asarray(picture.convert("RGB"))


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return Tokenizer(DiscreteVAE(32, width=16))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return BeitForMaskedImageModeling(
        img_size=32,
        patch_size=4,
        embed_dim=24,
        depth=3,
        num_heads=2,
        vocab_size=32,
        weight_init="xavier",
    ).eval()


# pure functions


@pytest.mark.parametrize("t", (0.0, 0.1, 0.5, 0.9, 1.0))
def test_gap_is_kl_and_the_top_stays(t):
    q, low, gap = E.melt(t)
    log_px = E.melt(0.0)[1] + E.melt(0.0)[2]
    assert_close(q.sum(1), torch.ones(16, dtype=q.dtype))
    assert_close(low + gap, log_px, atol=1e-12, rtol=0)
    assert (gap > -1e-12).all()
    # all sixteen pictures are all there are
    assert_close(log_px.exp().sum(), torch.tensor(1.0, dtype=q.dtype))


def test_quick_pictures_are_pure():
    for draw, a, b in (
        (E.gap_picture(), 0.2, 0.8),
        (E.triangle_picture(torch.zeros(3), torch.randn(50, 3)), 0.1, 2.0),
        (E.alphabet_picture(house_pictures(64)[0]), 0.5, 50.0),
    ):
        first = draw(a)
        other = draw(b)
        again = draw(a)
        assert (
            first[0].tobytes() == again[0].tobytes() != other[0].tobytes()
            and first[1] == again[1] != other[1]
        )


def test_backdrop_draws_what_the_figure_would():
    figure = E.Figure((3, 2), dpi=100)
    (line,) = figure.subplots().plot([0, 1], [0, 1])
    backdrop = E.Backdrop(figure, [line])
    line.set_ydata([1, 0])
    quick = rgb(E.on_white(backdrop.picture()))
    line.set_animated(False)
    figure.savefig(file := io.BytesIO(), facecolor="white")
    assert np.abs(quick.astype(int) - rgb(Image.open(file))).max() <= 2


def test_best_alphabet_lowers_the_loss_and_ends_in_one_stamp():
    blocks = patchify(house_pictures(64), 8).flatten(0, 1)
    start = blocks[:16]

    def loss(beta, rounds):
        s, q = E.best_alphabet(blocks, start, beta, rounds)
        log_q = q.clamp_min(1e-30).log()
        return ((q * torch.cdist(blocks, s).square() * 4).sum(1) + beta * (q * log_q).sum(1)).mean()

    for beta in (0.5, 6.6, 40.0):
        falling = [loss(beta, n).item() for n in (1, 2, 4, 8, 16)]
        assert all(b <= a + 1e-4 for a, b in zip(falling, falling[1:]))
    s, q = E.best_alphabet(blocks, start, 2000.0)
    assert_close(s, blocks.mean(0).expand_as(s), atol=2e-2, rtol=0)


@pytest.mark.parametrize("P,step", [(8, 8), (8, 4), (16, 32), (7, 3)])
def test_cut_equals_unfold(P, step):
    x = house_pictures(64)[1]
    two = F.unfold(x[None], P, stride=step)[0].T.view(-1, 3, P, P)
    assert torch.equal(E.cut(x, P, step), two) and len(two) == E.cost(64, P, step)["tokens"]


def test_mosaic_and_film_keep_every_patch_in_its_place():
    tiles = E.as_tiles(E.cut(house_pictures(64)[0], 8, 8))
    strip, ncols = E.film(tiles)
    page = rgb(strip)
    step = 448 // ncols
    for i in (0, 5, 63):
        assert (
            page[i // ncols * step + 2 + step // 2, i % ncols * step + 2 + step // 2]
            == tiles[i, (step // 2) * 8 // (step - 2), (step // 2) * 8 // (step - 2)]
        ).all()
    for n in (1, 2, 9, 49, 196, 784, 3025):
        assert (s := E.film(np.zeros((n, 2, 2, 3), np.uint8))[0]).width <= 448 and s.height <= 330


@pytest.mark.parametrize(
    "make",
    (
        lambda: DiscreteVAE(32, width=16),
        lambda: DiscreteVAE(16, downsample=8, width=16, logits="linear", likelihood="laplace"),
        lambda: DalleVAE(
            DalleEncoder(n_hid=8, n_blk_per_group=1, vocab_size=16),
            DalleDecoder(n_init=8, n_hid=8, n_blk_per_group=1, vocab_size=16),
        ),
    ),
    ids=("ours", "linear", "dalle"),
)
def test_token_functions_take_any_tokenizer(make):
    torch.manual_seed(0)
    t = Tokenizer(make())
    x = torch.rand(3, 64, 96)
    odds = E.token_odds(t, x)
    heat = E.sees(t, x, (2, 3))
    assert (
        torch.equal(odds.argmax(0), t.get_codebook_indices(x[None])[0])
        and heat.shape == (64, 96)
        and heat.max() == 1
    )
    shell = E.TokenExplorer(t, images=x[None].expand(2, -1, -1, -1))
    assert (shell.pad.rows, shell.pad.cols) == (
        64 // t.downsample,
        96 // t.downsample,
    ) and "alert" not in shell.trouble.value
    assert E.swatches(t, torch.tensor([0, 3])).shape == (2, 3, t.downsample, t.downsample)


def test_what_a_cell_does_not_see_does_not_matter(tokenizer):
    x = torch.rand(3, 64, 64)
    field = E.sees(tokenizer, x, (7, 7)) > 0
    y = torch.where(field, x, 1 - x)
    assert torch.equal(E.token_odds(tokenizer, x)[:, 7, 7], E.token_odds(tokenizer, y)[:, 7, 7])
    assert 16 * 16 < field.sum() < 32 * 32


def test_heads_table(model):
    maps = E.attention_maps(model, normalize(torch.rand(1, 3, 32, 32)))
    t = E.heads_table(maps, (2, 5), (8, 8), 0.6)
    row = maps[1][0, 1, 1 + 21, 1:]
    assert t.shape == (3, 3, 8, 8)
    keep = (
        row
        >= row.sort(descending=True).values[
            (
                row.sort(descending=True).values.cumsum(0) - row.sort(descending=True).values
                < 0.6 * row.sum()
            ).sum()
            - 1
        ]
    )
    assert_close(t[1, 1].flatten(), torch.where(keep, row, 0.3 * row) / row.max())
    assert E.heads_picture(t, 20).size == (54 + 3 * 22, 18 + 3 * 22)


@pytest.mark.parametrize(
    "command,name", [(c, n) for c in ("tokenizer", "pretrain", "finetune") for n in RECIPES[c]]
)
def test_schedules_of_every_recipe(command, name):
    r = recipe_named(command, name)
    curves = E.schedules(recipe_named(command, name))
    for x, y in curves.values():
        assert len(x) == len(y) and np.isfinite(y).all() and (np.diff(x) >= 0).all()
    assert 0.98 * r.lr < curves["learning rate"][1].max() <= r.lr * (1 + 1e-9)
    if command == "tokenizer":
        assert math.isclose(curves["temperature"][1][-1], r.tau_end) and math.isclose(
            curves["temperature"][1][0], r.tau_start
        )
    else:
        assert (
            curves["drop path"][1][-1] == r.drop_path_rate
            and curves["learning rate by layer"][1][-1] == 1
        )


# shells


@pytest.fixture(scope="module")
def shells(tokenizer, model):
    return dict(
        patches=E.PatchExplorer(),
        tokens=E.TokenExplorer(tokenizer, images=torch.rand(3, 3, 32, 32)),
        attention=E.AttentionExplorer(model, images=torch.rand(3, 3, 32, 32)),
        gap=E.GapExplorer(),
        temperature=E.TemperatureExplorer(),
        alphabet=E.AlphabetExplorer(house_pictures(64)[0]),
        schedule=E.ScheduleExplorer(),
    )


@pytest.mark.parametrize(
    "name", "patches tokens attention gap temperature alphabet schedule".split()
)
def test_every_shell_has_a_static_picture_and_no_trouble(shells, name):
    data, _ = shells[name]._repr_mimebundle_()
    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert (
        "application/vnd.jupyter.widget-view+json" in data
        and 200 < picture.width < 1000
        and len(np.unique(rgb(picture).reshape(-1, 3), axis=0)) > 20
    )
    assert "alert" not in shells[name].trouble.value


def test_patches_shows_the_same_patch_twice(shells):
    e = E.PatchExplorer("astronaut")
    for size, stride, shuffle, cell in (
        (16, 1, False, 37),
        (32, 0.5, True, 100),
        (14, 2, True, 5),
        (56, 1, False, 15),
    ):
        e.size.value = size
        e.stride.value = stride
        e.shuffle.value = shuffle
        e.pad.press(cell)
        place = list(e.order).index(cell)
        step = int(size * stride)
        assert f"word <b>{place + 1}</b>" in e.words.value
        (r, c) = divmod(cell, e.pad.cols)
        s = 448 // e.ncols
        patch = rgb(e.picture.resize((224, 224)))[
            r * step : r * step + size, c * step : c * step + size
        ]
        tile = rgb(e.film)[
            place // e.ncols * s + 2 : place // e.ncols * s + s,
            place % e.ncols * s + 2 : place % e.ncols * s + s,
        ]
        assert np.abs(tile.mean((0, 1)) - patch.mean((0, 1))).max() < 12
        frame = rgb(e.shown)[place // e.ncols * s, place % e.ncols * s : place % e.ncols * s + s]
        assert (frame == (0xE0, 0x80, 0x20)).all()


def test_tokens_writes_one_cell_and_reads_it_back(shells):
    e = shells["tokens"]
    e.number.value = 1
    read = e.ids.clone()
    e.pad.press(11)
    assert torch.equal(e.ids, read)
    e.list.press(4)
    assert (e.ids != read).sum() == 1 and e.ids[1, 3] == e.best[4]
    assert (rgb(e.picture)[::8, ::8] == rgb(E.to_pil(e.tokenizer.decode(e.ids[None])[0]))).all()
    e.again.click()
    assert torch.equal(e.ids, read) and e.list.cursor == 0


def test_attention_follows_the_click_and_the_mass(shells):
    e = shells["attention"]
    e.mass.value = 1.0
    seen = set()
    for cell in (0, 9, 63):
        e.pad.press(cell)
        seen.add(e.view.value)
    assert len(seen) == 3 and "<b>100%</b>" in e.words.value
    e.mass.value = 0.05
    assert "<b>100%</b>" not in e.words.value


def test_schedule_knobs_turn_the_blue_recipe_only():
    e = E.ScheduleExplorer()
    other = e.curves[1]["learning rate"][1].copy()
    e.warm.value = 40
    blue = e.curves[0]["learning rate"]
    assert 39 < blue[0][blue[1].argmax()] < 41 and np.array_equal(
        e.curves[1]["learning rate"][1], other
    )
    e.recipe.value = "pretrain base-plus-in22k"
    assert e.warm.disabled and e.decay.disabled and e.warm.value == 0
    e.recipe.value = "finetune large-in1k"
    assert e.decay.value == 0.75 and e.warm.value == 5 and not e.warm.disabled


def test_mistakes_are_one_line(shells, tmp_path):
    e = E.PatchExplorer()
    before = bytes(e.view.value)
    for bad in (b"not a picture", str(tmp_path / "nothing.png")):
        e.menu.set_trait("value", bad)
        assert (
            "alert" in e.trouble.value
            and "Traceback" not in e.trouble.value
            and bytes(e.view.value) == before
        )
    e.menu.set_trait("value", "coffee")
    assert "alert" not in e.trouble.value and bytes(e.view.value) != before
    # no picture at all: a line, no traceback
    E.PatchExplorer(str(tmp_path / "nothing.png"))._repr_mimebundle_()
    with pytest.raises(ValueError, match="beit demo"):
        E.mim_predictor(tmp_path)
    assert "untrained" in E.ready_mim(tmp_path)[1]
