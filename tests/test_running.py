"Runs of a study: each made once, several at once; what fails stays alone, the rest goes on."

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
from helpers_studies import TINY, pretend, pretending

from beit_nb import running
from beit_nb.arms import plan_run, run_words, study_graph, with_inputs
from beit_nb.engine.runs import load_checkpoint
from beit_nb.running import RunProcess, finished_metrics, run_graph, worker_places

CPU = {"OMP_NUM_THREADS": "1"}


def test_several_at_once_each_after_what_it_reads(tmp_path, monkeypatch):
    boss = pretending(monkeypatch)
    graph = study_graph(TINY, [0, 1])

    outcomes = run_graph(graph, tmp_path, 3 * [CPU], quiet=True)

    assert boss.most == 3
    assert sorted(boss.made) == sorted(graph) and len(set(boss.made)) == len(boss.made)
    assert {outcome.state for outcome in outcomes.values()} == {"finished"}
    for name in graph:
        for source in graph[name].inputs.values():
            assert boss.made.index(source.id) < boss.made.index(name)


def test_figures_of_another_run_are_refused(tmp_path, monkeypatch):
    boss = pretending(monkeypatch)
    run = plan_run(TINY, TINY.arm("half"), "pretrain", 0)
    pretend(run.inputs["tokenizer"], tmp_path)
    other = replace(run, changes={**run.changes, "lr": 0.5})
    pretend(other, tmp_path)
    (tmp_path / other.id).rename(tmp_path / run.id)

    outcome = run_graph(with_inputs(run), tmp_path, [CPU], quiet=True)[run.id]

    assert outcome.state == "failed" and "holds another run (lr 0.5 there" in outcome.reason
    assert boss.made == []


def test_an_unfinished_run_is_not_finished(tmp_path):
    run = plan_run(TINY, TINY.arms[0], "tokenizer", 0)
    pretend(run, tmp_path, finished=False)

    assert finished_metrics(run, tmp_path) is None


@pytest.mark.parametrize(
    "gpus, seen, jobs, places",
    [
        (0, None, 2, [CPU, CPU]),
        (2, None, None, [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]),
        (2, "4,7", None, [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "7"}]),
        (1, None, 2, 2 * [{"CUDA_VISIBLE_DEVICES": "0"}]),
        (2, None, 0, []),
    ],
)
def test_places(monkeypatch, gpus, seen, jobs, places):
    monkeypatch.setattr(running.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)

    assert worker_places(jobs) == places


def tell(words, environment, said):
    "In the place of a run: its words, its place, and the end that the environment asks for."
    said.write_text(f"{words} {environment['PLACE']}")
    sys.exit(int(environment["STATUS"]))


def test_a_run_has_its_words_and_its_place(tmp_path, monkeypatch):
    "What it said last is the reason; and status 0 without figures is no end."
    run = plan_run(TINY, TINY.arms[0], "tokenizer", 0)
    monkeypatch.setattr(running, "work", tell)
    outcomes = []
    for status in ("0", "2"):
        worker = RunProcess(run, tmp_path, {"PLACE": "here", "STATUS": status})
        worker.process.join(timeout=60)
        outcomes.append(worker.outcome())

    assert [outcome.state for outcome in outcomes] == ["failed", "failed"]
    assert "['tokenizer', 'nano', '--seed', '0'" in outcomes[0].reason
    assert outcomes[0].reason.endswith("here") and run.id in outcomes[0].reason


def test_a_killed_run_says_by_what(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "work", wait_for_a_signal)
    worker = RunProcess(plan_run(TINY, TINY.arms[0], "tokenizer", 0), tmp_path, CPU)
    assert worker.outcome() is None  # at work
    worker.process.kill()
    worker.process.join(timeout=60)

    assert worker.outcome().reason == "its process was killed by SIGKILL"


def wait_for_a_signal(words, environment, said):
    signal.pause()


def test_work_is_the_command_that_anybody_could_type(tmp_path):
    "In an environment of its own, and what it says is in its file."
    said = tmp_path / "said.txt"
    environment = {"OMP_NUM_THREADS": "3", "PATH": "/here", "PYTHONPATH": ""}
    process = running.worker_context().Process(
        target=running.work, args=(["finetune", "nonesuch"], environment, said)
    )
    process.start()
    process.join(timeout=100)

    shell = [sys.executable, "-m", "beit_nb", "finetune", "nonesuch"]
    typed = subprocess.run(shell, capture_output=True, text=True)
    assert process.exitcode == typed.returncode == 2
    assert said.read_text() == typed.stdout + typed.stderr and "nonesuch" in said.read_text()


@pytest.mark.slow
def test_a_run_is_bit_for_bit_that_of_a_new_interpreter(tmp_path):
    "A fork has read torch before it knew its variables; its figures must not depend on it."
    run = plan_run(TINY, TINY.arms[0], "tokenizer", 0)
    for place in ("fork", "new"):
        (tmp_path / place).mkdir()
    worker = RunProcess(run, tmp_path / "fork", CPU)
    worker.process.join(timeout=200)
    words = [sys.executable, "-m", "beit_nb", *run_words(run, tmp_path / "new")]
    subprocess.run(words, env=os.environ | CPU, check=True)

    assert worker.outcome().state == "finished"
    weights = [load_checkpoint(tmp_path / place / run.id)["model"] for place in ("fork", "new")]
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) > 5
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_a_worker_notices_that_whoever_started_it_is_gone(tmp_path):
    "As after kill -9, which leaves nobody the time to tell the workers."
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from beit_nb.arms import StudyRun\n"
        "from beit_nb.running import RunProcess\n"
        "changes = dict(data='embedded:digits', steps=100_000, seed=0)\n"
        "run = StudyRun('tokenizer', 'nano', changes, {})\n"
        "worker = RunProcess(run, Path(sys.argv[1]), {'OMP_NUM_THREADS': '1'})\n"
        "print(worker.process.pid, flush=True)\n"
        "worker.process.join()\n"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    child = Path(f"/proc/{parent.stdout.readline().strip()}")
    wait_until(lambda: list(tmp_path.glob("*/log.jsonl")))  # it trains

    parent.kill()
    parent.wait(timeout=60)

    wait_until(lambda: not child.exists() or not (child / "cmdline").read_bytes())
    assert list(tmp_path.glob("*/checkpoints/*"))  # stopped as after Ctrl-C


def wait_until(holds, seconds=120):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        Event().wait(0.1)
