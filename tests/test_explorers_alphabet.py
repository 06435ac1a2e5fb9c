"""beit_nb.explorers.alphabet: codebooks at a price, their curve, and the hand on it."""

import pytest
import torch
from torch.testing import assert_close

from beit_nb.elbo import kl_uniform
from beit_nb.explorers.alphabet import (
    SPECIAL,
    WEIGHTS,
    Alphabet,
    AlphabetExplorer,
    CurveFigure,
    alphabet_page,
    fit_codebook,
)
from beit_nb.explorers.figures import PAPER
from beit_nb.images import house_pictures
from beit_nb.patches import patchify


def codebook_loss(blocks, codes, q, beta):
    reconstruction = (q * torch.cdist(blocks, codes).square() * 4).sum(1)
    return (reconstruction + beta * kl_uniform(q.clamp_min(1e-30).log())).mean()


@pytest.mark.parametrize("beta", (0.5, 6.6, 40.0))
def test_every_round_lowers_the_loss(beta):
    blocks = patchify(house_pictures(64), 8).flatten(0, 1)

    losses = []
    for rounds in (1, 2, 4, 8, 16):
        codes, q = fit_codebook(blocks, blocks[:16], beta, rounds)
        losses.append(codebook_loss(blocks, codes, q, beta).item())

    for before, after in zip(losses, losses[1:]):
        assert after <= before + 1e-4


def test_a_dear_token_leaves_one_code():
    blocks = patchify(house_pictures(64), 8).flatten(0, 1)

    codes, _ = fit_codebook(blocks, blocks[:16], 2000.0)

    assert_close(codes, blocks.mean(0).expand_as(codes), atol=2e-2, rtol=0)


def test_an_alphabet_fits_each_weight_once():
    alphabet = Alphabet(house_pictures(64)[0])

    first = alphabet.at(6.6)

    assert alphabet.at(6.6) is first and alphabet.at(8.0).cost < first.cost
    assert alphabet.critical < alphabet.gray_weight in WEIGHTS


def test_pictures_are_pure_and_dense():
    alphabet = Alphabet(house_pictures(224)[0])
    curve = CurveFigure(PAPER, alphabet)

    assert alphabet_page(alphabet.at(1.0), density=2).size == (936, 448)
    first = curve(alphabet, 6.6).tobytes()
    assert first == curve(alphabet, 6.6).tobytes() != curve(alphabet, 1.0).tobytes()
    for beta in SPECIAL:
        fit = alphabet.at(beta)
        place = curve.figure.share_of(curve.ax, fit.cost, fit.error)
        if fit.cost:
            assert curve.weight_at(alphabet, *place) == pytest.approx(beta)


def test_the_acts():
    explorer = AlphabetExplorer()
    assert explorer.guide.done == []

    explorer.weight.value = 6.6
    assert explorer.guide.done == [0]
    chart = explorer.curve
    cost = 0.25 * explorer.alphabet.at(1.0).cost
    explorer.curve_view.touch = ["press", *chart.figure.share_of(chart.ax, cost, 0.01), 1]
    assert explorer.guide.done == [0, 1]
    explorer.weight.value = 192

    assert explorer.guide.done == [0, 1, 2] and explorer.guide.error == ""
    assert explorer.fit.codes.std(0).max() < 1 / 255


@pytest.mark.slow
def test_link_makes_the_same_state():
    explorer = AlphabetExplorer("rocket", weight=2**4.25)

    again = eval(explorer.link())

    assert again.link() == explorer.link() and again.words.value == explorer.words.value
    assert again.page_view.picture == explorer.page_view.picture


def test_all_alike_is_marked_where_it_is_for_this_picture():
    explorer = AlphabetExplorer({"mine": house_pictures(224)[1]})
    marks = {name: WEIGHTS[index] for index, name in explorer.weight.marks}

    explorer.weight.value = marks["all alike"]

    assert marks["DALL-E"] == 6.6 and explorer.fit.cost < 0.05
    assert explorer.fit.codes.std(0).max() < 3 / 255
