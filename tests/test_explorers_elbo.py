"""beit_nb.explorers.elbo: the small world, a belief under a finger, and its pictures."""

import pytest
import torch
from torch.testing import assert_close

from beit_nb.elbo import elbo, log_evidence
from beit_nb.explorers.elbo import (
    STAMPS,
    BeliefFigure,
    WorldFigure,
    gap_words,
    interpolate_posterior,
    set_share,
    world_joint,
)
from beit_nb.explorers.figures import DARK_INK, Screen


@pytest.mark.parametrize("t", (0.0, 0.1, 0.5, 0.9, 1.0))
def test_gap_is_kl_and_the_evidence_stays(t):
    evidence = log_evidence(world_joint())

    q, low, gap = interpolate_posterior(t)

    assert_close(q.sum(1), torch.ones(16, dtype=q.dtype))
    assert_close(low + gap, evidence, atol=1e-12, rtol=0)
    assert (gap > -1e-12).all()


def test_the_sixteen_pictures_are_all_there_are():
    _, evidence, gap = interpolate_posterior(1.0)

    assert gap.abs().max() < 1e-12
    assert_close(evidence.exp().sum(), torch.tensor(1.0, dtype=evidence.dtype))


def test_one_share_moves_and_the_others_keep_their_ratio():
    q = set_share(STAMPS.new_tensor([0.2, 0.2, 0.6]), 1, 0.6)

    assert_close(q, STAMPS.new_tensor([0.1, 0.6, 0.3]))


def test_beliefs_stay_probabilities_whatever_a_hand_does():
    dice = torch.Generator().manual_seed(0)
    q = STAMPS.new_tensor([0.04, 0.92, 0.04])

    for _ in range(300):
        share = (torch.rand((), generator=dice) * 1.4 - 0.2).clamp(0, 1).item()
        q = set_share(q, int(torch.randint(3, (), generator=dice)), share)
        assert abs(q.sum() - 1) < 1e-12 and q.min() >= 0
        assert elbo(world_joint(), q.expand(16, 3)).le(log_evidence(world_joint()) + 1e-12).all()


@pytest.mark.parametrize("make", (BeliefFigure, WorldFigure))
def test_figures_are_pure(make):
    figure = make()
    here, there = (interpolate_posterior(t)[0] for t in (0.2, 0.8))

    first, second, other = figure(11, here), figure(11, there), figure(3, here)

    assert figure(11, here).tobytes() == first.tobytes()
    assert len({first.tobytes(), second.tobytes(), other.tobytes()}) == 3


@pytest.mark.parametrize("screen", (Screen(), Screen(DARK_INK, 2)))
def test_a_touch_is_found_at_any_density(screen):
    belief, world = BeliefFigure(screen), WorldFigure(screen)

    for token in range(3):
        place = belief.figure.share_of(belief.bars_ax, token, 0.37)
        assert belief.bar_at(*place) == (token, 0.37)
    for picture in range(16):
        place = world.figure.share_of(world.ax, picture, -11)
        assert world.picture_at(*place) == picture
    assert belief.bar_at(0.99, 0.5)[0] is None


def test_words_never_say_minus_zero():
    words = gap_words(11, interpolate_posterior(1.0)[0])

    assert "-0.000" not in words and "KL(q ‖ posterior) <b>0.000</b>" in words
