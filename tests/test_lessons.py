"""Every lesson runs from top to bottom, and the book and its library hold together."""

import ast
import base64
import importlib
import io
import json
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lessons
import nbformat
import numpy as np
import pytest
from helpers_processes import run_python
from kernels import ForkedKernelManager
from PIL import Image, ImageChops, ImageDraw

from beit_nb.images import photos

ROOT = Path(__file__).parents[1]
NBS = sorted((ROOT / "nbs").glob("*.ipynb"))
LIBRARY = ROOT / "beit_nb"


def dotted(path: Path) -> str:
    "beit_nb/engine/runs.py -> engine.runs"
    return ".".join(path.relative_to(LIBRARY).with_suffix("").parts)


MODULES = {dotted(p): p for p in sorted(LIBRARY.rglob("*.py")) if not p.stem.startswith("_")}


def notebook_of(module: str) -> str:
    "The stem of the notebook that a module was exported from, such as 26_engine_runs."
    found = re.search(r"File to edit: (?:\.\./)+nbs/(\S+)\.ipynb", MODULES[module].read_text())
    assert found, f"{MODULES[module]} was not exported from a notebook"
    return found[1]


def number(module: str) -> float:
    return lessons.place(notebook_of(module))


def imports(source: str, package: str) -> set[str]:
    """All that a source imports, wherever in the file, in full: beit_nb.masking.blockwise_mask.

    `package`: where in ours it lies, such as engine.
    """
    found = set()
    home = ["beit_nb", *filter(None, package.split("."))]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            name = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{name}.{a.name}" for a in node.names}
    return found


def begins_with(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def imported(source: str, package: str) -> set[str]:
    "The modules of ours that a source imports."
    names = imports(source, package)
    return {m for m in MODULES if any(begins_with(n, f"beit_nb.{m}") for n in names)}


PLUMBING = ["beit_nb.engine", "beit_nb.scale", "beit_nb.explorers"]
PLUMBING += (
    "argparse fcntl multiprocessing shutil socket subprocess tempfile threading tyro".split()
)


def plumbing_in(source: str) -> set[str]:
    "What a concept has no use for: engines, files, processes and commands."
    names = imports(source, "")
    return {m for m in PLUMBING if any(begins_with(n, m) for n in names)}


def arrows() -> list[tuple[str, str]]:
    return [
        (module, other)
        for module, path in MODULES.items()
        for other in sorted(imported(path.read_text(), module.rpartition(".")[0]))
    ]


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_lesson_runs(path):
    with ThreadPoolExecutor(1) as pool:  # in this thread may be the browser's event loop
        pool.submit(lessons.run, path, kernels=ForkedKernelManager).result()


NOT_OURS = "import sys; raise Exception([m for m in sys.modules if 'beit_nb' in m] or 'nothing')"
ENDS = {"1 / 0": "ZeroDivisionError", "import os; os._exit(1)": "Kernel died", NOT_OURS: "nothing"}


@pytest.mark.slow
@pytest.mark.parametrize("line", ENDS)
def test_a_lesson_that_fails_is_noticed(tmp_path, line):
    "An error, a kernel that dies; and none begins with modules of ours."
    cells = [nbformat.v4.new_code_cell(line)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "lesson.ipynb")

    with pytest.raises(Exception, match=ENDS[line]):
        lessons.run(tmp_path / "lesson.ipynb", kernels=ForkedKernelManager)


@pytest.mark.slow
def test_imports_go_down():
    """An import only ever goes down to a lesson with a smaller number.

    The explorers stand beside the book: no numbered lesson imports them, nor they a later room."""
    assert len(MODULES) >= 45 and len(arrows()) > 100
    up = [f"{a} ({number(a)}) -> {b} ({number(b)})" for a, b in arrows() if number(b) >= number(a)]
    assert up == []


def test_concept_rooms_are_pure():
    "What BEiT is (lessons 0x and 1x) imports nothing of what makes it run."
    plumbing = [(a, b) for a, b in arrows() if number(a) < 20 <= number(b)]
    assert plumbing == []
    concepts = {m: path.read_text() for m, path in MODULES.items() if number(m) < 20}
    assert len(concepts) >= 12
    found = {m: plumbing_in(source) for m, source in concepts.items()}
    for m in found:
        if m.startswith("engine."):  # those with a lesson this early use one another
            found[m] -= {"beit_nb.engine"}
    assert {m: plumbing for m, plumbing in found.items() if plumbing} == {}


@pytest.mark.parametrize(
    "line, modules, plumbing",
    [
        ("import beit_nb.engine.log as log", {"engine.log"}, {"beit_nb.engine"}),
        ("from beit_nb.engine.log import read_log", {"engine.log"}, {"beit_nb.engine"}),
        ("from .engine.log import read_log", {"engine.log"}, {"beit_nb.engine"}),
        ("from beit_nb.engine import log", {"engine.log"}, {"beit_nb.engine"}),
        ("from beit_nb import engine", set(), {"beit_nb.engine"}),
        ("from . import engine", set(), {"beit_nb.engine"}),
        ("def f():\n    import beit_nb.engine", set(), {"beit_nb.engine"}),
        ("from subprocess import run", set(), {"subprocess"}),
        ("import multiprocessing.pool as p", set(), {"multiprocessing"}),
        ("from beit_nb import masking, BeitError", {"masking"}, set()),
        ("from .masking import blockwise_mask", {"masking"}, set()),
        ("import masking, torch.engine, tyro_ish", set(), set()),
    ],
)
def test_no_import_is_overlooked(line, modules, plumbing):
    assert imported(line, "") == modules
    assert plumbing_in(line) == plumbing


def test_the_engine_knows_no_beit():
    "engine/ imports concept modules only for what flows through it: pictures, tokens, devices."
    allowed = {"images", "tokens", "device", "dalle", "dvae", "limits", "configs", "recipes"}
    engine = [(a, b) for a, b in arrows() if a.startswith("engine.")]
    assert len(engine) > 20
    assert [(a, b) for a, b in engine if not b.startswith("engine.") and b not in allowed] == []


def test_beit_on_one_page_needs_no_engine():
    path = ROOT / "nbs" / "16_beit_on_one_page.ipynb"
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    cells = [c.source for c in code]
    used = set().union(*(imported(re.sub(r"^[%!].*$", "", c, flags=re.M), "") for c in cells))
    assert used and all(number(m) < 20 for m in used), used
    page = [c.source for c in code if not c.id.startswith(("answer-", "check-"))]  # no exercises
    lines = [x for c in page for x in c.splitlines() if x.strip() and not x.startswith("#|")]
    assert 100 < len(lines) < 150
    assert not any(re.search(r"^#\| ?(export|default_exp)", c, re.M) for c in cells)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_notebook(module):
    stem = notebook_of(module)
    assert (ROOT / "nbs" / f"{stem}.ipynb").exists(), f"{module} comes from {stem}, which is gone"
    number = lessons.number_of(stem)
    assert stem.removeprefix(f"{number}_") == module.replace(".", "_")
    assert stem.startswith("explorers_") != bool(number)


OF_MANY = set(
    "drawings explorers faults faults_continued figures_in_words lessons published quick_starts "
    "rehearsal strangers switches tokenizer_dalle travelling_weights weights_parity "
    "whose_figures".split()
)


def test_every_module_has_its_test_file():
    "engine/runs.py: test_engine_runs.py. The few others test what goes through many modules."
    files = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    files = {name for name in files if not name.startswith("browser_")}  # of whole pages
    modules = {m.replace(".", "_") for m in MODULES}
    assert modules - files == set(), "modules without a test file"
    others = {file for file in files - modules - OF_MANY if not file.startswith("browser_")}
    assert others == set(), "files that test no module"


def test_a_name_means_one_thing():
    "No two modules define the same public name."
    homes = defaultdict(set)
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                homes[node.name].add(module)
    shared = {k: sorted(v) for k, v in homes.items() if len(v) > 1 and not k.startswith("_")}
    assert shared == {}


@pytest.mark.slow
def test_every_module_imports_alone():
    "In one process, each after the others are forgotten: nobody leans on a neighbor's import."
    code = (
        "import importlib, sys\n"
        f"for name in {list(MODULES)!r}:\n"
        "    for m in [m for m in sys.modules if m.split('.')[0] == 'beit_nb']:\n"
        "        del sys.modules[m]\n"
        "    importlib.import_module(f'beit_nb.{name}')\n"
    )
    run_python(code, cwd="/")


@pytest.mark.slow
def test_names_from_the_top():
    """The contract's names lie at the top, and asking for none of them loads no torch.

    What takes seconds to import, and is needed by few, is imported where it is used.
    """
    code = (
        "import sys, beit_nb\n"
        "assert 'torch' not in sys.modules\n"
        "names = [n for names in beit_nb.HOMES.values() for n in names.split()]\n"
        "assert len(names) > 30 and all(getattr(beit_nb, n) is not None for n in names)\n"
        "assert set(names) <= set(dir(beit_nb))\n"
        "late = {'scipy', 'sklearn', 'timm', 'torch._dynamo', 'torchvision'}\n"
        "assert not late & sys.modules.keys(), late & sys.modules.keys()\n"
    )
    run_python(code, cwd="/")
    import beit_nb

    with pytest.raises(AttributeError, match="no attribute 'bite'"):
        _ = beit_nb.bite


# Names that users import from a module where they are not defined, beside those of HOMES.
HANDED_ON = {
    "tokenizer": "Tokenizer codebook_usage",
    "checkpoints": "load_backbone resize_rel_pos_bias resize_pos_embed",
    "experiments": "Study Arm run_study summarize",
    "finetuning": "BeitForImageClassification",
}


@pytest.mark.parametrize("module", HANDED_ON)
def test_names_stay_where_users_import_them(module):
    there = importlib.import_module(f"beit_nb.{module}")

    for name in HANDED_ON[module].split():
        assert name in there.__all__
        home = (
            importlib.import_module(getattr(there, name).__module__)
            if name != "COMMANDS"
            else there
        )
        assert getattr(home, name) is getattr(there, name)


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_notebook_is_tidy(path):
    nb = nbformat.read(path, as_version=4)
    code = [c for c in nb.cells if c.cell_type == "code"]
    ids = [c.id for c in nb.cells]
    assert "widgets" not in nb.metadata, "widget state is saved"
    assert all(re.fullmatch(r"[a-z][a-z0-9-]*", i) for i in ids), "cell ids are words"
    assert len(set(ids)) == len(ids)
    assert any(c.outputs for c in code) or not code, "run it from top to bottom before committing"
    for c in code:
        for o in c.outputs:
            loud = o.output_type == "error" or o.get("name") == "stderr"
            assert not loud, f"cell {c.id} saved an error or stderr"
            data = o.get("data", {})
            assert lessons.WIDGET not in data, f"cell {c.id} saved a widget, which dies"
            safe = "image/svg+xml" not in data and not lessons.UNSAFE.search(
                data.get("text/html", "")
            )
            assert safe, f"cell {c.id} saved what a page that is not trusted does not show"
            text = o.get("text") or data.get("text/plain", "")
            long = [x for x in text.splitlines() if len(x) > lessons.WIDTH]
            assert not long, f"cell {c.id} saved a line of {len(long[0])} columns"
        lines = [x for x in c.source.splitlines() if x.strip() and not x.startswith("#|")]
        wide = [x for x in lines if len(x) > 100]
        assert not wide, f"cell {c.id} has a line of {len(wide[0])} columns"
    assert path.stat().st_size <= 400 * 1024, "a notebook stays under 400 KB"
    title = nb.cells[0].source
    assert title.startswith("# ") and "\n> " in title
    assert "index.ipynb" in title


def test_the_book_stays_small():
    "Who clones the book waits for its outputs: 8 MiB in all."
    sizes = [
        len(json.dumps(cell.outputs))
        for path in NBS
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code"
    ]
    assert 0 < sum(sizes) < 8 * 2**20


def png(image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


@pytest.mark.slow
def test_saved_pictures_get_small_palettes():
    "A drawing gets few colors, a photograph more, and both look as before."
    drawing = Image.new("RGB", (160, 120), "white")
    ImageDraw.Draw(drawing).line((5, 5, 150, 110), "red", 3)
    photo = photos()["chelsea"].convert("RGB").resize((160, 160))
    colors = {}
    for name, image in (("drawing", drawing), ("photo", photo)):
        data = lessons.small_png(png(image))
        small = Image.open(io.BytesIO(base64.b64decode(data)))
        colors[name] = len(small.getcolors())
        assert small.mode == "P" and lessons.looks_like(small, image)
        assert len(data) < len(png(image))
        assert lessons.small_png(data) == data, "tidied twice is tidied once"
    assert colors["drawing"] <= 24 < colors["photo"]
    assert not lessons.looks_like(drawing, Image.new("RGB", drawing.size, "white"))


def test_light_grounds_get_no_stripes():
    "Paper with a faint pattern is saved with the colours of its palette, pixel by pixel."
    pattern = np.random.default_rng(0).integers(230, 238, (120, 160, 1), np.uint8)
    image = Image.fromarray(pattern.repeat(3, 2))

    small = Image.open(io.BytesIO(base64.b64decode(lessons.small_png(png(image)))))

    assert not ImageChops.difference(small.convert("RGB"), image).getbbox()


def test_noise_that_nobody_sees_is_not_saved():
    noise = np.random.default_rng(0).integers(0, 8, (120, 160, 1), np.uint8)
    image = Image.fromarray(noise.repeat(3, 2))
    ImageDraw.Draw(image).ellipse((50, 30, 110, 90), "white")

    data = lessons.small_png(png(image))

    small = Image.open(io.BytesIO(base64.b64decode(data)))
    noisy = io.BytesIO()
    lessons.few_colors(image).save(noisy, "PNG", optimize=True)
    assert lessons.looks_like(small, image)
    assert len(data) * 3 / 4 < len(noisy.getvalue()) / 2


def test_saved_lines_are_broken_as_a_narrow_terminal_would():
    words = "  a-b " + " ".join(["word"] * 40)
    table = "x" * lessons.WIDTH

    text = lessons.narrow(f"{words}\n\n{table}\n")

    *broken, empty, same, end = text.split("\n")
    assert len(broken) == 2 and max(map(len, broken)) <= lessons.WIDTH
    assert broken[0].startswith("  a-b word") and broken[1].startswith("      word")
    assert " ".join(text.split()) == " ".join([*words.split(), table])
    assert (empty, same, end) == ("", table, "")
    assert lessons.narrow(text) == text


@pytest.mark.slow
@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_what_nobody_reads_is_folded(path):
    "And all else is open; `tests/lessons.py` sees to it whenever it saves a lesson."
    nb = nbformat.read(path, as_version=4)
    saved = [dict(c.metadata) for c in nb.cells]

    lessons.fold(nb, path.name)

    assert saved == [dict(c.metadata) for c in nb.cells]
    assert any(saved) or path.stem == "glossary"  # which has no code


def test_folding():
    code = nbformat.v4.new_code_cell
    words = nbformat.v4.new_markdown_cell
    cells = [
        code("#| default_exp x"),
        code("#| export\nimport a\nfrom b import (\n    c,\n)"),
        code("#|hide\nx = 1"),
        code("%matplotlib inline\nimport a"),
        code("import a\nx = 1\nassert x"),
        words("## Exercises\n\n**1. Predict.**"),
        code("guess = None"),
        code("def solution(): ...\n\n\nassert check(solution)"),
    ]
    nb = nbformat.v4.new_notebook(cells=cells)

    lessons.fold(nb, "02_elbo.ipynb")
    folded = [c.metadata.get("jupyter") == {"source_hidden": True} for c in nb.cells]
    lessons.fold(nb, "explorers.ipynb")
    on_the_page = [c.metadata.get("jupyter") == {"source_hidden": True} for c in nb.cells]

    assert folded[:-2] == [True, True, True, False, False, False, False, True]
    assert [c.id for c in nb.cells[-2:]] == list(lessons.END)
    assert on_the_page == [c.cell_type == "code" for c in nb.cells]


def test_a_lesson_ends_out_of_sight():
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("The last words.")])

    lessons.fold(nb, "02_elbo.ipynb")
    lessons.fold(nb, "explorers_gap.ipynb")  # once is enough

    assert [c.id for c in nb.cells[1:]] == ["end", "end-words"]
    assert [c.metadata for c in nb.cells] == [{}, {lessons.COLLAPSED: True}, {}]


def test_what_a_page_does_not_show_is_a_picture(monkeypatch):
    "SVG and styles; plain tables stay what they are, and a picture that is there is taken."
    size = {"width": 3, "height": 2}
    monkeypatch.setattr(lessons, "photograph", lambda html: (f"of {html}", size))
    kinds = {
        "drawing": {"image/svg+xml": "<svg/>"},
        "styled": {"text/html": '<b style="color:red">'},
        "both": {"text/html": "<svg/>", "image/png": "there"},
        "table": {"text/html": "<table></table>"},
    }
    outputs = {name: nbformat.v4.new_output("display_data", data) for name, data in kinds.items()}

    for output in outputs.values():
        lessons.as_picture(output)

    assert outputs["drawing"].data == {"image/png": "of <svg/>"}
    assert outputs["drawing"].metadata == {"image/png": size}
    assert outputs["styled"].data == {"image/png": 'of <b style="color:red">'}
    assert outputs["both"].data == {"image/png": "there"} and outputs["both"].metadata == {}
    assert outputs["table"].data == kinds["table"]


def test_nbdev_clean_leaves_what_is_folded():
    ini = (ROOT / "settings.ini").read_text()
    assert f"allowed_cell_metadata_keys = {' '.join(lessons.KEPT)}\n" in ini


def test_links_between_lessons():
    for path in NBS:
        cells = nbformat.read(path, as_version=4).cells
        text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
        for target in re.findall(r"\]\(([\w./-]+\.ipynb)\)", text):
            assert (path.parent / target).exists(), f"{path.name} links to {target}, not there"


def test_links_say_the_right_number():
    "[05 dalle](05_dalle.ipynb): a number in a link's text is that of the lesson."
    for path in NBS:
        cells = nbformat.read(path, as_version=4).cells
        text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
        for words, target in re.findall(r"\[([^\]]*)\]\((\d\d[b-z]?)_\w+\.ipynb\)", text):
            found = re.fullmatch(r"(?:lesson )?(\d\d[b-z]?)(?: \w+)*", words)
            assert not found or found[1] == target, f"{path.name}: [{words}] leads to {target}"


PLOTTED = [path for path in NBS if path.name not in lessons.PAGES]


@pytest.mark.parametrize("path", PLOTTED, ids=lambda p: p.stem)
def test_letters_of_figures_have_one_size(path):
    "Eleven pixels, also at 100 dots an inch; what is asked for smaller has six and a half."
    nb = nbformat.read(path, as_version=4)
    code = "\n".join(c.source for c in nb.cells if c.cell_type == "code")

    def setting(name, otherwise):
        found = re.findall(rf'rcParams\["{name}"\] = ([\d.]+)', code)
        return float(found[0]) if found else otherwise

    point = setting("figure.dpi", 100) / 72  # in pixels
    asked = re.findall(r"(?:fontsize|labelsize)=([\d.]+)", code)
    small = [points for points in asked if float(points) * point < 6.5]

    assert small == [], "letters that cannot be read"
    if "plt.subplots(" in code:
        assert round(setting("font.size", 10) * point) == 11


def test_next_and_previous_agree():
    "The lesson that one leads to leads back to it."
    around = {}
    for path in NBS:
        top = nbformat.read(path, as_version=4).cells[0].source
        row = re.search(r"^.*\[map\]\(index\.ipynb\).*$", top, re.M)
        if row and path.name != "explorers.ipynb":  # that page leads into their making as well
            sides = row[0].split("[map](index.ipynb)")
            around[path.name] = [re.findall(r"\((\w+\.ipynb)\)", side) for side in sides]
    assert len(around) > 100
    for name, (_, after) in around.items():
        for follower in after:
            assert name in around[follower][0], f"{name} leads to {follower}, which leads elsewhere"


def test_the_glossarys_words_stand_in_their_lessons():
    "A term of glossary.ipynb leads to a lesson that uses it."
    cells = nbformat.read(ROOT / "nbs" / "glossary.ipynb", as_version=4).cells
    [terms] = [c.source for c in cells if c.id == "terms"]
    rows = re.findall(r"^\| \*\*(.+?)\*\* \|.*\]\((\w+\.ipynb)\)", terms, re.M)
    missing = []
    for term, file in rows:
        words = (c.source for c in nbformat.read(ROOT / "nbs" / file, as_version=4).cells)
        if term.lower() not in " ".join(words).replace("*", "").lower():
            missing.append((term, file))

    assert len(rows) > 40 and missing == []


@pytest.mark.slow
def test_the_map_is_the_book():
    "index.ipynb and README have the table that the lessons themselves make (lessons.py --map)."
    index = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    [cell] = [c for c in index.cells if c.id == "map"]
    assert lessons.map_table() in cell.source
    assert lessons.map_table("nbs/") in (ROOT / "README.md").read_text(encoding="utf8")


def test_the_map_is_on_top_and_draws_nothing_anew():
    "Three doors, then the table, and code at the end only; the story is a saved picture."
    cells = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4).cells
    kinds = [c.cell_type for c in cells]
    code = "\n".join(c.source for c in cells if c.cell_type == "code")
    words = "\n".join(c.source for c in cells if c.cell_type == "markdown")

    assert "| play | understand | train |" in cells[0].source
    assert [c.id for c in cells].index("map") == 1
    assert kinds.index("code") > [c.id for c in cells].index("staircase-words")
    assert "](story.png)" in words and (ROOT / "nbs" / "story.png").exists()
    assert not re.search(r"savefig|write_|open\(|runs/", code)


def test_every_lesson_says_how_long_it_takes():
    minutes = {lesson.number: lesson.minutes for lesson in lessons.lessons()}

    assert all(5 <= m <= 45 for m in minutes.values()), minutes
    assert minutes["02"] == 40 and minutes["16"] == 10
