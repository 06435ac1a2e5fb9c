"""Small things that the tests of several modules use."""

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import tifffile
from matplotlib.figure import Figure
from PIL import Image

from beit_nb.cli import main


def save_gray(file: Path, value: int, size=(24, 20)) -> Path:
    "A picture of one gray at `file`, with the folders on the way to it."
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(file)
    return file


def beit(*words, ok=0):
    """What `beit WORDS` prints; its exit status must be `ok`.

    In this process: starting Python and torch anew for each takes longer than the work.
    """
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(list(map(str, words)))
        except SystemExit as e:
            status = e.code
    command = f"beit {' '.join(map(str, words))}"
    assert status == ok, f"{command}: {status}\n{out.getvalue()}\n{err.getvalue()}"
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def refused(*words, says):
    "The one line with which `beit WORDS` is refused, status 2; `says`: words that stand in it."
    said = beit(*words, ok=2).stderr
    lines = said.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("beit: error: "), said
    for word in [says] if isinstance(says, str) else says:
        assert word in lines[0], f"{word!r} not in {lines[0]!r}"
    return lines[0]


def save_a_pixel(figure, file, **options):
    "In the place of `Figure.savefig`."
    Image.new("RGB", (1, 1)).save(file, format="png")


def unpainted():
    """Within this, figures are drawn up, but saved as one pixel each.

    To lay out and paint the figures of its page takes longer than a training of four steps.
    """
    return mock.patch.object(Figure, "savefig", save_a_pixel)


FETCHES = ("http:", "https:", "<script", "<link", 'src="/')  # what a page must not hold


FEW_STEPS = "--precision fp32 --steps 4 --log-every 2 --checkpoint-every 2".split()
SMALL_BODY = "--embed-dim 48 --num-heads 3 --batch-size 16".split()


def few_steps_of_each(top: Path) -> Path:
    "A folder with a tokenizer, a pre-training and a fine-tuning of four steps: tok, pre, fine."
    from_tokens = [*SMALL_BODY, "--tokenizer", top / "tok", "--watch-every", 2]
    from_body = [*SMALL_BODY, "--init", top / "pre", "--eval-every", 2]
    with unpainted():
        beit("tokenizer", "nano", *FEW_STEPS, "--width", 16, "--out", top / "tok")
        beit("pretrain", "nano", *FEW_STEPS, *from_tokens, "--out", top / "pre")
        beit("finetune", "nano", *FEW_STEPS, *from_body, "--out", top / "fine")
    return top


def mixed_photos(top: Path) -> Path:
    "A labelled folder of little pictures of all kinds: gray, RGBA, CMYK, nested, one damaged."
    rng = np.random.default_rng(0)
    modes = ["RGB", "L", "RGBA", "CMYK"]
    endings = ["jpg", "png", "png", "jpg"]
    for split, n in (("train", 8), ("val", 4)):
        for name in ("cat", "dog"):
            folder = top / split / name / "deep"
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 255, (40 + 3 * i, 50, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).convert(modes[i % 4])
                image.save(folder / f"{i}.{endings[i % 4]}")
    (top / "train" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8 this is no picture")
    return top


def red_and_blue(root: Path) -> Path:
    "Two classes of eight wide pictures, red and blue, in train/ and val/ of `root`."
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for color, channel in (("blue", 2), ("red", 0)):
            (root / split / color).mkdir(parents=True)
            for i in range(8):
                x = rng.integers(0, 60, (20, 30, 3), dtype=np.uint8)
                x[..., channel] += 150
                Image.fromarray(x).save(root / split / color / f"{i}.png")
    return root


def lay_out_bands(root: Path, each=6) -> Path:
    """root/{train,val}/<class>/: fields in five bands; only the last one tells them apart.

    Half of them are .npy of floats, (5, H, W), half TIFFs of 16 bits, (H, W, 5).
    """
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, infrared in (("water", 0.0), ("wheat", 0.7)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                field = rng.random((5, 40, 36)) * 0.3
                field[4] += infrared
                if i % 2:
                    np.save(folder / f"{i}.npy", field.astype(np.float32))
                else:
                    levels = (field * 65535).astype(np.uint16).transpose(1, 2, 0)
                    tifffile.imwrite(folder / f"{i}.tif", levels)
    return root
