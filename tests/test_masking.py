"""Masks: how many are hidden, where, in which shapes; and settings that would ruin a run."""

from math import log

import numpy as np
import pytest
import torch
from numpy.random import default_rng

from beit_nb import BeitError
from beit_nb.masking import (
    MaskBlock,
    algorithm1_blocks,
    blockwise_mask,
    blockwise_masks,
    blockwise_steps,
    fix_mask_count,
    mask_of,
    mask_statistics,
    neighbor_rate,
    random_mask,
)

PINNED = """
#.......
........
....###.
..######
..######
...####.
...####.
........
"""


def drawn(text):
    "Rows of # (hidden) and . (visible) as a mask."
    return np.array([[c == "#" for c in row] for row in text.split()])


@pytest.fixture(scope="module")
def official():
    rng = default_rng(0)
    return np.stack([blockwise_mask(rng=rng) for _ in range(3000)])


# --- single patches


def test_random_masks_hide_exactly_and_everywhere_alike():
    rng = default_rng(0)
    masks = np.stack([random_mask((6, 9), 20, rng) for _ in range(4000)])

    assert masks.dtype == bool and masks.shape == (4000, 6, 9)
    assert (masks.sum((1, 2)) == 20).all()
    assert abs(masks.mean(0) - 20 / 54).max() < 0.04  # five standard errors
    assert abs(neighbor_rate(masks) - 19 / 53) < 0.01


@pytest.mark.parametrize("count", [0, -1, 26])
def test_random_masks_of_impossible_counts_are_refused(count):
    with pytest.raises(BeitError, match=f"random_mask: num_mask_patches {count} is not between 1"):
        random_mask((5, 5), count)


# --- the official blocks


def test_a_seed_gives_the_mask_that_it_always_gave():
    assert (blockwise_mask((8, 8), 24, 4, rng=default_rng(3)) == drawn(PINNED)).all()


def test_official_masks_never_hide_more_and_rarely_less(official):
    counts = official.sum((1, 2))
    assert counts.max() == 75 and counts.min() > 50
    assert abs(counts.mean() - 74.5) < 0.15
    assert abs((counts == 75).mean() - 0.67) < 0.04


def test_official_masks_are_clumps_in_the_middle(official):
    habits = mask_statistics(official, 75)
    assert abs(habits["neighbor_rate"] - 0.86) < 0.01
    assert abs(habits["center"] - 0.72) < 0.04
    assert abs(habits["corner"] - 0.04) < 0.02


def test_every_step_obeys_the_rules():
    rng = default_rng(0)
    games = [list(blockwise_steps(rng=rng)) for _ in range(500)]
    kept = [[b for b in game if b.accepted] for game in games]
    blocks = [b for game in kept for b in game]

    for b in blocks:
        assert b.height < 14 and b.width < 14
        assert 0 <= b.top <= 14 - b.height and 0 <= b.left <= 14 - b.width
        # rounding moves a side by at most a half
        assert (b.height - 0.5) / (b.width + 0.5) <= 1 / 0.3
        assert (b.height + 0.5) / (b.width - 0.5) >= 0.3
    slant = np.mean([log(b.height / b.width) for b in blocks])
    assert abs(slant) < 0.08  # tall and wide alike
    for game, blocks in zip(games, kept):
        hidden = np.zeros((14, 14), bool)
        for b in blocks:
            assert b.new == (~hidden[b.cells]).sum() > 0
            hidden[b.cells] = True
        assert (mask_of(game) == hidden).all()
        assert hidden.sum() == sum(b.new for b in blocks) <= 75
        ended_by_refusals = len(game) >= 10 and not any(b.accepted for b in game[-10:])
        assert hidden.sum() == 75 or ended_by_refusals


def test_largest_block_is_respected():
    rng = default_rng(0)
    steps = [b for _ in range(100) for b in blockwise_steps(max_mask_patches_per_block=20, rng=rng)]
    assert max(b.new for b in steps if b.accepted) == 20


def test_steps_and_masks_are_the_same_game():
    for seed in range(50):
        steps = blockwise_steps((10, 12), 50, 9, 30, 0.4, default_rng(seed))
        mask = blockwise_mask((10, 12), 50, 9, 30, 0.4, rng=default_rng(seed))
        assert (mask_of(steps, (10, 12)) == mask).all()


def test_masks_are_never_empty():
    "A game that ends with nothing hidden is played again; on so small a grid one in ten does."
    rng = default_rng(0)
    settings = dict(grid_size=(5, 5), num_mask_patches=16, rng=rng)
    games = [mask_of(blockwise_steps(**settings), (5, 5)) for _ in range(300)]
    assert not all(mask.any() for mask in games)
    assert all(blockwise_mask(**settings).any() for _ in range(300))


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(num_mask_patches=1), "raise num_mask_patches"),
        (dict(num_mask_patches=0), "between 1 and 196"),
        (dict(num_mask_patches=200), "change num_mask_patches or grid_size"),
        (dict(max_mask_patches_per_block=9), "raise max_mask_patches_per_block"),
        (dict(min_mask_patches_per_block=0), "is not between 1 and"),
        (dict(grid_size=(4, 4), num_mask_patches=16), "lower min_mask_patches_per_block"),
        (dict(min_aspect=3), "min_aspect 3"),
        (dict(min_aspect=0), "min_aspect 0"),
    ],
)
def test_settings_that_give_empty_masks_are_refused(settings, words):
    with pytest.raises(BeitError, match=words) as e:
        blockwise_mask(**settings)
    assert "\n" not in str(e.value)


# --- the exact count


@pytest.mark.parametrize("target", [1, 23, 24, 25, 64])
def test_repair_changes_no_patch_in_vain(target):
    mask = drawn(PINNED)
    fixed = fix_mask_count(mask, target, default_rng(0))
    assert fixed.sum() == target
    assert (fixed != mask).sum() == abs(target - 24)
    assert (mask == drawn(PINNED)).all()  # the given one is left alone


def test_exact_masks_hit_the_target():
    rng = default_rng(0)
    assert all(blockwise_mask(exact=True, rng=rng).sum() == 75 for _ in range(200))


# --- batches


def test_a_batch_has_a_mask_for_each_picture():
    masks = blockwise_masks(6, (8, 8), 24, 4, exact=True, rng=default_rng(1))

    assert masks.shape == (6, 8, 8) and masks.dtype == torch.bool
    assert (masks.sum((1, 2)) == 24).all()
    assert len({tuple(m.flatten().tolist()) for m in masks}) == 6
    rng = default_rng(1)
    for mask in masks:
        one = blockwise_mask((8, 8), 24, 4, exact=True, rng=rng)
        assert torch.equal(mask, torch.from_numpy(one))


def test_without_a_generator_every_call_differs():
    assert (blockwise_mask() != blockwise_mask()).any()
    assert (random_mask((14, 14), 75) != random_mask((14, 14), 75)).any()


# --- Algorithm 1


def test_algorithm_1_overshoots_and_prefers_tall_blocks():
    rng = default_rng(0)
    games = [list(algorithm1_blocks(rng=rng)) for _ in range(2000)]
    counts = np.array([mask_of(game).sum() for game in games])
    shapes = [(b.height, b.width) for game in games for b in game if b.height != b.width]

    assert counts.min() > 0.4 * 196
    assert abs(counts.mean() - 84.6) < 0.6
    assert np.mean([h > w for h, w in shapes]) > 0.7
    for game in games:
        without_the_last = mask_of(game[:-1])
        assert without_the_last.sum() <= 0.4 * 196


# --- measures


def test_measures_by_hand():
    masks = np.stack([drawn("##. ### ..."), drawn("... .#. ..#")])
    habits = mask_statistics(masks, 5)

    # left neighbours that are hidden: 2 + 2 and 1 + 0; of their right neighbours 3 are hidden
    assert neighbor_rate(masks) == habits["neighbor_rate"] == 3 / 5
    assert (habits["frequency"] == masks.mean(0)).all()
    assert habits["counts"].tolist() == [5, 2]
    assert habits["mean"] == 3.5
    assert habits["exactly"] == 0.5
    assert habits["corner"] == (0.5 + 0 + 0 + 0.5) / 4
    assert habits["center"] == 1
    assert habits["chance"] == pytest.approx((5 * 4 + 2 * 1) / (7 * 8))
    assert neighbor_rate(np.zeros((2, 3, 3), bool)) == 0


def test_mask_of_leaves_refused_blocks_out():
    steps = [MaskBlock(0, 1, 2, 2, 4, True), MaskBlock(2, 0, 1, 3, 3, False)]
    assert (mask_of(steps, (3, 3)) == drawn(".## .## ...")).all()
