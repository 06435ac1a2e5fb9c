"The targets of pre-training: a tokenizer that runs or a table, and what does not belong together."

from dataclasses import replace

import pytest
import torch

from beit_nb import BeitError
from beit_nb.dalle import DalleEncoder, DalleVAE
from beit_nb.data import open_data
from beit_nb.engine.augment import TwoViews
from beit_nb.engine.loading import TransformedDataset, collate
from beit_nb.engine.sources import Digits
from beit_nb.engine.token_files import tokenize_files
from beit_nb.images import to_float, to_pil
from beit_nb.pretraining import PretrainTransform, add_masked_indices
from beit_nb.recipes import recipe_named
from beit_nb.targets import (
    TableTargets,
    TokenizerTargets,
    build_targets,
    check_tokenizer,
    decoder_of,
    tabulate,
    tokenize_dataset,
)
from beit_nb.tokenizer import load_tokenizer, save_dalle, train_tokenizer

PICTURES = 24
FIXED = TwoViews(32)


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    "A folder with a tokenizer of two steps, tok, and 24 digits as files, pictures."
    top = tmp_path_factory.mktemp("targets")
    small = dict(width=16, vocab_size=32, steps=2, batch_size=8, precision="fp32")
    train_tokenizer(recipe_named("tokenizer", "nano", out=f"{top}/tok", **small), quiet=True)
    (top / "pictures").mkdir()
    for i, image in enumerate(Digits("train").images[:PICTURES]):
        to_pil(to_float(image)).save(top / "pictures" / f"{i:02d}.png")
    return top


@pytest.fixture
def pictures(top):
    return open_data(str(top / "pictures"))


@pytest.fixture(scope="module")
def tokenizer(top):
    return load_tokenizer(top / "tok")


def recipe(top, **changes):
    return recipe_named("pretrain", "nano", tokenizer=f"{top}/tok", vocab_size=32, **changes)


def a_batch(pictures, r):
    samples = TransformedDataset(pictures, PretrainTransform(r), r.seed)
    batch, _ = collate([samples[i] for i in range(0, PICTURES, 3)])
    return add_masked_indices(batch)[0]


def test_both_sources_give_the_tokens_of_the_hidden_patches(top, pictures, tokenizer):
    table = tokenize_dataset(tokenizer, pictures, FIXED, batch_size=7)
    batch = a_batch(pictures, recipe(top))
    ids = tokenizer.get_codebook_indices(to_float(batch.token_view))
    assert len(ids.unique()) > 4  # else any mistake would pass

    for targets in (TokenizerTargets(tokenizer), TableTargets(table)):
        assert torch.equal(targets.hidden(batch), ids[batch.mask])
        assert torch.equal(targets.all(batch.token_view, batch.number), ids)


def test_a_table_has_a_row_for_every_picture(pictures, tokenizer):
    table = tokenize_dataset(tokenizer, pictures, FIXED, batch_size=10)

    by_hand = [tokenizer.get_codebook_indices(to_float(pictures.pixels(i)[None])) for i in range(9)]
    assert table.shape == (PICTURES, 8, 8)
    assert torch.equal(table[:9], torch.cat(by_hand))


def test_an_unreadable_picture_is_excluded(top, tokenizer, tmp_path, capsys):
    "Its row holds the ids of the next one, so nobody may ever train on it."
    for i, file in enumerate(sorted((top / "pictures").glob("*.png"))[:4]):
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 99 if i == 2 else None])
    damaged = open_data(str(tmp_path))

    table = tokenize_dataset(tokenizer, damaged, FIXED)

    assert list(damaged.excluded) == [2]
    assert torch.equal(table[2], table[3])
    assert "02.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(token_size=16), "--token-size 32"),
        (dict(token_size=34), "8.5 tokens"),
        (dict(patch_size=8), "--token-size 16"),
        (dict(vocab_size=8192), "--vocab-size 32"),
    ],
)
def test_grids_and_alphabets_that_differ_are_refused(top, tokenizer, wrong, says):
    check_tokenizer(recipe(top), tokenizer)

    with pytest.raises(BeitError, match=says):
        check_tokenizer(replace(recipe(top), **wrong), tokenizer)


@pytest.fixture(scope="module")
def tokens(top, tokenizer):
    tokenize_files(open_data(str(top / "pictures")), tokenizer, top / "tokens")
    return str(top / "tokens")


def test_targets_from_token_files(top, pictures, tokenizer, tokens):
    targets = build_targets(recipe(top, tokens=tokens), pictures, FIXED)

    assert isinstance(targets, TableTargets)
    assert torch.equal(targets.table.long(), tokenize_dataset(tokenizer, pictures, FIXED))
    assert targets.tokenizer.vocab_size == 32  # it only decodes, for the running pictures
    unwatched = recipe(top, tokens=tokens, watch_every=None)
    assert build_targets(unwatched, pictures, FIXED).tokenizer is None


@pytest.mark.parametrize(
    "changes, views, says",
    [
        (dict(vocab_size=64), FIXED, "vocab_size 32 there, 64 here"),
        (dict(token_size=64), FIXED, "token_size 32 there, 64 here"),
        (dict(), TwoViews(32, flip=0.5), "look the same in every epoch"),
        (dict(), TwoViews(32, color_jitter=0.4), "look the same in every epoch"),
    ],
)
def test_token_files_of_something_else_are_refused(top, pictures, tokens, changes, views, says):
    r = replace(recipe(top, tokens=tokens), **changes)

    with pytest.raises(BeitError, match=says):
        build_targets(r, pictures, views)


def test_token_files_are_judged_before_they_are_read(top, pictures, tokens, monkeypatch):
    "Fourteen million rows are not read to say that they do not fit; views that change come first."
    from beit_nb import targets

    monkeypatch.setattr(targets, "load_tokens", None)  # who reads, fails
    r = recipe(top, tokens=tokens)
    with pytest.raises(BeitError, match="vocab_size 32 there, 512 here"):
        build_targets(replace(r, vocab_size=512), pictures, FIXED)
    moving = TwoViews(r.img_size, r.token_size, flip=0.5)
    with pytest.raises(BeitError, match="look the same in every epoch"):
        build_targets(replace(r, vocab_size=512), pictures, moving)


def test_token_files_of_other_pictures_are_refused(top, tokens):
    with pytest.raises(BeitError, match="pictures 24 there, 400 here"):
        build_targets(recipe(top, tokens=tokens), open_data("digits", "val"), FIXED)


def test_without_any_source_it_says_which_option(top, pictures):
    with pytest.raises(BeitError, match="needs --tokenizer"):
        build_targets(replace(recipe(top), tokenizer=""), pictures, FIXED)


def test_a_tokenizer_becomes_a_table_only_where_views_are_fixed(top, pictures):
    targets = build_targets(recipe(top), pictures, FIXED)

    table = tabulate(targets, pictures, FIXED)

    assert isinstance(targets, TokenizerTargets)
    assert tabulate(targets, pictures, TwoViews(32, flip=0.5)) is targets
    assert isinstance(table, TableTargets) and table.tokenizer is targets.tokenizer
    assert tabulate(table, pictures, FIXED) is table


def test_who_decodes(top, tmp_path):
    "The recipe's tokenizer, if it is there still, fits, and has a decoder."
    save_dalle(DalleVAE(DalleEncoder(3, 8, 1, vocab_size=32)), tmp_path / "blind.safetensors")

    assert decoder_of(recipe(top)).vocab_size == 32
    assert decoder_of(replace(recipe(top), tokenizer="")) is None
    assert decoder_of(replace(recipe(top), tokenizer=str(tmp_path / "gone"))) is None
    assert decoder_of(replace(recipe(top), vocab_size=64)) is None
    blind = replace(recipe(top), tokenizer=str(tmp_path / "blind.safetensors"))
    assert load_tokenizer(blind.tokenizer).vocab_size == 32
    assert decoder_of(blind) is None
