"Runs of a study: each made once, several at once; what fails stays alone, the rest goes on."

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
from helpers_studies import TINY, pretend, pretending

from beit_nb import running
from beit_nb.arms import plan_run, study_graph, with_inputs
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


def test_a_worker_is_the_command_that_anybody_could_type(tmp_path, monkeypatch):
    "Its words, its share of the machine, what it said last; and exit 0 without figures is no end."
    code = "import os, sys; print(sys.argv[1:], os.environ['PLACE']); sys.exit(int({status}))"
    run = plan_run(TINY, TINY.arms[0], "tokenizer", 0)
    outcomes = []
    for status in (0, 2):
        monkeypatch.setattr(running, "WORKER", code.format(status=status))
        worker = RunProcess(run, tmp_path, {"PLACE": "here"})
        worker.process.wait(timeout=60)
        outcomes.append(worker.outcome())

    assert [outcome.state for outcome in outcomes] == ["failed", "failed"]
    assert "['tokenizer', 'nano', '--seed', '0'" in outcomes[0].reason
    assert outcomes[0].reason.endswith("here") and run.id in outcomes[0].reason


@pytest.mark.slow  # it imports torch
def test_a_worker_notices_that_whoever_started_it_is_gone():
    "As after kill -9: its own program asks who its parent is."
    slow_main = "from beit_nb import cli; import time; cli.main = lambda words: time.sleep(300); "
    program = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {slow_main + running.WORKER!r}])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(300)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    child = Path(f"/proc/{parent.stdout.readline().strip()}")
    wait_until(lambda: len(list((child / "task").iterdir())) > 1)  # the thread that watches

    parent.kill()
    parent.wait(timeout=60)

    wait_until(lambda: not child.exists() or not (child / "cmdline").read_bytes())


def wait_until(holds, seconds=120):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        Event().wait(0.1)
