"""Every field of every preset beside its source.

Sources: [12], [13] the paper's tables (arXiv 2106.08254v2); [code] microsoft/unilm beit/:
run_beit_pretraining.py, run_class_finetuning.py, datasets.py, masking_generator.py; [README] its
commands; [DALL-E] arXiv 2102.12092, App. A.2; [DeiT] arXiv 2012.12877 and facebookresearch/deit;
[ours] our choice: a size of our own, or a need of tiny networks (lesson `presets`).
"""

import math
from dataclasses import asdict

import pytest
from torch import nn

from beit_nb.classifier_files import BODY_FIELDS, build_classifier
from beit_nb.configs import check_recipe
from beit_nb.engine.optim import cosine_schedule
from beit_nb.engine.training import Trainer
from beit_nb.pretraining import build_mim
from beit_nb.recipes import COMMANDS, recipe_named

# fmt: off
# What no source rules: how and where the work is done, the same in all presets [ours]
ENGINE = dict(
    out="", resume=True, seed=0, steps=None, device_batch_size=None, precision="auto",
    compile=False, parallel="ddp", grad_checkpointing=False, max_steps=None,
    checkpoint_every=1000, keep_checkpoints=2, milestone_every=None, log_every=20,
    workers=0, max_damaged=0.01, tensorboard=False, dry_run=False,
)

# The bodies
VIT = dict(
    img_size=224, patch_size=16,  # [12]: input 224, patch 16
    mlp_ratio=4.0,                # [12]: FFN 3072 over 768, 4096 over 1024
    drop_path_rate=0.1,           # [12], [13]: stochastic depth
)
VANILLA = dict(  # the paper's text; [README]'s three flags
    init_values=None, use_abs_pos_emb=True, use_rel_pos_bias=False, use_shared_rel_pos_bias=False)
BASE = dict(VIT, embed_dim=768, depth=12, num_heads=12, **VANILLA)  # [12]
LARGE = dict(VIT, embed_dim=1024, depth=24, num_heads=16, **VANILLA)  # [12]
VIT_SMALL = BASE | dict(embed_dim=384, num_heads=6)  # DeiT-S: [DeiT], Table 1
VIT_TINY = BASE | dict(embed_dim=192, num_heads=3)  # DeiT-Ti
PLUS = dict(  # [code]'s defaults
    init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
TINY = dict(  # [ours]: CIFAR's 32 pixels; DeiT-Ti's body
    VIT, img_size=32, patch_size=4, embed_dim=192, depth=12, num_heads=3, **VANILLA)
NANO = dict(  # [ours]
    VIT, img_size=32, patch_size=4, embed_dim=128, depth=4, num_heads=4, drop_path_rate=0.0,
    **VANILLA)
AIDS = dict(  # [ours]: without them a tiny network learns nothing
    weight_init="xavier", pos_embed_init="sincos")

# Pre-training
PAPER = dict(
    ENGINE, data="imagenet",
    epochs=800,                                             # Tables 1, 4; [README]
    batch_size=2048, lr=1.5e-3,                             # [12]; [README]: 128 x 16 GPUs
    min_lr=1e-5, warmup_epochs=10, warmup_steps=None,       # [12]
    weight_decay=0.05, beta2=0.999,                         # [12]
    clip_grad=3.0,                                          # [12]; 1.0 for large
    tokenizer="", vocab_size=8192, token_size=112,          # 3.1: DALL-E's words; [code]
    masking="blockwise", targets="tokens", recover="masked",
    num_mask_patches=75,                                    # [README]: --num_mask_patches 75
    min_mask_patches_per_block=16, max_mask_patches_per_block=None,  # Algorithm 1; [code]
    min_aspect=0.3, exact_mask=False,                       # Algorithm 1; exact is BEiT-2
    crop_scale=(0.08, 1.0), color_jitter=0.4, flip=0.5,     # [code]: its defaults
    mean_std="imagenet",                                    # [README]: a flag, for 1K only
    weight_init="beit", pos_embed_init="normal",            # [code]: truncated normal .02
    watch_every=5000,                                       # [ours]: a hundred looks
    loss_mean="global",                                     # [ours]: `process` would be [code]
    tokens="", jitter_on="loader", init="", online_knn=0,
)
IN22K = dict(  # [README]: --warmup_steps 10000 --epochs 150, no flag: [code]'s 0.5
    data="imagenet22k", epochs=150, warmup_epochs=0, warmup_steps=10_000, mean_std="beit")
ROW = PAPER | BASE | dict(epochs=300)  # Tables 4, 5 and 8: 300 epochs (3.3)
OURS = dict(PAPER, beta2=0.98, token_size=32, min_mask_patches_per_block=4, **AIDS)  # [ours]
PRETRAIN = {
    "small-in1k": PAPER | VIT_SMALL | dict(epochs=300),  # [ours]: base's numbers
    "tiny-in1k": PAPER | VIT_TINY | dict(epochs=300),  # [ours]
    "base-in1k": PAPER | BASE,
    "large-in1k": PAPER | LARGE | dict(clip_grad=1.0),  # [12]
    "base-plus-in1k": PAPER | BASE | PLUS | dict(epochs=300),  # Table 5
    "base-in1k-300": ROW,
    "base-in1k-random": ROW | dict(masking="random"),
    "base-in1k-pixels": ROW | dict(targets="pixels"),
    "base-in1k-pixels-norm": ROW | dict(targets="pixels_norm"),  # [ours]: MAE's kind
    "base-in1k-pixels-random": ROW | dict(targets="pixels", masking="random"),
    "base-in1k-recover": ROW | dict(recover="all"),
    "base-in1k-unmasked": ROW | dict(recover="all", masking="none"),
    "base-layerscale-in1k": ROW | dict(init_values=0.1),  # Table 5; [README]: 0.1
    "base-in1k-own-tokens": ROW | dict(tokenizer="runs/tokenizer-imagenet"),  # Table 8
    "base-plus-in22k": PAPER | BASE | PLUS | IN22K,
    "large-plus-in22k":  # [12]; [README]: --layer_scale_init_value 1e-5
        PAPER | LARGE | PLUS | IN22K | dict(clip_grad=1.0, init_values=1e-5),
    "nano": OURS | NANO | dict(  # [ours]: lessons `pretraining` and `demo` measure it
        data="digits", epochs=10, batch_size=64, min_lr=1.5e-5, warmup_epochs=0, warmup_steps=60,
        vocab_size=256, num_mask_patches=26, exact_mask=True,  # 41 % of 64
        crop_scale=None, color_jitter=0.0, flip=0.0, mean_std="beit", watch_every=250),
    "photos": OURS | NANO | dict(  # [ours]: not measured; the tokenizer `photos` and its crops
        data="photos", img_size=64, patch_size=8, epochs=10, batch_size=64, min_lr=1.5e-5,
        warmup_epochs=0, warmup_steps=60, vocab_size=512, token_size=64,
        num_mask_patches=25, crop_scale=(0.02, 0.3), mean_std="beit", watch_every=200),
    "cifar": OURS | TINY | dict(  # [ours]: not measured
        data="cifar100", epochs=300, batch_size=512, vocab_size=1024,
        num_mask_patches=25, crop_scale=(0.35, 1.0), watch_every=None),  # 39 % of 64
}

# Fine-tuning
TABLE_13 = dict(
    ENGINE, data="imagenet", epochs=100, warmup_epochs=20, warmup_steps=None,
    batch_size=1024, lr=4e-3, min_lr=1e-6,              # [13], lr out of its sweep; [README]
    weight_decay=0.05, beta2=0.999, clip_grad=None,     # [13]
    layer_decay=0.65, label_smoothing=0.1,              # [13]
    mixup=0.8, cutmix=1.0, erasing=0.25,                # [13]
    augment="rand-m9-mstd0.5-inc1",                     # [13]: RandAugment 9 / 0.5
    crop_scale=(0.08, 1.0), flip=0.5,                   # [code]: timm's create_transform
    mean_std="imagenet",                                # as in the pre-training
    repeated_aug=1,                                     # unilm#554: not used, whatever [13] ticks
    ema=0.0, crop_pct=None, in_chans=3,                 # [code]: no EMA; 256 / 224; RGB
    use_mean_pooling=True, init_scale=0.001,            # 2.6; [README]: --init_scale 0.001
    weight_init="beit", pos_embed_init="normal",
    init="", labels_per_class=None, eval_every=None, split="val",  # [ours]
)
AGAIN = dict(  # [README], after ImageNet-22K, at 384
    batch_size=512, lr=2e-5, weight_decay=1e-8, mixup=0.0, cutmix=0.0)
HIGH = AGAIN | dict(  # 3.1: 10 more epochs at 384; the rest is AGAIN's
    img_size=384, epochs=10, warmup_epochs=1)  # [ours]: its 5 of 30 epochs, in 10
CIFAR_100 = dict(  # [13], lr out of its sweep
    data="cifar100", epochs=150, batch_size=512, lr=3e-3, weight_decay=0.3, erasing=0.0)
FIFTY = dict(epochs=50, warmup_epochs=5, layer_decay=0.75)  # [13] for large
RELEASED = dict(  # [code]: fine-tuning has a table a block; 22K is normalised by 0.5
    init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True, mean_std="beit")
BASE_22K = TABLE_13 | BASE | RELEASED
LARGE_22K = TABLE_13 | LARGE | RELEASED | FIFTY | dict(  # [README]
    init_values=1e-5, drop_path_rate=0.2)
LABELS_22K = dict(  # [README]: ImageNet-22K with its labels
    data="imagenet22k", epochs=90, warmup_epochs=5, drop_path_rate=0.2, mixup=0.0, cutmix=0.0)
BASE_THEN = BASE_22K | AGAIN | dict(  # [README]
    epochs=30, warmup_epochs=5, layer_decay=0.85, init="runs/finetune-base-plus-in22k")
LARGE_THEN = LARGE_22K | AGAIN | dict(  # [README]
    epochs=30, warmup_epochs=5, layer_decay=0.9, drop_path_rate=0.4,
    init="runs/finetune-large-plus-in22k")
FINETUNE = {
    "base-in1k": TABLE_13 | BASE,
    "large-in1k": TABLE_13 | LARGE | FIFTY | dict(lr=2e-3),  # [13], lr out of its sweep
    "base-in1k-384": TABLE_13 | BASE | HIGH | dict(
        layer_decay=0.85, init="runs/finetune-base-in1k"),
    "large-in1k-384": TABLE_13 | LARGE | HIGH | dict(
        layer_decay=0.9, drop_path_rate=0.4, init="runs/finetune-large-in1k"),
    "base-cifar100": TABLE_13 | BASE | CIFAR_100,
    "base-in1k-cifar100": TABLE_13 | BASE | CIFAR_100 | dict(  # Table 11, last row
        init="runs/finetune-base-in1k"),
    "small-in1k": TABLE_13 | VIT_SMALL,  # [ours]: base's numbers
    "tiny-in1k": TABLE_13 | VIT_TINY,  # [ours]
    "base-scratch": TABLE_13 | BASE | dict(
        epochs=300, batch_size=1024, warmup_epochs=5, repeated_aug=3,  # [DeiT], Table 9
        lr=1e-3, min_lr=1e-5,                          # its main.py: 5e-4 * batch / 512, --min-lr
        layer_decay=None, use_mean_pooling=False, init_scale=1.0),  # a class token, as [DeiT]
    "base-plus-in1k": BASE_22K,  # [README]: as Table 13
    "large-plus-in1k": LARGE_22K | dict(lr=1e-3),  # [README]
    "base-plus-in22k": BASE_22K | LABELS_22K | dict(  # [README]
        batch_size=4096, lr=3e-3, clip_grad=3.0),
    "large-plus-in22k": LARGE_22K | LABELS_22K | dict(  # [README]
        batch_size=2048, lr=2e-3, clip_grad=1.0),
    "base-plus-in22k-in1k": BASE_THEN,  # [ours]: nothing was published for 224 and 512
    "base-plus-in22k-in1k-384": BASE_THEN | dict(img_size=384),
    "large-plus-in22k-in1k": LARGE_THEN,
    "large-plus-in22k-in1k-384": LARGE_THEN | dict(img_size=384),
    "large-plus-in22k-in1k-512": LARGE_THEN | dict(img_size=512),
    "nano": TABLE_13 | NANO | AIDS | dict(  # [ours]: lessons `finetuning` and `demo` measure it
        data="digits", labels_per_class=20, epochs=1, steps=200, batch_size=32, eval_every=40,
        lr=2e-3, min_lr=1e-5, warmup_epochs=0, warmup_steps=20, clip_grad=3.0, layer_decay=0.75,
        drop_path_rate=0.1, mixup=0.0, cutmix=0.0, augment="shift", erasing=0.0, crop_scale=None,
        flip=0.0, mean_std="beit"),
    "photos": TABLE_13 | NANO | AIDS | dict(  # [ours]: not measured, after `photos`
        data="photos", img_size=64, patch_size=8, epochs=1, steps=300, batch_size=32, eval_every=50,
        lr=2e-3, min_lr=1e-5, warmup_epochs=0, warmup_steps=30, clip_grad=3.0, layer_decay=0.75,
        drop_path_rate=0.1, mixup=0.0, cutmix=0.0, augment="none", erasing=0.0,
        crop_scale=(0.35, 1.0), mean_std="beit"),
    "cifar": TABLE_13 | TINY | AIDS | dict(  # [ours]: not measured
        data="cifar100", batch_size=512, lr=2e-3, warmup_epochs=10, crop_scale=(0.35, 1.0)),
}

# Tokenizers: the paper took DALL-E's, so but for that one all is [ours]
SMALL = dict(
    ENGINE, data="digits", img_size=32, arch="small", quantizer="gumbel",
    downsample=4, vocab_size=256, code_dim=32,
    width=64, logits="distance", likelihood="normal", epochs=2, batch_size=32, lr=2e-3, min_lr=0.0,
    warmup_epochs=0, warmup_steps=20, lr_steps=None, weight_decay=1e-4, beta2=0.99, clip_grad=1.0,
    kl_weight=0.0, kl_steps=5000, usage_weight=0.05, tau_start=1.0, tau_end=1 / 16, tau_share=0.8,
    tau_steps=None, ema=0.0, crop_scale=None, flip=0.0,
)
GPU = SMALL | dict(epochs=30, lr=1e-3, min_lr=1e-5, warmup_epochs=1, warmup_steps=None, flip=0.5)
TOKENIZER = {
    "nano": SMALL,
    "photos": SMALL | dict(
        data="photos", img_size=64, downsample=8, vocab_size=512, width=128, epochs=4,
        crop_scale=(0.02, 0.3), flip=0.5),
    "cifar": GPU | dict(
        data="cifar100", batch_size=256, vocab_size=1024, width=256, beta2=0.999,
        crop_scale=(0.5, 1.0)),
    "imagenet": GPU | dict(
        data="imagenet", img_size=112, downsample=8, vocab_size=8192, width=512, batch_size=1024,
        ema=0.999, crop_scale=(0.08, 1.0)),
    "dalle": SMALL | dict(
        # [ours]: its pictures and loop are not public
        data="imagenet", epochs=1, warmup_steps=None, clip_grad=None, usage_weight=0.0,
        # [DALL-E]; openai/DALL-E
        arch="dalle", img_size=256, downsample=8, vocab_size=8192, code_dim=128, width=256,
        logits="linear", likelihood="laplace",
        # [DALL-E]
        steps=3_000_000, batch_size=512, lr=1e-4, min_lr=1.25e-6, lr_steps=1_200_000,
        weight_decay=1e-4, beta2=0.999, ema=0.999,
        # [DALL-E]; openai/DALL-E issue 8
        kl_weight=6.6, kl_steps=5000, tau_start=1.0, tau_end=1 / 16, tau_steps=150_000,
        crop_scale=(0.44, 0.79)),  # [DALL-E], Listing 1: 256 of 384 to 288 pixels
}

# Fitted, so it has no training numbers [ours]
FITTED = dict(
    data="digits", out="", init="", labels_per_class=20, draws=3, seed=0, batch_size=256, workers=0,
    split="val", knn_k=20, knn_temperature=0.07)
PROBE = {
    "nano": FITTED,
    "in1k": FITTED | dict(data="imagenet", labels_per_class=13, draws=1),
}

# Table 9 is trained: App. D
APP_D = dict(
    ENGINE, data="imagenet", init="", labels_per_class=None, pooling="mean",  # mean of the patches
    epochs=50, batch_size=1024, lr=4e-3, weight_decay=1e-4,
    min_lr=0.0, warmup_epochs=0.0, warmup_steps=None, clip_grad=None, beta2=0.999,  # [code]
    crop_scale=(0.08, 1.0), flip=0.5, eval_every=None, split="val")
LINEAR = {
    "in1k": APP_D,
    "nano": APP_D | dict(
        data="digits", epochs=6, batch_size=60, lr=3e-2, crop_scale=None, flip=0.0),  # [ours]
}

# Pixels: [14] the paper's Table 14; [seg] unilm beit/semantic_segmentation/configs; [SETR] its own
TABLE_14 = dict(
    ENGINE, data="ade20k", epochs=1,
    steps=160_000, batch_size=16, warmup_steps=1500, warmup_epochs=0.0,  # [14], [seg]
    img_size=512, min_lr=0.0, schedule="linear",                         # [14], [seg]
    weight_decay=0.05, beta2=0.999, clip_grad=None,                      # [14], [seg]
    layer_decay=0.65, drop_path_rate=0.1,                                # [14]
    auxiliary_weight=0.4, norm="batch", channels=None, out_indices=None,  # [seg], [SETR]
    scale=(2048, 512), ratio_range=(0.5, 2.0), cat_max_ratio=0.75, flip=0.5,  # [seg]
    photometric=True, mean_std="imagenet", reduce_zero_label=None,       # [seg]; the data says it
    inference="slide", stride=None,                                      # [seg]: 341 and 426
    eval_every=16_000,                                                   # [seg]
    weight_init="beit", pos_embed_init="normal",
    labelled=None, init="", split="val",                                 # [ours]
)
PUP = TABLE_14 | BASE | dict(
    head="setr_pup", lr=1e-3, img_size=512,  # [14]
    out_indices=(4, 7, 9, 11))  # [SETR], its DeiT-B: which ones BEiT read is not said
UPER = TABLE_14 | RELEASED | dict(mean_std="imagenet", head="upernet")  # [seg]
AT_640 = dict(img_size=640, scale=(2560, 640))  # [seg]
UPER_BASE = BASE | UPER | dict(lr=3e-5, layer_decay=0.9, init="runs/finetune-base-plus-in22k")
UPER_LARGE = LARGE | UPER | dict(
    lr=2e-5, layer_decay=0.95, drop_path_rate=0.2, init_values=1e-6,
    init="runs/finetune-large-plus-in22k")
SEGMENT = {
    "base-in1k-pup": PUP | dict(init="runs/pretrain-base-in1k"),  # Tables 3, 4
    "base-in1k-ft-pup": PUP | dict(init="runs/finetune-base-in1k"),  # Table 3
    "base-plus-in22k": UPER_BASE | dict(
        lr=7e-4, layer_decay=0.65, init="runs/pretrain-base-plus-in22k"),
    "base-plus-in22k-ft": UPER_BASE,
    "base-plus-in22k-ft-640": UPER_BASE | AT_640,
    "large-plus-in22k-ft": UPER_LARGE,
    "large-plus-in22k-ft-640": UPER_LARGE | AT_640,
    "nano": TABLE_14 | NANO | AIDS | dict(  # [ours]: lesson `segmenting`
        data="digits", steps=200, batch_size=32, warmup_steps=20, eval_every=50, lr=1e-2,
        clip_grad=3.0, layer_decay=0.3, head="linear", scale=(32, 32), ratio_range=None,
        cat_max_ratio=1.0, flip=0.0, photometric=False, mean_std="beit"),
}
# fmt: on
TABLES = dict(
    tokenizer=TOKENIZER,
    pretrain=PRETRAIN,
    finetune=FINETUNE,
    probe=PROBE,
    linear=LINEAR,
    segment=SEGMENT,
)


@pytest.mark.parametrize(
    "command, name", [(c, name) for c, command in COMMANDS.items() for name in command.presets]
)
def test_every_field_of_every_preset(command, name):
    recipe = COMMANDS[command].presets[name][1]
    ours = asdict(recipe)
    wanted = TABLES[command][name]

    unlike = {k: (v, wanted.get(k)) for k, v in ours.items() if wanted.get(k, "no source") != v}
    assert unlike == {}
    assert ours == wanted
    check_recipe(recipe)


def test_a_recipe_goes_on_where_one_of_its_body_ended():
    "Chains: `init` is where `beit finetune` leaves the recipe before it."
    recipes = {name: r for name, (_, r) in COMMANDS["finetune"].presets.items()}
    chains = {r.init: r for r in recipes.values() if r.init}
    for init, r in chains.items():
        before = recipes[init.removeprefix("runs/finetune-")]
        for field in BODY_FIELDS:
            assert getattr(before, field) == getattr(r, field), (init, field)
        assert before.mean_std == r.mean_std and before.use_rel_pos_bias == r.use_rel_pos_bias
    assert len(chains) == 4


def test_a_segmentation_goes_on_where_its_body_ended():
    for name, (_, r) in COMMANDS["segment"].presets.items():
        if r.init:
            command, before = r.init.removeprefix("runs/").split("-", 1)
            for field in BODY_FIELDS:
                there = getattr(COMMANDS[command].presets[before][1], field)
                assert there == getattr(r, field), (name, field)


def test_the_sentence_of_a_preset_names_its_source():
    "A table, the README, the released weights, a paper, or that it is ours."
    sources = ("Table", "README", "released", "DALL-E's own", "arXiv", "as in MAE", "ours")
    for command in ("tokenizer", "pretrain", "finetune"):
        for name, (sentence, _) in COMMANDS[command].presets.items():
            assert any(source in sentence for source in sources), (name, sentence)


def test_every_preset_has_a_table():
    presets = {name: set(command.presets) for name, command in COMMANDS.items()}
    assert presets == {name: set(table) for name, table in TABLES.items()}


def test_rows_of_table_12_that_are_no_fields(tmp_path):
    "Adam's epsilon 1e-8 and first beta 0.9, the cosine, no dropout."
    r = recipe_named("pretrain", "nano", precision="fp32")
    model = build_mim(r)
    adam = Trainer("pretrain", r, tmp_path, model, r.length(640), quiet=True).optimizer
    classifier = build_classifier(recipe_named("finetune", "nano"), 10)
    lr = cosine_schedule(1.5e-3, 1e-5, 800, 625, warmup_epochs=10)

    for group in adam.param_groups:
        assert group["eps"] == 1e-8 and group["betas"] == (0.9, r.beta2)
    assert len(lr) == 500_000 and lr[0] == 0 and lr.argmax() in (6249, 6250)
    assert math.isclose(lr.max(), 1.5e-3)
    quarter = 1e-5 + (1.5e-3 - 1e-5) * (1 + math.cos(math.pi / 4)) / 2
    assert math.isclose(lr[6250 + (500_000 - 6250) // 4], quarter, rel_tol=1e-4)
    modules = [*model.modules(), *classifier.modules()]
    assert [m for m in modules if isinstance(m, nn.Dropout) and m.p] == []
