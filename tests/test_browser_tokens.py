"""The explorers of tokens and of attention in a real browser, as a reader meets them."""

import io
import re

import pytest
from browser import until
from explorer_view import ExplorerView
from PIL import Image
from playwright.sync_api import Error, expect

from beit_nb.explorers.spelling import TokenExplorer

pytest_plugins = ["browser"]

TOKENS = [
    """
import torch
from beit_nb.dvae import DiscreteVAE
from beit_nb.explorers import TokenExplorer
from beit_nb.tokens import Tokenizer

torch.manual_seed(0)
dvae = DiscreteVAE(32, width=16)
with torch.no_grad():
    dvae.encoder[-1].weight *= 12  # so that it is sure of most cells
tokenizer = Tokenizer(dvae)
""",
    "explorer = TokenExplorer(tokenizer)\nexplorer",
]


def notebook_says(cells):
    "What the cells of a notebook leave behind."
    names = {}
    for cell in cells:
        exec(cell, names)
    return names


@pytest.fixture
def tokens(desk):
    page = desk(TOKENS)
    page.set_default_timeout(8_000)
    cell = page.locator(".jp-CodeCell", has_text="explorer = TokenExplorer").last
    return ExplorerView(cell.locator(".jp-OutputArea-output").last)


@pytest.fixture
def twin():
    "The explorer of the page, in this process."
    names = notebook_says(TOKENS)
    names["explorer"].names = names
    return names["explorer"]


def third_picture(view):
    "The bytes of picture 3."
    image = view.output.locator(".beit-pad img").nth(2)
    code = """async e => {
      await e.decode();
      return [...new Uint8Array(await (await fetch(e.src)).arrayBuffer())];
    }"""
    try:
        png = bytes(image.evaluate(code))
    except Error:  # the picture is being replaced
        return None
    return Image.open(io.BytesIO(png)).convert("RGB").tobytes()


def shows(view, explorer):
    "Picture 3, words and line of code are those of an explorer in this process."
    until(lambda: third_picture(view) == explorer.pads.painted.image.tobytes(), seconds=8)
    until(lambda: explorer.link() in view.text(), seconds=8)
    until(lambda: view.output.locator(".said").text_content(), explorer.describe(), seconds=8)


def code_line(view):
    return view.output.locator(".beit-code code").text_content()


def test_tokens_by_mouse_and_keyboard(tokens, twin):
    shows(tokens, twin)
    tiles = tokens.output.get_by_role("radio")

    tokens.cell(4, 4, "cell").first.click()
    twin.pad.press(4 * 8 + 4)
    shows(tokens, twin)
    tiles.nth(3).locator("..").click()  # the mouse writes the fourth best
    twin.candidates.index = 3
    shows(tokens, twin)
    expect(tiles.nth(3)).to_be_checked()
    tiles.nth(3).press("ArrowDown")  # the keyboard the fifth
    twin.candidates.index = 4
    shows(tokens, twin)
    tokens.cell(4, 4, "cell").nth(2).press("ArrowLeft")  # picture 3 has the same finger
    twin.pad.press(4 * 8 + 3)
    shows(tokens, twin)
    tokens.field("token, 0 to 31").fill("7")
    tokens.field("token, 0 to 31").press("Enter")
    twin.token.value = 7
    shows(tokens, twin)

    assert code_line(tokens) == eval(code_line(tokens), twin.names).link()


def test_a_token_that_is_not_there_is_refused(tokens):
    field = tokens.field("token, 0 to 31")
    before = field.input_value()

    field.press("ControlOrMeta+a")
    field.press_sequentially("999")
    field.press("Enter")

    expect(tokens.output.locator(".says:visible")).to_have_text("only whole numbers from 0 to 31")
    expect(field).to_have_value(before)
    field.fill("")
    field.press("Enter")
    expect(field).to_have_value(before)


def test_before_and_reset(tokens, twin):
    as_read = third_picture(tokens)
    expect(tokens.button("Before")).to_be_disabled()
    tokens.output.get_by_role("radio").nth(5).locator("..").click()
    until(lambda: third_picture(tokens) != as_read)

    tokens.button("Before").press("Space")
    until(lambda: third_picture(tokens) == as_read)
    tokens.button("Before").click()
    until(lambda: third_picture(tokens) != as_read)
    tokens.button("Reset").click()

    shows(tokens, twin)


def test_acts_of_tokens_are_ticked_off(tokens, twin):
    acts = tokens.output.locator(".acts .done")
    expect(acts).to_have_count(0)
    doubt = int((twin.probs.amax(0).flatten() < 0.5).nonzero()[0])

    tokens.cell(*divmod(doubt, 8), "cell").first.click()
    expect(acts).to_have_count(1)
    tokens.output.get_by_role("radio").nth(1).locator("..").click()
    expect(acts).to_have_count(2)
    tokens.button("Before").click()

    expect(acts).to_have_count(3)
    expect(tokens.output.locator(".notice")).to_have_text(TokenExplorer.NOTICE)


def test_cells_carry_their_tokens_and_odds(tokens, twin):
    expect(tokens.cell(2, 5, "cell").first).to_have_attribute("aria-selected", "true")

    label = tokens.cell(0, 3, "cell").nth(1).get_attribute("aria-label")

    assert re.fullmatch(rf"cell 0,3 is token {int(twin.ids[0, 3])} \(.* %\)", label)


@pytest.mark.parametrize("width", (640, 1000, 1280, 1920))
def test_tokens_are_within_reach(tokens, width):
    tokens.resize(width)

    tokens.all_is_within_reach()
