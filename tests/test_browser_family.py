"""Every explorer of nbs/explorers.ipynb in a real browser: the screen is held against the pure function that it should show."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect

from beit_nb import explorers as E
from beit_nb.images import normalize
from beit_nb.pretraining import pretrain
from beit_nb.recipes import recipe_named
from browser import STDERR, THEMES, pixels, until

pytest_plugins = ["browser"]
ORANGE = (0xE0, 0x80, 0x20)


@pytest.fixture(scope="module")
def runs(lab):
    "What `beit demo` would have left beside the notebooks, trained for a moment only."
    demo = lab[1].parent / "runs" / "demo"
    E.train_tokenizer(
        recipe_named("tokenizer", "nano", out=f"{demo}/tokenizer", steps=40), quiet=True
    )
    pretrain(
        recipe_named(
            "pretrain",
            "nano",
            out=f"{demo}/pretrain",
            tokenizer=f"{demo}/tokenizer",
            steps=1,
            watch_every=None,
        ),
        quiet=True,
    )
    return demo


@pytest.fixture
def page(desk, rooms, runs):
    "The page, run once for all tests of this file."
    name = "explorers.ipynb"
    yield rooms[name][0] if name in rooms else desk(name)
    assert rooms[name][0].locator(STDERR).all_inner_texts() == []
    rooms[name][1].check()


class Desk:
    "The output of the cell that makes an explorer, as a reader meets it."

    def __init__(self, page, code):
        self.page = page
        self.out = page.locator(".jp-CodeCell", has_text=code).locator(".jp-OutputArea-output").last
        self.out.scroll_into_view_if_needed()

    def handle(self, name):
        return self.out.locator(".widget-slider", has_text=name).locator(".noUi-handle")

    def button(self, name):
        return self.out.get_by_role("button", name=name)

    def cell(self, unit, r, c):
        return self.out.get_by_role("gridcell", name=re.compile(rf"^{unit} {r},{c}\b"))

    def text(self):
        return self.out.inner_text()

    def trouble(self):
        return self.out.locator(".trouble").all_inner_texts()

    def image(self, number=0):
        return self.out.locator("img.widget-image").nth(number)

    def drag(self, name, by):
        box = self.handle(name).bounding_box()
        self.page.mouse.move(box["x"] + 8, box["y"] + 8)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + 8 + by, box["y"] + 8, steps=5)
        self.page.mouse.up()

    def readout(self, name):
        return (
            self.out.locator(".widget-slider", has_text=name)
            .locator(".widget-readout")
            .inner_text()
        )

    def shows(self, wanted, number=0):
        """Wait until a picture on the screen is the wanted one, pixel for pixel, laid on the page's
        ground; `wanted` is called anew each time.
        """

        def like():
            picture = wanted().convert("RGBA")
            paper = np.asarray(
                Image.alpha_composite(
                    Image.new("RGBA", picture.size, self.ground()), picture
                ).convert("RGB"),
                int,
            )
            self.page.mouse.move(5, 5)
            shot = np.asarray(
                Image.open(io.BytesIO(self.image(number).screenshot())).convert("RGB"), int
            )
            # the screen's grid may begin within a pixel
            (h, w) = paper.shape[:2]
            shifts = [(y, x) for y in (0, 1) for x in (0, 1)]
            return any(
                s.shape == paper.shape and (abs(s - paper).max(2) > 8).mean() < 0.002
                for y, x in shifts
                for s in [shot[y : y + h, x : x + w]]
            )

        until(like)

    def ground(self):
        return tuple(
            self.page.evaluate(
                "() => "
                "getComputedStyle(document.querySelector('.jp-Notebook')).backgroundColor.match(/\\d+/g).slice(0, "
                "3).map(Number)"
            )
        )


def test_patches(page):
    d = Desk(page, "PatchExplorer()")
    d.handle("patch size").press("ArrowRight")  # keyboard: 16 to 28
    until(lambda: "64 tokens" in d.text())
    d.cell("patch", 2, 6).click()
    until(lambda: "patch 2,6 is word 23" in d.text())
    d.button("Shuffle").press("Space")
    until(lambda: "is word 23 of" not in d.text())
    place = int(re.search(r"is word (\d+)", d.text())[1]) - 1
    ncols = E.film(np.zeros((64, 2, 2, 3), np.uint8))[1]
    film = d.image()
    size = 448 // ncols
    look = lambda: np.asarray(pixels(film, (ncols * size, -(-64 // ncols) * size)), int)[
        place // ncols * size + 6 : place // ncols * size + size - 4,
        place % ncols * size + 6 : place % ncols * size + size - 4,
    ].mean((0, 1))
    cell = np.asarray(pixels(d.out.locator(".beit-pad"), (320, 320)), int)[
        2 * 40 + 5 : 3 * 40 - 5, 6 * 40 + 5 : 7 * 40 - 5
    ].mean((0, 1))
    # the same patch in the picture and in the film
    until(lambda: bool(abs(look() - cell).max() < 14))
    d.drag("stride", -150)
    until(lambda: d.readout("stride"), "half a patch")
    until(lambda: "225 tokens" in d.text())
    with page.expect_file_chooser() as chosen:
        d.button("file").click()
    chosen.value.set_files(dict(name="words.png", mimeType="image/png", buffer=b"no picture"))
    until(lambda: len(d.trouble()), 1)
    assert "\n" not in d.trouble()[0]
    d.out.get_by_label("picture", exact=True).select_option("coffee")
    until(d.trouble, [])


def test_tokens(page, runs):
    d = Desk(page, "TokenExplorer(")
    t = E.load_tokenizer(runs / "tokenizer")
    x = E.some_digits()[3]
    odds = E.token_odds(t, x)
    ids = E.token_odds(t, x).argmax(0)
    painted = lambda: E.to_pil(t.decode(ids[None])[0]).resize((256, 256), Image.Resampling.NEAREST)
    d.shows(painted)
    d.cell("cell", 2, 4).click()
    best = odds[:, 2, 4].topk(8)
    until(lambda: f"token {best.indices[0]}\n{best.values[0].item():.1%}" in d.text())
    # the mouse writes the sixth best
    d.cell("candidate", 5, 0).click()
    ids[2, 4] = best.indices[5]
    d.shows(painted)
    # the keyboard the seventh
    d.cell("candidate", 5, 0).press("ArrowDown")
    ids[2, 4] = best.indices[6]
    expect(d.out.get_by_label("write token")).to_have_value(str(int(ids[2, 4])))
    d.shows(painted)
    d.out.get_by_label("write token").fill("77")
    d.out.get_by_label("write token").press("Enter")
    ids[2, 4] = 77
    d.shows(painted)
    d.button("As read").click()
    ids = odds.argmax(0)
    d.shows(painted)
    assert d.trouble() == []


def test_attention(page, runs):
    d = Desk(page, "AttentionExplorer(")
    (model, line, mean_std) = E.ready_mim(runs.parent)
    maps = E.attention_maps(model, normalize(E.some_digits()[3:4], mean_std))
    wanted = lambda patch, mass: (
        lambda: E.heads_picture(E.heads_table(maps, patch, (8, 8), mass), 52)
    )
    d.shows(wanted((4, 4), 0.6))
    d.cell("patch", 1, 6).click()
    d.shows(wanted((1, 6), 0.6))
    d.cell("patch", 1, 6).press("ArrowDown")
    d.shows(wanted((2, 6), 0.6))
    d.handle("mass to keep").press("End")
    d.shows(wanted((2, 6), 1.0))
    assert "100% of the attention lies on 100%" in d.text() and "beit demo" in d.text()
    d.drag("picture", 60)
    number = int(d.readout("picture"))
    assert number != 3
    maps = E.attention_maps(model, normalize(E.some_digits()[number : number + 1], mean_std))
    d.shows(wanted((2, 6), 1.0))


@pytest.mark.parametrize(
    "code,slider,make",
    [
        ("GapExplorer()", "q to posterior", E.gap_picture),
        ("TemperatureExplorer()", "temperature", lambda: E.TemperatureExplorer().draw),
        ("AlphabetExplorer()", "KL weight", lambda: E.AlphabetExplorer().draw),
    ],
    ids=("gap", "temperature", "alphabet"),
)
def test_drawn(page, code, slider, make):
    d = Desk(page, code)
    draw = make()
    exact = {
        "GapExplorer()": lambda r: r,
        "TemperatureExplorer()": lambda r: 2 ** (round(4 * np.log2(r)) / 4),
        "AlphabetExplorer()": lambda r: 2 ** (round(4 * np.log2(r)) / 4),
    }[code]
    value = lambda: exact(float(d.readout(slider)))
    plain = lambda html: " ".join(re.sub(r"<.*?>", "", html).split())

    def agrees():
        d.shows(lambda: draw(value())[0])
        until(lambda: plain(draw(value())[1]) in " ".join(d.text().split()))

    agrees()
    before = value()
    for _ in range(3):
        d.handle(slider).press("ArrowRight")  # keyboard
    until(lambda: value() > before)
    agrees()
    before = value()
    d.drag(slider, 70)  # mouse
    until(lambda: value() > before)
    agrees()
    assert d.trouble() == []


def test_schedule(page):
    d = Desk(page, "ScheduleExplorer()")
    title = lambda panel: d.out.locator(
        "h4", has_text=re.compile(rf"^{panel}\b")
    ).first.inner_text()
    blue, orange = (
        E.schedules(recipe_named(*which))["learning rate"]
        for which in (("finetune", "base-in1k"), ("pretrain", "base-in1k"))
    )
    at = lambda x: [f"{np.interp(x, *c):.3g}" for c in (blue, orange)]
    assert title("learning rate").split()[2:] == at(25) and d.out.locator("svg").count() == 4
    for _ in range(5):
        d.handle("% of the run").press("ArrowRight")
    until(lambda: title("learning rate").split()[2:], at(30))
    mark = d.out.locator("svg").first.locator("line.axis")
    before = float(mark.get_attribute("x1"))
    d.drag("% of the run", 80)
    until(lambda: float(mark.get_attribute("x1")) > before + 20)
    until(lambda: title("learning rate").split()[2:], at(int(d.readout("% of the run"))))
    layers = lambda: [
        float(y)
        for y in re.findall(
            r",([\d.]+)", d.out.locator("svg").last.locator("polyline").last.get_attribute("points")
        )
    ]
    steep = layers()
    d.handle("layer decay").press("End")  # no decay: a level line
    until(lambda: len(set(layers())) == 1 < len(set(steep)))
    d.out.get_by_label("recipe (blue)").select_option("tokenizer nano")
    until(lambda: d.out.locator("svg").count(), 6)
    assert d.handle("layer decay").count() == 1 and d.trouble() == []


def test_model(page, runs):
    "What the model sees follows the mask that a finger paints."
    d = Desk(page, "mim_predictor(f")
    predict = E.mim_predictor(runs)
    decoded = lambda image: Image.open(
        io.BytesIO(base64.b64decode(image.get_attribute("src").split(",")[1]))
    ).convert("RGB")
    cells = d.out.locator(".beit-pad").first.get_by_role("gridcell")
    expect(cells).to_have_count(64)
    mask = lambda: np.array(
        [s == "true" for s in cells.evaluate_all("all => all.map(c => c.ariaSelected)")]
    ).reshape(8, 8)

    # as the explorer hands it on
    x = E.to_tensor(
        E.to_pil(E.some_digits()[3]).resize((448, 448), 0).resize((32, 32), Image.Resampling.BOX)
    )

    def agrees():
        seen = d.out.get_by_role("img", name="the model's guess")
        until(
            lambda: (
                decoded(seen).tobytes()
                == E.to_pil(predict(x, mask())["the model's guess"]).tobytes()
            )
        )
        # and it is really there
        assert np.asarray(pixels(seen, (32, 32))).std() > 10

    agrees()
    old = mask()
    d.cell("patch", 6, 1).click()
    until(lambda: (mask() != old).sum(), 1)
    agrees()


@pytest.mark.parametrize("theme", THEMES)
def test_themes(page, theme):
    "Words can be read in both themes, and so can the ink of the charts."
    page.evaluate(
        "name => window.jupyterapp.commands.execute('apputils:change-theme', { theme: name })",
        THEMES[theme],
    )
    page.wait_for_function("name => document.body.dataset.jpThemeName == name", arg=THEMES[theme])
    light = lambda rgb: sum(
        w * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4)
        for w, c in zip((0.2126, 0.7152, 0.0722), np.asarray(rgb) / 255)
    )
    contrast = lambda a, b: (max(light(a), light(b)) + 0.05) / (min(light(a), light(b)) + 0.05)
    for code in (
        "PatchExplorer()",
        "TokenExplorer(",
        "AttentionExplorer(",
        "GapExplorer()",
        "TemperatureExplorer()",
        "AlphabetExplorer()",
        "ScheduleExplorer()",
    ):
        d = Desk(page, code)
        colours = d.out.locator(".beit-words:visible").evaluate_all(
            "all => all.map(e => getComputedStyle(e).color.match(/\\d+/g).slice(0, 3).map(Number))"
        )
        assert colours and all(contrast(c, d.ground()) >= 4.5 for c in colours), code
        box = d.out.bounding_box()
        wide = d.out.locator("img:visible, svg:visible, .widget-slider:visible").evaluate_all(
            "all => all.map(e => e.getBoundingClientRect().right)"
        )
        assert max(wide) <= box["x"] + box["width"] + 1, f"{code} is cut off at the right"
    assert contrast(tuple(int(E.INK[i : i + 2], 16) for i in (1, 3, 5)), d.ground()) >= 3.5
