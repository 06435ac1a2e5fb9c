"""Attention maps: the true shares, a model left as it was, rows on the grid, the figure."""

import pytest
import torch
from helpers_models import FORMS, SIZE, a_batch, forms, shaken

from beit_nb import BeitError
from beit_nb.attention import (
    attention_maps,
    cls_attention,
    mark_patch,
    over_picture,
    patch_attention,
    patch_of,
    query_tokens,
    show_attention,
    top_mass_mask,
)
from beit_nb.device import KERNELS
from beit_nb.mim import BeitForMaskedImageModeling
from beit_nb.vit import VisionTransformer

# --- maps


@forms
@torch.no_grad()
def test_maps_are_the_shares_that_the_model_uses(form):
    "With them and the values we rebuild what every layer says."
    model = shaken(VisionTransformer(**SIZE, **FORMS[form])).eval()
    images, _ = a_batch()
    said = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda layer, args, out: said.append((layer, args, out)))

    maps = attention_maps(model, images)

    assert [a.shape for a in maps] == [(3, 4, 65, 65)] * 3
    for a, (layer, args, out) in zip(maps, said, strict=True):
        torch.testing.assert_close(a.sum(-1), torch.ones(3, 4, 65))
        value = layer.heads(args[0])[2]
        by_hand = layer.proj((a @ value).transpose(1, 2).flatten(2))
        torch.testing.assert_close(by_hand, out, atol=1e-5, rtol=1e-5)


def test_maps_are_the_same_with_a_fused_kernel(monkeypatch):
    model = shaken(VisionTransformer(**SIZE, **FORMS["everything"]))
    images, _ = a_batch()
    plain = attention_maps(model, images)

    monkeypatch.setitem(KERNELS, "cpu", KERNELS["cpu"]._replace(fused_attention=True))

    for a, b in zip(plain, attention_maps(model, images), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_bias_shows():
    model = VisionTransformer(**SIZE | dict(depth=1), use_rel_pos_bias=True)
    images, _ = a_batch()
    with torch.no_grad():  # row 0 of the table: from the last patch to the first
        model.blocks[0].attn.relative_position_bias_table[0] = 50

    [probs] = attention_maps(model, images)

    assert probs[:, :, 1, -1].min() > 0.99


def test_drop_path_is_off_and_the_mode_comes_back():
    model = shaken(VisionTransformer(**SIZE, drop_path_rate=0.9))
    model.blocks[0].eval()  # a mixture, to come back as it was
    modes = [m.training for m in model.modules()]
    images, _ = a_batch()

    first, second = attention_maps(model, images), attention_maps(model, images)

    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not any(a.requires_grad for a in first)


def test_the_model_is_left_as_it_was_after_an_error():
    model = VisionTransformer(**SIZE)
    with pytest.raises(ValueError):
        attention_maps(model, torch.zeros(1, 3, 30, 30))
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("fused", [False, True])
@forms
@torch.no_grad()  # with gradients torch takes another of its fused kernels
def test_listening_changes_no_bit(form, fused, monkeypatch):
    "What the model says while it is listened to is what it says alone."
    monkeypatch.setitem(KERNELS, "cpu", KERNELS["cpu"]._replace(fused_attention=fused))
    model = shaken(VisionTransformer(**SIZE, **FORMS[form])).eval()
    images, _ = a_batch()
    alone = model.forward_intermediates(images)
    heard = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, out: heard.append(out))

    attention_maps(model, images)

    assert all(torch.equal(a, b) for a, b in zip(alone, heard, strict=True))


def test_what_is_kept_stands_in_place_of_the_maps():
    model = VisionTransformer(**SIZE)
    images, _ = a_batch()

    rows = attention_maps(model, images, keep=lambda probs: probs[:, :, 9])

    for row, a in zip(rows, attention_maps(model, images), strict=True):
        assert torch.equal(row, a[:, :, 9])


def test_hidden_patches_change_the_maps():
    model = shaken(BeitForMaskedImageModeling(**SIZE, vocab_size=50))
    images, mask = a_batch()

    seen = attention_maps(model, images)
    hidden = attention_maps(model, images, mask)

    assert not torch.allclose(seen[0], hidden[0], atol=1e-3)
    noise = torch.where(mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None], 1, images)
    for a, b in zip(hidden, attention_maps(model, noise, mask)):
        assert torch.equal(a, b)


# --- rows


def test_rows_on_the_grid():
    probs = torch.rand(2, 3, 7, 7).softmax(-1)  # CLS and a grid of 2 x 3

    asked = patch_attention(probs, (1, 2), (2, 3))

    assert asked.shape == (2, 3, 2, 3)
    assert asked[1, 2, 0, 1] == probs[1, 2, 1 + 5, 1 + 1]
    torch.testing.assert_close(asked.sum((2, 3)), 1 - probs[:, :, 6, 0])
    assert torch.equal(cls_attention(probs, (2, 3)).flatten(2), probs[:, :, 0, 1:])


@pytest.mark.parametrize("patch, grid", [((2, 0), (2, 3)), ((0, -1), (2, 3)), ((0, 0), (3, 3))])
def test_patches_outside_the_grid_are_refused(patch, grid):
    with pytest.raises(BeitError, match="does not fit a grid of"):
        patch_attention(torch.rand(2, 3, 7, 7), patch, grid)


def test_queries():
    assert query_tokens(("1,2", "cls", "0,0"), (2, 3)) == {"1,2": 6, "cls": 0, "0,0": 1}
    assert query_tokens((), (30, 30)) == {"15,15": 466}
    assert patch_of("11,13") == (11, 13) and patch_of("cls") is None
    for query in ("2,0", "0,3"):
        with pytest.raises(BeitError, match=f"--query {query} is none of the 2 x 3 patches"):
            query_tokens((query,), (2, 3))


# --- mass


def test_top_mass_by_hand():
    a = torch.tensor([[0.5, 0.2], [0.1, 0.2]])
    assert top_mass_mask(a, 0.5).tolist() == [[True, False], [False, False]]
    assert top_mass_mask(a, 0.6).tolist() == [[True, True], [False, False]]
    assert top_mass_mask(a, 1.0).all()


def test_top_mass_keeps_the_fewest():
    maps = torch.rand(2, 3, 5, 5, dtype=torch.double) ** 4

    kept = top_mass_mask(maps, 0.6)

    total = maps.sum((-2, -1))
    held = (maps * kept).sum((-2, -1)) / total
    smallest = maps.masked_fill(~kept, torch.inf).amin((-2, -1)) / total
    assert (held >= 0.6 - 1e-12).all()
    assert (held - smallest < 0.6).all()


# --- the figure


def test_the_figure_marks_who_asks_and_dims_the_rest():
    maps = torch.tensor([[[0.7, 0.1], [0.1, 0.1]], [[0.25, 0.25], [0.25, 0.25]]])
    image = torch.rand(3, 8, 8)

    fig = show_attention(image, maps, patch=(1, 0))

    titles = [ax.get_title() for ax in fig.axes]
    assert titles == ["who asks", "head 0: 25%", "head 1: 75%"]
    [frame] = fig.axes[0].patches
    assert frame.get_xy() == (-0.5, 3.5) and frame.get_width() == frame.get_height() == 4
    shown = torch.tensor(fig.axes[1].images[0].get_array())
    torch.testing.assert_close(shown, torch.tensor([[1, 0.3 / 7], [0.3 / 7, 0.3 / 7]]))


def test_the_figure_of_cls_has_no_frame():
    fig = show_attention(torch.rand(3, 8, 8), torch.rand(2, 2, 2), mass=None)
    assert fig.axes[0].get_title() == "CLS asks" and not fig.axes[0].patches
    assert fig.axes[1].get_title() == "head 0: 100%"


def test_a_picture_is_dark_outside_of_what_is_kept():
    picture = torch.rand(3, 6, 8) + 0.1
    kept = torch.rand(2, 3, 4) < 0.5

    over = over_picture(picture, kept)

    assert over.shape == (2, 3, 6, 8)
    for y, x in ((0, 0), (3, 5), (5, 7)):
        bright = kept[:, y // 2, x // 2]
        assert torch.equal(over[:, 0, y, x] == picture[0, y, x], bright)


@pytest.mark.parametrize("side, painted", [(120, 64), (480, 256)])
def test_the_patch_that_asks_is_framed_or_filled(side, painted):
    "A line of 1/60 of the picture: 2 of 120 pixels leave a hole in a patch of 10, 8 of 480 none."
    picture = torch.full((3, side, side), 0.5)
    grid = (12, 12) if side == 120 else (30, 30)

    marked = mark_patch(picture, (1, 2), grid)

    changed = (marked != picture).any(0)
    assert changed.sum() == painted
    patch = side // grid[0]
    assert changed.nonzero().amin(0).tolist() == [patch, 2 * patch]
    assert torch.equal(mark_patch(picture, None, grid), picture)
