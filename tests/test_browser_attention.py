"""The explorer of attention in a real browser, as a reader meets it."""

import pytest
from browser import until
from explorer_view import ExplorerView
from playwright.sync_api import expect

from beit_nb.explorers.attention import AttentionExplorer

pytest_plugins = ["browser"]

CELLS = [
    "from beit_nb.explorers import AttentionExplorer",
    "explorer = AttentionExplorer()\nexplorer",
]


@pytest.fixture
def view(desk):
    page = desk(CELLS)
    page.set_default_timeout(8_000)
    cell = page.locator(".jp-CodeCell", has_text="explorer = AttentionExplorer").last
    return ExplorerView(cell.locator(".jp-OutputArea-output").last)


@pytest.fixture
def twin(tmp_path, monkeypatch):
    "The explorer of the page, in this process."
    monkeypatch.chdir(tmp_path)  # where no demo has run, as beside the page
    return AttentionExplorer()


def tiles(view):
    return view.output.get_by_role("radio")


def shows(view, explorer):
    "Words, line of code, chosen tile and picture 3 are those of an explorer in this process."
    until(lambda: view.output.locator(".said").text_content(), explorer.describe(), seconds=8)
    until(lambda: explorer.link() in view.text(), seconds=8)
    expect(tiles(view).nth(explorer.tiles.index)).to_be_checked()
    code = "async e => [...new Uint8Array(await (await fetch(e.src)).arrayBuffer())]"
    image = view.output.locator(".beit-pad img").nth(1)
    until(lambda: bytes(image.evaluate(code)) == bytes(explorer.pads.looks.picture), seconds=8)


def test_patches_tiles_and_cls_by_mouse_and_keyboard(view, twin):
    shows(view, twin)

    view.cell(1, 5).first.click()
    twin.pad.press(1 * 8 + 5)
    shows(view, twin)
    view.cell(1, 5).first.press("ArrowDown")
    twin.pad.press(2 * 8 + 5)
    shows(view, twin)
    tiles(view).nth(2).locator("..").click()
    twin.tiles.index = 2
    shows(view, twin)
    tiles(view).nth(2).press("ArrowDown")  # a block further
    twin.tiles.index = 7
    shows(view, twin)
    view.slider("mass to keep").press("End")
    twin.mass.value = 1.0
    shows(view, twin)
    view.button("CLS asks").click()
    twin.cls.value = True
    shows(view, twin)
    view.field("picture").select_option("a three")
    twin.menu.choose("a three")
    shows(view, twin)
    view.cell(4, 4).nth(1).click()  # picture 3 asks, too
    twin.pad.press(4 * 8 + 4)
    shows(view, twin)
    line = view.output.locator(".beit-code code").text_content()
    assert eval(line).describe() == twin.describe()


def test_a_patch_under_the_pointer_is_marked_in_all_tiles(view):
    marks = view.output.locator(".beit-tiles .tile i")
    expect(marks.first).to_be_hidden()

    view.cell(2, 6).first.hover()

    expect(marks.first).to_be_visible()
    expect(marks.last).to_be_visible()
    table = view.output.locator(".beit-tiles")
    place = "e => ['row', 'col'].map((n) => e.style.getPropertyValue(`--patch-${n}`))"
    assert table.evaluate(place) == ["2", "6"]
    view.page.mouse.move(5, 5)
    expect(marks.first).to_be_hidden()

    tile = view.output.locator(".beit-tiles .tile").nth(7).bounding_box()
    place_in_tile = (tile["x"] + 3.5 / 8 * tile["width"], tile["y"] + 5.5 / 8 * tile["height"])
    view.page.mouse.move(*place_in_tile)
    expect(marks.first).to_be_visible()
    assert table.evaluate(place) == ["5", "3"]
    view.page.mouse.move(5, 5)
    expect(marks.first).to_be_hidden()


def test_acts_are_ticked_off(view):
    acts = view.output.locator(".acts .done")
    expect(acts).to_have_count(0)
    expect(view.output.locator(".notice")).to_be_empty()

    view.cell(2, 5).first.click()
    expect(acts).to_have_count(1)
    tiles(view).first.locator("..").click()
    expect(acts).to_have_count(2)
    view.button("CLS asks").press("Space")

    expect(acts).to_have_count(3)
    expect(view.output.locator(".notice")).to_have_text(AttentionExplorer.NOTICE)
    expect(acts.first).to_have_attribute("aria-label", f"done: {AttentionExplorer.ACTS[0].words}")


def test_the_asking_patch_is_selected_and_cells_say_their_share(view):
    cell = view.cell(4, 4).first

    expect(cell).to_have_attribute("aria-selected", "true")
    assert "% of patch 4,4's attention" in cell.get_attribute("aria-label")


@pytest.mark.parametrize("width", (640, 1000, 1280, 1920))
def test_all_is_within_reach(view, width):
    view.resize(width)

    view.all_is_within_reach()
