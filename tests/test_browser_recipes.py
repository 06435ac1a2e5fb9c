"""The explorer of recipes in a real browser: the charts on the screen against the curves."""

import re

import numpy as np
import pytest
from browser import CHANGE_THEME, THEME_IS, THEMES, reactions, until
from explorer_view import ExplorerView
from playwright.sync_api import expect

from beit_nb.explorers.courses import course_of
from beit_nb.explorers.recipes import ScheduleExplorer
from beit_nb.recipes import recipe_named

pytest_plugins = ["browser"]

CELLS = ["from beit_nb.explorers.recipes import ScheduleExplorer", "ScheduleExplorer()"]


class View(ExplorerView):
    def __init__(self, page):
        cell = page.locator(".jp-CodeCell", has_text="ScheduleExplorer()").last
        super().__init__(cell.locator(".jp-OutputArea-output").last)
        self.words = self.output.locator(".beit-words").last

    def chart(self, name):
        return self.output.get_by_role("img", name=re.compile(rf"^{name}: "))

    def heights(self, name):
        "Of the solid line of a chart."
        points = self.chart(name).locator("polyline").first.get_attribute("points")
        return re.findall(r",([\d.]+)", points)


@pytest.fixture
def view(desk):
    page = desk(CELLS)
    page.set_default_timeout(8_000)
    view = View(page)
    expect(view.chart("learning rate")).to_be_visible()
    return view


def test_the_moment_moves_line_values_and_words(view):
    names = (("finetune", "base-in1k"), ("pretrain", "base-in1k"))
    courses = [course_of(recipe_named(*name)) for name in names]

    def agrees(percent):
        for course in courses:
            rate = np.interp(percent, *course.curves["learning rate"])
            expect(view.words).to_contain_text(f"{rate:.3g} a step")
            expect(view.words).to_contain_text(f"{course.at(percent)} of {course.end}")

    assert view.output.locator("svg").count() == 4
    agrees(25)
    for _ in range(5):
        view.slider("moment").press("ArrowRight")
    agrees(30)

    mark = view.chart("learning rate").locator("line.axis")
    before = float(mark.get_attribute("x1"))
    view.drag("moment", 0.8)
    until(lambda: float(mark.get_attribute("x1")) > before + 100)
    agrees(int(view.readout("moment").split()[0]))


def test_acts_are_ticked_and_the_line_of_code_makes_the_same(view):
    for _ in range(5):
        view.slider("moment").press("ArrowLeft")
    until(lambda: view.readout("moment"), "20 %")
    assert len(set(view.heights("learning rate by layer"))) == 14
    view.slider("layer decay").press("End")
    until(lambda: len(set(view.heights("learning rate by layer"))), 1)  # a level line
    view.field("beside").select_option("tokenizer dalle")

    until(lambda: view.output.locator("svg").count(), 6)
    expect(view.output.locator(".acts .done")).to_have_count(3)
    expect(view.output.locator(".notice")).to_contain_text("half a cosine")
    code = view.output.locator(".beit-code code").inner_text()
    again = eval(code, {"ScheduleExplorer": ScheduleExplorer})
    assert again.courses[1].steps == 3_000_000 and again.controls.decay.value == 1
    assert "".join(view.errors()) == ""


def test_a_wrong_warm_up_is_said_beside_it(view):
    view.field("recipe").select_option("finetune base-in1k-384")
    until(lambda: view.readout("warm-up"), "1 epoch")

    view.slider("warm-up").press("End")

    says = view.output.locator(".beit-slider .says")
    expect(says.filter(has_text="the whole run has 10 epochs; take less")).to_have_count(1)
    expect(view.output.locator(".stale")).to_have_count(1)
    view.button("recipe").first.click()
    expect(view.output.locator(".stale")).to_have_count(0)


LETTERS = """all => all.map(e => parseFloat(getComputedStyle(e).fontSize)
  * e.ownerSVGElement.getBoundingClientRect().width / e.ownerSVGElement.viewBox.baseVal.width)"""


@pytest.mark.parametrize("width", (640, 1000, 1280, 1920))
def test_nothing_is_out_of_reach(view, width):
    view.resize(width)

    view.all_is_within_reach()
    charts = view.output.locator("svg").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect().right)"
    )
    box = view.output.bounding_box()
    assert max(charts) <= box["x"] + box["width"] + 1
    if width > 640:
        assert min(view.output.locator("svg text").evaluate_all(LETTERS)) >= 12


@pytest.mark.parametrize("theme", THEMES)
def test_letters_take_the_colour_of_the_theme(view, theme):
    view.page.evaluate(CHANGE_THEME, THEMES[theme])
    view.page.wait_for_function(THEME_IS, arg=THEMES[theme])

    fill = view.output.locator("svg text").first.evaluate("e => getComputedStyle(e).fill")
    light = np.mean([int(n) for n in re.findall(r"\d+", fill)[:3]])

    assert light > 180 if theme == "dark" else light < 90


def test_an_answer_comes_at_once(view):
    slider = view.slider("moment")

    took = reactions(view.output.locator(".widget-html").last, lambda i: slider.press("ArrowRight"))

    print(f"key to words: {took[10]:.0f} ms, {took[18]:.0f} at the 90th percentile")
    assert took[10] < 250  # ten times what it takes on a quiet machine
