"""beit_nb.explorers: its lazy names, what it needs, and that every explorer can be shown."""

import ast
import base64
import io
import os
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from helpers_processes import run_python
from PIL import Image

import beit_nb
from beit_nb import explorers
from beit_nb.dvae import DiscreteVAE
from beit_nb.images import house_pictures
from beit_nb.mim import BeitForMaskedImageModeling
from beit_nb.tokens import Tokenizer

ROOT = Path(__file__).parents[1]


def run_here(code):
    "A fresh interpreter on the repository's beit_nb."
    return run_python(code, ok=None, env=dict(os.environ, PYTHONPATH=str(ROOT)))


def test_import_loads_neither_torch_nor_widgets():
    heavy = ("torch", "numpy", "ipywidgets", "anywidget", "matplotlib")
    code = (
        "import sys, beit_nb.explorers as e; assert 'MaskExplorer' in dir(e); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )

    run = run_here(code)

    assert run.stdout.strip() == "[]", run.stderr


def test_every_lazy_name_comes_from_its_home():
    for module, names in explorers.HOMES.items():
        for name in names.split():
            home = getattr(explorers, name).__module__
            assert home == f"beit_nb.explorers.{module}"
    assert beit_nb.MaskExplorer is explorers.MaskExplorer


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Explorers'"):
        explorers.Explorers  # noqa: B018


@pytest.mark.slow
def test_library_needs_no_widgets_and_explorers_say_what_they_need():
    code = (
        "import importlib, sys; sys.modules['anywidget'] = sys.modules['ipywidgets'] = None\n"
        "from beit_nb.masking import blockwise_mask; print(blockwise_mask().shape)\n"
        "for module in ('beit_nb', 'beit_nb.explorers', 'beit_nb.explorers.masks'):\n"
        "    try: importlib.import_module(module).MaskExplorer\n"
        "    except ImportError as e: print(e)\n"
    )

    shape, *lines = run_here(code).stdout.splitlines()

    assert shape == "(14, 14)" and len(lines) == 3
    for line in lines:
        assert "the explorers need" in line and "pip install ipywidgets anywidget" in line
        assert 'pip install -e ".[lab]"' in line


def test_readme_installs_what_jupyterlab_needs():
    [line] = [x for x in (ROOT / "README.md").read_text().splitlines() if "jupyter lab" in x]

    assert line.startswith('.venv/bin/pip install -e ".[lab]" && ')


def test_browser_files_are_beside_the_modules():
    folder = Path(explorers.__file__).parent
    assert {"pad.js", "explorers.css"} <= {file.name for file in folder.iterdir()}


@pytest.fixture(scope="module")
def family():
    "One explorer of each kind, with small random networks."
    torch.manual_seed(0)
    tokenizer = Tokenizer(DiscreteVAE(32, width=16))
    shape = dict(img_size=32, patch_size=4, embed_dim=24, depth=3, num_heads=2)
    model = BeitForMaskedImageModeling(**shape, vocab_size=32, weight_init="xavier").eval()
    pictures = torch.rand(4, 3, 32, 32)
    return dict(
        masks=explorers.MaskExplorer(),
        patches=explorers.PatchExplorer(),
        gap=explorers.GapExplorer(),
        temperature=explorers.TemperatureExplorer(),
        alphabet=explorers.AlphabetExplorer(house_pictures(64)[0]),
        tokens=explorers.TokenExplorer(tokenizer, images=pictures),
        attention=explorers.AttentionExplorer(model, images=pictures),
        recipes=explorers.ScheduleExplorer(),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", "masks patches gap temperature alphabet tokens attention recipes".split()
)
def test_every_explorer_has_a_widget_a_static_picture_and_no_error(family, name):
    data, _ = family[name]._repr_mimebundle_()

    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
    colors = np.unique(np.asarray(picture).reshape(-1, 3), axis=0)
    assert "application/vnd.jupyter.widget-view+json" in data
    assert 200 < picture.width < 1000 and len(colors) > 20
    assert family[name].guide.error == ""


@pytest.fixture(scope="module")
def page():
    "The names that the page of explorers leaves behind, and the explorers that it shows."
    names, shown = {}, []
    for cell in nbformat.read(ROOT / "nbs" / "explorers.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            *before, last = ast.parse(cell.source).body
            exec(compile(ast.Module(before, []), "page", "exec"), names)
            if isinstance(last, ast.Expr):
                shown.append(eval(compile(ast.Expression(last.value), "page", "eval"), names))
            else:
                exec(compile(ast.Module([last], []), "page", "exec"), names)
    return names, shown


@pytest.mark.slow
def test_a_line_that_was_copied_makes_the_same_on_the_page(page):
    names, shown = page
    masks = next(e for e in shown if isinstance(e, explorers.MaskExplorer))
    masks.controls.smallest.value = 12  # the line names a rule

    for explorer in shown:
        again = eval(explorer.link(), names)

        assert again.link() == explorer.link(), type(explorer)
        assert again.describe() == explorer.describe()
    assert len(shown) == 10
