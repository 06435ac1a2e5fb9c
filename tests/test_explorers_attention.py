"""beit_nb.explorers.attention: heads of all blocks, asked by a patch or by CLS."""

import pytest
import torch
from torch.testing import assert_close

from beit_nb.attention import attention_maps
from beit_nb.explorers.attention import (
    ATTENTION_ACTS,
    AttentionExplorer,
    fewest_patches,
    heads_picture,
    heads_table,
    ready_mim,
    shares_of,
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


@pytest.fixture
def explorer(model):
    return AttentionExplorer(model, images=torch.rand(4, 3, 32, 32))


def test_table_dims_what_lies_outside_the_mass(maps):
    table = heads_table(shares_of(maps, (2, 5), (8, 8)), 0.6)

    row = maps[1][0, 1, 1 + 2 * 8 + 5, 1:]
    largest = row.sort(descending=True).values
    before = largest.cumsum(0) - largest
    needed = int((before < 0.6 * row.sum()).sum())  # the fewest that hold 60 %
    keep = row >= largest[needed - 1]
    assert table.shape == (3, 3, 8, 8)
    assert_close(table[1, 1].flatten(), torch.where(keep, row, 0.3 * row) / row.max())


def test_last_column_is_the_mean_of_the_heads(maps):
    shares = shares_of(maps, (0, 0), (8, 8))

    assert_close(shares[2, 2], maps[2][0, :, 1, 1:].mean(0).view(8, 8))


def test_cls_is_the_first_token(maps):
    shares = shares_of(maps, "CLS", (8, 8))

    assert_close(shares[1, 0].flatten(), maps[1][0, 0, 0, 1:])
    assert_close(1 - shares[1, 0].sum(), maps[1][0, 0, 0, 0])


def test_more_mass_needs_more_patches_and_all_of_it_all(maps):
    shares = shares_of(maps, (2, 5), (8, 8))

    counts = [fewest_patches(shares, mass).sum().item() for mass in (0.05, 0.6, 1.0)]

    assert 0 < counts[0] < counts[1] < counts[2] == shares.numel()


def test_picture_has_a_tile_for_each_head(maps):
    picture = heads_picture(heads_table(shares_of(maps, (0, 0), (8, 8))))

    assert picture.size == (3 * 46, 3 * 46)


def test_tiles_follow_the_click_and_the_mass(explorer):
    explorer.mass.value = 1.0

    seen = set()
    for cell in (0, 9, 63):
        explorer.pad.press(cell)
        seen.add(bytes(explorer.tiles.picture))

    assert len(seen) == 3 and "lies on 64 of 64" in explorer.describe()
    explorer.mass.value = 0.05
    assert "lies on 64 of 64" not in explorer.describe()


def test_cells_say_their_share_of_the_chosen_tile(explorer):
    explorer.pads.head = (2, 1)
    explorer.pads.looks.press(2 * 8 + 5)

    share = explorer.maps[1][0, 0, 1 + 2 * 8 + 5, 1 + 7]
    said = f"{100 * share:.1f} % of patch 2,5's attention"
    assert explorer.pad.notes[7] == explorer.pads.looks.notes[7] == said


def test_a_tile_is_laid_over_the_picture(explorer):
    before = explorer.pads.looks.picture

    explorer.tiles.index = 1

    assert explorer.pads.looks.picture != before
    assert "block 1, head 2" in explorer.describe() and explorer.pads.head == (1, 2)


def test_cls_asks_until_a_patch_is_clicked(explorer):
    explorer.pad.press(12)

    explorer.cls.value = True
    assert explorer.asker == "CLS" and "of CLS's attention" in explorer.pad.notes[0]
    explorer.cls.value = False
    assert explorer.asker == (1, 4)
    explorer.cls.value = True
    explorer.pad.press(9)

    assert explorer.asker == (1, 1) and not explorer.cls.value


def test_acts(explorer):
    assert explorer.guide.done == []

    explorer.cls.value = True
    assert explorer.guide.done == [2]
    explorer.pad.press(3)
    assert explorer.guide.done == [0, 2]
    explorer.tiles.index = 0

    assert explorer.guide.done == [*range(len(ATTENTION_ACTS))]


@pytest.mark.parametrize("patch", ((0, 7), "CLS"))
@pytest.mark.parametrize("head", ((1, 2), (3, "mean")))
def test_link_makes_the_same_state(model, patch, head):
    images = torch.rand(4, 3, 32, 32)
    mean_std = ((0.5,) * 3, (0.5,) * 3)
    explorer = AttentionExplorer(
        model, "ours", mean_std, images, number=2, patch=patch, mass=0.3, head=head
    )

    names = dict(AttentionExplorer=AttentionExplorer, model=model, images=images)
    again = eval(explorer.link(), names | dict(mean_std=mean_std))

    assert (again.asker, again.pads.head, again.menu.value) == (patch, head, 2)
    assert again.describe() == explorer.describe() and again.link() == explorer.link()
    assert again.pads.looks.picture == explorer.pads.looks.picture


def test_without_a_demo_the_network_is_the_one_that_came_along(tmp_path):
    model, line, mean_std = ready_mim(tmp_path)
    again, _, _ = ready_mim(tmp_path)

    assert "came with beit_nb" in line and mean_std == ((0.5,) * 3, (0.5,) * 3)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)


def test_paper_frames_the_chosen_tile(explorer):
    corners = []
    for head in ((1, 1), (3, 2)):
        explorer.pads.head = head
        page = explorer.static_picture()
        left, top = 12 + 226 + 12, 28  # of the table: gaps, the first picture, the names
        corners.append(page.crop((left, top, left + 60, top + 60)).convert("RGB"))
    framed, bare = (corner.getpixel((20, 1)) for corner in corners)

    assert framed[0] > 150 > framed[2]  # orange
    assert max(bare) < 100
