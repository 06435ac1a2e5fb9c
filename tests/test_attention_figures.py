"""`beit attention`: anybody's checkpoint, parity with their own maps, sizes, queries, files."""

import os

import pytest
import torch
from helpers import beit, refused
from helpers_models import FORMS, SIZE, shaken
from PIL import Image

from beit_nb import SAID, BeitError
from beit_nb.attention import attention_maps, top_mass_mask
from beit_nb.attention_figures import (
    AttentionPages,
    AttentionViewer,
    check_block,
    check_no_data,
    draw_heads,
    figure_size,
    page_names,
    sheet_row,
    stack_rows,
)
from beit_nb.checkpoints import load_weights, save_official
from beit_nb.classifier import BeitForImageClassification
from beit_nb.cli import main
from beit_nb.engine.runs import save_checkpoint
from beit_nb.images import normalize
from beit_nb.limits import as_config
from beit_nb.mim import BeitForMaskedImageModeling
from beit_nb.networks import NETS
from beit_nb.recipes import recipe_named
from beit_nb.regions import attention_distance, feature_pca
from beit_nb.segmenting import build_segmenter
from beit_nb.vit import VisionTransformer

NANO = NETS / "mim.safetensors"
CLOSE = dict(atol=1e-6, rtol=1e-5)


@pytest.fixture
def picture():
    "Noise, 40 x 33 pixels."
    g = torch.Generator().manual_seed(3)
    levels = torch.randint(0, 256, (33, 40, 3), generator=g, dtype=torch.uint8)
    return Image.fromarray(levels.numpy())


def assert_seen(viewer, views, probs):
    "The maps are rows of those shares (1, heads, 1+N, 1+N)."
    for query, token in viewer.tokens.items():
        wanted = probs[0, :, token, 1:].unflatten(-1, viewer.grid)
        torch.testing.assert_close(views.maps[query], wanted, **CLOSE)


def prepared(viewer, views):
    return normalize(views.picture, viewer.mean_std)[None]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "setr_pup", "upernet"])
def test_a_run_that_names_pixels_looks_by_its_body(kind, picture, tmp_path, capfd):
    "`beit attention` of a run of `beit segment`: its own maps; the heads are left out, and said."
    recipe = recipe_named("segment", "nano", head=kind, channels=8)
    net = shaken(build_segmenter(recipe, 3)).eval()
    content = {"config": as_config("segment", recipe), "model": net.state_dict()}
    save_checkpoint(tmp_path / "run" / "last.pt", content | {"classes": ["a", "b", "c"]})
    picture.save(tmp_path / "a.png")
    SAID.clear()

    viewer = AttentionViewer(tmp_path / "run" / "last.pt", ("2,5", "cls"), block=1)
    views = viewer(picture)

    said = capfd.readouterr().err
    assert "left out: " in said and "decode_head" in said
    with torch.no_grad():
        probs = attention_maps(net, prepared(viewer, views))
    assert_seen(viewer, views, probs[1])
    words = ["attention", str(tmp_path / "run" / "last.pt"), str(tmp_path / "a.png"), "--features"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert {x.name for x in (tmp_path / "out").iterdir()} == {
        "a.png",
        "a-features.png",
        "distance.png",
    }


# --- parity: the maps of other people's own models


@pytest.mark.parametrize("form", ["bias per block, LayerScale", "everything"])
@torch.no_grad()
def test_maps_are_those_of_timm(form, picture, tmp_path):
    from timm.models.beit import Beit

    args = dict(num_classes=5, use_abs_pos_emb=False) | FORMS[form]
    theirs = shaken(Beit(**SIZE, **args | dict(use_shared_rel_pos_bias=False))).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    shares = []
    for block in theirs.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda drop, args: shares.append(args[0]))

    for number in range(3):
        shares.clear()
        viewer = AttentionViewer(tmp_path / "timm.pth", ("2,5", "cls"), block=number)
        views = viewer(picture)
        theirs(prepared(viewer, views))
        assert_seen(viewer, views, shares[number])


@pytest.mark.parametrize("form", ["paper", "shared bias, LayerScale", "bias per block, LayerScale"])
@torch.no_grad()
def test_maps_are_those_of_hugging_face(form, picture, tmp_path):
    from transformers import BeitModel

    shared = "use_shared_rel_pos_bias" in FORMS[form]
    head = dict(vocab_size=7) if shared else dict(num_classes=5)
    kind = BeitForMaskedImageModeling if shared else BeitForImageClassification
    shaken(kind(**SIZE, **FORMS[form], **head)).save_pretrained(tmp_path)
    theirs = BeitModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    viewer = AttentionViewer(tmp_path, ("0,7", "7,0", "cls"))

    views = viewer(picture)

    shares = theirs(prepared(viewer, views), output_attentions=True).attentions
    assert_seen(viewer, views, shares[-1])


@torch.no_grad()
def test_maps_of_an_official_pretraining_file(picture, tmp_path):
    args = SIZE | FORMS["shared bias, LayerScale"]
    model = shaken(BeitForMaskedImageModeling(**args, vocab_size=50)).eval()
    save_official(model, tmp_path / "beit.pth")
    viewer = AttentionViewer(tmp_path / "beit.pth", ("3,3",), block=1, features=True)

    views = viewer(picture)

    x = prepared(viewer, views)
    maps = attention_maps(model, x)
    assert_seen(viewer, views, maps[1])
    far = torch.cat([attention_distance(probs, (8, 8), 4) for probs in maps])
    torch.testing.assert_close(views.distances, far, atol=1e-5, rtol=1e-5)
    last = feature_pca(model.forward_intermediates(x)[-1][:, 1:]).colors
    torch.testing.assert_close(views.colors[-1].flatten(0, 1), last[0], atol=1e-4, rtol=1e-4)


# --- sizes


def test_the_paper_size_brings_resized_tables(picture, tmp_path):
    "14 x 14 patches become 30 x 30; a table that depends on the step alone still does."
    args = dict(embed_dim=48, depth=1, num_heads=3, use_abs_pos_emb=False, use_rel_pos_bias=True)
    model = VisionTransformer(**args)
    with torch.no_grad():  # head 1 looks at its neighbours
        table = model.blocks[0].attn.relative_position_bias_table
        steps = torch.cartesian_prod(torch.arange(-13, 14), torch.arange(-13, 14))
        table[:-3, 1] = -steps.square().sum(1) / 20.0
    save_official(model, tmp_path / "beit.pth")

    viewer = AttentionViewer(tmp_path / "beit.pth", ("11,13",))
    views = viewer(picture)

    assert views.picture.shape == (3, 480, 480) and viewer.grid == (30, 30)
    near = views.maps["11,13"][1]
    assert divmod(int(near.argmax()), 30) == (11, 13)
    assert top_mass_mask(near).float().mean() < 0.2
    assert top_mass_mask(views.maps["11,13"][0]).float().mean() > 0.5


@pytest.mark.parametrize(
    "own, patch, asked, size",
    [
        (32, 4, None, 32),
        (224, 16, None, 480),
        (384, 16, None, 480),
        (512, 16, None, 512),
        (224, 14, None, 476),
        (224, 16, 224, 224),
        (32, 4, 256, 256),
    ],
)
def test_sizes(own, patch, asked, size):
    weights = load_weights(NANO)
    weights = weights._replace(args=weights.args | dict(img_size=own, patch_size=patch))
    assert figure_size(weights, asked) == size


@pytest.mark.parametrize(
    "size, says",
    [(33, "33 is no multiple of patches of 4; take 32"), (1, "take 4"), (260, "take at most 256")],
)
def test_sizes_that_cannot_be_had(size, says):
    with pytest.raises(BeitError, match=says):
        figure_size(load_weights(NANO), size)


# --- who asks


def test_blocks():
    assert [check_block(block, 4) for block in (0, 3, -1, -4)] == [0, 3, 3, 0]
    for block in (4, -5):
        with pytest.raises(BeitError, match=f"--block {block} does not exist; choose 0 to 3"):
            check_block(block, 4)


# --- figures


def test_a_page_has_two_rows_for_everyone_who_asks(picture):
    views = AttentionViewer(NANO, ("2,4", "cls"))(picture)

    fig = draw_heads(views, mass=0.9)

    titles = [ax.get_title() for ax in fig.axes]
    assert len(titles) == 4 * 6 and titles[0] == "2,4 asks" and titles[12] == "cls asks"
    kept = top_mass_mask(views.maps["cls"][1], 0.9).float().mean()
    assert titles[14] == f"head 1: {kept:.0%}"


def test_rows_of_the_sheet(picture):
    views = AttentionViewer(NANO, ("2,4", "cls"))(picture)
    rows = [sheet_row(views, query) for query in views.maps]
    sheet = stack_rows(rows)
    assert sheet.size == (6 * 100, 2 * 100)
    assert sheet.crop((0, 100, 600, 200)).tobytes() == rows[1].tobytes()


# --- files


def test_no_drawing_takes_the_place_of_another_or_of_a_picture(tmp_path):
    "Names are kept where they are free; upper and lower case are one, as on some disks."
    names = ("a/x.png", "b/x.png", "b/X.jpg", "x-2.gif", "y.png", "a/x.png", "distance.jpg")
    names += ("z.jpg", "z-features.png")
    paths = tuple(f"{tmp_path}/{name}" for name in names)

    targets = page_names(paths, tmp_path)

    found = [targets[path].name for path in paths]
    assert found == [
        *("x.png", "x-2.png", "X-3.png", "x-2-2.png", "y-2.png", "x.png", "distance-2.png"),
        *("z-2.png", "z-features-2.png"),
    ]
    assert not {str(path) for path in targets.values()} & set(paths)


def test_pages(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    viewer = AttentionViewer(NANO, features=True)
    files = (f"{tmp_path}/a.png",)
    pages = AttentionPages(viewer, files, f"{tmp_path}/out", grid=f"{tmp_path}/sheet.png")

    said = pages.add(files[0], picture) + pages.finish()

    named = [line.split(": ")[0] for line in said]
    out = tmp_path / "out"
    assert named == [
        *(f"{out}/{name}.png" for name in ("a", "a-features", "distance")),
        f"{tmp_path}/sheet.png",
    ]
    assert said[0].endswith("4 heads of block 3, asked by 4,4 of 8 x 8 patches")
    assert all(min(Image.open(name).size) >= 100 for name in named)
    assert sorted(os.listdir(out)) == ["a-features.png", "a.png", "distance.png"]


def test_drawings_among_the_pictures_of_a_training(tmp_path):
    check_no_data(str(tmp_path), "")
    check_no_data(str(tmp_path), f"{tmp_path}/pictures")
    for out in (tmp_path, tmp_path / "maps"):
        with pytest.raises(BeitError, match=f"--out {out} lies in {tmp_path}"):
            check_no_data(str(out), str(tmp_path))


# --- the command


def test_broken_weights_are_no_figure(picture, tmp_path):
    model = VisionTransformer(**SIZE, use_rel_pos_bias=True)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[0] = torch.nan
    save_official(model, tmp_path / "nan.pth")
    with pytest.raises(
        FloatingPointError, match="nan.pth attends with numbers that are not finite"
    ):
        AttentionViewer(tmp_path / "nan.pth")(picture)


def test_what_a_person_may_mistype(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    words = [tmp_path / "a.png", "--out", tmp_path / "maps"]

    refused("attention", NANO, *words, "--query", "3", says="('3',) must be rows and columns such")
    refused("attention", NANO, *words, "--query", "8,0", says="--query 8,0 is none of the 8 x 8")
    refused("attention", NANO, *words, "--block", 4, says="--block 4 does not exist; choose 0 to 3")
    refused("attention", NANO, *words, "--mass", 0, says="--mass 0.0 must be above 0")
    refused("attention", NANO, *words, "--img-size", 30, says="30 is no multiple of patches of 4")
    refused("attention", NANO, *words, "--grid", "x.jpg", says="must be the name of a .png file")
    refused("attention", NETS / "tokenizer.safetensors", *words, says="are no BEiT")
    refused("attention", tmp_path / "none.pth", *words, says="none.pth")
    refused("attention", NANO, tmp_path / "none.png", says="none.png")
    assert not (tmp_path / "maps").exists()


def test_the_command(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    words = [tmp_path / "a.png", "--query", "1,2", "--block", 0, "--out", tmp_path / "maps"]

    said = beit(
        "attention", NANO, *words, "--query", "cls", "--grid", tmp_path / "all.png"
    ).stdout.splitlines()

    assert said == [
        f"{tmp_path}/maps/a.png: 4 heads of block 0, asked by 1,2 cls of 8 x 8 patches",
        said[1],
        f"{tmp_path}/all.png: 2 rows, one for everyone who asks",
    ]
    assert said[1].startswith(f"{tmp_path}/maps/distance.png: heads look ")
