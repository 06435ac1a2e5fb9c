"""beit_nb.explorers.spelling: a picture's tokens under a finger, and writing into it."""

import numpy as np
import pytest
import torch

from beit_nb.dalle import DalleDecoder, DalleEncoder, DalleVAE
from beit_nb.dvae import DiscreteVAE
from beit_nb.explorers.spelling import ACTS, TokenExplorer, TokenPads, token_words
from beit_nb.explorers.tokens import token_legend
from beit_nb.images import to_pil
from beit_nb.tokens import Tokenizer


@pytest.fixture
def tokenizer():
    return Tokenizer(DiscreteVAE(32, width=16))


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32)


@pytest.fixture
def explorer(tokenizer, images):
    return TokenExplorer(tokenizer, images=images, number=1, cell=(1, 3))


def painted(explorer):
    "Picture 3, one pixel of each of its squares."
    return np.asarray(explorer.pads.painted.image)[::8, ::8]


def test_one_finger_in_three_pictures():
    pads = TokenPads(8, 12, (2, 5))

    pads.tokens.press(1 * 12 + 7)

    assert pads.cell == (1, 7)
    assert {pad.cursor for pad in pads.all} == {19}
    still = pads.static_picture()
    assert still.height == 2 * 296 and still.width <= 848  # two rows, no wider than a lesson


def test_frames_name_the_seen_the_changed_and_the_written():
    pads = TokenPads(8, 8, (2, 5))

    pads.frame((0, 3, 5, 5), (1, 4, 3, 3), [(2, 5), (0, 0)])

    seen, *written = pads.picture.boxes
    changed, *same = pads.painted.boxes
    assert tuple(seen[:4]) == (0, 3, 5, 5) and tuple(changed[:4]) == (1, 4, 3, 3)
    assert seen[5] == changed[5] == "dotted" and written == same == pads.tokens.boxes
    assert [tuple(box[:4]) for box in written] == [(2, 5, 1, 1), (0, 0, 1, 1)]


def test_pointing_changes_nothing(explorer):
    ids = explorer.ids.clone()
    before = painted(explorer)

    explorer.pad.press(60)

    assert torch.equal(explorer.ids, ids) and (painted(explorer) == before).all()
    assert explorer.token.value == ids[7, 4] == explorer.best[0]
    assert explorer.candidates.index == 0 and explorer.written == {}


def test_writing_changes_one_cell_and_is_painted(explorer, tokenizer):
    ids = explorer.ids.clone()

    explorer.candidates.index = 4

    assert (explorer.ids != ids).sum() == 1 and explorer.ids[1, 3] == explorer.best[4]
    assert (painted(explorer) == np.asarray(to_pil(tokenizer.decode(explorer.ids[None])[0]))).all()
    assert explorer.written == {(1, 3): explorer.best[4]}
    assert f"is token {explorer.best[4]} (" in explorer.pads.painted.notes[11]


def test_no_ring_where_the_token_is_not_in_the_list(explorer):
    other = next(token for token in range(32) if token not in explorer.best)

    explorer.token.value = other

    assert explorer.ids[1, 3] == other and explorer.candidates.index == -1
    assert explorer.token.label == "token, 0 to 31"


def test_what_was_read_is_not_written(explorer):
    read = int(explorer.read[1, 3])
    explorer.candidates.index = 4

    explorer.token.value = read

    assert explorer.written == {} and torch.equal(explorer.ids, explorer.read)
    assert explorer.before.disabled and explorer.candidates.index == 0


def test_a_link_may_name_what_was_read(explorer, tokenizer, images):
    same = {(1, 3): int(explorer.read[1, 3])}

    twin = TokenExplorer(tokenizer, images=images, number=1, cell=(1, 3), written=same)

    assert twin.written == {} and twin.describe() == explorer.describe()


def test_before_and_after(explorer):
    as_read = painted(explorer)
    explorer.candidates.index = 4
    written = painted(explorer)

    explorer.before.value = True
    before = painted(explorer)
    explorer.before.value = False

    assert (before == as_read).all() and (painted(explorer) == written).all()
    assert (written != as_read).any()


def test_writing_shows_what_is_written(explorer):
    explorer.candidates.index = 4
    explorer.before.value = True

    explorer.candidates.index = 2

    assert not explorer.before.value and explorer.ids[1, 3] == explorer.best[2]


def test_reset_takes_all_back(explorer):
    for cell, candidate in ((11, 4), (30, 2), (63, 7)):
        explorer.pad.press(cell)
        explorer.candidates.index = candidate
    assert len(explorer.written) == 3

    explorer.reset.click()

    assert torch.equal(explorer.ids, explorer.read) and explorer.candidates.index == 0


def test_another_picture_is_read_anew(explorer):
    explorer.candidates.index = 4

    explorer.menu.choose("picture 2")

    assert explorer.written == {} and torch.equal(explorer.ids, explorer.probs.argmax(0))


def test_link_makes_the_same_state_again(explorer, tokenizer, images):
    explorer.candidates.index = 4
    explorer.pad.press(20)
    explorer.token.value = 7

    twin = eval(explorer.link())

    assert explorer.link().startswith(
        "TokenExplorer(tokenizer, images=images, number=1, cell=(2, 4)"
    )
    assert twin.describe() == explorer.describe() and twin.link() == explorer.link()
    assert torch.equal(twin.ids, explorer.ids) and (painted(twin) == painted(explorer)).all()


def test_acts_are_done_one_after_the_other(explorer):
    explorer.probs[:] = torch.eye(32)[0, :, None, None]  # no doubt anywhere
    explorer.point()
    begun = [act.done(explorer) for act in ACTS]

    explorer.probs[:] = 1 / 32
    explorer.point()
    explorer.token.value = 9
    explorer.before.value = True

    assert begun == [False] * 3 and [act.done(explorer) for act in ACTS] == [True] * 3


def test_words_say_what_was_read_and_written(explorer):
    explorer.token.value = 5

    words = token_words(explorer)

    read = int(explorer.read[1, 3])
    assert f"token {read}</b>" in words and "<b>token 5</b>" in words and "1 written" in words
    assert "64 tokens of 5 bits, 40 bytes for 3,072" in words
    assert "20 x 20 pixels" in token_legend(explorer.reach, 4)


def test_it_takes_dalles_tokenizer_and_oblong_pictures():
    dalle = DalleVAE(
        DalleEncoder(n_hid=8, n_blk_per_group=1, vocab_size=16),
        DalleDecoder(n_init=8, n_hid=8, n_blk_per_group=1, vocab_size=16),
    )

    explorer = TokenExplorer(Tokenizer(dalle), images=torch.rand(4, 3, 64, 96))

    assert (explorer.pad.rows, explorer.pad.cols) == (8, 12) and explorer.guide.error == ""


def test_a_token_that_is_not_there_is_one_line(tokenizer, images):
    explorer = TokenExplorer(tokenizer, images=images, written={(0, 0): 99})

    assert "there is no token 99" in explorer.guide.error
