"""How soon the explorers answer: `python tests/latency.py [--json FILE] [--acts N] [--only WORD]`.

Opens nbs/explorers.ipynb in a real JupyterLab with a kernel of its own, runs it, and plays every
explorer with mouse and keys, twenty times each act. A time begins with the event's own time stamp
in the page, and ends after the frame in which all new pictures, decoded, and words are painted.
If something that is watched looks as it did before an act, the row says so instead. Times are worth
something on a quiet machine only, so the load before is told, too.
"""

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
from collections.abc import Iterator
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import psutil
from browser import SHUT_DOWN, open_notebook, reactions, run_all, serve_notebooks, start_browser
from explorer_view import ExplorerView
from playwright.sync_api import Error, Locator, Page

from beit_nb.scale.timing import machine

SIZE = (1280, 1250)  # of the window: a whole explorer can be seen
PARTS = ("jupyterlab", "ipywidgets", "anywidget", "ipykernel", "playwright")
RIGHT = ("ArrowRight",)
BACK = ("ArrowRight", "ArrowLeft")  # twenty keys to the right would pass the end

# resolves when nothing in the output has changed for 0.3 seconds
STILL = """output => new Promise((done) => {
  let timer;
  const wait = () => {
    clearTimeout(timer);
    timer = setTimeout(() => { seen.disconnect(); done(true); }, 300);
  };
  const seen = new MutationObserver(wait);
  seen.observe(
    output, { subtree: true, attributes: true, childList: true, characterData: true });
  wait();
})"""


class Row(NamedTuple):
    "An act, which begins with an event, at each of the places in turn."

    name: str
    limit: int | None  # milliseconds that the median may take
    watched: list[Locator]  # what must look otherwise after every act
    event: str
    places: list[Locator]
    keys: tuple[str, ...] = ("ArrowLeft", "ArrowRight")  # in turn

    def get_ready(self, i: int) -> None:
        "What is not timed: the mouse comes to the place, or goes far away, or keys are led there."
        place = self.places[i % len(self.places)]
        if self.event == "keydown":
            place.focus()
        elif self.event == "pointermove":
            place.page.mouse.move(5, 5)
        else:
            place.hover()

    def act(self, i: int) -> None:
        place = self.places[i % len(self.places)]
        if self.event == "keydown":
            place.page.keyboard.press(self.keys[i % len(self.keys)])
        elif self.event == "pointermove":
            place.hover()
        else:
            place.page.mouse.down()
            place.page.mouse.up()


class View(ExplorerView):
    "An explorer of the page, by the name of its class."

    def __init__(self, page: Page, name: str):
        cell = page.locator(".jp-CodeCell", has_text=f"{name}(")
        super().__init__(cell.locator(".jp-OutputArea-output").last)
        self.output.evaluate("output => output.scrollIntoView()")

    def grid(self, number: int) -> Locator:
        return self.output.locator(".beit-pad:visible").nth(number)

    def picture(self, number: int) -> Locator:
        "The picture under a grid."
        return self.grid(number).locator("img")

    def cells(self, number: int, top: int, left: int, cols: int) -> list[Locator]:
        "Twenty cells of a grid, so many in a row, from that one on."
        rows = self.grid(number).get_by_role("row")
        places = [(top + i // cols, left + i % cols) for i in range(20)]
        return [rows.nth(row).get_by_role("gridcell").nth(col) for row, col in places]

    def boxes(self, number: int) -> Locator:
        return self.grid(number).locator(".boxes")

    def figures(self, words: str) -> list[Locator]:
        "All figures, and the text in which these words stand."
        return [*self.output.locator(".beit-picture").all(), self.says(words)]

    def says(self, words: str) -> Locator:
        "The text in which these words stand."
        return self.output.locator(".widget-html", has_text=words).last


def mask_rows(view: View) -> Iterator[Row]:
    grid, words = view.grid(0).locator(".cells"), view.says("patches masked (")
    ratio, size = [view.slider("masking ratio")], [view.slider("patch size")]
    code = view.output.locator(".beit-code code").last  # has the seed; words may come again
    charts = [view.says("How often is each patch"), view.says("How many patches are masked?")]
    paint = ("pointerdown", view.cells(0, 0, 0, 14))
    yield Row("mask: click, cell painted (browser alone)", 50, [grid], *paint)
    yield Row("mask: click, words", 50, [words], "pointerdown", view.cells(0, 3, 0, 14))
    yield Row("mask: Resample", 50, [grid, code], "click", [view.button("Resample")])
    yield Row("mask: key on masking ratio", 50, [grid, words], "keydown", ratio, RIGHT)
    yield Row("mask: charts of 1,000 draws (later)", None, charts, "keydown", ratio, RIGHT)
    yield Row("mask: key on patch size", 50, [grid, words], "keydown", size)


def guess_rows(view: View) -> Iterator[Row]:
    score, answer = view.says("right."), view.output.locator(".beit-answer")
    cells, dice = view.cells(0, 1, 1, 6), [view.button("Another mask")]
    place = ("pointermove", view.cells(1, 1, 1, 6))
    yield Row("guess: pointer, five best tokens", 80, [answer], *place)
    yield Row("guess: click, score and tokens", 100, [score, answer], "pointerdown", cells)
    yield Row("guess: Another mask", 100, [view.picture(1), score], "click", dice)


def patch_rows(view: View) -> Iterator[Row]:
    words, sequence, frame = view.says("is number"), view.picture(1), view.boxes(1)
    size, stride = [view.slider("patch size")], [view.slider("stride")]
    place = ("pointermove", view.cells(0, 2, 0, 12))
    yield Row("patches: pointer, frame and words", 80, [frame, words], *place)
    yield Row("patches: key on patch size", 80, [sequence, words], "keydown", size)
    yield Row("patches: key on stride", 80, [sequence, words], "keydown", stride)
    shuffle = [view.button("Shuffle").or_(view.button("Put in order"))]
    yield Row("patches: Shuffle", 80, [sequence, words], "click", shuffle)


def token_rows(view: View) -> Iterator[Row]:
    words, tiles = view.says("The whole picture"), view.output.locator(".beit-tiles")
    chosen, cells = [view.picture(0), tiles, words], view.cells(0, 2, 2, 5)
    yield Row("tokens: click, best tokens", 80, chosen, "pointerdown", cells)
    others = tiles.locator(".tile").all()[1:]
    yield Row("tokens: click a token, painted", 80, [view.picture(2), words], "click", others)


def attention_rows(view: View) -> Iterator[Row]:
    answer = [view.output.locator(".beit-tiles"), view.picture(1), view.says("asks;")]
    yield Row("attention: click", 80, answer, "pointerdown", view.cells(0, 1, 1, 5))
    menu, keys = [view.field("picture")], ("ArrowDown", "ArrowUp")
    yield Row("attention: key on picture", 80, [view.picture(0), *answer], "keydown", menu, keys)


def gap_rows(view: View) -> Iterator[Row]:
    slider = [view.slider("q to posterior")]
    yield Row("gap: key on q to posterior", 50, view.figures("ELBO"), "keydown", slider, BACK)


def temperature_rows(view: View) -> Iterator[Row]:
    slider = [view.slider("temperature")]
    yield Row("temperature: key", 50, view.figures("winner's share"), "keydown", slider)


def alphabet_rows(view: View) -> Iterator[Row]:
    slider = [view.slider("KL weight")]  # each weight is fitted when it comes first
    figures = view.figures("A token costs")
    yield Row("alphabet: key on KL weight", 80, figures, "keydown", slider, RIGHT)


def schedule_rows(view: View) -> Iterator[Row]:
    panels = view.output.locator(".widget-html:has(.beit-panels)")
    yield Row("schedules: key on moment", 50, [panels], "keydown", [view.slider("moment")], RIGHT)


def bench_rows(view: View) -> Iterator[Row]:
    words, dice = view.says("hidden tokens"), [view.button("Another mask")]
    place = ("pointermove", view.cells(0, 1, 1, 6))
    yield Row("workbench: pointer, words and 6", 80, [words, view.picture(5)], *place)
    paint = ("pointerdown", view.cells(3, 1, 1, 6))
    yield Row("workbench: click on 4, guess", 100, [view.boxes(4), words], *paint)
    yield Row("workbench: Another mask, guess", 100, [view.picture(4), words], "click", dice)


EXPLORERS = {
    "Workbench": bench_rows,
    "MaskExplorer": mask_rows,
    "GuessExplorer": guess_rows,
    "PatchExplorer": patch_rows,
    "TokenExplorer": token_rows,
    "AttentionExplorer": attention_rows,
    "GapExplorer": gap_rows,
    "TemperatureExplorer": temperature_rows,
    "AlphabetExplorer": alphabet_rows,
    "ScheduleExplorer": schedule_rows,
}


def measure(view: View, row: Row, n: int) -> dict:
    "The times of a row, or what was wrong with one of its acts."
    together = reduce(Locator.or_, row.watched)
    times = []
    for i in range(n):
        row.get_ready(i)
        view.output.evaluate(STILL)
        before = looks(row.watched)
        try:
            times += reactions(together, lambda _, i=i: row.act(i), 1, [row.event])
        except Error as error:
            return dict(problem=f"act {i + 1}: {error.message.splitlines()[0]}")
        view.output.evaluate(STILL)
        for part, a, b in zip(row.watched, before, looks(row.watched)):
            if a == b:
                return dict(problem=f"act {i + 1} left as it was: {part}")
    p90 = sorted(times)[math.ceil(0.9 * n) - 1]
    return dict(limit=row.limit, median=statistics.median(times), p90=p90, times=times)


def looks(watched: list[Locator]) -> list[bytes]:
    "The pixels of each part as they are on the screen, as PNG."
    return [part.page.screenshot(clip=part.bounding_box()) for part in watched]


def kernel_memory() -> float:
    "Resident memory of the one kernel in MB; it is a descendant of this process."
    below = psutil.Process().children(recursive=True)
    [kernel] = [process for process in below if "ipykernel_launcher" in process.cmdline()]
    return kernel.memory_info().rss / 1e6


def line(name: str, result: dict) -> str:
    if "problem" in result:
        return f"{name:42}  {result['problem']}"
    limit = result["limit"]
    verdict = "" if not limit else f"{limit:8}  {'met' if result['median'] <= limit else 'MISSED'}"
    return f"{name:42}{result['median']:8.0f}{result['p90']:8.0f}{verdict}"


def play(page: Page, acts: int, only: str) -> dict:
    "Every row by its name, told as soon as it is known."
    print(f"{'ms':42}  median     p90   limit")
    results = {}
    for name, rows_of in EXPLORERS.items():
        view = View(page, name)
        for row in rows_of(view):
            if only in row.name:
                results[row.name] = measure(view, row, acts)
                print(line(row.name, results[row.name]), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, help="a file for all that was measured")
    parser.add_argument("--acts", type=int, default=20, help="how often each act is done")
    parser.add_argument("--only", default="", help="rows in whose names this word stands")
    wish = parser.parse_args()
    told = dict(host=platform.node(), load=os.getloadavg()) | machine()
    told |= {part: version(part) for part in PARTS}
    with (
        tempfile.TemporaryDirectory() as tmp,
        serve_notebooks(Path(tmp)) as (url, _),
        start_browser() as chrome,
    ):
        page, ears = open_notebook(chrome, f"{url}/lab/tree/explorers.ipynb?reset", SIZE)
        run_all(page, size=SIZE)
        before = kernel_memory()
        told["rows"] = play(page, wish.acts, wish.only)
        told |= dict(browser=chrome.version, memory_mb=[before, kernel_memory()])
        told |= dict(complaints=ears.complaints(), calls=len(ears.calls), away=ears.calls_away())
        page.evaluate(SHUT_DOWN)
    print(f"load {told['load'][0]:.1f} before, on {told['cpu']}")
    print("kernel: {:.0f} MB after the page, {:.0f} MB after all play".format(*told["memory_mb"]))
    print(f"console errors: {len(told['complaints'])}")
    print(f"requests to other hosts: {len(told['away'])} of {told['calls']}")
    if wish.json:
        wish.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
