"""Winograd's convolution against torch's, and a tokenizer that keeps its tokens with it."""

import pytest
import torch
import torch.nn.functional as F
from helpers_dalle import random_images, small_dalle

from beit_nb.dalle import DalleBlock, DalleConv, DalleVAE
from beit_nb.engine.winograd import (
    WinogradConv,
    optimize_for_inference,
    winograd,
    winograd_weights,
)


def wide_conv(n_out=24, seed=0):
    torch.manual_seed(seed)
    conv = DalleConv(128, n_out, 3).requires_grad_(False)
    conv.b.normal_()
    return conv


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 8, 6, 10), (5, 16, 14, 14)])
@pytest.mark.parametrize("cache", [2**23, 2**10])
def test_equal_to_a_plain_convolution(shape, cache):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g)
    w = torch.randn(7, shape[1], 3, 3, generator=g) / (3 * shape[1] ** 0.5)
    b = torch.randn(7, generator=g)

    y = winograd(x, winograd_weights(w), b, cache)

    torch.testing.assert_close(y, F.conv2d(x, w, b, padding=1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_new_weights_are_noticed():
    conv = wide_conv()
    fast = WinogradConv(conv)
    x = torch.randn(2, 128, 8, 8, generator=torch.Generator().manual_seed(0))
    before = fast(x)

    fast.load_state_dict(wide_conv(seed=1).state_dict())

    torch.testing.assert_close(fast(x), DalleConv.forward(conv, x), atol=1e-4, rtol=0)
    assert (fast(x) - before).abs().max() > 0.1


@pytest.mark.parametrize("case", ["odd side", "double", "gradients", "autocast", "large"])
def test_what_does_not_fit_is_an_ordinary_convolution(case):
    conv = wide_conv()
    fast = WinogradConv(conv)
    side = {"odd side": 7, "large": 132}.get(case, 8)
    x = torch.randn(1, 128, side, side, generator=torch.Generator().manual_seed(0))
    if case == "double":
        conv.double()
        fast.double()
        x = x.double()

    with (
        torch.set_grad_enabled(case == "gradients"),
        torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"),
    ):
        assert torch.equal(fast(x), conv(x))


@torch.no_grad()
def test_the_tokens_stay():
    model = small_dalle(n_hid=128, n_blk_per_group=1)
    images = random_images(2, 32)
    scores = model.logits(images)
    names = list(model.state_dict())

    same = optimize_for_inference(model)

    assert same is model
    assert list(model.state_dict()) == names
    assert any(isinstance(m, WinogradConv) for m in model.encoder.modules())
    assert not any(isinstance(m, WinogradConv) for m in model.decoder.modules())
    torch.testing.assert_close(model.logits(images), scores, atol=1e-5, rtol=0)
    assert torch.equal(model.get_codebook_indices(images), scores.argmax(1))


@torch.no_grad()
def test_half_precision_is_for_the_encoders_corrections_only():
    model = optimize_for_inference(small_dalle(), torch.bfloat16)
    block = next(m for m in model.encoder.modules() if isinstance(m, DalleBlock))

    assert block.res_path.conv_1.w.dtype == torch.bfloat16
    assert model.encoder.blocks.input.w.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.decoder.parameters())
    assert model.logits(random_images()).dtype == torch.float32


def test_a_decoder_alone():
    model = optimize_for_inference(DalleVAE(decoder=small_dalle().decoder))

    assert not any(p.requires_grad for p in model.parameters())
