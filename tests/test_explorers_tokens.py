"""beit_nb.explorers.tokens: questions to a cell of any tokenizer, their drawings, tiles."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from beit_nb.dalle import DalleDecoder, DalleEncoder, DalleVAE
from beit_nb.dvae import DiscreteVAE
from beit_nb.explorers.tokens import (
    Tiles,
    TokenSheet,
    around,
    changed_cells,
    digits_by_name,
    log_bar,
    named_pictures,
    odds,
    overlay_heat,
    ready_tokenizer,
    saliency,
    sight,
    some_digits,
    swatches,
    token_probs,
)
from beit_nb.images import to_pil
from beit_nb.tokens import Tokenizer

MAKERS = {
    "ours": lambda: DiscreteVAE(32, width=16),
    "linear": lambda: DiscreteVAE(
        16, downsample=8, width=16, logits="linear", likelihood="laplace"
    ),
    "dalle": lambda: DalleVAE(
        DalleEncoder(n_hid=8, n_blk_per_group=1, vocab_size=16),
        DalleDecoder(n_init=8, n_hid=8, n_blk_per_group=1, vocab_size=16),
    ),
}


@pytest.fixture
def tokenizer():
    return Tokenizer(DiscreteVAE(32, width=16))


@pytest.mark.parametrize("kind", MAKERS)
def test_questions_go_to_any_tokenizer(kind):
    tokenizer = Tokenizer(MAKERS[kind]())
    picture = torch.rand(3, 64, 96)
    P = tokenizer.downsample

    probs = token_probs(tokenizer, picture)
    heat = saliency(tokenizer, picture, (2, 3))
    painted = swatches(tokenizer, torch.tensor([0, 3]))

    assert torch.equal(probs.argmax(0), tokenizer.get_codebook_indices(picture[None])[0])
    assert heat.shape == (64, 96) and heat.max() == 1
    assert painted.shape == (2, 3, P, P)


def test_what_a_cell_does_not_see_does_not_matter(tokenizer):
    picture = torch.rand(3, 64, 64)

    seen = saliency(tokenizer, picture, (7, 7)) > 0

    other = torch.where(seen, picture, 1 - picture)
    probs, other_probs = (token_probs(tokenizer, x)[:, 7, 7] for x in (picture, other))
    assert torch.equal(probs, other_probs) and 16 * 16 < seen.sum() < 32 * 32


def test_no_heat_no_orange():
    picture = torch.rand(3, 8, 8)

    plain = overlay_heat(picture, torch.zeros(8, 8), (8, 8))
    hot = overlay_heat(picture, torch.ones(8, 8), (16, 16))

    assert plain.tobytes() == to_pil(picture).tobytes() and hot.size == (16, 16)


@pytest.mark.parametrize("kind, reach", [("ours", 2), ("linear", 2)])
def test_sight_is_how_far_a_cell_sees(kind, reach):
    tokenizer = Tokenizer(MAKERS[kind]())

    assert sight(tokenizer, 9, 7) == reach


def test_around_ends_where_the_grid_ends():
    assert around((4, 4), 2, 9, 9) == (2, 2, 5, 5)
    assert around((0, 8), 2, 9, 9) == (0, 6, 3, 3)
    assert around((1, 1), 20, 4, 6) == (0, 0, 4, 6)


def test_changed_cells_hold_all_that_moved_visibly():
    before = torch.zeros(3, 32, 32)
    after = before.clone()
    after[1, 5, 9] = 0.06
    after[0, 11, 17] = -0.2
    after[2, 31, 31] = 0.04  # too little to be seen

    assert changed_cells(before, after, 4) == (1, 2, 2, 3)
    assert changed_cells(before, before, 4) is None


def test_odds_never_say_nothing_or_all():
    shares = (0.0, 0.0009, 0.001, 0.5, 0.999, 0.9991, 1.0)
    words = ["< 0.1 %", "< 0.1 %", "0.1 %", "50.0 %", "99.9 %", "> 99.9 %", "> 99.9 %"]

    assert [odds(p) for p in shares] == words


def test_bars_are_logarithms():
    assert [log_bar(p) for p in (0.0, 1e-4, 1e-2, 1.0)] == [0, 0, 0.5, 1]


def test_sheet_paints_each_token_once_and_all_alike(tokenizer, monkeypatch):
    asked = []
    real = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: asked.append(len(ids)) or real(ids))
    sheet = TokenSheet(tokenizer, 32)

    page = np.asarray(sheet.picture(torch.tensor([[3, 4], [4, 3]])))
    again = np.asarray(sheet.picture(torch.tensor([[3, 3], [3, 5]])))

    assert page.shape == (64, 64, 3) and asked == [2, 1]
    assert (page[:32, :32] == page[32:, 32:]).all() and (again[:32, :32] == page[:32, :32]).all()
    assert (page[:32, :32] != page[:32, 32:]).any()


def test_tiles_are_one_picture():
    pictures = np.zeros((6, 2, 3, 3), np.uint8)  # 2 x 3 pixels: both must fit a square
    pictures[4] = 200
    tiles = Tiles("heads", cols=3)

    tiles.show(pictures, sides=["first", "second"], index=4, pointed=1)

    sheet = np.asarray(Image.open(io.BytesIO(tiles.picture)))
    assert sheet.shape == (12, 18, 3) and (sheet[6:, 6:12] == 200).all()
    assert sheet.sum() == 6 * 6 * 3 * 200
    assert (tiles.kind, tiles.index, tiles.pointed) == ("tiles", 4, 1)


def test_digits_are_called_by_what_they_show():
    named = digits_by_name()

    names = [*named]
    assert torch.equal(torch.stack([*named.values()]), some_digits()) and len(named) == 16
    assert names[3] == "a seven" and names[6] == "a seven (2)" and names[4] == "an eight"


def test_pictures_of_ones_own_are_counted():
    own = torch.rand(2, 3, 8, 8)

    pictures, names = named_pictures(own)

    assert pictures is own and names == ["picture 0", "picture 1"]


def test_digits_are_pictures():
    digits = some_digits(5)

    assert digits.shape == (5, 3, 32, 32) and digits.min() == 0 and 0.9 < digits.max() <= 1


def test_a_tokenizer_is_ready_and_nothing_is_trained(tmp_path):
    tokenizer, line = ready_tokenizer(tmp_path)

    ids = tokenizer.get_codebook_indices(some_digits()[:1])
    assert "came with beit_nb" in line and len(ids.unique()) > 3
    assert list(tmp_path.iterdir()) == []
