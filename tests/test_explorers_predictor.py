"""beit_nb.explorers.predictor: what a network says behind a mask, counted; digits, drawings."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from beit_nb import BeitError
from beit_nb.dvae import DiscreteVAE
from beit_nb.engine.sources import Digits
from beit_nb.explorers.predictor import (
    Guess,
    MimPredictor,
    commonest_tokens,
    ink_picture,
    letters_to_marks,
    marks_to_letters,
    mim_predictor,
    named_digits,
)
from beit_nb.images import normalize, to_float
from beit_nb.pretraining import build_mim
from beit_nb.recipes import recipe_named
from beit_nb.tokens import Tokenizer


@pytest.fixture
def guess():
    "Five cells of four tokens: the first visible, then right, right, a near and a far miss."
    probs = torch.zeros(1, 5, 8)
    probs[0, :, :6] = torch.tensor([0.3, 0.25, 0.2, 0.12, 0.08, 0.05])
    return Guess(torch.arange(5)[None] > 0, torch.tensor([[3, 0, 0, 4, 5]]), probs)


def test_only_hidden_cells_are_guessed(guess):
    assert guess.ids.tolist() == [[3, 0, 0, 0, 0]]


def test_right_wrong_and_near(guess):
    assert guess.right.tolist() == [[False, True, True, False, False]]
    assert guess.wrong.tolist() == [[False, False, False, True, True]]
    assert guess.near.tolist() == [[False, False, False, True, False]]
    assert guess.ranks.tolist() == [[4, 1, 1, 5, 6]]


def test_sure_is_the_mean_over_hidden_cells(guess):
    assert guess.sure == pytest.approx(0.3)
    assert Guess(guess.mask & False, guess.truth, guess.probs).sure == 0


def test_best_tokens_of_a_cell_fall(guess):
    best = guess.best((0, 3), 3)

    assert [token for token, _ in best] == [0, 1, 2]
    assert [p for _, p in best] == pytest.approx([0.3, 0.25, 0.2])


def test_digits_have_their_names():
    digits = Digits("test")
    named = named_digits()

    assert [*named][:2] == ["a zero", "a one"] and [*named][-2:] == ["an eight", "a nine"]
    for label, picture in enumerate(named.values()):
        place = (to_float(digits.images) == picture).all((1, 2, 3)).nonzero()[0].item()
        assert digits.labels[place] == label


def test_ink_is_brightest_where_the_hand_was():
    marks = np.zeros((32, 32), bool)
    marks[10:13, 5:20] = True

    picture = ink_picture(marks)

    assert picture.shape == (3, 32, 32) and picture.min() == 0 and picture.max() == 1
    assert picture[0][marks].min() > picture[0][~marks].max()
    assert ink_picture(marks & False).max() == 0


@pytest.mark.parametrize("shape", ((8, 8), (32, 32), (7, 9)))
def test_packed_marks_come_back(shape):
    marks = np.random.default_rng(0).random(shape) < 0.3

    assert (letters_to_marks(marks_to_letters(marks), shape) == marks).all()


@pytest.mark.parametrize(
    "letters", ("", "no drawing", marks_to_letters(np.ones((8, 8), bool)), "ä")
)
def test_what_is_no_drawing_is_refused(letters):
    with pytest.raises(BeitError, match="no drawing of 32 x 32 cells"):
        letters_to_marks(letters, (32, 32))


def test_the_rival_says_what_is_most_frequent():
    torch.manual_seed(0)
    tokenizer = Tokenizer(DiscreteVAE(16, width=8))

    rival = commonest_tokens(tokenizer, n=300)

    ids = tokenizer.get_codebook_indices(to_float(Digits("train", places=1).images[:300]))
    counts = torch.nn.functional.one_hot(ids, 16).sum(0)
    said = counts.gather(-1, rival[..., None])[..., 0]
    assert rival.shape == (8, 8) and torch.equal(said, counts.amax(-1))


def test_without_a_run_the_networks_that_came_along_answer(tmp_path):
    predict = mim_predictor(tmp_path)

    assert "came with beit_nb" in predict.line and predict.grid_size == (8, 8)
    assert predict.tokenizer.vocab_size == predict.recipe.vocab_size


@pytest.fixture
def predict():
    recipe = recipe_named("pretrain", "nano")
    tokenizer = Tokenizer(DiscreteVAE(recipe.vocab_size, width=16))
    return MimPredictor(build_mim(recipe).eval(), tokenizer, recipe)


def test_nothing_hidden_nothing_guessed(predict):
    views = predict(torch.rand(3, 32, 32), np.zeros((8, 8), bool))

    assert torch.equal(views["the model's guess"], views["the true tokens"])


def test_hidden_cells_show_what_the_network_says(predict):
    picture = torch.rand(3, 32, 32)
    mask = np.zeros((8, 8), bool)
    mask[1:3, 3:8] = True

    views = predict(picture, mask)

    hidden = torch.from_numpy(mask)[None]
    ids = predict.tokenizer.get_codebook_indices(picture[None])
    with torch.no_grad():
        logits = predict.model(normalize(picture[None]), hidden, return_all_tokens=True)
    guess = torch.where(hidden, logits.argmax(-1).view(1, 8, 8), ids)
    assert_close(views["the model's guess"], predict.tokenizer.decode(guess)[0])
    assert_close(views["the true tokens"], predict.tokenizer.decode(ids)[0])
    assert predict.grid_size == (8, 8)


def test_pictures_of_another_size_are_resized(predict):
    views = predict(torch.rand(3, 64, 64), np.ones((8, 8), bool))

    assert views["the model's guess"].shape == (3, 32, 32)
