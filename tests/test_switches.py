"""The switches of pre-training (paper, Tables 4 and 5), each by itself.

What it changes, and what it leaves alone: masks, the patches of the loss, gradients, checkpoints.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from beit_nb import pretraining
from beit_nb.checkpoints import load_weights
from beit_nb.classifier import BeitForImageClassification
from beit_nb.engine.augment import jitter_batch
from beit_nb.engine.loading import TransformedDataset, collate
from beit_nb.engine.log import read_log, read_metrics
from beit_nb.engine.runs import load_checkpoint
from beit_nb.engine.sources import Digits, ImageDataset
from beit_nb.images import preprocess
from beit_nb.mim import mean_and_spread
from beit_nb.patches import patchify
from beit_nb.pretraining import (
    PretrainLoss,
    add_masked_indices,
    build_mim,
    evaluate_mim,
    load_mim,
    pretrain,
    start_mim,
)
from beit_nb.recipes import recipe_named
from beit_nb.reconstructions import read_look, reconstruction_figure
from beit_nb.targets import (
    PixelTargets,
    PretrainTransform,
    TableTargets,
    mean_patches,
    pixel_targets,
)
from beit_nb.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("pages_unpainted")

SMALL = dict(vocab_size=32, embed_dim=64, num_heads=2, depth=2, batch_size=8, precision="fp32")
PATCHES = 64
PIXELS = 48


def recipe(**changes):
    return recipe_named("pretrain", "nano", **SMALL | changes)


def few_digits(n):
    return ImageDataset(n, Digits("val").images.__getitem__, name="few digits")


def a_batch(r, n=6):
    samples = TransformedDataset(few_digits(40), PretrainTransform(r), 3)
    batch, _ = collate([samples[i] for i in range(n)])
    return add_masked_indices(batch, everywhere=r.recover == "all")[0]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    "A run of a tokenizer."
    out = tmp_path_factory.mktemp("tok")
    small = dict(width=16, vocab_size=32, steps=1, batch_size=8, out=str(out))
    train_tokenizer(recipe_named("tokenizer", "nano", **small), quiet=True)
    return str(out)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(pretraining, "open_data", lambda data: few_digits(40))


# --- over which patches the loss is


class Guesses(torch.nn.Module):
    "Stands for a model whose guesses at all patches are parameters."

    def __init__(self, n, width):
        super().__init__()
        torch.manual_seed(0)
        self.all = torch.nn.Parameter(torch.randn(n, PATCHES, width))

    def forward(self, images, mask, masked_index):
        return self.all.flatten(0, 1)[masked_index]


SOURCES = {
    "tokens": lambda: TableTargets(torch.randint(32, (40, 8, 8))),
    "pixels": lambda: PixelTargets(4, "beit"),
    "pixels_norm": lambda: PixelTargets(4, "beit", normalized=True),
}


@pytest.mark.parametrize("recover", ["masked", "all"])
@pytest.mark.parametrize("name", SOURCES)
def test_the_gradient_reaches_the_patches_that_are_asked_for_and_no_others(name, recover):
    r = recipe(targets=name, recover=recover)
    batch = a_batch(r)
    guesses = Guesses(6, r.outputs)

    loss, _ = PretrainLoss(SOURCES[name](), "beit")(guesses, batch, 0)
    loss.backward()

    reached = (guesses.all.grad != 0).any(2)
    asked = batch.mask.flatten(1) if recover == "masked" else torch.ones(6, PATCHES).bool()
    assert torch.equal(reached, asked) and batch.mask.sum() == 6 * 26


@pytest.mark.parametrize("recover", ["masked", "all"])
def test_true_tokens_of_visible_patches_count_where_all_are_recovered(recover):
    batch = a_batch(recipe(recover=recover))
    model = build_mim(recipe())
    ids = torch.randint(32, (40, 8, 8))
    other = ids.clone()
    other[batch.number] = torch.where(batch.mask, ids[batch.number], (ids[batch.number] + 1) % 32)

    losses = [PretrainLoss(TableTargets(t), "beit")(model, batch, 0)[0] for t in (ids, other)]

    assert (losses[0] == losses[1]) == (recover == "masked")


@pytest.mark.parametrize("name", ["pixels", "pixels_norm"])
@pytest.mark.parametrize("recover", ["masked", "all"])
def test_the_loss_of_pixels_by_hand(name, recover):
    r = recipe(targets=name, recover=recover)
    batch = a_batch(r)
    torch.manual_seed(0)
    model = build_mim(r)
    images = preprocess(batch.patch_view, r.mean_std)
    true = patchify(images, 4)
    if name == "pixels_norm":
        mean, spread = mean_and_spread(true)
        true = (true - mean) / spread

    loss, metrics = PretrainLoss(pixel_targets(r), r.mean_std)(model, batch, 0)

    squares = (model(images, batch.mask, return_all_tokens=True) - true).square().mean(2)
    asked = squares if recover == "all" else squares[batch.mask.flatten(1)]
    torch.testing.assert_close(loss, asked.mean(), atol=1e-6, rtol=1e-5)
    assert set(metrics) == {"masked", "constant_mse"} and metrics["masked"] == 26
    assert model.lm_head.out_features == PIXELS


def test_pixels_are_jittered_as_the_model_sees_them():
    r = recipe(targets="pixels", color_jitter=0.4, jitter_on="device")
    batch = a_batch(r)
    seen = jitter_batch(batch.patch_view, batch.jitter)
    want = patchify(preprocess(seen, r.mean_std), 4)[batch.mask.flatten(1)]
    final = pretraining.apply_jitter(batch)

    got, plain = (
        pixel_targets(r).hidden(b._replace(patch_view=preprocess(b.patch_view, r.mean_std)))
        for b in (final, batch)
    )

    assert torch.equal(got, want)
    assert not torch.equal(got, plain)


def test_nobody_makes_a_view_for_a_tokenizer_that_is_not_there():
    "And the rest of a sample stays what it was, to the last bit."
    random = dict(img_size=32, token_size=16, crop_scale=(0.3, 1.0), color_jitter=0.4, flip=0.5)
    tokens, pixels = (a_batch(recipe(targets=t, **random)) for t in ("tokens", "pixels"))

    assert tokens.token_view.shape[-1] == 16 and pixels.token_view.numel() == 0
    for name in ("patch_view", "mask", "number", "masked_index"):
        assert torch.equal(getattr(tokens, name), getattr(pixels, name))


# --- masks


def test_with_no_masking_nothing_is_hidden_and_the_mask_token_learns_nothing():
    r = recipe(masking="none", recover="all")
    torch.manual_seed(0)
    model = build_mim(r)
    table = TableTargets(torch.randint(32, (40, 8, 8)))
    hidden = a_batch(recipe(recover="all"))
    shown = a_batch(r)

    grads = []
    for batch in (hidden, shown):
        model.zero_grad()
        PretrainLoss(table, "beit")(model, batch, 0)[0].backward()
        grads.append(model.mask_token.grad.abs().max())

    assert not shown.mask.any() and len(shown.masked_index) == 6 * PATCHES
    assert grads[0] > 0 and grads[1] == 0
    assert torch.equal(shown.patch_view, hidden.patch_view)


# --- the examination


@torch.no_grad()
@pytest.mark.parametrize("name", ["pixels", "pixels_norm"])
def test_the_examination_of_pixels_by_hand(name):
    r = recipe(
        targets=name, masking="none", recover="all"
    )  # it is asked for hidden ones all the same
    pictures = few_digits(20)
    prior = mean_patches(r, few_digits(40))
    torch.manual_seed(0)
    model = build_mim(r).eval()

    got = evaluate_mim(model, r, None, pictures, prior, seed=4, batch_size=7)

    samples = TransformedDataset(pictures, PretrainTransform(replace(r, masking="blockwise")), 4)
    wrong, constant, total = 0.0, 0.0, 0
    for i in range(20):
        sample = samples[i][0]
        view = sample.patch_view[None]
        says = model(preprocess(view, "beit"), sample.mask[None], return_all_tokens=True)[0]
        true = pixel_targets(r).all(view)[0]
        for place in np.flatnonzero(sample.mask.numpy()):
            wrong += (says[place] - true[place]).square().mean().item()
            constant += (prior[place] - true[place]).square().mean().item()
            total += 1
    assert total == 20 * 26 and got.keys() == {"masked_mse", "best_constant_mse"}
    assert got["masked_mse"] == pytest.approx(wrong / total, rel=1e-5)
    assert got["best_constant_mse"] == pytest.approx(constant / total, rel=1e-5)
    assert set(evaluate_mim(model, r, None, pictures)) == {"masked_mse"}


def test_the_mean_patch_of_every_place():
    r = recipe(targets="pixels")

    mean = mean_patches(r, few_digits(40), batch_size=9)

    want = patchify(preprocess(Digits("val").images[:40], "beit"), 4).mean(0)
    torch.testing.assert_close(mean, want, atol=1e-6, rtol=0)


# --- runs


SWITCHES = {
    "random": dict(masking="random"),
    "recover": dict(recover="all"),
    "none": dict(masking="none", recover="all"),
    "pixels": dict(targets="pixels", tokenizer="", watch_every=2),
    "pixels_norm": dict(targets="pixels_norm", tokenizer="", masking="random", recover="all"),
    "LayerScale": dict(init_values=0.1),
    "relative": dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1),
}


def a_run(tok, out, **changes):
    short = dict(steps=4, log_every=1, flip=0.5, watch_every=None, seed=5, tokenizer=tok)
    return recipe(out=str(out), **short | changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", SWITCHES)
def test_a_resumed_run_is_the_run(tok, few, tmp_path, name):
    whole = pretrain(a_run(tok, tmp_path / "whole", **SWITCHES[name]), quiet=True)
    pretrain(a_run(tok, tmp_path / "halves", **SWITCHES[name], max_steps=2), quiet=True)
    halves = pretrain(a_run(tok, tmp_path / "halves", **SWITCHES[name]), quiet=True)
    plain = pretrain(a_run(tok, tmp_path / "plain"), quiet=True)

    losses = [
        [row["loss"] for row in read_log(tmp_path / out) if "loss" in row]
        for out in ("whole", "halves", "plain")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert losses[0][1:] != losses[2][1:]  # the switch does something
    for key, value in whole.state_dict().items():
        assert torch.equal(value, halves.state_dict()[key]), key
    assert (plain.state_dict().keys() == whole.state_dict().keys()) == (
        name not in ("LayerScale", "relative")
    )


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    "A run that guesses pixels."
    out = tmp_path_factory.mktemp("painted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "open_data", lambda data: few_digits(40))
        pretrain(a_run("", out, targets="pixels_norm", watch_every=2), quiet=True)
    return out


@pytest.mark.slow
def test_a_run_of_pixels_leaves_what_every_run_leaves(painted):
    model, r = load_mim(painted)
    look = read_look(painted / "watch" / "0000004.pt", 2**62)
    metrics = read_metrics(painted)

    assert r.targets == "pixels_norm" and model.lm_head.out_features == PIXELS
    assert metrics["steps"] == 4 and metrics["loss"] > 0 and "mlm_acc" not in metrics
    assert look["guess"].dtype == torch.uint8 and look["guess"].shape == (6, 3, 32, 32)
    hidden = look["masks"].repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    hidden = hidden.expand_as(look["guess"])
    assert torch.equal(look["guess"][~hidden], look["views"][~hidden])
    assert not torch.equal(look["guess"][hidden], look["views"][hidden])
    assert len(reconstruction_figure(painted, None).axes) == 6 * 5


def test_weights_that_learnt_pixels_go_on_to_other_trainings(painted, tok):
    model, r = load_mim(painted)
    classifier = BeitForImageClassification.from_pretrained(painted, num_classes=10)
    tokens = start_mim(replace(r, targets="tokens", init=str(painted), out=""), painted / "next")

    for name, value in model.state_dict().items():
        if name.startswith("blocks."):
            assert torch.equal(classifier.state_dict()[name], value), name
            assert torch.equal(tokens.state_dict()[name], value), name
    assert classifier.head.out_features == 10 and tokens.lm_head.out_features == 32
    assert load_weights(painted).args["depth"] == 2


def test_a_run_that_knows_no_switches_goes_on(tok, few, tmp_path):
    "As an earlier version left it: neither its configuration nor its checkpoint names them."
    whole = pretrain(a_run(tok, tmp_path / "whole"), quiet=True)
    pretrain(a_run(tok, tmp_path / "old", max_steps=2), quiet=True)
    new = ("targets", "recover")
    path = tmp_path / "old" / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in new}
    path.write_text(json.dumps(config))
    state = load_checkpoint(tmp_path / "old", "pretrain")
    state["config"] = {k: v for k, v in state["config"].items() if k not in new}
    torch.save(state, tmp_path / "old" / "checkpoints" / "last.pt")

    old = pretrain(a_run(tok, tmp_path / "old"), quiet=True)

    for key, value in whole.state_dict().items():
        assert torch.equal(value, old.state_dict()[key]), key
