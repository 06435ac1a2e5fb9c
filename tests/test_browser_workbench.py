"""The workbench in a real browser: point anywhere, see it everywhere."""

import re

import pytest
from browser import until
from explorer_view import ExplorerView
from playwright.sync_api import expect

pytest_plugins = ["browser"]

CELLS = [
    "from beit_nb.explorers import Workbench, mim_predictor\n"
    "bench = Workbench(mim_predictor('nowhere'))\nbench",
]
TITLES = ("1 the picture", "2 its patches", "3 what", "4 what is hidden", "5 what", "6 who")


class BenchView(ExplorerView):
    "The bench on a page."

    def station(self, number):
        return self.output.locator(".beit-pad").nth(number - 1)

    def hover(self, number, row, col):
        "Put the pointer over a cell of a station."
        self.station(number).get_by_role("gridcell", name=re.compile(f"^patch {row},{col}")).hover()

    def frame(self, number):
        "Row and column of the orange frame of a station."
        boxes = self.station(number).locator(".boxes > div")
        style = boxes.last.evaluate("e => e.style.gridArea")
        row, col = re.match(r"(\d+) / (\d+)", style).groups()
        return int(row) - 1, int(col) - 1


@pytest.fixture
def view(desk):
    page = desk(CELLS)
    page.set_default_timeout(8_000)
    cell = page.locator(".jp-CodeCell", has_text="Workbench(").last
    return BenchView(cell.locator(".jp-OutputArea-output").last)


@pytest.mark.parametrize("number", (1, 2, 5, 6))
def test_a_pointer_anywhere_frames_the_patch_everywhere(view, number):
    place = (1, 4) if number == 2 else (2, 4)  # the 21st patch

    view.hover(number, *place)

    until(lambda: "word 21 of 64" in view.text())
    until(lambda: {view.frame(other) for other in (1, 3, 4, 5, 6)}, {(2, 4)})
    until(lambda: view.frame(2), (1, 4))


def test_acts_tick_themselves_off(view):
    acts = view.output.locator(".acts li")
    expect(view.output.locator(".acts .done")).to_have_count(0)

    view.hover(1, 2, 4)
    expect(acts.nth(0)).to_have_class("done")
    view.station(4).get_by_role("gridcell", name=re.compile("^patch 0,0")).click()
    expect(acts.nth(1)).to_have_class("done")
    wrong = view.station(5).locator(".boxes .dotted").first
    row, col = re.match(r"(\d+) / (\d+)", wrong.evaluate("e => e.style.gridArea")).groups()
    view.hover(5, int(row) - 1, int(col) - 1)

    expect(acts.nth(2)).to_have_class("done")
    expect(view.output.locator(".notice")).to_contain_text("never saw the tokens")


def test_a_painted_patch_is_guessed(view):
    before = view.text()
    view.station(4).get_by_role("gridcell", name=re.compile("^patch 0,0")).click()

    until(lambda: "patch 0,0" in view.text().replace("\t", " ") and "hidden=[0" in view.text())
    assert view.text() != before


def test_another_picture_and_another_mask_by_keyboard(view):
    view.field("picture").press("ArrowUp")
    until(lambda: "a six" in view.text().split("Workbench(")[1])
    view.button("Another mask").press("Enter")
    until(lambda: "seed=3" in view.text())
    view.slider("hide").press("ArrowLeft")

    until(lambda: "share=0.35" in view.text())
    until(lambda: "of 22 hidden tokens" in view.text())


@pytest.mark.parametrize("width", (640, 1000, 1280, 1920))
def test_nothing_is_out_of_reach(view, width):
    view.resize(width, 800)

    view.all_is_within_reach()
    for number in range(1, 7):
        assert view.station(number).bounding_box()["width"] > 120
