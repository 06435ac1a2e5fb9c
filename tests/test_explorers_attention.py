"""beit_nb.explorers.attention: heads of all blocks."""

import pytest
import torch
from torch.testing import assert_close

from beit_nb.attention import attention_maps
from beit_nb.explorers.attention import (
    AttentionExplorer,
    heads_picture,
    heads_table,
    kept_share,
    ready_mim,
)
from beit_nb.images import normalize
from beit_nb.mim import BeitForMaskedImageModeling


@pytest.fixture
def model():
    shape = dict(img_size=32, patch_size=4, embed_dim=24, depth=3, num_heads=2)
    return BeitForMaskedImageModeling(**shape, vocab_size=32, weight_init="xavier").eval()


@pytest.fixture
def maps(model):
    return attention_maps(model, normalize(torch.rand(1, 3, 32, 32)))


def test_table_dims_what_lies_outside_the_mass(maps):
    table = heads_table(maps, (2, 5), (8, 8), 0.6)

    row = maps[1][0, 1, 1 + 2 * 8 + 5, 1:]
    largest = row.sort(descending=True).values
    before = largest.cumsum(0) - largest
    needed = int((before < 0.6 * row.sum()).sum())  # the fewest that hold 60 %
    keep = row >= largest[needed - 1]
    assert table.shape == (3, 3, 8, 8)
    assert_close(table[1, 1].flatten(), torch.where(keep, row, 0.3 * row) / row.max())


def test_last_column_is_the_mean_of_the_heads(maps):
    table = heads_table(maps, (0, 0), (8, 8), 1.0)

    mean = maps[2][0, :, 1, 1:].mean(0).view(8, 8)
    assert_close(table[2, 2], mean / mean.max())


def test_kept_share_grows_with_the_mass(maps):
    shares = [kept_share(maps, (2, 5), (8, 8), mass) for mass in (0.05, 0.6, 1.0)]

    assert 0 < shares[0] < shares[1] < shares[2] == 1


@pytest.mark.parametrize("size", (20, 44))
def test_picture_has_a_tile_for_each_head(maps, size):
    picture = heads_picture(heads_table(maps, (0, 0), (8, 8)), size)

    assert picture.size == (54 + 3 * (size + 2), 18 + 3 * (size + 2))


def test_explorer_follows_the_click_and_the_mass(model):
    explorer = AttentionExplorer(model, images=torch.rand(4, 3, 32, 32))
    explorer.controls.mass.value = 1.0

    seen = set()
    for cell in (0, 9, 63):
        explorer.pad.press(cell)
        seen.add(bytes(explorer.view.picture))

    assert len(seen) == 3 and "<b>100%</b>" in explorer.words.value
    explorer.controls.mass.value = 0.05
    assert "<b>100%</b>" not in explorer.words.value


def test_without_a_demo_the_network_is_the_one_that_came_along(tmp_path):
    model, line, mean_std = ready_mim(tmp_path)
    again, _, _ = ready_mim(tmp_path)

    assert "came with beit_nb" in line and mean_std == ((0.5,) * 3, (0.5,) * 3)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
