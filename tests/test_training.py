"The engine's promise: stop a run anywhere, even by SIGKILL, and the weights at the end are the same bit for bit."
import multiprocessing, os, random, signal, subprocess, sys, time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beit_nb.recipes import Run, recipe_named
from beit_nb.tokenizer import train_tokenizer
from beit_nb.runs import load_checkpoint, open_run, read_log, run_checkpoints, save_checkpoint
from beit_nb.training import Trainer, fit

torch.set_num_threads(1)
ENV = dict(os.environ, OMP_NUM_THREADS="1")
FORK = multiprocessing.get_context("fork")  # a real process to kill, without importing torch again


def tokenizer_run(out, **changes):
    "A small dVAE on the embedded digits, by the function behind `beit tokenizer`."
    train_tokenizer(recipe_named("tokenizer", "nano", **dict(out=str(out), steps=24, batch_size=16, width=32, precision="fp32", log_every=1, checkpoint_every=3) | changes), quiet=True)


def weights(out):
    state = load_checkpoint(out, "tokenizer")
    assert state["step"] == 24
    return state["model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nobody stopped."
    tokenizer_run(out := tmp_path_factory.mktemp("whole"))
    return out


def test_kill_and_resume(whole, tmp_path):
    "SIGKILL at a random moment after a random step; the same command ends with the weights of the unstopped run."
    rng = random.Random()
    process, after = FORK.Process(target=tokenizer_run, args=(tmp_path,)), rng.randint(4, 18)
    process.start()
    while max((r["step"] for r in read_log(tmp_path)), default=0) < after:
        assert process.is_alive(), "the run ended by itself"
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05))
    process.kill()
    process.join()
    stopped = load_checkpoint(tmp_path, "tokenizer")["step"]
    assert process.exitcode == -signal.SIGKILL and 0 < stopped < 24, f"killed after step {after}"
    tokenizer_run(tmp_path)
    assert equal(weights(tmp_path), weights(whole)), f"killed after step {after}, resumed at step {stopped}"
    assert [r["step"] for r in read_log(tmp_path) if "loss" in r] == list(range(1, 25)), "the log has every step once"
    assert not list(tmp_path.rglob("*.part")), "nothing half-written stays"


def test_workers_change_nothing(whole, tmp_path):
    tokenizer_run(tmp_path, workers=2)
    assert equal(weights(tmp_path), weights(whole))


def toy(out, loss_of=None, after_step=None, **changes):
    "A toy regression with dropout through the real engine."
    r = Run(**dict(out=str(out), steps=30, batch_size=8, lr=1e-2, warmup_steps=5, precision="fp32", checkpoint_every=4, log_every=3) | changes)

    def batches(first, last):
        for step in range(first, last):
            x = torch.from_numpy(np.random.default_rng(step).normal(size=(8, 4))).float()
            yield x, x.square().sum(1, keepdim=True)

    def loss(model, batch, step):
        return F.mse_loss(model(batch[0]), batch[1]), {}

    with open_run("toy", r) as folder:
        torch.manual_seed(r.seed)
        model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 1))
        t = Trainer("toy", r, folder, model, r.steps, 10, quiet=True)
        fit(t, batches, loss_of or loss, after_step)
        return {k: v.clone() for k, v in model.state_dict().items()}


def test_stopped_at_every_step(tmp_path):
    straight = toy(tmp_path / "straight")
    for stop in range(1, 30, 4):
        toy(tmp_path / str(stop), max_steps=stop)
        assert equal(toy(tmp_path / str(stop)), straight), f"stopped at {stop}"


def test_signals_save_and_stop(tmp_path):
    for number in (signal.SIGINT, signal.SIGTERM):
        out, before = tmp_path / number.name, signal.getsignal(number)
        with pytest.raises(KeyboardInterrupt, match="stopped after step 10 of 30 and saved"):
            toy(out, after_step=lambda step, model: os.kill(os.getpid(), number) if step == 10 else None)
        assert load_checkpoint(out)["step"] == 10 and signal.getsignal(number) == before
        assert equal(toy(out), toy(tmp_path / "straight"))


def test_other_recipe_is_refused(tmp_path):
    toy(tmp_path, max_steps=5)
    with pytest.raises(ValueError, match=r"holds another run \(lr 0.01 there, 0.02 now\)"): toy(tmp_path, lr=0.02)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="another run"): toy(tmp_path, lr=0.02)  # the checkpoint knows it too
    (tmp_path / "config.json").write_text('{"comma')
    with pytest.raises(ValueError, match="config.json is damaged"): toy(tmp_path)
    with pytest.raises(ValueError, match="log_every 0"): toy(tmp_path / "new", log_every=0)
    assert not (tmp_path / "new").exists(), "a bad recipe leaves nothing behind"


def test_two_runs_in_one_folder(tmp_path):
    r = Run(out=str(tmp_path))
    with open_run("toy", r), pytest.raises(ValueError, match="another run is at work"):
        with open_run("toy", r): pass
    with open_run("toy", r): pass


def test_damaged_checkpoints_are_refused(tmp_path):
    toy(tmp_path, max_steps=5)
    last, older = run_checkpoints(tmp_path)
    older.unlink()  # else the run would go on from there
    good = last.read_bytes()
    torch.save(load_checkpoint(last), tmp_path / "compare.pt")
    middle = len(good) // 2
    for bad in (good[:middle], good[:-1], b"", b"--2021-06-15-- resolving host"):
        last.write_bytes(bad)
        with pytest.raises(ValueError, match="last.pt is damaged"): toy(tmp_path)
    state = load_checkpoint(tmp_path / "compare.pt")
    at = good.index(state["model"]["0.weight"].numpy().tobytes())
    last.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    with pytest.raises(ValueError, match="checksum"): toy(tmp_path)
    last.write_bytes(good)
    toy(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_never_reach_a_checkpoint(tmp_path, value):
    def loss_of(model, batch, step):
        return F.mse_loss(model(batch[0]), batch[1]) * (value if step == 9 else 1), {}

    with pytest.raises(FloatingPointError, match="in step 10 .* lower --lr"): toy(tmp_path, loss_of, checkpoint_every=4, log_every=100)
    state = load_checkpoint(tmp_path)
    assert state["step"] == 8 and all(v.isfinite().all() for v in state["model"].values())


def test_full_disk(tmp_path):
    "A save that hits the end of the disk leaves the checkpoint before it, and says so in one line."
    path = tmp_path / "last.pt"
    save_checkpoint(path, dict(config=dict(command="toy"), x=torch.zeros(10)))
    code = f"""
import resource, signal, torch
from beit_nb.runs import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
try: save_checkpoint({str(path)!r}, dict(config=dict(command="toy"), x=torch.zeros(300_000)))
except ValueError as e: print(e)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, check=True).stdout
    assert said.startswith(f"cannot write {path}") and "intact" in said and said.count("\n") == 1
    assert len(load_checkpoint(path)["x"]) == 10 and [p.name for p in tmp_path.iterdir()] == ["last.pt"]
