"""JupyterLab for this repository.

It opens on the map, with the whole repository at the left; it asks nothing and calls nobody. What
it saves of a lesson that was only read and run is the lesson as it was, so that `git pull` finds
nothing changed.
"""

from pathlib import Path

import nbformat

c = get_config()  # noqa: F821
c.LabApp.default_url = "/lab/tree/nbs/index.ipynb"
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
c.LabApp.extension_manager = "readonly"
# A photograph of a phone comes in one message, and the server's own limit is 10 MiB.
c.ServerApp.tornado_settings = {"websocket_max_message_size": 100 * 2**20}

# The metadata of a lesson. Once a reader has edited it, they hold what Lab adds: so they tell whose
# the outputs are.
LESSON = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
WIDGET = "application/vnd.jupyter.widget-view+json"


def sources(notebook):
    "What the author or the reader wrote."
    return [(cell["cell_type"], cell["source"]) for cell in notebook["cells"]]


def drop_dead_widgets(notebook):
    "A widget lives as long as its kernel: of what has a picture too, the picture is kept."
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data.pop(WIDGET, None)


def before_save(model, path, contents_manager, **_):
    """What goes into the file, changed in place.

    A lesson that somebody has only run stays what it was: its outputs come from the authors' run.
    Once a cell has been edited, all is the reader's own, outputs included; so are other notebooks.
    """
    notebook = model["content"]
    if model["type"] != "notebook" or notebook["nbformat"] != 4:
        return
    drop_dead_widgets(notebook)
    file = Path(contents_manager.root_dir, path.lstrip("/"))
    if file.exists():
        before = nbformat.read(file, as_version=4)
        if before["metadata"] == LESSON and sources(before) == sources(notebook):
            model["content"] = before


c.FileContentsManager.pre_save_hook = before_save
