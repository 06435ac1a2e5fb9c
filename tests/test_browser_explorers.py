"""nbs/explorers.ipynb in a real browser: the screen against the functions that it should show."""

import io
import re

import numpy as np
import pytest
from browser import CHANGE_THEME, RUN_ALL, SCROLL_TO, SCROLLED, STDERR, THEME_IS, THEMES, until
from explorer_view import ExplorerView
from PIL import Image
from playwright.sync_api import expect

from beit_nb.explorers.guess import GuessExplorer
from beit_nb.explorers.predictor import mim_predictor
from beit_nb.pretraining import pretrain
from beit_nb.recipes import recipe_named
from beit_nb.tokenizer import train_tokenizer

pytest_plugins = ["browser"]


@pytest.fixture(scope="module")
def runs(lab):
    "What `beit demo` would have left beside the notebooks, trained for a moment only."
    _, notebooks = lab
    demo = notebooks.parent / "runs" / "demo"
    tokenizer = recipe_named("tokenizer", "nano", out=f"{demo}/tokenizer", steps=40)
    train_tokenizer(tokenizer, quiet=True)
    network = recipe_named(
        "pretrain",
        "nano",
        out=f"{demo}/pretrain",
        tokenizer=f"{demo}/tokenizer",
        steps=1,
        watch_every=None,
    )
    pretrain(network, quiet=True)
    return demo


@pytest.fixture
def page(desk, pages, runs):
    "The page, run once for all tests of this file."
    name = "explorers.ipynb"
    yield pages[name][0] if name in pages else desk(name)
    assert pages[name][0].locator(STDERR).all_inner_texts() == []
    pages[name][1].check()


class PageView(ExplorerView):
    "The output of the cell that makes an explorer."

    def __init__(self, page, code):
        cell = page.locator(".jp-CodeCell", has_text=code)
        super().__init__(cell.locator(".jp-OutputArea-output").last)

    def image(self):
        return self.output.locator("img.widget-image").first

    def ground(self):
        "The colour of the page, (r, g, b)."
        notebook = self.page.locator(".jp-Notebook").first
        css = notebook.evaluate("e => getComputedStyle(e).backgroundColor")
        return tuple(int(value) for value in re.findall(r"\d+", css)[:3])

    def looks_like(self, picture):
        "Is the picture on the screen this one, pixel for pixel, laid on the page's ground?"
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, self.ground())
        wanted = np.asarray(Image.alpha_composite(ground, picture).convert("RGB"), int)
        self.page.mouse.move(5, 5)
        shot = Image.open(io.BytesIO(self.image().screenshot())).convert("RGB")
        shot = np.asarray(shot, int)
        height, width = wanted.shape[:2]
        for top, left in ((0, 0), (0, 1), (1, 0), (1, 1)):  # the screen's grid may begin anywhere
            part = shot[top : top + height, left : left + width]
            if part.shape == wanted.shape and (abs(part - wanted).max(2) > 8).mean() < 0.002:
                return True
        return False

    def shows(self, make_picture):
        "Wait for the picture that `make_picture` makes; it is called anew each time."
        until(lambda: self.looks_like(make_picture()))


def test_the_model_of_the_demo_is_asked(page, runs):
    view = PageView(page, "GuessExplorer(runs")
    explorer = GuessExplorer(mim_predictor(runs))

    for _ in range(2):
        until(lambda: f"{explorer.guess.right.sum()} of 26 right." in view.text())
        view.button("Another mask").click()
        explorer.controls.again.click()
    assert "your own beit demo" in view.text() and view.errors() == []


def luminance(rgb):
    "WCAG's relative luminance of (r, g, b)."
    parts = np.asarray(rgb) / 255
    linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


def contrast(a, b):
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


COLORS = "all => all.map(e => getComputedStyle(e).color.match(/\\d+/g).slice(0, 3).map(Number))"
RIGHT_EDGES = "all => all.map(e => e.getBoundingClientRect().right)"


@pytest.mark.parametrize("theme", THEMES)
def test_words_can_be_read_and_nothing_is_cut_off(page, theme):
    page.evaluate(CHANGE_THEME, THEMES[theme])
    page.wait_for_function(THEME_IS, arg=THEMES[theme])
    codes = (
        "TokenExplorer(",
        "AttentionExplorer(model",
    )
    for code in codes:
        view = PageView(page, code)
        colors = view.output.locator(".beit-words:visible").evaluate_all(COLORS)
        assert colors and all(contrast(c, view.ground()) >= 4.5 for c in colors), code
        box = view.output.bounding_box()
        parts = view.output.locator("img:visible, svg:visible, .widget-slider:visible")
        right = max(parts.evaluate_all(RIGHT_EDGES))
        assert right <= box["x"] + box["width"] + 1, f"{code} is cut off at the right"


@pytest.mark.parametrize("cell", (0, 7))
def test_after_run_all_the_reader_is_where_reading_begins(page, cell):
    "Lab goes to the last cell; that one is out of sight, so from anywhere it goes to the top."
    page.evaluate(SCROLL_TO, cell)
    page.wait_for_function(f"() => ({SCROLLED})() {'> 1000' if cell else '== 0'}")

    page.evaluate(RUN_ALL)

    page.wait_for_function(f"() => ({SCROLLED})() == 0")
    page.evaluate("() => new Promise((done) => setTimeout(done, 500))")  # nor does it leave again
    assert page.evaluate(SCROLLED) == 0
    expect(page.get_by_role("heading", name="Explorers", exact=True)).to_be_in_viewport()


CUT_WORDS = """() => [...document.querySelectorAll(".beit-explorer")].flatMap((explorer) => {
  const edge = explorer.getBoundingClientRect();
  const texts = document.createTreeWalker(explorer, NodeFilter.SHOW_TEXT);
  const cut = [];
  while (texts.nextNode()) {
    const range = document.createRange();
    range.selectNodeContents(texts.currentNode);
    for (const box of range.getClientRects()) {
      const hidden = texts.currentNode.parentElement.closest(".said, option, style");
      if (!hidden && (box.left < edge.left - 1 || box.right > edge.right + 1)) {
        cut.push(texts.currentNode.textContent.trim().slice(0, 60));
      }
    }
  }
  return cut;
})"""
TOUCHING_MARKS = """() => [...document.querySelectorAll(".marks")].flatMap((marks) => {
  const boxes = [...marks.children].map((mark) => [mark.textContent, mark.getBoundingClientRect()]);
  return boxes.flatMap(([name, a], i) => boxes.slice(i + 1).filter(
    ([, b]) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom
  ).map(([other]) => `${name} / ${other}`));
})"""


@pytest.mark.parametrize("width", (640, 1000, 1280))
def test_no_words_are_cut_off(page, width):
    "With the file browser open a window of 640 pixels leaves an explorer about 260."
    page.set_viewport_size(dict(width=width, height=900))
    for heading in page.get_by_role("heading").all():
        heading.scroll_into_view_if_needed()  # Lab lays out what comes near to the window

    until(lambda: page.evaluate(CUT_WORDS), [])
    until(lambda: page.evaluate(TOUCHING_MARKS), [])


def test_a_line_is_copied_and_can_be_copied_again(page):
    page.set_viewport_size(dict(width=1280, height=900))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    view = PageView(page, "TemperatureExplorer()")
    line = view.output.locator(".beit-code code")
    button = view.output.locator(".beit-code button")

    button.click()

    expect(button).to_have_text("Copied")
    assert page.evaluate("() => navigator.clipboard.readText()") == line.inner_text()
    expect(button).to_have_text("Copy")
