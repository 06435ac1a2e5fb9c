"""beit_nb.explorers.gap: bars that a hand drags, a bound that stays one, acts and a link."""

from itertools import count

import pytest

from beit_nb.elbo import posterior
from beit_nb.explorers.elbo import world_joint
from beit_nb.explorers.gap import GapExplorer

numbers = count()


def touch(explorer, token, share, kind="press", start=None):
    "What the page sends for a finger on a bar, which was pressed at the bar `start`."
    figure = explorer.belief_figure
    place = figure.figure.share_of(figure.bars_ax, token, share)
    first = figure.figure.share_of(figure.bars_ax, token if start is None else start, 0.5)
    explorer.belief_view.touch = [kind, *place, next(numbers), *first]


def test_nothing_is_done_at_the_start():
    assert GapExplorer().guide.done == []


def test_a_pressed_bar_follows_the_pointer_even_beside_it():
    explorer = GapExplorer()

    touch(explorer, 2, 0.8, "drag", start=0)  # the kernel was too busy to hear of the press

    q = explorer.beliefs[11].tolist()
    assert q[0] == pytest.approx(0.8) and explorer.pulled == {0}
    assert explorer.shares[0].value == 80 and sum(q) == pytest.approx(1)


def test_a_slider_does_what_the_finger_does():
    by_finger, by_slider = GapExplorer(), GapExplorer()

    touch(by_finger, 2, 0.6)
    by_slider.shares[2].value = 60

    assert by_slider.link() == by_finger.link()
    assert by_slider.belief_view.picture == by_finger.belief_view.picture


def test_the_acts_lead_to_the_notice():
    explorer = GapExplorer()
    goal = posterior(world_joint()[11]).tolist()

    for token in (0, 2, 1):
        touch(explorer, token, 0.5)
    assert explorer.guide.done == [0]
    touch(explorer, 1, goal[1])
    touch(explorer, 0, goal[0])
    assert explorer.guide.done == [0, 1]
    explorer.world_view.touch = [
        "press",
        *explorer.world_figure.figure.share_of(explorer.world_figure.ax, 4, -5),
        1,
    ]
    explorer.toward.value = 1.0

    assert explorer.choice.value == 4 and explorer.guide.done == [0, 1, 2]
    assert explorer.gaps.sum() < 1e-9 and explorer.by_hand == {}


def test_link_makes_the_same_state():
    explorer = GapExplorer(picture=3, t=0.35)
    touch(explorer, 0, 0.41)
    explorer.choice.value = 7
    touch(explorer, 1, 0.2)

    again = eval(explorer.link())

    assert again.link() == explorer.link() and again.words.value == explorer.words.value
    assert again.world_view.picture == explorer.world_view.picture


def test_another_ground_keeps_what_a_hand_did():
    explorer = GapExplorer()
    touch(explorer, 0, 0.41)
    before, narrow = explorer.link(), explorer.belief_view.width

    explorer.guide.set_state({"ground": [True, 2]})

    assert explorer.link() == before and explorer.belief_view.width == narrow
