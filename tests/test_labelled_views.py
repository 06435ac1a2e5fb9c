"What a classifier is shown, and its loss: official settings, odd pictures, faults that are named."

import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torch import nn
from torch.testing import assert_close
from torchvision.transforms.v2 import functional as TF

from beit_nb import BeitError
from beit_nb.configs import check_recipe
from beit_nb.engine.augment import seeded
from beit_nb.engine.loading import LabelledBatch
from beit_nb.images import MEAN_STD, preprocess
from beit_nb.labelled_views import (
    FinetuneLoss,
    FinetuneTransform,
    ScoredTransform,
    ScoredView,
    scored_view,
    timm_transform,
)
from beit_nb.recipes import recipe_named
from beit_nb.task_configs import FinetuneRecipe


def test_an_unknown_policy_is_named_in_one_line():
    with pytest.raises(BeitError, match="'wild'") as e:
        timm_transform(FinetuneRecipe(augment="wild"))
    assert "\n" not in str(e.value)


def test_erasing_and_filling_are_official():
    "Noise has the spread of normalised pixels, and rotations fill with the mean colour."
    r = recipe_named(
        "finetune", "base-in1k", augment="none", erasing=1.0, crop_scale=None, flip=0.0
    )
    # ImageNet's mean: 0 once normalised
    grey = Image.new("RGB", (224, 224), (124, 116, 104))
    x = timm_transform(r)(grey)
    noise = x[x.abs() > 0.02]
    assert 0.02 < len(noise) / x.numel() < 0.4 and abs(noise.std() - 1) < 0.1
    turned = timm_transform(replace(r, erasing=0.0, augment="rand-m9-n8-mstd0.5-inc1"))
    fill = (
        next(t for t in turned.transforms if type(t).__name__ == "RandAugment")
        .ops[0]
        .hparams["img_mean"]
    )
    assert fill == (124, 116, 104)


@pytest.mark.parametrize("size", [(1, 65_000), (65_000, 1), (3, 20_000)])
@pytest.mark.parametrize("augment", ["none", "rand-m9-mstd0.5-inc1", "shift"])
def test_an_endless_picture_takes_no_memory(size, augment):
    "1 x 65,000 pixels, resized before they are cropped, would be 256 x 16,640,000: 17 GB."
    r = FinetuneRecipe(img_size=224, augment=augment, erasing=0.0)
    picture = torch.full((3, *size), 77, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    squash = ScoredTransform(ScoredView(224, crop_mode="squash"), [0])
    for see in (FinetuneTransform(r, [0]), ScoredTransform(scored_view(r), [0]), squash):
        for source in (picture, TF.to_pil_image(picture)):  # both roads
            assert see(source, 0, np.random.default_rng(0)).image.shape == (3, 224, 224)

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


@pytest.mark.parametrize("augment", ["none", "shift"])
def test_both_roads_score_an_endless_picture_alike(augment):
    view = scored_view(FinetuneRecipe(img_size=32, augment=augment))
    picture = torch.zeros(3, 4, 2000, dtype=torch.uint8)
    picture[:, :, 990:1010] = 200  # the middle, which is all that counts

    images = [view(p) for p in (picture, TF.to_pil_image(picture))]

    assert torch.equal(*images)
    assert images[0].float().amin() > 0.7 * images[0].float().amax() > 0


@pytest.mark.parametrize("size", [(10, 200), (37, 23), (32, 32), (500, 333)])
@pytest.mark.parametrize("crop_pct", [224 / 256, 1.0, 0.9, 0.55])
@pytest.mark.parametrize("crop_mode, how", [("center", "bicubic"), ("squash", "bilinear")])
def test_a_usual_picture_is_scored_as_timm_does(size, crop_pct, crop_mode, how):
    "Up to 20 : 1 the pipeline gets the whole picture, as it was."
    picture = torch.randint(256, (3, *size), dtype=torch.uint8)

    seen = ScoredView(32, crop_pct, crop_mode, how)(picture)

    mean, std = MEAN_STD["imagenet"]
    options = dict(crop_pct=crop_pct, crop_mode=crop_mode, interpolation=how, mean=mean, std=std)
    want = create_transform(32, **options)(TF.to_pil_image(picture))
    assert seen.dtype == torch.uint8
    assert torch.equal(preprocess(seen, "imagenet"), want)


def test_pictures_that_are_only_shifted_are_scored_whole():
    assert scored_view(FinetuneRecipe(img_size=32, augment="shift")) == (
        32,
        1.0,
        "center",
        "bicubic",
    )
    assert scored_view(FinetuneRecipe(img_size=224)).edge == 256  # official: below 384
    assert scored_view(FinetuneRecipe(img_size=384)).edge == 384


def test_shifted_pictures_are_mirrored_and_cropped_too():
    rng = np.random.default_rng(0)
    half = torch.zeros(3, 32, 32, dtype=torch.uint8)
    half[:, :, 16:] = 200  # bright at the right
    r = FinetuneRecipe(img_size=32, augment="shift", erasing=0.0, crop_scale=None)

    mirrored = FinetuneTransform(replace(r, flip=1.0), [0])(half, 0, rng).image.float()
    still = FinetuneTransform(replace(r, flip=0.0), [0])(half, 0, rng).image.float()
    piece = FinetuneTransform(replace(r, crop_scale=(0.05, 0.06)), [0])(half, 0, rng).image

    assert mirrored[:, 4:-4, 4:14].mean() == 200 == still[:, 4:-4, 18:28].mean()
    assert piece[0, 3:-3, 3:-3].unique().numel() < still.unique().numel() + 32  # a few columns
    with pytest.raises(BeitError, match="'shift' erases nothing: set --erasing 0"):
        FinetuneTransform(replace(r, erasing=0.25), [0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothed_labels_by_hand(smoothing):
    r = FinetuneRecipe(label_smoothing=smoothing, mixup=0.0, cutmix=0.0, mean_std="beit")
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5))
    images = torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8)
    labels = torch.arange(6) % 5

    loss, _ = FinetuneLoss(r, 5, 6)(model, LabelledBatch(images, labels, labels), 0)

    targets = (1 - smoothing) * F.one_hot(labels, 5) + smoothing / 5
    want = F.cross_entropy(model(preprocess(images, "beit")), targets)
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("share", [dict(mixup=0.8), dict(cutmix=1.0)])
def test_pictures_that_cannot_be_paired_are_refused(share):
    r = replace(FinetuneRecipe(mixup=0.0, cutmix=0.0), **share)
    FinetuneLoss(r, 5, 6)
    with pytest.raises(BeitError, match="takes 5 at once, which is odd"):
        FinetuneLoss(r, 5, 5)


@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_bands_are_scored_as_torchvision_resizes_floats(crop_pct):
    bands = torch.rand(5, 90, 60)

    seen = ScoredView(32, crop_pct)(bands)

    edge = int(32 / crop_pct)
    small = F.interpolate(
        bands[None], (edge * 90 // 60, edge), mode="bicubic", antialias=True, align_corners=False
    )[0]
    assert_close(seen, TF.center_crop(small, [32, 32]), atol=1e-6, rtol=0)


def test_bands_are_cropped_mirrored_and_erased():
    r = FinetuneRecipe(img_size=16, augment="none", in_chans=5, mean_std="beit", erasing=0.5)
    changed = FinetuneTransform(r, np.array([1]))
    gray = torch.full((5, 20, 20), 0.5)  # nothing but noise changes it
    rng = np.random.default_rng(0)

    with seeded(0):
        seen = torch.stack([changed(gray, 0, rng).image for _ in range(200)])

    holes = ((seen - 0.5).abs() > 1e-3).all(1)  # (200, 16, 16): noise in every band
    assert abs(holes.flatten(1).any(1).float().mean() - 0.5) < 0.15  # four standard errors
    noise = 2 * seen.permute(0, 2, 3, 1)[holes] - 1
    assert abs(noise.std() - 1) < 0.05


def test_what_is_made_for_colors_is_refused_for_bands():
    r = FinetuneRecipe(in_chans=5)

    with pytest.raises(BeitError, match="augment rand-m9.*set augment none"):
        check_recipe(r)
    check_recipe(replace(r, augment="none"))  # mean and std are measured, whatever mean_std says
