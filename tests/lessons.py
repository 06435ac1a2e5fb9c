"""Runs lessons from top to bottom.

    python tests/lessons.py nbs/02_elbo.ipynb ...   # run and save the outputs (what the web shows)
    python tests/lessons.py --slow nbs/...          # cells marked `#| slow` too
    python tests/lessons.py --tidy nbs/...          # run nothing, only make the saved outputs small

Cells marked `#| slow` are skipped unless asked for; the outputs that they have stay.
"""

import base64, io, sys, time
from pathlib import Path

import nbformat
from PIL import Image
from nbclient import NotebookClient
from nbdev.clean import clean_nb
from execnb.nbio import dict2nb, read_nb, write_nb

WIDGET = "application/vnd.jupyter.widget-view+json"


def flagged(cell, flag):
    return any(l.replace(" ", "").startswith(f"#|{flag}") for l in cell.source.splitlines())


def run(path, slow=False, timeout=600):
    "The notebook at `path` with fresh outputs; an error in a cell is raised as it stands."
    nb = nbformat.read(path, as_version=4)
    full = [c for c in nb.cells if c.cell_type == "code"]
    skipped = {c.id: c.copy() for c in full if flagged(c, "slow") and not slow}
    for c in full:
        if c.id in skipped:
            c.source = "pass"
    client = NotebookClient(
        nb,
        timeout=timeout,
        kernel_name="python3",
        store_widget_state=False,
        resources={"metadata": {"path": str(Path(path).parent)}},
    )
    client.execute()
    for c in nb.cells:
        if c.id in skipped:
            c.update(skipped[c.id])
    return nb


def small_png(data):
    """A PNG (base64) with a palette of 256 colours where that is smaller.

    A third of the size, and no eye tells.
    """
    im = Image.open(io.BytesIO(base64.b64decode(data)))
    out = io.BytesIO()
    if im.mode == "P":
        return data
    im.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return min(data, base64.b64encode(out.getvalue()).decode(), key=len)


def tidy(nb):
    """What a full run leaves behind that nobody reads.

    Widget views beside their pictures, progress on stderr, colours that nobody sees.
    """
    nb.metadata.pop("widgets", None)
    for c in nb.cells:
        for o in c.get("outputs", []):
            if "image/png" in o.get("data", {}):
                o["data"].pop(WIDGET, None)
                o["data"]["image/png"] = small_png(o["data"]["image/png"])
        if "outputs" in c:
            c.outputs = [o for o in c.outputs if o.get("name") != "stderr"]
    return nb


def save(path, slow=False, execute=True):
    nb = tidy(run(path, slow) if execute else nbformat.read(path, as_version=4))
    nb.metadata = nbformat.from_dict(
        {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    )
    nbformat.write(nb, path)
    # the same cleaning as `nbdev_clean`, so that git stays quiet
    clean = dict2nb(read_nb(path))
    clean_nb(clean, clear_all=False, clean_ids=True)
    write_nb(clean, path)


if __name__ == "__main__":
    for p in [a for a in sys.argv[1:] if not a.startswith("--")]:
        t = time.time()
        save(p, "--slow" in sys.argv, "--tidy" not in sys.argv)
        print(f"{p}: {time.time() - t:.0f} s, {Path(p).stat().st_size // 1024} KB")
