"Positions for another grid: what they keep, and which ones are refused."

import pytest
import torch

from beit_nb import BeitError
from beit_nb.mim import BeitForMaskedImageModeling
from beit_nb.resizing import load_backbone, resize_pos_embed, resize_rel_pos_bias


@pytest.mark.parametrize("grid", [(6, 6), (8, 8), (12, 12), (10, 7), (3, 24)])
def test_bias_table_keeps_neighbours_and_class_rows(grid):
    table = torch.randn(15 * 15 + 3, 2)
    new = resize_rel_pos_bias(table, (8, 8), grid)
    assert (
        new.shape == ((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, 2)
        and new.isfinite().all()
        and torch.equal(new[-3:], table[-3:])
    )
    square = new[:-3].unflatten(0, (2 * grid[0] - 1, -1))
    old = table[:-3].unflatten(0, (15, 15))
    c = grid[0] - 1
    d = grid[1] - 1
    torch.testing.assert_close(
        square[c - 1 : c + 2, d - 1 : d + 2], old[6:9, 6:9], atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        square[[0, 0, -1, -1], [0, -1, 0, -1]],
        old[[0, 0, -1, -1], [0, -1, 0, -1]],
        atol=1e-4,
        rtol=1e-4,
    )
    assert (resize_rel_pos_bias(table, (8, 8), grid) is table) == (grid == (8, 8))


def test_bias_table_is_near_timms_linear_one_where_it_is_smooth():
    from timm.layers import resize_rel_pos_bias_table

    y, x = torch.meshgrid(torch.arange(-13.0, 14), torch.arange(-13.0, 14), indexing="ij")
    table = torch.cat([torch.exp(-(x**2 + y**2) / 60).reshape(-1, 1), torch.ones(3, 1)])
    ours = resize_rel_pos_bias(table, (14, 14), (24, 24))
    theirs = resize_rel_pos_bias_table(table, (24, 24), (2212, 1))
    assert (ours - theirs).abs().max() < 0.03


@pytest.mark.parametrize(
    "work, words",
    [
        (lambda: resize_rel_pos_bias(torch.zeros(732, 2), (14, 12), (24, 24)), "732 rows"),
        (lambda: resize_rel_pos_bias(torch.zeros(12, 2), (2, 2), (4, 4)), "at least 3"),
        (lambda: resize_pos_embed(torch.zeros(1, 65, 2), (7, 7), (9, 9)), "65 positions"),
    ],
)
def test_bad_input_is_named_in_one_line(work, words):
    with pytest.raises(BeitError, match=words) as e:
        work()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "other",
    [dict(embed_dim=16), dict(patch_size=2), dict(mlp_ratio=2.0), dict(num_heads=2)],
    ids=lambda other: next(iter(other)),
)
def test_a_tensor_of_another_shape_names_its_field(other):
    size = dict(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=4, vocab_size=8)
    size |= dict(use_abs_pos_emb=False, use_rel_pos_bias=True)
    weights = BeitForMaskedImageModeling(**size).state_dict()
    model = BeitForMaskedImageModeling(**size | other)
    [field] = other
    with pytest.raises(BeitError, match=f"has shape .* is needed; {field} must be the checkpoint"):
        load_backbone(model, weights, (4, 4))
