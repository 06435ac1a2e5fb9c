"Estimated bytes against tensors that are really kept."

from dataclasses import replace

import pytest
import torch

from beit_nb import BeitError
from beit_nb.recipes import recipe_named
from beit_nb.scale.flops import NO_HEAD, model_products
from beit_nb.scale.memory import (
    Layout,
    activation_bytes,
    batch_per_gpu,
    block_bytes,
    borrowed_bytes,
    in_half_precision,
    layouts,
    least_memory,
    model_memory,
    training_memory,
)
from beit_nb.transformer import Block

BASE = recipe_named("pretrain", "base-in1k")
NANO = recipe_named("pretrain", "nano")


def saved_bytes(block, x):
    "Bytes saved for backward while a block runs, its parameters not counted."
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = block(x)
    assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)


@pytest.mark.parametrize("mlp_ratio", [4.0, 2.0])
@pytest.mark.parametrize("init_values", [None, 0.1])
def test_a_block_keeps_what_the_formula_says(init_values, mlp_ratio):
    r = replace(NANO, embed_dim=48, num_heads=3, init_values=init_values, mlp_ratio=mlp_ratio)
    block = Block(48, 3, mlp_ratio, init_values=init_values)
    x = torch.randn(5, 65, 48) + torch.zeros(1, requires_grad=True)

    assert saved_bytes(block, x) == 5 * 65 * block_bytes(r, half=False, fused=False)


def test_what_grows_with_what():
    plain = activation_bytes(NANO, NO_HEAD)
    wide = activation_bytes(replace(NANO, depth=8), NO_HEAD)
    picture = 2 * 3 * 32**2

    assert wide - picture == 2 * (plain - picture)
    assert activation_bytes(NANO, NO_HEAD, half=False) > 1.5 * plain
    assert activation_bytes(NANO, NO_HEAD, fused=False) > plain
    assert activation_bytes(NANO, NO_HEAD, checkpointing=True) < plain / 2


def test_a_model_is_16_bytes_a_parameter_and_fsdp_shares_them():
    whole = model_memory(1000, half=False)
    shared = model_memory(1000, gpus=4)

    assert whole == dict(weights=4000, gradients=4000, adam=8000)
    assert shared["adam"] == 2000 and shared["half copies"] == 2000
    assert 0 < borrowed_bytes(model_products(BASE)) < 4 * 92_089_856


def test_the_four_layouts_of_the_base_model():
    def total(parallel, checkpointing):
        r = replace(BASE, parallel=parallel, grad_checkpointing=checkpointing)
        return sum(training_memory(r, 128, 16).values())

    ddp, fsdp = total("ddp", False), total("fsdp", False)
    ddp_again, fsdp_again = total("ddp", True), total("fsdp", True)

    assert ddp > fsdp > ddp_again > fsdp_again
    assert abs(ddp / 1e9 - 10.66) < 0.01 and abs(ddp_again / 1e9 - 4.34) < 0.01


def test_tokenizer_and_batch_count():
    parts = training_memory(BASE, 128)
    half_batch = training_memory(BASE, 64)
    without = training_memory(replace(BASE, tokens="ids"), 128)

    assert parts["activations"] == 2 * half_batch["activations"]
    assert parts["tokenizer"] == 4 * 53_786_240 and "tokenizer" not in without
    assert "tokenizer" not in training_memory(recipe_named("tokenizer", "photos"), 32)


def test_precision_is_the_recipes():
    parts = training_memory(BASE, 128)
    in_fp32 = training_memory(replace(BASE, precision="fp32"), 128)

    assert in_half_precision(BASE) and in_half_precision(replace(BASE, precision="fp16"))
    assert parts["half copies"] == 2 * 92_089_856 and "half copies" not in in_fp32
    assert 1.3 < in_fp32["activations"] / parts["activations"] < 2


def test_layouts_are_those_that_a_recipe_can_have():
    sharded = replace(BASE, parallel="fsdp", grad_checkpointing=True)
    tokenizer = recipe_named("tokenizer", "nano")

    assert layouts(sharded, 8)[0] == Layout("fsdp", True) and len(layouts(sharded, 8)[1]) == 4
    assert layouts(sharded, 1)[0] == Layout("ddp", True)
    assert {layout.parallel for layout in layouts(BASE, 1)[1]} == {"ddp"}
    assert layouts(tokenizer, 8) == (Layout("ddp", False), [Layout("ddp", False)])


def test_a_batch_is_divided_evenly_or_refused():
    assert batch_per_gpu(BASE, 16) == (128, 128)
    assert batch_per_gpu(replace(BASE, device_batch_size=32), 8) == (256, 32)
    with pytest.raises(BeitError, match="2048 is not divisible by 7 GPUs"):
        batch_per_gpu(BASE, 7)
    with pytest.raises(BeitError, match="100 does not divide a GPU's share of 256"):
        batch_per_gpu(replace(BASE, device_batch_size=100), 8)


@pytest.mark.parametrize("command", ("finetune", "tokenizer"))
def test_a_running_mean_is_a_copy_of_the_weights(command):
    plain = recipe_named(command, "nano", ema=0.0)
    mean = recipe_named(command, "nano", ema=0.99)

    more = sum(training_memory(mean, 32).values()) - sum(training_memory(plain, 32).values())

    assert more == training_memory(plain, 32)["weights"]
    least = least_memory(mean) - least_memory(plain)  # of a head for one class
    assert 0.8 * more < least <= more
