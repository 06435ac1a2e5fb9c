"""beit_nb.index_maps away from its lesson: files of strangers, and what is wrong with a set."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit_nb import SAID, BeitError, UnreadableImage
from beit_nb.engine.loading import LabelledBatch, TransformedDataset, sequential_batches
from beit_nb.engine.sources import ImageFolder
from beit_nb.index_maps import (
    IGNORED,
    DigitMaps,
    FileMaps,
    class_colors,
    index_png,
    look_at_maps,
    map_remarks,
    paint_classes,
    read_indices,
    reduce_zero,
)

LEVELS = np.array([[0, 1, 2], [3, 254, 255]], np.uint8)
EXIF_ORIENTATION = 274  # its tag; 6: the picture has to be turned by a quarter


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    with io.BytesIO() as f:
        image.save(f, kind, **options)
        return f.getvalue()


def with_palette(levels: np.ndarray) -> Image.Image:
    image = Image.fromarray(levels).convert("P")
    image.putdata(levels.flatten().tolist())
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    return image


def write_pair(root: Path, name: str, labels: np.ndarray, size=None) -> None:
    "A gray picture of (width, height) `size`, by default that of the labels, and its map."
    height, width = labels.shape
    for folder in ("images", "masks"):
        (root / folder).mkdir(exist_ok=True)
    Image.new("RGB", size or (width, height), "gray").save(root / "images" / f"{name}.png")
    Image.fromarray(labels).save(root / "masks" / f"{name}.png")


def maps_of(root: Path, classes: int = 4, **options) -> FileMaps:
    names = [f"c{k}" for k in range(classes)]
    return FileMaps(ImageFolder(root / "images"), ImageFolder(root / "masks"), names, **options)


@pytest.fixture
def four(tmp_path):
    "Four pictures of 6 x 4 pixels; map k has the labels 0 to k, map 0 pixels without a label too."
    for k in range(4):
        labels = np.arange(24).reshape(4, 6) % (k + 1)
        labels[0, 0] = IGNORED if k == 0 else 0
        write_pair(tmp_path, f"p{k}", labels.astype(np.uint8))
    return tmp_path


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
@pytest.mark.parametrize("mode", ["L", "P"])
def test_a_file_gives_its_numbers(kind, mode):
    image = Image.fromarray(LEVELS) if mode == "L" else with_palette(LEVELS)

    found = read_indices(encoded(image, kind), str)

    assert found.dtype == np.uint8 and found.tolist() == LEVELS.tolist()


def test_a_transparent_palette_changes_no_number():
    data = encoded(with_palette(LEVELS), transparency=bytes(range(256)))

    assert read_indices(data, str).tolist() == LEVELS.tolist()


def test_black_and_white_are_0_and_1():
    data = encoded(Image.fromarray(LEVELS > 1))

    assert read_indices(data, str).tolist() == (LEVELS > 1).astype(int).tolist()


@pytest.mark.parametrize(
    "image, kind, words",
    [
        (Image.new("RGB", (3, 2), "red"), "PNG", r"m\.png is colored \(mode RGB\).* its number"),
        (Image.new("RGBA", (3, 2), "red"), "PNG", r"m\.png is colored \(mode RGBA\)"),
        (Image.new("CMYK", (3, 2)), "TIFF", r"m\.png is colored \(mode CMYK\)"),
        (Image.new("RGB", (3, 2), "gray"), "PNG", r"several channels \(mode RGB\).*keep the first"),
        (Image.new("RGBA", (3, 2), "gray"), "PNG", r"several channels \(mode RGBA\)"),
        (Image.new("LA", (3, 2)), "PNG", r"several channels \(mode LA\)"),
        (Image.new("F", (3, 2)), "TIFF", r"m\.png holds numbers with a point \(mode F\)"),
        (Image.new("L", (3, 2)), "JPEG", r"m\.png is a JPEG"),
        (Image.new("RGB", (3, 2)), "WEBP", r"m\.png is a WEBP"),
        (Image.new("L", (3, 2)), "GIF", r"m\.png is a GIF"),
        (Image.fromarray(np.full((2, 3), 300, np.uint16)), "PNG", r"m\.png has the label 300"),
        (Image.fromarray(np.full((2, 3), -1, np.int32)), "TIFF", r"m\.png has the label -1"),
    ],
)
def test_what_is_no_label_map_is_refused(image, kind, words):
    with pytest.raises(BeitError, match=words) as e:
        read_indices(encoded(image, kind), lambda: "m.png")

    assert not isinstance(e.value, UnreadableImage) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "it is empty"),
        (b"<html>404</html>", "none of PNG, TIFF, BMP, or damaged"),
        (encoded(Image.new("L", (99, 99)))[:60], ""),
    ],
)
def test_a_damaged_file_is_named(data, words):
    with pytest.raises(UnreadableImage, match=rf"^cannot read the label map m\.png: {words}"):
        read_indices(data, lambda: "m.png")


def test_zero_is_reduced_as_mmsegmentation_does():
    "Its three lines (LoadAnnotations), on every label there is."
    theirs = np.arange(256, dtype=np.uint8)
    theirs[theirs == 0] = 255
    theirs = theirs - 1
    theirs[theirs == 254] = 255

    assert np.array_equal(reduce_zero(np.arange(256, dtype=np.uint8)), theirs)


def test_maps_travel_to_other_processes(four):
    maps = pickle.loads(pickle.dumps(maps_of(four)))

    assert maps.label_map(3).unique().tolist() == [0, 1, 2, 3]
    assert maps.pixels(3).shape == (3, 4, 6)


@pytest.mark.parametrize("reduced, words", [(False, "0 to 2 "), (True, "1 to 2 ")])
def test_a_number_that_is_no_class_is_refused_by_its_number_in_the_file(four, reduced, words):
    maps = maps_of(four, classes=3, reduce_zero_label=reduced)

    assert 2 - reduced in maps.label_map(2)
    with pytest.raises(BeitError, match=rf"masks/p3\.png has the label 3, .* classes are {words}"):
        maps.label_map(3)


def test_another_map_is_another_input(four):
    maps = maps_of(four)
    before = maps.fingerprint(), maps.record(range(4))

    write_pair(four, "p1", np.ones((4, 6), np.uint8))

    assert maps.fingerprint() == before[0]  # of the names
    assert maps.record(range(4)) not in (None, before[1])
    assert maps_of(four, reduce_zero_label=True).fingerprint() != before[0]


def test_a_damaged_map_is_passed_over_and_named(four, capsys):
    (four / "masks" / "p1.png").write_bytes(b"")
    maps = maps_of(four)

    def transform(picture, number, rng):
        return LabelledBatch(picture, maps.label_map(number), number)

    samples = TransformedDataset(maps, transform, pixels=True)
    [(batch, valid, unreadable)] = sequential_batches(samples, 4)

    assert valid.tolist() == [True, False, True, True] and unreadable == [1]
    assert batch.number.tolist() == [0, 2, 2, 3]
    assert torch.equal(batch.label[3], maps.label_map(3))
    said = capsys.readouterr().err
    assert "passed over: cannot read the label map" in said and "p1.png" in said
    assert maps.record(range(4)) is not None


def test_damaged_maps_are_said_before_a_training(four, capsys):
    SAID.clear()
    (four / "masks" / "p1.png").write_bytes(b"no picture")

    assert look_at_maps(maps_of(four))[0] == 3

    assert "beit: 1 of 4 label maps: cannot read the label map" in capsys.readouterr().err


def test_where_no_map_can_be_read_the_look_says_so(four):
    for k in range(4):
        (four / "masks" / f"p{k}.png").write_bytes(b"")

    with pytest.raises(UnreadableImage, match="masks/p0.png"):
        look_at_maps(maps_of(four))


def test_the_look_counts_maps(four):
    seen = look_at_maps(maps_of(four))

    assert seen[:4].tolist() == [4, 3, 2, 1] and seen[IGNORED] == 1
    assert look_at_maps(maps_of(four), most=2)[:4].tolist() == [2, 1, 1, 1]  # the first, the last


def test_a_map_of_another_size_is_refused(four):
    write_pair(four, "p2", np.zeros((4, 6), np.uint8), size=(12, 8))

    words = r"masks/p2\.png has 6 x 4 pixels, and its picture .*images/p2\.png 12 x 8;"
    with pytest.raises(BeitError, match=words):
        look_at_maps(maps_of(four))


def test_sizes_are_those_of_upright_pictures(four):
    turned = Image.new("RGB", (4, 6))
    exif = turned.getexif()
    exif[EXIF_ORIENTATION] = 6
    (four / "images" / "p2.png").unlink()
    turned.save(four / "images" / "p2.jpg", exif=exif)

    assert look_at_maps(maps_of(four))[0] == 4


def test_a_damaged_picture_is_left_to_the_training(four):
    (four / "images" / "p2.png").write_bytes(b"")

    assert look_at_maps(maps_of(four))[0] == 4


@pytest.mark.parametrize(
    "first, rest, classes, words",
    [
        (0, 255, 3, r"but class c0 and pixels without a label \(255\); write"),
        (255, 255, 3, r"but pixels without a label \(255\); write"),
        (0, 0, 1, "but class c0; write"),
    ],
)
def test_maps_that_tell_nothing_apart_are_refused(tmp_path, first, rest, classes, words):
    labels = np.full((4, 6), rest, np.uint8)
    labels[0] = first
    write_pair(tmp_path, "a", labels)
    maps = maps_of(tmp_path, classes=classes)

    with pytest.raises(BeitError, match=f"tell nothing apart: they hold nothing {words}"):
        map_remarks(maps, look_at_maps(maps))


def test_classes_that_never_occur_are_said(four):
    maps = maps_of(four, classes=9)

    [line] = map_remarks(maps, look_at_maps(maps))

    assert line.startswith("5 of the 9 classes of ")
    assert line.endswith("occur in none of its 4 label maps: c4, c5, c6, ...")
    assert map_remarks(maps_of(four), look_at_maps(maps_of(four))) == []


def test_digits_are_labelled_where_their_ink_is():
    maps = DigitMaps("val")

    assert len(maps.classes) == 11 and len(maps) == 400 and maps.labels is None
    for i in range(20):
        labels = maps.label_map(i)
        assert torch.equal(labels > 0, maps.masks[i])
        assert labels.max() == maps.digits[i] + 1


def test_numbers_survive_the_file(tmp_path):
    "Pillow packs few colors into few bits; a reader of indices gets every number back."
    for labels in (torch.arange(256).view(16, 16), torch.tensor([[0, 1, IGNORED]])):
        index_png(labels).save(tmp_path / "map.png")
        back = read_indices((tmp_path / "map.png").read_bytes(), lambda: "map.png")
        assert np.array_equal(back, labels.numpy())
    assert len({tuple(c) for c in class_colors(256).tolist()}) == 256
    assert paint_classes(torch.tensor([[0, IGNORED]])).tolist() == [[[0, 1]]] * 3
