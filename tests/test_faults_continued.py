"""Every command, killed at random moments and called again, ends as if nobody had killed it.

The same files, the same weights, the same figures; nothing half-written, and no process left.

BEIT_KILLS=50 pytest tests/test_faults_continued.py -s     # the long harness; prints what it did
"""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import beit, save_gray, unpainted
from helpers_demo import small_demo
from helpers_processes import PATIENCE, children_of, run, session_of, wait_until

from beit_nb.cli import main

torch.set_num_threads(1)
FORK = multiprocessing.get_context("fork")  # a process of its own, without importing torch again
FEW = "--precision fp32 --log-every 1 --checkpoint-every 3 --workers 1".split()
SMALL = "--embed-dim 32 --depth 2 --num-heads 2 --batch-size 16".split()
LINES = {
    "tokenizer": ["tokenizer", "nano", *FEW, *"--steps 12 --width 16 --batch-size 16".split()],
    "finetune": [
        *["finetune", "nano", *FEW, *SMALL],
        *"--steps 12 --mixup 0.8 --cutmix 1.0 --labels-per-class 4 --eval-every 4".split(),
    ],
    "tokenize": ["tokenize", "{pictures}", "--tokenizer", "{tokenizer}", *"--per-part 8".split()],
    "shard": ["shard", "{pictures}", "--per-shard", "5"],
    "probe": ["probe", "nano", "--init", "{body}", *"--labels-per-class 4 --draws 2".split()],
    "report": ["report"],
}
KILLS = int(os.environ.get("BEIT_KILLS", len(LINES)))  # one each
# what two runs of one command may differ in
CLOCKS = {
    "images_per_s",
    "seconds_left",
    "data_share",
    "memory_mb",
    "seconds",
    "peak_rss_mb",
    "peak_mb",
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    "What the commands work on: pictures, a tokenizer and a pre-trained body."
    top = tmp_path_factory.mktemp("ground")
    for i in range(60):
        save_gray(top / "pictures" / f"{i % 3}" / f"{i}.png", 4 * i, (32, 32))
    few = [*FEW, "--steps", "3"]
    from_tokens = ["--tokenizer", top / "tokenizer"]
    with unpainted():
        beit("tokenizer", "nano", *few, "--width", 16, "--out", top / "tokenizer")
        beit("pretrain", "nano", *few, *SMALL, *from_tokens, "--out", top / "body")
    return top


def words(name, ground, out):
    "The command of that name that writes into `out`."
    line = [word.format(**{p.name: p for p in ground.iterdir()}) for word in LINES[name]]
    return [*line, str(out)] if name == "report" else [*line, "--out", str(out)]


def life(work, said):
    "The body of a child: `work()` in a session of its own; what it says goes to a file."
    os.setsid()
    told = os.open(said, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for fd in (1, 2):
        os.dup2(told, fd)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    sys.exit(work())


def begin(work, said):
    process = FORK.Process(target=life, args=(work, said))
    process.start()
    return process


def command(name, ground, out):
    "The command of that name that writes into `out`, to be called without arguments."
    return partial(main, words(name, ground, out))


def end(process, said):
    "Wait until it has ended, well; how many seconds that took."
    began = time.monotonic()
    process.join(PATIENCE)
    assert process.exitcode == 0, said.read_text()
    return time.monotonic() - began


def without_clocks(x):
    "Plain data without what depends on the machine's haste."
    if isinstance(x, dict):
        return {k: without_clocks(v) for k, v in x.items() if k not in CLOCKS}
    return [without_clocks(v) for v in x] if isinstance(x, list) else x


def without_tensors(x):
    "Plain data with every tensor as a list of numbers."
    if isinstance(x, torch.Tensor):
        return x.tolist()
    if isinstance(x, dict):
        return {k: without_tensors(v) for k, v in x.items()}
    return [without_tensors(v) for v in x] if isinstance(x, list | tuple) else x


def content(file: Path, out: Path):
    "What a file says, in a form in which two runs can be compared."
    text = file.read_bytes().replace(str(out).encode(), b"OUT").replace(b"/killed/", b"/straight/")
    text = re.sub(rb"20\d\d-\d\d-\d\d \d\d:\d\d", b"now", text)  # at the foot of a page
    if file.suffix == ".pt":
        state = torch.load(file, weights_only=True)
        kept = ("model", "ema", "optimizer", "scaler", "step", "data")
        return {k: without_tensors(state[k]) for k in kept if k in state}
    if file.suffix == ".jsonl":
        return [without_clocks(json.loads(line)) for line in text.splitlines()]
    return without_clocks(json.loads(text)) if file.suffix == ".json" else text


def assert_same_folder(out, straight, but=()):
    "Two folders hold the same files with the same content, but for what tells of the clock."
    names = [
        sorted(str(f.relative_to(top)) for f in top.rglob("*") if f.is_file() and f.name != ".lock")
        for top in (out, straight)
    ]
    assert names[0] == names[1]
    for name in names[0]:
        same = content(out / name, out) == content(straight / name, straight)
        assert same or name.endswith(but), name


def kill(process, seconds):
    "SIGKILL to the command alone after so long; False if it was quicker. Nobody may be left."
    process.join(seconds)
    if process.exitcode is not None:
        return False
    process.kill()
    process.join(PATIENCE)
    wait_until(lambda: session_of(process.pid) == [], "its processes end", seconds=20)
    return process.exitcode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_killed_and_continued_is_never_killed(tmp_path, ground, name):
    straight = tmp_path / "straight" / "run"
    out = tmp_path / "killed" / "run"
    said = tmp_path / "said.txt"
    if name == "report":
        for copy in (straight, out):
            shutil.copytree(ground / "body", copy)
    seconds = end(begin(command(name, ground, straight), said), said)

    moments = []
    while len(moments) < max(1, KILLS // len(LINES)):
        moment = random.uniform(0, seconds)
        if kill(begin(command(name, ground, out), said), moment):
            moments.append(moment)
        elif name != "report":  # it was done: once more from the beginning
            shutil.rmtree(out)
    end(begin(command(name, ground, out), said), said)

    # the page of a training draws its speed, an index knows when its tar was written
    assert_same_folder(out, straight, (".index.npy", *([] if name == "report" else [".html"])))
    told = ", ".join(f"{moment:.2f}" for moment in moments)
    print(f"\n{name}: {len(moments)} kills after {told} of {seconds:.2f} s; the same")


def tuner_of(demo):
    """The number of a process that fine-tunes for a demo: what it says goes to its run's file.

    It is a child of the demo's fork server.
    """
    forks = [pid for child in children_of(demo.pid) for pid in children_of(child)]
    says_to = {pid: os.readlink(f"/proc/{pid}/fd/1") for pid in forks}
    return next(pid for pid, file in says_to.items() if Path(file).name.startswith("finetune-"))


def demo_in(out):
    "A small demo that names its folder as seen from beside it: its runs' names follow from that."
    out.parent.mkdir(exist_ok=True)
    os.chdir(out.parent)
    return small_demo(out.name)


def drop_what_a_kill_decides(runs):
    """Remove from a study's runs what they saved when it was killed, and their pages.

    Their last checkpoints and figures tell the rest. A run that was killed between its figures and
    its page is finished, and nobody draws its page again.
    """
    for checkpoints in runs.glob("*/checkpoints"):
        *stops, _ = sorted(checkpoints.glob("step-*.pt"))
        for stop in stops:
            stop.unlink()
    for page in runs.glob("*/report.html"):
        page.unlink()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_starts")
def test_a_killed_demo_is_a_demo(tmp_path):
    "All its stages, those in other processes too; what they leave behind ends with it."
    straight = tmp_path / "straight" / "run"
    out = tmp_path / "killed" / "run"
    said = tmp_path / "said.txt"
    seconds = end(begin(partial(demo_in, straight), said), said)

    moments = sorted(random.uniform(0.1, 0.9) for _ in range(max(2, KILLS // len(LINES))))
    for moment in moments:  # what is done stays done: later moments come further
        kill(begin(partial(demo_in, out), said), seconds * moment)
    end(begin(partial(demo_in, out), said), said)

    for demo in (out, straight):
        drop_what_a_kill_decides(demo / "finetune" / "runs")
    assert_same_folder(out, straight, (".html", ".txt"))  # what runs said: with their speeds
    print(f"\ndemo: {len(moments)} kills in a rehearsal of {seconds:.0f} s; the same")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.usefixtures("quick_starts")
def test_a_process_of_the_demo_dies(tmp_path, how):
    """One that fine-tunes is killed, and the others go on; or the demo is stopped meanwhile.

    One line, soon, and nobody left.
    """
    out = tmp_path / "run"
    said = tmp_path / "said.txt"
    demo = begin(partial(small_demo, out, finetune_steps=40), said)
    logs = out / "finetune" / "runs"
    wait_until(lambda: list(logs.glob("*/log.jsonl")), "a fine-tuning", demo.is_alive)

    os.kill(tuner_of(demo) if how == signal.SIGKILL else demo.pid, how)

    demo.join(PATIENCE if how == signal.SIGKILL else 20)
    assert demo.exitcode == (2 if how == signal.SIGKILL else 130)
    wait_until(lambda: session_of(demo.pid) == [], "its processes end", seconds=20)
    lines = said.read_text()
    assert "the same command continues" in lines and "Traceback" not in lines
    if how == signal.SIGKILL:
        assert re.search("error: finetune-.* failed: its process was killed by SIGKILL", lines)
    end(begin(partial(small_demo, out, finetune_steps=40), said), said)


EVERY_WALK = """
import json, multiprocessing, sys
from beit_nb.cli import main
if __name__ == "__main__":
    from helpers import unpainted
    multiprocessing.set_start_method(sys.argv[1])
    multiprocessing.set_forkserver_preload(["beit_nb.finetuning", "beit_nb.pretraining"])
    with unpainted():
        sys.exit(max(main(line) for line in json.loads(sys.argv[2])))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("quick_starts")
def test_workers_of_every_kind_load_the_same(tmp_path, ground):
    """All that walk a data set with workers, however these are started: same files, same weights.

    Each command once with workers that it must be packed for; what a spawned worker and one of a
    fork server get is the same, so they share the commands.
    """
    from_tokens = ["--tokenizer", str(ground / "tokenizer")]
    commands = {
        name: words(name, ground, "")[:-2] for name in ("tokenizer", "finetune", "tokenize")
    }
    commands["finetune"] += ["--steps", "3", "--eval-every", "3"]  # a walk starts its workers anew
    commands["tokenizer"] += ["--steps", "3"]
    commands["tokenize"] += ["--workers", "1"]
    commands["pretrain"] = ["pretrain", "nano", *FEW, *SMALL, "--steps", "3", *from_tokens]

    def lines(start, names):
        return [[*commands[name], "--out", str(tmp_path / start / name)] for name in names]

    said = tmp_path / "said.txt"
    with unpainted():  # pages are not compared
        for line in lines("fork", commands):
            end(begin(partial(main, line), said), said)
    program = tmp_path / "every_walk.py"
    program.write_text(EVERY_WALK)
    started = {"spawn": ["tokenize", "finetune"], "forkserver": ["tokenizer", "pretrain"]}
    for start, names in started.items():
        python_path = os.pathsep.join(
            [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        )
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
        run(sys.executable, program, start, json.dumps(lines(start, names)), env=env)

    for start, names in started.items():
        for name in names:
            assert_same_folder(tmp_path / start / name, tmp_path / "fork" / name, (".html",))
