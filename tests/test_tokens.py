"""Tokenizer and codebook_usage: frozen, exact under autocast, equal for both kinds of dVAE."""

import pytest
import torch
from helpers_dalle import random_images, refusal, small_dalle

from beit_nb.dalle import DalleVAE
from beit_nb.dvae import DiscreteVAE
from beit_nb.tokens import Tokenizer, codebook_usage

MAKERS = {"ours": lambda: DiscreteVAE(64, downsample=8, width=16), "DALL-E's": small_dalle}


@pytest.fixture(params=MAKERS)
def tokenizer(request):
    return Tokenizer(MAKERS[request.param](), img_size=64)


def test_it_never_trains(tokenizer):
    ids = tokenizer.get_codebook_indices(random_images())
    painted = tokenizer.decode(ids)

    assert not tokenizer.dvae.training
    assert not any(p.requires_grad for p in tokenizer.parameters())
    assert not painted.requires_grad


def test_both_kinds_say_the_same_things(tokenizer):
    ids = tokenizer.get_codebook_indices(random_images())
    painted = tokenizer.decode(ids)

    assert (tokenizer.vocab_size, tokenizer.downsample, tokenizer.img_size) == (64, 8, 64)
    assert tokenizer.has_decoder
    assert ids.dtype == torch.int64
    assert ids.shape == (3, 8, 8)
    assert painted.shape == (3, 3, 64, 64)
    assert 0 <= painted.min() and painted.max() <= 1


def test_precision_around_it_changes_no_token(tokenizer):
    images = random_images()
    where = torch.arange(0, 192, 7)
    ids = tokenizer.get_codebook_indices(images)

    with torch.autocast("cpu", torch.bfloat16):
        again = tokenizer.get_codebook_indices(images)
        some = tokenizer.indices_at(images, where)
    doubles = tokenizer.get_codebook_indices(images.double())

    assert torch.equal(again, ids)
    assert torch.equal(some, ids.flatten()[where])
    assert torch.equal(doubles, ids)


def test_an_encoder_alone_reads_and_says_that_it_cannot_paint():
    tokenizer = Tokenizer(DalleVAE(small_dalle().encoder))
    ids = tokenizer.get_codebook_indices(random_images())

    assert not tokenizer.has_decoder
    assert "load decoder.pkl" in refusal(tokenizer.decode, ids)


def test_refusals_name_the_fault(tokenizer):
    levels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    ids = torch.zeros(1, 8, 8, dtype=torch.int64)

    assert "pass floats in [0, 1]" in refusal(tokenizer.get_codebook_indices, levels)
    assert "pass floats in [0, 1]" in refusal(tokenizer.indices_at, levels, torch.tensor([0]))
    assert "shape (B, h, w)" in refusal(tokenizer.decode, ids[0])
    assert "pass integers" in refusal(tokenizer.decode, ids.float())
    assert "no token 64" in refusal(tokenizer.decode, ids + 64)
    assert "no token -1" in refusal(tokenizer.decode, ids - 1)


def test_usage_of_one_token_of_all_and_of_unequal_shares():
    one = codebook_usage(torch.full((2, 3, 3), 7), 10)
    even = codebook_usage(torch.arange(10).repeat(3), 10)
    uneven = codebook_usage(torch.tensor([0, 0, 1]), 10)

    assert (one["codes_used"], one["perplexity"]) == (1, 1.0)
    assert one["counts"].tolist() == [0] * 7 + [18] + [0] * 2
    assert even["codes_used"] == 10
    assert even["perplexity"] == pytest.approx(10, rel=1e-5)
    assert uneven["perplexity"] == pytest.approx(3 / 2 ** (2 / 3), rel=1e-5)
