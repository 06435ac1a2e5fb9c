"""Every lesson runs from top to bottom, and the book holds together."""

import ast, re, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import lessons

ROOT = Path(__file__).parents[1]
NBS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = {p.stem: p for p in (ROOT / "beit_nb").glob("*.py") if not p.stem.startswith("_")}
numbers = lambda: {
    m: int(re.search(r"File to edit: \.\./nbs/(\d+)_", p.read_text())[1])
    for m, p in MODULES.items()
}


@pytest.fixture(scope="session")
def runs(request):
    """All chosen lessons, two at a time (each in a kernel of its own), so that the book takes half
    as long.
    """
    chosen = [
        i.callspec.params["path"]
        for i in request.session.items
        if i.originalname == "test_lesson_runs"
    ]
    with ThreadPoolExecutor(2) as pool:
        yield {p: pool.submit(lessons.run, p) for p in chosen}


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_lesson_runs(path, runs):
    runs[path].result()


def ours(module):
    "The modules of ours that a module imports, wherever in the file."
    for n in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(n, ast.ImportFrom) and (n.level or (n.module or "").startswith("beit_nb")):
            yield from (
                [n.module.split(".")[-1]]
                if n.module and n.module != "beit_nb"
                else [a.name for a in n.names]
            )


def test_staircase():
    "An import only ever goes down to a lesson with a smaller number."
    n = numbers()
    assert len(n) == len(MODULES) >= 18
    arrows = [(a, b) for a in MODULES for b in ours(a) if b in n]
    assert len(arrows) > 25
    assert [f"{a} ({n[a]}) imports {b} ({n[b]})" for a, b in arrows if n[b] >= n[a]] == []


def test_every_module_has_its_notebook():
    for name, path in MODULES.items():
        notebook = re.search(r"File to edit: \.\./nbs/(\S+)\.ipynb", path.read_text())
        assert notebook, f"{path} was not exported from a notebook"
        file = ROOT / "nbs" / f"{notebook[1]}.ipynb"
        assert file.exists(), f"{path} comes from {file.name}, which is gone"
        assert file.stem == f"{numbers()[name]:02d}_{name}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_imports_alone(name):
    subprocess.run([sys.executable, "-c", f"import beit_nb.{name}"], check=True, cwd="/")


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_notebook_is_tidy(path):
    nb = nbformat.read(path, as_version=4)
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert "widgets" not in nb.metadata, "widget state is saved"
    assert all(re.fullmatch(r"[a-z][a-z0-9-]*", c.id) for c in nb.cells), "cell ids are words"
    assert any(c.outputs for c in code), "run it from top to bottom before committing"
    for c in code:
        assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in c.outputs), (
            f"cell {c.id} saved an error or stderr"
        )
        assert sum(1 for l in c.source.splitlines() if l.strip()) <= 37, f"cell {c.id} is too long"
    assert path.stat().st_size <= 400 * 1024, "a notebook stays under 400 KB"
    assert (
        nb.cells[0].source.startswith("# ")
        and "\n> " in nb.cells[0].source
        and "index.ipynb" in nb.cells[0].source
        or path.stem == "index"
    )


def test_links_between_lessons():
    for path in NBS:
        text = "\n".join(
            c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"
        )
        for target in re.findall(r"\]\(([\w./-]+\.ipynb)\)", text):
            assert (path.parent / target).exists(), (
                f"{path.name} links to {target}, which is not there"
            )


def test_index_lists_every_lesson():
    text = (ROOT / "nbs" / "index.ipynb").read_text()
    readme = (ROOT / "README.md").read_text()
    for path in NBS:
        if path.stem != "index":
            assert path.name in text and path.name in readme, f"{path.name} is not on the map"
