"""beit_nb.explorers.tokens: questions to a cell of any tokenizer, and writing into it."""

import numpy as np
import pytest
import torch

from beit_nb.dalle import DalleDecoder, DalleEncoder, DalleVAE
from beit_nb.dvae import DiscreteVAE
from beit_nb.explorers.tokens import (
    TokenExplorer,
    overlay_heat,
    ready_tokenizer,
    saliency,
    some_digits,
    swatches,
    token_bars,
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


@pytest.fixture
def explorer(tokenizer):
    return TokenExplorer(tokenizer, images=torch.rand(4, 3, 32, 32))


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


@pytest.mark.parametrize("kind", MAKERS)
def test_explorer_takes_any_tokenizer(kind):
    tokenizer = Tokenizer(MAKERS[kind]())
    pictures = torch.rand(1, 3, 64, 96).expand(4, -1, -1, -1)

    explorer = TokenExplorer(tokenizer, images=pictures)

    grid = (64 // tokenizer.downsample, 96 // tokenizer.downsample)
    assert (explorer.pad.rows, explorer.pad.cols) == grid
    assert explorer.guide.error == ""


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


def test_bars_are_as_long_as_probabilities():
    bars = token_bars([7, 200], [0.5, 0.001])

    assert "token 7<" in bars and "50.0%" in bars and "width:38px" in bars
    assert "0.1%" in bars and "width:1px" in bars


def test_pointing_changes_nothing(explorer):
    explorer.controls.number.value = 1
    ids = explorer.ids.clone()
    picture = explorer.columns.picture.tobytes()

    explorer.pad.press(11)

    assert torch.equal(explorer.ids, ids) and explorer.columns.picture.tobytes() == picture
    assert explorer.controls.token.value == ids[1, 3] == explorer.best[0]


def test_writing_changes_one_cell_and_is_painted(explorer, tokenizer):
    explorer.pad.press(11)
    ids = explorer.ids.clone()

    explorer.candidates.press(4)

    assert (explorer.ids != ids).sum() == 1 and explorer.ids[1, 3] == explorer.best[4]
    painted = to_pil(tokenizer.decode(explorer.ids[None])[0])
    assert (np.asarray(explorer.columns.picture)[::8, ::8] == np.asarray(painted)).all()


def test_a_typed_token_is_written_within_the_vocabulary(explorer):
    explorer.controls.token.value = 999

    assert explorer.controls.token.value == explorer.ids[explorer.cell] == 31


def test_as_read_brings_all_back(explorer):
    ids = explorer.ids.clone()
    for cell, candidate in ((11, 4), (30, 2), (63, 7)):
        explorer.pad.press(cell)
        explorer.candidates.press(candidate)
    assert (explorer.ids != ids).sum() == 3

    explorer.controls.as_read.click()

    assert torch.equal(explorer.ids, ids) and explorer.candidates.cursor == 0


def test_digits_are_pictures():
    digits = some_digits(5)

    assert digits.shape == (5, 3, 32, 32) and digits.min() == 0 and 0.9 < digits.max() <= 1


def test_a_tokenizer_is_ready_and_nothing_is_trained(tmp_path):
    tokenizer, line = ready_tokenizer(tmp_path)

    ids = tokenizer.get_codebook_indices(some_digits()[:1])
    assert "came with beit_nb" in line and len(ids.unique()) > 3
    assert list(tmp_path.iterdir()) == []
