"""beit_nb.explorers.mask_views: controls, states, the view of a game, charts; without a browser."""

import numpy as np
import pytest
from numpy.random import default_rng

from beit_nb import BeitError, masking
from beit_nb.explorers.mask_rules import ALGORITHM_1, ALGORITHMS, EXACT, RANDOM, MaskRule
from beit_nb.explorers.mask_views import (
    MaskButtons,
    MaskControls,
    MaskState,
    MaskView,
    StatisticsView,
    code_of,
    paper_pictures,
)
from beit_nb.explorers.shell import WrongSetting

NAMES = vars(masking) | {"default_rng": default_rng, "np": np}
START = MaskState(MaskRule(), 3)


def make_controls(rule=MaskRule(), seed=7):  # noqa: B008
    return MaskControls("chelsea", rule, seed, 224, [8, 14, 16, 28, 32])


@pytest.fixture
def view():
    view = MaskView(392)
    view.show(START)
    return view


def test_controls_keep_the_official_settings():
    controls = make_controls()

    assert (controls.rule, controls.seed) == (MaskRule(), 7)


def test_controls_say_a_rule():
    controls = make_controls()

    controls.ratio.value = 0.4
    controls.patch_size.value = 32
    controls.smallest.value = 3
    controls.aspect.value = 0.5
    controls.algorithm.choose(RANDOM)
    controls.resample.click()

    assert controls.rule == MaskRule(RANDOM, (7, 7), 20, 3, 0.5) and controls.seed == 8


@pytest.mark.parametrize(
    "rule",
    [
        MaskRule(EXACT, (8, 8), 26, 4),
        MaskRule(ALGORITHM_1, (28, 28), 300, 70, 0.7),
        MaskRule(RANDOM, (10, 10), 33, 7, 0.35),
    ],
    ids=str,
)
def test_any_rule_can_be_set(rule):
    made = make_controls(rule)
    moved = make_controls(rule)
    moved.set(MaskRule(), 1)
    moved.set(rule, 2)

    assert made.rule == moved.rule == rule and moved.seed == 2


def test_marks_lead_back_to_the_official_settings():
    controls = make_controls(
        MaskRule(num_mask_patches=90, min_mask_patches_per_block=9, min_aspect=0.6)
    )

    for slider in (controls.ratio, controls.smallest, controls.aspect):
        [slider.index] = [index for index, name in slider.marks if name == "BEiT"]

    assert controls.rule == MaskRule()


def test_what_the_algorithm_does_not_ask_for_is_idle():
    controls = make_controls()
    idle = {}

    for name in ALGORITHMS:
        controls.algorithm.choose(name)
        idle[name] = [
            s.label for s in (controls.ratio, controls.smallest, controls.aspect) if s.disabled
        ]

    assert idle == {name: [] for name in ALGORITHMS} | {RANDOM: ["smallest block", "aspect ratio"]}


def test_every_control_has_a_tooltip():
    controls = make_controls()
    parts = [*controls.watched[1:], controls.picture.menu, controls.picture.upload]

    assert all(part.help for part in parts) and len(parts) == 8
    assert controls.resample.tooltip and all(b.tooltip for b in MaskButtons().row.children)


@pytest.mark.parametrize(
    "rule,words",
    [
        (MaskRule(num_mask_patches=10), "no block of 16 patches fits into 10"),
        (MaskRule(grid_size=(7, 7), num_mask_patches=44, min_mask_patches_per_block=44), "7 × 7"),
    ],
    ids=("target", "grid"),
)
def test_a_rule_that_cannot_work_is_said_in_words_of_the_screen(rule, words):
    with pytest.raises(BeitError):
        rule.mask(default_rng(0))
    controls = make_controls(rule)

    wrong = controls.refuse(rule)

    assert isinstance(wrong, WrongSetting) and wrong.control is controls.smallest
    assert words in str(wrong) and "_" not in str(wrong)  # no name of a Python argument


def test_a_state_is_written_as_code():
    rule = MaskRule(RANDOM, (7, 7), 20)
    state = MaskState(rule, 5, 4, (0, 9))

    assert code_of("cat", START) == "MaskExplorer('cat', seed=3)"
    assert code_of("cat", state) == f"MaskExplorer('cat', {rule}, seed=5, attempt=4, hand=[0, 9])"


def test_a_state_is_shown(view):
    drawn = MaskRule().mask(default_rng(3))
    flipped = drawn.copy()
    flipped[0, :2] ^= True

    view.show(START._replace(hand=(0, 1)))
    touched = view.pad.mask
    boxes = len(view.pad.boxes)
    view.show(START)

    assert (touched == flipped).all() and boxes == 0
    assert (view.pad.mask == drawn).all() and len(view.pad.boxes) == 6


@pytest.mark.parametrize("attempt", (0, 1, 3, 11, None))
def test_every_moment_of_a_game_is_shown(view, attempt):
    view.show(START._replace(attempt=attempt))

    frame = view.frames[-1 if attempt is None else attempt]
    assert (view.pad.mask == frame.hidden).all() and view.pad.boxes == frame.boxes
    assert view.scrubber.attempt == attempt and frame.caption in view.words.value
    assert (eval(view.line.code, dict(NAMES)) == view.pad.mask).all()


def test_the_scrubber_has_as_many_places_as_the_game_has_attempts(view):
    official = view.scrubber.texts
    view.show(MaskState(MaskRule(RANDOM), 3))

    assert official == ["start", *(f"{i} of 11" for i in range(1, 12)), "end"]
    assert len(view.scrubber.texts) == 77 and view.scrubber.attempt is None


def test_the_line_of_code_follows_a_hand(view):
    for cell in (0, 1, 100, 0):
        view.pad.press(cell)
        view.touched()
        assert (eval(view.line.code, dict(NAMES)) == view.pad.mask).all()

    assert view.state.hand == (1, 100) and "by hand" in view.words.value
    assert view.pad.boxes == []  # they no longer say how the mask came about


def test_a_rule_that_cannot_work_changes_nothing(view):
    before = (view.state, view.pad.marked, view.words.value, view.scrubber.texts)

    with pytest.raises(BeitError):
        view.show(MaskState(MaskRule(num_mask_patches=10), 3))

    assert (view.state, view.pad.marked, view.words.value, view.scrubber.texts) == before


def test_statistics_are_remembered_for_each_rule():
    mask = MaskRule().mask(default_rng(3))
    statistics = StatisticsView(print, draws=50)
    statistics.start(MaskRule(), mask)
    first = (statistics.often.value, statistics.counts.value, statistics.clumps.value)
    statistics.start(MaskRule(RANDOM), mask)
    other = (statistics.often.value, statistics.counts.value, statistics.clumps.value)
    known = dict(statistics.known)
    statistics.start(MaskRule(), mask)

    assert first == (statistics.often.value, statistics.counts.value, statistics.clumps.value)
    assert all(a != b for a, b in zip(first, other)) and statistics.known == known
    assert len(known) == 2 and "of 50 masks" in first[1]


def test_another_mask_of_a_rule_counts_nothing_anew():
    mask = MaskRule().mask(default_rng(3))
    statistics = StatisticsView(print, draws=50)
    statistics.start(MaskRule(), mask)
    statistics.count = None  # must not be called

    statistics.start(MaskRule(), ~mask)

    assert "this mask: 121" in statistics.counts.value


def test_on_paper_there_are_the_mask_and_its_rule(view):
    pictures = paper_pictures(view, StatisticsView(print, draws=50))

    assert [*pictures] == ["75 of 196 patches masked", "how often, in 1,000 masks"]
