"""An explorer in the browser, as a reader meets it: its pad, sliders, buttons and words."""

import re

from browser import pixels


class ExplorerView:
    "One explorer on a page; `output` is a locator of its output area."

    def __init__(self, output):
        self.page = output.page
        self.output = output
        self.output.scroll_into_view_if_needed()
        self.pad = output.locator(".beit-pad").first

    def slider(self, name):
        return self.output.locator(".widget-slider", has_text=name)

    def handle(self, name):
        return self.slider(name).locator(".noUi-handle")

    def readout(self, name):
        return self.slider(name).locator(".widget-readout").inner_text()

    def drag(self, name, by):
        "Take a slider's handle with the mouse and move it so many pixels."
        box = self.handle(name).bounding_box()
        x, y = box["x"] + 8, box["y"] + 8
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + by, y, steps=6)
        self.page.mouse.up()

    def field(self, name):
        "A menu or a field, by its label."
        return self.output.get_by_label(name, exact=True)

    def button(self, name):
        return self.output.get_by_role("button", name=name)

    def upload(self, files):
        with self.page.expect_file_chooser() as chooser:
            self.button("file").click()
        chooser.value.set_files(files)

    def cell(self, row, col, unit="patch"):
        return self.output.get_by_role("gridcell", name=re.compile(rf"^{unit} {row},{col}\b"))

    def text(self):
        return self.output.inner_text()

    def errors(self):
        return self.output.locator(".error").all_inner_texts()

    def pad_pixels(self, size):
        "The pad on the screen as an RGB picture of that size."
        return pixels(self.pad, size)
