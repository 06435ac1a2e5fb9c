"""The command `beit`, as a person types it."""

import contextlib, io, json, os, pickle, resource, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from beit_nb.cli import main

ENV = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
TINY = "--precision fp32 --steps 4 --log-every 2 --checkpoint-every 2".split()


def beit(*words, ok=0):
    """What `beit WORDS` prints and its exit status, in this process.

    Starting Python and torch anew for each takes longer than the work.
    """
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(list(map(str, words)))
        except SystemExit as e:
            status = e.code
    assert status == ok, f"beit {' '.join(map(str, words))}\n{out.getvalue()}\n{err.getvalue()}"
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def refused(*words, says):
    "Exit status 2 and one line that says what is wrong."
    r = beit(*words, ok=2)
    lines = r.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("beit: error: "), r.stderr
    for word in says if isinstance(says, (list, tuple)) else [says]:
        assert word in lines[0], f"{word!r} not in {lines[0]!r}"
    return lines[0]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    "A tokenizer, a pre-training and a fine-tuning of a few steps each."
    top = tmp_path_factory.mktemp("runs")
    beit("tokenizer", "nano", *TINY, "--out", top / "tok")
    beit(
        "pretrain",
        "nano",
        *TINY,
        "--tokenizer",
        top / "tok",
        "--out",
        top / "pre",
        "--watch-every",
        2,
    )
    beit("finetune", "nano", *TINY, "--init", top / "pre", "--out", top / "fine", "--eval-every", 2)
    return top


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    "A labelled folder of little pictures of all kinds: grey, RGBA, CMYK, nested, one damaged."
    top = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, n in (("train", 8), ("val", 4)):
        for c in ("cat", "dog"):
            (folder := top / split / c / "deep").mkdir(parents=True)
            for i in range(n):
                im = Image.fromarray(
                    rng.integers(0, 255, (40 + 3 * i, 50, 3), dtype=np.uint8)
                ).convert(["RGB", "L", "RGBA", "CMYK"][i % 4])
                im.save(folder / f"{i}.{['jpg', 'png', 'png', 'jpg'][i % 4]}")
    (top / "train" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8 this is no picture")
    return top


def test_help_is_fast_and_needs_no_torch():
    for words in (["--help"], ["pretrain", "--help"], ["pretrain", "nano", "--help"]):
        code = f"import sys; sys.argv = ['beit', *{words}]\nimport beit_nb.cli as c\ntry: c.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # wall time says more about the neighbours
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert cpu < 0.5, f"{words}: {cpu:.2f} s of processor time"


def test_console_script_and_module():
    "The two ways to start it agree, and a refusal is one line with exit status 2 there too."
    for start in ([sys.executable, "-m", "beit_nb"], [str(Path(sys.executable).with_name("beit"))]):
        r = subprocess.run([*start, "pretrain", "huge"], capture_output=True, text=True)
        assert (
            r.returncode == 2
            and r.stdout == ""
            and r.stderr.startswith("beit: error: unknown pretrain recipe 'huge'")
            and r.stderr.count("\n") == 1
        )
        assert (
            "usage: beit"
            in subprocess.run([*start, "--help"], capture_output=True, text=True, check=True).stdout
        )


def test_files_of_a_run(runs):
    for name, command in (("tok", "tokenizer"), ("pre", "pretrain"), ("fine", "finetune")):
        out = runs / name
        config = json.loads((out / "config.json").read_text())
        assert config["command"] == command and config["steps"] == 4
        rows = [json.loads(l) for l in (out / "log.jsonl").read_text().splitlines()]
        assert [r["step"] for r in rows if "loss" in r] == [2, 4] and all(
            np.isfinite(r["loss"]) for r in rows if "loss" in r
        )
        state = torch.load(out / "checkpoints" / "last.pt", weights_only=True)
        assert {"model", "optimizer", "step", "epoch", "scaler", "random", "data", "config"} <= set(
            state
        ) and state["config"] == config
        assert json.loads((out / "metrics.json").read_text())
        html = (out / "report.html").read_text()
        assert html.count("<img") >= 1 and "http://" not in html and "https://" not in html


def test_finished_run_is_left_alone(runs):
    before = (runs / "fine" / "checkpoints" / "last.pt").stat().st_mtime_ns
    beit(
        "finetune", "nano", *TINY, "--init", runs / "pre", "--out", runs / "fine", "--eval-every", 2
    )
    assert (runs / "fine" / "checkpoints" / "last.pt").stat().st_mtime_ns == before


def test_probe_predict_attention(runs, tmp_path):
    beit(
        "probe",
        "nano",
        "--init",
        runs / "pre",
        "--labels-per-class",
        2,
        "--draws",
        1,
        "--out",
        tmp_path / "probe",
    )
    m = json.loads((tmp_path / "probe" / "metrics.json").read_text())
    assert {"pretrained", "random", "pixels"} <= set(m) and len(m["pretrained"]["layers"]) == 4
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save(tmp_path / "white.png")
    line = beit(
        "predict", "--init", runs / "fine", "--images", tmp_path / "white.png", "--top", 10
    ).stdout
    p = [float(w.rstrip(",")) for w in line.split()[2::2]]
    assert len(p) == 10 and abs(sum(p) - 1) < 0.01 and p == sorted(p, reverse=True)
    beit(
        "attention",
        "--init",
        runs / "pre",
        "--images",
        tmp_path / "white.png",
        "--out",
        tmp_path / "att",
    )
    assert Image.open(tmp_path / "att" / "white.png").size[0] > 200


def test_folder_of_pictures(photos, tmp_path):
    beit(
        "tokenizer", "photos", *TINY, "--data", photos, "--batch-size", 4, "--out", tmp_path / "tok"
    )
    beit(
        "pretrain",
        "cifar",
        *TINY,
        "--data",
        photos,
        "--tokenizer",
        tmp_path / "tok",
        "--batch-size",
        4,
        "--depth",
        1,
        "--img-size",
        32,
        "--patch-size",
        4,
        "--token-size",
        64,
        "--vocab-size",
        512,
        "--out",
        tmp_path / "pre",
    )
    beit(
        "finetune",
        "cifar",
        *TINY,
        "--data",
        photos,
        "--init",
        tmp_path / "pre",
        "--batch-size",
        4,
        "--depth",
        1,
        "--out",
        tmp_path / "fine",
    )
    assert (
        "dog"
        in beit(
            "predict",
            "--init",
            tmp_path / "fine",
            "--images",
            photos / "val" / "dog" / "deep" / "0.jpg",
        ).stdout
    )


def test_damaged_pictures_are_counted(photos, tmp_path):
    words = ["tokenizer", "photos", *TINY, "--data", photos, "--batch-size", 16, "--out"]
    r = beit(*words, tmp_path / "a")
    assert "broken.jpg" in r.stderr  # named, and the run went on
    r = beit(*words, tmp_path / "b", "--max-damaged", 0, ok=2)
    assert r.stderr.strip().splitlines()[-1].startswith("beit: error: more than max_damaged=0")


def test_a_substitutes_tokens_are_never_learnt(runs, photos, tmp_path):
    """A picture that could not be read when the tokens were made is passed over later, repaired or
    not; `beit tokenize` again mends it.
    """
    shutil.copytree(photos, tmp_path / "p")
    made = [
        "tokenize",
        tmp_path / "p",
        "--tokenizer",
        runs / "tok",
        "--out",
        tmp_path / "tokens",
        "--max-damaged",
        0.5,
    ]
    words = [
        "pretrain",
        "nano",
        "--precision",
        "fp32",
        "--steps",
        3,
        "--batch-size",
        8,
        "--data",
        tmp_path / "p",
        "--tokenizer",
        runs / "tok",
        "--tokens",
        tmp_path / "tokens",
        "--out",
    ]
    assert "1 unreadable" in beit(*made).stdout
    Image.new("RGB", (40, 40), "red").save(tmp_path / "p" / "train" / "cat" / "broken.jpg")
    r = beit(*words, tmp_path / "a")
    assert (
        "broken.jpg when its tokens were made" in r.stderr
        and json.loads((tmp_path / "a" / "metrics.json").read_text())["damaged"] == 1
    )
    assert "unreadable" not in beit(*made).stdout
    assert (
        "broken" not in beit(*words, tmp_path / "b").stderr
        and json.loads((tmp_path / "b" / "metrics.json").read_text())["damaged"] == 0
    )


def test_tokenize_and_train_on_the_tokens(runs, tmp_path):
    """Tokens from disk give the very training that the tokenizer gives.

    Tokens of something else are refused.
    """
    said = beit(
        "tokenize", "digits", "--tokenizer", runs / "tok", "--out", tmp_path / "tokens"
    ).stdout
    assert (
        "14,400 pictures, 8 x 8 tokens" in said
        and len(list((tmp_path / "tokens").glob("part-*.npz"))) == 4
    )
    beit(
        "pretrain",
        "nano",
        *TINY,
        "--tokenizer",
        runs / "tok",
        "--tokens",
        tmp_path / "tokens",
        "--out",
        tmp_path / "pre",
        "--watch-every",
        2,
    )
    a, b = (
        torch.load(p / "checkpoints" / "last.pt", weights_only=True)["model"]
        for p in (runs / "pre", tmp_path / "pre")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)
    refused(
        "pretrain",
        "nano",
        *TINY,
        "--tokenizer",
        runs / "tok",
        "--tokens",
        tmp_path / "none",
        "--out",
        tmp_path / "x",
        says=["there are no tokens", "beit tokenize"],
    )
    refused(
        "pretrain",
        "nano",
        *TINY,
        "--tokenizer",
        runs / "tok",
        "--tokens",
        tmp_path / "tokens",
        "--flip",
        0.5,
        "--out",
        tmp_path / "y",
        says="tokens",
    )
    refused(
        "tokenize", "digits", "--tokenizer", tmp_path, "--out", tmp_path / "z", says="no checkpoint"
    )


def test_shards_train_like_the_folder(photos, tmp_path):
    said = beit("shard", photos, "--out", tmp_path / "shards", "--per-shard", 5).stdout
    assert "24 pictures" in said or "damaged" in said
    assert len(list((tmp_path / "shards" / "train").glob("*.tar"))) >= 3
    beit(
        "tokenizer",
        "photos",
        *TINY,
        "--data",
        tmp_path / "shards",
        "--batch-size",
        4,
        "--out",
        tmp_path / "tok",
    )
    refused("shard", tmp_path / "nowhere", "--out", tmp_path / "s", says="nowhere")


def test_plan():
    said = beit("plan", "base-in1k", "--gpus", 16, "--hardware", "v100").stdout
    assert "500,000 steps" in said and "92,089,856" in said and "160.1 GFLOP" in said
    refused("plan", "huge", says=["huge", "base-in1k"])
    refused("plan", "nano", "--gpus", 0, says="gpus")
    assert (
        "311,674,880" in beit("plan", "large-in1k").stdout
        and "GPU" in beit("plan", "base-in1k", "--command", "finetune").stdout
    )


def test_bad_words(runs, tmp_path):
    refused("pretrian", says=["pretrian", "pretrain"])
    refused("pretrain", "huge", says=["huge", "nano", "base-in1k"])
    assert "--lrr" in beit("pretrain", "nano", "--lrr", 1, ok=2).stderr
    assert "lr" in beit("pretrain", "nano", "--lr", "fast", ok=2).stderr
    refused("pretrain", "nano", "--out", tmp_path / "x", says="--tokenizer")
    refused(
        "pretrain",
        "nano",
        "--tokenizer",
        runs / "tok",
        "--img-size",
        30,
        "--out",
        tmp_path / "x",
        says=["30", "patch_size 4"],
    )
    refused(
        "pretrain",
        "nano",
        "--tokenizer",
        runs / "tok",
        "--num-mask-patches",
        65,
        "--out",
        tmp_path / "x",
        says=["65", "64"],
    )
    refused(
        "pretrain",
        "nano",
        "--tokenizer",
        runs / "tok",
        "--num-mask-patches",
        1,
        "--out",
        tmp_path / "x",
        says=["num_mask_patches 1", "no block fits"],
    )
    refused(
        "pretrain",
        "nano",
        "--tokenizer",
        runs / "tok",
        "--token-size",
        64,
        "--out",
        tmp_path / "x",
        says=["grids differ", "32"],
    )
    refused(
        "pretrain",
        "nano",
        "--tokenizer",
        runs / "tok",
        "--vocab-size",
        99,
        "--out",
        tmp_path / "x",
        says=["99", "256"],
    )
    refused(
        "pretrain",
        "nano",
        "--tokenizer",
        runs / "pre",
        "--out",
        tmp_path / "x",
        says=["beit pretrain", "beit tokenizer"],
    )
    refused(
        "finetune", "nano", "--init", runs / "tok", "--out", tmp_path / "x", says="beit tokenizer"
    )
    refused(
        "finetune",
        "nano",
        "--init",
        runs / "pre",
        "--embed-dim",
        64,
        "--out",
        tmp_path / "x",
        says=["embed_dim", "128", "64"],
    )


def test_bad_data(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no picture")
    words = ["tokenizer", "nano", *TINY, "--out", tmp_path / "x", "--data"]
    refused(*words, tmp_path / "nowhere", says=["nowhere", "digits"])
    refused(*words, tmp_path / "empty", says=["empty", "no pictures"])
    refused(*words, tmp_path / "text", says=["text", "no pictures"])
    refused(
        "finetune",
        "nano",
        *TINY,
        "--out",
        tmp_path / "x",
        "--data",
        tmp_path / "text",
        says=["train"],
    )


def test_bad_checkpoints(runs, tmp_path):
    whole = (runs / "tok" / "checkpoints" / "last.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "log.pt").write_text("--2021-06-15-- resolving host")

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'pwned'}",))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"config": {"command": "tokenizer"}, "model": Evil()}, tmp_path / "evil2.pt")
    for name in ("short.pt", "log.pt", "evil.pt", "evil2.pt", "missing.pt"):
        refused(
            "pretrain",
            "nano",
            *TINY,
            "--tokenizer",
            tmp_path / name,
            "--out",
            tmp_path / "x",
            says=name,
        )
    assert not (tmp_path / "pwned").exists(), "loading ran pickled code"


def test_other_run_in_the_folder(runs):
    refused(
        "tokenizer", "nano", *TINY, "--out", runs / "tok", "--lr", 0.1, says=["another run", "lr"]
    )
    refused("tokenizer", "nano", *TINY, "--out", runs / "tok", "--no-resume", says="--no-resume")


def test_demo_stops_and_continues(tmp_path):
    """Ctrl-C in the middle of the demo.

    The same command ends it, with every figure and a self-contained report.
    """
    words = [sys.executable, "-m", "beit_nb", "demo", "--quick", "--out", str(tmp_path / "demo")]
    p = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV
    )
    log = tmp_path / "demo" / "pretrain" / "log.jsonl"
    deadline = time.time() + 300
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert p.poll() is None and time.time() < deadline, p.stdout.read()
        time.sleep(0.2)
    p.send_signal(signal.SIGINT)
    said = p.communicate(timeout=60)[0]
    assert p.returncode == 130 and "saved; the same command continues" in said, said
    stopped = torch.load(
        tmp_path / "demo" / "pretrain" / "checkpoints" / "last.pt", weights_only=True
    )["step"]
    r = subprocess.run(words, capture_output=True, text=True, env=ENV, check=True)
    assert "== dvae ==" not in r.stdout and "== mim ==" in r.stdout
    steps = [json.loads(l)["step"] for l in log.read_text().splitlines()]
    assert steps == sorted(steps) and 0 < stopped < steps[-1]
    m = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert {"mse", "pixel_variance", "perplexity", "codes_used"} <= set(m["dvae"])
    assert {"masked_top1", "best_constant_top1", "images", "seconds"} <= set(m["mim"])
    assert {
        "labels_per_class",
        "steps",
        "pretrained",
        "scratch_equal_steps",
        "scratch_best",
    } <= set(m["finetune"])
    assert {"mean", "std", "runs", "steps", "lr"} <= set(m["finetune"]["scratch_best"])
    assert {"labels", "pretrained", "random", "pixels"} <= set(m["probe"]) and {
        "seconds",
        "peak_rss_mb",
    } <= set(m)
    html = (tmp_path / "demo" / "report.html").read_text()
    assert html.count("<img") >= 7 and "https://" not in html and "http://" not in html
