"""The explorer of masks in a real browser: the screen against the mask that the rule draws."""

import re
import statistics

import numpy as np
import pytest
from browser import SCROLLED, THEMES, pixels, reactions, until
from explorer_view import ExplorerView
from numpy.random import default_rng
from PIL import Image
from playwright.sync_api import Error, expect

from beit_nb import masking
from beit_nb.explorers.mask_rules import ALGORITHMS, OFFICIAL, RANDOM, MaskRule
from beit_nb.explorers.masks import MaskExplorer
from beit_nb.explorers.pad import HIDDEN, read_picture
from beit_nb.masking import blockwise_steps

pytest_plugins = ["browser"]
GRAY = np.array([int(HIDDEN[i : i + 2], 16) for i in (1, 3, 5)])
CELLS = [
    """import torch
from beit_nb.explorers.masks import MaskExplorer

def halves(picture, mask):
    "What a model would answer: here green where it sees, red where it does not."
    holes = torch.as_tensor(mask).repeat_interleave(16, 0).repeat_interleave(16, 1)
    return {"what it sees": torch.stack([holes, ~holes, holes & ~holes]).float()}
""",
    "MaskExplorer()",
    "MaskExplorer(predict=halves)",
]


def draw(rule=MaskRule(), seed=3):  # noqa: B008
    "The mask that should be on the screen."
    return rule.mask(default_rng(seed))


def cells_of(mask):
    return {(int(row), int(col)) for row, col in np.argwhere(mask)}


class MaskView(ExplorerView):
    "The explorer of one output cell."

    def __init__(self, page, number=0):
        super().__init__(page.locator(".jp-OutputArea-output:has(.beit-pad)").nth(number))

    def words(self):
        return self.output.locator(".widget-html", has_text="wanted").first.inner_text()

    def count(self):
        return int(re.match(r"\s*(\d+) of", self.words())[1])

    def middles(self, n=14):
        "The colour in the middle of each patch on the screen: (n, n, 3)."
        shot = np.asarray(self.pad_pixels((8 * n, 8 * n)), int).reshape(n, 8, n, 8, 3)
        return shot[:, 2:6, :, 2:6].mean((1, 3))

    def gray_cells(self, n=14):
        "Which patches look masked, judged from pixels alone."
        return cells_of(abs(self.middles(n) - GRAY).max(-1) < 4)

    def shows(self, mask, n=14):
        "Wait until the pixels show exactly this mask, and the words count it."
        wanted = cells_of(mask)
        until(lambda: self.gray_cells(n), wanted, 8)
        until(self.count, len(wanted), 8)

    def marked(self):
        "Which patches are masked, as a screen reader hears it; a frame's cross hides no patch."
        cells = self.output.get_by_role("gridcell", selected=True).all()
        return {cell.get_attribute("aria-label") for cell in cells}

    def lines(self):
        "The line of Python for the mask, and the one for the explorer."
        return self.output.locator(".beit-code code").all_inner_texts()

    def lines_give(self, mask):
        "Do both lines of code make exactly this mask?"
        one, all_of_it = self.lines()
        names = vars(masking) | {"default_rng": default_rng, "np": np}
        made = eval(all_of_it, {"MaskExplorer": MaskExplorer, "MaskRule": MaskRule})
        return bool((eval(one, names) == mask).all() and (made.mask == mask).all())

    def done(self):
        "Which of the three acts are ticked off."
        acts = self.output.locator(".acts li")
        return [
            i for i in range(acts.count()) if "done" in (acts.nth(i).get_attribute("class") or "")
        ]

    def frames(self):
        return self.output.locator(".beit-pad .boxes div")


@pytest.fixture
def view(desk):
    page = desk(CELLS)
    page.set_default_timeout(8_000)
    return MaskView(page)


def test_first_sight(view):
    mask = draw()

    view.shows(mask)

    photo = np.asarray(read_picture("chelsea"), int).reshape(14, 32, 14, 32, 3)
    middles = photo[:, 8:24, :, 8:24].mean((1, 3))
    assert abs(view.middles() - middles)[~mask].max() < 12  # the picture, upright
    assert "75 of 196 patches masked (38.3%) · 75 wanted" in view.words()
    assert "6 blocks in 11 attempts, 5 refused" in view.words()
    assert view.frames().count() == 6 and view.readout("attempt") == "end"
    title = r"74\.\d on average, exactly 75 in 6\d% of 1,000 masks"
    expect(view.output.get_by_text(re.compile(title))).to_be_visible()
    question = "If a patch's left neighbour is masked, how often is the patch masked too?"
    expect(view.output.locator(".title", has_text=question)).to_be_visible()
    until(lambda: all(share in view.text() for share in ("86%", "38%")))
    assert view.errors() == [] and view.done() == [] and view.lines_give(mask)


def test_sliders(view):
    view.slider("masking ratio").press("ArrowRight")  # keyboard: half a per cent
    view.shows(draw(MaskRule(num_mask_patches=76)))

    view.drag("smallest block", 0.5)  # mouse
    until(lambda: int(view.readout("smallest block").split()[0]) > 40)
    smallest = int(view.readout("smallest block").split()[0])
    view.shows(draw(MaskRule(OFFICIAL, (14, 14), 76, smallest)))

    view.slider("aspect ratio").press("ArrowRight")
    view.shows(draw(MaskRule(OFFICIAL, (14, 14), 76, smallest, 0.35)))
    assert view.readout("aspect ratio") == "0.35 to 2.9"

    view.slider("smallest block").press("Home")
    view.slider("patch size").press("ArrowRight")  # 16 to 28: a grid of 8 x 8
    expect(view.output.get_by_role("gridcell")).to_have_count(64)
    coarse = draw(MaskRule(OFFICIAL, (8, 8), 25, 1, 0.35))  # 39 % of 64
    view.shows(coarse, 8)
    until(lambda: view.lines_give(coarse))


def test_marks_lead_back_to_the_official_settings(view):
    for name in ("masking ratio", "smallest block", "aspect ratio"):
        view.slider(name).press("PageUp")
    until(lambda: view.lines()[1] != "MaskExplorer('chelsea', seed=3)")

    for mark in view.button("BEiT").all():
        mark.click()

    view.shows(draw())
    until(lambda: view.lines()[1], "MaskExplorer('chelsea', seed=3)")


def test_clicks_flip_one_patch(view):
    mask = draw()
    view.shows(mask)

    view.cell(2, 9).click(button="middle")  # no button but the first paints
    view.shows(mask)
    view.cell(2, 9).click()
    flipped = mask.copy()
    flipped[2, 9] ^= True
    view.shows(flipped)

    state = "masked" if flipped[2, 9] else "shown"
    assert "by hand" in view.words() and view.frames().count() == 0
    assert view.cell(2, 9).get_attribute("aria-label") == f"patch 2,9 {state}"
    until(lambda: view.lines_give(flipped))
    view.cell(2, 9).click()
    view.shows(mask)
    until(lambda: view.frames().count(), 6)


def drag_along(view, row, first, last):
    "A quick hand: two reports of the mouse for all these patches."
    start = view.cell(row, first).bounding_box()
    x, y = start["x"] + 10, start["y"] + 10
    view.page.mouse.move(x, y)
    view.page.mouse.down()
    view.page.mouse.move(x + (last - first) * start["width"], y, steps=2)
    view.page.mouse.up()


def test_a_quick_hand_skips_no_patch_and_is_one_stroke(view):
    mask = draw()
    view.shows(mask)
    painted = mask.copy()
    painted[12, 1:11] = not mask[12, 1]

    drag_along(view, 12, 1, 10)
    view.cell(5, 5).hover()  # the finger is up

    view.shows(painted)
    view.button("Undo").click()
    view.shows(mask)
    expect(view.button("Undo")).to_be_disabled()


def test_clear_invert_and_undo(view):
    mask = draw()
    view.shows(mask)

    view.button("Invert").click()
    view.shows(~mask)
    view.button("Clear").click()
    view.shows(mask & False)
    view.slider("masking ratio").press("ArrowRight")  # throws away what was painted
    view.shows(draw(MaskRule(num_mask_patches=76)))
    view.button("Undo").click()
    view.shows(mask & False)
    assert view.readout("masking ratio") == "38.3%"
    view.button("Undo").click()
    view.shows(~mask)
    until(lambda: view.lines_give(~mask))


def test_keyboard(view):
    mask = draw()
    view.cell(0, 0).focus()
    scrolled = view.page.evaluate(SCROLLED)

    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "Space", "End", "Enter", "b"):
        view.page.keyboard.press(key)

    mask[2, 1] ^= True
    mask[2, 13] ^= True
    view.shows(mask)
    state = "masked" if mask[2, 13] else "shown"
    until(lambda: view.output.locator(".beit-status").inner_text(), f"patch 2,13 {state}")
    assert view.page.locator(".jp-CodeCell").count() <= len(CELLS) + 1  # Lab did not take "b"
    assert view.page.evaluate(SCROLLED) == scrolled


def test_algorithms_and_seeds(view):
    for name in (*ALGORITHMS[1:], OFFICIAL):
        view.field("algorithm").select_option(name)
        view.shows(draw(MaskRule(name)))
        for idle in ("smallest block", "aspect ratio"):
            assert view.slider(idle).is_disabled() == (name == RANDOM)

    view.field("seed").fill("41")
    view.field("seed").press("Enter")
    view.shows(draw(seed=41))
    view.button("Resample").click()
    view.shows(draw(seed=42))

    expect(view.field("seed")).to_have_value("42")
    until(lambda: view.lines_give(draw(seed=42)))


RECORD_FILM = """output => {
  window.film = [];
  const boxes = output.querySelector(".boxes");
  const look = box => box.style.getPropertyValue("--color") + " " + box.className;
  const record = () => film.push([...boxes.children].map(look));
  new MutationObserver(record).observe(boxes, { childList: true });
}"""


def test_play_shows_every_attempt(view):
    view.shows(draw())
    blocks = list(blockwise_steps(rng=default_rng(3)))
    kept = np.cumsum([block.accepted for block in blocks])
    view.output.evaluate(RECORD_FILM)

    view.button("Play").click()
    expect(view.button("Pause")).to_be_visible()
    expect(view.button("Play")).to_be_visible(timeout=15_000)
    until(lambda: "blocks in" in view.words())

    film = [frame for frame in view.page.evaluate("film") if frame]
    assert len(film) >= len(blocks)  # also the refused
    refused = [frame[-1] for frame in film if "dashed" in frame[-1]]
    assert refused and all(look.startswith("#c0392b") for look in refused)
    assert [len(frame) for frame in film[:3]] == [1, kept[0] + 1, kept[1] + 1]
    view.shows(draw())
    until(view.done, [0])


def test_pause_step_and_scrub(view):
    view.shows(draw())
    *_, fourth = moments = [mask_after(n) for n in range(5)]

    view.button("Play").click()
    until(lambda: "attempt" in view.words())
    view.button("Pause").click()
    until(lambda: view.button("Play").count(), 1)
    paused = view.readout("attempt")
    view.page.wait_for_timeout(800)
    assert view.readout("attempt") == paused

    view.slider("attempt").press("Home")
    view.shows(moments[0])
    for n in (1, 2, 3):
        view.button("Step").click()
        until(view.marked, labels(moments[n]), 8)
    view.slider("attempt").press("ArrowRight")
    until(view.marked, labels(fourth), 8)
    assert view.readout("attempt") == "4 of 11" and "attempt 4 of 11" in view.words()
    until(lambda: view.lines_give(fourth))
    view.cell(0, 12).click()
    painted = fourth.copy()
    painted[0, 12] ^= True
    view.shows(painted)
    until(lambda: view.lines_give(painted))


def labels(mask):
    return {f"patch {row},{col} masked" for row, col in cells_of(mask)}


def mask_after(attempts):
    "What is masked after so many attempts of the game."
    return masking.mask_of(list(blockwise_steps(rng=default_rng(3)))[:attempts])


def test_bad_uploads_are_one_line(view, tmp_path):
    view.shows(draw())
    (tmp_path / "letter.png").write_text("Dear reader, I am no picture.")
    Image.new("1", (20000, 20000)).save(tmp_path / "huge.png")

    for name, words in (("letter.png", "not a picture"), ("huge.png", "million pixels")):
        view.upload(tmp_path / name)
        expect(view.output.locator(".beit-upload .says")).to_contain_text(f"{name}")
        expect(view.output.locator(".beit-upload .says")).to_contain_text(words)

    view.shows(draw())


def test_an_upload_is_shown(view, tmp_path):
    halves = np.zeros((60, 60, 3), np.uint8)
    halves[:, 30:] = (200, 40, 90)
    Image.fromarray(halves).save(tmp_path / "halves.png")
    free = ~draw()

    view.upload(tmp_path / "halves.png")

    def is_shown():
        middles = view.middles()
        black = middles[:, :7][free[:, :7]]
        pink = middles[:, 7:][free[:, 7:]]
        return bool(black.max() < 4 and abs(pink - (200, 40, 90)).max() < 4)

    until(is_shown, seconds=8)
    assert view.errors() == []


def test_a_rule_that_cannot_work_is_said_beside_its_slider(view):
    mask = draw()
    view.slider("smallest block").press("End")  # 100 patches

    row = view.slider("smallest block").locator("xpath=ancestor::*[@class='beit-slider']")
    expect(row.locator(".says")).to_contain_text("no block of 100 patches fits into 75")
    expect(view.slider("smallest block")).to_have_attribute("aria-invalid", "true")
    until(lambda: view.output.locator(".stale").count() >= 5)
    assert view.done() == [1]
    assert view.count() == mask.sum() and "min_mask" not in row.inner_text()
    view.button("BEiT").nth(1).click()
    view.shows(mask)
    expect(view.output.locator(".stale")).to_have_count(0)


def test_the_third_act(view):
    view.shows(draw())
    view.button("Clear").click()
    view.shows(draw() & False)
    mask = np.zeros((14, 14), bool)

    for col in (1, 2, 5, 9):
        top = view.cell(0, col).bounding_box()
        bottom = view.cell(13, col).bounding_box()
        view.page.mouse.move(top["x"] + 9, top["y"] + 9)
        view.page.mouse.down()
        view.page.mouse.move(bottom["x"] + 9, bottom["y"] + 9, steps=3)
        view.page.mouse.up()
        mask[:, col] = True

    view.shows(mask)
    until(view.done, [2])
    until(lambda: view.lines_give(mask))


def test_the_triangle_stands_where_this_mask_lies(view):
    view.shows(draw())
    pointer = view.output.locator(".pointer")
    expect(pointer).to_have_count(1)
    before = pointer.bounding_box()["x"]

    def way():
        "How far it has gone; the chart is drawn anew, and may be away for a moment."
        return (pointer.bounding_box() or {"x": before})["x"] - before

    drag_along(view, 12, 1, 10)
    until(lambda: "by hand" in view.words())

    masked = view.count() - 75
    until(lambda: way() * masked > 0)


def brightness(locator, trait):
    "The mean of red, green and blue of a CSS colour on the screen."
    css = locator.evaluate(f"e => getComputedStyle(e).{trait}")
    return np.mean([int(value) for value in re.findall(r"\d+", css)[:3]])


@pytest.mark.parametrize("theme", THEMES)
def test_prediction_in_both_themes(desk, theme):
    view = MaskView(desk(CELLS, theme), 1)
    mask = draw()
    view.shows(mask)
    paper = brightness(view.page.locator(".jp-NotebookPanel").first, "backgroundColor")
    for part in (".beit-words", ".see", ".acts li", ".beit-slider .name"):
        ink = brightness(view.output.locator(part).first, "color")
        assert abs(ink - paper) > 140 and (paper < 60) == (theme == "dark")

    guess = view.output.get_by_role("img", name="what it sees")

    def holes():
        try:
            return (np.asarray(pixels(guess, (14, 14)))[..., 0] > 128).tolist()
        except Error:  # the picture is being replaced
            return None

    until(holes, mask.tolist())
    view.pad.scroll_into_view_if_needed()
    view.cell(2, 9).click()  # the model is asked again at every click
    mask[2, 9] ^= True
    until(holes, mask.tolist())


@pytest.mark.parametrize("width", (640, 1000, 1280, 1920))
def test_nothing_is_out_of_reach(view, width):
    view.resize(width)

    view.all_is_within_reach()
    small = "e => parseFloat(getComputedStyle(e).fontSize) < 12 && e.textContent.trim() != ''"
    letters = view.output.locator("span, p, li, td, text, label, button, select, output, div")
    assert letters.evaluate_all(f"all => all.filter({small}).map(e => e.outerHTML)") == []


def test_every_control_has_a_name_and_a_tooltip(view):
    titled = "e => !!e.closest('[title]') && e.closest('[title]').title != 'null'"
    controls = view.output.locator("input, select, button")

    assert controls.count() >= 15
    for i in range(controls.count()):
        assert controls.nth(i).evaluate(titled), controls.nth(i).evaluate("e => e.outerHTML")


def test_a_change_is_on_the_screen_soon(view):
    "Within 50 ms on a quiet machine; the test asks for four times that, as machines are busy."
    view.shows(draw())
    grid = view.output.locator(".cells")
    words = view.output.locator(".widget-html", has_text="wanted").first

    def press(name):
        view.slider(name).focus()
        return lambda i: view.page.keyboard.press("ArrowRight" if i % 2 else "ArrowLeft")

    waits = {
        "click, cell": reactions(grid, lambda i: view.cell(i, i).click(), 10),
        "click, words": reactions(words, lambda i: view.cell(i, i).click(), 10),
        "key on masking ratio, words": reactions(words, press("masking ratio"), 20),
        "key on attempt, words": reactions(words, press("attempt"), 20),
        "Resample, words": reactions(words, lambda i: view.button("Resample").click(), 10),
        "Invert, words": reactions(words, lambda i: view.button("Invert").click(), 10),
    }

    medians = {name: statistics.median(each) for name, each in waits.items()}
    print({name: round(median) for name, median in medians.items()})
    assert max(medians.values()) < 200
