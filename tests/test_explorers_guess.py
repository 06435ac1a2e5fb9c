"""beit_nb.explorers.guess: a digit with cells hidden, what a network guesses, one's own digit."""

import numpy as np
import pytest
import torch

from beit_nb import BeitError
from beit_nb.dvae import DiscreteVAE
from beit_nb.explorers.guess import OWN, GuessExplorer
from beit_nb.explorers.predictor import MimPredictor, ink_picture, named_digits
from beit_nb.pretraining import build_mim
from beit_nb.recipes import recipe_named
from beit_nb.tokens import Tokenizer


@pytest.fixture(scope="module")
def predict():
    "An untrained network: what is shown must be what it says, however wrong."
    torch.manual_seed(0)
    recipe = recipe_named("pretrain", "nano")
    tokenizer = Tokenizer(DiscreteVAE(recipe.vocab_size, width=16))
    return MimPredictor(build_mim(recipe).eval(), tokenizer, recipe, "untrained")


@pytest.fixture
def explorer(predict):
    return GuessExplorer(predict)


def draw_a_bar(explorer):
    marks = np.zeros((32, 32), bool)
    marks[6:26, 14:18] = True
    explorer.controls.digit.choose(OWN)
    explorer.pads.draw.mask = marks
    return marks


def agrees(explorer):
    "Is everything on the screen what the network says of this picture and mask?"
    guess = explorer.predict.guess(explorer.picture, explorer.mask)
    right = int(guess.right.sum())
    assert torch.equal(guess.ids, explorer.guess.ids)
    if explorer.mask.any():
        assert f"{right} of {explorer.mask.sum()} right" in explorer.score.value
    assert len(explorer.pads.guess.boxes) == explorer.mask.sum() + 1
    assert explorer.guide.error == ""
    return True


def test_first_sight(explorer):
    assert agrees(explorer) and explorer.mask.sum() == 26
    assert explorer.guide.done == []
    assert torch.equal(explorer.picture, named_digits()["a two"])


def test_a_finger_hides_and_the_network_is_asked_again(explorer):
    cell = int(np.flatnonzero(~explorer.mask)[0])

    explorer.pads.hide.press(cell)

    assert explorer.mask.sum() == 27 and agrees(explorer)


def test_slider_and_dice_make_masks(explorer):
    first = explorer.mask

    explorer.controls.hide.value = 40
    assert explorer.mask.sum() == 40 and agrees(explorer)
    explorer.controls.hide.value = 26
    assert (explorer.mask == first).all()
    explorer.next_mask()
    assert (explorer.mask != first).any() and agrees(explorer)


def test_uncover_all(explorer):
    explorer.wipe()

    assert not explorer.mask.any() and agrees(explorer)
    assert "Nothing is hidden" in explorer.score.value


def test_another_digit_keeps_the_mask(explorer):
    explorer.pads.hide.press(0)
    before = explorer.mask

    explorer.controls.digit.choose("a seven")

    assert (explorer.mask == before).all() and agrees(explorer)


def test_pointing_moves_frames_and_words_and_asks_nobody(explorer):
    guess = explorer.guess

    explorer.pads.truth.pointed = 9
    assert "cell 1,1" in explorer.words.value
    assert [pad.boxes[-1][:2] for pad in (explorer.pads.hide, explorer.pads.guess)] == [(1, 1)] * 2
    explorer.pads.truth.pointed = -1

    assert "cell 5,2" in explorer.words.value and explorer.guess is guess


def test_what_is_drawn_stays_when_one_hides(explorer):
    marks = draw_a_bar(explorer)
    assert explorer.hand == "draws" and not explorer.mask.any() and agrees(explorer)

    explorer.change_hand()

    assert explorer.mask.sum() == 26 and agrees(explorer)
    assert torch.equal(explorer.picture, ink_picture(marks))
    explorer.controls.digit.choose("a one")
    explorer.controls.digit.choose(OWN)
    assert (explorer.pads.draw.mask == marks).all()


def test_wiping_a_canvas_hides_nothing_and_keeps_the_mask(explorer):
    draw_a_bar(explorer)
    before = explorer.pads.hide.mask

    explorer.wipe()

    assert not explorer.pads.draw.mask.any() and (explorer.pads.hide.mask == before).all()


def test_hiding_hides_something_even_after_uncovering_all(explorer):
    explorer.wipe()
    draw_a_bar(explorer)

    explorer.change_hand()

    assert explorer.mask.sum() == 26


def test_acts(explorer):
    wrong = int(explorer.guess.wrong.flatten().nonzero()[0])
    explorer.pads.guess.pointed = wrong
    assert explorer.guide.done == [0]

    explorer.controls.hide.value = 50
    assert explorer.guide.done == [0, 1]

    draw_a_bar(explorer)
    assert explorer.guide.done == [0, 1]
    explorer.controls.hand.click()
    assert explorer.guide.done == [0, 1, 2]


def test_an_act_needs_ink(explorer):
    explorer.controls.digit.choose(OWN)
    assert explorer.controls.hand.disabled  # there is nothing to hide yet
    explorer.controls.hand.click()

    assert 2 not in explorer.guide.done
    draw_a_bar(explorer)
    assert not explorer.controls.hand.disabled


@pytest.mark.parametrize("play", ("nothing", "dice", "painted", "emptied", "drawing", "drawn"))
def test_link_makes_the_same_state(explorer, predict, play):
    if play == "dice":
        explorer.controls.hide.value = 34
        explorer.next_mask()
        explorer.pads.guess.press(11)
    if play == "painted":
        explorer.pads.hide.press(5)
    if play == "emptied":
        explorer.wipe()
    if play in ("drawing", "drawn"):
        draw_a_bar(explorer)
    if play == "drawn":
        explorer.change_hand()

    again = eval(explorer.link(), dict(GuessExplorer=GuessExplorer, predict=predict))

    assert again.link() == explorer.link() and again.describe() == explorer.describe()
    assert torch.equal(again.picture, explorer.picture)
    assert (again.mask == explorer.mask).all()
    assert again.words.value == explorer.words.value


def test_the_ground_may_change_without_loss(explorer):
    explorer.pads.hide.press(5)
    before = explorer.link()

    explorer.guide.ground = [True, 2]

    assert explorer.link() == before and agrees(explorer)


def test_what_is_no_drawing_is_refused(predict):
    with pytest.raises(BeitError, match="no drawing of 32 x 32 cells"):
        GuessExplorer(predict, digit=OWN, drawing="scribble")


def test_static_picture_shows_all_three(explorer):
    assert explorer.static_picture().width > 3 * 256
