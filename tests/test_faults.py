"""Nothing lost: real processes of the real command, killed, stopped, starved and fed with nonsense.

BEIT_KILLS=100 pytest tests/test_faults.py -k survives -s     # the long harness; prints what it did
"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import unpainted
from helpers_processes import PATIENCE, children_of, session_of, torchrun_environment, wait_until
from helpers_runs import slowed_after, step_of

from beit_nb import BeitError, labelled_views, pretraining, targets
from beit_nb.cli import main
from beit_nb.configs import check_recipe
from beit_nb.engine.log import read_log, read_metrics
from beit_nb.engine.processes import rank, world_size
from beit_nb.engine.runs import load_checkpoint, open_run, run_checkpoints
from beit_nb.engine.sources import Digits, ImageDataset
from beit_nb.finetuning import finetune
from beit_nb.recipes import recipe_named
from beit_nb.scale.launching import run_distributed
from beit_nb.tokenizer import load_tokenizer, train_tokenizer

torch.set_num_threads(1)
KILLS = int(os.environ.get("BEIT_KILLS", 8))
FORK = multiprocessing.get_context("fork")  # a process of its own, without importing torch again
TOKENIZER = dict(steps=4, width=16, vocab_size=32, batch_size=16, precision="fp32")
SMALL = dict(
    vocab_size=32,
    embed_dim=32,
    depth=2,
    num_heads=2,
    drop_path_rate=0.2,
    batch_size=16,
    warmup_steps=5,
    precision="fp32",
    watch_every=1000,
    log_every=1,
    checkpoint_every=2,
)


def few(data=None):
    "Eight batches of digits."
    return ImageDataset(128, Digits("train").images[:128].__getitem__, name="digits")


def words(out, **changes):
    "The command that makes a small run."
    options = SMALL | {"tokenizer": "in-memory"} | changes
    line = ["pretrain", "nano", "--out", str(out)]
    for name, value in options.items():
        line.append(f"--{name.replace('_', '-')}")
        if value is not True:
            line.append(str(value))
    return line


@pytest.fixture(scope="module", autouse=True)
def tokenizer(tmp_path_factory):
    "Pictures and a tokenizer, in memory before anything forks: a life then begins in a moment."
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(recipe_named("tokenizer", "nano", out=str(folder), **TOKENIZER), quiet=True)
    pictures = few()
    in_memory = load_tokenizer(folder)
    with pytest.MonkeyPatch.context() as patch, unpainted():
        patch.setattr(pretraining, "open_data", lambda data: pictures)
        patch.setattr(targets, "load_tokenizer", lambda path: in_memory)
        yield folder


def life(out, changes, env, before):
    "The body of a child: `beit pretrain nano ...`; what it says goes to OUT.txt."
    os.setsid()
    os.environ.update(env)
    said = os.open(f"{out}.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for fd in (1, 2):
        os.dup2(said, fd)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    if before:
        before()
    sys.exit(main(words(out, **changes)))


def born(out, n=1, before=None, **changes):
    "n processes that pre-train together, started as torchrun would."
    environments = torchrun_environment(n) if n > 1 else [{}]
    family = [FORK.Process(target=life, args=(out, changes, e, before)) for e in environments]
    for process in family:
        process.start()
    return family


def ends(family, seconds=60):
    "Their exit statuses."
    for process in family:
        process.join(seconds)
    hangs = [process for process in family if process.is_alive()]
    for process in hangs:
        process.kill()
    assert not hangs, "a process hangs"
    return [process.exitcode for process in family]


def said(out):
    "What the command printed about errors, line by line."
    lines = Path(f"{out}.txt").read_text().splitlines()
    return [line for line in lines if line.startswith(("beit:", "Traceback"))]


def only_line(out):
    lines = said(out)
    assert len(lines) == 1, Path(f"{out}.txt").read_text()
    return lines[0]


def wait_for(condition, what, family):
    "Wait until it holds, while all processes live."
    wait_until(condition, what, lambda: all(process.is_alive() for process in family), pause=0.005)


def moments(state):
    return [v for of_one in state["optimizer"]["state"].values() for v in of_one.values()]


def assert_same(out, straight):
    "Two runs ended with the same weights and the same optimizer, bit for bit."
    a = load_checkpoint(out)
    b = load_checkpoint(straight)
    assert a["step"] == b["step"]
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in b["model"])
    assert all(map(torch.equal, moments(a), moments(b)))


def assert_every_step_once(out, steps):
    assert [row["step"] for row in read_log(out)] == list(range(1, steps + 1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "24 steps that nobody disturbed."
    out = tmp_path_factory.mktemp("whole") / "run"
    assert ends(born(out, steps=24)) == [0]
    return out


def slow_renames():
    "A save takes a tenth of a second longer, between the last byte and the new name."
    replace = os.replace

    def slowly(*paths):
        time.sleep(0.1)
        return replace(*paths)

    os.replace = slowly


def kinds_of_stop(n):
    "Each kind in turn, in an order that is drawn."
    kinds = ["kill", "kill while saving", "term", "int"]
    random.shuffle(kinds)
    return list(islice(cycle(kinds), n))


def stop_once(out, kind, **changes):
    "One life of a run, ended in this way at a random moment; says how it ended."
    after = step_of(out) + random.randint(1, 5)
    slow_steps = slowed_after(after + 4)

    def before():
        slow_steps()
        if kind == "kill while saving":
            slow_renames()

    family = born(out, before=before, **changes)

    def half_written():
        return any(out.glob("checkpoints/last.pt.*.part"))

    wait_for(lambda: step_of(out) >= after, f"step {after}", family)
    if kind == "kill while saving":
        wait_for(half_written, "a save", family)
    else:
        time.sleep(random.uniform(0, 0.03))
    asked = time.time()
    if kind == "term":  # as a terminal or a batch system does: the loaders too
        os.killpg(family[0].pid, signal.SIGTERM)
    elif kind == "int":
        os.killpg(family[0].pid, signal.SIGINT)
    else:
        os.kill(family[0].pid, signal.SIGKILL)
    [status] = ends(family, 30)
    assert half_written() or kind != "kill while saving"
    return status, asked


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_survives_any_kill(tmp_path, workers):
    """SIGKILL, SIGKILL in the middle of a save, SIGTERM, SIGINT at random moments.

    The run ends as one that was never stopped.
    """
    kinds = kinds_of_stop((KILLS + 1 - workers // 2) // 2)
    steps = 20 + 20 * len(kinds)
    out = tmp_path / "run"
    straight = tmp_path / "straight"
    assert ends(born(straight, steps=steps, checkpoint_every=100), 60 + steps) == [0]

    for kind in kinds:
        status, asked = stop_once(out, kind, steps=steps, workers=workers)
        polite = kind in ("term", "int")
        assert status == (130 if polite else -signal.SIGKILL), (kind, said(out))
        saved = run_checkpoints(out)[0].stat().st_mtime if polite else asked
        assert saved - asked < 5, "a stop saves within seconds"
    assert ends(born(out, steps=steps, workers=workers), 60 + steps) == [0], said(out)

    assert_same(out, straight)
    assert_every_step_once(out, steps)
    assert not list(tmp_path.rglob("*.part")), "nothing half-written stays"
    print(
        f"\n{len(kinds)} stops of a run of {steps} steps with {workers} workers: "
        f"{dict(Counter(kinds))}; bit-equal"
    )


RUN_AS_SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_faults import few, main, pretraining, slowed_after, words

pretraining.open_data = few
slowed_after(8, 0.05)()
sys.exit(main(words({out!r}, steps=24, tokenizer={tokenizer!r})))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("quick_starts")
def test_a_killed_worker_comes_back(tmp_path, tokenizer):
    """torchrun, two processes, one is killed.

    --max-restarts brings the run back without hand work, and it ends bit-equal.
    """
    out = tmp_path / "run"
    straight = tmp_path / "straight"
    assert ends(born(straight, n=2, steps=24)) == [0, 0]
    script = tmp_path / "run.py"
    tests = str(Path(__file__).parent)
    script.write_text(RUN_AS_SCRIPT.format(tests=tests, out=str(out), tokenizer=str(tokenizer)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.Popen(
        [*torchrun, "--nproc-per-node=2", "--max-restarts=1", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    wait_until(lambda: step_of(out) >= 9, "step 9", lambda: run.poll() is None)

    os.kill(random.choice(children_of(run.pid)), signal.SIGKILL)
    text = run.communicate(timeout=PATIENCE)[0]

    assert run.returncode == 0 and "exitcode: -9" in text, text
    assert_same(out, straight)
    assert_every_step_once(out, 24)


@pytest.mark.slow
def test_one_refusal_stops_all(tmp_path):
    "A second run in one folder, a batch that two processes cannot share, a hopeless recipe."
    busy = tmp_path / "busy"
    with open_run("pretrain", recipe_named("pretrain", "nano", out=str(busy))):
        statuses = ends(born(busy, n=2, steps=4), 20)
    assert statuses == [2, 2]
    lines = [line.split(";")[0] for line in said(busy)]
    assert lines == [f"beit: error: another run is at work in {busy}"]

    cases = {
        "odd": (15, "batch_size 15 is not divisible by 2 processes"),
        "bad": (0, "--batch-size 0 must be at least 1"),
    }
    for name, (batch_size, words_of_refusal) in cases.items():
        out = tmp_path / name
        assert ends(born(out, n=2, steps=4, batch_size=batch_size), 20) == [2, 2]
        line = only_line(out)
        assert line.startswith(f"beit: error: {words_of_refusal}")
    assert not (tmp_path / "bad").exists()
    assert not (tmp_path / "odd" / "config.json").exists(), "a corrected try may use the folder"


@pytest.mark.slow
def test_a_stop_is_agreed_upon(tmp_path):
    "Only the second process is asked to stop; both save the same step, and one speaks."
    out = tmp_path / "run"
    family = born(out, n=2, before=slowed_after(8), steps=24)
    wait_for(lambda: step_of(out) >= 5, "step 5", family)

    os.kill(family[1].pid, signal.SIGTERM)

    assert ends(family) == [130, 130]
    step = load_checkpoint(out)["step"]
    line = f"beit: stopped after step {step} of 24 and saved; the same command continues"
    assert said(out) == [line] and 5 <= step < 24
    assert ends(born(out, n=2, steps=24)) == [0, 0]


@pytest.mark.slow
def test_a_process_whose_neighbor_died_stops(tmp_path):
    "It does not hang, and says how to go on."
    out = tmp_path / "run"
    family = born(out, n=2, before=slowed_after(8), steps=24)
    wait_for(lambda: step_of(out) >= 5, "step 5", family)

    family[1].kill()

    assert ends(family) == [2, -signal.SIGKILL]
    assert "another process of this run ended; the same command continues" in said(out)[-1]


@pytest.mark.slow
def test_other_counts_of_processes_go_on(tmp_path):
    """Two copies, then two halves of one model (FSDP2), then one process in micro-batches that
    computes its blocks twice: as one process all the way."""
    calm = dict(steps=24, drop_path_rate=0.0)
    lives = (
        dict(n=2, max_steps=9),
        dict(n=2, parallel="fsdp", max_steps=17),
        dict(device_batch_size=4, grad_checkpointing=True),
    )
    assert ends(born(tmp_path / "one", **calm)) == [0]
    for changes in lives:
        assert not any(ends(born(tmp_path / "many", **calm, **changes))), said(tmp_path / "many")

    one = load_checkpoint(tmp_path / "one")["model"]
    many = load_checkpoint(tmp_path / "many")["model"]
    for k in one:
        torch.testing.assert_close(many[k], one[k], atol=2e-6, rtol=1e-5, msg=k)
    rows = read_log(tmp_path / "one")
    for a, b in zip(rows, read_log(tmp_path / "many"), strict=True):
        for k in ("loss", "mlm_acc", "grad_norm"):
            assert abs(a[k] - b[k]) < 1e-5 * max(1, abs(a[k])), (a["step"], k)


class BrokenLoss(pretraining.PretrainLoss):
    "In step 9 the loss of the last process is not a number."

    def __call__(self, model, batch, step):
        loss, metrics = super().__call__(model, batch, step)
        broken = step == 8 and rank() == world_size() - 1
        return loss * (float("nan") if broken else 1), metrics


def break_the_loss():
    pretraining.PretrainLoss = BrokenLoss


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_a_loss_that_is_no_number(tmp_path, n):
    "The step is named, its pictures are listed, the weights before it are kept, status 1."
    out = tmp_path / "run"
    every = dict(log_every=20, checkpoint_every=4)

    assert ends(born(out, n=n, before=break_the_loss, steps=24, **every)) == [1] * n

    line = only_line(out)
    assert "in step 9 the loss is nan" in line and "has sound weights, of step 8" in line
    record = json.loads((out / "nonfinite-step-9.json").read_text())
    assert record["step"] == 9 and record["loss"] == "nan"
    numbers = [source["number"] for source in record["samples"]]
    second_epoch = np.random.default_rng([3, 0, 1]).permutation(128)
    assert numbers == second_epoch[:16].tolist()  # step 9 is its first
    state = load_checkpoint(out)
    assert state["step"] == 8
    assert all(v.isfinite().all() for v in state["model"].values())


@pytest.mark.slow
def test_full_disk(tmp_path, whole):
    """The disk is full at a save: one line, status 2, the checkpoint before is intact.

    With room again the run ends as if nothing had been.
    """
    out = tmp_path / "run"
    assert ends(born(out, steps=24, max_steps=6)) == [0]
    size = (out / "checkpoints" / "last.pt").stat().st_size

    def no_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, -1))

    assert ends(born(out, steps=24, before=no_room)) == [2]

    line = only_line(out)
    assert line.startswith(f"beit: error: cannot write {out}/checkpoints/last.pt: ")
    assert "what was there before is intact" in line
    assert load_checkpoint(out)["step"] == 6 and len(run_checkpoints(out)) == 2
    assert ends(born(out, steps=24)) == [0]
    assert_same(out, whole)


def test_read_only_folder(tmp_path):
    """The same for a folder that may no longer be written to (root may write anywhere, so the
    system's answer is put in its mouth)."""
    out = tmp_path / "run"
    assert ends(born(out, steps=24, max_steps=6)) == [0]

    def read_only():
        def refuse(*paths):
            raise OSError(30, "Read-only file system")

        os.replace = refuse

    assert ends(born(out, steps=24, before=read_only)) == [2]

    line = only_line(out)
    assert "Read-only file system" in line
    assert load_checkpoint(out)["step"] == 6


@pytest.mark.slow
def test_a_damaged_newest_checkpoint(tmp_path, whole):
    """The run goes on from the one before, says so with both names, and ends the same.

    When none is sound it refuses.
    """
    out = tmp_path / "run"
    first = dict(max_steps=6, keep_checkpoints=3, milestone_every=2)
    assert ends(born(out, steps=24, **first)) == [0]
    assert [f.stem for f in run_checkpoints(out)] == ["last", "step-0000004", "step-0000002"]
    last = run_checkpoints(out)[0]
    os.truncate(last, last.stat().st_size // 2)

    assert ends(born(out, steps=24, max_steps=7, keep_checkpoints=2)) == [0]

    line = only_line(out)
    assert f"{last} is damaged" in line and "going on from the one before, " in line
    assert line.endswith("step-0000004.pt")
    assert [f.stem for f in run_checkpoints(out)] == ["last", "step-0000006"]
    assert ends(born(out, steps=24)) == [0]
    assert_same(out, whole)
    for file in run_checkpoints(out):
        file.write_bytes(b"ashes")
    assert ends(born(out, steps=24)) == [2] and "is text ('ashes'), no weights" in said(out)[-1]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGUSR2])
def test_a_loader_worker_dies(tmp_path, whole, how):
    "At a random moment: one line, the step is saved, and the run goes on as if nothing had been."
    out = tmp_path / "run"
    after = random.randint(1, 8)
    [life] = family = born(out, before=slowed_after(after + 4), workers=2, checkpoint_every=100)
    wait_for(lambda: step_of(out) >= after, f"step {after}", family)
    time.sleep(random.uniform(0, 0.2))
    began = time.monotonic()
    os.kill(random.choice(children_of(life.pid)), how)

    assert ends(family, 30) == [2], said(out)

    assert time.monotonic() - began < 20
    step = load_checkpoint(out)["step"]
    [line] = said(out)
    assert f"a loader worker was killed by {how.name}" in line and "--workers" in line
    assert f"stopped after step {step} of " in line and step >= after
    assert session_of(life.pid) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_leaves_nobody(tmp_path, workers):
    "Its loaders end with it, and its lock is free at once."
    out = tmp_path / "run"
    family = born(out, before=slowed_after(2), steps=24, workers=workers)
    wait_for(lambda: step_of(out) >= 2, "step 2", family)
    assert len(session_of(family[0].pid)) == 1 + workers
    family[0].kill()
    ends(family)
    wait_until(lambda: session_of(family[0].pid) == [], "its loaders end", seconds=20)


@pytest.mark.slow
def test_a_loader_of_one_of_two_processes_dies(tmp_path, whole):
    "Both save the same step and stop; one speaks; and the two go on as one would."
    out = tmp_path / "run"
    family = born(out, n=2, before=slowed_after(8), steps=24, workers=1, checkpoint_every=100)
    wait_for(lambda: step_of(out) >= 5, "step 5", family)
    os.kill(random.choice(children_of(family[1].pid)), signal.SIGKILL)

    assert ends(family, 30) == [2, 2]

    [line] = said(out)
    step = load_checkpoint(out)["step"]
    assert "a loader worker was killed by SIGKILL" in line and f"stopped after step {step}" in line
    assert 5 <= step < 24
    assert ends(born(out, n=2, steps=24, checkpoint_every=100)) == [0, 0]
    assert_every_step_once(out, 24)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_starts")
def test_torchrun_itself_is_killed(tmp_path, tokenizer):
    "Its processes notice, save and stop: nobody trains on where nobody looks, and holds the lock."
    out = tmp_path / "run"
    script = tmp_path / "run.py"
    tests = str(Path(__file__).parent)
    script.write_text(RUN_AS_SCRIPT.format(tests=tests, out=str(out), tokenizer=str(tokenizer)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.Popen(
        [*torchrun, "--nproc-per-node=2", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    wait_until(lambda: step_of(out) >= 9, "step 9", lambda: run.poll() is None)
    run.kill()
    text = run.communicate(timeout=30)[0]  # nobody holds its output any more
    step = load_checkpoint(out)["step"]
    assert f"stopped after step {step} of 24 and saved" in text
    assert ends(born(out, n=2, steps=24)) == [0, 0]


SMALL_MEMORY = """
set -e
mount -t tmpfs -o size={size} tmpfs /dev/shm
exec {python} -c '
import multiprocessing, sys
multiprocessing.set_start_method("{start}")
from beit_nb.cli import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
' "$@"
"""


def may_mount():
    "May we give a process a /dev/shm of its own?"
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"]
    return (
        bool(shutil.which("unshare")) and subprocess.run(probe, capture_output=True).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_a_small_shared_memory_is_enough(tmp_path, start):
    "Docker gives 64 MB, and this test 64 kB: batches do not go through /dev/shm."
    if not may_mount():
        pytest.skip("needs the right to mount")
    script = SMALL_MEMORY.format(size="64k", python=sys.executable, start=start)
    words = ["tokenizer", "nano", "--steps", "4", "--width", "16", "--workers", "1"]
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *words, "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == 0, run.stderr
    assert read_metrics(tmp_path / "run")["steps"] == 4


MASKS = [("blockwise", 1, 1), ("blockwise", 4, 4), ("blockwise", 26, 16), ("random", 1, 16)]


@pytest.mark.parametrize("kind, target, least", [*MASKS, ("blockwise", 64, 1)])
def test_masks_are_never_empty(kind, target, least):
    r = recipe_named(
        "pretrain",
        "nano",
        masking=kind,
        num_mask_patches=target,
        min_mask_patches_per_block=least,
        exact_mask=False,
    )
    rng = np.random.default_rng(0)

    check_recipe(r)
    masks = [targets.mask_maker(r)(rng=rng) for _ in range(300)]

    assert all(mask.any() for mask in masks)


def test_recipes_of_empty_masks_are_refused(tmp_path):
    assert ends(born(tmp_path / "run", num_mask_patches=1)) == [2]
    [line] = said(tmp_path / "run")
    assert "masks stay empty" in line


def test_a_model_refuses_to_guess_nothing():
    model = pretraining.build_mim(recipe_named("pretrain", "nano"))
    nothing = torch.zeros(2, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="nothing to guess"):
        model(torch.zeros(2, 3, 32, 32), nothing)


def small_tokenizer(out, **changes):
    r = recipe_named("tokenizer", "nano", out=str(out), **TOKENIZER | changes)
    train_tokenizer(r, quiet=True)


def small_pretraining(out, **changes):
    options = SMALL | dict(tokenizer="in-memory", steps=4) | changes
    pretraining.pretrain(recipe_named("pretrain", "nano", out=str(out), **options), quiet=True)


def small_finetuning(out, **changes):
    shape = dict(embed_dim=32, depth=2, num_heads=2, batch_size=16, precision="fp32")
    options = shape | dict(labels_per_class=4, eval_every=100, steps=4) | changes
    finetune(recipe_named("finetune", "nano", out=str(out), **options), quiet=True)


TRAININGS = [small_tokenizer, small_pretraining, small_finetuning]


@pytest.mark.slow
@pytest.mark.parametrize("train", TRAININGS)
@pytest.mark.parametrize("change", [{"max_steps": 3}, {"dry_run": True}])
def test_a_part_of_a_run_is_no_finished_run(tmp_path, train, change):
    "Its figures are there for people, but whoever builds on a finished run does not get them."
    train(tmp_path, **change)

    part = json.loads((tmp_path / "metrics.json").read_text())
    assert part["finished"] is False and part["steps"] == change.get("max_steps", 2)
    assert read_metrics(tmp_path) is None

    train(tmp_path)

    whole = read_metrics(tmp_path)
    assert whole["finished"] is True and whole["steps"] == 4


def open_cifar(folder):
    """The job of a process: opens a set that must be unpacked first, which takes a while.

    Returns how often this process unpacked, and how many pictures it found.
    """
    from pathlib import Path

    import torchvision

    from beit_nb import data

    unpacked = []

    class SlowCifar:
        "Stands in for torchvision's: two processes at once would break its files."

        classes = ["even", "odd"]

        def __init__(self, root, train, download):
            files = Path(root) / "files"
            if not files.exists():
                with open(f"{root}/being-unpacked", "x"):
                    unpacked.append(rank())
                    time.sleep(0.5)
                files.touch()
            self.targets = [i % 2 for i in range(40)]

    torchvision.datasets.CIFAR10 = SlowCifar
    pictures = data.torchvision_set("cifar10", "train", folder)
    return len(unpacked), len(pictures)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_starts")
def test_rank_0_alone_unpacks_a_known_set(tmp_path):
    assert run_distributed(open_cifar, str(tmp_path)) == [(1, 36), (0, 36)]


def fails_to_score():
    "A life in which the second process cannot read its share of the pictures to be scored."

    def unreadable(*args):
        raise BeitError("this share cannot be read; repair it")

    if os.environ["RANK"] == "1":
        assert hasattr(labelled_views, "sequential_batches")
        labelled_views.sequential_batches = unreadable


@pytest.mark.slow
def test_an_evaluation_that_fails_in_one_process(tmp_path, monkeypatch):
    "Nobody adds a sum to another's message: all save, stop, and one of them says why."
    line = "finetune nano --embed-dim 32 --depth 2 --num-heads 2 --batch-size 16 --precision fp32"
    line += " --labels-per-class 4 --steps 6 --eval-every 3 --layer-decay 1"
    monkeypatch.setattr(
        sys.modules[__name__], "words", lambda out: [*line.split(), "--out", str(out)]
    )
    out = tmp_path / "run"

    assert ends(born(out, n=2, before=fails_to_score), 30) == [2, 2]

    told = "this share cannot be read; repair it; step 3 of 6 is saved, the same command goes on"
    assert [x for x in said(out) if "warm-up" not in x] == [f"beit: error: {told}"]
    assert load_checkpoint(out)["step"] == 3
    assert ends(born(out, n=2)) == [0, 0] and read_metrics(out)["steps"] == 6
