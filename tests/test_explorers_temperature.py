"""beit_nb.explorers.temperature: dots that keep their winner under one slider."""

import numpy as np
import pytest
import torch

from beit_nb.explorers.temperature import (
    CORNERS,
    TemperatureExplorer,
    TriangleFigure,
)


@pytest.fixture(scope="module")
def explorer():
    return TemperatureExplorer()


def test_dots_lie_in_the_triangle():
    figure = TriangleFigure(n=300)
    shares = torch.eye(3)[torch.arange(300) % 3]

    figure(shares, 0)

    to_shares = torch.linalg.inv(torch.cat([CORNERS.T, torch.ones(1, 3)]))
    back = torch.cat([figure.places, torch.ones(300, 1)], 1) @ to_shares.T
    assert back.min() > 0 and back.amax(1).min() > 0.9


def test_the_triangle_is_pure(explorer):
    triangle = TriangleFigure()
    shares = explorer.shares

    assert triangle(shares, 1).tobytes() == triangle(shares, 1).tobytes()
    assert triangle(shares, 1).tobytes() != triangle(shares, 2).tobytes()


def test_no_temperature_changes_a_winner():
    explorer = TemperatureExplorer(tau=8)
    winners = explorer.shares.argmax(1)

    for explorer.tau.value in (1.0, 1 / 32):
        assert torch.equal(explorer.shares.argmax(1), winners)

    assert explorer.shares.amax(1).mean() > 0.97


def test_logits_change_the_odds():
    explorer = TemperatureExplorer()

    explorer.logits[2].value = 3.0

    p = torch.tensor([0.0, 1.0, 3.0]).softmax(0)
    counts = torch.bincount(explorer.shares.argmax(1), minlength=3)
    assert (counts - 500 * p).abs().max() < 40  # four standard deviations
    assert explorer.guide.error == ""


def test_the_acts():
    explorer = TemperatureExplorer()
    assert explorer.guide.done == []

    explorer.tau.value = 1 / 16
    assert explorer.guide.done == [0]
    figure = explorer.triangle_figure
    place = figure.figure.share_of(figure.ax, *figure.places[42].tolist())
    explorer.triangle_view.touch = ["press", *place, 1]
    explorer.tau.value = 1 / 4
    assert explorer.dot.value == 42 and explorer.guide.done == [0, 1]
    figure = explorer.price_figure
    place = figure.figure.share_of(figure.ax, explorer.crossing(), 1)
    explorer.price_view.touch = ["drag", *place, 1]

    assert explorer.guide.done == [0, 1, 2]
    assert explorer.tau.value == explorer.crossing()


def test_link_makes_the_same_state():
    explorer = TemperatureExplorer(tau=2**-1.25, logits=(1, -0.5, 2), dot=77)
    explorer.again.click()

    again = eval(explorer.link())

    assert again.link() == explorer.link() and again.seed.value == 1
    assert again.triangle_view.picture == explorer.triangle_view.picture
    assert again.words.value == explorer.words.value


@pytest.mark.parametrize("corner", range(3))
@pytest.mark.parametrize("way, change", [(0.25, 1.0), (-0.5, -2.0)])
def test_a_corner_can_be_pulled(corner, way, change):
    explorer = TemperatureExplorer(logits=(0.0, 0.5, -0.5))
    figure = explorer.triangle_figure
    before = [slider.value for slider in explorer.logits]
    away = CORNERS[corner] - CORNERS.mean(0)
    away = away / away.norm()
    handle = CORNERS[corner] + 0.1 * away  # in the label, outside of the triangle
    places = (handle, handle + way / 2 * away, handle + way * away)
    start, *rest = (figure.figure.share_of(figure.ax, *place.tolist()) for place in places)

    explorer.triangle_view.touch = ["press", *start, 1, *start]
    for count, place in enumerate(rest, 2):
        explorer.triangle_view.touch = ["drag", *place, count, *start]

    before[corner] += change
    assert [slider.value for slider in explorer.logits] == before
    assert explorer.dot.value == 5 and explorer.found_at is None  # no dot was meant


def test_only_the_labels_are_handles(explorer):
    figure = explorer.triangle_figure
    for place in [*(0.98 * CORNERS + 0.02 * CORNERS.mean(0)), CORNERS.mean(0)]:
        assert figure.corner_at(*figure.figure.share_of(figure.ax, *place.tolist())) is None


def test_the_counts_are_drawn_anew_when_they_have_changed():
    cold = torch.eye(3)[torch.arange(500) % 3]
    other = torch.eye(3)[torch.arange(500) % 2]
    moved, fresh = TriangleFigure(), TriangleFigure()

    moved(cold, 0)

    assert moved(other, 0).tobytes() == fresh(other, 0).tobytes()
    alpha = np.asarray(moved(other, 0))[:, :, 3]
    below = int(moved.figure.share_of(moved.ax, 0, -0.06)[1] * len(alpha))
    assert (alpha[below:] > 0).sum() > 100  # the letters at the two corners below
