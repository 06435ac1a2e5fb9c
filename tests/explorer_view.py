"""An explorer in the browser, as a reader meets it: its pad, sliders, buttons and words."""

import re

from browser import pixels, until

# what of an output sticks out of its cell
REACH = """output => {
  const edge = output.closest(".jp-Cell-outputArea").getBoundingClientRect();
  const all = output.querySelectorAll("input, select, button, .beit-pad, output, .says, img, td");
  return [...all].filter((e) => e.getClientRects().length).map((e) => {
    const box = e.getBoundingClientRect();
    return box.left < edge.left - 1 || box.right > edge.right + 1 ? e.outerHTML.slice(0, 80) : "";
  }).filter(Boolean);
}"""

# resolves when the window has that width and the output has stood still for five frames
AT_REST = """(output, width) => new Promise((done) => {
  let before = "";
  let still = 0;
  requestAnimationFrame(function look() {
    const parts = [output, ...output.querySelectorAll(".beit-pad, svg")];
    const boxes = parts.map((part) => Object.values(part.getBoundingClientRect().toJSON()));
    const now = [innerWidth, ...boxes].join();
    still = now == before && innerWidth == width ? still + 1 : 0;
    before = now;
    if (still == 5) done(true);
    else requestAnimationFrame(look);
  });
})"""


class ExplorerView:
    "One explorer on a page; `output` is a locator of its output area."

    def __init__(self, output):
        self.page = output.page
        self.output = output
        self.output.scroll_into_view_if_needed()
        self.pad = output.locator(".beit-pad").first

    def resize(self, width, height=900):
        "Make the window that large, and wait until the page has come to rest in it."
        self.page.set_viewport_size(dict(width=width, height=height))
        self.output.evaluate(AT_REST, width)

    def all_is_within_reach(self):
        "Wait until nothing sticks out; what does is in the words of the failure."
        until(lambda: self.output.evaluate(REACH), [])

    def slider(self, name):
        return self.output.get_by_role("slider", name=name, exact=True)

    def readout(self, name):
        "The words beside a slider."
        row = self.slider(name).locator("xpath=ancestor::*[contains(@class, 'beit-slider')]")
        return row.locator("output").inner_text()

    def drag(self, name, share):
        "Take a slider's handle with the mouse and move it to that share of its way."
        slider = self.slider(name)
        box = slider.bounding_box()
        now = slider.evaluate("e => e.value / e.max")
        place = lambda share: box["x"] + 8 + share * (box["width"] - 16)  # noqa: E731
        y = box["y"] + box["height"] / 2
        self.page.mouse.move(place(now), y)
        self.page.mouse.down()
        self.page.mouse.move(place(share), y, steps=6)
        self.page.mouse.up()

    def field(self, name):
        "A menu or a field, by its label."
        return self.output.get_by_label(name, exact=True)

    def chosen(self, name):
        "What a menu shows."
        return self.field(name).evaluate("e => e.selectedOptions[0].text")

    def button(self, name):
        return self.output.get_by_role("button", name=name)

    def upload(self, files):
        self.output.locator("input[type=file]").set_input_files(files)

    def cell(self, row, col, unit="patch"):
        return self.output.get_by_role("gridcell", name=re.compile(rf"^{unit} {row},{col}\b"))

    def text(self):
        return self.output.inner_text()

    def errors(self):
        return [words for words in self.output.locator(".error").all_inner_texts() if words]

    def pad_pixels(self, size):
        "The pad on the screen as an RGB picture of that size."
        return pixels(self.pad, size)
