"""beit_nb.explorers.patches: the price of a sequence, patches with any stride, the explorer."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from beit_nb.explorers.figures import as_tiles
from beit_nb.explorers.patches import (
    PatchExplorer,
    cost_html,
    cut_patches,
    frame_patch,
    sequence_picture,
    vit_cost,
)
from beit_nb.images import house_pictures
from beit_nb.vit import VisionTransformer

ORANGE = (0xE0, 0x80, 0x20)


def pixels(picture):
    return np.asarray(picture.convert("RGB")).astype(int)


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


def test_sequence_keeps_every_patch_in_its_place():
    tiles = as_tiles(cut_patches(house_pictures(64)[0], 8, 8))

    picture, ncols = sequence_picture(tiles)

    page = pixels(picture)
    step = 448 // ncols
    middle = step // 2
    source = middle * 8 // (step - 2)
    for i in (0, 5, 63):
        row, col = (n * step + 2 + middle for n in divmod(i, ncols))
        assert (page[row, col] == tiles[i, source, source]).all()


@pytest.mark.parametrize("n", (1, 2, 9, 49, 196, 784, 3025))
def test_sequence_stays_within_its_frame(n):
    picture, _ = sequence_picture(np.zeros((n, 2, 2, 3), np.uint8))

    assert picture.width <= 448 and picture.height <= 330


def test_frame_stands_around_its_patch():
    sequence, ncols = sequence_picture(np.zeros((9, 2, 2, 3), np.uint8))

    framed = pixels(frame_patch(sequence, 4, ncols))

    size = 448 // ncols
    row, col = 4 // ncols * size, 4 % ncols * size
    assert (framed[row, col : col + size] == ORANGE).all()
    assert (framed[row + 5, col + 5] != ORANGE).any()


@pytest.mark.parametrize(
    "size,stride,shuffle,cell",
    [(16, 1, False, 37), (32, 0.5, True, 100), (14, 2, True, 5), (56, 1, False, 15)],
)
def test_the_same_patch_stands_in_picture_and_sequence(size, stride, shuffle, cell):
    explorer = PatchExplorer("astronaut")
    controls = explorer.controls
    controls.patch_size.value = size
    controls.stride.value = stride
    controls.shuffle.value = shuffle

    explorer.pad.press(cell)

    place = list(explorer.order).index(cell)
    assert f"word <b>{place + 1}</b>" in explorer.words.value
    step = int(size * stride)
    row, col = (n * step for n in divmod(cell, explorer.pad.cols))
    picture = pixels(explorer.picture.resize((224, 224)))
    patch = picture[row : row + size, col : col + size]
    side = 448 // explorer.ncols
    top, left = (n * side for n in divmod(place, explorer.ncols))
    tile = pixels(explorer.sequence)[top + 2 : top + side, left + 2 : left + side]
    assert np.abs(tile.mean((0, 1)) - patch.mean((0, 1))).max() < 12
    frame = pixels(explorer.framed)[top, left : left + side]
    assert (frame == ORANGE).all()


def test_price_follows_the_controls():
    explorer = PatchExplorer()
    words = explorer.words
    assert "<b>196</b> tokens" in words.value and "word <b>91</b>" in words.value

    explorer.controls.patch_size.value = 8
    explorer.controls.stride.value = 0.5

    assert "<b>3,025</b> tokens" in words.value and explorer.pad.rows == 55


def test_cursor_stays_inside_a_smaller_grid():
    explorer = PatchExplorer()
    explorer.pad.press(195)

    explorer.controls.patch_size.value = 56

    assert explorer.pad.cursor == 0 and explorer.pad.rows == 4
    assert explorer.guide.error == ""


def test_mistakes_are_one_line_and_the_picture_stays(tmp_path):
    explorer = PatchExplorer()
    before = bytes(explorer.view.picture)

    for bad in (b"not a picture", str(tmp_path / "nothing.png")):
        explorer.controls.picture.value = bad
        assert explorer.guide.error
        assert "Traceback" not in explorer.guide.error
        assert bytes(explorer.view.picture) == before
    explorer.controls.picture.value = "coffee"
    assert explorer.guide.error == "" and bytes(explorer.view.picture) != before


def test_no_picture_at_all_is_a_line_too(tmp_path):
    explorer = PatchExplorer(str(tmp_path / "nothing.png"))

    data, _ = explorer._repr_mimebundle_()

    assert "image/png" not in data and explorer.guide.error
