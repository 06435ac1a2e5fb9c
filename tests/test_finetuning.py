"Fine-tuning: parity with timm, pictures of any kind, faults that are named."

import shutil
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from helpers import beit, lay_out_bands, red_and_blue, refused, save_gray, unpainted
from helpers_finetuning import PLUS, TINY, quick
from helpers_models import SIZE, shaken
from PIL import Image

from beit_nb import BeitError
from beit_nb.checkpoints import load_weights, save_official
from beit_nb.classifier import BeitForImageClassification
from beit_nb.classifier_files import build_classifier, build_from_checkpoint, load_classifier
from beit_nb.converting import convert
from beit_nb.data import open_data
from beit_nb.engine.log import read_log, read_metrics
from beit_nb.engine.runs import load_checkpoint
from beit_nb.engine.sources import ImageFolder
from beit_nb.evaluation import evaluate
from beit_nb.finetuning import evaluate_classifier, finetune, mean_std_of_run
from beit_nb.labelled_views import FinetuneTransform, scored_view
from beit_nb.mim import BeitForMaskedImageModeling
from beit_nb.probing import all_features, raw_pixels
from beit_nb.recipes import recipe_named
from beit_nb.task_configs import FinetuneRecipe

pytestmark = pytest.mark.usefixtures("pages_unpainted")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return red_and_blue(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize(
    "form",
    [
        PLUS,
        {},
        dict(use_rel_pos_bias=True),
        dict(use_mean_pooling=False),
        PLUS | dict(use_mean_pooling=False),
    ],
)
def test_timm_logits_and_gradients(form):
    from timm.models.beit import Beit

    ours = shaken(BeitForImageClassification(10, **SIZE, **form)).eval()
    pool = "avg" if form.get("use_mean_pooling", True) else "token"
    theirs = Beit(
        num_classes=10,
        global_pool=pool,
        **SIZE,
        **dict(use_abs_pos_emb=True) | {k: v for k, v in form.items() if k != "use_mean_pooling"},
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    for model in (ours, theirs):
        F.cross_entropy(model(x), torch.arange(3)).backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(
            p.grad, theirs.get_parameter(name).grad, atol=1e-6, rtol=1e-4, msg=name
        )


@pytest.mark.parametrize(
    "augment, extra",
    [
        ("shift", {"erasing": 0.0}),
        ("none", {}),
        ("rand-m9-mstd0.5-inc1", dict(mixup=0.8, cutmix=1.0, erasing=0.5)),
    ],
)
def test_finetune_on_a_folder_of_photographs(folder, tmp_path, augment, extra):
    r = FinetuneRecipe(
        **TINY
        | dict(data=str(folder), out=str(tmp_path / "run"), augment=augment, mixup=0.0, cutmix=0.0)
        | extra
    )
    m = finetune(r, quiet=True)
    assert m["steps"] == 2 and m["split"] == "val" and 0 <= m["accuracy"] <= 1
    model, again, classes = load_classifier(tmp_path / "run")
    assert classes == ["blue", "red"] and again == r
    larger = FinetuneTransform(replace(r, img_size=48), [1])(
        Image.new("L", (9, 50)).convert("RGB"), 0, np.random.default_rng(0)
    )
    assert larger.image.shape == (3, 48, 48)
    next_run = build_from_checkpoint(replace(r, init=str(tmp_path / "run"), img_size=24), 5)
    assert next_run.pos_embed.shape == (1, 37, 32) and next_run.head.out_features == 5


def test_classes_are_numbered_as_in_train(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "val" / "blue")
    r = FinetuneRecipe(
        **TINY
        | dict(
            data=str(tmp_path / "data"),
            out=str(tmp_path / "run"),
            augment="none",
            mixup=0.0,
            cutmix=0.0,
            crop_scale=None,
            steps=40,
            lr=3e-3,
            layer_decay=None,
        )
    )
    # red is class 1, although val knows no other
    assert finetune(r, quiet=True)["accuracy"] == 1
    (tmp_path / "data" / "val" / "red").rename(tmp_path / "data" / "val" / "green")
    with pytest.raises(BeitError, match="green"):
        finetune(replace(r, out=str(tmp_path / "other")), quiet=True)


def test_evaluation_passes_over_damage(tmp_path, capfd):
    "An empty file in val/ stops neither a score nor a probe; it is named once and left out."
    for c, name in enumerate("ab"):
        for i in range(5):
            save_gray(tmp_path / "val" / name / f"{i}.png", 100 * c + 5 * i, (32, 32))
    bad = tmp_path / "val" / "a" / "4.png"
    bad.write_bytes(b"")
    r = recipe_named("finetune", "nano", depth=1, precision="fp32")
    pictures = ImageFolder(tmp_path / "val", labels=True)
    model = build_classifier(r, 2)

    scores = [evaluate_classifier(model, r, pictures, batch_size=3) for _ in range(2)]

    bad.unlink()
    without = evaluate_classifier(model, r, ImageFolder(tmp_path / "val", labels=True))
    assert scores[0] == scores[1] and scores[0].pop("val_damaged") == 1
    assert scores[0] == pytest.approx(without)
    lines = capfd.readouterr().err.splitlines()
    assert sum("passed over" in line and "a/4.png" in line for line in lines) == 1


def test_features_of_a_damaged_picture_are_its_neighbors(tmp_path):
    for i in range(5):
        save_gray(tmp_path / "val" / "a" / f"{i}.png", 20 * i, (32, 32))
    (tmp_path / "val" / "a" / "3.png").write_bytes(b"")
    pictures = ImageFolder(tmp_path / "val", labels=True)
    features, seen = all_features({"pixels": raw_pixels}, pictures, 32, batch_size=4)
    assert seen.tolist() == [0, 1, 2, 4, 4]  # the label that goes with it is the neighbor's too
    assert np.allclose(features["pixels"][0, 3], 80 / 255)


def test_a_running_mean_goes_on_bit_for_bit(folder, tmp_path):
    "Stopped in the middle of an epoch of repeated pictures, it ends with the same of everything."
    changes = dict(steps=6, batch_size=4, repeated_aug=3, ema=0.9, crop_scale=(0.3, 1.0))
    whole = finetune(quick(folder, tmp_path / "whole", **changes), quiet=True)
    part = quick(folder, tmp_path / "part", **changes)

    finetune(replace(part, max_steps=3), quiet=True)
    again = finetune(part, quiet=True)

    a, b = (load_checkpoint(tmp_path / run, "finetune") for run in ("whole", "part"))
    for kind in ("model", "ema"):
        assert a[kind].keys() == b[kind].keys()
        assert all(torch.equal(x, b[kind][name]) for name, x in a[kind].items())
    assert not torch.equal(a["ema"]["module.head.weight"], a["model"]["head.weight"])
    assert again["ema_accuracy"] == whole["ema_accuracy"] and again["curve"] == whole["curve"]


def test_the_running_mean_is_scored_beside_the_weights(folder, tmp_path):
    r = quick(folder, tmp_path / "run", ema=0.9, lr=0.05, layer_decay=None)
    metrics = finetune(r, quiet=True)
    state = load_checkpoint(tmp_path / "run", "finetune")
    weights = {k.removeprefix("module."): v for k, v in state["ema"].items() if k != "n_averaged"}
    model = build_classifier(r, 2)
    model.load_state_dict(weights)

    scores = evaluate_classifier(model, r, ImageFolder(folder / "val", labels=True))

    [row] = [row for row in read_log(tmp_path / "run") if "ema_val_loss" in row]
    assert row["ema_val_loss"] == pytest.approx(scores["val_loss"], abs=1e-6)
    assert row["ema_val_loss"] != row["val_loss"]
    assert metrics["ema_accuracy"] == scores["accuracy"]


def test_another_crop_for_the_score():
    r = recipe_named("finetune", "base-in1k")

    assert scored_view(r).edge == 256 and scored_view(replace(r, img_size=384)).edge == 384
    assert scored_view(replace(r, crop_pct=1.0)).edge == 224
    assert scored_view(recipe_named("finetune", "nano", crop_pct=0.5)).edge == 64


@pytest.fixture
def bands(tmp_path, monkeypatch):
    "Where `lay_out_bands` has laid its fields, and the bands of all that are to be learnt from."
    monkeypatch.chdir(tmp_path)
    files = sorted(lay_out_bands(tmp_path / "bands").glob("train/*/*"))
    read = {".npy": np.load, ".tif": lambda f: tifffile.imread(f).transpose(2, 0, 1) / 65535}
    return np.stack([read[file.suffix](file) for file in files])  # (12, 5, 40, 36)


def of_five(kind, **fields):
    "A small network of five bands."
    size = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, in_chans=5)
    return shaken(kind(9, **size, **fields))


def test_mean_and_std_of_bands_are_measured_and_kept(bands, tmp_path):
    words = {k: v for k, v in TINY.items() if k != "mean_std"}
    r = FinetuneRecipe(
        **words, data="bands", out="run", in_chans=5, augment="none", mean_std="imagenet"
    )

    finetune(replace(r, max_steps=1), quiet=True)
    first = load_weights("run").mean_std
    finetune(r, quiet=True)
    convert("run", "plain.safetensors", "safetensors")
    convert("run", "hub", "hf")

    by_hand = bands.mean((0, 2, 3)), bands.std((0, 2, 3))
    assert np.allclose(first, by_hand, atol=1e-5)
    for source in ("run", "plain.safetensors", "hub"):
        assert load_weights(source).mean_std == first
    scores = evaluate("hub", "bands", "scores", precision="fp32", quiet=True)
    losses = [row["val_loss"] for row in read_log(tmp_path / "run") if "val_loss" in row]
    assert scores["loss"] == pytest.approx(losses[-1], abs=1e-5)


def test_bands_are_seen_as_init_saw_them_if_it_says_so(bands, tmp_path):
    pictures = open_data("bands", "train", True, 5)
    told = ((0.2,) * 5, (0.3,) * 5)
    of_five(BeitForImageClassification).save_pretrained("told", mean_std=told)
    save_official(of_five(BeitForImageClassification), "bare.pth")
    r = FinetuneRecipe(in_chans=5)

    seen = {}
    for init in ("told", "bare.pth"):
        (tmp_path / f"of-{init}").mkdir()
        seen[init] = mean_std_of_run(r, tmp_path / f"of-{init}", pictures, load_weights(init))

    assert seen["told"] == told
    assert np.allclose(seen["bare.pth"][0], bands.mean((0, 2, 3)), atol=1e-5)


@pytest.mark.slow
def test_a_folder_of_five_bands_from_training_to_answers(bands, tmp_path):
    "From weights that have seen three colors; the classes differ in a band that no eye sees."
    size = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
    shape = [f"--{name.replace('_', '-')} {value}" for name, value in size.items()]
    save_official(BeitForMaskedImageModeling(9, **size), tmp_path / "colors.pth")
    words = "--data bands --in-chans 5 --init colors.pth --labels-per-class 6 --steps 40"
    more = "--batch-size 12 --lr 3e-3 --layer-decay 1 --init-scale 1 --warmup-steps 4 --workers 2"
    flat = " ".join([words, more, *shape]).split()

    beit("finetune", "nano", *flat, "--augment", "none", "--out", "run")
    said = beit("evaluate", "run", "--data", "bands").stdout
    answers = [tmp_path / "bands" / "val" / name for name in ("water/0.tif", "wheat/1.npy")]
    lines = beit("predict", "--init", "run", "--images", *answers, "--grid", "sheet.png").stdout

    trained = load_checkpoint("run")["model"]
    assert trained["patch_embed.proj.weight"].shape == (32, 5, 4, 4)
    assert read_metrics(tmp_path / "run")["accuracy"] > 0.9 and "of 12 pictures" in said
    first = [line.split(": ")[1].split(" ")[0] for line in lines.splitlines()]
    assert first == ["water", "wheat"] and (tmp_path / "sheet.png").is_file()
    asked = ("--init", "run", "--data", "bands", "--labels-per-class", 6)
    beit("probe", "nano", *asked, "--draws", 1, "--out", "probe")
    beit("linear", "nano", *asked, "--steps", 20, "--batch-size", 12, "--lr", 0.05, "--out", "line")
    assert read_metrics(tmp_path / "probe")["pretrained"]["mean"] > 0.9
    assert read_metrics(tmp_path / "line")["accuracy"] > 0.9
    np.save(answers[0].with_name("4.npy"), np.zeros((4, 40, 36), np.float32))
    refused("evaluate", "run", "--data", "bands", "--out", "other", says="water/4.npy is 4 x 40")


def test_bands_and_colors_do_not_pass_for_each_other(tmp_path, folder):
    recipe = FinetuneRecipe(
        **TINY, data=str(folder), out=str(tmp_path / "run"), in_chans=5, augment="none"
    )

    with pytest.raises(
        BeitError, match="no pictures in .*looked for .npy.*; a network of 5 channels is asked"
    ):
        finetune(recipe, quiet=True)


def test_a_forgotten_init_is_said(folder, tmp_path):
    "Whoever has no pre-training and holds no layers back means it."
    shape = "--img-size 16 --embed-dim 32 --depth 2 --num-heads 2 --steps 1 --batch-size 4".split()
    words = ("finetune", "nano", "--data", folder, "--labels-per-class", 4, *shape)
    line = "no --init: the network starts from scratch, and layer_decay 0.75 slows its lower"

    with unpainted():
        said = [
            beit(*words, "--out", tmp_path / name, *more).stderr
            for name, more in (
                ("a", ()),
                ("b", ("--layer-decay", 1)),
                ("c", ("--init", tmp_path / "a")),
            )
        ]

    assert [line in text for text in said] == [True, False, False]
