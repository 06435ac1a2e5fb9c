"`beit plan`: what a recipe costs, against known figures and as the command reads it."

import re
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import beit, refused
from helpers_processes import run_python

from beit_nb import BeitError
from beit_nb.cli import read_recipe
from beit_nb.configs import Backbone, Run
from beit_nb.recipes import COMMANDS, recipe_named
from beit_nb.scale.plan import (
    Layout,
    advice,
    largest_divisor,
    memory_lines,
    options_to,
    plan_recipe,
    plan_training,
    slowdown,
)
from beit_nb.vit import VisionTransformer

BASE = recipe_named("pretrain", "base-in1k")
LARGE = recipe_named("pretrain", "large-in1k")


def page_of(*words):
    return beit("plan", *words).stdout


def row(page, name):
    "The text behind a name in the page."
    return next(line[14:] for line in page.splitlines() if line.startswith(f"  {name} "))


def as_words(r):
    "A recipe as options, every field of it."
    for field, value in vars(r).items():
        name = field.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{name if value else 'no-' + name}"
        else:
            yield from [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]


# --- the figures


@pytest.mark.parametrize(
    "command,name",
    [(c, n) for c in ("tokenizer", "pretrain", "finetune") for n in COMMANDS[c].presets],
)
def test_every_preset_has_a_whole_page(command, name):
    page = plan_recipe(f"{command} {name}", recipe_named(command, name), gpus=1, hardware="h100")

    for words in ("steps of", "GFLOP an image", "GB a GPU", "GPU-hours", "a core"):
        assert words in page, words


def test_what_is_known():
    "The paper: 500,000 steps, five days on 16 V100. The official code: its parameters and work."
    p = plan_training(BASE, gpus=16, hardware="v100", mfu=0.19)

    assert (p.steps, p.per_gpu, p.parameters) == (500_000, 128, 92_089_856)
    assert [round(n / 1e9, 1) for n in p.flops] == [52.1, 108.0, 0.0]
    assert abs(p.hours / 24 - 5) < 0.01


def test_what_the_fields_do():
    plan = plan_training(BASE)

    assert plan_training(replace(BASE, steps=1000)).samples == 2_048_000
    assert plan_training(replace(BASE, precision="fp32")).hours > 10 * plan.hours
    assert plan_training(replace(BASE, grad_checkpointing=True)).hours > plan.hours
    assert plan_training(replace(BASE, tokens="ids")).flops.tokenizer == 0
    assert plan_training(replace(BASE, device_batch_size=32)).micro_batch == 32
    assert plan_training(BASE, gpus=32).hours == plan.hours / 4
    assert plan_training(BASE, mfu=0.2).images_per_second == plan.images_per_second / 2


@pytest.mark.parametrize(
    "says,r,options",
    [
        ("not divisible by 7 GPUs", BASE, dict(gpus=7)),
        ("unknown hardware 'tpu'", BASE, dict(hardware="tpu")),
        ("mfu 40 must be a share", BASE, dict(mfu=40)),
        ("how many pictures has 'nowhere'", replace(BASE, data="nowhere"), {}),
        ("larger than the data set", replace(BASE, batch_size=4096), dict(pictures=100)),
        ("num_mask_patches 500", replace(BASE, num_mask_patches=500), {}),
        ("pictures 0 must be at least 1", BASE, dict(pictures=0)),
        ("device_batch_size 100 does not divide", replace(BASE, device_batch_size=100), {}),
    ],
)
def test_refusals(says, r, options):
    with pytest.raises(BeitError, match=says):
        plan_training(r, **options)
    with pytest.raises(BeitError, match=says):
        plan_recipe("pretrain x", r, **options)


# --- what helps


@pytest.mark.parametrize(
    "changes,gpus",
    [
        ({}, 1),
        ({}, 4),
        (dict(grad_checkpointing=True), 1),
        (dict(parallel="fsdp"), 2),
        (dict(embed_dim=4096, depth=48), 8),
        (dict(embed_dim=4096, depth=48), 64),
    ],
)
def test_each_way_that_is_named_makes_the_step_fit(changes, gpus):
    r = replace(LARGE, **changes)
    p = plan_training(r, gpus)
    ways = advice(p).removeprefix("set ").split(", or ")

    assert not p.fits and ("fsdp" not in advice(p) or gpus > 1)
    for way in ways:
        words = ["large-in1k", *as_words(r), *way.split()]
        assert plan_training(read_recipe("pretrain", words), gpus).fits, way


def test_where_nothing_helps_it_is_said():
    p = plan_training(replace(LARGE, embed_dim=8192, depth=96), gpus=1)

    assert advice(p) == "no setting helps; take more or larger GPUs"


def test_options_lead_to_thriftier_layouts_only():
    plain, both = Layout("ddp", False), Layout("fsdp", True)

    assert options_to(plain, plain) == []
    assert options_to(plain, both) == ["--parallel fsdp", "--grad-checkpointing"]
    assert options_to(Layout("fsdp", False), both) == ["--grad-checkpointing"]
    assert options_to(both, Layout("ddp", True)) is None
    assert options_to(both, Layout("fsdp", False)) is None


def test_the_largest_divisor():
    assert [largest_divisor(12, n) for n in (0, 1, 5, 7, 12, 99)] == [0, 1, 4, 6, 12, 12]


# --- the page


@pytest.mark.parametrize(
    "command,name",
    [("tokenizer", "photos"), ("pretrain", "base-in1k"), ("finetune", "base-in1k-384")],
)
def test_every_field_can_be_planned(command, name):
    "`beit plan` reads a recipe as its training does, field by field."
    r = recipe_named(
        command,
        name,
        batch_size=96,
        device_batch_size=24,
        steps=70,
        max_steps=50,
        precision="fp32",
    )
    page = page_of(name, "--command", command, "--gpus", 2, *as_words(r))

    assert read_recipe(command, [name, *as_words(r)]) == r
    assert page.strip() == plan_recipe(f"{command} {name}", r, gpus=2)
    assert row(page, "training").startswith("50 steps of 96 pictures = 4,800 samples")
    assert "24 pictures at once (2 times a step)" in page and "fp32" in page
    assert page != page_of(name, "--command", command, "--gpus", 2)


def test_an_unknown_field_is_refused_with_the_valid_ones():
    for words in (["--grad-checkpoint"], ["--lr", "1e-3", "--grad-checkpoint=3"]):
        line = refused("plan", "base-in1k", *words, says="no option --grad-checkpoint")
        assert {"--num-mask-patches", "--lr", "--gpus", "--mfu"} <= set(line.split())


def test_the_one_gpu_run():
    "README's run on one GPU: micro-batches, and checkpointing in memory and in time."
    words = "base-in1k", "--gpus", 1, "--device-batch-size", 128, "--precision", "fp16"
    plain = page_of(*words)
    again = page_of(*words, "--grad-checkpointing")
    hours = [float(row(page, "time").split()[0]) for page in (plain, again)]

    assert "128 pictures at once (16 times a step)" in plain
    assert "fsdp" not in plain + again and "executed" not in plain
    assert re.search("> ddp +10.66", plain)
    assert re.search("> ddp  checkpointing, 1.21 x the time +4.34", again)
    assert abs(hours[1] / hours[0] - 1.21) < 0.005
    assert "194.1 executed" in row(again, "work")
    assert "33% of the work counted" in row(again, "mfu")


def test_tokens():
    page = page_of("base-in1k")
    small = "--img-size 112 --token-size 56 --num-mask-patches 20 --steps 1".split()
    exact = page_of("base-in1k", "--exact-mask", *small)
    tokenizer = page_of("imagenet", "--command", "tokenizer", "--steps", 10)

    assert row(page, "tokens") == (
        "196 a picture: 200,704,000,000 in all; at most 75 of them hidden: 76,800,000,000 guesses"
    )
    assert row(exact, "tokens") == (
        "49 a picture: 100,352 in all; 20 of them hidden: 40,960 guesses"
    )
    assert row(tokenizer, "tokens") == f"196 a picture: {196 * 1024 * 10:,} in all"


def test_the_share_is_called_an_assumption():
    "2.4 days at 40 % and the paper's 5 days stand side by side."
    page = page_of("base-in1k", "--gpus", 16, "--hardware", "v100")

    assert "= 2.4 days" in row(page, "time")
    assert "at 19%, which the paper's 16 V100 reached (5 days): 120 hours = 5 days" in page
    assert row(page, "mfu") == (
        "40% is an assumption; measure yours with beit bench step, pass --mfu"
    )
    assert row(page, "note") == "a V100 has no bf16: add --precision fp16"
    assert "which the paper" not in page_of("base-in1k", "--precision", "fp32")


def test_memory_lines_mark_the_recipes_own_layout():
    p = plan_training(replace(LARGE, parallel="fsdp"), gpus=2)
    lines = memory_lines(p)
    layouts = [line for line in lines if ", up to " in line]

    assert "do not fit: set --device-batch-size" in lines[-1]
    assert [line[0] for line in layouts] == [" ", " ", ">", " "]
    assert f"{slowdown(p):.2f} x the time" in layouts[1]
    assert max(map(len, lines)) <= 90


def test_a_training_whose_network_is_unknown_has_a_length():
    @dataclass
    class Toy(Run):
        hidden: int = 4

    page = plan_recipe("toy tiny", Toy(steps=4, batch_size=8), gpus=1)

    assert "toy tiny" in page
    assert row(page, "training") == "4 steps of 8 pictures = 32 samples of 14,400 pictures"
    assert len(page.splitlines()) == 2
    with pytest.raises(BeitError, match="batch_size 0"):
        plan_recipe("toy tiny", Toy(batch_size=0))


def test_another_job_of_the_transformer_has_a_page():
    @dataclass
    class Toy(Backbone, Run):
        def conflicts(self):
            yield from Run.conflicts(self)

    page = plan_recipe("toy base", Toy(data="imagenet", epochs=10, batch_size=1024))

    with torch.device("meta"):
        parameters = sum(p.numel() for p in VisionTransformer().parameters())
    assert row(page, "parameters") == f"{parameters:,}"
    assert "GPU-hours" in page and "196 a picture" in page


def test_what_takes_no_steps_is_refused():
    with pytest.raises(BeitError, match="probe nano does not train in steps"):
        plan_recipe("probe nano", recipe_named("probe", "nano"))


# --- it is light


def test_a_plan_needs_no_torch():
    code = """
import sys
from beit_nb.recipes import recipe_named
from beit_nb.scale.plan import plan_recipe
plan_recipe("x", recipe_named("pretrain", "base-in1k"))
assert not {"torch", "numpy"} & set(sys.modules)
"""
    run_python(code)


def test_help_says_where_the_fields_are():
    text = beit("plan", "--help").stdout

    assert "--mfu" in text and "beit pretrain base-in1k --help" in " ".join(
        re.sub("[│]", " ", text).split()
    )
