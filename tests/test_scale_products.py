"The lists of a tokenizer's products against real networks, and against torch's own counter."

from dataclasses import replace

import pytest
import torch
from helpers_work import count, counted
from torch.utils.flop_counter import FlopCounterMode

from beit_nb.quantizers import quantized_loss
from beit_nb.recipes import recipe_named
from beit_nb.scale.products import (
    MatMul,
    conv_matmul,
    dvae_products,
    encoder_products,
    total_flops,
    total_parameters,
    training_flops,
)
from beit_nb.tokenizer import build_dvae


def test_a_product_counts_its_matrix_and_what_stands_beside_it():
    plain = MatMul("x", rows=7, n_in=3, n_out=5, times=2, extra_parameters=4)
    tied = replace(plain, learned=False)

    assert plain.flops == tied.flops == 2 * 2 * 7 * 3 * 5
    assert plain.parameters == 2 * (15 + 4) and tied.parameters == 2 * 4
    assert plain.inputs == 2 * 21 and replace(plain, numbers_read=9).inputs == 18


@pytest.mark.parametrize("gradients", [0, 1, 2])
def test_backward_by_torchs_counter(gradients):
    "Two layers; of the second none, only the inputs, or both have a gradient."
    first = torch.nn.Linear(3, 5)
    second = torch.nn.Linear(5, 7).requires_grad_(gradients == 2)
    products = [MatMul("first", 4, 3, 5), MatMul("second", 4, 5, 7, gradients=gradients)]

    with FlopCounterMode(display=False) as counter:
        hidden = first(torch.rand(4, 3))
        out = second(hidden if gradients else hidden.detach())
        (out.sum() if gradients else hidden.sum() + out.sum()).backward()

    assert training_flops(products) == counter.get_total_flops()


def test_a_list_that_begins_without_a_gradient_spares_nothing():
    stamps = MatMul("stamps", 4, 3, 5, gradients=0)

    assert training_flops([stamps]) == total_flops([stamps]) == 120


@pytest.mark.parametrize("kernel,stride", [(1, 1), (3, 1), (7, 1), (2, 2)])
def test_a_convolution_is_a_product(kernel, stride):
    layer = torch.nn.Conv2d(3, 6, kernel, stride, padding=(kernel - 1) // 2)
    images = torch.rand(1, 3, 12, 12)

    product = conv_matmul("x", 12 // stride, kernel, 3, 6)

    assert product.flops == counted(lambda: layer(images))
    assert product.parameters == count(layer) and product.inputs == images.numel()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(downsample=2, width=32),
        dict(downsample=16, img_size=64, logits="linear", likelihood="laplace"),
        dict(arch="dalle", width=16, code_dim=8),
    ],
)
def test_work_of_a_tokenizer_by_torchs_counter(changes):
    r = recipe_named("tokenizer", "nano", **changes)
    net = build_dvae(r)
    images = torch.rand(1, 3, r.img_size, r.img_size)

    by_torch = counted(lambda: net.decode_stats(net.logits(images).softmax(1)).sum().backward())

    assert by_torch == training_flops(dvae_products(r))
    assert count(net) == total_parameters(dvae_products(r))


@pytest.mark.parametrize("quantizer", ["vq", "fsq", "lfq", "kmeans", "hash"])
@pytest.mark.parametrize("changes", [{}, dict(vocab_size=64, code_dim=16, width=32, downsample=8)])
def test_other_quantizers_by_torchs_counter(quantizer, changes):
    "Reading a picture and training on one; of k-means' distances torch counts nothing."
    if quantizer in ("vq", "fsq", "lfq"):
        pytest.importorskip("vector_quantize_pytorch")
    r = recipe_named("tokenizer", "nano", quantizer=quantizer, **changes)
    net = build_dvae(r).train()
    images = torch.rand(16, 3, r.img_size, r.img_size)
    quantized_loss(net, images)  # the first batch starts vq's rows

    reading = counted(lambda: net.get_codebook_indices(images))
    training = counted(lambda: quantized_loss(net, images)[0].backward())

    assert count(net) == total_parameters(dvae_products(r))
    if quantizer == "kmeans":
        assert reading == training == 0 < total_flops(encoder_products(r))
    else:
        assert reading == 16 * total_flops(encoder_products(r))
        assert training == 16 * training_flops(dvae_products(r))
