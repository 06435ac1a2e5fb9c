"""beit_nb.images away from its lesson: devices, types, and drawing."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from beit_nb import BeitError
from beit_nb.images import (
    BEIT_MEAN_STD,
    IMAGENET_MEAN_STD,
    MEAN_STD,
    denormalize,
    mean_std_for,
    middle_square,
    normalize,
    photos,
    pil_to_tensor,
    preprocess,
    show_image,
    show_images,
    to_float,
    to_pil,
    to_pil_image,
    to_tensor,
)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_levels_are_torchvisions(mode):
    image = photos()["coffee"].convert(mode)

    levels = pil_to_tensor(image)

    assert torch.equal(levels, TF.pil_to_tensor(image))
    assert torch.equal(to_tensor(image), TF.to_dtype(levels, torch.float32, scale=True))
    for back in (to_pil_image(levels), TF.to_pil_image(levels)):
        assert back.mode == mode and np.array_equal(back, image)


@pytest.mark.parametrize("size", [33, 112, 224, 300])
def test_the_square_is_torchvisions(size):
    by_torchvision = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])

    for image in photos().values():  # wide, tall and square ones
        assert np.array_equal(middle_square(image, size), by_torchvision(image))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_floats_keep_their_type(dtype):
    x = torch.rand(2, 3, 4, 4).to(dtype)

    assert to_float(x) is x
    assert normalize(x).dtype == dtype
    assert denormalize(x).dtype == dtype


def test_levels_become_what_a_picture_becomes():
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)

    x = to_float(levels)

    assert x.dtype == torch.float32
    torch.testing.assert_close(x, to_tensor(to_pil(x)), atol=1e-7, rtol=0)
    assert torch.equal((x * 255).round().byte(), levels)


@pytest.mark.parametrize(
    "name, mean_std", [("beit", BEIT_MEAN_STD), ("imagenet", IMAGENET_MEAN_STD)]
)
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5), (6, 2, 3, 4, 5)])
def test_preprocess_is_both_steps(name, mean_std, shape):
    levels = torch.randint(256, shape, dtype=torch.uint8)

    x = preprocess(levels, name)

    assert MEAN_STD[name] == mean_std
    assert torch.equal(x, normalize(levels.float() / 255, mean_std))
    assert torch.equal(x, preprocess(levels.float() / 255, name))
    torch.testing.assert_close(denormalize(x, mean_std), levels / 255, atol=1e-6, rtol=0)


def test_normalize_may_be_called_first_in_inference_mode_and_then_trained_through():
    mean_std = (
        (0.11, 0.12, 0.13),
        (0.21, 0.22, 0.23),
    )  # new: the constants are made now
    with torch.inference_mode():
        normalize(torch.rand(3, 2, 2), mean_std)
    x = torch.rand(3, 2, 2, requires_grad=True)

    normalize(x, mean_std).sum().backward()

    torch.testing.assert_close(x.grad[:, 0, 0], 1 / torch.tensor(mean_std[1]))


@pytest.mark.parametrize("channels", [2, 4, 13])
def test_the_constants_of_bands(channels):
    x = torch.rand(2, channels, 5, 5)

    assert mean_std_for("beit", channels) == ((0.5,) * channels, (0.5,) * channels)
    assert torch.equal(preprocess(x, "beit"), (x - 0.5) / 0.5)
    torch.testing.assert_close(
        denormalize(preprocess(x, "beit"), mean_std_for("beit", channels)), x
    )
    with pytest.raises(BeitError, match=f"but there are {channels} channels: set mean_std beit"):
        preprocess(x, "imagenet")


def test_pictures_are_drawn_in_rows():
    pictures = torch.rand(5, 3, 4, 4)

    fig = show_images(pictures, titles="abcde", ncols=2)

    assert len(fig.axes) == 6
    assert [len(ax.images) for ax in fig.axes] == [1, 1, 1, 1, 1, 0]
    assert [ax.get_title() for ax in fig.axes] == ["a", "b", "c", "d", "e", ""]


def test_one_channel_is_gray_whatever_its_shape():
    for x in (torch.rand(4, 4), torch.rand(1, 4, 4), np.random.rand(4, 4), np.random.rand(4, 4, 1)):
        drawn = show_image(x).images[0]
        assert drawn.get_array().shape == (4, 4)
        assert drawn.get_cmap().name == "gray"
    assert show_image(torch.rand(4, 4), cmap="viridis").images[0].get_cmap().name == "viridis"


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="give at least one"):
        show_images([])


# What files may hold, byte by byte.
