"Every number that a recipe must not have, and which settings do not go together."

import contextlib
import io
import json
import math
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import get_type_hints

import numpy as np
import pytest
from helpers_recipes import refusal

from beit_nb import BeitError
from beit_nb.cli import main
from beit_nb.configs import PretrainRecipe, Recipe, Run, TokenizerRecipe, check_recipe
from beit_nb.limits import (
    CHANGEABLE_FIELDS,
    as_config,
    check_same_run,
    limit_of,
    plain_type,
    wrong_fields,
)
from beit_nb.recipes import COMMANDS, from_config
from beit_nb.tools import TOOLS

CLASSES = (TokenizerRecipe, PretrainRecipe)
NANOS = {name: command.presets["nano"][1] for name, command in COMMANDS.items()}


def test_every_number_has_its_limits():
    for recipe_class in CLASSES:
        for field in fields(recipe_class):
            if field.type not in (str, bool):
                assert limit_of(field.type), f"{recipe_class.__name__}.{field.name}"


WRONG = dict(
    clip_grad=(-1.0, math.nan, math.inf),
    weight_decay=(-0.1, math.nan, math.inf),
    lr=(0.0, -1.0, math.nan, math.inf),
    min_lr=(1.0, -1.0, math.nan),
    beta2=(1.0, 1.5, -0.1, math.nan),
    warmup_steps=(-5,),
    warmup_epochs=(-1.0, math.nan, math.inf),
    seed=(-1, 2**32),
    workers=(-1,),
    max_damaged=(-1.0, 2.0, math.nan),
    epochs=(0, -3),
    batch_size=(0,),
    keep_checkpoints=(0,),
    color_jitter=(-1.0, math.nan, math.inf),
    flip=(2.0, -1.0, math.nan),
    crop_scale=((0.5, 2.0), (-1.0, 1.0), (1.0, 0.5), (0.0, 0.0), (math.nan, 1.0), (0.5, math.nan)),
    drop_path_rate=(1.0, 1.5, -0.5, math.nan),
    init_values=(-1.0, math.nan),
    mlp_ratio=(0.0, -4.0, math.nan),
    min_aspect=(0.0, -1.0, 2.0, math.nan),
    num_mask_patches=(0, 65),
    min_mask_patches_per_block=(0, -3, 70),
    max_mask_patches_per_block=(0, 2),
    watch_every=(0,),
    layer_decay=(-0.1, 1.1, math.nan),
    label_smoothing=(1.0, -0.1),
    mixup=(-1.0,),
    cutmix=(math.inf,),
    erasing=(1.5,),
    init_scale=(-1.0, math.nan),
    labels_per_class=(0,),
    draws=(0,),
    downsample=(3, 0),
    ema=(1.0, -0.1, math.nan),
    kl_weight=(-1.0, math.nan),
    kl_steps=(-1,),
    usage_weight=(-0.1,),
    tau_start=(0.0, math.inf),
    tau_end=(0.0, -1.0),
    tau_share=(0.0, 1.5),
    tau_steps=(0,),
    lr_steps=(0,),
    masking=("diagonal",),
    precision=("fp8",),
    weight_init=("zeros",),
    likelihood=("uniform",),
    repeated_aug=(0, -1),
    crop_pct=(0.0, 1.5, math.nan),
    in_chans=(0, -1, 1001),
    split=("train",),
)


@pytest.mark.parametrize("command", NANOS)
def test_a_wrong_value_is_refused_in_one_line_that_names_it(command):
    nano = NANOS[command]
    for field, values in WRONG.items():
        for value in values if field in asdict(nano) else ():
            line = refusal(replace(nano, **{field: value}))
            assert re.search(rf"{field} '?{re.escape(str(value))}\W", line), line


TOO_MUCH = dict(
    steps=(10**12, 2**63, 10**30),
    epochs=(10**12,),
    max_steps=(10**12,),
    warmup_steps=(10**12,),
    kl_steps=(10**12,),
    tau_steps=(10**12,),
    lr_steps=(10**12,),
    checkpoint_every=(10**12,),
    batch_size=(10**12,),
    labels_per_class=(10**12,),
    draws=(10**12, 1001),
    workers=(10**4,),
    img_size=(10**6,),
    patch_size=(10**6,),
    token_size=(10**6,),
    embed_dim=(10**6,),
    depth=(10**6, 1001),
    lr=(1e300, 1e-320),
    min_lr=(1e300,),
    warmup_epochs=(1e300,),
    weight_decay=(1e300,),
    clip_grad=(1e300,),
    mlp_ratio=(1e300, 1e-13),
    init_values=(1e300,),
    init_scale=(1e300,),
    color_jitter=(1e300,),
    mixup=(1e300,),
    cutmix=(1e300,),
    kl_weight=(1e300,),
    usage_weight=(1e300,),
    tau_start=(1e300, 1e-300),
    tau_end=(1e300, 1e-300),
    num_heads=(10**6,),
    width=(10**6,),
    code_dim=(10**6,),
    vocab_size=(10**9, 1),
)


@pytest.mark.parametrize("command", NANOS)
def test_slips_of_a_finger_are_refused(command):
    nano = NANOS[command]
    for field, values in TOO_MUCH.items():
        for value in values if field in asdict(nano) else ():
            line = refusal(replace(nano, **{field: value}))
            limit = r"(a finite number, )?at (most [\d,]+|least [\de-]+)"
            assert re.fullmatch(rf"{field} {re.escape(str(value))} must be {limit}", line), line


TYPES = dict(
    steps=("4", 4.0, [4], True, {}),
    lr=("fast", None, [1e-3], True),
    resume=("yes", 1, None),
    data=(None, 3, b"digits", ["digits"]),
    out=(None, 3),
    seed=(None, 1.5, "1"),
    precision=(32, None, ["fp32"]),
    crop_scale=(0.5, (0.5,), (0.1, 0.5, 1.0), ("a", "b"), [0.1, 1.0]),
)


@pytest.mark.parametrize("command", NANOS)
def test_a_value_of_another_type_is_one_line(command):
    "A config.json or a checkpoint may say anything."
    nano = NANOS[command]
    for field, values in TYPES.items():
        for value in values if field in asdict(nano) else ():
            line = refusal(replace(nano, **{field: value}))
            assert line.startswith(f"{field} {value!r} must be "), line


def test_numbers_of_numpy_are_numbers():
    check_recipe(replace(NANOS["pretrain"], seed=np.int64(3), lr=np.float32(1e-3)))


@pytest.mark.parametrize("tool", TOOLS)
def test_every_number_of_every_tool_has_its_limits(tool):
    hints = get_type_hints(TOOLS[tool], include_extras=True)
    free = {"block", "query"}  # of the network, which is not known yet
    words = {"name", "names", "recipe", "command", "hardware"}
    for field in fields(TOOLS[tool]):
        of_words = plain_type(hints[field.name]) in (str, bool, tuple[str, ...])
        if field.name not in free | words and not of_words:
            assert limit_of(hints[field.name]), field.name


CONFLICTS = [  # a preset, changes of it, what the refusal says
    ("pretrain", dict(img_size=30), "img_size 30 is not divisible by patch_size 4"),
    ("pretrain", dict(num_heads=5), "embed_dim 128 is not divisible by num_heads 5"),
    ("pretrain", dict(embed_dim=6, num_heads=3), "embed_dim 6 is not divisible by the 4 waves"),
    ("pretrain", dict(num_mask_patches=65), "num_mask_patches 65 does not fit 64 patches"),
    ("pretrain", dict(num_mask_patches=3), "masks stay empty"),
    ("pretrain", dict(max_mask_patches_per_block=3), "max_mask_patches_per_block 3 is below"),
    (
        "pretrain",
        dict(num_mask_patches=64, min_mask_patches_per_block=57),
        "min_mask_patches_per_block 57 is too large",
    ),
    ("pretrain", dict(masking="none"), "masking none hides nothing to guess: set recover all"),
    ("pretrain", dict(masking="none", recover="all", num_mask_patches=65), "does not fit"),
    ("pretrain", dict(targets="pixels", tokenizer="runs/tok"), "pixels take no tokenizer"),
    ("pretrain", dict(targets="pixels_norm", tokens="ids"), "pixels_norm take no tokenizer"),
    ("pretrain", dict(min_lr=1.0), "min_lr 1.0 is above lr"),
    ("tokenizer", dict(img_size=30), "img_size 30 is not divisible by downsample 4"),
    ("tokenizer", dict(width=3), "width 3 must be at least downsample 4"),
    ("tokenizer", dict(arch="dalle"), "logits linear"),
    ("tokenizer", dict(arch="dalle", width=6), "width 6 is not divisible by"),
    ("tokenizer", dict(parallel="fsdp"), "set parallel ddp"),
]


@pytest.mark.parametrize("command, changes, words", CONFLICTS)
def test_what_does_not_go_together_is_refused(command, changes, words):
    assert words in refusal(replace(NANOS[command], **changes))


UNUSUAL = [
    ("pretrain", dict(clip_grad=0)),
    ("pretrain", dict(clip_grad=None)),
    ("pretrain", dict(weight_decay=0)),
    ("pretrain", dict(min_lr=0)),
    ("pretrain", dict(lr=1e-4, min_lr=1e-4)),
    ("pretrain", dict(drop_path_rate=0)),
    ("pretrain", dict(init_values=0)),
    ("pretrain", dict(beta2=0)),
    ("pretrain", dict(flip=1)),
    ("pretrain", dict(crop_scale=(1, 1))),
    ("pretrain", dict(crop_scale=None)),
    ("pretrain", dict(color_jitter=2)),
    ("pretrain", dict(warmup_steps=0)),
    ("pretrain", dict(warmup_epochs=0.5)),
    ("pretrain", dict(seed=2**32 - 1)),
    ("pretrain", dict(masking="random", num_mask_patches=1)),
    ("pretrain", dict(masking="random", num_mask_patches=3, min_mask_patches_per_block=60)),
    ("pretrain", dict(masking="none", recover="all")),
    ("pretrain", dict(targets="pixels", recover="all")),
    ("pretrain", dict(targets="pixels_norm", vocab_size=2)),
    ("pretrain", dict(num_mask_patches=64)),
    ("pretrain", dict(num_mask_patches=64, min_mask_patches_per_block=56)),
    ("pretrain", dict(min_aspect=1)),
    ("pretrain", dict(watch_every=None)),
    ("pretrain", dict(embed_dim=6, num_heads=3, use_abs_pos_emb=False)),
    ("tokenizer", dict(arch="dalle", width=8, logits="linear", likelihood="laplace")),
]


@pytest.mark.parametrize("command, changes", UNUSUAL)
def test_what_is_unusual_but_sound_passes(command, changes):
    check_recipe(replace(NANOS[command], **changes))


def test_the_defaults_pass():
    for recipe_class in (Run, *CLASSES):
        check_recipe(recipe_class())


def test_the_largest_smallest_block_leaves_no_mask_empty():
    "The limit of `min_mask_patches_per_block` is where the masking gives up, not somewhere near."
    from beit_nb.masking import blockwise_steps

    blocks = list(blockwise_steps((8, 8), 64, 57, min_aspect=1.0))
    assert not any(block.accepted for block in blocks)
    blocks = list(blockwise_steps((8, 8), 56, 56, min_aspect=1.0))
    assert any(block.accepted for block in blocks)


def test_all_faults_in_one_line():
    line = refusal(replace(NANOS["pretrain"], clip_grad=-1.0, flip=2.0, log_every=0))

    named = [fault.split()[0] for fault in line.split("; ")]
    assert sorted(named) == ["clip_grad", "flip", "log_every"]


def test_a_recipe_of_tomorrow_brings_its_own_rules():
    @dataclass
    class Tomorrow(Recipe):
        split: str = "val"
        draws: int = 1

        def conflicts(self):
            if self.draws > 1 and self.split == "val":
                yield f"draws {self.draws} of val: take test"

    check_recipe(Tomorrow())
    assert refusal(Tomorrow(draws=2)) == "draws 2 of val: take test"
    assert wrong_fields(Tomorrow, {"draws": 2}) == []


@pytest.mark.parametrize("command", ["tokenizer", "pretrain", "finetune"])
def test_every_training_asks_first(command, tmp_path):
    "Exit status 2, one line, and no folder is left: at the command line, before any data is read."
    mistakes = [
        "--clip-grad -1",
        "--weight-decay nan",
        "--lr inf",
        "--min-lr 1",
        "--beta2 1.5",
        "--warmup-steps -5",
        "--seed -1",
        "--flip 2",
        "--crop-scale 0.5 2.0",
    ]
    if command != "tokenizer":
        mistakes.append("--drop-path-rate 1")
    elsewhere = ["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]
    for mistake in mistakes:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            status = main([command, "nano", *mistake.split(), *elsewhere])

        option = mistake.split()[0]
        named = "min_lr" if option == "--min-lr" else option  # that one is a matter of two fields
        lines = said.getvalue().splitlines()
        assert status == 2 and len(lines) == 1, (mistake, said.getvalue())
        assert lines[0].startswith(f"beit: error: {named} "), lines[0]
        assert not (tmp_path / "run").exists()


def test_a_config_goes_through_json():
    for name, command in COMMANDS.items():
        for _, recipe in command.presets.values():
            config = json.loads(json.dumps(as_config(name, recipe)))
            assert from_config(config) == recipe


def test_who_may_go_on():
    old = as_config("pretrain", NANOS["pretrain"])

    check_same_run(old, old | dict.fromkeys(CHANGEABLE_FIELDS, "changed"), "runs/a")
    check_same_run({k: v for k, v in old.items() if k != "loss_mean"}, old, "of an older version")
    with pytest.raises(BeitError, match="runs/a holds another run .lr 0.0015 there, 0.001 now"):
        check_same_run(old, old | dict(lr=1e-3), "runs/a")


def test_free_fields_exist():
    known = {field.name for kind in (Run, PretrainRecipe) for field in fields(kind)}
    assert CHANGEABLE_FIELDS < known


def test_two_spellings_of_a_known_set_are_one_run():
    old = as_config("tokenizer", TokenizerRecipe(data="digits"))

    check_same_run(old, as_config("tokenizer", TokenizerRecipe(data="embedded:digits")), "runs/x")
    for other in ("photos", "embedded:photos", "./digits"):
        with pytest.raises(BeitError, match="holds another run .data 'digits' there"):
            check_same_run(old, old | {"data": other}, "runs/x")


def test_a_block_needs_a_hidden_unit():
    line = refusal(replace(NANOS["pretrain"], mlp_ratio=1e-9))
    assert line == "mlp_ratio 1e-09 leaves no hidden unit: raise it"


@pytest.mark.parametrize(
    "changes, length",
    [
        (dict(epochs=3), (15, 5, 15)),
        (dict(epochs=3, steps=7), (7, 5, 7)),
        (dict(epochs=3, max_steps=4), (15, 5, 4)),
        (dict(epochs=3, max_steps=40), (15, 5, 15)),
        (dict(steps=1, dry_run=True), (1, 5, 1)),
        (dict(epochs=3, max_steps=9, dry_run=True), (15, 5, 2)),
    ],
)
def test_length_is_that_of_whole_batches_and_of_what_was_asked(changes, length):
    "Of 23 pictures in batches of 4, five batches are full."
    assert Run(batch_size=4, **changes).length(23) == length


def test_what_the_head_says_and_of_how_many_patches():
    r = NANOS["pretrain"]
    pixels = replace(r, targets="pixels", recover="all", masking="none")

    assert (r.outputs, r.recovered) == (r.vocab_size, 26)
    assert (pixels.outputs, pixels.recovered) == (4 * 4 * 3, 64)
