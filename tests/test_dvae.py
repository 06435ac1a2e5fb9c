"""beit_nb.dvae away from its lesson: all four kinds, mixed precision, seeds and refusals."""

import pytest
import torch
import torch.nn.functional as F

from beit_nb.dvae import (
    DiscreteVAE,
    distance_logits,
    dvae_loss,
    init_codes,
    logit_laplace_nll,
    map_pixels,
    unmap_pixels,
)

KINDS = [(a, b) for a in ("distance", "linear") for b in ("normal", "laplace")]


def small(logits="distance", likelihood="normal", **size):
    torch.manual_seed(0)
    size = dict(vocab_size=16, code_dim=8, downsample=4, width=16) | size
    return DiscreteVAE(**size, logits=logits, likelihood=likelihood)


def random_images(B=3, H=16, W=16):
    return torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("downsample", [2, 4, 8, 16])
@pytest.mark.parametrize("logits, likelihood", KINDS)
def test_shapes_of_every_kind_on_a_wide_picture(downsample, logits, likelihood):
    model = small(logits, likelihood, downsample=downsample)
    images = random_images(2, 32, 64)

    ids = model.get_codebook_indices(images)
    stats = model.decode_stats(ids)

    assert ids.shape == (2, 32 // downsample, 64 // downsample)
    assert stats.shape == (2, 6 if likelihood == "laplace" else 3, 32, 64)
    assert model.decode(ids).shape == model.nll(stats, images).shape == images.shape
    assert model.has_decoder


@pytest.mark.parametrize("logits, likelihood", KINDS)
def test_every_kind_learns(logits, likelihood):
    model = small(logits, likelihood)
    images = random_images(8)
    if logits == "distance":
        init_codes(model, images)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(20):
        torch.manual_seed(0)
        loss, parts = dvae_loss(model, images, tau=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < losses[0]
    assert parts.keys() == {"nll", "kl", "mse", "perplexity"}
    assert 1 <= parts["perplexity"] <= 16


def test_the_loss_is_its_parts():
    model = small()
    images = random_images()
    noise = torch.randn(3, 16, 4, 4)

    loss, parts = dvae_loss(model, images, 0.7, kl_weight=2.0, usage_weight=0.3, noise=noise)

    deficit = 1 - parts["perplexity"].log() / torch.tensor(16.0).log()
    expected = parts["nll"] + 2 * parts["kl"] / (3 * 4 * 4) + 0.3 * deficit
    torch.testing.assert_close(loss, expected)


def test_ids_at_some_cells():
    model = small()
    images = random_images()
    where = torch.tensor([0, 5, 16, 47])

    some = model.indices_at(images, where)

    assert torch.equal(some, model.get_codebook_indices(images).flatten()[where])


def test_distances_multiplied_out_are_distances():
    g = torch.Generator().manual_seed(0)
    f = torch.randn(2, 8, 3, 5, generator=g, dtype=torch.float64)
    codebook = torch.randn(16, 8, generator=g, dtype=torch.float64)

    scores = distance_logits(f, codebook)

    differences = f[:, None] - codebook[None, :, :, None, None]  # (B, V, D, h, w)
    torch.testing.assert_close(scores, -differences.square().sum(2))


def test_scores_are_fp32_under_autocast():
    model = small()

    with torch.autocast("cpu", torch.bfloat16):
        scores = model.logits(random_images())

    assert scores.dtype == torch.float32


def test_unused_tokens_leave_the_gradient_finite():
    model = small()
    with torch.no_grad():
        model.codebook[1:] += 1000  # only token 0 is near any cell

    loss, parts = dvae_loss(model, random_images(), usage_weight=1.0)
    loss.backward()

    assert parts["perplexity"] < 1.01
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_codes_start_on_the_same_cells_for_the_same_seed():
    images = random_images(8)
    books = []
    for seed in (0, 0, 1):
        model = small()
        init_codes(model, images, seed)
        books.append(model.codebook.detach().clone())

    assert torch.equal(books[0], books[1])
    assert not torch.equal(books[0], books[2])
    assert len(books[0].unique(dim=0)) == 16


def test_linear_scores_have_no_codes_to_start():
    model = small("linear")
    before = {k: v.clone() for k, v in model.state_dict().items()}

    init_codes(model, random_images())

    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_laplace_density_integrates_to_one_and_pixels_come_back():
    u = torch.linspace(-30, 30, 100_001, dtype=torch.float64)
    x = u.sigmoid()

    for mu, b in ((0.0, 1.0), (2.0, 0.3)):
        mu, b = torch.tensor([mu, b]).double()
        density = (-logit_laplace_nll(x, mu, b.log())).exp()
        assert abs(torch.trapezoid(density, x) - 1) < 1e-3
    pixels = torch.rand(100)
    torch.testing.assert_close(unmap_pixels(map_pixels(pixels)), pixels)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: DiscreteVAE(logits="cosine"), "choose 'distance' or 'linear'"),
        (lambda: DiscreteVAE(likelihood="mse"), "'normal' or 'laplace'"),
        (lambda: DiscreteVAE(downsample=3), "not one of 2, 4, 8, 16"),
        (lambda: small().logits(torch.rand(3, 16, 16)), "shape (B, 3, H, W)"),
        (lambda: small().logits(torch.zeros(1, 3, 16, 16).byte()), "floats in [0, 1]"),
        (lambda: small().logits(torch.rand(1, 3, 16, 18)), "16x18 pixels do not divide"),
        (lambda: init_codes(small(), torch.rand(1, 3, 8, 8)), "4 cells cannot start 16 codes"),
    ],
)
def test_refusals_name_the_fault(call, said):
    with pytest.raises(ValueError) as e:
        call()
    assert said in str(e.value)
    assert "\n" not in str(e.value)


def test_one_hots_paint_what_ids_paint():
    model = small("linear", "laplace")
    ids = torch.randint(16, (2, 4, 4))

    from_ids = model.decode_stats(ids)
    from_one_hots = model.decode_stats(F.one_hot(ids, 16).permute(0, 3, 1, 2).float())

    torch.testing.assert_close(from_ids, from_one_hots, atol=1e-5, rtol=0)
