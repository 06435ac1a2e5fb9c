"""Runs lessons from top to bottom, and draws the map of the book.

    python tests/lessons.py nbs/02_elbo.ipynb ...   # run and save the outputs (what the web shows)
    python tests/lessons.py --slow nbs/...          # cells marked `#| slow` too
    python tests/lessons.py --tidy nbs/...          # run nothing, only make the saved outputs small
    python tests/lessons.py --map                   # the table of lessons in index.ipynb and README
    python tests/lessons.py --story                 # nbs/story.png anew, from your runs/demo

Cells marked `#| slow` are skipped unless asked for; the outputs that they have stay.
"""

import ast
import base64
import io
import re
import sys
import textwrap
import time
from pathlib import Path
from string import ascii_lowercase
from typing import NamedTuple

import nbformat
import numpy as np
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
WIDGET = "application/vnd.jupyter.widget-view+json"
WIDTH = 110  # columns of a saved text
COLORS = (24, 32, 48, 64, 96, 128, 192, 256)  # sizes of palette for saved pictures, in turn
NOISE = 12  # of 255: colors nearer than this are noise where there are few
DARK = 80  # the brightest channel of a ground whose pattern nobody sees
COLLAPSED = "jp-MarkdownHeadingCollapsed"  # what JupyterLab calls a section out of sight
KEPT = ["jupyter", COLLAPSED]  # of a cell's metadata; settings.ini says so to nbdev_clean
END = {  # the last two cells of a lesson, by their ids
    "end": "### The end",
    "end-words": "Run All Cells of JupyterLab goes to the last cell. This one is folded away, so "
    "the page goes to where reading begins.",
}
PAGES = ("explorers.ipynb", "glossary.ipynb", "index.ipynb")  # whose code nobody came to read
PARTS = {  # the least place of a lesson: the part of the book
    0: "Words for pictures",
    10: "Hide and guess",
    17: "The engine: what a run is",
    31: "The engine: where pictures come from",
    40: "Train it, and put it to work",
    59: "Every pixel",
    70: "What it costs, and is it fast",
    80: "What came of it, and which part earns its keep",
    90: "All of it",
    100: "Things to touch: how the explorers are made",
}
EXPLORERS = (  # how they are made, beside the numbered book; each uses only those before it
    *("pad", "figures", "svg", "controls", "shell", "mask_rules", "mask_views", "masks"),
    *("cuts", "patches", "elbo", "gap", "price", "temperature", "alphabet", "tokens"),
    *("spelling", "attention", "predictor", "answers", "guess", "courses", "recipes"),
    "workbench",
)


def flagged(cell, flag: str) -> bool:
    return any(line.replace(" ", "").startswith(f"#|{flag}") for line in cell.source.splitlines())


def run(path, slow: bool = False, timeout: int = 600, kernels: type = AsyncKernelManager):
    """The notebook at `path` with fresh outputs; an error in a cell is raised as it stands.

    `kernels`: what starts its kernel.
    """
    nb = nbformat.read(path, as_version=4)
    code = [c for c in nb.cells if c.cell_type == "code"]
    skipped = {c.id: c.copy() for c in code if flagged(c, "slow") and not slow}
    for c in code:
        if c.id in skipped:
            c.source = "pass"
    client = NotebookClient(
        nb,
        timeout=timeout,
        kernel_name="python3",
        kernel_manager_class=kernels,
        store_widget_state=False,
        resources={"metadata": {"path": str(Path(path).parent)}},
    )
    client.execute()
    for c in nb.cells:
        if c.id in skipped:
            c.update(skipped[c.id])
    return nb


def looks_like(image: Image.Image, other: Image.Image) -> bool:
    "Side by side no eye tells: 3.5 of 255 apart on average (root mean square), 64 at most."
    error = np.subtract(image.convert("RGB"), other.convert("RGB"), dtype=float)
    return (error**2).mean() <= 3.5**2 and abs(error).max() <= 64


def few_colors(image: Image.Image) -> Image.Image:
    "The image with the smallest palette that looks like it; with 256 colors if none does."
    rgb = image.convert("RGB")
    for colors in COLORS:
        palette = rgb.quantize(colors, kmeans=1, dither=Image.Dither.NONE)
        if looks_like(palette, rgb):
            break
    return palette


def without_noise(picture: Image.Image) -> Image.Image:
    """Palette picture in which each pixel takes the colour at its left where the two are near.

    Networks paint a black ground with a faint pattern, which nobody sees and no PNG can pack. On a
    light ground one sees the stripes that this leaves, so there nothing is changed.
    """
    places = np.array(picture)
    colors = np.array(picture.getpalette(), int).reshape(-1, 3)
    near = abs(colors[:, None] - colors).max(-1) <= NOISE
    near[:, colors.max(1) > DARK] = False
    for left, here in zip(places.T, places.T[1:]):
        here[:] = np.where(near[left, here], left, here)
    out = Image.fromarray(places, "P")
    out.putpalette(picture.getpalette())
    return out


def small_png(data: str) -> str:
    "A PNG (base64) with a palette where that is smaller; one that has a palette stays as it is."
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    if image.mode == "P":
        return data
    picture = few_colors(image)
    quiet = without_noise(picture)
    if len(picture.getcolors()) <= COLORS[0] and looks_like(quiet, image):  # no sky gets stripes
        picture = quiet
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return min(data, base64.b64encode(out.getvalue()).decode(), key=len)


def narrow(text: str) -> str:
    "A text whose lines are broken where a terminal of WIDTH columns is full; wider tables too."
    lines = []
    for line in text.split("\n"):
        indent = line[: len(line) - len(line.lstrip())] + "    "
        broken = textwrap.wrap(
            line,
            WIDTH,
            subsequent_indent=indent,
            break_on_hyphens=False,
            replace_whitespace=False,
            drop_whitespace=True,
        )
        lines += broken if len(line) > WIDTH else [line]
    return "\n".join(lines)


def only_imports(source: str) -> bool:
    try:
        lines = ast.parse(source).body
    except SyntaxError:  # a magic of IPython
        return False
    return all(isinstance(line, (ast.Import, ast.ImportFrom)) for line in lines)


def fold(nb, name: str):
    """Fold what a first reader passes over, and unfold all else.

    Folded are the cells that only a machine needs (`default_exp`, `hide`, imports), the checks of
    exercises, which know the answers, and on pages that are looked at all code.
    """
    exercises = False
    for c in nb.cells:
        exercises = exercises or (c.cell_type == "markdown" and "## Exercise" in c.source)
        machine = c.cell_type == "code" and (
            name in PAGES
            or flagged(c, "default_exp")
            or flagged(c, "hide")
            or only_imports(c.source)
            or (exercises and "assert " in c.source)
        )
        for key in KEPT:
            c.metadata.pop(key, None)
        if machine:
            c.metadata["jupyter"] = {"source_hidden": True}
    return nb if name in ("glossary.ipynb", "index.ipynb") else end_out_of_sight(nb)


UNSAFE = re.compile(r"<svg|<style|\bstyle=")  # what JupyterLab takes out of pages of others
PAGE = """<style>body {{ margin: 0; font: 14px/1.5 system-ui, sans-serif; color: #212121; }}
#it {{ display: inline-block; max-width: 840px; padding: 4px 10px; }}
{css} svg {{ overflow: visible; }}</style>
<div id="it">{html}</div>"""


def photograph(html: str) -> tuple[str, dict]:
    "What a browser makes of an output, as a PNG (base64), and its size in CSS pixels."
    from browser import ARGS, find_browser
    from playwright.sync_api import sync_playwright

    css = (ROOT / "beit_nb" / "explorers" / "explorers.css").read_text()
    with sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=find_browser(), args=ARGS)
        page = browser.new_page(device_scale_factor=2)
        page.set_content(PAGE.format(css=css, html=html))
        shot = page.locator("#it").screenshot()
        browser.close()
    width, height = (round(n / 2) for n in Image.open(io.BytesIO(shot)).size)
    return base64.b64encode(shot).decode(), {"width": width, "height": height}


def as_picture(output) -> None:
    """An output that only a trusted page would show becomes a picture of it, in place.

    A lesson that was just cloned is not trusted: JupyterLab takes SVG and styles out of it, and
    prefers what is left to a picture that lies beside.
    """
    data = output.get("data", {})
    html = data.get("text/html", "")
    drawing = data.get("image/svg+xml", "")
    if not drawing and not UNSAFE.search(html):
        return
    if "image/png" not in data:
        data["image/png"], size = photograph(drawing or html)
        output["metadata"] = {"image/png": size}
    for kind in ("text/html", "image/svg+xml"):
        data.pop(kind, None)


def end_out_of_sight(nb):
    """With a last cell that is not displayed, for the sake of who runs all cells.

    JupyterLab then makes the last cell the active one and scrolls to it. One without a place lies
    at 0, which is where reading begins.
    """
    if [c.id for c in nb.cells[-2:]] != list(END):
        nb.cells += [nbformat.v4.new_markdown_cell(END[name], id=name) for name in END]
    nb.cells[-2].metadata[COLLAPSED] = True
    return nb


def tidy(nb, name: str):
    """Without what a full run leaves behind that nobody reads; `name` of its file.

    Dead widgets, JPEGs beside their pictures, progress on stderr, colors that nobody sees, lines
    that a reader would have to scroll for. Code that few want to see is folded, and what a page
    that is not trusted would not show is a picture.
    """
    fold(nb, name)
    nb.metadata.pop("widgets", None)
    for c in nb.cells:
        for o in c.get("outputs", []):
            as_picture(o)
            o.get("data", {}).pop(WIDGET, None)
            if "image/png" in o.get("data", {}):
                o["data"].pop("image/jpeg", None)  # a picture of PIL comes as both
                o["data"]["image/png"] = small_png(o["data"]["image/png"])
            if "text" in o:
                o["text"] = narrow(o["text"])
            elif "text/plain" in o.get("data", {}):
                o["data"]["text/plain"] = narrow(o["data"]["text/plain"])
        if "outputs" in c:
            c.outputs = [o for o in c.outputs if o.get("name") != "stderr"]
    return nb


def save(path, slow: bool = False, execute: bool = True) -> None:
    # only who saves needs nbdev: the same cleaning as `nbdev_clean`, so that git stays quiet
    from execnb.nbio import dict2nb, read_nb, write_nb
    from nbdev.clean import clean_nb

    nb = run(path, slow) if execute else nbformat.read(path, as_version=4)
    tidy(nb, Path(path).name)
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    nb.metadata = nbformat.from_dict({"kernelspec": kernel})
    nbformat.write(nb, path)
    clean = dict2nb(read_nb(path))
    clean_nb(clean, clear_all=False, allowed_cell_metadata_keys=KEPT, clean_ids=True)
    write_nb(clean, path)


def number_of(stem: str) -> str:
    "The number that a lesson's file begins with: 21, or 21b for one put behind it; else nothing."
    found = re.match(r"(\d\d[b-z]?)_", stem)
    return found[1] if found else ""


def place(stem: str) -> float:
    "Where a lesson stands in the book: its number; after all these the explorers' rooms."
    if number := number_of(stem):
        return int(number[:2]) + ascii_lowercase.index(number[2:] or "a") / 26
    return 100 + EXPLORERS.index(stem.removeprefix("explorers_"))


def part(stem: str) -> str:
    return PARTS[max(least for least in PARTS if least <= place(stem))]


class Lesson(NamedTuple):
    "What the map says of a lesson."

    number: str  # nothing for an explorers' room
    part: str
    file: str
    question: str  # its title
    minutes: int  # to read it, as its head says
    module: str  # what it exports, or nothing
    sentence: str  # the first line of that module's docstring


def lessons() -> list[Lesson]:
    "All lessons in the order of the book: the numbered ones, then how the explorers are made."
    rows = []
    paths = [p for p in (ROOT / "nbs").glob("*.ipynb") if p.name not in PAGES]
    for path in sorted(paths, key=lambda p: place(p.stem)):
        nb = nbformat.read(path, as_version=4)
        title = nb.cells[0].source
        question = re.search(r"^# (.+)$", title, re.M)[1]
        sentence = re.search(r"^> (.+)$", title, re.M)[1]
        head = "\n".join(c.source for c in nb.cells[:2])
        minutes = int(re.search(r"^(?:\*|Reading time: )?(\d+) minutes\.", head, re.M)[1])
        code = "\n".join(c.source for c in nb.cells if c.cell_type == "code")
        module = re.search(r"^#\| ?default_exp (\S+)", code, re.M)
        named = module[1] if module else ""
        number, which = number_of(path.stem), part(path.stem)
        rows.append(Lesson(number, which, path.name, question, minutes, named, sentence))
    return rows


def map_table(folder: str = "") -> str:
    "The map of the book as a markdown table; `folder` stands before the links."
    lines = ["| | a question | minutes | module | in one line |", "|---|---|---|---|---|"]
    begun = ""
    for lesson in lessons():
        if lesson.part != begun:
            lines.append(f"| | **{lesson.part}** | | | |")
        begun = lesson.part
        module = f"`beit_nb.{lesson.module}`" if lesson.module else ""
        link = f"[{lesson.question}]({folder}{lesson.file})"
        cells = (lesson.number, link, lesson.minutes, module, lesson.sentence)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


TABLE = re.compile(r"^\| \| a question .*?(?=\n\n|\Z)", re.M | re.S)


def draw_map() -> None:
    "Write the table of lessons into index.ipynb and README.md."
    index = ROOT / "nbs" / "index.ipynb"
    nb = nbformat.read(index, as_version=4)
    [cell] = [c for c in nb.cells if c.id == "map"]
    cell.source = TABLE.sub(lambda _: map_table(), cell.source)
    nbformat.write(nb, index)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf8")
    readme.write_text(TABLE.sub(lambda _: map_table("nbs/"), text), encoding="utf8")


def draw_story(demo: Path = ROOT / "runs" / "demo") -> None:
    "Write nbs/story.png: how a demo's guesses grew. Nothing else writes it, no lesson and no page."
    from beit_nb.reconstructions import reconstruction_figure
    from beit_nb.tokenizer import load_tokenizer

    fig = reconstruction_figure(demo / "pretrain", load_tokenizer(demo / "tokenizer"))
    file = ROOT / "nbs" / "story.png"
    fig.savefig(file, dpi=80, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    if "--map" in sys.argv:
        draw_map()
    if "--story" in sys.argv:
        draw_story()
    for p in [a for a in sys.argv[1:] if not a.startswith("--")]:
        began = time.time()
        save(p, "--slow" in sys.argv, "--tidy" not in sys.argv)
        print(f"{p}: {time.time() - began:.0f} s, {Path(p).stat().st_size // 1024} KB")
