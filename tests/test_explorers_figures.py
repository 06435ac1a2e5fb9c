"""beit_nb.explorers.figures: numbers and tiles as pixels, bars, figures with moving parts."""

import io

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from beit_nb.explorers.figures import (
    COLUMN,
    GROUND,
    BlittedFigure,
    as_tiles,
    count_words,
    gallery,
    heat_map,
    mosaic,
    on_white,
    share_bars,
    side_by_side,
)


def pixels(picture):
    return np.asarray(picture.convert("RGB")).astype(int)


def test_heat_map_looks_colors_up():
    values = np.array([[0.0, 1.0], [0.5, 2.0]])

    picture = pixels(heat_map(values, 2, top=1))

    wanted = colormaps["viridis"](np.clip(values, 0, 1))[..., :3] * 255
    assert (picture == wanted.round()).all()


def test_heat_map_of_nothing_is_dark():
    picture = pixels(heat_map(np.zeros((2, 3)), 30))

    assert picture.shape == (20, 30, 3)
    assert (picture == (np.array(colormaps["viridis"](0.0)[:3]) * 255).round()).all()


def test_side_by_side_keeps_pictures_in_order():
    red, blue = (Image.new("RGB", (50, 100), color) for color in ("red", "blue"))

    page = pixels(side_by_side({"red": red, "blue": blue}, 100))

    assert page.shape == (140, 2 * 50 + 3 * 12, 3)
    assert tuple(page[80, 12 + 25]) == (255, 0, 0) and tuple(page[80, 12 + 62 + 25]) == (0, 0, 255)
    assert tuple(page[80, 5]) == (255, 255, 255)


@pytest.mark.parametrize("gap", (1, 2))
def test_mosaic_puts_every_tile_in_its_place(gap):
    tiles = np.arange(7 * 12, dtype=np.uint8).reshape(7, 2, 2, 3)

    page = pixels(mosaic(tiles, 3, 4, gap))

    step = 4 + gap
    for i in range(7):
        top, left = i // 3 * step + gap, i % 3 * step + gap
        shown = page[top : top + 4, left : left + 4]
        assert (shown == tiles[i].repeat(2, 0).repeat(2, 1)).all()
    assert (page[-1, -1] == GROUND).all()


def test_as_tiles_clips_and_rounds():
    tiles = as_tiles(torch.tensor([-1.0, 0.5, 2.0]).view(1, 3, 1, 1))

    assert tiles.dtype == np.uint8 and tiles.tolist() == [[[[0, 128, 255]]]]


def test_one_is_singular_and_all_else_plural():
    assert [count_words(n, "block") for n in (0, 1, 2)] == ["0 blocks", "1 block", "2 blocks"]
    assert count_words(3, "patch", "patches") == "3 patches"


def test_bars_and_galleries_are_html():
    table = share_bars([("a", 0.86, "0.86", "#000000"), ("b", 1.2, "1.2", "#000000")])
    pictures = gallery({"a": Image.new("RGB", (4, 4)), "b": Image.new("RGB", (4, 4))})

    assert "width:86.0%" in table and "width:100.0%" in table
    assert pictures.count("data:image/png") == 2 and 'alt="b"' in pictures


def test_blitted_figure_draws_what_the_figure_would():
    figure = Figure((3, 2), dpi=100)
    (line,) = figure.subplots().plot([0, 1], [0, 1])
    blitted = BlittedFigure(figure, [line])
    line.set_ydata([1, 0])

    quick = pixels(on_white(blitted.picture()))

    line.set_animated(False)
    figure.savefig(file := io.BytesIO(), facecolor="white")
    assert np.abs(quick - pixels(Image.open(file))).max() <= 2


def test_blitted_figure_forgets_where_it_was():
    figure = Figure((2, 1), dpi=50)
    (line,) = figure.subplots().plot([0, 1], [0, 1])
    blitted = BlittedFigure(figure, [line])
    first = blitted.picture().tobytes()

    line.set_ydata([1, 0])
    other = blitted.picture().tobytes()
    line.set_ydata([0, 1])

    assert blitted.picture().tobytes() == first != other


def test_no_row_of_pictures_is_wider_than_a_lesson():
    red = Image.new("RGB", (168, 168), "red")
    strip = Image.new("RGB", (16, 4), "blue")
    names = ("picture", "sequence", "tokens", "mask")

    page = side_by_side(dict(zip(names, (red, strip, red, red))), 168)

    assert page.height == 3 * (168 + 40)  # the strip has a row of its own
    assert page.width <= COLUMN


def test_a_long_name_pushes_the_next_picture_away():
    dot = Image.new("RGB", (20, 20), "red")

    page = pixels(side_by_side({"a name that is longer than its picture": dot, "b": dot}, 20))

    is_red = (page == (255, 0, 0)).all(-1).any(0)
    lefts = np.flatnonzero(is_red[1:] & ~is_red[:-1]) + 1
    assert len(lefts) == 2 and lefts[1] > 150
