"""DALL-E's dVAE against the published package, and other sizes and wrong input."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from helpers_dalle import published, random_images, refusal, small_dalle

from beit_nb.dalle import DalleBlock, DalleDecoder, DalleEncoder, DalleVAE
from beit_nb.dvae import BaseDiscreteVAE, DiscreteVAE, dvae_loss, map_pixels
from beit_nb.engine.winograd import optimize_for_inference


def one_hots(ids, V):
    return F.one_hot(ids, V).permute(0, 3, 1, 2).float()


@pytest.mark.slow
@pytest.mark.parametrize(
    "n_hid, n_init, n_blk, V",
    [(64, 32, 2, 512), (96, 8, 1, 1000), (64, 128, 3, 2048), (128, 16, 2, 700)],
)
@pytest.mark.parametrize("fast", [False, True])
def test_equal_to_the_published_package(n_hid, n_init, n_blk, V, fast):
    theirs = published(n_hid, n_init, n_blk, V)
    ours = DalleVAE(
        DalleEncoder(n_hid=n_hid, n_blk_per_group=n_blk, vocab_size=V),
        DalleDecoder(n_init=n_init, n_hid=n_hid, n_blk_per_group=n_blk, vocab_size=V),
    )
    ours.encoder.load_state_dict(theirs[0].state_dict())
    ours.decoder.load_state_dict(theirs[1].state_dict())
    if fast:
        optimize_for_inference(ours)
    images = random_images(3, 48)

    with torch.no_grad():
        scores = theirs[0](map_pixels(images))
        ids = scores.argmax(1)
        stats = theirs[1](one_hots(ids, V))
        blended = theirs[1](scores.softmax(1))
        our_scores = ours.logits(images)
        our_stats = ours.decode_stats(ids)
        from_one_hots = ours.decode_stats(one_hots(ids, V))
        our_blended = ours.decode_stats(scores.softmax(1))
    with torch.enable_grad():  # here the encoder does not go through the batch in small parts
        all_at_once = ours.logits(images).detach()

    assert torch.equal(our_scores.argmax(1), ids)
    for mine, wanted in (
        (our_scores, scores),
        (all_at_once, scores),
        (our_stats, stats),
        (from_one_hots, stats),
        (our_blended, blended),
    ):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=0)


def test_pixels_are_those_of_the_published_package():
    dall_e = pytest.importorskip("dall_e")
    model = small_dalle()
    stats = model.decode_stats(torch.arange(16).view(1, 4, 4))

    torch.testing.assert_close(
        model.pixels(stats), dall_e.unmap_pixels(stats[:, :3].sigmoid()), atol=1e-6, rtol=0
    )


def test_the_published_sizes():
    with torch.device("meta"):
        encoder = DalleEncoder()
        decoder = DalleDecoder()

    for net, parameters, tensors in ((encoder, 53_786_240, 74), (decoder, 43_829_766, 76)):
        assert sum(p.numel() for p in net.parameters()) == parameters
        assert len(net.state_dict()) == tensors
        assert all(m.post_gain == 1 / 64 for m in net.modules() if isinstance(m, DalleBlock))
    assert encoder.state_dict()["blocks.input.w"].shape == (256, 3, 7, 7)
    shortcut = decoder.state_dict()["blocks.group_4.block_1.id_path.w"]
    assert shortcut.shape == (256, 512, 1, 1)


@pytest.mark.parametrize(
    "batch, size", [(1, (8, 8)), (17, (8, 8)), (65, (8, 8)), (2, (16, 40)), (17, (112, 112))]
)
def test_few_at_a_time_is_all_at_once(batch, size):
    net = small_dalle().encoder
    x = torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        few = net(x)
    all_at_once = net(x).detach()

    torch.testing.assert_close(few, all_at_once, atol=1e-5, rtol=0)
    assert torch.equal(few.argmax(1), all_at_once.argmax(1))


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("grad", [True, False])
def test_other_depths_of_the_network(groups, grad):
    model = small_dalle(group_count=groups)
    images = random_images(2, 16)
    side = 16 // 2 ** (groups - 1)

    with torch.set_grad_enabled(grad):
        ids = model.get_codebook_indices(images)
        painted = model.decode(ids)

    assert ids.shape == (2, side, side)
    assert painted.shape == images.shape


def test_the_head_runs_only_where_it_is_asked():
    model = small_dalle()
    images = random_images()
    where = torch.tensor([0, 3, 64, 100, 191])

    some = model.indices_at(images, where)

    assert torch.equal(some, model.get_codebook_indices(images).flatten()[where])


def test_it_has_the_interface_of_our_own_dvae():
    public = [name for name in vars(BaseDiscreteVAE) if not name.startswith("_")]
    methods = [n for n in public if inspect.isfunction(getattr(BaseDiscreteVAE, n))]
    model = small_dalle()

    assert {"logits", "decode_stats", "indices_at", "nll"} <= set(methods)
    for name in methods:
        ours = inspect.signature(getattr(DiscreteVAE, name))
        assert inspect.signature(getattr(DalleVAE, name)) == ours, name
    assert (model.vocab_size, model.downsample, model.likelihood) == (64, 8, "laplace")
    assert model.has_decoder and not DalleVAE(model.encoder).has_decoder


@pytest.mark.slow
def test_it_trains_with_our_loss_also_in_bf16():
    model = small_dalle()
    images = random_images(2, 32)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = dvae_loss(model, images, kl_weight=0.0)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ids = model.get_codebook_indices(images)

    assert losses[-1] < losses[0]
    assert ids.shape == (2, 4, 4)


def test_wrong_pictures_are_named():
    model = small_dalle()

    assert "60x60 pixels do not divide" in refusal(model.logits, random_images(1, 60))
    levels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    assert "floats in [0, 1]" in refusal(model.logits, levels)
    assert "(B, 3, H, W)" in refusal(model.logits, torch.rand(3, 64, 64))


def test_wrong_pairs_and_missing_halves_are_named():
    model = small_dalle()
    other = DalleDecoder(n_init=8, n_hid=16, vocab_size=32)

    assert "do not belong together" in refusal(DalleVAE, model.encoder, other)
    assert "do not belong together" in refusal(DalleVAE)
    assert "multiple of 4" in refusal(lambda: DalleEncoder(n_hid=6))
    blind = DalleVAE(decoder=model.decoder)
    assert "load encoder.pkl" in refusal(blind.logits, random_images())
    assert "load encoder.pkl" in refusal(blind.indices_at, random_images(), torch.tensor([0]))
    reader = DalleVAE(model.encoder)
    assert "load decoder.pkl" in refusal(reader.decode, torch.zeros(1, 2, 2, dtype=torch.int64))
