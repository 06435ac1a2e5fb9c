"""Things to touch: pictures under a finger, and the main ideas of the book as explorers.

Written by hand, as beit_nb/__init__.py is; the modules of this package are exported from the
notebooks nbs/explorers_*.ipynb, and pad.js, controls.js and explorers.css, the part that runs in
the browser, are plain files beside them. Each explorer can be imported from here and is loaded when
it is first asked for, so that `import beit_nb.explorers` imports neither torch nor ipywidgets. It
only looks whether they are installed: here is the one place that every import of an explorer
passes.
"""

from importlib import import_module
from importlib.util import find_spec

for widgets in ("ipywidgets", "anywidget"):  # needed here and nowhere else in beit_nb
    if find_spec(widgets) is None:
        raise ImportError(
            f'the explorers need {widgets}: pip install -e ".[lab]" in the folder of the '
            "repository (or: pip install ipywidgets anywidget)"
        )

HOMES = {
    "pad": "PatchPad",
    "controls": "Slider Menu Field Upload Picture Guide CodeLine",
    "shell": "Explorer FunctionExplorer DebouncedCallback PictureMenu Act WrongSetting",
    "mask_rules": "MaskRule",
    "masks": "MaskExplorer",
    "cuts": "Cut vit_cost",
    "patches": "PatchExplorer",
    "gap": "GapExplorer",
    "temperature": "TemperatureExplorer",
    "alphabet": "AlphabetExplorer",
    "tokens": "ready_tokenizer some_digits digits_by_name Tiles",
    "attention": "AttentionExplorer ready_mim",
    "courses": "Course course_of",
    "recipes": "ScheduleExplorer",
    "predictor": "MimPredictor mim_predictor",
    "workbench": "Workbench",
    "guess": "GuessExplorer",
    "spelling": "TokenExplorer",
}
_HOME_OF = {name: module for module, names in HOMES.items() for name in names.split()}


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module 'beit_nb.explorers' has no attribute {name!r}")
    return getattr(import_module(f"beit_nb.explorers.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
