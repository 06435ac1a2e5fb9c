"`beit plan`: what a recipe costs, by formula, against the real networks, torch's own counter and the figures that are known."

import contextlib, io, re, resource, subprocess, sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from beit_nb import scale
from beit_nb.cli import main, read_recipe
from beit_nb.finetuning import build_classifier
from beit_nb.mim import mim_loss
from beit_nb.pretraining import build_mim
from beit_nb.recipes import FINETUNE, PRETRAIN, RECIPES, TOKENIZER, recipe_named
from beit_nb.tokenizer import build_dvae

torch.set_num_threads(1)
count = lambda model: sum(p.numel() for p in model.parameters())
BASE = recipe_named("pretrain", "base-in1k")


def said(*words, status=0):
    "What `beit plan WORDS` prints, or the one line with which it is refused."
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["plan", *map(str, words)]) == status, err.getvalue()
    return (err if status else out).getvalue().strip()


def row(page, name):
    "The text behind a name in the page."
    return next(line[14:] for line in page.splitlines() if line.startswith(f"  {name} "))


@pytest.mark.parametrize(
    "command,name", [(c, n) for c in ("tokenizer", "pretrain", "finetune") for n in RECIPES[c]]
)
def test_every_preset(command, name):
    "The parameters are the real network's, and the page has a line for everything."
    r = RECIPES[command][name][1]
    classes = scale.size_of(r)[1]
    with torch.device("meta"):
        net = (
            build_dvae(r)
            if command == "tokenizer"
            else build_mim(r)
            if command == "pretrain"
            else build_classifier(r, classes)
        )
    assert scale.total(scale.model_products(r, classes), "parameters") == count(net)
    page = scale.plan_recipe(f"{command} {name}", r, gpus=1, hardware="h100")
    for word in (
        "steps of",
        f"{count(net):,}",
        "GFLOP an image",
        "GB a GPU",
        "GPU-hours",
        "a core",
    ):
        assert word in page, word


@pytest.mark.parametrize(
    "changes",
    [
        dict(embed_dim=48, depth=3, num_heads=3, mlp_ratio=2.0),
        dict(
            embed_dim=64,
            depth=2,
            num_heads=4,
            patch_size=8,
            num_mask_patches=7,
            init_values=0.1,
            use_abs_pos_emb=False,
            use_shared_rel_pos_bias=True,
        ),
    ],
)
def test_work_by_torchs_counter(changes):
    r = recipe_named("pretrain", "nano", **changes)
    n = (r.img_size // r.patch_size) ** 2
    model = build_mim(r)
    mask = torch.arange(n).expand(3, -1) < r.num_mask_patches
    with FlopCounterMode(display=False) as counter:
        # every row through every block
        logits = model.lm_head(
            model.norm(model.forward_features(torch.rand(3, 3, 32, 32), mask)[:, 1:][mask])
        )
        mim_loss(logits, torch.zeros(3 * r.num_mask_patches, dtype=torch.long)).backward()
    assert counter.get_total_flops() == 3 * scale.work(r)["model"] and scale.total(
        scale.model_products(r), "parameters"
    ) == count(model)


def test_what_is_known():
    """The paper: 500,000 steps, five days on 16 V100.

    The official code: its parameters and its work.
    """
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
    assert "set --device-batch-size" in scale.plan_recipe(
        "x", recipe_named("pretrain", "large-in1k"), gpus=2
    )
    assert scale.plan(BASE, gpus=32)["hours"] == base["hours"] / 4


def test_a_folder_is_counted(tmp_path):
    for i in range(40):
        (
            (folder := tmp_path / "train" / f"c{i % 4}" / "deep").mkdir(
                parents=True, exist_ok=True
            ),
            (folder / f"{i}.JPG").touch(),
            (folder / f"{i}.txt").touch(),
        )
    r = recipe_named("finetune", "cifar", data=str(tmp_path), batch_size=8)
    assert (
        scale.plan(r)["pictures"] == 40
        and scale.plan(r)["classes"] == 4
        and scale.plan(r, pictures=80)["steps"] == 1000
    )


@pytest.mark.parametrize(
    "says,r,options",
    [
        ("not divisible by 7 GPUs", BASE, dict(gpus=7)),
        ("unknown hardware 'tpu'", BASE, dict(hardware="tpu")),
        ("mfu 40 must be a share", BASE, dict(mfu=40)),
        ("how many pictures has 'nowhere'", replace(BASE, data="nowhere"), {}),
        (
            "larger than the data set",
            replace(BASE, batch_size=4096, data="cifar10", epochs=1),
            dict(pictures=100),
        ),
        ("num_mask_patches 500", replace(BASE, num_mask_patches=500), {}),
        ("pictures 0 must be at least 1", BASE, dict(pictures=0)),
        (
            "device_batch_size 100 does not divide a GPU's share of 256",
            replace(BASE, device_batch_size=100),
            {},
        ),
    ],
)
def test_refusals(says, r, options):
    with pytest.raises(ValueError, match=says):
        scale.plan(r, **options)


def test_light():
    code = "import sys, beit_nb.scale.plan as s; s.plan_recipe('x', s.RECIPES['pretrain']['base-in1k'][1]); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def as_words(r):
    "A recipe as options, every field of it."
    for k, v in vars(r).items():
        name = k.replace("_", "-")
        yield from (
            [f"--{name if v else 'no-' + name}"]
            if isinstance(v, bool)
            else [f"--{name}", *map(str, v if isinstance(v, tuple) else [v])]
        )


@pytest.mark.parametrize(
    "command,name",
    [("tokenizer", "photos"), ("pretrain", "base-in1k"), ("finetune", "base-in1k-384")],
)
def test_every_field_can_be_planned(command, name):
    "`beit plan` reads a recipe as its training does, field by field."
    r = replace(
        RECIPES[command][name][1],
        batch_size=96,
        device_batch_size=24,
        steps=70,
        max_steps=50,
        precision="fp32",
    )
    assert read_recipe(command, [name, *as_words(r)]) == r
    page = said(name, "--command", command, "--gpus", 2, *as_words(r))
    assert page == scale.plan_recipe(f"{command} {name}", r, gpus=2)
    assert (
        row(page, "training").startswith("50 steps of 96 pictures = 4,800 samples")
        and "24 pictures at once (2 times a step)" in page
        and "fp32" in page
    )
    assert page != said(name, "--command", command, "--gpus", 2)


@pytest.mark.parametrize(
    "command,name,field",
    [
        ("tokenizer", "nano", "--downsample"),
        ("pretrain", "base-in1k", "--num-mask-patches"),
        ("finetune", "base-in1k", "--layer-decay"),
    ],
)
def test_an_unknown_field_is_refused_with_the_valid_ones(command, name, field):
    for words in ([name, "--grad-checkpoint"], [name, "--lr", "1e-3", "--grad-checkpoint=3"]):
        line = said(*words, "--command", command, status=2)
        assert (
            line.startswith(
                f"beit: error: a {command} recipe has no option --grad-checkpoint (do you mean "
                "--grad-checkpointing?)"
            )
            and "\n" not in line
        )
        assert {field, "--lr", "--gpus", "--mfu"} <= set(line.split())
        with pytest.raises(ValueError, match="no option --grad-checkpoint ") as e:
            read_recipe(command, words)
        assert field in str(e.value).split() and "--gpus" not in str(e.value)


def test_the_one_gpu_run():
    "README's run on one GPU: pictures in bites, and checkpointing in memory and in time."
    words = "base-in1k", "--gpus", 1, "--device-batch-size", 128, "--precision", "fp16"
    plain = said(*words)
    again = said(*words, "--grad-checkpointing")
    assert (
        "128 pictures at once (16 times a step)" in plain
        and "fsdp" not in plain + again
        and "executed" not in plain
    )
    assert re.search("> ddp +10.66", plain) and re.search(
        "> ddp  checkpointing, 1.15 x the time +4.34", again
    )
    hours = [float(row(page, "time").split()[0]) for page in (plain, again)]
    assert (
        abs(hours[1] / hours[0] - 1.15) < 0.005
        and "183.8 executed" in row(again, "work")
        and "35% of the work counted" in row(again, "mfu")
    )


@pytest.mark.parametrize(
    "changes", [{}, dict(init_values=0.1), dict(depth=2, use_shared_rel_pos_bias=True)]
)
def test_recomputed_by_torchs_counter(changes):
    r = recipe_named("pretrain", "nano", grad_checkpointing=True, **changes)
    model = build_mim(r).train()
    mask = torch.arange(64).expand(2, -1) < 26
    with FlopCounterMode(display=False) as counter:
        logits = model.lm_head(
            model.norm(model.forward_features(torch.rand(2, 3, 32, 32), mask)[:, 1:][mask])
        )
        mim_loss(logits, torch.zeros(52, dtype=torch.long)).backward()
    assert counter.get_total_flops() == 2 * sum(scale.work(r).values()) > 2 * scale.work(r)["model"]


@pytest.mark.parametrize(
    "name,changes,gpus",
    [
        ("large-in1k", {}, 1),
        ("large-in1k", {}, 4),
        ("large-in1k", dict(grad_checkpointing=True), 1),
        ("large-in1k", dict(parallel="fsdp"), 2),
        ("large-in1k", dict(embed_dim=4096, depth=48), 8),
        ("large-in1k", dict(embed_dim=4096, depth=48), 64),
        ("large-in1k", dict(embed_dim=8192, depth=96), 1),
    ],
)
def test_advice_helps(name, changes, gpus):
    "Each way that is named makes the step fit; FSDP is named only where somebody shares."
    r = recipe_named("pretrain", name, **changes)
    fits = lambda r: (p := scale.plan(r, gpus))["largest"][p["own"]] >= p["batch"]
    advice = scale.advice(scale.plan(r, gpus))
    assert not fits(r) and ("fsdp" not in advice or gpus > 1)
    if changes.get("embed_dim") == 8192:
        assert advice == "no setting helps; take more or larger GPUs"
    else:
        for way in advice.removeprefix("set ").split(", or "):
            assert fits(read_recipe("pretrain", [name, *as_words(r), *way.split()])), way


def test_tokens():
    page = said("base-in1k")
    assert (
        row(page, "tokens")
        == "196 a picture: 200,704,000,000 in all; at most 75 of them hidden: 76,800,000,000 "
        "guesses"
    )
    assert (
        row(
            said(
                "base-in1k",
                "--exact-mask",
                "--img-size",
                112,
                "--token-size",
                56,
                "--num-mask-patches",
                20,
                "--steps",
                1,
            ),
            "tokens",
        )
        == "49 a picture: 100,352 in all; 20 of them hidden: 40,960 guesses"
    )
    assert (
        row(said("imagenet", "--command", "tokenizer", "--steps", 10), "tokens")
        == f"196 a picture: {196 * 1024 * 10:,} in all"
    )


def test_the_share_is_called_an_assumption():
    "2.4 days at 40 % and the paper's 5 days stand side by side."
    page = said("base-in1k", "--gpus", 16, "--hardware", "v100")
    assert (
        "= 2.4 days" in row(page, "time")
        and "at 19%, which the paper's 16 V100 reached (5 days): 120 hours = 5 days" in page
    )
    assert (
        row(page, "mfu") == "40% is an assumption; measure yours with beit bench step, pass --mfu"
    )
    assert abs(scale.paper_mfu() - 500_000 * 2048 * 160.1e9 / (16 * 125e12 * 5 * 86400)) < 1e-4
    assert "which the paper" not in said("base-in1k", "--precision", "fp32")


def test_no_pictures_are_refused():
    assert (
        said("base-in1k", "--pictures", 0, status=2) == "beit: error: pictures 0 must be at least 1"
    )


def test_help_is_light():
    code = "import sys\nfrom beit_nb.cli import main\ntry: main(['plan', '--help'])\nexcept SystemExit: pass\nassert not {'torch', 'numpy'} & set(sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    text = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    assert (
        "--mfu" in text
        and "tokens" in text
        and "beit pretrain base-in1k --help" in " ".join(re.sub("[│]", " ", text).split())
    )
