"""The engine's promise: stop a run anywhere, even by SIGKILL, and the weights at the end are the
same bit for bit."""

import multiprocessing
import os
import random
import signal
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_processes import PATIENCE, said_on_a_full_disk, wait_until
from helpers_runs import slowed_after, step_of
from torch import Tensor, nn

from beit_nb import BeitError
from beit_nb.configs import Run
from beit_nb.engine.log import read_log
from beit_nb.engine.runs import load_checkpoint, open_run, run_checkpoints, save_checkpoint
from beit_nb.engine.steps import StepLoader
from beit_nb.engine.trainer import Trainer
from beit_nb.engine.training import fit
from beit_nb.recipes import recipe_named
from beit_nb.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("pages_unpainted")

torch.set_num_threads(1)
FORK = multiprocessing.get_context("fork")  # a real process to kill, without importing torch again


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class PairLoader(StepLoader):
    "One micro-batch of 8 rows a step, made by `batch(step)`."

    def __init__(self, batch):
        self.batch = batch

    def steps(self, first, last):
        for step in range(first, last):
            yield [Pair(*self.batch(step))], [8]


def squared_error(model, batch, step):
    return F.mse_loss(model(batch.x), batch.y), {}


def tokenizer_run(out, **changes):
    "A small dVAE on the embedded digits, by the function behind `beit tokenizer`."
    options = dict(
        steps=24, batch_size=16, width=32, precision="fp32", log_every=1, checkpoint_every=3
    )
    r = recipe_named("tokenizer", "nano", out=str(out), **options | changes)
    train_tokenizer(r, quiet=True)


def crawling_run(out, after, **changes):
    "The same in a process of its own that hardly goes on after that step, so it will be caught."

    def crawl():
        slowed_after(after)()
        tokenizer_run(out, **changes)

    process = FORK.Process(target=crawl)
    process.start()
    return process


def weights(out):
    state = load_checkpoint(out, "tokenizer")
    assert state["step"] == 24
    return state["model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nobody stopped."
    out = tmp_path_factory.mktemp("whole")
    tokenizer_run(out)
    return out


@pytest.mark.slow
def test_kill_and_resume(whole, tmp_path):
    """SIGKILL at a random moment after a random step.

    The same command ends with the weights of the unstopped run.
    """
    after = random.randint(4, 14)
    process = crawling_run(tmp_path, after + 4)
    wait_until(lambda: step_of(tmp_path) >= after, f"step {after}", process.is_alive)
    time.sleep(random.uniform(0, 0.05))

    process.kill()
    process.join(PATIENCE)
    stopped = load_checkpoint(tmp_path, "tokenizer")["step"]
    assert process.exitcode == -signal.SIGKILL and 0 < stopped < 24, f"killed after step {after}"
    tokenizer_run(tmp_path)

    assert equal(weights(tmp_path), weights(whole)), f"killed after {after}, resumed at {stopped}"
    steps = [row["step"] for row in read_log(tmp_path) if "loss" in row]
    assert steps == list(range(1, 25)), "the log has every step once"
    assert not list(tmp_path.rglob("*.part")), "nothing half-written stays"


@pytest.mark.slow
def test_workers_change_nothing(whole, tmp_path):
    tokenizer_run(tmp_path, workers=2)
    assert equal(weights(tmp_path), weights(whole))


def toy(out, compute_loss=squared_error, callbacks=(), updates=(), **changes):
    "A toy regression with dropout through the real engine; the weights at its end."
    options = dict(
        steps=30,
        batch_size=8,
        lr=1e-2,
        warmup_steps=5,
        precision="fp32",
        checkpoint_every=4,
        log_every=3,
    )
    r = Run(out=str(out), **options | changes)

    def batch(step):
        x = torch.from_numpy(np.random.default_rng(step).normal(size=(8, 4))).float()
        return x, x.square().sum(1, keepdim=True)

    with open_run("toy", r, r.resume) as folder:
        torch.manual_seed(r.seed)
        model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 1))
        trainer = Trainer("toy", r, folder, model, r.length(10 * 8), quiet=True)
        fit(trainer, PairLoader(batch), compute_loss, callbacks, updates)
        return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.slow
def test_stopped_at_every_step(tmp_path):
    straight = toy(tmp_path / "straight")
    for stop in range(1, 30, 4):
        toy(tmp_path / str(stop), max_steps=stop)
        assert equal(toy(tmp_path / str(stop)), straight), f"stopped at {stop}"


def finger(number):
    "A callback that sends ourselves a signal after step 10."

    def press(trainer):
        if trainer.step == 10:
            os.kill(os.getpid(), number)

    return press


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(tmp_path, number):
    out = tmp_path / "stopped"
    before = signal.getsignal(number)

    with pytest.raises(KeyboardInterrupt, match="stopped after step 10 of 30 and saved"):
        toy(out, callbacks=[finger(number)])

    assert load_checkpoint(out)["step"] == 10
    assert signal.getsignal(number) == before
    assert equal(toy(out), toy(tmp_path / "straight"))


def test_other_recipe_is_refused(tmp_path):
    toy(tmp_path, max_steps=5)
    with pytest.raises(BeitError, match=r"holds another run \(lr 0.01 there, 0.02 now\)"):
        toy(tmp_path, lr=0.02)
    (tmp_path / "config.json").unlink()
    with pytest.raises(BeitError, match="another run"):  # the checkpoint knows it too
        toy(tmp_path, lr=0.02)
    (tmp_path / "config.json").write_text('{"comma')
    with pytest.raises(BeitError, match="config.json is damaged"):
        toy(tmp_path)
    with pytest.raises(BeitError, match="log_every 0"):
        toy(tmp_path / "new", log_every=0)
    assert not (tmp_path / "new").exists(), "a bad recipe leaves nothing behind"


def test_updates_come_before_the_save_and_callbacks_after_it(tmp_path):
    """What updates change, such as an average of the weights, is in the checkpoint of their step.

    Whatever looks may fail, and then the step that it looked at is saved.
    """
    updated = []
    seen = []

    def update(trainer):
        updated.append((trainer.step, trainer.saved_step))

    def look(trainer):
        seen.append((trainer.step, trainer.saved_step))
        return {"seen": len(seen)} if trainer.step == 8 else None

    toy(tmp_path, callbacks=[look], updates=[update], steps=9, checkpoint_every=4)

    saved_before = [0, 0, 0, 0, 4, 4, 4, 4, 8]
    saved_after = [0, 0, 0, 4, 4, 4, 4, 8, 9]
    assert updated == list(zip(range(1, 10), saved_before))
    assert seen == list(zip(range(1, 10), saved_after))
    assert [row["step"] for row in read_log(tmp_path) if "seen" in row] == [8]


@pytest.mark.parametrize("wrong", [BeitError("no room"), RuntimeError("broken"), SystemExit(3)])
def test_whatever_fails_in_a_look_the_step_is_saved(tmp_path, wrong):
    def look(trainer):
        if trainer.step == 6:
            raise wrong

    said = "no room; step 6 of 30 is saved" if isinstance(wrong, BeitError) else str(wrong)
    with pytest.raises(type(wrong), match=said):
        toy(tmp_path, callbacks=[look], checkpoint_every=100)
    assert load_checkpoint(tmp_path)["step"] == 6
    assert equal(toy(tmp_path), toy(tmp_path / "straight"))


def test_a_look_that_was_missed_is_made_up_for(tmp_path):
    "The run ended between its save and its look; nothing is looked at twice in the log."

    def look(trainer):
        return {"seen": trainer.step} if trainer.step % 4 == 0 else None

    toy(tmp_path, max_steps=8)  # nobody looked
    toy(tmp_path, callbacks=[look], max_steps=16)
    toy(tmp_path, callbacks=[look], max_steps=20)

    assert [row["step"] for row in read_log(tmp_path) if "seen" in row] == [8, 12, 16, 20]


def test_numbers_that_broke_are_not_saved_by_a_look_that_fails(tmp_path):
    def compute_loss(model, batch, step):
        loss, metrics = squared_error(model, batch, step)
        return loss * (float("nan") if step == 4 else 1), metrics

    def look(trainer):
        if trainer.step == 6:
            raise BeitError("no room")

    with pytest.raises(FloatingPointError, match="in step 5"):
        toy(tmp_path, compute_loss, [look], checkpoint_every=100, log_every=100)
    assert not run_checkpoints(tmp_path)


def test_damaged_checkpoints_are_refused(tmp_path):
    toy(tmp_path, max_steps=5)
    last, older = run_checkpoints(tmp_path)
    older.unlink()  # else the run would go on from there
    good = last.read_bytes()
    torch.save(load_checkpoint(last), tmp_path / "compare.pt")
    middle = len(good) // 2
    for bad in (good[:middle], good[:-1], b"", b"--2021-06-15-- resolving host"):
        last.write_bytes(bad)
        with pytest.raises(BeitError, match="last.pt is (damaged|empty|text)"):
            toy(tmp_path)
    state = load_checkpoint(tmp_path / "compare.pt")
    at = good.index(state["model"]["0.weight"].numpy().tobytes())
    last.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    with pytest.raises(BeitError, match="CRC"):
        toy(tmp_path)
    last.write_bytes(good)
    toy(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_never_reach_a_checkpoint(tmp_path, value):
    def compute_loss(model, batch, step):
        loss, metrics = squared_error(model, batch, step)
        return loss * (value if step == 9 else 1), metrics

    with pytest.raises(FloatingPointError, match="in step 10 .* lower --lr"):
        toy(tmp_path, compute_loss, checkpoint_every=4, log_every=100)
    state = load_checkpoint(tmp_path)
    assert state["step"] == 8 and all(v.isfinite().all() for v in state["model"].values())


def test_full_disk(tmp_path):
    "A save that hits the end of the disk leaves the checkpoint before it, and says so in one line."
    path = tmp_path / "last.pt"
    save_checkpoint(path, dict(config=dict(command="toy"), x=torch.zeros(10)))

    def save_more():
        try:
            save_checkpoint(path, dict(config=dict(command="toy"), x=torch.zeros(300_000)))
        except BeitError as e:
            print(e)

    said = said_on_a_full_disk(save_more)

    assert said.startswith(f"cannot write {path}") and "intact" in said and said.count("\n") == 1
    assert len(load_checkpoint(path)["x"]) == 10
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def line(out, **changes):
    "The engine on a line y = 2x, in one process."
    options = dict(
        steps=40, batch_size=8, lr=1e-2, precision="fp32", log_every=5, checkpoint_every=20
    )
    r = Run(out=str(out), **options | changes)

    def batch(step):
        x = torch.randn(8, 1, generator=torch.Generator().manual_seed(step))
        return x, 2 * x

    def look(trainer):
        if trainer.step % 20 == 0:
            return {"view": np.full((4, 6, 3), trainer.step, np.uint8)}

    with open_run("line", r, r.resume) as folder:
        torch.manual_seed(0)
        trainer = Trainer("line", r, folder, nn.Linear(1, 1), r.length(20 * 8), quiet=True)
        return fit(trainer, PairLoader(batch), squared_error, [look])


MEASURED = (
    "step loss grad_norm epoch lr weight_decay images_per_s data_share memory_mb seconds_left"
)


def test_a_log_says_all(tmp_path):
    "Every field of a row, and the time left of *this* call."
    line(tmp_path, max_steps=25)

    rows = read_log(tmp_path)
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25]
    for row in rows:
        assert set(row) == set(MEASURED.split())
        assert 0 <= row["data_share"] <= 1 and row["memory_mb"] > 10
        assert row["weight_decay"] == Run.weight_decay
    assert rows[0]["seconds_left"] > 0
    assert rows[-1]["seconds_left"] == 0, "25 steps were asked for, not 40"


def test_tensorboard_too(tmp_path):
    "Scalars and pictures, also of a run that was continued; no picture in the JSON."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    line(tmp_path, tensorboard=True, max_steps=25)
    line(tmp_path, tensorboard=True)

    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    rows = read_log(tmp_path)
    losses = [(e.step, pytest.approx(e.value, rel=1e-5)) for e in events.Scalars("loss")]
    assert losses == [(row["step"], row["loss"]) for row in rows]
    views = events.Images("view")
    assert [(e.step, e.height, e.width) for e in views] == [(20, 4, 6), (40, 4, 6)]
    assert not any("view" in row for row in rows)


@pytest.mark.parametrize("value", [0.0, 0.05])
def test_weight_decay_may_be_zero(tmp_path, value):
    "The official code ends in KeyError: 'lr_scale'."
    line(tmp_path, weight_decay=value, steps=10)
    assert read_log(tmp_path)[-1]["weight_decay"] == value


def test_a_warm_up_without_epochs_of_its_own(tmp_path):
    "warmup_epochs=0 with warmup_steps > 0: the official code asserts on it."
    line(tmp_path, warmup_epochs=0, warmup_steps=4, log_every=1, steps=8)
    assert [r["lr"] for r in read_log(tmp_path)][:4] == pytest.approx([0, 1e-2 / 3, 2e-2 / 3, 1e-2])


def test_a_warm_up_longer_than_the_run_is_said_and_cut(tmp_path, capsys):
    line(tmp_path, warmup_steps=101, log_every=1, steps=8)
    said = capsys.readouterr().err
    assert "as long as the 8 steps" in said and "only rises" in said
    assert [r["lr"] for r in read_log(tmp_path)] == pytest.approx([1e-4 * n for n in range(8)])


@pytest.mark.slow
def test_two_quick_sigterms_save(tmp_path):
    """A cluster signals torchrun and its workers, and torchrun passes it on.

    The second signal must not throw the work away.
    """
    process = crawling_run(tmp_path, 5, checkpoint_every=1000)
    wait_until(lambda: step_of(tmp_path) >= 5, "step 5", process.is_alive)
    for _ in range(3):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.004)
    process.join(30)
    assert process.exitcode and load_checkpoint(tmp_path, "tokenizer")["step"] >= 5


def test_the_folder_is_not_poisoned_by_a_refused_command(tmp_path):
    "config.json was deleted: the checkpoint knows the recipe, and the right one goes on."
    line(tmp_path, max_steps=20)
    (tmp_path / "config.json").unlink()
    with pytest.raises(BeitError, match="seed"):
        line(tmp_path, seed=7)
    with pytest.raises(BeitError, match="no-resume"):
        line(tmp_path, resume=False)
    line(tmp_path)
    assert load_checkpoint(tmp_path)["step"] == 40


def test_milestones_are_kept_between_checkpoints(tmp_path):
    line(tmp_path, checkpoint_every=4, milestone_every=6, keep_checkpoints=1, steps=24)
    names = sorted(p.stem for p in (tmp_path / "checkpoints").glob("step-*.pt"))
    assert names == [f"step-{n:07d}" for n in (6, 12, 18, 24)]


def test_a_dead_scaler_stops_the_run(tmp_path, monkeypatch):
    "fp16 steps that overflow are the scaler's business, but not if every step does."
    from beit_nb.engine import optim, training

    monkeypatch.setattr(optim, "pick_precision", lambda precision, device: None)
    made = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp,
        "GradScaler",
        lambda device, enabled: made(device, init_scale=4.0, backoff_factor=0.25, enabled=True),
    )
    update = training.update_weights

    def overflow(model, optimizer, scaler, clip):
        next(model.parameters()).grad.fill_(float("nan"))
        return update(model, optimizer, scaler, clip)

    monkeypatch.setattr(training, "update_weights", overflow)
    with pytest.raises(FloatingPointError):
        line(tmp_path)
    assert list(tmp_path.glob("nonfinite-step-*.json"))
