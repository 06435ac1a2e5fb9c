"""Every field of every preset beside its source, and every number that a recipe must not have.

Sources: [12], [13] the paper's tables (arXiv 2106.08254v2); [code] microsoft/unilm beit/: run_beit_pretraining.py, run_class_finetuning.py, datasets.py,
masking_generator.py; [README] its commands; [DALL-E] arXiv 2102.12092, App. A.2; [ours] our choice: a size of our own, or a need of tiny networks (lesson 6)."""

import contextlib, io, math
from dataclasses import asdict, fields, replace

import pytest
from torch import nn

from beit_nb.cli import main
from beit_nb.finetuning import build_classifier
from beit_nb.pretraining import build_mim
from beit_nb.recipes import (
    ALLOWED,
    RECIPES,
    FinetuneRecipe,
    PretrainRecipe,
    ProbeRecipe,
    Run,
    TokenizerRecipe,
    check_recipe,
)
from beit_nb.engine.optim import cosine_schedule
from beit_nb.engine.training import Trainer

# What no source rules: how and where the work is done, the same in all presets [ours]
ENGINE = dict(
    out="",
    resume=True,
    seed=0,
    steps=None,
    device_batch_size=None,
    precision="auto",
    compile=False,
    parallel="ddp",
    grad_checkpointing=False,
    max_steps=None,
    checkpoint_every=1000,
    keep_checkpoints=2,
    milestone_every=None,
    log_every=20,
    workers=0,
    max_damaged=0.01,
    tensorboard=False,
    dry_run=False,
)

# The bodies
VIT = dict(
    img_size=224,
    patch_size=16,  # [12]: input 224, patch 16
    mlp_ratio=4.0,  # [12]: FFN 3072 over 768, 4096 over 1024
    drop_path_rate=0.1,
)  # [12], [13]: stochastic depth
# the paper's text; [README]'s three flags
VANILLA = dict(
    init_values=None, use_abs_pos_emb=True, use_rel_pos_bias=False, use_shared_rel_pos_bias=False
)
# [12]
BASE = dict(VIT, embed_dim=768, depth=12, num_heads=12, **VANILLA)
# [12]
LARGE = dict(VIT, embed_dim=1024, depth=24, num_heads=16, **VANILLA)
# [code]'s defaults
PLUS = dict(
    init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=False, use_shared_rel_pos_bias=True
)
# [ours]: CIFAR's 32 pixels; DeiT-Ti's body
TINY = dict(VIT, img_size=32, patch_size=4, embed_dim=192, depth=12, num_heads=3, **VANILLA)
# [ours]
NANO = dict(
    VIT,
    img_size=32,
    patch_size=4,
    embed_dim=128,
    depth=4,
    num_heads=4,
    drop_path_rate=0.0,
    **VANILLA,
)
# [ours]: without them a tiny network learns nothing
AIDS = dict(weight_init="xavier", pos_embed_init="sincos")

# Pre-training
PAPER = dict(
    ENGINE,
    data="imagenet",
    epochs=800,  # Tables 1, 4; [README]
    # [12]; [README] --lr 1.5e-3, 128 x 16 GPUs
    batch_size=2048,
    lr=1.5e-3,
    min_lr=1e-5,
    warmup_epochs=10,
    warmup_steps=None,  # [12]
    weight_decay=0.05,
    beta2=0.999,
    clip_grad=3.0,  # [12]; clip 1.0 for large
    # the paper, 3.1: DALL-E's 8,192 words; [code]: --second_input_size 112
    tokenizer="",
    vocab_size=8192,
    token_size=112,
    masking="blockwise",
    num_mask_patches=75,  # [README]: --num_mask_patches 75
    # the paper's Algorithm 1; [code]
    min_mask_patches_per_block=16,
    max_mask_patches_per_block=None,
    min_aspect=0.3,
    exact_mask=False,  # Algorithm 1; [code]; exact is BEiT-2
    # [code]: RandomResizedCrop's default, ColorJitter(.4, .4, .4), flip
    crop_scale=(0.08, 1.0),
    color_jitter=0.4,
    flip=0.5,
    # [README]: --imagenet_default_mean_and_std, for ImageNet-1K only
    mean_std="imagenet",
    weight_init="beit",
    pos_embed_init="normal",  # [code]: truncated normal .02
    # [ours]: a hundred looks in 500,000 steps
    watch_every=5000,
    # [ours]: what `process` would be is [code]
    loss_mean="global",
    tokens="",
    jitter_on="loader",
)
# [README]: --warmup_steps 10000 --epochs 150, no flag: [code]'s 0.5
IN22K = dict(data="imagenet22k", epochs=150, warmup_epochs=0, warmup_steps=10_000, mean_std="beit")
# [ours]
OURS = dict(PAPER, beta2=0.98, token_size=32, min_mask_patches_per_block=4, **AIDS)
PRETRAIN = {
    "base-in1k": PAPER | BASE,
    "large-in1k": PAPER | LARGE | dict(clip_grad=1.0),  # [12]
    "base-plus-in1k": PAPER | BASE | PLUS | dict(epochs=300),  # Table 5
    "base-plus-in22k": PAPER | BASE | PLUS | IN22K,
    # [12]; [README]: --layer_scale_init_value 1e-5
    "large-plus-in22k": PAPER | LARGE | PLUS | IN22K | dict(clip_grad=1.0, init_values=1e-5),
    # [ours]: lessons 16, 28 measure it
    "nano": OURS
    | NANO
    | dict(
        # 41 % of 64
        data="digits",
        epochs=10,
        batch_size=64,
        min_lr=1.5e-5,
        warmup_epochs=0,
        warmup_steps=60,
        vocab_size=256,
        num_mask_patches=26,
        exact_mask=True,
        crop_scale=None,
        color_jitter=0.0,
        flip=0.0,
        mean_std="beit",
        watch_every=250,
    ),
    # [ours]: not measured
    "cifar": OURS
    | TINY
    | dict(
        # 39 % of 64
        data="cifar100",
        epochs=300,
        batch_size=512,
        vocab_size=1024,
        num_mask_patches=25,
        crop_scale=(0.35, 1.0),
        watch_every=None,
    ),
}

# Fine-tuning
TABLE_13 = dict(
    ENGINE,
    # [13], lr out of its sweep; [README]: 4e-3
    data="imagenet",
    epochs=100,
    warmup_epochs=20,
    warmup_steps=None,
    batch_size=1024,
    lr=4e-3,
    min_lr=1e-6,
    # [13]
    weight_decay=0.05,
    beta2=0.999,
    clip_grad=None,
    layer_decay=0.65,
    label_smoothing=0.1,
    # [13]: RandAugment 9 / 0.5
    mixup=0.8,
    cutmix=1.0,
    augment="rand-m9-mstd0.5-inc1",
    erasing=0.25,
    # [code]: timm's create_transform
    crop_scale=(0.08, 1.0),
    flip=0.5,
    # as in the pre-training
    mean_std="imagenet",
    # the paper, 2.6; [README]: --init_scale 0.001
    use_mean_pooling=True,
    init_scale=0.001,
    weight_init="beit",
    pos_embed_init="normal",
    # [ours]
    init="",
    labels_per_class=None,
    eval_every=None,
    split="val",
)
FINETUNE = {
    "base-in1k": TABLE_13 | BASE,
    # [13], lr out of its sweep
    "large-in1k": TABLE_13 | LARGE | dict(epochs=50, warmup_epochs=5, layer_decay=0.75, lr=2e-3),
    # the paper, 3.1: 10 more epochs at 384
    "base-in1k-384": TABLE_13
    | BASE
    | dict(
        img_size=384,
        epochs=10,
        # [README], base at 384
        batch_size=512,
        lr=2e-5,
        layer_decay=0.85,
        weight_decay=1e-8,
        mixup=0.0,
        cutmix=0.0,
        # [ours]: its 5 of 30 epochs, in 10
        warmup_epochs=1,
    ),
    # [13], lr out of its sweep
    "base-cifar100": TABLE_13
    | BASE
    | dict(data="cifar100", epochs=150, batch_size=512, lr=3e-3, weight_decay=0.3, erasing=0.0),
    # [ours]: lessons 18, 28 measure it
    "nano": TABLE_13
    | NANO
    | AIDS
    | dict(
        data="digits",
        labels_per_class=20,
        epochs=1,
        steps=200,
        batch_size=32,
        lr=2e-3,
        min_lr=1e-5,
        warmup_epochs=0,
        warmup_steps=20,
        clip_grad=3.0,
        layer_decay=0.75,
        drop_path_rate=0.1,
        mixup=0.0,
        cutmix=0.0,
        augment="shift",
        erasing=0.0,
        crop_scale=None,
        flip=0.0,
        mean_std="beit",
        eval_every=40,
    ),
    # [ours]: not measured
    "cifar": TABLE_13
    | TINY
    | AIDS
    | dict(data="cifar100", batch_size=512, lr=2e-3, warmup_epochs=10, crop_scale=(0.35, 1.0)),
}

# Tokenizers: the paper took DALL-E's, so but for that one all is [ours]
SMALL = dict(
    ENGINE,
    data="digits",
    img_size=32,
    arch="small",
    downsample=4,
    vocab_size=256,
    code_dim=32,
    width=64,
    logits="distance",
    likelihood="normal",
    epochs=2,
    batch_size=32,
    lr=2e-3,
    min_lr=0.0,
    warmup_epochs=0,
    warmup_steps=20,
    lr_steps=None,
    weight_decay=1e-4,
    beta2=0.99,
    clip_grad=1.0,
    kl_weight=0.0,
    kl_steps=5000,
    usage_weight=0.05,
    tau_start=1.0,
    tau_end=1 / 16,
    tau_share=0.8,
    tau_steps=None,
    ema=0.0,
    crop_scale=None,
    flip=0.0,
)
GPU = SMALL | dict(epochs=30, lr=1e-3, min_lr=1e-5, warmup_epochs=1, warmup_steps=None, flip=0.5)
TOKENIZER = {
    "nano": SMALL,
    "photos": SMALL
    | dict(
        data="photos",
        img_size=64,
        downsample=8,
        vocab_size=512,
        width=128,
        epochs=4,
        crop_scale=(0.02, 0.3),
        flip=0.5,
    ),
    "cifar": GPU
    | dict(
        data="cifar100",
        batch_size=256,
        vocab_size=1024,
        width=256,
        beta2=0.999,
        crop_scale=(0.5, 1.0),
    ),
    "imagenet": GPU
    | dict(
        data="imagenet",
        img_size=112,
        downsample=8,
        vocab_size=8192,
        width=512,
        batch_size=1024,
        ema=0.999,
        crop_scale=(0.08, 1.0),
    ),
    "dalle": SMALL
    | dict(
        # [ours]: its pictures and loop are not public
        data="imagenet",
        epochs=1,
        warmup_steps=None,
        clip_grad=None,
        usage_weight=0.0,
        # [DALL-E]; openai/DALL-E
        arch="dalle",
        img_size=256,
        downsample=8,
        vocab_size=8192,
        code_dim=128,
        width=256,
        logits="linear",
        likelihood="laplace",
        # [DALL-E]
        steps=3_000_000,
        batch_size=512,
        lr=1e-4,
        min_lr=1.25e-6,
        lr_steps=1_200_000,
        weight_decay=1e-4,
        beta2=0.999,
        ema=0.999,
        # [DALL-E]; openai/DALL-E issue 8
        kl_weight=6.6,
        kl_steps=5000,
        tau_start=1.0,
        tau_end=1 / 16,
        tau_steps=150_000,
        # [DALL-E], Listing 1: 256 of 384 to 288 pixels
        crop_scale=(0.44, 0.79),
    ),
}
PROBE = {  # Table 9 is probed by logistic regression here, so it has no training numbers [ours]
    "nano": dict(
        data="digits",
        out="",
        init="",
        labels_per_class=20,
        draws=3,
        seed=0,
        batch_size=256,
        split="val",
    ),
    "in1k": dict(
        data="imagenet",
        out="",
        init="",
        labels_per_class=None,
        draws=1,
        seed=0,
        batch_size=256,
        split="val",
    ),
}
TABLES = dict(tokenizer=TOKENIZER, pretrain=PRETRAIN, finetune=FINETUNE, probe=PROBE)


@pytest.mark.parametrize(
    "command, name", [(c, n) for c, presets in RECIPES.items() for n in presets]
)
def test_every_field_of_every_preset(command, name):
    recipe = asdict(RECIPES[command][name][1])
    wanted = TABLES[command][name]
    assert {
        k: (v, wanted.get(k, "no source"))
        for k, v in recipe.items()
        if wanted.get(k, "no source") != v
    } == {}
    assert recipe == wanted
    check_recipe(RECIPES[command][name][1])


def test_every_preset_has_a_table():
    assert {c: set(p) for c, p in RECIPES.items()} == {c: set(p) for c, p in TABLES.items()}


def test_rows_of_table_12_that_are_no_fields(tmp_path):
    "Adam's epsilon 1e-8 and first beta 0.9, the cosine, no dropout."
    r = replace(RECIPES["pretrain"]["nano"][1], precision="fp32")
    adam = Trainer("pretrain", r, tmp_path, model := build_mim(r), 100, 10, quiet=True).optimizer
    assert all(g["eps"] == 1e-8 and g["betas"] == (0.9, r.beta2) for g in adam.param_groups)
    lr = cosine_schedule(1.5e-3, 1e-5, 800, 625, warmup_epochs=10)
    assert (
        len(lr) == 500_000
        and lr[0] == 0
        and lr.argmax() in (6249, 6250)
        and math.isclose(lr.max(), 1.5e-3)
    )
    quarter = lr[6250 + (500_000 - 6250) // 4]
    assert math.isclose(
        quarter, 1e-5 + (1.5e-3 - 1e-5) * (1 + math.cos(math.pi / 4)) / 2, rel_tol=1e-4
    )
    classifier = build_classifier(RECIPES["finetune"]["nano"][1], 10)
    assert [
        m for net in (model, classifier) for m in net.modules() if isinstance(m, nn.Dropout) and m.p
    ] == []


def test_every_number_has_its_limits():
    kinds = (int, float, int | None, float | None, tuple[float, float] | None)
    assert {
        f.name
        for cls in (TokenizerRecipe, PretrainRecipe, FinetuneRecipe, ProbeRecipe)
        for f in fields(cls)
        if f.type in kinds
    } == set(ALLOWED)


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
)
NANOS = {command: presets["nano"][1] for command, presets in RECIPES.items()}


@pytest.mark.parametrize("command", NANOS)
def test_a_wrong_number_is_refused_in_one_line_that_names_it(command):
    for field, values in WRONG.items():
        for value in values if field in asdict(NANOS[command]) else ():
            with pytest.raises(
                ValueError, match=rf"(^|; |_mask_patches \d+ is below ){field} .*[a-z]"
            ) as e:
                check_recipe(replace(NANOS[command], **{field: value}))
            assert str(value) in str(e.value) and "\n" not in str(e.value)


def test_what_is_unusual_but_sound_passes():
    for changes in (
        dict(clip_grad=0),
        dict(clip_grad=None),
        dict(weight_decay=0),
        dict(min_lr=0),
        dict(lr=1e-4, min_lr=1e-4),
        dict(drop_path_rate=0),
        dict(init_values=0),
        dict(beta2=0),
        dict(flip=1),
        dict(crop_scale=(1, 1)),
        dict(crop_scale=None),
        dict(color_jitter=2),
        dict(warmup_steps=0),
        dict(warmup_epochs=0.5),
        dict(seed=2**32 - 1),
        dict(masking="random", num_mask_patches=1),
        dict(num_mask_patches=64),
        dict(min_aspect=1),
        dict(watch_every=None),
    ):
        check_recipe(replace(NANOS["pretrain"], **changes))
    check_recipe(replace(NANOS["finetune"], layer_decay=0))
    check_recipe(replace(NANOS["finetune"], layer_decay=None, label_smoothing=0))
    check_recipe(Run())


def test_all_faults_in_one_line():
    with pytest.raises(ValueError) as e:
        check_recipe(replace(NANOS["pretrain"], clip_grad=-1.0, flip=2.0, log_every=0))
    assert sorted(fault.split()[0] for fault in str(e.value).split("; ")) == [
        "clip_grad",
        "flip",
        "log_every",
    ]


@pytest.mark.parametrize("command", ["tokenizer", "pretrain", "finetune"])
def test_every_training_asks_first(command, tmp_path):
    "Exit status 2, one line, and no folder is left: at the command line, before any data is read."
    for words in (
        "--clip-grad -1",
        "--weight-decay nan",
        "--lr inf",
        "--min-lr 1",
        "--beta2 1.5",
        "--warmup-steps -5",
        "--seed -1",
        "--flip 2",
        "--crop-scale 0.5 2.0",
        *(() if command == "tokenizer" else ("--drop-path-rate 1",)),
    ):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            status = main(
                [
                    command,
                    "nano",
                    *words.split(),
                    "--data",
                    str(tmp_path / "nowhere"),
                    "--out",
                    str(tmp_path / "run"),
                ]
            )
        field = words.split()[0][2:].replace("-", "_")
        assert (
            status == 2
            and len(said.getvalue().splitlines()) == 1
            and said.getvalue().startswith(f"beit: error: {field} ")
        ), (words, said.getvalue())
        assert not (tmp_path / "run").exists()
