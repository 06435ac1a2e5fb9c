"""beit_nb.explorers.shell: guarded callbacks, slow work in pieces, menus, function explorers."""

import asyncio
import threading
from datetime import UTC, datetime

import ipywidgets as W
import numpy as np
import pytest
from PIL import Image

from beit_nb import UnreadableImage
from beit_nb.explorers.pad import PatchPad, png_bytes
from beit_nb.explorers.shell import (
    DebouncedCallback,
    Explorer,
    FunctionExplorer,
    PictureMenu,
    control,
    one_line,
)


def draw_gray(share):
    "A tiny pure figure: share -> (picture, words)."
    return Image.new("RGB", (8, 8), (round(255 * share),) * 3), f"{1 / share:.2f}"


def gray_explorer(value=1.0):
    return FunctionExplorer(draw_gray, control(W.FloatSlider, "share", value=value, max=1))


def test_one_line_of_an_error():
    assert one_line(ValueError("first\nsecond")) == "first"
    assert one_line(KeyError()) == "KeyError"


def test_work_is_done_at_once_without_a_loop():
    done = []

    DebouncedCallback().start(done.append(i) for i in range(3))

    assert done == [0, 1, 2]


def test_errors_of_work_are_told_in_one_line():
    errors = []

    DebouncedCallback(errors.append).start(1 / x for x in (1, 0))

    assert errors == ["division by zero"]


async def drop_and_finish():
    done = []
    callback = DebouncedCallback()
    callback.start(done.append(f"a{i}") for i in range(3))
    callback.start(done.append(f"b{i}") for i in range(2))
    before = (callback.busy, list(done))
    await asyncio.sleep(0.3)
    return before, callback.busy, done


def test_a_new_start_drops_the_old_work():
    before, busy, done = asyncio.run(drop_and_finish())

    assert before == (True, []) and not busy and done == ["b0", "b1"]


async def stop_in_the_middle():
    done = []

    def work():
        for i in range(100):
            done.append(i)
            yield 0.01

    callback = DebouncedCallback()
    callback.start(work(), delay=0)
    await asyncio.sleep(0.1)
    callback.stop()
    seen = len(done)
    await asyncio.sleep(0.1)
    return seen, len(done)


def test_stop_ends_work_between_two_pieces():
    seen, after = asyncio.run(stop_in_the_middle())

    assert 0 < seen < 100 and after == seen


def test_callbacks_of_two_threads_do_not_mix():
    pad = PatchPad()
    explorer = Explorer([])

    def paint(n):
        pad.mask = np.ones((n, n), bool)

    def paint_often(n):
        for _ in range(100):
            explorer.guarded(paint)(n)

    threads = [threading.Thread(target=paint_often, args=(n,)) for n in (8, 14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert pad.mask.all() and len(pad.marked) == pad.rows * pad.cols in (64, 196)


def test_control_moves_picture_and_words():
    explorer = gray_explorer()
    before = explorer.view.value

    explorer.controls[0].value = 0.5

    assert explorer.view.value != before and ">2.00<" in explorer.words.value
    assert explorer.static_picture().getpixel((0, 0)) == (128, 128, 128)


def test_a_mistake_is_one_line_and_the_picture_stays():
    explorer = gray_explorer()
    before = explorer.view.value

    explorer.controls[0].value = 0.0

    assert "division by zero" in explorer.error_line.value
    assert "Traceback" not in explorer.error_line.value and explorer.view.value == before
    explorer.controls[0].value = 0.5
    assert "alert" not in explorer.error_line.value


def test_an_explorer_that_never_drew_is_shown_without_a_picture():
    explorer = gray_explorer(value=0.0)

    data, _ = explorer._repr_mimebundle_()

    assert "image/png" not in data and "alert" in explorer.error_line.value


@pytest.mark.parametrize(
    "source,value,first",
    [
        ("coffee", "coffee", "astronaut"),
        (b"bytes", b"bytes", "yours"),
        ({"two": 2, "coffee": 3}, 2, "two"),
    ],
    ids=("a name", "one of ours", "several"),
)
def test_menu_begins_with_what_it_was_given(source, value, first):
    menu = PictureMenu(source)

    assert menu.value == value and menu.menu.options[0] == first
    assert menu.menu.options.count("coffee") == 1


def test_an_added_picture_is_chosen():
    menu = PictureMenu()

    menu.add("letter.txt", b"Dear reader")

    assert menu.value == b"Dear reader" and menu.menu.value == "letter.txt"
    menu.menu.value = "rocket"
    assert menu.value == "rocket"


def upload(menu, name, data):
    "What the browser sends."
    file = dict(name=name, type="image/png", size=len(data), content=memoryview(data))
    menu.upload.value = [file | {"last_modified": datetime.now(UTC)}]


def test_no_upload_stays_in_memory():
    menu = PictureMenu()
    picture = png_bytes(Image.new("RGB", (1000, 2000), "red"))

    upload(menu, "red.png", picture)
    assert menu.upload.value == () and menu.menu.value == "red.png"
    assert menu.value.size == (896, 896)

    upload(menu, "letter.txt", b"Dear reader" * 1000)
    assert menu.upload.value == () and isinstance(menu.value, UnreadableImage)
    assert not any(isinstance(source, bytes) for source in menu.sources.values())
