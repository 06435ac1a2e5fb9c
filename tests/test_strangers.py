"""Files from strangers: whatever they say, the answer is one line, and nothing in them is run.

Runs of four steps are made once; then one thing in one of their files is changed, by hand for what
has been met, and by a seeded mutation for what has not.
"""

import copy
import json
import os
import random
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import beit, refused, save_gray, unpainted
from safetensors.torch import save_file

from beit_nb import BeitError
from beit_nb.classifier_files import load_classifier
from beit_nb.pretraining import load_mim
from beit_nb.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def runs(runs, tmp_path_factory):
    "tok, pre and fine of four steps, tokens of the pictures, and a picture."
    top = tmp_path_factory.mktemp("strangers") / "runs"
    shutil.copytree(runs, top)
    save_gray(top / "a.png", 90)
    for i in range(6):
        save_gray(top / "pics" / f"{i}.png", 40 * i)
    beit(
        "tokenize", top / "pics", "--tokenizer", top / "tok", "--out", top / "ids", "--per-part", 4
    )
    return top


@pytest.fixture
def copied(runs, tmp_path):
    "The same, to be spoilt."
    return Path(shutil.copytree(runs, tmp_path / "runs"))


@pytest.fixture
def one_copied(runs, tmp_path, run):
    "A copy of the run alone that a test names, beside the pictures."
    top = tmp_path / "runs"
    shutil.copytree(runs / run, top / run)
    for name in ("a.png", "pics"):
        (top / name).symlink_to(runs / name)
    return top


def commands(top, run):
    "What a person may do with a run of that name, or with its checkpoint."
    init = top / run / "checkpoints" / "last.pt"
    return {
        "predict": ("predict", "--init", init, "--images", top / "a.png"),
        "attention": ("attention", init, top / "a.png", "--out", top / "att"),
        "probe": ("probe", "nano", "--init", init, "--out", top / "probe"),
        "init": ("finetune", "nano", "--init", init, "--steps", 2, "--out", top / "again"),
        "tokenize": ("tokenize", top / "pics", "--tokenizer", init, "--out", top / "ids2"),
        "pretrain": ("pretrain", "nano", "--tokenizer", init, "--steps", 2, "--out", top / "pre2"),
    }


USES = [
    *(("fine", use) for use in ("predict", "attention", "probe", "init")),
    *(("pre", use) for use in ("attention", "probe", "init")),
    *(("tok", use) for use in ("tokenize", "pretrain")),
]
uses = pytest.mark.parametrize("run, use", USES)


def change(file, edit):
    "Save a checkpoint anew after `edit(state)`."
    state = torch.load(file, weights_only=True)
    torch.save(edit(state) or state, file)


def drop_model(state):
    del state["model"]


def drop_a_tensor(state):
    del state["model"][next(iter(state["model"]))]


def other_names(state):
    state["model"] = {f"other.{k}": v for k, v in state["model"].items()}


def other_shapes(state):
    state["model"] = {k: torch.ones(*v.shape, 2) for k, v in state["model"].items()}


def shapeless(state):
    state["model"] = {k: torch.tensor(1.0) for k in state["model"]}


def wider(state):
    state["config"]["embed_dim" if "embed_dim" in state["config"] else "width"] = 256


def enormous(state):
    "2^16 wide: four gigabytes a matrix, if anybody made room for it."
    state["config"]["embed_dim" if "embed_dim" in state["config"] else "width"] = 2**16


def endless(state):
    "A million blocks, or a code a hundred thousand wide."
    state["config"]["depth" if "depth" in state["config"] else "code_dim"] = 2**16


def nothing(state):
    state["model"] = {}


EDITS = [
    drop_model,
    drop_a_tensor,
    other_names,
    other_shapes,
    shapeless,
    wider,
    enormous,
    endless,
    nothing,
]


@pytest.mark.slow
@uses
@pytest.mark.parametrize("edit", EDITS, ids=[f.__name__ for f in EDITS])
def test_weights_that_do_not_fit(one_copied, run, use, edit):
    change(one_copied / run / "checkpoints" / "last.pt", edit)

    began = time.monotonic()
    line = refused(*commands(one_copied, run)[use], says="")

    assert len(line) < 700, "the names are grouped, not listed"
    assert time.monotonic() - began < 20


KINDS = ["timm", "official", "hf", "safetensors", "lfs", "page"]
TAKE_OTHERS = ("predict", "attention", "probe", "init")  # weights of the others are welcome there
STRANGE = [
    (run, use, kind)
    for run, use in USES
    for kind in KINDS
    if use not in TAKE_OTHERS or kind in ("lfs", "page")
]


@pytest.mark.parametrize("run, use, kind", STRANGE)
def test_files_of_others_are_called_by_name(one_copied, run, use, kind):
    file = one_copied / run / "checkpoints" / "last.pt"
    weights = torch.load(file, weights_only=True)["model"]
    vit = {"blocks.0.attn.qkv.weight": torch.ones(3, 1), "cls_token": torch.ones(1)}
    if kind == "timm":
        torch.save(vit, file)
    if kind == "official":
        torch.save({"model": vit}, file)
    if kind == "hf":
        torch.save({"beit.encoder.layer.0.attention.attention.key.weight": torch.ones(1)}, file)
    if kind == "safetensors":
        save_file({k: v.contiguous() for k, v in weights.items()}, file)
    if kind == "lfs":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    if kind == "page":
        file.write_text("<!doctype html><title>Sign in</title>")

    line = refused(*commands(one_copied, run)[use], says=str(file))

    assert "delete" not in line and "damaged" not in line
    words = {
        "timm": "timm",
        "official": "official BEiT code",
        "hf": "Hugging Face",
        "lfs": "git lfs pull",
        "page": "a page of a web site",
    }
    assert words.get(kind, "not a beit_nb checkpoint") in line


def test_loaders_name_the_file_and_group_the_names(copied):
    for load, run in ((load_mim, "pre"), (load_classifier, "fine"), (load_tokenizer, "tok")):
        file = copied / run / "checkpoints" / "last.pt"
        change(file, drop_a_tensor)
        with pytest.raises(BeitError, match=r"last.pt do not fit \(missing: \w"):
            load(file)
        change(file, other_names)
        with pytest.raises(BeitError, match="missing: .* and [0-9]+ more; unknown here: other"):
            load(file)


@pytest.mark.slow
def test_a_run_whose_parts_are_others_does_not_go_on(copied):
    "The optimizer, its moments, the random state, the step: one line, and the files stay."
    out = copied / "pre"
    files = [*(out / "checkpoints").glob("*.pt")]
    sound = {file: file.read_bytes() for file in files}

    def later(state):
        state["step"] = 10**9

    def no_moments(state):
        del state["optimizer"]

    def other_moments(state):
        state["optimizer"]["state"][0]["exp_avg"] = torch.ones(3)

    def strange_moments(state):
        state["optimizer"]["state"] = {"a": 3}

    def moment_of_nobody(state):
        state["optimizer"]["state"][10**6] = state["optimizer"]["state"][0]

    def no_chance(state):
        state["random"] = torch.ones(3)

    for edit in (later, no_moments, other_moments, strange_moments, moment_of_nobody, no_chance):
        for file in {f.stat().st_ino: f for f in files}.values():
            change(file, edit)
        command = ["pretrain", "nano", "--tokenizer", copied / "tok", "--out", out]
        refused(*command, *"--precision fp32 --steps 6 --log-every 2".split(), says=str(out))
        for file, data in sound.items():
            file.write_bytes(data)


BAD = "\"><script>steal()</script><img src=x onerror=steal()>'&"


def payload(x):
    "The same JSON with every text and key carrying a script, and numbers as they are."
    if isinstance(x, dict):
        return {f"{k}": payload(v) for k, v in x.items()} | {BAD: BAD}
    if isinstance(x, list):
        return [payload(v) for v in x] + [BAD]
    return BAD if isinstance(x, str) else x


def no_script(page):
    html = page.read_text("utf-8", "surrogateescape")
    assert "<script" not in html and "<img src=x" not in html and "onerror=steal()>" not in html
    assert html.index("Content-Security-Policy") < html.index("<title>")
    return html


@pytest.mark.slow
@pytest.mark.parametrize("run", ["tok", "pre", "fine"])
@pytest.mark.parametrize("where", ["config", "values", "metrics", "log", "failure", "name", "all"])
def test_no_script_of_a_stranger_enters_a_page(one_copied, run, where):
    out = one_copied / run
    config = json.loads((out / "config.json").read_text())
    if where in ("config", "all"):
        (out / "config.json").write_text(json.dumps(config | {BAD: BAD, "data": BAD, "init": BAD}))
    if where == "values":  # of another type as well: refused, or shown as text
        (out / "config.json").write_text(json.dumps({k: BAD for k in config}))
    if where in ("metrics", "all"):
        metrics = json.loads((out / "metrics.json").read_text())
        changed = payload(metrics) | {"finished": BAD, "arm": {"mean": BAD, "std": BAD, BAD: BAD}}
        (out / "metrics.json").write_text(json.dumps(changed))
    if where in ("log", "all"):
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        rows = [payload(row) for row in rows] + [{"step": 4, "loss": BAD, "passed_over": [BAD]}]
        (out / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if where in ("failure", "all"):
        record = {"step": BAD, "loss": BAD, "grad_norm": [BAD], "samples": [BAD]}
        (out / f"nonfinite-step-{BAD.replace('/', '')}.json").write_text(json.dumps(record))
        (out / "metrics.json").unlink()  # failures are shown of runs that have not ended
    if where == "name":
        out = out.rename(one_copied / BAD.replace("/", ""))
    (out / "report.html").unlink(missing_ok=True)

    if where == "values":
        refused("report", out, says=str(out))
        assert not (out / "report.html").exists()
        return
    with nullcontext() if where == "all" else unpainted():
        beit("report", out)

    html = no_script(out / "report.html")
    assert "&lt;script&gt;" in html or where == "log"


# -- what nobody has thought of: one thing of a file is changed, at random --

STRANGE = [
    *(None, True, -5, 0, 2**31, 10**12, 10**30, 10**400, 0.5, -1e300, float("nan"), float("inf")),
    *("", "3", "\ud800", "\x1b[31m", BAD, "a" * 10**4, [], {}, [[[]]], [1, 2], {"a": {"b": []}}),
]


def places(x, path=()):
    "The paths to all values in nested dicts and lists."
    if path:
        yield path
    if isinstance(x, (dict, list)) and len(x) < 10**4:
        for key in x if isinstance(x, dict) else range(len(x)):
            yield from places(x[key], (*path, key))


def mutate(x, rng):
    "A copy with one value changed, taken away, renamed or doubled."
    x = copy.deepcopy(x)
    *way, last = rng.choice(list(places(x)))
    parent = x
    for key in way:
        parent = parent[key]
    how = rng.choice(["other", "other", "other", "gone", "tensor"])
    if how == "gone":
        del parent[last]
    elif how == "tensor" and isinstance(parent[last], torch.Tensor):
        shapes = [(), (0,), (3,), (1, 1, 1), parent[last].shape]
        dtypes = [torch.int64, torch.float16, torch.bool, torch.float64]
        parent[last] = torch.zeros(rng.choice(shapes), dtype=rng.choice(dtypes))
    else:
        parent[last] = rng.choice(STRANGE)
    return x


def answered(*words):
    "A command on a changed file: answered, or refused in one line; never a traceback."
    try:
        beit(*words)
    except AssertionError as e:
        status, _, said = str(e).partition(": ")[2].partition("\n")
        assert status.split(": ")[-1].strip() == "2", f"{words}: {e}"
        errors = [line for line in said.splitlines() if line.startswith("beit: error: ")]
        assert len(errors) == 1 and "Traceback" not in said, f"{words}: {e}"
        return False
    return True


def fuzz_json(file, rng):
    data = json.loads(file.read_text())
    file.write_text(json.dumps(mutate(data, rng)))


def fuzz_log(file, rng):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("\n".join(map(json.dumps, mutate(rows, rng))))


def fuzz_state(file, rng):
    torch.save(mutate(torch.load(file, weights_only=True), rng), file)


def fuzz_part(file, rng):
    with np.load(file) as part:
        arrays = {name: part[name] for name in part.files}
    name = rng.choice(list(arrays))
    ids = arrays[name]
    arrays[name] = rng.choice(
        [
            ids.astype(np.int64) - 70000,
            np.full_like(ids, 2**16 - 1 if ids.dtype == np.uint16 else 10**9),
            ids.astype(np.float32),
            ids.astype(object),
            ids[..., None],
            ids[:1],
            np.zeros((), ids.dtype),
            np.array(["a"]),
            np.arange(10**5),
            np.array([-1, 10**12]),
            np.ones(3, bool),
        ]
    )
    if rng.random() < 0.2:
        del arrays[name]
    np.savez_compressed(file, **arrays)


def fuzz_bytes(file, rng):
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 3, 30])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    file.write_bytes(data[: rng.choice([len(data), len(data), len(data) // 2])])


def on_tokens(top):
    plain = "--crop-scale None --color-jitter 0 --flip 0 --steps 2 --batch-size 2".split()
    return ["pretrain", "nano", "--data", top / "pics", "--tokens", top / "ids", *plain]


SEEDS = int(os.environ.get("BEIT_FUZZ", 6))  # changes of each kind of file; more with BEIT_FUZZ=100

FUZZED = {  # file, how it is changed, and who reads it
    "config": ("pre/config.json", fuzz_json, lambda top: ["report", top / "pre"]),
    "probe": ("fine/config.json", fuzz_json, lambda top: ["report", top / "fine"]),
    "metrics": ("fine/metrics.json", fuzz_json, lambda top: ["report", top / "fine"]),
    "log": ("fine/log.jsonl", fuzz_log, lambda top: ["report", top / "fine"]),
    "watch": ("pre/watch/0000004.pt", fuzz_state, lambda top: ["report", top / "pre"]),
    "mim": (
        "pre/checkpoints/last.pt",
        fuzz_state,
        lambda top: commands(top, "pre")["attention"],
    ),
    "classifier": (
        "fine/checkpoints/last.pt",
        fuzz_state,
        lambda top: commands(top, "fine")["predict"],
    ),
    "tokenizer": ("tok/checkpoints/last.pt", fuzz_state, lambda top: ["report", top / "tok"]),
    "tokens": (
        "ids/tokens.json",
        fuzz_json,
        lambda top: [*on_tokens(top), "--out", top / "pre3"],
    ),
    "part": (
        "ids/part-00000.npz",
        fuzz_part,
        lambda top: [*on_tokens(top), "--out", top / "pre3"],
    ),
    "bytes of a part": (
        "ids/part-00001.npz",
        fuzz_bytes,
        lambda top: [*on_tokens(top), "--out", top / "pre3"],
    ),
    "bytes": ("fine/checkpoints/last.pt", fuzz_bytes, lambda top: commands(top, "fine")["predict"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FUZZED)
def test_a_file_with_one_thing_changed(copied, kind):
    name, fuzz, command = FUZZED[kind]
    file = copied / name
    sound = file.read_bytes()
    drawn = kind in ("metrics", "log", "watch")  # what is changed comes into a figure
    with nullcontext() if drawn else unpainted():
        assert answered(*command(copied))
    for seed in range(SEEDS):
        for made in ("pre3", "again", "att"):
            shutil.rmtree(copied / made, ignore_errors=True)
        file.unlink()
        file.write_bytes(sound)
        fuzz(file, random.Random(seed))
        with nullcontext() if drawn else unpainted():
            answered(*command(copied))
