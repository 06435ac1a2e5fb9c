"""beit_nb.patches away from its lesson: against timm, on other grids, and what is refused."""

import pytest
import timm
import torch

from beit_nb.patches import PatchEmbed, patchify, unpatchify


@pytest.mark.parametrize("shape, P", [((1, 3, 4, 4), 4), ((2, 1, 6, 9), 3), ((3, 5, 8, 2), 1)])
def test_there_and_back_for_any_grid(shape, P):
    x = torch.rand(shape)

    patches = patchify(x, P)

    assert patches.shape == (shape[0], shape[2] * shape[3] // P**2, P**2 * shape[1])
    assert torch.equal(unpatchify(patches, P, (shape[2] // P, shape[3] // P)), x)


def test_gradients_come_back_to_their_pixels():
    x = torch.rand(1, 3, 8, 8, requires_grad=True)

    patchify(x, 4)[0, 2].sum().backward()

    expected = torch.zeros(8, 8)
    expected[4:, :4] = 1
    assert torch.equal(x.grad[0], expected.expand(3, 8, 8))


@pytest.mark.parametrize("img_size, P, C", [(32, 8, 3), ((16, 48), 16, 1)])
def test_patch_embed_is_timms(img_size, P, C):
    ours = PatchEmbed(img_size, P, C, embed_dim=24)
    theirs = timm.layers.PatchEmbed(img_size, P, C, embed_dim=24)
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, C, *ours.img_size)

    assert torch.equal(ours(x), theirs(x))
    assert (ours.patch_shape, ours.num_patches) == (theirs.grid_size, theirs.num_patches)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: patchify(torch.rand(3, 8, 8), 4), "add a batch axis"),
        (lambda: patchify(torch.rand(1, 3, 8, 9), 4), "8x9 is not divisible by patch_size 4"),
        (lambda: patchify(torch.rand(1, 3, 8, 8), 0), "patch_size 0"),
        (lambda: unpatchify(torch.rand(4, 48), 4), "not (B, N, P*P*C)"),
        (lambda: unpatchify(torch.rand(1, 6, 48), 4), "6 patches do not fill a 2x2 grid"),
        (lambda: unpatchify(torch.rand(1, 4, 48), 4, (1, 5)), "do not fill a 1x5 grid"),
        (lambda: unpatchify(torch.rand(1, 4, 47), 4), "not 4x4 pixels of whole channels"),
        (lambda: PatchEmbed(30, 4), "30x30 is not divisible by patch_size 4"),
        (lambda: PatchEmbed(32, 8)(torch.rand(1, 3, 32, 16)), "wanted (B, 3, 32, 32)"),
        (lambda: PatchEmbed(32, 8)(torch.rand(1, 1, 32, 32)), "got shape (1, 1, 32, 32)"),
    ],
)
def test_refusals_name_the_fault(call, said):
    with pytest.raises(ValueError) as e:
        call()

    message = str(e.value)
    assert said in message
    assert "\n" not in message
