"""beit_nb.explorers.pad: any source to a square picture, what is drawn on it, and the pad."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from beit_nb import UnreadableImage
from beit_nb.explorers.pad import (
    HIDDEN,
    Box,
    PatchPad,
    add_static_picture,
    asset,
    center_square,
    cover_cells,
    draw_boxes,
    png_bytes,
    read_picture,
    small_copy,
)
from beit_nb.images import PALETTE, to_tensor

GRAY = tuple(int(HIDDEN[i : i + 2], 16) for i in (1, 3, 5))
GREEN = tuple(int(PALETTE["green"][i : i + 2], 16) for i in (1, 3, 5))


def pixels(picture):
    return np.asarray(picture.convert("RGB")).astype(int)


@pytest.fixture
def cat():
    return read_picture("chelsea")


@pytest.mark.parametrize("mode", ("RGB", "RGBA", "L", "P", "1"))
def test_png_keeps_every_pixel(cat, mode):
    image = cat.crop((100, 80, 101 + 50, 80 + 31)).convert(mode)

    again = Image.open(io.BytesIO(png_bytes(image)))
    again.load()

    assert again.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()


def test_center_square_cuts_the_middle():
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 100:200] = 255

    square = center_square(Image.fromarray(wide), 100)

    assert (pixels(square) == 255).all()


def test_a_long_thin_picture_is_refused():
    with pytest.raises(UnreadableImage, match="3000 x 60 has no useful centre square"):
        center_square(Image.new("RGB", (3000, 60)), 448)


def test_every_source_gives_the_same_picture(cat, tmp_path):
    (tmp_path / "cat.png").write_bytes(png_bytes(cat))
    sources = (cat, png_bytes(cat), tmp_path / "cat.png", str(tmp_path / "cat.png"), to_tensor(cat))

    for source in sources:
        assert (pixels(read_picture(source)) == pixels(cat)).all()


@pytest.mark.parametrize("bad", (b"GIF89a but not really", "no/such/file.png", b""))
def test_what_is_no_picture_is_refused_in_one_line(bad):
    with pytest.raises(UnreadableImage, match="is not a picture that can be read") as refused:
        read_picture(bad)
    assert "\n" not in str(refused.value)


def test_too_many_pixels_are_refused_from_the_header(cat):
    with pytest.raises(UnreadableImage, match="million pixels or more"):
        read_picture(png_bytes(cat), max_pixels=1000)


def test_cells_are_covered_and_the_original_stays(cat):
    mask = np.random.default_rng(0).random((14, 14)) < 0.3
    before = pixels(cat)

    covered = pixels(cover_cells(cat, mask))

    gray = (covered == GRAY).all(-1)
    assert (gray[16::32, 16::32] == mask).all()
    outside = np.repeat(np.repeat(~mask, 32, 0), 32, 1)
    assert (covered[outside] == before[outside]).all() and (pixels(cat) == before).all()


def test_boxes_are_counted_in_cells(cat):
    drawn = pixels(draw_boxes(cat, [Box(2, 3, 4, 5, PALETTE["green"])], 14, 14))

    for row, col in ((2 * 32, 3 * 32), (6 * 32 - 1, 8 * 32 - 1), (2 * 32, 6 * 32)):
        assert tuple(drawn[row, col]) == GREEN
    inside = np.s_[2 * 32 + 3 : 6 * 32 - 3, 3 * 32 + 3 : 8 * 32 - 3]
    assert (drawn[inside] == pixels(cat)[inside]).all()


def test_static_picture_joins_the_bundle_or_is_left_out(cat):
    data, metadata = add_static_picture(({"text/plain": "a cat"}, {"a": 1}), lambda: cat, "a cat")
    nothing = add_static_picture(None, lambda: 1 / 0)

    assert base64.b64decode(data["image/png"]) == png_bytes(cat)
    assert data["text/plain"] == "a cat" and metadata == {"a": 1, "image/png": {"alt": "a cat"}}
    assert nothing == ({}, {})


def test_press_paints_or_points():
    paint = PatchPad()
    pick = PatchPad(mode="pick")

    for pad in (paint, pick):
        pad.press(20)

    assert paint.marked == [20] and paint.mask[1, 6] and paint.mask.sum() == 1
    assert pick.marked == [] and pick.cursor == paint.cursor == 20
    paint.press(20)
    assert paint.marked == []


def test_a_mask_of_another_size_changes_the_grid():
    pad = PatchPad(cursor=195)

    pad.mask = np.eye(3, dtype=bool)

    assert (pad.rows, pad.cols, pad.marked, pad.cursor) == (3, 3, [0, 4, 8], 8)
    assert (pad.mask == np.eye(3)).all()


def test_pad_as_a_picture_shows_mask_boxes_and_cursor(cat):
    pad = PatchPad(cat, width=280, mode="pick", cursor=0)
    pad.mask = np.arange(196).reshape(14, 14) == 100
    pad.boxes = [Box(10, 10, 2, 2, PALETTE["green"])]

    picture = pixels(pad.static_picture())

    row, col = divmod(100, 14)
    assert tuple(picture[row * 20 + 10, col * 20 + 10]) == GRAY
    assert tuple(picture[200, 200]) == GREEN
    assert tuple(picture[0, 0]) == (0xE0, 0x80, 0x20)


def test_browser_half_asks_only_for_traits_of_the_pad():
    source = asset("pad.js")
    asked = {part.split('"')[0] for part in source.split('model.get("')[1:]}

    assert asked and asked <= set(PatchPad().traits(sync=True))
    assert "ink" in asked and PatchPad().ink == HIDDEN


def png_of_one_bit(width, height):
    "A PNG of a few hundred bytes, all black."
    with io.BytesIO() as f:
        Image.new("1", (width, height)).save(f, "PNG")
        return f.getvalue()


def test_an_upload_of_too_many_pixels_is_refused_like_any_file(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)

    for side in (1001, 1500):  # beyond twice the limit Pillow itself refuses
        with pytest.raises(UnreadableImage, match="^dots.png has .* million pixels or more"):
            small_copy(png_of_one_bit(side, side), "dots.png")


def test_of_an_upload_one_square_stays(cat):
    kept, whole = small_copy(png_bytes(cat))
    large, part = small_copy(png_of_one_bit(3000, 2000))
    tiny, _ = small_copy(png_of_one_bit(5, 7))

    assert kept.size == cat.size and (pixels(kept) == pixels(cat)).all()
    assert (large.size, tiny.size) == ((896, 896), (5, 5))
    assert (pixels(read_picture(kept)) == pixels(cat)).all()
    assert whole == f"shown: {cat.width} x {cat.height}"
    assert part == "shown: the centre 2000 x 2000 of 3000 x 2000"


def test_a_stroke_that_was_taken_back_is_over():
    "On a busy machine the browser sends the rest of it after the button was heard."
    pad = PatchPad(rows=2, cols=2)
    pad.set_state({"stroke": 1, "marked": [0]})

    pad.take_back()
    pad.marked = []
    pad.set_state({"marked": [0, 1], "cursor": 1})

    assert (pad.marked, pad.cursor) == ([], 1)
    pad.set_state({"stroke": 2, "marked": [3]})
    pad.set_state({"marked": [2, 3]})
    assert pad.marked == [2, 3]
