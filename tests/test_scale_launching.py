"Programs and functions in several processes, and what is computed about them."

import subprocess

import pytest
import torch

from beit_nb import BeitError
from beit_nb.engine.processes import rank, world_size
from beit_nb.scale import launching
from beit_nb.scale.launching import (
    bytes_on_the_wire,
    last_words,
    local_bytes,
    memory_breakdown,
    run_distributed,
    scaled_lr,
    torchrun,
)


def squares(x):
    return [n * n for n in x]


def job(start, data):
    "Uses another function, torch's collectives and what the head of a job imports."
    total = torch.tensor(float(start + rank()))
    dist.all_reduce(total)  # noqa: F821
    shares = squares(data)[rank() :: world_size()]
    return dict(rank=rank(), world=world_size(), total=total.item(), shares=shares)


def fails_on_rank_1():
    if rank() == 1:
        raise ValueError("rank 1 has nothing")
    dist.barrier()  # noqa: F821


@pytest.mark.slow
def test_a_function_in_several_processes():
    results = run_distributed(job, 10, [1, 2, 3], needs=(squares,), processes=2)

    assert [r["rank"] for r in results] == [0, 1] and {r["world"] for r in results} == {2}
    assert {r["total"] for r in results} == {21.0}
    assert [r["shares"] for r in results] == [[1, 9], [4]]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_starts")
def test_a_failure_in_one_process_is_raised_with_its_words():
    with pytest.raises(RuntimeError, match="ended with exit status 1(.|\n)*rank 1 has nothing"):
        run_distributed(fails_on_rank_1)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_starts")
def test_a_program_and_its_arguments(tmp_path):
    program = tmp_path / "words.py"
    program.write_text("import os, sys; print(os.environ['OMP_NUM_THREADS'], *sys.argv[1:])")

    assert torchrun(program, "two words", 3, processes=1).strip() == "1 two words 3"


@pytest.mark.slow
@pytest.mark.usefixtures("quick_starts")
def test_a_failing_program_says_why(tmp_path):
    program = tmp_path / "bad.py"
    program.write_text("raise ValueError('nothing here')")

    with pytest.raises(RuntimeError, match="exit status 1(.|\n)*ValueError: nothing here$"):
        torchrun(program, processes=1)


class SlowRun:
    "A process that does not end in time."

    returncode = None

    def __init__(self, words, **options):
        self.words = words
        self.terminated = 0
        SlowRun.last = self

    def communicate(self, timeout=None):
        if not self.terminated:
            raise subprocess.TimeoutExpired(self.words, timeout)

    def terminate(self):
        self.terminated += 1


def test_what_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(launching.subprocess, "Popen", SlowRun)

    with pytest.raises(subprocess.TimeoutExpired):
        torchrun("beit_nb", "pretrain", processes=8, restarts=3, timeout=1)

    words = " ".join(SlowRun.last.words)
    assert SlowRun.last.terminated == 1
    assert "--nproc-per-node=8 --max-restarts=3 -m beit_nb pretrain" in words


def test_the_last_words_are_the_processes_own():
    stderr = "Traceback\nValueError: mine\nW01 torch/distributed/elastic/x.py failed\nmore\n"

    assert last_words(stderr) == "Traceback\nValueError: mine"
    assert len(last_words("x" * 5000 + "\n")) == 2000


@pytest.mark.parametrize(
    "world,parallel,sent", [(1, "ddp", 0), (4, "ddp", 150), (4, "fsdp", 225), (1000, "ddp", 199.8)]
)
def test_bytes_on_the_wire(world, parallel, sent):
    assert bytes_on_the_wire(100, world, parallel) == pytest.approx(sent)


def test_memory_of_a_model_alone():
    model = torch.nn.Linear(10, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    before = memory_breakdown(model, optimizer)
    model(torch.randn(1, 10)).sum().backward()
    optimizer.step()

    assert before == dict(weights=440, gradients=0, adam=0)
    assert memory_breakdown(model, optimizer) == dict(weights=440, gradients=440, adam=880)
    assert local_bytes([torch.zeros(3), torch.zeros(2, dtype=torch.int64)]) == 28


@pytest.mark.parametrize("rule,lr", [("root", 7.5e-4), ("linear", 3.75e-4)])
def test_rules_for_the_learning_rate(rule, lr):
    assert scaled_lr(1.5e-3, 512, 2048, rule) == pytest.approx(lr)


def test_an_unknown_rule_is_refused():
    with pytest.raises(BeitError, match="unknown rule 'cube'; choose root, linear$"):
        scaled_lr(1e-3, 2, 1, "cube")
