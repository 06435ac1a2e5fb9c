"""The book as a static site: `sphinx-build -W nbs _site`, from the project's root.

Made from the notebooks as they are saved. Nothing is run, and neither the build nor a page fetches
anything: formulas become MathML, which browsers draw themselves, and the pages about the library
are its signatures and docstrings, read from the source.
"""

import ast
import json
import re
import sys
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/beit-nb/beit_nb"
sys.path.insert(0, str(ROOT / "tests"))

import lessons  # noqa: E402  (the order of the book and its parts)

project = "BEiT, from the first pixel"
author = "the beit_nb authors"
copyright = f"2026 onwards, {author}"
extensions = ["myst_nb"]
root_doc = "index"
exclude_patterns = ["**.ipynb_checkpoints"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # no page holds a living widget
myst_enable_extensions = ["dollarmath", "amsmath"]
html_theme = "sphinx_book_theme"
html_title = project
html_copy_source = False
html_math_renderer = "mathml"
html_theme_options = {
    "repository_url": REPOSITORY,
    "path_to_docs": "nbs",
    "use_repository_button": True,
    "show_toc_level": 2,
    "navbar_persistent": [],  # the column on the left has the search
}


def draw_formula(translator, node):
    translator.body.append(convert(node.astext()))
    raise SkipNode


def draw_equation(translator, node):
    translator.body.append(convert(node.astext(), display="block"))
    raise SkipNode


# The pages of the library


def signature(node: ast.FunctionDef | ast.ClassDef, source: str) -> str:
    "The lines of a definition before its body, with their comments."
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    lines = source.splitlines()[first - 1 : node.body[0].lineno - 1]
    return "\n".join(lines) if lines else source.splitlines()[node.lineno - 1]


def definition(node, source: str, owner: str = "") -> str:
    heading = f"{'###' if owner else '##'} {owner}{node.name}"
    code = f"```python\n{signature(node, source)}\n```"
    words = ast.get_docstring(node) or ""
    return "\n\n".join([heading, code, words])


def public(nodes, kinds) -> list:
    return [n for n in nodes if isinstance(n, kinds) and not n.name.startswith("_")]


def module_page(module: str, lesson: str) -> str:
    "A page in markdown: what a module holds, in the order of its lesson."
    source = (ROOT / "beit_nb" / f"{module.replace('.', '/')}.py").read_text(encoding="utf8")
    tree = ast.parse(source)
    parts = [f"# beit_nb.{module}", ast.get_docstring(tree) or ""]
    parts.append(f"Explained and defined in [the lesson](../{lesson}).")
    for node in public(tree.body, (ast.FunctionDef, ast.ClassDef)):
        parts.append(definition(node, source))
        methods = public(getattr(node, "body", []), ast.FunctionDef)
        documented = [m for m in methods if ast.get_docstring(m)]
        if isinstance(node, ast.ClassDef):
            parts += [definition(m, source, f"{node.name}.") for m in documented]
    return "\n\n".join(parts) + "\n"


def write_module_pages(app) -> None:
    "Write nbs/api/*.md, which git ignores; what is there already and the same keeps its date."
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    pages = {e.module: module_page(e.module, e.file) for e in lessons.lessons() if e.module}
    names = "\n".join(sorted(pages))
    contents = f"```{{toctree}}\n:maxdepth: 1\n{names}\n```\n"
    pages["index"] = f"# The library\n\nA page a module, in the words of its source.\n\n{contents}"
    for name, page in pages.items():
        file = folder / f"{name}.md"
        if not file.exists() or file.read_text(encoding="utf8") != page:
            file.write_text(page, encoding="utf8")
    for file in folder.glob("*.md"):
        if file.stem not in pages:
            file.unlink()


# What a page of the site says otherwise than the notebook


def contents() -> str:
    "The book's order, for the column on the left."
    parts = {"On one page": ["explorers", "glossary"]}
    for lesson in lessons.lessons():
        parts.setdefault(lesson.part, []).append(Path(lesson.file).stem)
    parts["The library"] = ["api/index"]
    tree = "```{{toctree}}\n:hidden:\n:caption: {}\n{}\n```\n"
    return "\n".join(tree.format(part, "\n".join(names)) for part, names in parts.items())


def shown_explorer(cell: dict) -> str | None:
    "The class of the explorer whose still picture a cell shows, if it shows one."
    for output in cell.get("outputs", []):
        plain = "".join(output.get("data", {}).get("text/plain", ""))
        found = re.match(r"(Workbench|\w+Explorer)\(children=", plain)
        if found:
            return found[1]
    return None


def markdown(name: str, text: str) -> dict:
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text}


def live_note(name: str, page: str) -> str:
    file = f"[nbs/{page}.ipynb]({REPOSITORY}/blob/main/nbs/{page}.ipynb)"
    return f"*A still of `{name}`. It moves in JupyterLab: open {file} and run it.*"


def adapt_page(app, page: str, source: list[str]) -> None:
    "Links that leave the book lead to the repository; explorers say where they are alive."
    if not (Path(app.srcdir) / f"{page}.ipynb").exists():
        return
    text = source[0].replace("](../", f"]({REPOSITORY}/blob/main/")
    nb = json.loads(text)
    cells = []
    for cell in nb["cells"]:
        cells.append(cell)
        explorer = shown_explorer(cell)
        if explorer:
            cells.append(markdown(f"live-{len(cells)}", live_note(explorer, page)))
    if page == root_doc:
        cells.append(markdown("contents", contents()))
    nb["cells"] = cells
    source[0] = json.dumps(nb)


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (draw_formula, None), (draw_equation, None))
    app.connect("builder-inited", write_module_pages)
    app.connect("source-read", adapt_page)
