"""beit_nb.engine.notes away from its lesson: notes and the rest, torn parts, what may come in."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from beit_nb import UnreadableImage
from beit_nb.engine.notes import (
    FORMATS,
    FRAMES,
    JPEG_NOTES,
    MOST_PARTS,
    MOST_SCANS,
    PNG_NOTES,
    blank_notes,
    jpeg_segments,
    open_picture,
    orientation,
    plain_note,
    png_chunks,
    read_bytes,
    sort_parts,
    take_apart,
    tiff_fields,
    unpacked,
)

GRAY = Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12))


def saved(kind: str, **more) -> bytes:
    with io.BytesIO() as f:
        GRAY.save(f, kind, **more)
        return f.getvalue()


def exif(turn: int) -> bytes:
    notes = Image.Exif()
    notes[0x0112] = turn
    return notes.tobytes()


def in_front(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    "A JPEG with further segments, (kind, content) each, behind its first two bytes."
    packed = [struct.pack(">BBH", 255, kind, len(inside) + 2) + inside for kind, inside in segments]
    return data[:2] + b"".join(packed) + data[2:]


SOUND = saved("JPEG")


@pytest.mark.parametrize(
    "kept", [(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"), (0xEE, b"Adobe" + b"\0" * 7)]
)
def test_whole_notes_on_colors_stay(kept):
    file = take_apart(in_front(SOUND, kept, (0xE1, b"a note")))

    assert kept[1] in file.data
    assert b"a note" not in file.data
    assert len(file.notes) == 1


@pytest.mark.parametrize("torn", [(0xE0, b"JFIF\0"), (0xEE, b"Adobe"), (0xE1, b"")])
def test_torn_notes_on_colors_are_notes(torn):
    file = take_apart(in_front(SOUND, torn))

    assert file.data == SOUND
    assert len(file.notes) == 1


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_orientation_and_pixels_in_one_pass(kind, turn):
    data = saved(kind, exif=exif(turn))

    file = take_apart(data)

    assert file.orientation == turn == orientation(file.notes)
    assert file.claimed_pixels == (96 if kind == "JPEG" else 0)
    assert file.data == saved(kind)
    assert take_apart(file.data) == (file.data, [], 1, file.claimed_pixels)


def test_a_tiff_keeps_its_length_and_its_pixels():
    data = saved("TIFF", tiffinfo={270: "a title", 0x0112: 6})

    file = take_apart(data)

    assert file.orientation == 6
    assert len(file.data) == len(data) and file.data == blank_notes(data)
    assert {270, 0x0112} & {tag for _, tag, _ in tiff_fields(data)} == {270, 0x0112}
    assert not {270, 0x0112} & {tag for _, tag, _ in tiff_fields(file.data)}
    assert Image.open(io.BytesIO(file.data)).tobytes() == GRAY.tobytes()


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "BMP"])
def test_what_we_do_not_know_stays_whole(kind):
    data = saved(kind)

    assert take_apart(data) == (data, [], 1, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_no_cut_of_a_file_raises(kind):
    "Cut anywhere, and any length said: what is left is sorted all the same."
    data = saved(kind, **({"tiffinfo": {0x0112: 6}} if kind == "TIFF" else {"exif": exif(6)}))
    wrong = [data[:end] for end in range(len(data))]
    for at in range(2, min(120, len(data))):
        wrong.append(data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :])

    for torn in wrong:
        file = take_apart(torn)

        assert file.orientation in range(1, 9)
        assert len(file.data) <= len(torn)


def test_the_largest_of_two_frames_counts():
    frame = b"\x08" + struct.pack(">HH", 300, 200)

    file = take_apart(in_front(SOUND, (0xC0, frame)))

    assert file.claimed_pixels == 60_000
    assert b"\xc0" in FRAMES and b"\xc4" not in FRAMES  # a table is no frame


def test_absurdly_many_parts_and_scans_are_refused():
    parts = ((b"", b"") for _ in range(MOST_PARTS + 1))
    scans = SOUND[:-2] + SOUND[SOUND.rindex(b"\xff\xda") : -2] * MOST_SCANS + b"\xff\xd9"

    with pytest.raises(ValueError, match="more than 200,000 parts"):
        sort_parts(parts, JPEG_NOTES)
    with pytest.raises(ValueError, match="draws its pixels more than 100 times"):
        list(jpeg_segments(scans))


def test_texts_of_a_png_are_unpacked_up_to_a_limit():
    info = PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n26\n" + exif(3)[6:].hex(), zip=True)
    data = saved("PNG", pnginfo=info)
    large = b"\0" + zlib.compress(bytes(2**20))

    [text] = [piece for kind, piece in png_chunks(data) if kind in PNG_NOTES]

    assert plain_note(text)[8:] == exif(3)[6:]
    assert take_apart(data).orientation == 3
    assert unpacked(b"zTXt", large) == bytes(2**18)
    assert unpacked(b"zTXt", b"\0no zlib") == b"\0no zlib"


def test_a_file_is_a_file_of_at_most_a_gigabyte(tmp_path):
    with open(tmp_path / "huge.png", "wb") as f:
        f.truncate(2**40)  # holes: it takes no room
    os.mkfifo(tmp_path / "pipe.png")

    for name in ("huge.png", "pipe.png"):
        with pytest.raises(UnreadableImage, match="no file of at most 1,073,741,824 bytes"):
            read_bytes(tmp_path / name)
    with pytest.raises(UnreadableImage, match="is a folder; name the picture files in it"):
        read_bytes(tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", FORMATS)
def test_one_limit_of_pixels_for_every_format(kind, monkeypatch):
    data = saved(kind)

    with open_picture(data) as image:
        assert image.size == GRAY.size  # 96 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 95)
    with pytest.raises(Image.DecompressionBombError, match="96 pixels, more than 95"):
        open_picture(data)


@pytest.mark.parametrize("kind", ["EPS", "TGA", "PCX", "ICNS"])
def test_no_other_decoder_sees_a_file(kind):
    with pytest.raises(UnidentifiedImageError):
        open_picture(saved(kind))
