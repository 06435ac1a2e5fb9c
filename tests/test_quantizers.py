"Other ways to choose a token: what each computes; every one trains, resumes and loads."

import sys
from math import prod

import pytest
import torch

from beit_nb import BeitError, tokenizer
from beit_nb.configs import check_recipe
from beit_nb.dvae import BaseDiscreteVAE
from beit_nb.engine.log import read_log, read_metrics
from beit_nb.engine.sources import Digits, ImageDataset
from beit_nb.images import to_float
from beit_nb.patches import patchify
from beit_nb.pretraining import pretrain
from beit_nb.quantizers import (
    PatchHash,
    PatchStamps,
    QuantizedVAE,
    fsq_levels,
    quantized_loss,
    quantized_vae,
    start_quantizer,
)
from beit_nb.recipes import recipe_named
from beit_nb.tokenizer import load_tokenizer, train_tokenizer
from beit_nb.tokens import evaluate_tokenizer

NAMES = ("vq", "fsq", "lfq", "kmeans", "hash")
LIBRARY = NAMES[:3]
PICTURES = to_float(Digits("val").images[:40])


def few_digits():
    return ImageDataset(40, Digits("val").images.__getitem__, name="few digits")


def started(name, vocab_size=32):
    torch.manual_seed(0)
    vae = quantized_vae(name, vocab_size, 8, 4, 16)
    start_quantizer(vae, PICTURES)
    return vae


def recipe(name, out, **changes):
    small = dict(width=16, vocab_size=32, steps=4, batch_size=8, log_every=2, precision="fp32")
    return recipe_named("tokenizer", "nano", quantizer=name, out=str(out), **small | changes)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(tokenizer, "open_data", lambda data: few_digits())


# --- what each computes


@pytest.mark.parametrize("bits", range(2, 15))
def test_fsq_speaks_exactly_the_alphabet(bits):
    levels = fsq_levels(2**bits)
    assert prod(levels) == 2**bits and set(levels) <= {4, 8} and sorted(levels)[::-1] == levels


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_pictures_have_their_shapes_and_ranges(name):
    vae = started(name)
    quantized_loss(vae, PICTURES)  # vq finds its codebook in the first batch

    ids = vae.get_codebook_indices(PICTURES)
    painted = vae.decode(ids)

    assert isinstance(vae, BaseDiscreteVAE)
    assert ids.shape == (40, 8, 8) and ids.dtype == torch.int64
    assert 0 <= ids.min() and ids.max() < 32 and len(ids.unique()) > 3
    assert painted.shape == PICTURES.shape and 0 <= painted.min() and painted.max() <= 1
    assert torch.equal(ids, vae.get_codebook_indices(PICTURES))  # the same each time


@pytest.mark.parametrize("name", LIBRARY)
def test_what_the_decoder_gets_in_training_are_the_rows_of_the_ids(name):
    vae = started(name)
    vae.reconstruct(PICTURES)
    vae.eval()

    stats, ids, _ = vae.reconstruct(PICTURES)

    torch.testing.assert_close(stats, vae.decode_stats(ids), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", LIBRARY)
def test_the_gradient_passes_the_choice(name):
    vae = started(name)

    quantized_loss(vae, PICTURES)[0].backward()

    for half in (vae.encoder, vae.decoder):
        assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in half.parameters())


def test_a_look_at_the_ids_moves_no_codebook():
    vae = started("vq").train()
    vae.reconstruct(PICTURES)
    before = {k: v.clone() for k, v in vae.state_dict().items()}

    evaluate_tokenizer(vae, PICTURES)

    assert all(torch.equal(v, before[k]) for k, v in vae.state_dict().items())
    assert vae.quantizer.training


def test_stamps_by_hand():
    vae = started("kmeans")
    cells = patchify(2 * PICTURES[:2] - 1, 4)  # (2, 64, 48)

    ids = vae.get_codebook_indices(PICTURES[:2]).flatten(1)

    for b in range(2):
        for i in range(64):
            far = (vae.stamps - cells[b, i]).square().sum(1)
            assert far[ids[b, i]] <= far.min() * (1 + 1e-5) + 1e-9
    start = PatchStamps(32, 4)
    assert not torch.equal(vae.stamps, start.stamps)
    assert evaluate_tokenizer(vae, PICTURES)["mse"] < 0.3 * PICTURES.var()


def test_a_stamp_moves_towards_the_cells_that_chose_it_and_no_other_does():
    vae = started("kmeans")
    ids = vae.get_codebook_indices(PICTURES)

    quantized_loss(vae, PICTURES)[0].backward()

    cells = vae.cells(PICTURES).flatten(0, 1)
    for v in range(32):
        mine = cells[ids.flatten() == v]
        if len(mine):
            pull = (mine - vae.stamps[v]).mean(0)
            against = torch.dot(pull, vae.stamps.grad[v])
            assert against <= 0
        else:
            assert vae.stamps.grad[v].abs().max() == 0


def test_the_hash_is_the_best_of_random_directions_and_paints_means():
    vae = started("hash")
    cells = vae.cells(PICTURES).flatten(0, 1)

    ids = vae.get_codebook_indices(PICTURES).flatten()

    assert torch.equal(ids, (cells @ vae.directions).argmax(1))
    for v in ids.unique()[:5]:
        torch.testing.assert_close(vae.stamps[v], cells[ids == v].mean(0), atol=1e-5, rtol=0)
    assert torch.equal(PatchHash(32, 4).directions, vae.directions)  # the same for everybody


# --- runs


@pytest.mark.parametrize("name", NAMES)
def test_every_one_trains_resumes_and_loads(few, tmp_path, name):
    whole = train_tokenizer(recipe(name, tmp_path / "whole"), quiet=True)
    train_tokenizer(recipe(name, tmp_path / "halves", max_steps=2), quiet=True)
    halves = train_tokenizer(recipe(name, tmp_path / "halves"), quiet=True)
    loaded = load_tokenizer(tmp_path / "halves")

    for key, value in whole.state_dict().items():
        assert torch.equal(value, halves.state_dict()[key]), key
        assert torch.equal(value, loaded.state_dict()[key]), key
    ids = whole.get_codebook_indices(PICTURES)
    assert torch.equal(ids, loaded.get_codebook_indices(PICTURES))
    assert torch.equal(whole.decode(ids), loaded.decode(ids))
    assert read_metrics(tmp_path / "whole")["codes_used"] >= 1
    logged = set().union(*read_log(tmp_path / "whole"))
    assert {"mse", "perplexity", "nll", "choice", "hard_mse"} <= logged


def test_pre_training_takes_them_like_any_other(few, tmp_path, monkeypatch):
    train_tokenizer(recipe("hash", tmp_path / "tok"), quiet=True)
    monkeypatch.setattr("beit_nb.pretraining.open_data", lambda data: few_digits())
    small = dict(vocab_size=32, embed_dim=32, num_heads=2, depth=1, batch_size=8, steps=2)

    model = pretrain(
        recipe_named(
            "pretrain", "nano", tokenizer=f"{tmp_path}/tok", out=f"{tmp_path}/pre", **small
        ),
        quiet=True,
    )

    assert model.lm_head.out_features == 32
    assert list((tmp_path / "pre" / "watch").glob("*.png"))


# --- bad input


@pytest.mark.parametrize("name", LIBRARY)
def test_without_the_library_one_line_says_what_to_install(few, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)

    with pytest.raises(BeitError, match=r"pip install 'beit_nb\[quantizers\]'") as e:
        train_tokenizer(recipe(name, tmp_path / "out"), quiet=True)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["kmeans", "hash"])
def test_stamps_and_hash_need_no_library(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    assert not isinstance(started(name), QuantizedVAE)


def test_too_few_cells_for_so_many_stamps():
    with pytest.raises(BeitError, match="64 cells cannot start 100 stamps"):
        start_quantizer(PatchStamps(100, 4), PICTURES[:1])


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("fsq", dict(vocab_size=100), "fsq needs vocab_size 4, 8, 16"),
        ("lfq", dict(vocab_size=100), "lfq needs vocab_size 4, 8, 16"),
        ("fsq", dict(vocab_size=2), "a power of 2"),
        ("vq", dict(logits="linear"), "quantizer vq has arch small, logits distance"),
        ("kmeans", dict(likelihood="laplace"), "likelihood normal"),
        ("hash", dict(compile=True), "no network to compile"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, name, changes, words):
    with pytest.raises(BeitError, match=words):
        check_recipe(recipe(name, tmp_path, **changes))
