"""What every explorer is made of, in a real browser: keys, pictures that arrive, narrow windows."""

import io

import numpy as np
import pytest
from browser import until
from explorer_view import ExplorerView
from PIL import Image
from playwright.sync_api import expect

pytest_plugins = ["browser"]

CELLS = [
    """
from PIL import Image
import ipywidgets as W
from beit_nb.explorers import Act, Explorer, PictureMenu, PatchPad, Slider, WrongSetting
from beit_nb.explorers.pad import read_picture

class Small(Explorer):
    "A picture in n x n cells, at most 20."
    SEE = "A picture under a grid."
    ACTS = (Act("Make the grid 8 x 8.", lambda e: e.n.value == 8),)
    NOTICE = "Fewer cells are larger."

    def __init__(self):
        self.menu = PictureMenu("coffee")
        self.n = Slider("cells", [4, 8, 14, 28], 14, marks={8: "eight"}, help="rows of cells")
        self.button = W.Button(description="Again", tooltip="draw it again")
        self.pad = PatchPad(width=320)
        controls = W.VBox([self.menu, self.n, self.button])
        view = W.VBox([self.pad])
        self.results = (view,)
        super().__init__([W.HBox([view, controls])], [self.menu, self.n])

    def update(self, change=None):
        if self.n.value > 20:
            raise WrongSetting(f"{self.n.value} is too fine; take 14", self.n)
        self.pad.rows = self.pad.cols = self.n.value
        self.pad.show(read_picture(self.menu.value))

    def describe(self):
        return f"{self.menu.name} in {self.n.value} rows"

    def link(self):
        return f"Small(n={self.n.value})"

    def static_picture(self):
        return self.pad.static_picture()
""",
    "small = Small()\nsmall",
]


@pytest.fixture
def view(desk):
    page = desk(CELLS)
    page.set_default_timeout(30_000)  # ten MiB on a busy machine
    cell = page.locator(".jp-CodeCell", has_text="small = Small()").last
    return ExplorerView(cell.locator(".jp-OutputArea-output").last)


def photo(size, kind="PNG"):
    "A picture of noise that no format makes smaller, with a red centre."
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    height, width = size
    noise[height // 3 : 2 * height // 3, width // 3 : 2 * width // 3] = (255, 0, 0)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, kind)
    return out.getvalue()


def middle(view):
    "The colour in the middle of the pad."
    return np.asarray(view.pad_pixels((64, 64)))[32, 32].tolist()


def is_red(view):
    red, green, blue = middle(view)
    return red > 200 and green < 60 and blue < 60


def test_no_key_reaches_jupyterlab(view):
    cells = view.page.locator(".jp-Notebook-cell")
    before = cells.count()
    controls = view.output.locator("input, select, button, [role=gridcell][tabindex='0']")
    assert controls.count() >= 6

    for i in range(controls.count()):
        controls.nth(i).focus()
        for key in ("x", "b", "d", "d", "a"):
            view.page.keyboard.press(key)

    assert cells.count() == before
    expect(view.pad).to_be_visible()


HEAR = """() => {
  window.heard = [];
  document.addEventListener("keydown", (event) => heard.push(event.key));
}"""


def test_a_pad_without_an_explorer_keeps_its_keys(desk):
    "Those that it knows go no further; a letter arrives, and is no shortcut."
    page = desk(["from beit_nb.explorers.pad import PatchPad", "PatchPad(rows=4, cols=4)"])
    cells = page.locator(".jp-Notebook-cell")
    before = cells.count()
    pad = page.locator(".beit-pad")
    pad.locator("[tabindex='0']").focus()
    page.evaluate(HEAR)

    for key in ("ArrowDown", "ArrowRight", "Space", "Enter", "End", "x", "b", "d", "d"):
        page.keyboard.press(key)

    assert page.evaluate("heard") == ["x", "b", "d", "d"]
    assert cells.count() == before
    expect(pad.locator("[tabindex='0']")).to_have_attribute("aria-label", "patch 1,3 shown")


def middle_of(locator):
    "Its middle on the page, from left to right."
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2


def test_a_mark_stands_under_its_value(view):
    "Of four values it is the second, at a third of the handle's way; a handle is 16 pixels wide."
    track = view.slider("cells").bounding_box()
    third = track["x"] + 8 + (track["width"] - 16) / 3

    assert abs(middle_of(view.button("eight")) - third) < 2


def test_slider_by_keyboard_mouse_and_mark(view):
    slider = view.slider("cells")

    slider.press("ArrowLeft")
    until(lambda: view.readout("cells"), "8")
    until(lambda: view.output.locator("[role=gridcell]").count(), 64)
    slider.press("Home")
    until(lambda: view.output.locator("[role=gridcell]").count(), 16)
    view.button("eight").click()
    until(lambda: view.output.locator("[role=gridcell]").count(), 64)

    assert slider.get_attribute("aria-valuetext") == "8"
    until(lambda: "Small(n=8)" in view.text() and "Fewer cells are larger." in view.text())


def test_a_wrong_setting_is_said_beside_its_slider(view):
    view.slider("cells").press("End")

    says = view.output.locator(".beit-slider .says")
    expect(says).to_have_text("28 is too fine; take 14")
    expect(view.output.locator(".stale")).to_have_count(1)
    view.slider("cells").press("ArrowLeft")
    expect(says).to_be_empty()
    expect(view.output.locator(".stale")).to_have_count(0)


def test_a_large_photograph_arrives(view):
    data = photo((2400, 2000))
    assert len(data) > 11 * 2**20  # more than a server of Jupyter takes

    view.upload([dict(name="phone.png", mimeType="image/png", buffer=data)])

    until(lambda: is_red(view))
    until(lambda: view.chosen("picture"), "phone.png")
    # the browser has made its shorter side 1024 pixels before it sent it
    until(lambda: "shown: the centre 1024 x 1024 of 1024 x 1229" in view.text())


DROP = """([element, bytes, kind]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], "given.png", { type: "image/png" }));
  const init = { bubbles: true, cancelable: true };
  const heard = [];
  document.addEventListener(kind, () => heard.push(`${kind} beyond the explorer`), { once: true });
  const give = (event) => {
    element.dispatchEvent(event);
    if (event.defaultPrevented) heard.push(event.type);
  };
  if (kind == "paste") give(new ClipboardEvent("paste", { ...init, clipboardData: data }));
  else for (const type of ["dragover", "drop"]) {
    give(new DragEvent(type, { ...init, dataTransfer: data }));
  }
  return heard;
}"""


@pytest.mark.parametrize("kind", ("drop", "paste"))
def test_a_picture_may_be_dropped_or_pasted(view, kind):
    data = [*photo((90, 90))]

    heard = view.page.evaluate(DROP, [view.pad.element_handle(), data, kind])

    until(lambda: is_red(view))
    if kind == "drop":  # the browser may drop it here, and neither it nor Lab opens the file
        assert heard == ["dragover", "drop"]


def test_after_a_bad_file_the_last_picture_stays(view):
    view.upload([dict(name="red.png", mimeType="image/png", buffer=photo((90, 90)))])
    until(lambda: is_red(view))
    before = np.asarray(view.pad_pixels((320, 320)))

    view.upload([dict(name="letter.png", mimeType="image/png", buffer=b"Dear reader")])

    says = view.output.locator(".beit-upload .says")
    expect(says).to_contain_text("letter.png is not a picture", timeout=1000)
    assert (np.asarray(view.pad_pixels((320, 320))) == before).all()
    assert view.chosen("picture") == "red.png"
    assert "letter.png" not in view.field("picture").inner_text()


@pytest.mark.parametrize("width", (640, 1000, 1280, 1920))
def test_nothing_is_out_of_reach(view, width):
    view.resize(width, 800)

    view.all_is_within_reach()
    pad = view.pad.bounding_box()
    assert pad["width"] > 150 and abs(pad["width"] - pad["height"]) < 2


def test_a_line_is_selected_where_the_browser_forbids_to_copy(view):
    forbid = "navigator.clipboard.writeText = async () => { throw Error('forbidden'); }"
    view.page.evaluate(f"() => {{ {forbid}; }}")
    button = view.output.locator(".beit-code button")

    button.click()

    expect(button).to_have_text("Press Ctrl+C")
    assert view.page.evaluate("() => String(getSelection())") == "Small(n=14)"
    view.page.evaluate("() => { delete navigator.clipboard.writeText; }")


def test_pads_grow_where_there_is_room(view):
    narrow = view.pad.bounding_box()["width"]
    view.page.set_viewport_size(dict(width=1920, height=1000))

    until(lambda: view.pad.bounding_box()["width"] > 1.2 * narrow)


def test_every_control_has_a_name_and_a_tooltip(view):
    controls = view.output.locator("input, select, button")
    titled = "e => !!e.closest('[title]') && e.closest('[title]').title != 'null'"

    assert controls.count() >= 5
    for i in range(controls.count()):
        assert controls.nth(i).evaluate(titled), controls.nth(i).evaluate("e => e.outerHTML")
    assert view.output.locator("[title=null]").count() == 0
