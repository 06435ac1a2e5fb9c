"Fine-tuning and probing: parity with timm, weights that move, pictures of any kind, faults that are named."

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from beit_nb.checkpoints import load_backbone, resize_pos_embed, resize_rel_pos_bias
from beit_nb.finetuning import (
    BeitForImageClassification,
    FinetuneTransform,
    finetune,
    load_classifier,
    build_from_checkpoint,
    timm_transform,
)
from beit_nb.mim import BeitForMaskedImageModeling
from beit_nb.probing import STRENGTHS, best_on_val, linear_scores, probe, raw_pixels
from beit_nb.recipes import Backbone, FinetuneRecipe, ProbeRecipe, as_config, recipe_named
from beit_nb.engine.runs import save_checkpoint
from beit_nb.vit import VisionTransformer

SIZE = dict(img_size=32, patch_size=4, embed_dim=64, depth=3, num_heads=4)
PLUS = dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
SHARED = dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1)
TINY = dict(
    img_size=16,
    patch_size=4,
    embed_dim=32,
    depth=2,
    num_heads=2,
    drop_path_rate=0.0,
    precision="fp32",
    weight_init="xavier",
    mean_std="beit",
    steps=2,
    batch_size=4,
    warmup_steps=0,
)


def shaken(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Two classes of eight wide pictures, red and blue, for train and val."
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for colour, channel in (("blue", 2), ("red", 0)):
            (root / split / colour).mkdir(parents=True)
            for i in range(8):
                x = rng.integers(0, 60, (20, 30, 3), dtype=np.uint8)
                x[..., channel] += 150
                Image.fromarray(x).save(root / split / colour / f"{i}.png")
    return root


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

    ours = shaken(BeitForImageClassification(10, **SIZE, **form))
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


@pytest.mark.parametrize("grid", [(6, 6), (8, 8), (12, 12), (10, 7), (3, 24)])
def test_bias_table_keeps_neighbours_and_class_rows(grid):
    table = torch.randn(15 * 15 + 3, 2)
    new = resize_rel_pos_bias(table, (8, 8), grid)
    assert (
        new.shape == ((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, 2)
        and new.isfinite().all()
        and torch.equal(new[-3:], table[-3:])
    )
    square = new[:-3].unflatten(0, (2 * grid[0] - 1, -1))
    old = table[:-3].unflatten(0, (15, 15))
    c = grid[0] - 1
    d = grid[1] - 1
    torch.testing.assert_close(
        square[c - 1 : c + 2, d - 1 : d + 2], old[6:9, 6:9], atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        square[[0, 0, -1, -1], [0, -1, 0, -1]],
        old[[0, 0, -1, -1], [0, -1, 0, -1]],
        atol=1e-4,
        rtol=1e-4,
    )
    assert (resize_rel_pos_bias(table, (8, 8), grid) is table) == (grid == (8, 8))


def test_bias_table_is_near_timms_linear_one_where_it_is_smooth():
    from timm.layers import resize_rel_pos_bias_table

    y, x = torch.meshgrid(torch.arange(-13.0, 14), torch.arange(-13.0, 14), indexing="ij")
    table = torch.cat([torch.exp(-(x**2 + y**2) / 60).reshape(-1, 1), torch.ones(3, 1)])
    ours = resize_rel_pos_bias(table, (14, 14), (24, 24))
    theirs = resize_rel_pos_bias_table(table, (24, 24), (2212, 1))
    assert (ours - theirs).abs().max() < 0.03


@pytest.mark.parametrize(
    "form", [{}, SHARED, PLUS, dict(use_rel_pos_bias=True, use_shared_rel_pos_bias=True)]
)
def test_a_model_reloads_its_own_kind_exactly(form):
    old = shaken(VisionTransformer(**SIZE, **form))
    new = VisionTransformer(**SIZE, **form)
    assert load_backbone(new, old.state_dict(), (8, 8)) == []
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(old(x), new.eval()(x))


def test_a_shared_table_means_the_same_in_every_block():
    old = shaken(BeitForMaskedImageModeling(**SIZE, vocab_size=9, **SHARED))
    new = BeitForImageClassification(10, **SIZE, **PLUS).eval()
    load_backbone(new, old.state_dict(), (8, 8))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        old.forward_features(x), new.forward_features(x), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "form, words",
    [
        (dict(depth=4), "blocks.3"),
        (dict(depth=2), "blocks.2"),
        (dict(init_values=None), "gamma_1"),
        (dict(embed_dim=32), "shape"),
        (dict(use_rel_pos_bias=False), "use_rel_pos_bias"),
        (dict(patch_size=8), "patch_embed"),
    ],
)
def test_what_does_not_fit_is_named(form, words):
    old = BeitForMaskedImageModeling(**SIZE, vocab_size=9, **SHARED).state_dict()
    with pytest.raises(ValueError, match=words) as e:
        load_backbone(BeitForImageClassification(10, **SIZE | PLUS | form), old, (8, 8))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "work, words",
    [
        (lambda: resize_rel_pos_bias(torch.zeros(732, 2), (14, 12), (24, 24)), "732 rows"),
        (lambda: resize_rel_pos_bias(torch.zeros(12, 2), (2, 2), (4, 4)), "at least 3"),
        (lambda: resize_pos_embed(torch.zeros(1, 65, 2), (7, 7), (9, 9)), "65 positions"),
        (lambda: timm_transform(FinetuneRecipe(augment="wild"), True), "'wild'"),
    ],
)
def test_bad_input_is_named_in_one_line(work, words):
    with pytest.raises(ValueError, match=words) as e:
        work()
    assert "\n" not in str(e.value)


def test_erasing_and_filling_are_official():
    "Noise has the spread of normalised pixels, and rotations fill with the mean colour."
    r = recipe_named(
        "finetune", "base-in1k", augment="none", erasing=1.0, crop_scale=None, flip=0.0
    )
    # ImageNet's mean: 0 once normalised
    grey = Image.new("RGB", (224, 224), (124, 116, 104))
    x = timm_transform(r, True)(grey)
    noise = x[x.abs() > 0.02]
    assert 0.02 < len(noise) / x.numel() < 0.4 and abs(noise.std() - 1) < 0.1
    turned = timm_transform(replace(r, erasing=0.0, augment="rand-m9-n8-mstd0.5-inc1"), True)
    fill = (
        next(t for t in turned.transforms if type(t).__name__ == "RandAugment")
        .ops[0]
        .hparams["img_mean"]
    )
    assert fill == (124, 116, 104)


@pytest.mark.parametrize(
    "augment, extra",
    [
        ("shift", {}),
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
    larger = FinetuneTransform(replace(r, img_size=48), [1], training=True)(
        Image.new("L", (9, 50)).convert("RGB"), 0, np.random.default_rng(0)
    )
    assert larger[0].shape == (3, 48, 48)
    next_run = build_from_checkpoint(replace(r, init=str(tmp_path / "run"), img_size=24), 5)
    assert next_run.pos_embed.shape == (1, 37, 32) and next_run.head.out_features == 5


def test_classes_are_numbered_as_in_train(folder, tmp_path):
    import shutil

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
    with pytest.raises(ValueError, match="green"):
        finetune(replace(r, out=str(tmp_path / "other")), quiet=True)


def test_the_small_fit_is_the_direct_fit():
    "Rotated onto the span of the training rows, the accuracies are those of the plain pipeline."
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 40)
    t = rng.integers(0, 3, 60)
    # five constant features
    make = lambda labels: (
        rng.normal(size=(len(labels), 300)) * (np.arange(300) > 4)
        + 1.5 * np.eye(3, 300, 10)[labels]
    )
    x = make(y)
    h = make(t)
    want = [
        [
            make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000, tol=1e-8))
            .fit(x, y)
            .score(h, t)
        ]
        for c in STRENGTHS
    ]
    assert np.abs(linear_scores((x, y), [(h, t)]) - want).max() <= 1 / 60


def test_probe_of_a_folder(folder, tmp_path, capsys):
    pre = recipe_named("pretrain", "nano", tokenizer="none", embed_dim=32, depth=2, num_heads=2)
    body = BeitForMaskedImageModeling(
        pre.vocab_size, **{k: getattr(pre, k) for k in Backbone.__dataclass_fields__}
    )
    save_checkpoint(
        tmp_path / "pre.pt", dict(model=body.state_dict(), config=as_config("pretrain", pre))
    )
    m = probe(
        ProbeRecipe(
            data=str(folder),
            init=str(tmp_path / "pre.pt"),
            out=str(tmp_path / "probe"),
            labels_per_class=4,
            draws=2,
            batch_size=5,
        )
    )
    assert (
        m["labels"] == 8
        and m["pixels"]["mean"] == 1
        and len(m["pretrained"]["layers"]) == 2
        and re.search(r"pixels: 1\.000", capsys.readouterr().out)
    )


def test_the_choice_never_sees_the_reported_set():
    scores = np.random.default_rng(0).random((3, 4, 5, 2))
    other = scores.copy()
    other[..., 1] = 0.5
    assert (
        best_on_val(scores)["layer"] == best_on_val(other)["layer"]
        and best_on_val(other)["mean"] == 0.5
        and best_on_val(other)["std"] == 0
    )


def test_large_pictures_are_averaged_for_the_pixel_arm():
    x = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    want = x.float().view(2, 3, 32, 2, 32, 3).mean((3, 5)) / 255
    np.testing.assert_allclose(raw_pixels(x)[0], want.flatten(1), atol=1e-6)
