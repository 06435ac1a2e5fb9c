"What the recipes of fine-tuning, probes and segmentation refuse, and what they let pass."

from dataclasses import fields, replace

import pytest
from helpers_recipes import refusal

from beit_nb.configs import Backbone, Recipe, Run, check_recipe
from beit_nb.limits import limit_of
from beit_nb.recipes import COMMANDS
from beit_nb.task_configs import FinetuneRecipe, LinearRecipe, ProbeRecipe, SegmentRecipe

CLASSES = (FinetuneRecipe, ProbeRecipe, LinearRecipe, SegmentRecipe)
NANO = COMMANDS["finetune"].presets["nano"][1]


@pytest.mark.parametrize("recipe_class", CLASSES)
def test_the_defaults_pass(recipe_class):
    check_recipe(recipe_class())


@pytest.mark.parametrize("recipe_class", [FinetuneRecipe, ProbeRecipe])
def test_every_number_has_its_limits(recipe_class):
    for field in fields(recipe_class):
        if field.type not in (str, bool):
            assert limit_of(field.type), f"{recipe_class.__name__}.{field.name}"


def test_what_trains_and_what_brings_a_network():
    "A probe of logistic regressions has no learning rate; a probe takes its network as it is."
    assert [issubclass(c, Run) for c in CLASSES] == [True, False, True, True]
    assert [issubclass(c, Backbone) for c in CLASSES] == [True, False, False, True]
    assert all(issubclass(c, Recipe) for c in CLASSES)


@pytest.mark.parametrize("recipe_class", CLASSES)
def test_choices_are_made_on_val(recipe_class):
    assert recipe_class().split == "val"
    assert "split 'train' must be one of val, test" in refusal(recipe_class(split="train"))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(embed_dim=6, num_heads=3), "embed_dim 6 is not divisible by the 4 waves"),
        (dict(mixup=0.8, batch_size=31), "mixup and cutmix pair pictures"),
        (dict(cutmix=0.8, device_batch_size=1), "mixup and cutmix pair pictures"),
        (dict(ema=0.9, parallel="fsdp"), "ema keeps a whole copy"),
        (dict(in_chans=5, augment="rand-m9-mstd0.5-inc1"), "made for three colors: with in_chans"),
        (dict(min_lr=1.0), "min_lr 1.0 is above lr"),
    ],
)
def test_fine_tunings_that_cannot_work(changes, words):
    assert words in refusal(replace(NANO, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        dict(layer_decay=0),
        dict(layer_decay=None, label_smoothing=0),
        dict(batch_size=31),
        dict(in_chans=5, augment="none"),
        dict(in_chans=1, augment="rand-m9-mstd0.5-inc1"),
    ],
)
def test_what_is_unusual_but_sound_passes(changes):
    check_recipe(replace(NANO, **changes))


def test_a_line_is_small():
    assert refusal(LinearRecipe(parallel="fsdp")) == "a line is small: set parallel ddp"


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(out_indices=(0, 1, 2, 3)), "must end with the last block, 11"),
        (dict(out_indices=(3, 5, 11, 7)), "in their order"),
        (dict(stride=600), "leaves gaps"),
        (dict(scale=(512, 2048)), "the longer first"),
        (dict(ratio_range=(2.0, 0.5)), "the smaller first"),
        (dict(head="psp"), "one of setr_pup, upernet, linear"),
        (dict(norm="layer"), "one of batch, group"),
        (dict(img_size=500), "500 is not divisible"),
    ],
)
def test_segmentations_that_cannot_work(changes, words):
    assert words in refusal(SegmentRecipe(**changes))


def test_windows_may_touch_and_the_rate_falls_as_it_is_asked_for():
    check_recipe(SegmentRecipe(stride=512))
    assert SegmentRecipe().decay(100) == ("linear", 100)
    assert SegmentRecipe(schedule="cosine").decay(100) == ("cosine", 100)
