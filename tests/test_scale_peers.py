"The peers compute the same as ours, logits, gradients, token ids; their dice obey the same law."

import random
import sys

import numpy as np
import pytest
import torch
from helpers_dalle import published, small_dalle
from helpers_models import FORMS, SIZE, a_batch, gradients, shaken
from torch.testing import assert_close
from torchvision.transforms import RandomResizedCrop

from beit_nb.dalle import DalleEncoder, DalleVAE
from beit_nb.device import set_matmul_precision
from beit_nb.dvae import map_pixels
from beit_nb.engine.winograd import optimize_for_inference
from beit_nb.images import house_pictures, to_pil
from beit_nb.masking import blockwise_mask, blockwise_masks
from beit_nb.mim import BeitForMaskedImageModeling, masked_indices, mim_loss
from beit_nb.scale.peers import (
    BASE_SHAPE,
    BEIT_PLUS,
    TINY_SHAPE,
    OfficialStyle,
    OfficialViews,
    add_block,
    hugging_face,
    masks_on_device,
    official_box,
    official_drop_path,
    official_mask,
    official_tokens,
)


def loss_gradients(model, logits, targets):
    model.zero_grad()
    mim_loss(logits, targets).backward()
    return gradients(model)


@pytest.mark.slow
def test_the_base_model_equals_the_official_style_in_fp32():
    """BEiT-B/16 at full size, one picture: logits to 1e-5, gradients to 1e-5 of their length.

    With the matrix products that `set_matmul_precision` chooses for large models, and without.
    """
    torch.manual_seed(0)
    ours = BeitForMaskedImageModeling(**BASE_SHAPE | dict(drop_path_rate=0.0), **BEIT_PLUS)
    theirs = OfficialStyle(ours)
    images = torch.randn(1, 3, 224, 224)
    mask = blockwise_masks(1).flatten(1)
    targets = torch.randint(0, 8192, (int(mask.sum()),))
    want = theirs(images, mask)
    want_gradients = loss_gradients(theirs, want, targets)
    before = torch.get_float32_matmul_precision()
    try:
        for width in (768, 64):
            set_matmul_precision("cpu", width)
            got = ours(images, mask)
            gap = loss_gradients(ours, got, targets) - want_gradients

            assert_close(got, want, atol=1e-5, rtol=0)
            assert gap.norm() <= 1e-5 * want_gradients.norm()
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("form", [f for f in FORMS if "per block" not in f and f != "everything"])
def test_a_small_model_equals_the_official_style(form):
    ours = shaken(BeitForMaskedImageModeling(vocab_size=50, **SIZE, **FORMS[form]))
    theirs = OfficialStyle(ours)
    images, mask = a_batch()
    mask = mask.flatten(1)
    targets = torch.randint(0, 50, (int(mask.sum()),))

    got, want = ours(images, mask), theirs(images, mask)
    gap = loss_gradients(ours, got, targets) - loss_gradients(theirs, want, targets)

    assert_close(got, want, atol=2e-5, rtol=1e-5)
    assert gap.norm() <= 1e-5 * gradients(theirs).norm()


def test_hidden_cells_are_those_of_the_flattened_mask():
    mask = torch.tensor([[True, False, False], [False, True, True]])

    moved, masked_index = masks_on_device(mask, torch.device("cpu"))

    assert torch.equal(moved, mask) and masked_index.tolist() == [0, 4, 5]


def test_the_official_drop_path_keeps_the_mean():
    ones = torch.ones(20_000, 1, 1)

    dropped = official_drop_path(ones, 0.3)

    assert_close(dropped.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert abs((dropped == 0).float().mean() - 0.3) < 0.02 and abs(dropped.mean() - 1) < 0.03
    assert official_drop_path(ones, 0.0) is ones and official_drop_path(ones, 0.3, False) is ones


@pytest.mark.slow
def test_tokens_at_full_size_equal_the_published_code():
    torch.manual_seed(0)
    encoder = DalleEncoder().requires_grad_(False)
    theirs = pytest.importorskip("dall_e").Encoder()
    theirs.load_state_dict(encoder.state_dict())
    images = torch.rand(2, 3, 112, 112)
    masked_index = masked_indices(blockwise_masks(2))

    with torch.no_grad():
        want = theirs(map_pixels(images)).argmax(1)
        plain = official_tokens(encoder, images)
        ours = optimize_for_inference(DalleVAE(encoder))
        ids, hidden = ours.get_codebook_indices(images), ours.indices_at(images, masked_index)
        half = optimize_for_inference(ours, torch.bfloat16).get_codebook_indices(images)

    assert torch.equal(plain, want) and torch.equal(ids, want)
    assert torch.equal(hidden, want.flatten()[masked_index])
    assert (half == want).float().mean() > 0.99  # near-ties may flip


def test_tokens_of_a_small_encoder():
    theirs = published()[0]
    encoder = DalleEncoder(n_hid=64, vocab_size=512)
    encoder.load_state_dict(theirs.state_dict())
    images = house_pictures(64)

    with torch.no_grad():
        assert torch.equal(official_tokens(encoder, images), theirs(map_pixels(images)).argmax(1))
        dvae = small_dalle()
        want = dvae.get_codebook_indices(images)
        assert torch.equal(official_tokens(dvae.encoder, images), want)


def test_hugging_face_has_our_shape():
    pytest.importorskip("transformers")
    hf = hugging_face(**TINY_SHAPE)
    ours = BeitForMaskedImageModeling(**TINY_SHAPE, **BEIT_PLUS)
    images, mask = a_batch()

    logits = hf(images, bool_masked_pos=mask.flatten(1)).logits

    assert sum(map(torch.numel, hf.parameters())) == sum(map(torch.numel, ours.parameters()))
    assert logits.shape == (3, 64, 64)


def test_without_hugging_face_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(ValueError, match="pip install transformers"):
        hugging_face(**TINY_SHAPE)


def test_masks_obey_the_same_law():
    random.seed(0)
    rng = np.random.default_rng(0)
    official = np.array([official_mask() for _ in range(2000)])
    ours = np.array([blockwise_mask(rng=rng) for _ in range(2000)])
    counts = official.sum((1, 2)), ours.sum((1, 2))

    assert max(c.max() for c in counts) == 75
    assert abs(counts[0].mean() - counts[1].mean()) < 0.15
    assert abs(official.mean(0) - ours.mean(0)).max() < 0.06


def test_a_block_never_hides_more_than_it_may():
    random.seed(0)
    for room in (1, 16, 40):
        mask = np.zeros((14, 14), bool)
        before = mask.copy()
        new = add_block(mask, room, least=1, aspect=0.3)
        assert 0 < new == (mask & ~before).sum() <= room
    assert add_block(np.ones((14, 14), bool), 16, 16, 0.3) == 0


def test_views(tmp_path):
    file = tmp_path / "photo.jpg"
    to_pil(house_pictures(300)[0]).save(file)

    patch_view, token_view, mask = OfficialViews(size=64, token_size=32)(file)

    assert patch_view.shape == (3, 64, 64) and token_view.shape == (3, 32, 32)
    assert mask.shape == (14, 14) and 0.099 < token_view.min() < token_view.max() < 0.901


def test_boxes_obey_torchvisions_law():
    random.seed(0)
    torch.manual_seed(0)
    picture = torch.empty(3, 375, 500)
    limits = (0.08, 1.0), (3 / 4, 4 / 3)
    ours = np.array([official_box(500, 375) for _ in range(4000)])
    theirs = np.array([RandomResizedCrop.get_params(picture, *limits) for _ in range(4000)])

    assert (ours >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= 375).all() and (ours[:, 1] + ours[:, 3] <= 500).all()
    assert (abs(ours.mean(0) - theirs.mean(0)) < 0.05 * theirs.mean(0) + 2).all()
    assert (abs(ours.std(0) - theirs.std(0)) < 0.05 * theirs.std(0) + 1).all()
    assert official_box(1, 1000) == (499, 0, 1, 1)  # too narrow for any draw
