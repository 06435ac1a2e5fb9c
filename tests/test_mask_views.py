"""beit_nb.mask_views away from its lesson: mmsegmentation's rules, samples from workers, looks."""

import colorsys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from beit_nb import BeitError
from beit_nb.engine.augment import crop
from beit_nb.engine.loading import TransformedDataset, load_batches
from beit_nb.engine.sources import ImageFolder
from beit_nb.images import preprocess, to_pil_image
from beit_nb.index_maps import IGNORED, DigitMaps, FileMaps
from beit_nb.mask_views import (
    MapView,
    ScoredMapTransform,
    SegmentTransform,
    brightened,
    contrasted,
    fitted_size,
    hue_turned,
    largest_share,
    mean_shares,
    most_likely,
    photometric_distortion,
    resize_pair,
    same_sized,
    saturated,
    square_box,
)
from beit_nb.segheads import resize_maps
from beit_nb.segmentation import BeitForSemanticSegmentation
from beit_nb.task_configs import SegmentRecipe

PLAIN = SegmentRecipe(
    img_size=32, scale=(60, 40), ratio_range=None, cat_max_ratio=1.0, flip=0.0, photometric=False
)
DIGITS = replace(PLAIN, scale=(32, 32), ratio_range=(0.5, 2.0), photometric=True, flip=0.5)


class Maps(DigitMaps):
    "One picture of 60 x 40 pixels with four stripes, each its own gray and its own label."

    def __init__(self):
        super().__init__("val")
        self.stripes = (torch.arange(60) // 15).to(torch.uint8).expand(40, 60)

    def __len__(self):
        return 1

    def __getitem__(self, i):
        return (self.stripes * 50 + 20).expand(3, -1, -1)

    def label_map(self, i):
        return self.stripes


@pytest.fixture
def stripes():
    return Maps()


def a_picture(height=16, width=24) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))


@pytest.mark.parametrize("scale", [(2048, 512), (2560, 640), (1024, 256), (512, 2048)])
@pytest.mark.parametrize("size", [(512, 683), (683, 512), (1, 1), (333, 2000), (97, 101)])
def test_sizes_are_those_of_mmcv(size, scale):
    "imrescale: one factor for both sides, rounded half up."
    h, w = size
    factor = min(max(scale) / max(h, w), min(scale) / min(h, w))

    assert fitted_size(h, w, scale) == (int(h * factor + 0.5), int(w * factor + 0.5))


@pytest.mark.parametrize("size", [(100, 1000), (1000, 100), (512, 683)])
def test_no_side_is_shorter_than_a_window(size):
    assert min(fitted_size(*size, (1024, 256), min_side=512)) == 512
    assert fitted_size(*size, (4096, 1024), min_side=8) == fitted_size(*size, (4096, 1024))


@pytest.mark.parametrize("size", [(7, 5), (40, 60), (80, 33)])
def test_labels_are_chosen_as_opencv_chooses_them(size):
    "INTER_NEAREST takes pixel floor(i * old / new)."
    rng = np.random.default_rng(1)
    labels = torch.from_numpy(rng.integers(0, 256, (16, 24), dtype=np.uint8))

    picture, found = resize_pair(a_picture(), labels, size)

    rows, columns = (np.arange(new) * old // new for new, old in zip(size, (16, 24)))
    assert torch.equal(found, labels[rows][:, columns])
    assert picture.shape == (3, *size) and picture.dtype == found.dtype == torch.uint8
    assert type(picture) is type(found) is torch.Tensor


def test_the_largest_share_is_mmsegmentations():
    rng = np.random.default_rng(2)
    for classes in (1, 2, 3, 200):
        values = np.append(rng.permutation(255)[:classes], 255).astype(np.uint8)
        labels = rng.choice(values, (9, 9))
        found, count = np.unique(labels, return_counts=True)
        count = count[found != 255]

        share = largest_share(torch.from_numpy(labels))

        assert share == count.max() / count.sum()
        assert (share < 0.75) == (len(count) > 1 and count.max() / count.sum() < 0.75)


class Counted:
    "A generator that counts the squares that are drawn from it."

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.squares = 0

    def integers(self, high):
        self.squares += 0.5  # top and left
        return self.rng.integers(high)


@pytest.mark.parametrize("limit, squares", [(1.0, 1), (0.75, 11)])
def test_after_ten_tries_the_next_square_is_taken(limit, squares):
    rng = Counted()

    box = square_box(torch.zeros(40, 60, dtype=torch.uint8), 32, limit, rng)

    assert rng.squares == squares and box[2:] == (32, 32)


def test_squares_lie_anywhere_and_inside(stripes):
    rng = np.random.default_rng(0)
    boxes = np.array([square_box(stripes.stripes, 32, 1.0, rng) for _ in range(400)])

    assert boxes[:, 0].min() == 0 and boxes[:, 0].max() == 40 - 32
    assert boxes[:, 1].min() == 0 and boxes[:, 1].max() == 60 - 32
    assert square_box(stripes.stripes, 100, 0.75, rng) == (0, 0, 40, 60)


def test_squares_obey_the_limit(stripes):
    rng = np.random.default_rng(0)
    for _ in range(50):
        box = square_box(stripes.stripes, 20, 0.7, rng)
        assert largest_share(crop(stripes.stripes[None], box)) < 0.7


class Always:
    "A generator that draws one end of every interval, and never skips."

    def __init__(self, upper):
        self.upper = upper

    def uniform(self, low, high):
        return high if self.upper else low

    def random(self):
        return 0.0


def by_pixel(image: torch.Tensor, change) -> np.ndarray:
    "Every pixel changed in HSV by Python's own colorsys, in levels."
    pixels = image.permute(1, 2, 0).reshape(-1, 3).numpy() / 255
    changed = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*rgb))) for rgb in pixels]
    return np.array(changed).T.reshape(image.shape) * 255


@pytest.mark.parametrize("upper", [False, True])
def test_colors_change_by_mmsegmentations_limits(upper):
    x = a_picture()
    levels = x.numpy().astype(np.float32)
    shift, factor, turn = (32, 1.5, 18 / 180) if upper else (-32, 0.5, -18 / 180)

    assert np.array_equal(
        brightened(x, Always(upper)).numpy(), (levels + shift).clip(0, 255).astype(np.uint8)
    )
    assert np.array_equal(
        contrasted(x, Always(upper)).numpy(), (levels * factor).clip(0, 255).astype(np.uint8)
    )
    saturation = by_pixel(x, lambda h, s, v: (h, min(s * factor, 1), v))
    assert abs(saturated(x, Always(upper)).numpy() - saturation).max() <= 0.51
    hue = by_pixel(x, lambda h, s, v: ((h + turn) % 1, s, v))
    assert abs(hue_turned(x, Always(upper)).numpy() - hue).max() <= 1.01  # cut, not rounded


def test_gray_stays_gray():
    gray = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)

    assert torch.equal(saturated(gray, Always(True)), gray)
    assert (hue_turned(gray, Always(True)).int() - gray.int()).abs().max() <= 1


def test_contrast_comes_second_or_last(monkeypatch):
    told = []
    for name in ("brightened", "contrasted", "saturated", "hue_turned"):
        step = lambda image, rng, name=name: told.append(name) or image  # noqa: E731
        monkeypatch.setattr(f"beit_nb.mask_views.{name}", step)

    for first in (0.0, 0.9):
        draws = iter([first, 0.4, 0.4, 0.4, 0.4])
        rng = type("Draws", (), {"random": lambda self, draws=draws: next(draws)})()
        photometric_distortion(a_picture(), rng)

    assert told[:4] == ["brightened", "contrasted", "saturated", "hue_turned"]
    assert told[4:] == ["brightened", "saturated", "hue_turned", "contrasted"]


def test_a_picture_and_its_map_move_together(stripes):
    recipe = replace(PLAIN, ratio_range=(0.5, 2.0), flip=0.5)
    transform = SegmentTransform(recipe, stripes)
    seen = set()
    for seed in range(40):
        image, labels, number = transform(stripes[0], 0, np.random.default_rng(seed))
        inside = labels != IGNORED
        right = ((image[0].float() - 20) / 50).round() == labels

        assert image.shape == (3, 32, 32) and labels.shape == (32, 32) and number == 0
        assert image.dtype == labels.dtype == torch.uint8
        assert right[inside].float().mean() > 0.9  # all but the rims of stripes
        seen |= {int(labels[0, 0]) < int(labels[0, 5]), int(labels[0, 0]) > int(labels[0, 5])}
    assert seen == {False, True}  # mirrored, and not


def test_the_rim_is_the_mean_color_without_a_label(stripes):
    transform = SegmentTransform(replace(PLAIN, img_size=48), stripes)

    image, labels, _ = transform(stripes[0], 0, np.random.default_rng(0))

    assert (labels[40:] == IGNORED).all() and (labels[:40] != IGNORED).all()
    assert preprocess(image, "imagenet")[:, 40:].abs().max() < 0.01
    assert torch.equal(image[0, :40], labels[:40] * 50 + 20)


def test_a_mirror_turns_both(stripes):
    whole = replace(PLAIN, img_size=60)
    rng = np.random.default_rng(0)
    image, labels, _ = SegmentTransform(whole, stripes)(stripes[0], 0, rng)
    mirror = SegmentTransform(replace(whole, flip=1.0), stripes)(stripes[0], 0, rng)

    assert torch.equal(mirror.image, image.flip(2)) and torch.equal(mirror.label, labels.flip(1))


def test_colors_leave_the_labels_alone(stripes):
    plain = SegmentTransform(PLAIN, stripes)(stripes[0], 0, np.random.default_rng(3))
    colored = SegmentTransform(replace(PLAIN, photometric=True), stripes)
    views = [colored(stripes[0], 0, np.random.default_rng(3)) for _ in range(2)]

    assert torch.equal(views[0].image, views[1].image)
    assert all(torch.equal(view.label, plain.label) for view in views)


def test_a_picture_of_pil_is_the_same_sample(stripes):
    transform = SegmentTransform(DIGITS, stripes)
    views = [
        transform(picture, 0, np.random.default_rng(5))
        for picture in (stripes[0], to_pil_image(stripes[0]))
    ]

    assert torch.equal(views[0].image, views[1].image)


def test_workers_change_nothing():
    maps = DigitMaps("val")
    samples = TransformedDataset(maps, SegmentTransform(DIGITS, maps), seed=3, pixels=True)
    keys = [[0, 7, 401], [802, 5, 6]]

    alone, together = (list(load_batches(samples, keys, workers)) for workers in (0, 2))

    for (a, _), (b, _) in zip(alone, together):
        assert torch.equal(a.image, b.image) and torch.equal(a.label, b.label)
        assert a.image.shape == (3, 3, 32, 32) and a.label.shape == (3, 32, 32)
    assert not torch.equal(alone[0][0].image[0], samples[400][0].image)  # another epoch


def test_a_map_of_another_size_stops_where_it_is_met(tmp_path):
    for folder, size in (("images", (24, 16)), ("masks", (12, 8))):
        (tmp_path / folder).mkdir()
        Image.new("L", size).save(tmp_path / folder / "a.png")
    maps = FileMaps(ImageFolder(tmp_path / "images"), ImageFolder(tmp_path / "masks"), ["a", "b"])
    samples = TransformedDataset(maps, SegmentTransform(PLAIN, maps), pixels=True)

    with pytest.raises(BeitError, match=r"masks/a\.png has 12 x 8 pixels, and its picture .* 24 x"):
        samples[0]


def test_scored_pictures_are_whole_and_their_maps_untouched(stripes):
    rng = np.random.default_rng(0)

    scored = ScoredMapTransform((120, 80), stripes)(stripes[0], 0, rng)
    as_it_is = ScoredMapTransform(None, stripes)(stripes[0], 0, rng)
    at_least = ScoredMapTransform((30, 20), stripes, min_side=32)(stripes[0], 0, rng)

    assert scored.image.shape == (3, 80, 120) and scored.label is stripes.stripes
    assert torch.equal(as_it_is.image, stripes[0])
    assert at_least.image.shape == (3, 32, 48) and scored.number == 0


def test_an_endless_picture_is_refused_before_it_fills_the_memory(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        Image.new("L", (9000, 2)).save(tmp_path / folder / "a.png")
    maps = FileMaps(ImageFolder(tmp_path / "images"), ImageFolder(tmp_path / "masks"), ["a"])

    words = r"images/a\.png would be looked at with 2,304,000 x 512 pixels, more than 89,478,485"
    with pytest.raises(BeitError, match=words):
        ScoredMapTransform((2048, 512), maps, 512)(maps.pixels(0), 0, np.random.default_rng(0))


# How a network looks at pictures.


class ByHand(nn.Module):
    "A network that answers with what it sees; it counts its pictures."

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.seen = []

    def forward(self, images):
        self.seen.append(tuple(images.shape))
        return images


@pytest.mark.parametrize("side", [(40, 64), (33, 33), (32, 100)])
def test_a_picture_of_any_size(side):
    images = torch.rand(1, 3, *side)
    net = ByHand()
    view = MapView(32, (100, 32), ratios=(1.0, 2.0), flip=True)

    shares = view(net, [images, resize_maps(images, (2 * side[0], 2 * side[1]))], side)

    assert shares.shape == (1, 3, *side) and set(net.seen) == {(1, 3, 32, 32)}
    torch.testing.assert_close(shares.sum(1), torch.ones(1, *side))
    assert (shares - images.softmax(1)).abs().mean() < 0.03  # enlarged pictures are blurred


def test_one_window_that_slides_is_the_whole():
    images = torch.rand(2, 3, 32, 32)
    slide = MapView(32, (32, 32))
    torch.manual_seed(0)
    body = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    model = BeitForSemanticSegmentation(11, "setr_pup", channels=8, **body).eval()

    answers = [v(model, [images], (32, 32)) for v in (slide, slide._replace(inference="whole"))]

    torch.testing.assert_close(*answers)


@pytest.mark.parametrize("size", [(37, 21), (12, 50), (1, 7)])
def test_some_rows_at_a_time_are_all_rows(size, monkeypatch):
    "A large picture is named in strips; two looks of different sizes."
    g = torch.Generator().manual_seed(0)
    every = [torch.randn(2, 5, *side, generator=g) for side in ((9, 8), (16, 11))]
    whole = mean_shares(every, size, range(size[0]))

    monkeypatch.setattr("beit_nb.mask_views.MOST_PIXELS", 4 * size[1])  # two rows of two pictures
    for top in range(size[0]):
        rows = range(top, min(top + 3, size[0]))
        if len(rows) < size[0]:
            strip = mean_shares(every, size, rows)
            torch.testing.assert_close(strip, whole[:, :, top : rows.stop], atol=1e-6, rtol=1e-5)

    assert torch.equal(most_likely(every, size), whole.argmax(1))


def test_pictures_of_one_size_go_together():
    shapes = [(8, 8), (8, 8), (9, 9), (8, 8)]
    pictures = [([torch.zeros(1, 3, *s)], torch.zeros(1, *s)) for s in shapes]

    batches = list(same_sized(iter(pictures)))

    assert [len(b) for b in batches] == [2, 1, 1]
    large = [([torch.zeros(1, 3, 2, 2)], torch.zeros(1, 600, 600))] * 3
    assert [len(b) for b in same_sized(iter(large))] == [1, 1, 1]
