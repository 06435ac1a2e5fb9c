"""beit_nb.engine.sources away from its lesson: two decoders, damage, headers that lie, layouts."""

import io
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_gray
from PIL import Image

from beit_nb import BeitError, UnreadableImage
from beit_nb.engine.files import FileList
from beit_nb.engine.notes import take_apart
from beit_nb.engine.sources import (
    Digits,
    EncodedImages,
    ImageDataset,
    ImageFolder,
    Photos,
    folder_labels,
    read_digits,
)
from beit_nb.images import photos


def jpeg(image, **more) -> bytes:
    with io.BytesIO() as f:
        image.save(f, "JPEG", **more)
        return f.getvalue()


def cat() -> Image.Image:
    return photos()["chelsea"]


@pytest.mark.parametrize("size", [14_000, 30_000])
def test_a_header_that_claims_too_much(size, tmp_path):
    "631 bytes that would be 2.7 GB: refused before anything is decoded, by both readers alike."
    bomb = bytearray(jpeg(cat().resize((16, 16))))
    at = bomb.index(b"\xff\xc0") + 5
    bomb[at : at + 4] = size.to_bytes(2, "big") * 2
    (tmp_path / "bomb.jpg").write_bytes(bomb)
    pictures = ImageFolder(tmp_path)

    assert take_apart(bytes(bomb)).claimed_pixels == size**2
    for read in (pictures.pixels, pictures.__getitem__):
        with pytest.raises(UnreadableImage, match="^cannot read .*bomb.jpg: .*decompression bomb"):
            read(0)


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_grays_in_floats_and_in_16_bits(tmp_path, white):
    want = np.array(cat().convert("L"))
    Image.fromarray(np.float32(want) / 255 * white).save(tmp_path / "floats.tif")
    Image.fromarray(np.uint16(want)).save(tmp_path / "dark.png")

    dark, floats = (ImageFolder(tmp_path).pixels(i) for i in range(2))

    assert np.abs(floats[0].numpy().astype(int) - want).max() <= 1
    assert dark.max() <= 1  # 16 bits stay 16 bits, however dark


def test_a_file_that_has_gone_is_an_unreadable_picture(tmp_path):
    for i in range(3):
        save_gray(tmp_path / f"{i}.png", i)
    pictures = ImageFolder(tmp_path)
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").unlink()
    (tmp_path / "2.png").mkdir()

    for i, line in ((1, "^cannot read the picture .*1.png: "), (2, "2.png is a folder; ")):
        for read in (pictures.__getitem__, pictures.pixels):
            with pytest.raises(UnreadableImage, match=line):
                read(i)


def test_labels_of_another_folder(tmp_path):
    for i, c in enumerate("abc"):
        save_gray(tmp_path / "train" / c / "x" / f"{i}.png", i)
    save_gray(tmp_path / "val" / "c" / "1.png", 99)
    train = ImageFolder(tmp_path / "train", labels=True)

    val = ImageFolder(tmp_path / "val", labels=True, classes=train.classes)

    assert train.classes == val.classes == ["a", "b", "c"]
    assert train.labels.tolist() == [0, 1, 2]
    assert val.labels.tolist() == [2]
    save_gray(tmp_path / "val" / "d" / "1.png", 0)
    with pytest.raises(BeitError, match="class 'd' that the training pictures lack"):
        ImageFolder(tmp_path / "val", labels=True, classes=train.classes)
    save_gray(tmp_path / "val" / "loose.png", 0)
    with pytest.raises(BeitError, match="outside of class folders .loose.png"):
        ImageFolder(tmp_path / "val", labels=True, classes=["c", "d"])


def test_many_classes_are_fast():
    "ImageNet-22K has 14 million pictures in 21,841 classes: no search through a list for each."
    classes = [f"n{c:05d}" for c in range(20_000)]
    files = FileList("root", (f"{c}/{k}.jpg" for c in classes for k in range(2)))
    began = time.process_time()

    labels = folder_labels(files, classes)

    assert time.process_time() - began < 2
    assert labels.tolist() == [i // 2 for i in range(40_000)]


def test_the_digits_of_every_split():
    ink, labels = read_digits()
    train = Digits("train", places=2)
    both = Digits("train+val", places=1)

    assert ink.shape == (5000, 28, 28)
    assert [len(Digits(split)) for split in ("val", "test")] == [400, 1000]
    assert len(train) == 7200
    assert len(both) == 4000
    assert train.labels.tolist() == 2 * both.labels[:3600].tolist()
    assert both.labels[3600:].tolist() == Digits("val").labels.tolist()
    assert train[0].shape == (3, 32, 32)
    assert train[0].dtype == torch.uint8
    assert torch.equal(train.pixels(5), train.images[5])
    with pytest.raises(KeyError):
        Digits("valid")


def test_photos_go_round():
    pictures = Photos(3)

    assert len(pictures) == 33
    assert pictures[0] is pictures[11]
    assert pictures.pixels(1).shape == (3, 300, 451)
    assert pictures.path(0) is None


def test_a_source_in_memory():
    x = torch.zeros(3, 4, 4, dtype=torch.uint8)
    pictures = ImageDataset(2, [x, x + 1].__getitem__, [1, 0], ["a", "b"], "two")

    assert torch.equal(pictures.pixels(1), x + 1)
    assert pictures.labels.tolist() == [1, 0]
    assert pictures.chunk_starts is None
    assert (pictures.excluded, pictures.reported) == ({}, set())
    assert ImageDataset(3, x, name="x").fingerprint() != ImageDataset(4, x, name="x").fingerprint()
    assert Digits("val").fingerprint() != Digits("test").fingerprint()


def test_what_a_source_of_files_must_say():
    class Nothing(EncodedImages):
        pass

    for ask in (Nothing(1).pixels, Nothing(1).path, Nothing(1).__getitem__):
        with pytest.raises(NotImplementedError):
            ask(0)


def test_the_fingerprint_is_of_names_and_order(tmp_path):
    "Another class: another fingerprint. Another place, or another way to say it: the same."
    for file in ("one/ant/0.png", "one/bee/1.png", "deep/down/ant/0.png", "deep/down/bee/1.png"):
        save_gray(tmp_path / file, 1)
    for file in ("swapped/bee/0.png", "swapped/ant/1.png"):
        save_gray(tmp_path / file, 1)

    want = ImageFolder(tmp_path / "one").fingerprint()

    assert ImageFolder(tmp_path / "deep" / "down").fingerprint() == want
    assert ImageFolder(tmp_path / "one", labels=True).fingerprint() == want
    assert ImageFolder(f"{tmp_path}/one/").fingerprint() == want
    assert ImageFolder(tmp_path / "swapped").fingerprint() != want


def test_sources_travel_to_spawned_workers(tmp_path):
    save_gray(tmp_path / "a.png", 7)
    for pictures in (Digits("val"), ImageFolder(tmp_path), Photos()):
        again = pickle.loads(pickle.dumps(pictures))

        assert torch.equal(again.pixels(0), pictures.pixels(0))
        assert len(again) == len(pictures)
        assert again.path(0) == pictures.path(0)
        assert again.fingerprint() == pictures.fingerprint()


def test_the_path_is_that_of_the_file(tmp_path):
    save_gray(tmp_path / "a" / "b.png", 7)

    assert ImageFolder(tmp_path).path(0) == str(Path(tmp_path, "a", "b.png"))


def test_a_data_set_tells_each_oddity_once(tmp_path, capsys):
    for i in range(3):
        pages = [Image.new("RGB", (4, 4), (i, j, 0)) for j in range(2)]
        pages[0].save(tmp_path / f"{i}.tif", save_all=True, append_images=pages[1:])
    pictures = ImageFolder(tmp_path)

    for read in (pictures.pixels, pictures.__getitem__):
        for i in range(3):
            read(i)

    [line] = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "0.tif") in line and "the first is taken" in line


def test_a_file_that_becomes_a_pipe_keeps_nobody_waiting(tmp_path):
    "It was a picture when the folder was listed. Nor is a terabyte of holes read."
    for k in range(3):
        save_gray(tmp_path / f"{k}.png", 7)
    pictures = ImageFolder(tmp_path)
    (tmp_path / "0.png").unlink()
    os.mkfifo(tmp_path / "0.png")
    with open(tmp_path / "1.png", "r+b") as f:
        f.truncate(2**40)

    for k in range(2):
        with pytest.raises(UnreadableImage, match=f"{k}.png: it is no file of at most"):
            pictures.bytes(k)
    assert pictures.pixels(2).float().mean() == 7
