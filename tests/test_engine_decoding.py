"""beit_nb.engine.decoding away from its lesson: odd files, odd notes, bombs, two decoders."""

import io
import os
import resource
import signal
import struct
import time
import warnings
import zlib
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import EpsImagePlugin, Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

import beit_nb.engine.decoding as decoding
from beit_nb import BeitError, UnreadableImage
from beit_nb.engine.decoding import (
    NamedBytes,
    decode_bands,
    decode_image,
    load_image,
    turned,
)
from beit_nb.engine.notes import take_apart
from beit_nb.engine.walks import EXTENSIONS
from beit_nb.explorers.pad import read_picture
from beit_nb.images import photos


def refused(path):
    with pytest.raises(UnreadableImage) as e:
        load_image(path)
    return str(e.value)


def test_damaged_and_missing_files_raise_one_class_with_the_path(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.jpg").write_bytes(b"")

    assert issubclass(UnreadableImage, BeitError)
    assert "there is no picture at" in refused(tmp_path / "missing.png")
    for name in ("text.png", "empty.jpg"):
        message = refused(tmp_path / name)
        assert str(tmp_path / name) in message
        assert "replace or delete that file" in message


def test_a_picture_that_would_burst_the_memory(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)

    assert "cannot read the picture" in refused(tmp_path / "bomb.png")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    gray = Image.new("L", (6, 4), 255)
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 6), 65535, np.uint16))
    elif mode == "I":
        image = Image.fromarray(np.full((4, 6), 65535, np.int32))
    else:
        image = gray.convert(mode)
    image.save(tmp_path / "x.tif")

    loaded = load_image(tmp_path / "x.tif")

    assert (loaded.mode, loaded.size) == ("RGB", (6, 4))
    assert np.array(loaded).min() > 250


def test_a_transparent_palette(tmp_path):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([255, 0, 255, 0, 0, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "x.gif", transparency=0)

    loaded = load_image(tmp_path / "x.gif")

    assert np.array(loaded).tolist() == [[[255, 255, 255], [0, 0, 0]]]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(bits: int, color: int, row: bytes, *more: tuple[bytes, bytes], width: int = 2) -> bytes:
    "A PNG of one row; `more` chunks stand in front of the pixels."
    header = struct.pack(">IIBBBBB", width, 1, bits, color, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


def tiff(bits: int, data: bytes, kind: int = 1, black: int = 1, *more: tuple, width: int = 2):
    "A gray TIFF of one row; `kind` of level: 1 unsigned, 2 signed, 3 float; `more`: (tag, number)."
    fields = [(256, width), (257, 1), (258, bits), (259, 1), (262, black), (277, 1), (278, 1)]
    fields = sorted([*fields, (273, None), (279, len(data)), (339, kind), *more])
    start = 8 + 2 + 12 * len(fields) + 4
    packed = [struct.pack("<HHII", t, 4, 1, start if v is None else v) for t, v in fields]
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + b"".join(packed) + b"\0" * 4 + data


def saved(image, kind: str, **more) -> bytes:
    with io.BytesIO() as f:
        image.save(f, kind, **more)
        return f.getvalue()


def levels(data: bytes) -> list[int]:
    "The red of each pixel, of a picture of which all is gray."
    pixels = np.array(load_image(io.BytesIO(data)))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].ravel().tolist()


def exif(turn: int, kind: int = 3, count: int = 1, order: str = ">", tag: int = 0x0112) -> bytes:
    "EXIF data of one field."
    value = struct.pack(order + "H", turn) if kind == 3 else struct.pack(order + "I", turn)
    head = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(order + "IH", 8, 1)
    return head + struct.pack(order + "HHI", tag, kind, count) + value.ljust(4, b"\0") + b"\0" * 4


HALVES = Image.new("RGB", (16, 32), "white")  # black above
HALVES.paste("black", (0, 0, 16, 16))
LYING = HALVES.transpose(Image.Transpose.ROTATE_90)  # EXIF says 6


def stands(data: bytes) -> bool:
    "Is it HALVES?"
    image = load_image(io.BytesIO(data))
    return image.size == (16, 32) and np.asarray(image)[[4, 28], 8].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [3, 4])
def test_orientation_is_read_from_every_container(kind, order):
    data = exif(6, kind, order=order)
    xmp = b'<x:xmpmeta tiff:Orientation="6"/>'
    digits = f"\nexif\n{len(data)}\n{data.hex()}\n"
    texts = [PngInfo(), PngInfo(), PngInfo()]
    texts[0].add_text("Raw profile type exif", digits, zip=True)
    texts[1].add_itxt("XML:com.adobe.xmp", xmp.decode())
    texts[2].add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=True)

    for more in (dict(exif=b"Exif\0\0" + data), dict(xmp=xmp)):
        for container in ("JPEG", "WEBP"):
            assert stands(saved(LYING, container, **more)), (container, more)
    assert stands(saved(LYING, "PNG", exif=data))
    assert stands(saved(LYING, "TIFF", tiffinfo={0x0112: 6}))
    assert all(stands(saved(LYING, "PNG", pnginfo=text)) for text in texts)


@pytest.mark.parametrize(
    "odd",
    [
        b"",
        b"II",
        b"MM\0*",
        b"MM\0*\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff",
        b"not EXIF at all",
        exif(6)[:-8],
        exif(0),
        exif(9),
        exif(65535),
        exif(6, count=2),
        exif(6, kind=5),
        exif(6, kind=99),
        exif(6, tag=0x8769),
        exif(2**31, kind=4, tag=0x8825),
        exif(0, kind=5, tag=0x011A),
    ],
)
def test_no_odd_exif_costs_a_picture(odd):
    for container in ("JPEG", "WEBP", "PNG"):
        data = saved(HALVES, container, exif=b"Exif\0\0" + odd)
        assert stands(data), container


def test_every_cut_of_odd_notes_leaves_the_picture():
    "MPF and Photoshop blocks, profiles and comments: cut and mutated, they change no pixel."
    whole = saved(HALVES, "JPEG")
    rng = np.random.default_rng(0)
    notes = [b"MPF\0II*\0\x08\0\0\0\x03\0" + bytes(rng.integers(0, 256, 60, np.uint8))]
    notes += [b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x03abc", b"ICC_PROFILE\0\1\2x", b"FPXR\0"]
    for note in notes:
        for kind in (0xE1, 0xE2, 0xED, 0xEF, 0xFE):
            for end in range(0, len(note), 7):
                segment = bytes([0xFF, kind]) + struct.pack(">H", 2 + end) + note[:end]
                assert stands(whole[:2] + segment + whole[2:]), (kind, note[:end])


def test_large_and_broken_texts_of_a_png_cost_nothing():
    letters = zlib.compress(b"x" * 70_000_000)
    broken = [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"gAMA", b"cHRM", b"pHYs", b"sRGB", b"acTL"]
    more = [(b"zTXt", b"a\0\0" + letters), (b"iTXt", b"b\0\1\0\0\0" + letters)]
    more += [(b"iCCP", b"c\0\0" + letters), (b"tEXt", b"d\0" + b"x" * 2_000_000)]
    more += [(kind, b"a\0\0" + b"\xff" * n) for kind in broken for n in (0, 3)]

    assert levels(png(8, 0, b"\1\2", *more)) == [1, 2]


SOUND = saved(HALVES, "JPEG", quality=95)
LOADED = np.asarray(load_image(io.BytesIO(SOUND)))


def in_front(*segments: tuple[int, bytes]) -> bytes:
    "SOUND with further segments, (kind, content) each, behind its first two bytes."
    packed = [struct.pack(">BBH", 255, kind, len(data) + 2) + data for kind, data in segments]
    return SOUND[:2] + b"".join(packed) + SOUND[2:]


@pytest.mark.parametrize(
    "segment", [(0xE0, b"JFIF\0"), (0xE0, b"JFXX\0\x10"), (0xEE, b"Adobe"), (0xEE, b"Adobe\0d")]
)
def test_notes_on_colors_that_are_cut_short_say_nothing(segment):
    data = in_front(segment)

    assert np.array_equal(load_image(io.BytesIO(data)), LOADED)
    assert np.array_equal(decode_image(data, lambda: "x").permute(1, 2, 0), LOADED)


SCANS = saved(Image.new("L", (64, 64)), "JPEG", progressive=True)
LAST = SCANS[SCANS.rindex(b"\xff\xda") : -2]
HOLD_UP = {  # small files that kept a decoder, or us, busy: what comes of them
    "filling before a zero": (SOUND[:2] + b"\xff" * 100_000 + b"\0" + SOUND[2:], "picture"),
    "a million segments": (SOUND[:2] + b"\xff\xe3\0\2" * 10**6 + SOUND[2:], "200,000 parts"),
    "a million chunks": (png(8, 0, b"\1\2", *[(b"abCd", b"")] * 10**6), "200,000 parts"),
    "a thousand scans": (SCANS[:-2] + LAST * 1000 + b"\xff\xd9", "draws its pixels more than"),
    "a film behind the picture": (SOUND + b"\xff\xda\0\2" * 1000, "picture"),
    "comments in a plain PPM": (b"P3 1 1 255\n" + b"#a\n" * 10**6 + b"1 2 3", "picture"),
    "texts of a PNG": (
        png(8, 0, b"\1\2", *[(b"zTXt", b"x\0\0" + zlib.compress(bytes(2**20)))] * 3000),
        "picture",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", HOLD_UP)
def test_no_small_file_holds_us_up(what):
    data, outcome = HOLD_UP[what]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()

    for load in (lambda: load_image(io.BytesIO(data)), lambda: decode_image(data, lambda: "x")):
        try:
            load()
            found = "picture"
        except UnreadableImage as e:
            found = str(e)
        assert outcome in found

    assert time.process_time() - began < 10  # each took from 20 seconds to hours
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 2**20  # kB; it was 2.9 GB


def test_one_frame_is_no_more_than_one(capsys):
    for frames, words in ((1, False), (2, True)):
        load_image(io.BytesIO(png(8, 0, b"\1\2", (b"acTL", struct.pack(">II", frames, 0)))))

        assert ("more than one page or frame" in capsys.readouterr().err) == words


def test_fields_of_a_tiff_that_are_no_numbers_are_passed_over():
    "Which level is the largest may be said in words: 281 as text of one letter."
    data = tiff(16, struct.pack("<HH", 0, 65535), 1, 1, (281, 65))
    text = data.replace(struct.pack("<HHI", 281, 4, 1), struct.pack("<HHI", 281, 2, 1))

    assert text != data
    assert levels(text) == [0, 255]


def test_odd_fields_of_a_tiff_cost_nothing():
    "Offsets into nowhere, in EXIF, GPS, the resolution and the profile."
    more = [(tag, 2**31 - 1) for tag in (282, 283, 34665, 34853, 34675, 700, 33723, 40965)]

    assert levels(tiff(8, b"\1\2", 1, 1, *more)) == [1, 2]


class Whatever(Exception):
    pass


@pytest.mark.parametrize(
    "error",
    [
        struct.error("unpack"), OverflowError(), SyntaxError("x"), RuntimeError("a\nb"),
        KeyError(1), MemoryError(), RecursionError(), AssertionError(), ZeroDivisionError(),
        Whatever(),
    ],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_whatever_a_decoder_raises_is_an_unreadable_picture(tmp_path, monkeypatch, error):
    HALVES.save(tmp_path / "a.png")

    def load(self):
        raise error

    monkeypatch.setattr(PngImageFile, "load", load)

    message = refused(tmp_path / "a.png")
    assert str(tmp_path / "a.png") in message and "\n" not in message


def test_ctrl_c_is_no_damage(tmp_path, monkeypatch):
    HALVES.save(tmp_path / "a.png")
    monkeypatch.setattr(PngImageFile, "load", lambda self: signal.raise_signal(signal.SIGINT))

    with pytest.raises(KeyboardInterrupt):
        load_image(tmp_path / "a.png")


GRAYS = {  # what it is: its bytes, its levels
    "12 bits, packed": (tiff(12, bytes([0xFF, 0xF8, 0x00])), [255, 128]),
    "12 bits in 16, said": (tiff(16, b"\xff\x0f\0\x08", 1, 1, (281, 4095)), [255, 128]),
    "10 bits in 16, said": (tiff(16, struct.pack("<HH", 1023, 512), 1, 1, (281, 1023)), [255, 128]),
    "what was brightest": (tiff(16, struct.pack("<HH", 40000, 0), 1, 1, (281, 40000)), [156, 0]),
    "a PGM of 12 bits": (b"P5 2 1 4095\n" + struct.pack(">HH", 4095, 2048), [255, 128]),
    "16 bits, white is 0": (tiff(16, struct.pack("<HH", 0, 65535), 1, 0), [255, 0]),
    "16 bits with a sign": (tiff(16, struct.pack("<hh", -5, 32767), 2), [0, 255]),
    "32 bits": (tiff(32, struct.pack("<II", 2**32 - 1, 2**31)), [255, 128]),
    "32 bits, small": (tiff(32, struct.pack("<II", 65535, 257)), [255, 1]),
    "32 bits with a sign": (tiff(32, struct.pack("<ii", -5, 2**31 - 1), 2), [0, 255]),
    "big-endian": (saved(Image.frombytes("I;16B", (2, 1), b"\xff\xff\x80\0"), "TIFF"), [255, 128]),
    "16 bits, a key": (png(16, 0, b"\x80\0\3\xe8", (b"tRNS", b"\3\xe8")), [128, 255]),
    "8 bits, a key": (png(8, 0, b"\1\2", (b"tRNS", b"\0\2")), [1, 255]),
    "4 bits, a key": (png(4, 0, b"\x12", (b"tRNS", b"\0\1")), [255, 34]),
    "2 bits, a key": (png(2, 0, b"\x60", (b"tRNS", b"\0\1")), [255, 170]),
    "1 bit, a key": (png(1, 0, b"\x40", (b"tRNS", b"\0\0")), [255, 255]),
    "16 bits and alpha": (png(16, 4, b"\x80\0\xff\xff\x80\0\0\0"), [128, 255]),
    "colors, a key": (png(8, 2, bytes([7, 7, 7, 8, 8, 8]), (b"tRNS", b"\0\7" * 3)), [255, 8]),
    "deep colors, a key": (png(16, 2, b"\7\1" * 3 + b"\7\2" * 3, (b"tRNS", b"\7\1" * 3)), [255, 7]),
    "a palette with alpha": (
        png(8, 3, b"\0\1", (b"PLTE", bytes([0, 0, 0, 9, 9, 9])), (b"tRNS", b"\0\xff")),
        [255, 9],
    ),
    "infinite": (tiff(32, struct.pack("<ff", 0.5, np.inf), 3), [128, 255]),
    "below black": (tiff(32, struct.pack("<ff", -1, 1), 3), [0, 255]),
}  # fmt: skip


@pytest.mark.parametrize("what", GRAYS)
def test_grays_are_what_they_mean(what, capsys):
    data, want = GRAYS[what]

    assert levels(data) == want
    assert capsys.readouterr().err == ""


ODD = {  # what it is: its bytes, its levels, a word of the line that tells
    "NaN of 1": (tiff(32, struct.pack("<ff", 0.5, np.nan), 3), [128, 255], "NaN"),
    "NaN of 255": (tiff(32, struct.pack("<ff", 127.5, np.nan), 3), [128, 255], "NaN"),
    "12 bits in 16": (tiff(16, struct.pack("<HH", 4095, 0)), [16, 0], "nearly black"),
    "floats beyond 1": (tiff(32, struct.pack("<ff", 1.5, 0), 3), [2, 0], "nearly black"),
}
for kind in ("TIFF", "GIF", "PNG", "WEBP"):
    white = Image.new("L", (2, 1), 255)
    pages = saved(white, kind, save_all=True, append_images=[Image.new("L", (2, 1))])
    ODD[f"a {kind} of two"] = (pages, [255, 255], "the first is taken")


@pytest.mark.parametrize("what", ODD)
def test_what_has_no_right_value_is_told_in_one_line(what, capsys, tmp_path):
    data, want, word = ODD[what]
    (tmp_path / "odd").write_bytes(data)

    assert levels(data) == want
    said = set()
    capsys.readouterr()
    for _ in range(2):  # once for all that share `said`
        load_image(tmp_path / "odd", said)

    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"beit: the picture {tmp_path / 'odd'} ") and word in line


def gif(screen: int, frame: int) -> bytes:
    sizes = (
        struct.pack("<HHBBB", screen, screen, 0x80, 0, 0),
        struct.pack("<HHHHB", 0, 0, frame, frame, 0),
    )
    return b"GIF89a" + sizes[0] + b"\0\0\0\xff\xff\xff," + sizes[1] + b"\2\2\x44\1\0;"  # fmt: skip


TALL = struct.pack("<HHII", 257, 4, 1, 1000)  # the height in a TIFF
BOMBS = {  # a few bytes that claim 100 million pixels or more
    "PNG": png(1, 0, b"\0" * 100, width=100_000_000),
    "a GIF's screen": gif(10_000, 1),
    "a GIF's frame": gif(1, 30_000),
    "TIFF": tiff(8, b"\0" * 9, width=2**27),
    "a TIFF's tile": tiff(8, b"\0" * 9, 1, 1, (322, 20_000), (323, 20_000), (324, 8), (325, 9)),
    "PPM": b"P6 10000 10000 255\n",
    "BMP": b"BM" + struct.pack("<IHHI", 100, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 10_000, 10_000, 1, 8, 1, 0, 0, 0, 2, 0) + b"\0" * 20,
}  # fmt: skip


@pytest.mark.parametrize("what", BOMBS)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_one_limit_for_all_formats(tmp_path, what):
    (tmp_path / "x").write_bytes(BOMBS[what])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    assert "decompression bomb" in refused(tmp_path / "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB; one is 89,000


def test_half_a_picture_is_none(tmp_path):
    "One strip of one row, where the header promises a thousand; Pillow leaves the others black."
    data = tiff(16, b"\1\2\3\4").replace(struct.pack("<HHII", 257, 4, 1, 1), TALL)
    (tmp_path / "x.tif").write_bytes(data)

    assert "only a part of the picture" in refused(tmp_path / "x.tif")


PROGRAMS = "gs gswin32c gswin64c convert magick djpeg cjpeg dcraw xv ffmpeg ghostscript ppmtogif"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_file_starts_a_program(tmp_path, monkeypatch):
    "Every kind that Pillow writes, and EPS by hand, under every ending: nothing is ever started."
    started = tmp_path / "started"
    (tmp_path / "bin").mkdir()
    for program in PROGRAMS.split():
        file = tmp_path / "bin" / program
        file.write_text(f"#!/bin/sh\necho {program} >> {started}\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    Image.init()
    files = {"EPS, by hand": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"}
    for kind in Image.SAVE:
        for mode in ("RGB", "L", "1"):
            with suppress(Exception):
                files[f"{kind} {mode}"] = saved(HALVES.convert(mode), kind)
    assert len(files) > 50

    for kind, data in files.items():
        for ending in sorted(EXTENSIONS):
            (tmp_path / f"x{ending}").write_bytes(data)
            with suppress(UnreadableImage):
                load_image(tmp_path / f"x{ending}")
            assert not started.exists(), (kind, ending)
        with suppress(UnreadableImage):
            read_picture(data)
        with suppress(UnreadableImage):
            decode_image(data, lambda: "x")
        assert not started.exists(), kind
    with suppress(Exception), Image.open(io.BytesIO(files["EPS RGB"])) as careless:
        careless.load()
    assert started.exists(), "the careless way does start it: this test can fail"


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
    monkeypatch.setattr(decoding, "load_image", lambda f, said: asked.append(f) or load_image(f))
    monkeypatch.setattr(torch.ops, "image", None)

    got = [decode_image(data, name) for data in files]

    assert all(map(torch.equal, got, want))
    assert len(asked) == 3
    with pytest.raises(UnreadableImage, match="^cannot read the picture cat.jpg"):
        decode_image(files[0][:900], name)


def test_bytes_print_as_their_file():
    data = NamedBytes(b"abc", lambda: "zoo/cat.jpg")

    assert str(data) == "zoo/cat.jpg"
    assert data.read() == b"abc"


def with_segments(data: bytes, *segments: tuple[int, bytes], junk: bytes = b"") -> bytes:
    "A JPEG with segments (kind, content) in front of all others, and `junk` after each."
    made = b"".join(
        bytes([0xFF, kind]) + (len(inside) + 2).to_bytes(2) + inside + junk
        for kind, inside in segments
    )
    return data[:2] + made + data[2:]


def exif_of(value: bytes, kind: int = 3, count: int = 1, order: str = "<") -> bytes:
    "EXIF of one field, the orientation."
    head = b"II*\0" if order == "<" else b"MM\0*"
    field = struct.pack(order + "HHI", 0x0112, kind, count) + value.ljust(4, b"\0")
    return b"Exif\0\0" + head + struct.pack(order + "IH", 8, 1) + field + b"\0" * 4


XMP_OF_8 = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="8"/>'
ODD_NOTES = {  # segments, and how the picture then stands
    "upright": ([], 1),
    "as usual": ([(0xE1, exif_of(b"\6\0"))], 6),
    "big-endian": ([(0xE1, exif_of(b"\0\6", order=">"))], 6),
    "32 bits": ([(0xE1, exif_of(b"\6\0\0\0", 4))], 6),
    "8 bits": ([(0xE1, exif_of(b"\6", 1))], 6),
    "zero": ([(0xE1, exif_of(b"\0\0"))], 1),
    "nine": ([(0xE1, exif_of(b"\x09\0"))], 1),
    "many": ([(0xE1, exif_of(b"\6\0\6\0", count=2))], 1),
    "text": ([(0xE1, exif_of(b"6\0", 2))], 1),
    "cut": ([(0xE1, exif_of(b"\6\0")[:-9])], 1),
    "empty": ([(0xE1, b"Exif\0\0")], 1),
    "offset into nowhere": ([(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff")], 1),
    "another order": ([(0xE1, b"Exif\0\0IIU\0" + exif_of(b"\6\0")[10:])], 1),
    "XMP alone": ([(0xE1, XMP_OF_8)], 8),
    "XMP against EXIF": ([(0xE1, XMP_OF_8), (0xE1, exif_of(b"\6\0"))], 6),
    "twice": ([(0xE1, exif_of(b"\6\0")), (0xE1, exif_of(b"\3\0"))], 6),
    "broken, then sound": ([(0xE1, b"Exif\0\0MM"), (0xE1, exif_of(b"\6\0"))], 6),
    "pages that are none": ([(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff" + b"\1" * 40)], 1),
    "EXIF in a comment": ([(0xFE, exif_of(b"\6\0"))], 1),
    "a frame in a comment": ([(0xFE, b"\xff\xc0\0\x11\x08\0\x10\0\x10")], 1),
}


@pytest.mark.slow
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

    assert take_apart(data).claimed_pixels == 256_000_000
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


def written(write, array, **options) -> bytes:
    with io.BytesIO() as f:
        write(f, array, **options)
        return f.getvalue()


@pytest.mark.filterwarnings("ignore:.*stored as RGB:DeprecationWarning")
@pytest.mark.parametrize("bands", [2, 4, 5, 13])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float64"])
@pytest.mark.parametrize("last", [True, False])
def test_bands_are_the_same_by_every_writer(bands, dtype, last):
    "tifffile's habits: a page a band or a row, all in one strip, planes apart; and NumPy's array."
    x = np.random.default_rng(bands).random((bands, 20, 17))
    white = np.iinfo(dtype).max if dtype[0] == "u" else 1
    x = (x * white).astype(dtype)
    stored = np.ascontiguousarray(x.transpose(1, 2, 0)) if last else x
    config = "contig" if last else "separate"
    files = [
        written(np.save, stored),
        written(tifffile.imwrite, stored),
        written(tifffile.imwrite, stored, photometric="minisblack"),
        written(tifffile.imwrite, stored, photometric="minisblack", planarconfig=config),
    ]
    for file in files:
        got = decode_bands(file, lambda: "field", bands)
        assert got.dtype == torch.float32 and got.shape == (bands, 20, 17)
        np.testing.assert_allclose(got.numpy(), x / white, atol=1e-6)


def test_where_bands_could_stand_first_and_last_they_are_first():
    x = np.random.default_rng(0).random((5, 8, 5)).astype(np.float32)

    got = decode_bands(written(np.save, x), lambda: "field", 5)

    assert np.array_equal(got.numpy(), x)


@pytest.mark.parametrize("shape", [(4, 9, 7), (9, 7, 4), (9, 7), (1, 5, 9, 7), (5,), ()])
def test_other_bands_are_a_mistake_that_names_the_file(shape):
    with pytest.raises(BeitError, match="the picture my/field.npy is .* 5 channels") as e:
        decode_bands(written(np.save, np.zeros(shape, np.uint8)), lambda: "my/field.npy", 5)

    assert not isinstance(e.value, UnreadableImage)  # it would be passed over


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (b"", "not a TIFF"),
        (b"\x93NUMPY\x01\x00", "replace or delete"),
        (written(np.save, np.zeros((5, 8, 8), np.int16)), "holds int16; save uint8"),
        (written(np.save, np.zeros((5, 8, 8), complex)), "holds complex128"),
        (written(np.save, np.array([{}]), allow_pickle=True), "replace or delete"),  # never run
        (written(tifffile.imwrite, np.zeros((5, 8, 8), np.uint16))[:200], "replace or delete"),
    ],
)
def test_files_without_bands_are_unreadable(file, says):
    with pytest.raises(UnreadableImage, match="field") as e:
        decode_bands(file, lambda: "field.tif", 5)

    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_tiff_of_bands_that_would_burst_the_memory(monkeypatch):
    file = written(tifffile.imwrite, np.zeros((5, 30, 30), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)

    with pytest.raises(UnreadableImage, match="4,500 numbers, more than 4,000"):
        decode_bands(file, lambda: "field", 5)


def test_odd_bands_are_told_once(capsys):
    x = np.full((5, 8, 8), 0.5, np.float32)
    x[0, 0, 0] = np.nan
    x[1, 0, 0] = 3000
    said = set()

    first, second = (decode_bands(written(np.save, x), lambda: "field", 5, said) for _ in range(2))

    assert first[0, 0, 0] == 0 and torch.equal(first, second)
    told = capsys.readouterr().err
    assert told.count("NaN") == 1 and told.count("has floats up to 3000") == 1
