"The parts of a step: which samples it takes, how a batch is cut, the update, and stopping."

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from itertools import repeat
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_processes import PATIENCE
from quick_starts import forked_starts
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor, nn

from beit_nb import BeitError
from beit_nb.engine.steps import (
    GracefulStop,
    StepLoader,
    batch_indices,
    leave_signals,
    load_ahead,
    map_batch,
    shuffled,
    split_batch,
    update_weights,
)

SIZES = [(6, 1), (6, 2), (6, 3), (12, 4), (24, 8)]


@pytest.mark.parametrize("batch, world", SIZES)
@pytest.mark.parametrize("length", [24, 25, 31, 47, 48, 97])
@pytest.mark.parametrize("chunk", [None, 7, 1000])
def test_every_sample_once_for_any_number_of_processes(length, batch, world, chunk):
    """All processes make the same number of steps (the official code can make one too many), no
    batch is short, nothing comes twice in an epoch."""
    starts = None if chunk is None else np.arange(0, length, chunk)
    per_epoch = length // batch
    last = 3 * per_epoch

    alone = list(batch_indices(length, batch, 1, 0, last, chunk_starts=starts))
    ranks = [
        list(batch_indices(length, batch, 1, 0, last, rank, world, starts)) for rank in range(world)
    ]

    assert all(len(r) == last and all(len(b) == batch // world for b in r) for r in ranks)
    for epoch in range(3):
        steps = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        keys = [k for r in ranks for b in r[steps] for k in b]
        assert len(set(keys)) == len(keys) == per_epoch * batch > length - batch
        assert {k // length for k in keys} == {epoch}
    for step in range(last):
        assert sorted(k for r in ranks for k in r[step]) == sorted(alone[step])
    for first in (1, per_epoch, 2 * per_epoch + 1):
        resumed = list(batch_indices(length, batch, 1, first, last, chunk_starts=starts))
        assert resumed == alone[first:]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_repeated_pictures_are_handed_out_as_by_timm(world, monkeypatch):
    "In order, each three times, copy by copy to the processes, for as long as an epoch is."
    monkeypatch.setattr("beit_nb.engine.steps.shuffled", lambda n, rng, starts: np.arange(n))
    ours, theirs = [], []
    for rank in range(world):
        batches = batch_indices(48, 12, 0, 0, 8, rank, world, repeats=3)
        ours.append([key for batch in batches for key in batch])
        sampler = RepeatAugSampler(range(48), world, rank, shuffle=False, selected_round=0)
        theirs.append(list(sampler))

    for mine, of_timm in zip(ours, theirs):
        assert [key % 48 for key in mine] == 2 * of_timm  # two epochs
    keys = [key for mine in ours for key in mine]
    assert len(set(keys)) == len(keys) == 96  # no copy draws what another has drawn
    alone = list(batch_indices(48, 12, 5, 0, 8, repeats=3))
    assert list(batch_indices(48, 12, 5, 3, 8, repeats=3)) == alone[3:]


def test_every_epoch_and_every_seed_has_a_shuffle_of_its_own():
    def epoch(seed, e):
        return [k % 48 for b in batch_indices(48, 12, seed, 4 * e, 4 * e + 4) for k in b]

    orders = [epoch(7, 0), epoch(7, 1), epoch(8, 0)]

    assert all(sorted(order) == list(range(48)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_shuffle_of_chunks():
    "A permutation that stays in a window of `mix` chunks, new in each epoch."
    starts = np.arange(0, 1000, 10)

    order = shuffled(1000, np.random.default_rng(0), starts, mix=20)
    other = shuffled(1000, np.random.default_rng(1), starts, mix=20)

    assert sorted(order) == list(range(1000)) and (order != other).any()
    for window in range(5):
        assert len(set(order[200 * window : 200 * (window + 1)] // 10)) == 20
    place = np.empty(1000)
    place[order] = np.arange(1000)
    assert abs(np.corrcoef(np.arange(1000), place)[0, 1]) < 0.3


class Pair(NamedTuple):
    x: Tensor
    y: Tensor | None = None


@pytest.mark.parametrize("size, lengths", [(4, [4, 4, 2]), (5, [5, 5]), (10, [10]), (99, [10])])
def test_a_batch_is_cut_and_nothing_is_lost(size, lengths):
    batch = Pair(torch.arange(20).reshape(10, 2), torch.arange(10))

    parts = split_batch(batch, size)

    assert [len(part.x) for part in parts] == lengths
    assert all(isinstance(part, Pair) for part in parts)
    assert torch.equal(torch.cat([part.x for part in parts]), batch.x)
    assert torch.equal(torch.cat([part.y for part in parts]), batch.y)


def test_a_field_that_is_none_stays_none():
    batch = Pair(torch.ones(4))
    assert map_batch(lambda x: x + 1, batch).y is None
    assert [part.y for part in split_batch(batch, 2)] == [None, None]


def test_a_loader_that_only_has_steps_gives_the_simple_answers():
    class Simple(StepLoader):
        def steps(self, first, last):
            yield from range(first, last)

    loader = Simple()
    loader.load_state_dict({"of": "another"})
    assert loader.new_unreadable == 0
    assert loader.state_dict() == loader.agree() == {}
    assert loader.sources(3) == []


@pytest.mark.parametrize("clip_grad", [None, 0.0, 0.5, 1e6])
def test_the_update_is_torchs_own(clip_grad):
    "Clipped by the norm of the whole gradient; None and 0: not clipped."
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    theirs = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(8, 3)
    y = 9 * torch.randn(8, 1)
    F.mse_loss(ours(x), y).backward()
    F.mse_loss(theirs(x), y).backward()
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    norm = update_weights(ours, torch.optim.AdamW(ours.parameters()), scaler, clip_grad)
    length = torch.cat([p.grad.flatten() for p in theirs.parameters()]).norm()
    if clip_grad:
        nn.utils.clip_grad_norm_(theirs.parameters(), clip_grad)
    torch.optim.AdamW(theirs.parameters()).step()

    torch.testing.assert_close(norm, length)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(p.grad is None for p in ours.parameters())


def test_a_signal_becomes_a_flag():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with GracefulStop() as stop:
        assert not stop.asked
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.asked
        stop.asked_at -= 2  # as if two seconds had passed
        os.kill(os.getpid(), signal.SIGTERM)  # a cluster may say it again and again
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_workers_leave_signals_alone():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        leave_signals()
        for number in before:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def doubled(order):
    "What a worker loads in these tests: two tensors, a word, and nothing."
    return Loaded(torch.full((3, order), order), torch.tensor(order / 2), f"no. {order}", None)


class Loaded(NamedTuple):
    pixels: Tensor
    half: Tensor
    name: str
    nothing: None


def fails_at_two(order):
    if order == 2:
        raise BeitError("two is no picture; give another")
    return order


def breaks_at_two(order):
    return order / (order - 2)


def refuses_to_travel(order):
    class Local(Exception):
        "Nobody else knows this kind."

    raise Local("a local word")


def dies_at_two(order):
    if order == 2:
        os.kill(os.getpid(), signal.SIGUSR2)
    return order


STARTS = ["fork", *(pytest.param(m, marks=pytest.mark.slow) for m in ("spawn", "forkserver"))]


@pytest.fixture(params=STARTS)
def start_method(request, monkeypatch):
    "New processes are started in this way, a single worker of each kind by a new interpreter."
    context = multiprocessing.get_context(request.param)
    monkeypatch.setattr(multiprocessing, "get_context", lambda: context)
    single = request.node.callspec.params.get("workers") == 1
    with nullcontext() if request.param == "fork" or single else forked_starts():
        yield request.param
    forkserver._forkserver._stop()  # the next test has a server of its own


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_loaded_ahead_is_what_is_loaded_here(start_method, workers):
    orders = [0, 1, 5, 2, 3, 1, 0, 7]

    ahead = list(load_ahead(doubled, orders, workers))

    for order, got in zip(orders, ahead, strict=True):
        assert isinstance(got, Loaded) and got.name == f"no. {order}" and got.nothing is None
        assert torch.equal(got.pixels, torch.full((3, order), order)) and got.half == order / 2
        got.pixels.add_(1)  # ours, to be written on
    assert not multiprocessing.active_children()


def test_what_a_worker_raises_is_raised_here(start_method):
    loaded = load_ahead(fails_at_two, [1, 2, 3], 1)
    assert next(loaded) == 1
    with pytest.raises(BeitError, match="^two is no picture; give another$"):
        next(loaded)
    with pytest.raises(ZeroDivisionError) as caught:
        list(load_ahead(breaks_at_two, [1, 2, 3], 2))
    assert "in breaks_at_two" in "".join(caught.value.__notes__)
    with pytest.raises(RuntimeError, match="a local word"):
        list(load_ahead(refuses_to_travel, [1], 1))
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_one_line(start_method):
    loaded = load_ahead(dies_at_two, [1, 1, 2, 3, 4, 5], 2)
    assert [next(loaded), next(loaded)] == [1, 1]
    with pytest.raises(BeitError, match="killed by SIGUSR2, .*--workers .*--memory"):
        next(loaded)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_workers_killed_at_random_moments():
    "Whichever it is and whenever, it is one error, and nobody is left."
    for _ in range(10):
        loaded = load_ahead(doubled, repeat(5), workers=3)
        next(loaded)
        victim = random.choice(multiprocessing.active_children())
        began = time.monotonic()
        timer = threading.Timer(random.uniform(0, 0.02), victim.kill)
        timer.start()
        with pytest.raises(BeitError, match="killed by SIGKILL"):
            for got in loaded:
                assert torch.equal(got.pixels, torch.full((3, 5), 5))
        timer.join()
        assert time.monotonic() - began < 10
        assert not multiprocessing.active_children()


def test_a_loop_that_ends_early_leaves_nobody():
    loaded = load_ahead(doubled, range(10**6), workers=2)
    next(loaded)
    loaded.close()
    assert not multiprocessing.active_children()


def no_bigger_files(order):
    "From now on this worker can write 4 kB and no more, as if its memory were full."
    if order == 2:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))
    return torch.zeros(10_000)


def test_no_memory_to_share_is_one_line(start_method):
    loaded = load_ahead(no_bigger_files, [1, 2, 3], 1)
    assert len(next(loaded)) == 10_000
    line = "no memory to share .*File too large.*--workers 0.*--memory"
    with pytest.raises(BeitError, match=line):
        next(loaded)


def test_no_process_to_be_had_is_one_line(monkeypatch):
    def refuse(process):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.Process, "start", refuse)
    monkeypatch.setattr(multiprocessing.get_context("fork").Process, "start", refuse)
    with pytest.raises(BeitError, match="cannot start a loader worker .*unavailable.*--workers"):
        list(load_ahead(doubled, [1], 1))


ORPHANS = """
import multiprocessing, os, signal, sys, time
from beit_nb.engine.steps import load_ahead
from test_engine_steps import doubled

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    loaded = load_ahead(doubled, range(10**6), workers=2)
    next(loaded)
    print("at work", flush=True)
    how = sys.argv[2]
    if how == "exit":
        sys.exit(3)
    if how == "raise":
        raise KeyError("a defect, whose traceback keeps the generator")
    if how == "_exit":
        os._exit(4)
    time.sleep(60)
"""


RARER = [pytest.param(end, marks=pytest.mark.slow) for end in ("exit", "_exit", signal.SIGSEGV)]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["raise", signal.SIGKILL, signal.SIGTERM, *RARER])
def test_workers_end_with_their_parent(start_method, end, tmp_path):
    "However it ends. The pipe of its output closes when nobody holds it any more."
    program = tmp_path / "orphans.py"
    program.write_text(ORPHANS)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, program, start_method, end if isinstance(end, str) else "wait"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env)
    assert parent.stdout.readline() == b"at work\n"
    began = time.monotonic()
    if not isinstance(end, str):
        parent.send_signal(end)

    parent.communicate(timeout=PATIENCE)

    assert time.monotonic() - began < 30  # its own sleep is 60
