"""beit_nb.explorers.elbo: the gap, the temperature, the KL weight; functions first."""

import pytest
import torch
from torch.testing import assert_close

from beit_nb.elbo import kl_uniform
from beit_nb.explorers.elbo import (
    AlphabetExplorer,
    AlphabetFigure,
    GapExplorer,
    GapFigure,
    TemperatureExplorer,
    TemperatureFigure,
    fit_codebook,
    interpolate_posterior,
)
from beit_nb.images import house_pictures
from beit_nb.patches import patchify


@pytest.mark.parametrize("t", (0.0, 0.1, 0.5, 0.9, 1.0))
def test_gap_is_kl_and_the_evidence_stays(t):
    _, low, gap = interpolate_posterior(0.0)
    evidence = low + gap

    q, low, gap = interpolate_posterior(t)

    assert_close(q.sum(1), torch.ones(16, dtype=q.dtype))
    assert_close(low + gap, evidence, atol=1e-12, rtol=0)
    assert (gap > -1e-12).all()


def test_the_sixteen_pictures_are_all_there_are():
    _, evidence, gap = interpolate_posterior(1.0)

    assert gap.abs().max() < 1e-12
    assert_close(evidence.exp().sum(), torch.tensor(1.0, dtype=evidence.dtype))


@pytest.mark.parametrize(
    "make,one,other",
    [
        (GapFigure, 0.2, 0.8),
        (lambda: TemperatureFigure(torch.zeros(3), torch.randn(50, 3)), 0.1, 2.0),
        (lambda: AlphabetFigure(house_pictures(64)[0]), 0.5, 50.0),
    ],
    ids=("gap", "temperature", "alphabet"),
)
def test_figures_are_pure(make, one, other):
    figure = make()

    first, words = figure(one)
    second, other_words = figure(other)
    again, same_words = figure(one)

    assert first.tobytes() == again.tobytes() != second.tobytes()
    assert words == same_words != other_words


def test_cold_choices_are_decided():
    figure = TemperatureFigure(torch.tensor([0.0, 1.0, -1.0]), torch.zeros(9, 3))

    assert "<b>100%</b>" in figure(1 / 32)[1] and "<b>38%</b>" in figure(8.0)[1]


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


def test_gap_melts_under_the_slider():
    explorer = GapExplorer()

    explorer.controls[0].value = 1.0

    assert "orange in all: <b>0.00</b>" in explorer.words.value


def test_temperature_begins_where_it_is_told():
    explorer = TemperatureExplorer(tau=8)

    explorer.controls[0].value = 0.125

    share = int(explorer.words.value.split("<b>")[1].split("%")[0])
    assert share > 90 and explorer.guide.error == ""


def test_cost_of_a_token_falls_with_the_weight():
    explorer = AlphabetExplorer(house_pictures(64)[2])

    costs = []
    for explorer.controls[0].value in (0.25, 6.6, 192):
        costs.append(float(explorer.words.value.split("costs <b>")[1].split("<")[0]))

    assert costs[0] > costs[1] > costs[2] == 0
