"""beit_nb.explorers.answers: a score beside a rival, one cell, three pads under one pointer."""

import re

import numpy as np
import pytest
import torch

from beit_nb.dvae import DiscreteVAE
from beit_nb.explorers.answers import (
    RIGHT,
    WRONG,
    GuessPads,
    cell_html,
    percent,
    score_html,
    swatch_pictures,
    tell_score,
    top_tokens,
    verdict_boxes,
)
from beit_nb.explorers.pad import Box
from beit_nb.explorers.predictor import Guess
from beit_nb.explorers.shell import plain_words
from beit_nb.tokens import Tokenizer

PICTURES = [f"picture-{i}" for i in range(8)]


@pytest.fixture
def guess():
    "Six cells of eight tokens: two visible, then right, right, a near and a far miss."
    probs = torch.zeros(2, 3, 8)
    probs[:] = torch.tensor([0.3, 0.25, 0.2, 0.12, 0.08, 0.046, 0.003, 0.001])
    mask = torch.tensor([[False, False, True], [True, True, True]])
    return Guess(mask, torch.tensor([[3, 0, 0], [0, 4, 6]]), probs)


def test_score_counts_the_hidden_cells_only(guess):
    words = plain_words(score_html(guess, torch.full((2, 3), 4)))

    assert "2 of 4 right." in words and "gets 1." in words and "30% sure" in words
    assert "2 misses, of which 1 had the true token" in words


def test_score_of_nothing(guess):
    nothing = Guess(guess.mask & False, guess.truth, guess.probs)

    assert "Nothing is hidden" in score_html(nothing, guess.truth)


def test_the_short_score_counts_the_rival_on_hidden_cells_only(guess):
    assert "<b>2</b> of 4 hidden tokens" in tell_score(guess, guess.truth)
    assert tell_score(guess, guess.truth).endswith("would get 4")  # of six cells that are equal


def test_every_hidden_cell_has_its_verdict(guess):
    boxes = verdict_boxes(guess)

    framed = np.zeros(guess.mask.shape, bool)
    for box in boxes:
        framed[box.top, box.left] = True
        right = bool(guess.right[box.top, box.left])
        assert (box.color, box.line) == (RIGHT if right else WRONG)
    assert (framed == guess.mask.numpy()).all() and len(boxes) == guess.mask.sum() == 4


def test_best_tokens_are_named_with_their_odds():
    odds = torch.tensor([0.004, 0.7, 0.296])

    assert top_tokens(odds) == "1 (70%), 2 (30%), 0 (under 1%)"


def places(html):
    "The rows of a table of tokens: (place, token, is it the truth?)."
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    words = [plain_words(row).split() for row in rows]
    return [(int(w[0][:-1]), int(w[2]), w[-1] == "truth") for w in words]


def test_a_cell_shows_its_five_best(guess):
    html = cell_html(guess, (1, 1), PICTURES)

    assert "cell 1,1 is hidden and guessed wrong." in html
    assert places(html) == [(i + 1, i, i == 4) for i in range(5)]
    assert all(f'src="{picture}"' in html for picture in PICTURES[:5])


def test_a_truth_that_is_far_has_a_line_of_its_own(guess):
    html = cell_html(guess, (1, 2), PICTURES)

    assert places(html)[-1] == (7, 6, True) and "under 1%" in plain_words(html)


def test_a_visible_cell_was_not_asked(guess):
    html = cell_html(guess, (0, 0), PICTURES)

    assert "is visible" in html and "token 3" in html and places(html) == []


@pytest.mark.parametrize(
    "p,words", [(1.0, "100%"), (0.614, "61%"), (0.01, "1%"), (0.009, "under 1%")]
)
def test_percent(p, words):
    assert percent(p) == words


def test_every_token_has_a_picture():
    pictures = swatch_pictures(Tokenizer(DiscreteVAE(16, width=8)))

    assert len(pictures) == 16 and all(p.startswith("data:image/png;base64,") for p in pictures)


@pytest.fixture
def pads():
    return GuessPads((2, 3))


def test_frames_say_what_is_right(pads, guess):
    pads.frame(guess, (0, 1))

    boxes = [Box(*box) for box in pads.guess.boxes]
    assert {(b.top, b.left) for b in boxes if (b.color, b.line) == RIGHT} == {(0, 2), (1, 0)}
    assert {(b.top, b.left) for b in boxes if (b.color, b.line) == WRONG} == {(1, 1), (1, 2)}
    assert RIGHT[1] != WRONG[1]  # not by colour alone
    here = boxes[-1]
    assert (here.top, here.left) == (0, 1)
    assert pads.hide.boxes == pads.truth.boxes == [here]


def test_one_of_canvas_and_picture_is_seen(pads):
    for hand, seen, away in (
        ("draws", pads.draw, pads.hide),
        ("hides", pads.hide, pads.draw),
    ):
        pads.set_hand(hand)

        assert seen.layout.display == "" and away.layout.display == "none"


def test_pictures_are_enlarged_pixel_by_pixel(pads):
    picture = torch.rand(3, 32, 32)

    pads.show(picture, picture, picture)

    shown = np.asarray(pads.guess.image)[4::8, 4::8]
    wanted = (picture * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    assert (abs(shown.astype(int) - wanted) <= 1).all()
    assert pads.static_picture().width > 3 * 256
