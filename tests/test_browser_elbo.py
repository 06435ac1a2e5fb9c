"""Gap, temperature and KL weight in a real browser: fingers on bars, dots and curves."""

import io

import numpy as np
import pytest
from browser import THEMES, until
from explorer_view import ExplorerView
from PIL import Image

from beit_nb.elbo import posterior
from beit_nb.explorers import AlphabetExplorer, GapExplorer, TemperatureExplorer
from beit_nb.explorers.elbo import world_joint
from beit_nb.explorers.figures import DARK_INK, PAPER

pytest_plugins = ["browser"]

MAKERS = (GapExplorer, TemperatureExplorer, AlphabetExplorer)


class FigureView(ExplorerView):
    "An explorer with pictures to touch."

    def image(self, number):
        return self.output.locator("img.beit-picture").nth(number)

    def point(self, number, place):
        "Where the share `place` of a picture's width and height lies on the page."
        image = self.image(number)
        image.scroll_into_view_if_needed()
        box = image.bounding_box()
        return box["x"] + place[0] * box["width"], box["y"] + place[1] * box["height"]

    def click_picture(self, number, place):
        self.page.mouse.click(*self.point(number, place))

    def pull(self, number, start, end):
        "Press in a picture, move, release."
        self.page.mouse.move(*self.point(number, start))
        self.page.mouse.down()
        self.page.mouse.move(*self.point(number, end), steps=4)
        self.page.mouse.up()

    def link(self):
        return self.output.locator(".beit-code code").inner_text()

    def done(self):
        return self.output.locator(".acts li.done").count()

    def check_link(self):
        "The line of code makes, here, what is on the screen there, once the drag has arrived."

        def agrees():
            link = self.link()
            twin = eval(link)
            said = self.output.locator(".said").inner_text()
            return (twin.link(), twin.describe()) == (link, said)

        until(agrees)


@pytest.fixture
def show(desk):
    def show(make, **how):
        code = f"{make.__name__}()"
        page = desk([f"from beit_nb.explorers import {make.__name__}", code], **how)
        page.set_default_timeout(8_000)
        return FigureView(page.locator(".jp-OutputArea-output", has=page.locator("img")).last)

    return show


def test_gap_by_hand(show):
    view = show(GapExplorer)
    twin = GapExplorer()
    figure, world = twin.belief_figure, twin.world_figure
    bar = lambda token, share: figure.figure.share_of(figure.bars_ax, token, share)  # noqa: E731
    goal = posterior(world_joint()[11]).tolist()
    until(view.done, 0)

    view.pull(0, bar(0, 0.04), bar(0, 0.7))
    until(lambda: "by_hand={11: [0.7" in view.link())
    view.pull(0, bar(2, 0.1), bar(2, 0.5))
    until(lambda: view.readout("q(token 2)") in ("49 %", "50 %", "51 %"))  # before the next
    view.pull(0, bar(1, 0.1), bar(1, goal[1]))
    until(view.done, 1)
    view.pull(0, bar(0, 0.3), bar(0, goal[0]))
    until(view.done, 2)
    view.check_link()
    view.click_picture(1, world.figure.share_of(world.ax, 4, -5))
    until(lambda: view.readout("picture"), "no. 4")
    view.slider("q to posterior").press("End")
    until(view.done, 3)
    until(lambda: "The red line never moved" in view.text())
    view.check_link()
    assert view.errors() == []


def test_gap_by_keyboard(show):
    view = show(GapExplorer)

    view.slider("q(token 1)").press("Home")
    until(lambda: view.readout("q(token 1)"), "0 %")
    until(lambda: view.readout("q(token 0)"), "50 %")
    view.slider("picture").press("ArrowRight")
    until(lambda: view.readout("q(token 1)"), "92 %")

    view.check_link()


def test_temperature_by_hand(show):
    view = show(TemperatureExplorer)
    twin = TemperatureExplorer()
    until(view.done, 0)

    view.button("DALL-E ends").click()
    until(view.done, 1)
    view.slider("temperature").press("End")
    until(lambda: view.readout("temperature"), "8")
    twin.tau.value = 8
    figure = twin.triangle_figure
    view.click_picture(0, figure.figure.share_of(figure.ax, *figure.places[123].tolist()))
    until(lambda: view.field("dot").input_value(), "123")
    view.button("DALL-E starts").click()
    until(view.done, 2)
    chart = twin.price_figure
    view.click_picture(1, chart.figure.share_of(chart.ax, twin.crossing(), 0.1))
    until(view.done, 3)
    view.button("Draw again").press("Space")
    until(lambda: "seed=1, dot=123" in view.link())
    view.slider("logit 0").press("End")
    until(lambda: "logits=[3.0, 1.0, -1.0]" in view.link())
    view.check_link()
    assert view.errors() == []


def test_a_touch_counts_again_and_beyond_the_edge(show):
    view = show(TemperatureExplorer)
    twin = TemperatureExplorer()
    chart = twin.price_figure
    place = chart.figure.share_of(chart.ax, twin.crossing(), 0.1)
    before = view.readout("temperature")
    view.click_picture(1, place)
    until(lambda: view.readout("temperature") not in (before, "8"))
    first = view.readout("temperature")

    view.slider("temperature").press("End")
    until(lambda: view.readout("temperature"), "8")
    view.click_picture(1, place)  # the same place once more
    until(lambda: view.readout("temperature"), first)
    x, y = view.point(1, place)
    view.page.mouse.move(x, y)
    view.page.mouse.down()
    view.page.mouse.move(x + 1.5 * view.image(1).bounding_box()["width"], y)
    view.page.mouse.up()

    until(lambda: view.readout("temperature"), "8")


def test_alphabet_by_hand(show):
    view = show(AlphabetExplorer)
    twin = AlphabetExplorer()
    until(view.done, 0)

    view.button("DALL-E").click()
    until(view.done, 1)
    assert view.readout("KL weight") == "6.6"
    chart, book = twin.curve, twin.alphabet
    place = lambda f: chart.figure.share_of(chart.ax, f.cost, f.error)  # noqa: E731
    view.pull(1, place(book.at(6.6)), place(book.at(2**4.25)))
    until(view.done, 2)
    view.button("forgotten division").click()
    until(view.done, 3)
    until(lambda: "A token costs 0.00 of" in view.text())
    view.check_link()
    view.field("picture").select_option("coffee")
    until(lambda: "AlphabetExplorer('coffee'" in view.link())
    assert view.errors() == []


@pytest.mark.parametrize("width", (640, 1000, 1280, 1920))
@pytest.mark.parametrize("make", MAKERS)
def test_nothing_is_out_of_reach(show, make, width):
    view = show(make, size=(width, 900))
    view.all_is_within_reach()


def has_color(image, color):
    "Is there a pixel of exactly that colour ('#rrggbb') in a picture, as letters and axes have?"
    code = "async e => [...new Uint8Array(await (await fetch(e.src)).arrayBuffer())]"
    rgba = np.asarray(Image.open(io.BytesIO(bytes(image.evaluate(code)))).convert("RGBA"))
    wanted = [*bytes.fromhex(color[1:]), 255]
    return bool((rgba == wanted).all(-1).any())


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("make", MAKERS)
def test_every_picture_has_words_and_every_control_help(show, make, theme):
    view = show(make, theme=theme)

    until(lambda: has_color(view.image(1), PAPER.ink if theme == "light" else DARK_INK))
    for number in range(2):
        assert len(view.image(number).get_attribute("alt")) > 30
        assert view.image(number).get_attribute("title")
    controls = view.output.locator("input, select, button")
    titled = "e => !!e.closest('[title]') && e.closest('[title]').title != 'null'"
    for i in range(controls.count()):
        assert controls.nth(i).evaluate(titled), controls.nth(i).evaluate("e => e.outerHTML")
