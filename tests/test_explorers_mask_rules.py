"""beit_nb.explorers.mask_rules: rules, their line of code, the game as a film, statistics."""

import re

import numpy as np
import pytest
from numpy.random import default_rng

from beit_nb import masking
from beit_nb.explorers.mask_rules import (
    ALGORITHM_1,
    ALGORITHMS,
    EXACT,
    OFFICIAL,
    RANDOM,
    MaskRule,
    chance_rate,
    clumps_html,
    count_html,
    counts_html,
    describe_block,
    mask_line,
    often_html,
    python_call,
    replay,
    sample_statistics,
    single_patches,
    tell_game,
)
from beit_nb.images import PALETTE
from beit_nb.masking import MaskBlock, mask_of, mask_statistics, neighbor_rate

RULES = [
    *(MaskRule(algorithm) for algorithm in ALGORITHMS),
    MaskRule(EXACT, (8, 8), 24, 4, 0.5),
    MaskRule(OFFICIAL, (7, 7), 18, 16),
    MaskRule(ALGORITHM_1, (8, 14), 40, 6, 0.4),
]


NAMES = vars(masking) | {"default_rng": default_rng, "np": np}


def finish(generator):
    "What a generator returns."
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_line_of_code_gives_the_mask(rule):
    for seed in range(30):
        mask = rule.mask(default_rng(seed))
        assert (mask == eval(python_call(rule, seed), dict(NAMES))).all()
        assert mask_line(rule, seed, mask) == python_call(rule, seed)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_line_of_code_gives_what_a_hand_made_of_the_mask(rule):
    drawn = rule.mask(default_rng(3))
    few = drawn.copy()
    few[0, :2] ^= True

    for mask in (
        few,
        ~drawn,
        ~few,
        drawn & False,
        drawn | True,
        default_rng(0).random(drawn.shape) < 0.5,
    ):
        line = mask_line(rule, 3, mask)
        assert (eval(line, dict(NAMES)) == mask).all()
    assert mask_line(rule, 3, few).startswith(python_call(rule, 3))  # the shortest of three


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_is_written_as_the_code_that_makes_it(rule):
    assert eval(repr(rule)) == rule and repr(MaskRule()) == "MaskRule()"


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_steps_make_the_mask(rule):
    for seed in range(10):
        blocks = list(rule.steps(default_rng(seed)))
        mask = mask_of(blocks, rule.grid_size)
        assert (mask == rule.mask(default_rng(seed))).all()
        assert mask.sum() == sum(block.new for block in blocks if block.accepted)


def test_targets_are_met_as_the_algorithms_promise():
    counts = {}
    for name in ALGORITHMS:
        counts[name] = [MaskRule(name).mask(default_rng(seed)).sum() for seed in range(100)]

    assert max(counts[OFFICIAL]) <= 75 < min(counts[ALGORITHM_1])
    assert set(counts[EXACT]) == set(counts[RANDOM]) == {75}


@pytest.mark.parametrize(
    "rule,words",
    [
        (MaskRule(num_mask_patches=10), "so masks would stay empty"),
        (MaskRule(grid_size=(4, 4), num_mask_patches=16), "no block of 16 patches"),
        (MaskRule(RANDOM, (4, 4), 17), "not between 1 and 16"),
    ],
    ids=("smallest block", "grid", "target"),
)
def test_rules_that_cannot_work_are_refused(rule, words):
    with pytest.raises(ValueError, match=words):
        rule.mask(default_rng(0))


def test_single_patches_cover_the_mask_once():
    mask = default_rng(0).random((5, 7)) < 0.5

    blocks = list(single_patches(mask, default_rng(1)))

    assert len(blocks) == mask.sum() and (mask_of(blocks, (5, 7)) == mask).all()


@pytest.mark.parametrize(
    "block,words",
    [
        (MaskBlock(0, 0, 3, 6, 18, True), "3 × 6: masks 18 more"),
        (MaskBlock(0, 0, 1, 1, 1, True), "a single patch: masks 1 more"),
        (MaskBlock(0, 0, 14, 2, 0, False), "14 × 2 refused: a block may not span the picture"),
        (MaskBlock(0, 0, 3, 5, 0, False), "3 × 5 refused: masks nothing new"),
        (
            MaskBlock(0, 0, 2, 4, 7, False),
            "2 × 4 refused: would mask 7 more, but only 6 are missing",
        ),
    ],
    ids=("accepted", "single", "span", "nothing", "too many"),
)
def test_a_move_in_words(block, words):
    assert describe_block(block, 6, (14, 14)) == words


def test_a_single_missing_patch_in_words():
    block = MaskBlock(0, 0, 2, 2, 4, False)

    assert describe_block(block, 1, (14, 14)).endswith("would mask 4 more, but only 1 is missing")


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_film_shows_every_attempt_and_ends_with_the_mask(rule):
    blocks = list(rule.steps(default_rng(3)))

    start, *frames, end = replay(rule, blocks)

    assert len(frames) == len(blocks) and not start.hidden.any() and not start.boxes
    assert (end.hidden == rule.mask(default_rng(3))).all() and end.caption == tell_game(blocks)
    large = [b for b in blocks if b.accepted and b.height * b.width > 1]
    assert [box.color for box in end.boxes] == ["#ffffff"] * len(large)
    for frame, block in zip(frames, blocks):
        assert ("refused" in frame.caption) == frame.refused == (not block.accepted)
        assert (frame.boxes[-1].line == "dashed") == frame.refused  # not by colour alone
        assert frame.boxes[-1].top + frame.boxes[-1].height <= rule.grid_size[0]
    hidden = [frame.hidden.sum() for frame in frames]
    assert hidden == sorted(hidden)


def test_a_game_in_words():
    block = MaskBlock(0, 0, 4, 4, 16, True)
    refused = MaskBlock(0, 0, 14, 4, 0, False)
    single = MaskBlock(0, 0, 1, 1, 1, True)

    assert tell_game([block]) == "1 block in 1 attempt, none refused"
    assert tell_game([refused, block, block]) == "2 blocks in 3 attempts, 1 refused"
    assert tell_game([block, single]) == "1 block and 1 single patch in 2 attempts, none refused"
    assert tell_game([single] * 3) == "3 single patches in 3 attempts, none refused"


def test_words_of_a_mask_and_of_a_hand():
    rule = MaskRule()
    *_, end = replay(rule, rule.steps(default_rng(3)))
    touched = end.hidden.copy()
    touched[tuple(np.argwhere(end.hidden)[0])] = False
    touched[tuple(np.argwhere(~end.hidden)[0])] = True

    before = count_html(rule, end.hidden, end)
    after = count_html(rule, touched, end)

    assert "6 blocks in 11 attempts, 5 refused" in before and "hand" not in before
    assert "by hand: 1 more, 1 fewer" in after
    assert "75</span> of 196 patches masked (38.3%) · 75 wanted" in before


@pytest.mark.parametrize("seconds", (0.0001, 10))
def test_statistics_do_not_depend_on_the_size_of_a_piece(seconds):
    rule = MaskRule(grid_size=(8, 8), num_mask_patches=24, min_mask_patches_per_block=4)
    rng = default_rng(0)
    direct = mask_statistics(np.stack([rule.mask(rng) for _ in range(200)]), 24)

    stats = finish(sample_statistics(rule, 200, seconds))

    assert (stats["frequency"] == direct["frequency"]).all()
    assert (stats["counts"] == direct["counts"]).all()


def test_charts_say_the_statistics_and_ask_nobody_outside():
    rule = MaskRule()
    stats = finish(sample_statistics(rule, 300))
    mask = rule.mask(default_rng(3))

    often = often_html(stats)
    counts = counts_html(stats, rule, mask)
    clumps = clumps_html(mask, stats)

    assert f"exactly 75 in {stats['exactly']:.0%} of 300 masks" in counts
    assert counts.count("<rect") >= 4 and "this mask: 75" in counts
    assert f'alt="centre {stats["center"]:.0%}, corners {stats["corner"]:.0%}"' in often
    for rate in (neighbor_rate(mask[None]), stats["neighbor_rate"], 74 / 195):
        assert f">{rate:.0%}<" in clumps
    assert "http" not in often + counts + clumps


@pytest.mark.parametrize("count", (0, 5, 196))
def test_a_mask_far_from_its_rule_is_still_on_the_chart(count):
    stats = finish(sample_statistics(MaskRule(), 100))
    mask = (np.arange(196) < count).reshape(14, 14)

    chart = counts_html(stats, MaskRule(), mask)

    [points] = re.findall(r'polygon class="pointer" points="([^"]+)"', chart)
    place = float(points.split(",")[0])
    [wanted] = re.findall(r'<line class="axis" stroke-dasharray="3 3" x1="([\d.]+)"', chart)
    assert 50 <= place <= 360 and f"this mask: {count}" in chart
    assert np.sign(place - float(wanted)) == np.sign(count - 75)  # beside what was wanted


def test_by_chance_means_as_many_patches_at_random():
    masks = [MaskRule(RANDOM, num_mask_patches=60).mask(default_rng(i)) for i in range(300)]

    assert chance_rate(masks[0]) == 59 / 195
    assert abs(neighbor_rate(np.stack(masks)) - 59 / 195) < 0.02  # of 17,000 neighbours: 4 sigma
    assert chance_rate(np.zeros((14, 14), bool)) == 0


def test_every_colour_belongs_to_its_words():
    rule = MaskRule()
    stats = finish(sample_statistics(rule, 100))
    mask = rule.mask(default_rng(3))
    rows = clumps_html(mask, stats).split("<tr>")[1:]
    names = {"this mask": "orange", "masks of this rule": "blue", "as many at random": "grey"}

    for row, (name, color) in zip(rows, names.items(), strict=True):
        assert name in row and PALETTE[color] in row
    assert f'fill="{PALETTE["orange"]}"' in counts_html(stats, rule, mask).split("polygon")[1]
