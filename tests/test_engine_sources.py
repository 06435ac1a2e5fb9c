"""beit_nb.engine.sources away from its lesson: two decoders, damage, headers that lie, layouts."""

import io
import os
import pickle
import struct
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import save_gray
from PIL import Image

import beit_nb.engine.sources as sources
from beit_nb import BeitError, UnreadableImage
from beit_nb.engine.decoding import load_image
from beit_nb.engine.files import FileList
from beit_nb.engine.sources import (
    Digits,
    EncodedImages,
    ImageDataset,
    ImageFolder,
    NamedBytes,
    Photos,
    decode_image,
    folder_labels,
    jpeg_pixels,
    read_digits,
    turned,
)
from beit_nb.images import photos


def jpeg(image, **more) -> bytes:
    with io.BytesIO() as f:
        image.save(f, "JPEG", **more)
        return f.getvalue()


def by_pil(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(load_image(io.BytesIO(data)))).permute(2, 0, 1)


def cat() -> Image.Image:
    return photos()["chelsea"]


def name() -> str:
    return "cat.jpg"


@pytest.mark.parametrize(
    "more",
    [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 10}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_decoded_as_pil_does(mode, more):
    data = jpeg(cat().convert(mode), **more)

    assert torch.equal(decode_image(data, name), by_pil(data))


@pytest.mark.parametrize("turn", range(1, 9))
def test_all_eight_orientations(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    data = jpeg(cat(), exif=exif)

    x = decode_image(data, name)

    assert torch.equal(x, by_pil(data))
    assert x.shape == ((3, 451, 300) if turn > 4 else (3, 300, 451))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_other_kinds_of_files(kind):
    with io.BytesIO() as f:
        cat().save(f, kind)
        data = f.getvalue()

    assert torch.equal(decode_image(data, name), by_pil(data))


def damaged_jpegs():
    "A JPEG cut at seven places, and sixty times with a few wrong bytes."
    whole = jpeg(cat())
    for length in (0, 1, 2, 10, 700, len(whole) // 2, len(whole) - 1):
        yield whole[:length]
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(2, len(data), rng.choice([1, 5, 20])):
            data[place] = rng.integers(256)
        yield bytes(data)


def test_damage_is_what_pil_calls_damage():
    refused = 0
    for data in damaged_jpegs():
        try:
            want = by_pil(data)
        except UnreadableImage:
            refused += 1
            with pytest.raises(UnreadableImage, match="^cannot read the picture cat.jpg"):
                decode_image(data, name)
        else:
            assert torch.equal(decode_image(data, name), want)
    assert 7 <= refused < 67


@pytest.mark.parametrize("size", [14_000, 30_000])
def test_a_header_that_claims_too_much(size, tmp_path):
    "631 bytes that would be 2.7 GB: refused before anything is decoded, by both readers alike."
    bomb = bytearray(jpeg(cat().resize((16, 16))))
    at = bomb.index(b"\xff\xc0") + 5
    bomb[at : at + 4] = size.to_bytes(2, "big") * 2
    (tmp_path / "bomb.jpg").write_bytes(bomb)
    pictures = ImageFolder(tmp_path)

    assert jpeg_pixels(bomb) == size**2
    for read in (pictures.pixels, pictures.__getitem__):
        with pytest.raises(UnreadableImage, match="^cannot read .*bomb.jpg: .*decompression bomb"):
            read(0)


def test_who_lifts_pils_limit_lifts_ours(monkeypatch):
    data = jpeg(cat())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)

    assert torch.equal(decode_image(data, name), by_pil(data))


def test_without_torchvisions_decoder(monkeypatch):
    "It is to leave torchvision one day: the same pixels by PIL, and no warning while it is there."
    files = [jpeg(cat()), jpeg(cat().convert("L")), jpeg(cat().convert("CMYK"))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        want = [decode_image(data, name) for data in files]
    asked = []
    monkeypatch.setattr(sources, "load_image", lambda f, said: asked.append(f) or load_image(f))
    monkeypatch.setattr(torch.ops, "image", None)

    got = [decode_image(data, name) for data in files]

    assert all(map(torch.equal, got, want))
    assert len(asked) == 3
    with pytest.raises(UnreadableImage, match="^cannot read the picture cat.jpg"):
        decode_image(files[0][:900], name)


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_grays_in_floats_and_in_16_bits(tmp_path, white):
    want = np.array(cat().convert("L"))
    Image.fromarray(np.float32(want) / 255 * white).save(tmp_path / "floats.tif")
    Image.fromarray(np.uint16(want)).save(tmp_path / "dark.png")

    dark, floats = (ImageFolder(tmp_path).pixels(i) for i in range(2))

    assert np.abs(floats[0].numpy().astype(int) - want).max() <= 1
    assert dark.max() <= 1  # 16 bits stay 16 bits, however dark


def test_bytes_print_as_their_file():
    data = NamedBytes(b"abc", lambda: "zoo/cat.jpg")

    assert str(data) == "zoo/cat.jpg"
    assert data.read() == b"abc"


def test_a_file_that_has_gone_is_an_unreadable_picture(tmp_path):
    for i in range(3):
        save_gray(tmp_path / f"{i}.png", i)
    pictures = ImageFolder(tmp_path)
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").unlink()
    (tmp_path / "2.png").mkdir()

    for i in (1, 2):
        for read in (pictures.__getitem__, pictures.pixels):
            with pytest.raises(UnreadableImage, match=f"^cannot read the picture .*{i}.png: "):
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


def with_segments(data: bytes, *segments: tuple[int, bytes], junk: bytes = b"") -> bytes:
    "A JPEG with segments (kind, content) in front of all others, and `junk` after each."
    made = b"".join(
        bytes([0xFF, kind]) + (len(inside) + 2).to_bytes(2) + inside + junk
        for kind, inside in segments
    )
    return data[:2] + made + data[2:]


def exif(value: bytes, kind: int = 3, count: int = 1, order: str = "<") -> bytes:
    "EXIF of one field, the orientation."
    head = b"II*\0" if order == "<" else b"MM\0*"
    field = struct.pack(order + "HHI", 0x0112, kind, count) + value.ljust(4, b"\0")
    return b"Exif\0\0" + head + struct.pack(order + "IH", 8, 1) + field + b"\0" * 4


XMP = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="8"/>'
ODD_NOTES = {  # segments, and how the picture then stands
    "upright": ([], 1),
    "as usual": ([(0xE1, exif(b"\6\0"))], 6),
    "big-endian": ([(0xE1, exif(b"\0\6", order=">"))], 6),
    "32 bits": ([(0xE1, exif(b"\6\0\0\0", 4))], 6),
    "8 bits": ([(0xE1, exif(b"\6", 1))], 6),
    "zero": ([(0xE1, exif(b"\0\0"))], 1),
    "nine": ([(0xE1, exif(b"\x09\0"))], 1),
    "many": ([(0xE1, exif(b"\6\0\6\0", count=2))], 1),
    "text": ([(0xE1, exif(b"6\0", 2))], 1),
    "cut": ([(0xE1, exif(b"\6\0")[:-9])], 1),
    "empty": ([(0xE1, b"Exif\0\0")], 1),
    "offset into nowhere": ([(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff")], 1),
    "another order": ([(0xE1, b"Exif\0\0IIU\0" + exif(b"\6\0")[10:])], 1),
    "XMP alone": ([(0xE1, XMP)], 8),
    "XMP against EXIF": ([(0xE1, XMP), (0xE1, exif(b"\6\0"))], 6),
    "twice": ([(0xE1, exif(b"\6\0")), (0xE1, exif(b"\3\0"))], 6),
    "broken, then sound": ([(0xE1, b"Exif\0\0MM"), (0xE1, exif(b"\6\0"))], 6),
    "pages that are none": ([(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff" + b"\1" * 40)], 1),
    "EXIF in a comment": ([(0xFE, exif(b"\6\0"))], 1),
    "a frame in a comment": ([(0xFE, b"\xff\xc0\0\x11\x08\0\x10\0\x10")], 1),
}


@pytest.mark.parametrize("junk", [b"", b"\xff\xff", b"\0rubbish"], ids=("", "filled", "rubbish"))
@pytest.mark.parametrize("what", ODD_NOTES)
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_both_roads_turn_a_jpeg_alike(what, mode, junk):
    segments, turn = ODD_NOTES[what]
    plain = jpeg(cat().resize((48, 32)).convert(mode))
    data = with_segments(plain, *segments, (0xFE, b"end"), junk=junk)

    x = decode_image(data, name)

    assert torch.equal(x, by_pil(data))
    assert torch.equal(x, turned(by_pil(plain), turn))


@pytest.mark.parametrize("junk", [b"", b"\xff", b"\0", b"\xff\xd0"], ids=repr)
def test_nothing_in_front_of_the_frame_hides_its_size(junk):
    "A comment with a small frame in it, filling, rubbish: 256 million pixels stay that many."
    bomb = bytearray(jpeg(cat().resize((16, 16))))
    at = bomb.index(b"\xff\xc0") + 5
    bomb[at : at + 4] = (16_000).to_bytes(2) * 2
    small = b"\xff\xc0\0\x11\x08\0\x10\0\x10\3" + b"\1" * 9
    data = with_segments(bytes(bomb), (0xFE, small), (0xE5, small), (0xFE, b""), junk=junk)

    assert jpeg_pixels(data) == 256_000_000
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        decode_image(data, name)


def test_between_the_limits_of_pillow_nothing_is_read(monkeypatch):
    "Pillow itself warns at its limit, and refuses at twice as much."
    data = jpeg(cat())  # 135,300 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    monkeypatch.setattr(torch.ops.image, "decode_jpeg", None)  # it would not be asked

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for read in (lambda: decode_image(data, name), lambda: load_image(io.BytesIO(data))):
            with pytest.raises(UnreadableImage, match="135,300 pixels, more than 100,000"):
                read()


@pytest.mark.parametrize("error", [RuntimeError(), MemoryError(), ValueError(), OverflowError()])
def test_what_the_fast_decoder_raises_is_left_to_the_other(monkeypatch, error):
    def fail(*_):
        raise error

    data = jpeg(cat())
    monkeypatch.setattr(torch.ops, "image", SimpleNamespace(decode_jpeg=fail))

    assert torch.equal(decode_image(data, name), by_pil(data))


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
