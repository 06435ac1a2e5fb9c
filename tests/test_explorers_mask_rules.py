"""beit_nb.explorers.mask_rules: rules, their line of code, the game as a film, statistics."""

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
    count_html,
    describe_block,
    python_call,
    replay,
    sample_statistics,
    single_patches,
    statistics_html,
    tell_game,
)
from beit_nb.masking import MaskBlock, mask_of, mask_statistics

RULES = [
    *(MaskRule(algorithm) for algorithm in ALGORITHMS),
    MaskRule(EXACT, (8, 8), 24, 4, 0.5),
    MaskRule(OFFICIAL, (7, 7), 18, 16),
    MaskRule(ALGORITHM_1, (8, 14), 40, 6, 0.4),
]


def finish(generator):
    "What a generator returns."
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_line_of_code_gives_the_mask(rule):
    names = vars(masking) | {"default_rng": default_rng}
    for seed in range(30):
        mask = rule.mask(default_rng(seed))
        assert (mask == eval(python_call(rule, seed), dict(names))).all()


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
        (MaskBlock(0, 0, 3, 6, 18, True), "3 × 6: hides 18 more"),
        (MaskBlock(0, 0, 1, 1, 1, True), "a single patch: hides 1 more"),
        (MaskBlock(0, 0, 14, 2, 0, False), "14 × 2 refused: a block may not span the grid"),
        (MaskBlock(0, 0, 3, 5, 0, False), "3 × 5 refused: hides nothing new"),
        (MaskBlock(0, 0, 2, 4, 7, False), "2 × 4 refused: would hide 7 more, only 6 may be"),
    ],
    ids=("accepted", "single", "span", "nothing", "too many"),
)
def test_a_move_in_words(block, words):
    assert describe_block(block, 6, (14, 14)) == words


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_film_shows_every_attempt_and_ends_with_the_mask(rule):
    blocks = list(rule.steps(default_rng(3)))

    *frames, end = replay(rule, blocks)

    assert len(frames) == len(blocks) and end.caption == ""
    assert (end.hidden == rule.mask(default_rng(3))).all()
    assert len(end.boxes) == sum(block.accepted for block in blocks)
    for frame, block in zip(frames, blocks):
        assert ("refused" in frame.caption) != block.accepted
    hidden = [frame.hidden.sum() for frame in frames]
    assert hidden == sorted(hidden)


def test_words_of_a_game_and_of_a_hand():
    rule = MaskRule()
    blocks = list(rule.steps(default_rng(3)))
    drawn = mask_of(blocks)
    touched = drawn.copy()
    touched[tuple(np.argwhere(drawn)[0])] = False
    touched[tuple(np.argwhere(~drawn)[0])] = True

    before = tell_game(rule, blocks, drawn, drawn)
    after = tell_game(rule, blocks, touched, drawn)

    assert before == "6 blocks in 11 attempts"
    assert after == before + " · by hand: 1 more, 1 fewer"
    html = count_html(rule, 3, touched, after)
    assert "<b>75</b></span> of 75 wanted · 38.3% of 196 patches" in html
    assert python_call(rule, 3) in html


@pytest.mark.parametrize("seconds", (0.0001, 10))
def test_statistics_do_not_depend_on_the_size_of_a_piece(seconds):
    rule = MaskRule(grid_size=(8, 8), num_mask_patches=24, min_mask_patches_per_block=4)
    rng = default_rng(0)
    direct = mask_statistics(np.stack([rule.mask(rng) for _ in range(200)]), 24)

    stats = finish(sample_statistics(rule, 200, seconds))

    assert (stats["frequency"] == direct["frequency"]).all()
    assert (stats["counts"] == direct["counts"]).all()


def test_statistics_as_html_ask_nobody_outside():
    rule = MaskRule()
    stats = finish(sample_statistics(rule, 300))

    html = statistics_html(stats, rule, 300)

    assert f"exactly 75 in {stats['exactly']:.0%} of 300 draws" in html
    assert html.count("<rect") >= 4 and "http" not in html
