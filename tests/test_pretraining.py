"Pre-training: masks of a recipe, one sample, the loss by three roads, and the examination."

import math
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_models import shaken
from timm.models.beit import Beit

from beit_nb import BeitError, pretraining
from beit_nb.dvae import DiscreteVAE, init_codes
from beit_nb.engine.augment import jitter_batch
from beit_nb.engine.files import read_json
from beit_nb.engine.loading import TrainLoader, TransformedDataset, collate
from beit_nb.engine.log import read_log, read_metrics
from beit_nb.engine.optim import loss_weights
from beit_nb.engine.runs import save_checkpoint
from beit_nb.engine.sources import Digits, ImageDataset
from beit_nb.images import preprocess, to_float
from beit_nb.masking import neighbor_rate
from beit_nb.mim import mim_loss
from beit_nb.pretraining import (
    PretrainLoss,
    PretrainTransform,
    add_masked_indices,
    apply_jitter,
    build_mim,
    evaluate_mim,
    load_mim,
    pretrain,
    start_mim,
    watch_reconstructions,
)
from beit_nb.recipes import as_config, recipe_named
from beit_nb.resizing import resize_pos_embed
from beit_nb.targets import TableTargets, TokenizerTargets, mask_maker, tokenize_dataset
from beit_nb.tokenizer import load_tokenizer, train_tokenizer
from beit_nb.tokens import Tokenizer

pytestmark = pytest.mark.usefixtures("pages_unpainted")

SMALL = dict(vocab_size=32, embed_dim=32, num_heads=2, depth=2, batch_size=32)


def recipe(**changes):
    return recipe_named("pretrain", "nano", **SMALL | changes)


@pytest.fixture(scope="module")
def tokenizer():
    "Untrained, but its codes start on the digits, so that it uses many of them."
    torch.manual_seed(0)
    dvae = DiscreteVAE(vocab_size=32, width=16)
    with torch.no_grad():
        init_codes(dvae, to_float(Digits("val").images[:64]))
    return Tokenizer(dvae)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_mim(recipe())


@pytest.fixture(scope="module")
def batch():
    samples = TransformedDataset(Digits("val"), PretrainTransform(recipe()))
    batch, _ = collate([samples[i] for i in range(24)])
    return add_masked_indices(batch)[0]


def by_hand(model, tokenizer, batch):
    "The loss (paper, Eq. 1) with nothing of the engine."
    ids = tokenizer.get_codebook_indices(to_float(batch.token_view))
    assert len(ids.unique()) > 4  # else any mistake would pass
    logits = model(preprocess(batch.patch_view, "beit"), batch.mask)
    return mim_loss(logits, ids[batch.mask])


# --- masks and samples


@pytest.mark.parametrize("masking", ["blockwise", "random"])
def test_masks_of_a_recipe(masking):
    make = mask_maker(recipe(masking=masking))
    rng = np.random.default_rng(0)

    masks = np.stack([make(rng=rng) for _ in range(200)])

    assert masks.shape == (200, 8, 8) and masks.dtype == bool
    assert (masks.sum((1, 2)) == 26).all()
    assert len(np.unique(masks, axis=0)) > 190
    # single patches know nothing of their neighbors: 26 of 64 are hidden, blocks are clumped
    rate = neighbor_rate(masks)
    assert rate > 0.6 if masking == "blockwise" else abs(rate - 25 / 63) < 0.03


def test_masks_follow_the_settings_of_a_recipe():
    rng = np.random.default_rng(0)
    paper = mask_maker(recipe_named("pretrain", "base-in1k"))
    one_block = mask_maker(
        recipe(
            num_mask_patches=4,
            min_mask_patches_per_block=4,
            max_mask_patches_per_block=4,
            min_aspect=1.0,
        )
    )

    masks = [paper(rng=rng) for _ in range(50)]
    squares = [one_block(rng=rng) for _ in range(20)]

    assert all(m.shape == (14, 14) and 0 < m.sum() <= 75 for m in masks)
    for mask in squares:
        rows, columns = np.nonzero(mask)
        assert np.ptp(rows) == np.ptp(columns) == 1  # 2 x 2


def test_a_sample_follows_from_its_key():
    r = recipe(crop_scale=(0.3, 1.0), color_jitter=0.4, flip=0.5)
    samples = [TransformedDataset(Digits("val"), PretrainTransform(r), seed=5) for _ in range(2)]

    first, again = (s[400 + 7][0] for s in samples)  # picture 7 in its second epoch
    before = samples[0][7][0]

    for name in ("patch_view", "token_view", "mask"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(before, name))
    assert first.number == before.number == 7 and first.jitter is None
    assert first.patch_view.dtype == torch.uint8 and first.mask.sum() == 26


def test_hidden_cells_are_listed_in_the_order_of_the_mask(batch):
    cells = torch.arange(24 * 64).view(24, 8, 8)

    listed, n = add_masked_indices(batch._replace(masked_index=None))

    assert n == 24 * 26 and torch.equal(listed.masked_index, cells[batch.mask])


# --- the loss


def test_loss_by_hand_by_tokenizer_and_by_table(model, tokenizer, batch):
    table = tokenize_dataset(tokenizer, Digits("val"), PretrainTransform(recipe()).views)
    want = by_hand(model, tokenizer, batch)

    for targets in (TokenizerTargets(tokenizer), TableTargets(table)):
        loss, metrics = PretrainLoss(targets, "beit")(model, batch, 0)
        torch.testing.assert_close(loss, want, atol=1e-6, rtol=0)
        assert 0 <= metrics["mlm_acc"] <= 1


def test_loss_reads_the_pictures_as_the_recipe_says(model, tokenizer, batch):
    targets = TokenizerTargets(tokenizer)

    losses = [PretrainLoss(targets, name)(model, batch, 0)[0] for name in ("beit", "imagenet")]

    assert abs(losses[0] - losses[1]) > 1e-4


def test_micro_batches_add_up_to_the_batch(model, tokenizer):
    "Their losses, weighed by hidden patches, which differ here from picture to picture."
    r = recipe(exact_mask=False, num_mask_patches=40)
    samples = TransformedDataset(Digits("val"), PretrainTransform(r), r.seed)
    compute_loss = PretrainLoss(TokenizerTargets(tokenizer), "beit")

    losses = {}
    for size in (32, 12):
        loader = TrainLoader(samples, r, size, add_masked_indices)
        micro_batches, counts = next(iter(loader.steps(0, 1)))
        weights = loss_weights(counts, sum(counts))
        each = [compute_loss(model, micro_batch, 0)[0] for micro_batch in micro_batches]
        losses[size] = sum(w * loss for w, loss in zip(weights, each))

    assert len(counts) == 3 and counts[0] != counts[1]
    torch.testing.assert_close(losses[12], losses[32], atol=1e-6, rtol=0)


def test_colors_are_jittered_where_that_is_still_to_do():
    r = recipe(color_jitter=0.4, jitter_on="device")
    samples = TransformedDataset(Digits("val"), PretrainTransform(r), 3)
    batch = collate([samples[i] for i in range(8)])[0]

    final = apply_jitter(batch)

    assert final.jitter is None and apply_jitter(final) is final
    for view in ("patch_view", "token_view"):
        stored = getattr(batch, view)
        assert torch.equal(getattr(final, view), jitter_batch(stored, batch.jitter))
        assert not torch.equal(getattr(final, view), to_float(stored))
    assert torch.equal(final.mask, batch.mask)


def test_jitter_on_the_device_is_that_of_the_loader(model, tokenizer):
    val = Digits("val")
    batches = {}
    for on in ("loader", "device"):
        r = recipe(color_jitter=0.4, jitter_on=on)
        samples = TransformedDataset(val, PretrainTransform(r), 3)
        batches[on] = add_masked_indices(collate([samples[i] for i in range(24)])[0])[0]
    plain = batches["device"]._replace(jitter=None)
    table = tokenize_dataset(tokenizer, val, PretrainTransform(recipe()).views)
    compute_loss = PretrainLoss(TableTargets(table), "beit")

    views = {on: to_float(apply_jitter(batch).patch_view) for on, batch in batches.items()}
    losses = {on: compute_loss(model, batch, 0)[0] for on, batch in batches.items()}

    assert torch.equal(batches["loader"].mask, plain.mask)
    # the loader rounds to bytes after each of its steps
    apart = (views["device"] - views["loader"]).abs()
    assert apart.mean() < 1 / 255 and apart.max() < 0.03
    assert abs(losses["loader"] - losses["device"]) < 0.002
    assert (to_float(plain.patch_view) - views["device"]).abs().mean() > 5 * apart.mean()


# --- the examination


def count_by_hand(model, r, tokenizer, pictures, prior, seed):
    "Picture by picture and patch by patch, with loops."
    samples = TransformedDataset(pictures, PretrainTransform(r), seed)
    hits = constant = total = 0
    loss = 0.0
    for i in range(len(pictures)):
        sample = samples[i][0]
        ids = tokenizer.get_codebook_indices(to_float(sample.token_view[None]))[0]
        everywhere = model(
            preprocess(sample.patch_view[None], r.mean_std),
            sample.mask[None],
            return_all_tokens=True,
        )[0].view(8, 8, -1)
        for row, column in sample.mask.nonzero().tolist():
            true = int(ids[row, column])
            logits = everywhere[row, column]
            hits += int(logits.argmax()) == true
            loss -= float(logits.log_softmax(0)[true])
            constant += int(torch.bincount(prior[:, row, column]).argmax()) == true
            total += 1
    return {
        "masked_top1": hits / total,
        "masked_loss": loss / total,
        "best_constant_top1": constant / total,
    }


def few_digits(n):
    return ImageDataset(n, Digits("val").images.__getitem__, name="few digits")


@torch.no_grad()
def test_examination_against_a_count_by_hand(model, tokenizer):
    r = recipe(precision="fp32")  # as the count by hand, also where the hardware has bf16
    pictures = few_digits(20)
    prior = tokenizer.get_codebook_indices(to_float(Digits("val").images[100:]))
    model.eval()

    want = count_by_hand(model, r, tokenizer, pictures, prior, seed=4)
    got = evaluate_mim(model, r, tokenizer, pictures, prior, seed=4, batch_size=7)

    assert got.keys() == want.keys()
    assert got["masked_top1"] == want["masked_top1"]
    assert got["best_constant_top1"] == want["best_constant_top1"] > 0.05
    assert got["masked_loss"] == pytest.approx(want["masked_loss"], abs=1e-5)


@pytest.mark.parametrize("kind", ["tokens", "pixels"])
def test_examination_in_half_precision_and_by_workers(kind, tokenizer):
    "bf16 moves the mean loss by less than a hundredth; workers load the very same pictures."
    r = recipe(targets=kind)
    torch.manual_seed(0)
    model = build_mim(r)
    pictures = few_digits(20)
    asked = [] if kind == "pixels" else [tokenizer]
    loss = "masked_mse" if kind == "pixels" else "masked_loss"

    def score(**changes):
        return evaluate_mim(model, replace(r, **changes), *asked or [None], pictures)

    want = score(precision="fp32", workers=0)
    half = score(precision="bf16")

    assert score(precision="fp32", workers=2) == want
    assert half[loss] == pytest.approx(want[loss], rel=0.01) and half[loss] != want[loss]


@pytest.mark.parametrize("training", [True, False])
def test_examination_leaves_the_model_as_it_was(model, tokenizer, training):
    model.train(training)

    metrics = evaluate_mim(model, recipe(), tokenizer, few_digits(8))

    assert model.training == training
    assert set(metrics) == {"masked_top1", "masked_loss"}  # no prior, no constant guess


# --- checkpoints, and the pictures of a run


def test_a_model_comes_back_with_its_recipe(model, tmp_path):
    r = recipe()
    state = dict(model=model.state_dict(), config=as_config("pretrain", r))
    save_checkpoint(tmp_path / "model.pt", state)

    loaded, r_loaded = load_mim(tmp_path / "model.pt")

    assert r_loaded == r and not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with pytest.raises(BeitError):
        load_mim(tmp_path / "nowhere.pt")


def test_a_run_watches_the_same_pictures_each_time(tokenizer, tmp_path):
    r = recipe(seed=3)
    val = Digits("val")
    table = tokenize_dataset(tokenizer, val, PretrainTransform(r).views)
    training = TransformedDataset(val, PretrainTransform(r), r.seed)

    one = watch_reconstructions(r, tmp_path, 2, val, TokenizerTargets(tokenizer))
    two = watch_reconstructions(r, tmp_path, 2, val, TableTargets(table, tokenizer))
    other = watch_reconstructions(replace(r, seed=4), tmp_path, 2, val, TokenizerTargets(tokenizer))

    for name in ("views", "masks", "ids"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert torch.equal(one.views, val.images[np.linspace(0, 399, 6).astype(int)])
    assert torch.equal(one.ids, tokenizer.get_codebook_indices(to_float(one.views)))
    assert torch.equal(one.views, other.views) and not torch.equal(one.masks, other.masks)
    assert not torch.equal(one.masks[0], training[0][0].mask)


@pytest.mark.parametrize("steps, tables", [(5, 0), (6, 1)])
def test_a_table_is_made_where_it_will_be_read(tmp_path, monkeypatch, steps, tables):
    "Forty pictures in steps of eight: up to the fifth, each is asked for once at most."
    small = dict(width=16, vocab_size=32, steps=1, batch_size=8)
    train_tokenizer(recipe_named("tokenizer", "nano", out=f"{tmp_path}/tok", **small), quiet=True)
    r = recipe(out=f"{tmp_path}/run", tokenizer=f"{tmp_path}/tok", steps=steps, batch_size=8)
    made = []
    tabulate = pretraining.tabulate
    monkeypatch.setattr(pretraining, "open_data", lambda data: few_digits(40))
    monkeypatch.setattr(pretraining, "tabulate", lambda *a: made.append(tabulate(*a)) or made[-1])
    hidden = TableTargets.hidden if tables else TokenizerTargets.hidden
    seen = []

    def look(self, batch):
        seen.append(batch.token_view.shape[-1])
        return hidden(self, batch)

    monkeypatch.setattr(TableTargets if tables else TokenizerTargets, "hidden", look)

    pretrain(r, quiet=True)

    assert len(made) == tables
    assert seen == steps * [0 if tables else 32]  # what the tokenizer would see is not made


def test_a_finished_run_makes_no_table_and_draws_nothing(tmp_path, monkeypatch):
    "The same command again has nothing to learn from, and nothing to watch."
    small = dict(width=16, vocab_size=32, steps=2, batch_size=8)
    train_tokenizer(recipe_named("tokenizer", "nano", out=f"{tmp_path}/tok", **small), quiet=True)
    r = recipe(out=f"{tmp_path}/run", tokenizer=f"{tmp_path}/tok", steps=2, watch_every=1)
    monkeypatch.setattr(pretraining, "open_data", lambda data: few_digits(40))
    first = pretrain(r, quiet=True)

    monkeypatch.setattr(pretraining, "tabulate", None)
    monkeypatch.setattr(pretraining, "watch_reconstructions", None)
    again = pretrain(r, quiet=True)

    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert read_metrics(r.out)["steps"] == 2


# --- weights to start from


def wide(**changes):
    "A recipe of two heads. A file without a table does not tell, and one is assumed (of 64)."
    return recipe(**dict(embed_dim=64) | changes)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    "A run of a tokenizer."
    out = tmp_path_factory.mktemp("tok")
    small = dict(width=16, vocab_size=32, steps=1, batch_size=8, out=str(out))
    train_tokenizer(recipe_named("tokenizer", "nano", **small), quiet=True)
    return out


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(pretraining, "open_data", lambda data: few_digits(40))


def short_run(tok, out, **changes):
    "A recipe of two steps of eight pictures on the CPU's numbers, each step in the log."
    short = dict(steps=2, batch_size=8, log_every=1, precision="fp32", seed=7)
    return wide(tokenizer=str(tok), out=str(out), **short | changes)


def first_loss(out):
    return next(row["loss"] for row in read_log(out) if row["step"] == 1)


def loss_of(model, r):
    "What the first step of that recipe costs this network; nothing of `--init` is in it."
    samples = TransformedDataset(few_digits(40), PretrainTransform(r), r.seed, pixels=True)
    loader = TrainLoader(samples, r, r.batch_size, add_masked_indices)
    [batch], _ = next(iter(loader.steps(0, 1)))
    targets = TokenizerTargets(load_tokenizer(r.tokenizer))
    with torch.no_grad():
        return PretrainLoss(targets, r.mean_std)(model, batch, 0)[0].item()


def as_official_file(model, path):
    file = {"model": model.state_dict(), "args": Namespace(lr=0.1), "epoch": 3}
    torch.save(file, path / "theirs.pth")
    return path / "theirs.pth"


def as_hf_folder(model, path):
    model.save_pretrained(path / "theirs")
    return path / "theirs"


def as_run_of_ours(model, path):
    state = dict(model=model.state_dict(), config=as_config("pretrain", wide()))
    save_checkpoint(path / "ours.pt", state)
    return path / "ours.pt"


@pytest.mark.slow
@pytest.mark.parametrize("saved", [as_official_file, as_hf_folder, as_run_of_ours])
def test_a_run_begins_with_anybodys_weights(saved, tok, few, tmp_path, capfd):
    model = shaken(build_mim(wide()))
    r = short_run(tok, tmp_path / "run", init=str(saved(model, tmp_path)))
    unlike = loss_of(build_mim(r), r)

    pretrain(r, quiet=True)

    assert first_loss(r.out) == pytest.approx(loss_of(model, r), abs=1e-5)
    assert abs(first_loss(r.out) - unlike) > 0.1
    assert read_json(tmp_path / "run" / "config.json")["init"] == r.init
    assert "fresh" not in capfd.readouterr().err


PLUS = dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)


def test_a_classifier_of_timms_brings_its_body(tok, few, tmp_path, capfd):
    size = dict(img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=2)
    theirs = shaken(Beit(num_classes=10, **size, **PLUS))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    form = PLUS | dict(weight_init="beit")
    r = short_run(tok, tmp_path / "run", init=str(tmp_path / "theirs.pth"), **form)

    pretrain(r, quiet=True)

    said = capfd.readouterr().err.splitlines()
    assert len([line for line in said if "fresh: lm_head.bias, lm_head.weight, mask_token" in line])
    torch.manual_seed(r.seed)
    fresh_head = build_mim(r)
    fresh_head.load_state_dict(theirs.state_dict(), strict=False)
    assert first_loss(r.out) == pytest.approx(loss_of(fresh_head, r), abs=1e-5)
    assert first_loss(r.out) == pytest.approx(math.log(32), abs=0.1)  # it prefers no token


def test_weights_of_another_size_and_another_alphabet(tmp_path, capfd):
    r = wide(init=str(as_official_file(shaken(build_mim(wide())), tmp_path)))
    source = torch.load(r.init, weights_only=False)["model"]

    larger = start_mim(replace(r, img_size=48), tmp_path)
    assert "fresh" not in capfd.readouterr().err
    other = start_mim(replace(r, vocab_size=99), tmp_path)
    assert "so fresh: lm_head.bias, lm_head.weight\n" in capfd.readouterr().err

    want = source | {"pos_embed": resize_pos_embed(source["pos_embed"], (8, 8), (12, 12))}
    assert all(torch.equal(x, want[name]) for name, x in larger.state_dict().items())
    body = {name: x for name, x in source.items() if not name.startswith("lm_head")}
    assert all(torch.equal(other.state_dict()[name], x) for name, x in body.items())
    assert other.training and other.lm_head.out_features == 99


def test_what_a_recipe_has_no_place_for_is_named(tmp_path):
    ours = str(as_run_of_ours(build_mim(wide()), tmp_path))
    shared = PLUS | dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    theirs = str(as_official_file(build_mim(wide(**PLUS)), tmp_path))

    for init, changes, words in [
        (ours, dict(depth=3), "depth is 2 in .*set it with --depth"),
        (ours, dict(num_heads=4), "num_heads is 2 in .*set it with --num-heads"),
        (ours, dict(init_values=0.1), "LayerScale"),
        (ours, shared, "use_abs_pos_emb is True in .*set it with --use-abs-pos-emb"),
        (theirs, PLUS | dict(num_heads=4), "num_heads is 2 in"),  # its tables tell
        (theirs, shared, "use_rel_pos_bias is True in .*set it with --use-rel-pos-bias"),
    ]:
        with pytest.raises(BeitError, match=words):
            start_mim(wide(init=init, **changes), tmp_path / "run")


def test_a_run_that_goes_on_reads_its_own_weights(tok, few, tmp_path, capfd):
    file = as_official_file(shaken(build_mim(wide())), tmp_path)
    whole = pretrain(short_run(tok, tmp_path / "whole", init=str(file)), quiet=True)
    r = short_run(tok, tmp_path / "run", init=str(file))
    pretrain(replace(r, max_steps=1), quiet=True)
    file.unlink()

    capfd.readouterr()
    model = pretrain(r, quiet=True)

    said = capfd.readouterr().err.splitlines()
    assert len([line for line in said if "goes on with its own weights" in line]) == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters()))
    with pytest.raises(BeitError, match="holds another run .*init"):
        pretrain(replace(r, init=""), quiet=True)


def test_a_run_that_began_with_noise_takes_no_weights_later(tok, few, tmp_path):
    r = short_run(tok, tmp_path / "run", max_steps=1)
    pretrain(r, quiet=True)

    with pytest.raises(BeitError, match="holds another run .*init '' there"):
        pretrain(replace(r, init=str(tok)), quiet=True)
