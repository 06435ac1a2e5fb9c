"""beit_nb.explorers.shell: guarded callbacks, slow work in pieces, menus, function explorers."""

import asyncio
import threading

import ipywidgets as W
import numpy as np
import pytest
from PIL import Image

from beit_nb import UnreadableImage
from beit_nb.explorers.controls import Slider
from beit_nb.explorers.pad import PatchPad, png_bytes
from beit_nb.explorers.shell import (
    Act,
    DebouncedCallback,
    Explorer,
    FunctionExplorer,
    PictureMenu,
    WrongSetting,
    one_line,
    plain_words,
)


def draw_gray(share):
    "A tiny pure figure: share -> (picture, words)."
    return Image.new("RGB", (8, 8), (round(255 * share),) * 3), f"{1 / share:.2f}"


def gray_explorer(value=1.0):
    return FunctionExplorer(lambda screen: draw_gray, Slider("share", [0.0, 0.5, 1.0], value))


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
    before = explorer.view.picture

    explorer.controls[0].value = 0.5

    assert explorer.view.picture != before and ">2.00<" in explorer.words.value
    assert explorer.static_picture().getpixel((0, 0)) == (128, 128, 128)


def test_a_mistake_is_one_line_and_the_picture_stays():
    explorer = gray_explorer()
    before = explorer.view.picture

    explorer.controls[0].value = 0.0

    assert "division by zero" in explorer.guide.error
    assert "Traceback" not in explorer.guide.error and explorer.view.picture == before
    explorer.controls[0].value = 0.5
    assert explorer.guide.error == ""


def test_an_explorer_that_never_drew_is_shown_without_a_picture():
    explorer = gray_explorer(value=0.0)

    data, _ = explorer._repr_mimebundle_()

    assert "image/png" not in data and explorer.guide.error


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

    assert menu.value == value and menu.menu.names[0] == first
    assert menu.menu.names.count("coffee") == 1


def test_an_added_picture_is_chosen():
    menu = PictureMenu()
    red = Image.new("RGB", (8, 8), "red")
    seen = []
    menu.observe(lambda change: seen.append(change.new), "value")

    menu.add("red", red)

    assert seen == [red] and menu.name == "red"  # and no other picture for a moment
    menu.menu.choose("rocket")
    assert menu.value == "rocket"


def test_what_is_no_picture_is_not_added():
    menu = PictureMenu("coffee")

    with pytest.raises(UnreadableImage):
        menu.add("letter.txt", b"Dear reader")

    assert menu.value == menu.name == "coffee" and "letter.txt" not in menu.menu.names


def upload(menu, name, data):
    "What the browser sends."
    count = menu.upload.count + 1
    menu.upload.set_state({"name": name, "content": data, "count": count})


def test_no_upload_stays_in_memory():
    menu = PictureMenu()
    picture = png_bytes(Image.new("RGB", (1000, 2000), "red"))

    upload(menu, "red.png", picture)

    assert menu.upload.content == b"" and menu.name == "red.png"
    assert menu.value.size == (896, 896)
    assert menu.upload.notes == "shown: the centre 1000 x 1000 of 1000 x 2000"
    assert not any(isinstance(source, bytes) for source in menu.menu.choices.values())


def test_after_a_bad_upload_the_last_picture_stays():
    menu = PictureMenu("coffee")
    upload(menu, "red.png", png_bytes(Image.new("RGB", (40, 40), "red")))
    red = menu.value
    seen = []
    menu.observe(seen.append, "value")

    upload(menu, "letter.png", b"Dear reader" * 1000)

    assert menu.value is red and menu.name == "red.png" and seen == []
    assert menu.upload.says.startswith("letter.png is not a picture")
    assert menu.upload.content == b""
    menu.menu.choose("rocket")
    assert menu.upload.says == menu.upload.notes == ""


def test_what_the_browser_cannot_send_is_said():
    menu = PictureMenu()

    menu.upload.set_state({"problem": "huge.heic is no picture", "name": "huge.heic", "count": 1})

    assert menu.upload.says == "huge.heic is no picture" and menu.value == "chelsea"


class Halves(Explorer):
    "A slider that must not be 0, and an act."

    ACTS = (Act("Set it to 4.", lambda explorer: explorer.slider.value == 4),)

    def __init__(self):
        self.slider = Slider("n", [0, 1, 2, 4], 1)
        self.words = W.HTML()
        self.results = (self.words,)
        super().__init__([self.slider, self.words], watch=[self.slider])

    def update(self, change=None):
        if self.slider.value == 0:
            raise WrongSetting("0 has no half", self.slider)
        self.words.value = f"{1 / self.slider.value}"

    def describe(self):
        return self.words.value

    def link(self):
        return f"Halves({self.slider.value})"


def test_a_wrong_setting_is_said_beside_its_control_until_it_is_mended():
    explorer = Halves()
    explorer.slider.value = 0

    explorer.guarded(lambda: None)()  # something else happens, and succeeds

    assert explorer.slider.says == "0 has no half" and explorer.guide.error == ""
    assert "stale" in explorer.words._dom_classes and explorer.words.value == "1.0"
    explorer.slider.value = 2
    assert explorer.slider.says == "" and "stale" not in explorer.words._dom_classes


def test_another_fault_does_not_hide_the_first():
    explorer = Halves()
    explorer.slider.value = 0

    explorer.guarded(lambda: 1 / 0)()

    assert explorer.slider.says == "0 has no half"
    assert explorer.guide.error == "division by zero"


def test_acts_are_ticked_off_once_and_for_all():
    explorer = Halves()
    before = explorer.guide.done

    explorer.slider.value = 4
    explorer.slider.value = 1

    assert (before, explorer.guide.done) == ([], [0])
    assert explorer.guide.said == "1.0" and explorer.code_line.code == "Halves(1)"


def test_a_fine_screen_gets_a_finer_picture_of_the_same_size():
    def make(screen):
        size = 100 * screen.density
        return lambda share: (Image.new("RGB", (size, size), screen.ink), f"{share}")

    explorer = FunctionExplorer(make, Slider("share", [0.5, 1.0], 0.5))
    coarse = explorer.view.picture

    explorer.guide.ground = [True, 2]

    assert explorer.view.picture != coarse and explorer.view.width == 100
    assert explorer.static_picture().size == (100, 100)  # on paper


def test_tags_are_not_spoken():
    assert plain_words("<b>0.2</b>\n s &lt;") == "0.2 s <"
    assert plain_words("odds (< 0.1 %).<br>More") == "odds (< 0.1 %). More"
