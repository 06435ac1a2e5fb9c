"""Nothing lost: real processes of the real command, killed, stopped, starved and fed with nonsense.

BEIT_KILLS=100 pytest tests/test_faults.py -k survives -s     # the long harness; prints what it did
"""

import json, multiprocessing, os, random, resource, signal, socket, subprocess, sys, time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from beit_nb import pretraining
from beit_nb.cli import main
from beit_nb.engine.sources import Digits, ImageDataset
from beit_nb.recipes import check_recipe, recipe_named
from beit_nb.engine.processes import rank, world_size
from beit_nb.engine.log import read_log
from beit_nb.engine.runs import load_checkpoint, open_run, run_checkpoints
from beit_nb.tokenizer import load_tokenizer, train_tokenizer

torch.set_num_threads(1)
KILLS = int(os.environ.get("BEIT_KILLS", 6))
FORK = multiprocessing.get_context("fork")  # a process of its own, without importing torch again
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
    return [
        "pretrain",
        "nano",
        "--out",
        str(out),
        *(
            w
            for k, v in (SMALL | dict(tokenizer="in-memory") | changes).items()
            for w in (f"--{k.replace('_', '-')}", str(v))[: 1 if v is True else 2]
        ),
    ]


@pytest.fixture(scope="module", autouse=True)
def tokenizer(tmp_path_factory):
    "Pictures and a tokenizer, in memory before anything forks: a life then begins in a moment."
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(
        recipe_named(
            "tokenizer", "nano", out=str(folder), steps=4, width=16, vocab_size=32, batch_size=16
        ),
        quiet=True,
    )
    pictures = few()
    tokenizer = load_tokenizer(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "open_data", lambda data: pictures)
        patch.setattr(pretraining, "load_tokenizer", lambda path: tokenizer)
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
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    shared = dict(
        WORLD_SIZE=str(n),
        LOCAL_WORLD_SIZE=str(n),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    family = [
        FORK.Process(
            target=life,
            args=(
                out,
                changes,
                shared | dict(RANK=str(i), LOCAL_RANK=str(i)) if n > 1 else {},
                before,
            ),
        )
        for i in range(n)
    ]
    for p in family:
        p.start()
    return family


def ends(family, seconds=60):
    "Their exit statuses."
    for p in family:
        p.join(seconds)
    assert not any(p.is_alive() for p in family), "a process hangs"
    return [p.exitcode for p in family]


def said(out):
    "What the command printed about errors, line by line."
    return [
        l
        for l in Path(f"{out}.txt").read_text().splitlines()
        if l.startswith(("beit:", "Traceback"))
    ]


def step_of(out):
    return max((r["step"] for r in read_log(out)), default=0)


def wait_for(condition, family):
    while not condition():
        if not any(p.is_alive() for p in family):
            return False
        time.sleep(0.0005)
    return True


def same(a, b):
    "Two runs ended with the same weights and the same optimizer, bit for bit."
    a = load_checkpoint(a)
    b = load_checkpoint(b)
    moments = lambda s: [v for m in s["optimizer"]["state"].values() for v in m.values()]
    return (
        a["step"] == b["step"]
        and all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
        and all(map(torch.equal, moments(a), moments(b)))
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "24 steps that nobody disturbed."
    assert ends(born(out := tmp_path_factory.mktemp("whole") / "run", steps=24)) == [0]
    return out


@pytest.mark.parametrize("workers", [0, 2])
def test_survives_any_kill(tmp_path, workers):
    """SIGKILL, SIGKILL in the middle of a save, SIGTERM, SIGINT at random moments.

    The run ends as one that was never stopped.
    """
    kills = (KILLS + 1 - workers // 2) // 2
    steps = 12 + 4 * kills
    rng = random.Random()
    done = Counter()
    out = tmp_path / "run"
    assert ends(
        born(straight := tmp_path / "straight", steps=steps, checkpoint_every=100), 60 + steps
    ) == [0]
    while done.total() < kills:
        family = born(out, steps=steps, workers=workers)
        start = step_of(out)
        kind = rng.choice(["kill", "kill", "while saving", "term", "int"])
        part = out / "checkpoints" / "last.pt.part"
        after = start + rng.randint(0, 5)
        wait_for(lambda: step_of(out) >= after, family)
        if kind == "while saving":
            wait_for(part.exists, family)
        else:
            time.sleep(rng.uniform(0, 0.03))
        # as a terminal or a batch system: the loaders too
        if kind in ("term", "int"):
            os.killpg(family[0].pid, signal.SIGTERM if kind == "term" else signal.SIGINT)
        else:
            os.kill(family[0].pid, signal.SIGKILL)
        asked = time.time()
        (status,) = ends(family, 30)
        if status == 0:
            break  # it was faster
        # -15: before the engine listened
        assert status in ((130, -15) if kind in ("term", "int") else (-9,)), (
            kind,
            status,
            said(out),
        )
        if status == 130 and run_checkpoints(out):
            assert run_checkpoints(out)[0].stat().st_mtime - asked < 5, (
                "a stop saves within seconds"
            )
        done[kind if kind != "while saving" or part.exists() else "kill"] += 1
    assert ends(born(out, steps=steps, workers=workers), 60 + steps) == [0], said(out)
    assert same(out, straight), f"{dict(done)}"
    assert [r["step"] for r in read_log(out)] == list(range(1, steps + 1)), (
        "the log has every step once"
    )
    assert not list(tmp_path.rglob("*.part")), "nothing half-written stays"
    print(
        f"\n{done.total()} stops of a run of {steps} steps with {workers} workers: {dict(done)}; "
        "bit-equal"
    )


def test_a_killed_worker_comes_back(tmp_path, tokenizer):
    """torchrun, two processes, one is killed.

    --max-restarts brings the run back without hand work, and it ends bit-equal.
    """
    assert ends(born(straight := tmp_path / "straight", n=2, steps=24)) == [0, 0]
    (tmp_path / "run.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_faults import "
        "few, main, pretraining, words\npretraining.open_data = few\n"
        f"sys.exit(main(words({str(tmp_path / 'run')!r}, steps=24, tokenizer={str(tokenizer)!r})))"
    )
    torchrun = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "--max-restarts",
            "1",
            str(tmp_path / "run.py"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    while step_of(tmp_path / "run") < 9 and torchrun.poll() is None:
        time.sleep(0.002)
    workers = [
        int(p.name)
        for p in Path("/proc").iterdir()
        if p.name.isdigit() and f"\nPPid:\t{torchrun.pid}\n" in (p / "status").read_text()
    ]
    os.kill(random.choice(workers), signal.SIGKILL)
    text = torchrun.communicate(timeout=90)[0]
    assert torchrun.returncode == 0 and "exitcode: -9" in text, text
    assert same(tmp_path / "run", straight)
    assert [r["step"] for r in read_log(tmp_path / "run")] == list(range(1, 25))


def test_one_refusal_stops_all(tmp_path):
    """A second run in one folder.

    A batch that two processes cannot share; a recipe that cannot work: one line, status 2, no hang.
    """
    with open_run("pretrain", recipe_named("pretrain", "nano", out=str(tmp_path / "busy"))):
        assert ends(born(tmp_path / "busy", n=2, steps=4), 20) == [2, 2]
    assert [l.split(";")[0] for l in said(tmp_path / "busy")] == [
        f"beit: error: another run is at work in {tmp_path / 'busy'}"
    ]
    for name, says, change in (
        ("odd", "batch_size 15 cannot be reached with 2 processes", dict(batch_size=15)),
        ("bad", "batch_size 0", dict(batch_size=0)),
    ):
        assert ends(born(tmp_path / name, n=2, steps=4, **change), 20) == [2, 2]
        assert len(said(tmp_path / name)) == 1 and said(tmp_path / name)[0].startswith(
            f"beit: error: {says}"
        )
    assert not (tmp_path / "bad").exists() and not (tmp_path / "odd" / "config.json").exists(), (
        "a corrected try is free to use the folder"
    )


def test_a_stop_is_agreed_upon(tmp_path):
    "Only the second process is asked to stop; both save the same step, and one speaks."
    family = born(tmp_path / "run", n=2, steps=24)
    assert wait_for(lambda: step_of(tmp_path / "run") >= 5, family)
    os.kill(family[1].pid, signal.SIGTERM)
    assert ends(family) == [130, 130]
    step = load_checkpoint(tmp_path / "run")["step"]
    assert (
        said(tmp_path / "run")
        == [f"beit: stopped after step {step} of 24 and saved; the same command continues"]
        and 5 <= step < 24
    )
    assert ends(born(tmp_path / "run", n=2, steps=24)) == [0, 0]


def test_other_counts_of_processes_go_on(tmp_path):
    """Two copies, then two halves of one model (FSDP2), then one process in bites that computes its
    blocks twice: as one process all the way.
    """
    calm = dict(steps=24, drop_path_rate=0.0)
    assert ends(born(tmp_path / "one", **calm)) == [0]
    for part in (
        dict(n=2, max_steps=9),
        dict(n=2, parallel="fsdp", max_steps=17),
        dict(device_batch_size=4, grad_checkpointing=True),
    ):
        assert not any(ends(born(tmp_path / "many", **calm, **part))), said(tmp_path / "many")
    one = load_checkpoint(tmp_path / "one")
    many = load_checkpoint(tmp_path / "many")
    for k, v in one["model"].items():
        torch.testing.assert_close(many["model"][k], v, atol=2e-6, rtol=1e-5, msg=k)
    for a, b in zip(read_log(tmp_path / "one"), read_log(tmp_path / "many"), strict=True):
        for k in ("loss", "mlm_acc", "grad_norm"):
            assert abs(a[k] - b[k]) < 1e-5 * max(1, abs(a[k])), (a["step"], k)


def poison():
    "In step 9 the loss of the last process is not a number."
    real = pretraining.pretrain_loss

    def sick(*args):
        def loss_of(model, bite, step):
            loss, metrics = real(*args)(model, bite, step)
            return loss * (float("nan") if step == 8 and rank() == world_size() - 1 else 1), metrics

        return loss_of

    pretraining.pretrain_loss = sick


@pytest.mark.parametrize("n", [1, 2])
def test_a_loss_that_is_no_number(tmp_path, n):
    "The step is named, its pictures are listed, the weights before it are kept, status 1."
    assert (
        ends(
            born(
                out := tmp_path / "run",
                n=n,
                before=poison,
                steps=24,
                log_every=20,
                checkpoint_every=4,
            )
        )
        == [1] * n
    )
    assert (
        len(said(out)) == 1
        and "in step 9 the loss is nan" in said(out)[0]
        and "has sound weights, of step 8" in said(out)[0]
    ), said(out)
    record = json.loads((out / "nonfinite-step-9.json").read_text())
    state = load_checkpoint(out)
    assert (
        record["step"] == 9
        and record["loss"] == "nan"
        and state["step"] == 8
        and all(v.isfinite().all() for v in state["model"].values())
    )
    numbers = [s["number"] for s in record["samples"]]
    # step 9 is the first of the second epoch
    first_epoch = np.random.default_rng([3, 0, 1]).permutation(128)[:16]
    assert numbers == first_epoch.tolist()


def test_full_disk(tmp_path, whole):
    """The disk is full at a save.

    One line, status 2, the checkpoint before is intact; with room again the run ends as if nothing
    had been.
    """
    assert ends(born(out := tmp_path / "run", steps=24, max_steps=6)) == [0]
    size = (out / "checkpoints" / "last.pt").stat().st_size
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, -1))
    assert ends(born(out, steps=24, before=full)) == [2]
    assert (
        len(said(out)) == 1
        and said(out)[0].startswith(f"beit: error: cannot write {out}/checkpoints/last.pt: ")
        and "the checkpoint before it is intact" in said(out)[0]
    )
    assert load_checkpoint(out)["step"] == 6 and len(run_checkpoints(out)) == 2
    assert ends(born(out, steps=24)) == [0] and same(out, whole)


def test_read_only_folder(tmp_path):
    """The same for a folder that may no longer be written to (root may write anywhere, so the
    system's answer is put in its mouth).
    """

    def read_only():
        def no(*paths):
            raise OSError(30, "Read-only file system")

        os.replace = no

    assert ends(born(out := tmp_path / "run", steps=24, max_steps=6)) == [0]
    assert (
        ends(born(out, steps=24, before=read_only)) == [2]
        and len(said(out)) == 1
        and "Read-only file system" in said(out)[0]
    ), said(out)
    assert load_checkpoint(out)["step"] == 6


def test_a_damaged_newest_checkpoint(tmp_path, whole):
    """The run goes on from the one before, says so with both names, and ends the same.

    When none is sound it refuses.
    """
    assert ends(
        born(out := tmp_path / "run", steps=24, max_steps=6, keep_checkpoints=3, milestone_every=2)
    ) == [0]
    assert [f.stem for f in run_checkpoints(out)] == ["last", "step-0000004", "step-0000002"]
    last = run_checkpoints(out)[0]
    os.truncate(last, last.stat().st_size // 2)
    assert ends(born(out, steps=24, max_steps=7, keep_checkpoints=2)) == [0]
    assert (
        len(said(out)) == 1
        and f"{last} is damaged" in said(out)[0]
        and "going on from the one before, " in said(out)[0]
        and said(out)[0].endswith("step-0000004.pt")
    )
    assert [f.stem for f in run_checkpoints(out)] == ["last", "step-0000006"]
    assert ends(born(out, steps=24)) == [0] and same(out, whole)
    for f in run_checkpoints(out):
        f.write_bytes(b"ashes")
    assert ends(born(out, steps=24)) == [2] and "is damaged" in said(out)[-1]


def test_masks_are_never_empty(tmp_path):
    """Recipes whose masks would be empty are refused.

    Those that pass never make one; and a model refuses to guess nothing.
    """
    rng = np.random.default_rng()
    for kind, target, least in (
        ("blockwise", 1, 1),
        ("blockwise", 4, 4),
        ("blockwise", 26, 16),
        ("random", 1, 16),
        ("blockwise", 64, 1),
    ):
        r = recipe_named(
            "pretrain",
            "nano",
            masking=kind,
            num_mask_patches=target,
            min_mask_patches_per_block=least,
            exact_mask=False,
        )
        check_recipe(r)
        assert all(pretraining.mask_maker(r)(rng=rng).any() for _ in range(300)), (
            kind,
            target,
            least,
        )
    assert (
        ends(born(tmp_path / "run", num_mask_patches=1)) == [2]
        and "masks stay empty" in said(tmp_path / "run")[0]
    )
    model = pretraining.build_mim(r)
    with pytest.raises(ValueError, match="nothing to guess"):
        model(torch.zeros(2, 3, 32, 32), torch.zeros(2, 8, 8, dtype=torch.bool))
