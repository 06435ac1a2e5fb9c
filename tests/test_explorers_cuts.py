"""beit_nb.explorers.cuts: the price of a sequence, patches with any stride, where they lie."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from beit_nb.explorers.cuts import (
    IMG_SIZE,
    Cut,
    cost_html,
    cut_patches,
    hatch,
    sequence_picture as lay_out,
    vit_cost,
)
from beit_nb.explorers.figures import as_tiles
from beit_nb.images import house_pictures
from beit_nb.vit import VisionTransformer

SIZES = (8, 14, 16, 28, 32, 56)
CUTS = [Cut(P, int(P * s)) for P in SIZES for s in (0.5, 1, 2)]


@pytest.mark.parametrize("img_size,patch_size,width,depth", [(64, 16, 48, 2), (32, 4, 24, 3)])
def test_cost_is_what_pytorch_counts(img_size, patch_size, width, depth):
    model = VisionTransformer(img_size, patch_size, embed_dim=width, depth=depth, num_heads=3)

    with FlopCounterMode(display=False) as counter:
        model.forward_features(torch.zeros(1, 3, img_size, img_size))

    cost = vit_cost(img_size, patch_size, embed_dim=width, depth=depth)
    assert counter.get_total_flops() == 2 * cost.multiply_adds


def test_cost_of_vit_b():
    cost = vit_cost()

    assert cost.tokens == 196 and cost.pairs == 197**2
    assert round(cost.multiply_adds / 1e9, 1) == 17.6
    assert cost_html(cost).endswith("(1.00 x BEiT's), 4% of them for attention")


@pytest.mark.parametrize("patch_size,stride", [(8, 8), (8, 4), (16, 32), (7, 3)])
def test_cut_equals_unfold(patch_size, stride):
    picture = house_pictures(64)[1]
    two = F.unfold(picture[None], patch_size, stride=stride)[0].T

    patches = cut_patches(picture, patch_size, stride)

    assert torch.equal(patches, two.view(-1, 3, patch_size, patch_size))
    assert len(patches) == vit_cost(64, patch_size, stride).tokens


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_patch_is_found_where_it_lies(cut):
    numbers = torch.arange(IMG_SIZE**2, dtype=torch.float32).view(1, IMG_SIZE, IMG_SIZE)
    patches = cut_patches(numbers, *cut)
    assert len(patches) == cut.side**2

    for row, col in ((0, 0), (0, cut.side - 1), (cut.side // 2, 1), (cut.side - 1, cut.side - 1)):
        box = cut.box(row, col)
        top, left, height, width = (n * cut.cell for n in box[:4])
        here = numbers[:, top : top + height, left : left + width]
        assert torch.equal(patches[row * cut.side + col], here)
        assert cut.patch_at(box.top, box.left) == (row, col)
        assert cut.nearest(*cut.center(row, col)) == (row, col)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_covered_cells_are_those_of_some_patch(cut):
    numbers = torch.arange(IMG_SIZE**2, dtype=torch.float32).view(1, IMG_SIZE, IMG_SIZE)
    seen = np.zeros(IMG_SIZE**2, bool)
    seen[cut_patches(numbers, *cut).long().unique()] = True

    covered = cut.covered.repeat(cut.cell, 0).repeat(cut.cell, 1)

    assert np.array_equal(covered, seen.reshape(IMG_SIZE, IMG_SIZE))


def test_a_point_of_the_picture_has_a_patch_in_every_grid():
    for cut in CUTS:
        for point in ((0, 0), (223, 223), (100, 7)):
            patch = cut.nearest(*point)
            far = np.abs(np.subtract(cut.center(*patch), point)).max()
            assert far <= max(cut.stride, cut.patch_size)  # at the edge of a gap


def test_hatched_cells_and_no_others_change():
    picture = Image.new("RGB", (448, 448), "navy")
    cells = np.zeros((7, 7), bool)
    cells[2, 3] = True

    after = np.asarray(hatch(picture, cells))

    changed = (after != np.asarray(picture)).any(2)
    assert changed[128:192, 192:256].all() and changed.sum() == 64 * 64
    assert len(np.unique(after[128:192, 192:256].reshape(-1, 3), axis=0)) == 2  # stripes


@pytest.mark.parametrize("n", (1, 2, 3, 7, 14, 28, 55))
def test_sequence_is_as_wide_as_the_picture_and_keeps_its_rows(n):
    tiles = np.random.default_rng(0).integers(50, 255, (n * n, 2, 2, 3), np.uint8)

    page = np.asarray(lay_out(tiles, n))

    side, step = len(page), len(page) // n
    assert page.shape == (side, side, 3) and 400 < side <= 448
    for i in {0, n * n // 2, n * n - 1}:
        row, col = (k * step for k in divmod(i, n))
        assert (page[row + step - 1, col + step - 1] == tiles[i, 1, 1]).all()


def test_tiles_of_a_photograph_stand_in_order():
    tiles = as_tiles(cut_patches(house_pictures(64)[0], 8, 8))

    page = np.asarray(lay_out(tiles, 8), int)

    for i in (0, 5, 63):
        row, col = (k * 56 for k in divmod(i, 8))
        tile = page[row + 2 : row + 56, col + 2 : col + 56].mean((0, 1))
        assert np.abs(tile - tiles[i].mean((0, 1))).max() < 5
