"""The explorer of patches in a real browser: one frame in two pads, by mouse and keyboard."""

import re

import numpy as np
import pytest
from browser import pixels, reactions, until
from explorer_view import ExplorerView
from playwright.sync_api import expect

from beit_nb.explorers.patches import PatchExplorer

pytest_plugins = ["browser"]

CELLS = ["from beit_nb.explorers.patches import PatchExplorer", 'PatchExplorer("coffee")']


class View(ExplorerView):
    def __init__(self, page):
        cell = page.locator(".jp-CodeCell", has_text='PatchExplorer("coffee")').last
        super().__init__(cell.locator(".jp-OutputArea-output").last)
        self.sequence = self.output.locator(".beit-pad").nth(1)
        self.words = self.output.locator(".widget-html .beit-words").last

    def frame(self, pad):
        "Where the one frame of a pad is: row, column, and cells a side."
        [area] = pad.locator(".boxes div").evaluate_all("all => all.map(e => e.style.gridArea)")
        top, left, height, width = (int(n) for n in re.findall(r"\d+", area))
        assert height == width
        return top - 1, left - 1, height

    def frames(self):
        return self.frame(self.pad)[:2], self.frame(self.sequence)[:2]

    def made_again(self):
        "The explorer that the line of code makes."
        return eval(self.output.locator(".beit-code code").inner_text())


@pytest.fixture
def view(desk):
    page = desk(CELLS)
    page.set_default_timeout(8_000)
    view = View(page)
    until(lambda: view.frames(), ((6, 6), (6, 6)))
    return view


def test_the_frame_follows_the_pointer_in_both_pads(view):
    view.button("Shuffle").click()
    until(lambda: "Put in order" in view.text())
    at_rest = until(lambda: view.frames()[0], (6, 6))

    view.cell(2, 3).hover()
    until(lambda: view.frames()[0], (2, 3))
    row, col = view.frames()[1]
    expect(view.words).to_contain_text(f"patch 2,3 is number {row * 14 + col + 1} of 196")
    view.cell(0, 0).hover()
    until(lambda: view.frames()[0], (0, 0))
    view.cell(row, col, "place").hover()  # and the way back
    until(lambda: view.frames(), ((2, 3), (row, col)))
    view.page.mouse.move(5, 5)

    until(lambda: view.frames()[0], at_rest)


def test_click_and_keys_choose_and_acts_are_ticked(view):
    view.cell(3, 4, "place").click()
    until(lambda: view.frames(), ((3, 4), (3, 4)))
    view.page.keyboard.press("ArrowDown")
    until(lambda: view.frames(), ((4, 4), (4, 4)))
    view.page.mouse.move(5, 5)
    expect(view.words).to_contain_text("patch 4,4 is number 61 of 196")
    view.slider("patch size").press("Home")
    expect(view.words).to_contain_text("784 tokens")
    view.button("Shuffle").press("Enter")

    expect(view.output.locator(".acts .done")).to_have_count(3)
    expect(view.output.locator(".notice")).to_contain_text("must be given positions")
    again = view.made_again()
    assert again.controls.shuffled and again.cut == (8, 8) and again.chosen == (8, 8)
    assert view.frame(view.pad)[:2] == again.chosen and "".join(view.errors()) == ""


def test_a_frame_is_as_large_as_its_patch(view):
    view.slider("stride").press("Home")  # half a patch: 28 cells, a patch is 2 x 2 of them
    until(lambda: view.frame(view.pad)[2], 2)
    assert view.frame(view.sequence)[2] == 1
    rings = view.output.locator("[role=gridcell][tabindex='0']")
    assert (
        rings.evaluate_all("all => all.map(e => getComputedStyle(e).outlineStyle)") == ["none"] * 2
    )

    view.slider("stride").press("End")
    expect(view.words).to_contain_text("75% of the picture lies in no patch")
    until(lambda: view.cell(1, 1, "cell").get_attribute("aria-label"), "cell 1,1 in no patch")
    picture = np.asarray(view.pad_pixels((392, 392)), int)
    gap = picture[28:56, 28:56].reshape(-1, 3)
    until(lambda: view.frame(view.pad)[2], 1)
    assert gap.mean() > 130 and gap.std() > 20  # pale under stripes


def test_the_pads_show_what_python_computes(view):
    view.slider("patch size").press("End")
    view.button("Shuffle").click()
    until(lambda: view.cell(0, 0, "place").count(), 1)
    until(lambda: view.output.locator("[role=gridcell]").count(), 32)
    again = PatchExplorer("coffee", patch_size=56, shuffled=True)
    wanted = np.asarray(again.sequence.image.resize((392, 392)), int)

    def looks_right():
        seen = np.asarray(pixels(view.sequence, (392, 392)), int)
        return bool(np.median(abs(seen - wanted)) < 6)

    until(looks_right)


@pytest.mark.parametrize("width", (640, 1000, 1280, 1920))
def test_nothing_is_out_of_reach(view, width):
    view.resize(width)

    view.all_is_within_reach()
    left, right = (pad.bounding_box() for pad in (view.pad, view.sequence))
    assert left["width"] == right["width"] > 150
    assert width == 640 or left["y"] == right["y"]  # side by side


def test_an_answer_comes_at_once(view):
    places = [view.cell(i % 14, 3 + i % 2, "place") for i in range(20)]

    # a click would come too late where the frame has followed the pointer already
    follow = dict(act=lambda i: places[i].hover(force=True), begins=["pointermove"])
    took = reactions(view.pad.locator(".boxes"), **follow)

    print(f"pointer to frame: {took[10]:.0f} ms, {took[18]:.0f} at the 90th percentile")
    assert took[10] < 250  # ten times what it takes on a quiet machine
