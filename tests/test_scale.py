"`beit plan`: what a recipe costs, by formula, against the real networks, torch's own counter and the figures that are known."
import subprocess, sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from beit_nb import scale
from beit_nb.finetuning import build_classifier
from beit_nb.mim import mim_loss
from beit_nb.pretraining import build_mim
from beit_nb.recipes import FINETUNE, PRETRAIN, RECIPES, TOKENIZER, recipe_named
from beit_nb.tokenizer import build_dvae

torch.set_num_threads(1)
count = lambda model: sum(p.numel() for p in model.parameters())
BASE = recipe_named("pretrain", "base-in1k")


@pytest.mark.parametrize("command,name", [(c, n) for c in ("tokenizer", "pretrain", "finetune") for n in RECIPES[c]])
def test_every_preset(command, name):
    "The parameters are the real network's, and the page has a line for everything."
    r = RECIPES[command][name][1]
    classes = scale.size_of(r)[1]
    with torch.device("meta"): net = build_dvae(r) if command == "tokenizer" else build_mim(r) if command == "pretrain" else build_classifier(r, classes)
    assert scale.total(scale.model_products(r, classes), "parameters") == count(net)
    page = scale.plan_recipe(f"{command} {name}", r, gpus=1, hardware="h100")
    for word in ("steps of", f"{count(net):,}", "GFLOP an image", "GB a GPU", "GPU-hours", "a core"): assert word in page, word


@pytest.mark.parametrize("changes", [
    dict(embed_dim=48, depth=3, num_heads=3, mlp_ratio=2.0),
    dict(embed_dim=64, depth=2, num_heads=4, patch_size=8, num_mask_patches=7, init_values=0.1, use_abs_pos_emb=False, use_shared_rel_pos_bias=True)])
def test_work_by_torchs_counter(changes):
    r = recipe_named("pretrain", "nano", **changes)
    n = (r.img_size // r.patch_size) ** 2
    model, mask = build_mim(r), torch.arange(n).expand(3, -1) < r.num_mask_patches
    with FlopCounterMode(display=False) as counter:
        logits = model.lm_head(model.norm(model.forward_features(torch.rand(3, 3, 32, 32), mask)[:, 1:][mask]))  # every row through every block
        mim_loss(logits, torch.zeros(3 * r.num_mask_patches, dtype=torch.long)).backward()
    assert counter.get_total_flops() == 3 * scale.work(r)["model"] and scale.total(scale.model_products(r), "parameters") == count(model)


def test_what_is_known():
    "The paper: 500,000 steps, five days on 16 V100; the official code: its parameters and its work."
    p = scale.plan(BASE, gpus=16, hardware="v100", mfu=0.19)
    assert p["steps"] == 500_000 and p["share"] == 128 and p["parameters"] == 92_089_856
    assert [round(v / 1e9, 1) for v in p["flop_per_image"].values()] == [52.1, 108.0, 0.0]
    assert abs(p["hours"] / 24 - 5) < 0.01
    assert scale.plan(recipe_named("pretrain", "base-plus-in22k"))["parameters"] == 91_965_776


def test_what_the_fields_do():
    base = scale.plan(BASE)
    assert scale.plan(replace(BASE, steps=1000))["samples"] == 2_048_000
    assert scale.plan(replace(BASE, precision="fp32"))["hours"] > 10 * base["hours"]
    assert scale.plan(replace(BASE, grad_checkpointing=True))["hours"] > base["hours"]
    assert scale.plan(replace(BASE, tokens="ids"))["flop_per_image"]["tokenizer"] == 0
    forms = {k: sum(v.values()) for k, v in base["memory"].items()}
    assert forms["ddp", False] > forms["fsdp", False] > forms["ddp", True] > forms["fsdp", True]
    assert scale.plan(replace(BASE, device_batch_size=32))["batch"] == 32
    assert "set --device-batch-size" in scale.plan_recipe("x", recipe_named("pretrain", "large-in1k"), gpus=2)
    assert scale.plan(BASE, gpus=32)["hours"] == base["hours"] / 4


def test_a_folder_is_counted(tmp_path):
    for i in range(40): (folder := tmp_path / "train" / f"c{i % 4}" / "deep").mkdir(parents=True, exist_ok=True), (folder / f"{i}.JPG").touch(), (folder / f"{i}.txt").touch()
    r = recipe_named("finetune", "cifar", data=str(tmp_path), batch_size=8)
    assert scale.plan(r)["pictures"] == 40 and scale.plan(r)["classes"] == 4 and scale.plan(r, pictures=80)["steps"] == 1000


@pytest.mark.parametrize("says,r,options", [
    ("not divisible by 7 GPUs", BASE, dict(gpus=7)), ("unknown hardware 'tpu'", BASE, dict(hardware="tpu")), ("mfu 40 must be a share", BASE, dict(mfu=40)),
    ("how many pictures has 'nowhere'", replace(BASE, data="nowhere"), {}), ("larger than the data set", replace(BASE, batch_size=4096, data="cifar10", epochs=1), dict(pictures=100)),
    ("num_mask_patches 500", replace(BASE, num_mask_patches=500), {})])
def test_refusals(says, r, options):
    with pytest.raises(ValueError, match=says): scale.plan(r, **options)


def test_light():
    code = "import sys, beit_nb.scale as s; s.plan_recipe('x', s.RECIPES['pretrain']['base-in1k'][1]); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
