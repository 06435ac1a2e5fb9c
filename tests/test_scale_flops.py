"The lists of products against real networks, and against torch's own counter of operations."

from dataclasses import dataclass, replace

import pytest
import torch
from helpers_work import count, counted
from torch.utils.flop_counter import FlopCounterMode

from beit_nb.classifier_files import build_classifier
from beit_nb.configs import Backbone, Run
from beit_nb.mim import mim_loss
from beit_nb.pretraining import build_mim
from beit_nb.recipes import COMMANDS, recipe_named
from beit_nb.scale.flops import (
    ImageFlops,
    block_products,
    classifier_products,
    flops_per_image,
    mim_products,
    model_products,
    tokenizer_in_the_loop,
    tokenizer_of,
    vit_products,
)
from beit_nb.scale.hours import dataset_size
from beit_nb.scale.products import dvae_products, total_flops, total_parameters, training_flops
from beit_nb.segmenting import build_segmenter
from beit_nb.tokenizer import build_dvae
from beit_nb.vit import VisionTransformer, backbone_args

BASE = recipe_named("pretrain", "base-in1k")
BUILD = {
    "tokenizer": lambda r, classes: build_dvae(r),
    "pretrain": lambda r, classes: build_mim(r),
    "finetune": build_classifier,
}
PRESETS = [(command, name) for command in BUILD for name in COMMANDS[command].presets]


def mim_step(model, r, batch):
    "Forward and backward, every row through every block."
    side = r.img_size // r.patch_size
    mask = torch.arange(side**2).expand(batch, -1) < r.num_mask_patches
    features = model.forward_features(torch.rand(batch, 3, r.img_size, r.img_size), mask)[:, 1:]
    logits = model.lm_head(model.norm(features[mask]))
    mim_loss(logits, torch.zeros(batch * r.num_mask_patches, dtype=torch.long)).backward()


def test_heads_differ_and_bodies_do_not():
    base = recipe_named("pretrain", "base-in1k")
    plus = recipe_named("finetune", "base-plus-in1k")

    assert mim_products(base)[1:-1] == block_products(base)
    assert classifier_products(plus, 10)[1:-1] == block_products(plus)
    more = total_parameters(classifier_products(plus, 11))
    assert more - total_parameters(classifier_products(plus, 10)) == 768 + 1


@pytest.mark.slow
@pytest.mark.parametrize("command,name", PRESETS)
def test_parameters_of_every_preset_are_the_networks(command, name):
    r = recipe_named(command, name)
    classes = dataset_size(r)[1]
    with torch.device("meta"):
        net = BUILD[command](r, classes)

    assert total_parameters(model_products(r, classes)) == count(net)


@pytest.mark.parametrize(
    "changes",
    [
        dict(embed_dim=48, depth=3, num_heads=3, mlp_ratio=2.0),
        dict(depth=2, patch_size=8, num_mask_patches=7, use_rel_pos_bias=True),
        dict(
            embed_dim=64,
            depth=2,
            patch_size=8,
            num_mask_patches=7,
            init_values=0.1,
            use_abs_pos_emb=False,
            use_shared_rel_pos_bias=True,
        ),
    ],
)
def test_work_of_pretraining_by_torchs_counter(changes):
    r = recipe_named("pretrain", "nano", **changes)
    model = build_mim(r)

    by_torch = counted(lambda: mim_step(model, r, batch=3))

    assert by_torch == 3 * flops_per_image(r).model
    assert count(model) == total_parameters(model_products(r))


@pytest.mark.parametrize(
    "changes", [{}, dict(init_values=0.1), dict(depth=2, use_shared_rel_pos_bias=True)]
)
def test_what_checkpointing_executes_by_torchs_counter(changes):
    r = recipe_named("pretrain", "nano", grad_checkpointing=True, **changes)
    model = build_mim(r).train()

    by_torch = counted(lambda: mim_step(model, r, batch=2))

    assert by_torch == 2 * sum(flops_per_image(r)) > 2 * flops_per_image(r).model


def test_a_tokenizers_training_is_the_work_of_its_pictures():
    r = recipe_named("tokenizer", "nano")

    assert model_products(r) == dvae_products(r)
    assert flops_per_image(r) == ImageFlops(0, training_flops(dvae_products(r)))


def test_known_counts_of_the_official_code():
    assert total_parameters(model_products(BASE)) == 92_089_856
    plus = recipe_named("pretrain", "base-plus-in22k")
    assert total_parameters(model_products(plus)) == 91_965_776
    assert [round(n / 1e9, 1) for n in flops_per_image(BASE)] == [52.1, 108.0, 0.0]


def test_the_tokenizer_runs_only_where_views_change():
    nano = recipe_named("pretrain", "nano")

    assert tokenizer_in_the_loop(BASE) == tokenizer_of(BASE)
    assert tokenizer_of(BASE).arch == "dalle" and tokenizer_of(BASE).downsample == 8
    assert tokenizer_in_the_loop(nano) is None
    assert tokenizer_in_the_loop(replace(nano, flip=0.5)).data == nano.data
    assert tokenizer_in_the_loop(replace(BASE, tokens="ids")) is None
    assert flops_per_image(replace(BASE, tokens="ids")).tokenizer == 0
    assert tokenizer_in_the_loop(recipe_named("finetune", "nano")) is None


def test_another_job_of_the_transformer_counts_without_a_head():
    @dataclass
    class Toy(Backbone, Run):
        pass

    r = Toy(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, drop_path_rate=0.0)
    nano = recipe_named("pretrain", "nano", img_size=32, patch_size=8, embed_dim=48, depth=2)
    body = VisionTransformer(**backbone_args(replace(nano, num_heads=3)))
    by_torch = counted(lambda: body(torch.rand(1, 3, 32, 32)).sum().backward())

    assert model_products(r) == vit_products(r)
    assert block_products(r) == vit_products(r)[1:-1]
    assert flops_per_image(r) == ImageFlops(tokenizer=0, model=by_torch, recomputed=0)


def test_of_an_unknown_network_there_are_no_products():
    @dataclass
    class Toy(Run):
        hidden: int = 4

    assert model_products(Toy()) == [] and total_flops([]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS["segment"].presets)
@pytest.mark.parametrize("auxiliary_weight", [0.4, 0.0])
def test_segmentations_counted_two_ways(name, auxiliary_weight):
    "Parameters and operations of every preset, against torch's own count."
    r = replace(recipe_named("segment", name), auxiliary_weight=auxiliary_weight)
    with torch.device("meta"):
        model = build_segmenter(r, 150).eval()
        picture = torch.zeros(1, 3, r.img_size, r.img_size)
    with FlopCounterMode(display=False) as counter:
        model(picture, every_head=True)

    products = model_products(r, 150)

    assert total_parameters(products) == sum(p.numel() for p in model.parameters())
    assert total_flops(products) == counter.get_total_flops()
