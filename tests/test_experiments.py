"The runs of a study: each made once, several at once; what fails stays alone, the rest goes on."

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
from helpers_studies import TINY, Pretender, pretend

from beit_nb import BeitError, experiments
from beit_nb.arms import Arm, plan_run, study_graph, with_inputs
from beit_nb.engine.files import read_json
from beit_nb.experiments import (
    RunProcess,
    finished_metrics,
    run_graph,
    run_study,
    summarize,
    worker_places,
)

CPU = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(experiments.time, "sleep", lambda seconds: None)


def pretending(monkeypatch, **options):
    boss = Pretender(**options)
    monkeypatch.setattr(experiments, "RunProcess", boss)
    return boss


def without_seconds(record):
    return record | {
        "runs": {n: r | {"seconds": 0} for n, r in record["runs"].items()},
    }


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


def test_what_fails_stays_alone(tmp_path, monkeypatch, capsys):
    lost = plan_run(TINY, TINY.arm("half"), "pretrain", 0).id
    boss = pretending(monkeypatch, fails=[lost])

    record = run_study(TINY, tmp_path, seeds=2, jobs=2)

    states = [run["state"] for run in record["runs"].values()]
    assert (states.count("finished"), states.count("failed"), states.count("blocked")) == (10, 1, 1)
    assert record["runs"][lost]["reason"] == "the disk is full"
    assert f"{lost} failed in 1 s: the disk is full" in capsys.readouterr().out
    rows = {row["arm"]: row for row in record["summary"]}
    assert (rows["half"]["n"], rows["half"]["pairs"]) == (1, 1)
    assert record["values"]["half"]["accuracy"][0] is None

    boss.fails = []  # the disk has room again
    boss.made.clear()
    again = run_study(TINY, tmp_path, seeds=2, jobs=2, quiet=True)

    assert len(boss.made) == 2 and again["summary"][1]["n"] == 2


@pytest.mark.parametrize("stop_at", [0, 1, 5, 11])
def test_a_stopped_study_ends_as_if_nobody_had_stopped_it(tmp_path, monkeypatch, stop_at):
    pretending(monkeypatch)
    never_stopped = run_study(TINY, tmp_path / "a", seeds=2, jobs=2, quiet=True)
    boss = pretending(monkeypatch, stop_at=stop_at)
    with pytest.raises(KeyboardInterrupt):
        run_study(TINY, tmp_path / "b", seeds=2, jobs=2, quiet=True)
    assert len(boss.made) == stop_at and boss.at_work == 0

    boss = pretending(monkeypatch)
    resumed = run_study(TINY, tmp_path / "b", seeds=2, jobs=2, quiet=True)

    assert len(boss.made) >= 12 - stop_at
    assert without_seconds(resumed) == without_seconds(never_stopped)
    assert read_json(tmp_path / "b" / "study.json") == resumed


def test_more_seeds_and_arms_take_what_is_there(tmp_path, monkeypatch):
    boss = pretending(monkeypatch)
    run_study(TINY, tmp_path, seeds=1, jobs=2, quiet=True)
    boss.made.clear()

    wider = replace(TINY, arms=(*TINY.arms, Arm("all", {"pretrain": {"num_mask_patches": 60}})))
    record = run_study(wider, tmp_path, seeds=[0, 1], jobs=2, quiet=True)

    assert len(boss.made) == 2 + 8  # of the new arm, and of the new seed
    assert record["runs"][boss.made[0]]["seconds"] == 1.0
    run_study(wider, tmp_path, seeds=[0, 1], jobs=2, quiet=True)
    assert len(boss.made) == 10


def test_study_json_is_enough(tmp_path, monkeypatch):
    "The folders of the runs are gone: what they came to is kept, and nothing of it is made again."
    boss = pretending(monkeypatch)
    whole = run_study(TINY, tmp_path / "whole", seeds=3, jobs=2, quiet=True)
    run_study(TINY, tmp_path / "parts", seeds=2, jobs=2, quiet=True)
    shutil.rmtree(tmp_path / "parts" / "runs")
    boss.made.clear()

    parts = run_study(TINY, tmp_path / "parts", seeds=3, jobs=2, quiet=True)

    assert sorted(boss.made) == sorted(study_graph(TINY, [2]))
    assert parts == whole  # the seconds of the earlier call too
    shutil.rmtree(tmp_path / "parts" / "runs")
    report = run_study(TINY, tmp_path / "parts", seeds=3, jobs=0, quiet=True)
    assert report == whole and len(boss.made) == 6


@pytest.mark.parametrize("what", ["version", "arms", "figure", "text", "cut", "preset"])
def test_what_study_json_holds_of_others_is_made_again(tmp_path, monkeypatch, what):
    boss = pretending(monkeypatch)
    record = run_study(TINY, tmp_path, seeds=1, jobs=2, quiet=True)
    shutil.rmtree(tmp_path / "runs")
    boss.made.clear()
    if what == "version":
        record["version"] = "0.0"
    elif what == "arms":
        record["study"]["arms"][1]["changes"]["pretrain"]["num_mask_patches"] = 31
    elif what == "preset":  # some run's fields were others, so it had another name
        del record["runs"][list(record["runs"])[0]]
    elif what == "cut":
        del record["values"]["half"]
    else:
        record["values"]["half"]["accuracy"] = ["0.9" if what == "text" else None]
    (tmp_path / "study.json").write_text(json.dumps(record))

    run_study(TINY, tmp_path, seeds=1, jobs=2, quiet=True)

    assert sorted(boss.made) == sorted(study_graph(TINY, [0]))


def test_the_report_alone_runs_nothing(tmp_path, monkeypatch):
    boss = pretending(monkeypatch)

    record = run_study(TINY, tmp_path, seeds=1, jobs=0, quiet=True)

    assert boss.made == [] and all(r["state"] != "finished" for r in record["runs"].values())
    assert [row["n"] for row in record["summary"]] == [0, 0, 0]


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
    "changes, what",
    [
        ({"name": "other"}, "name"),
        ({"scale": "huge", "stages": TINY.stages | {"probe": ("nano", {})}}, "scale and stages"),
    ],
)
def test_another_study_is_refused_before_any_run(tmp_path, monkeypatch, changes, what):
    "So that no record takes the place of another's. More arms or seeds are the same study."
    boss = pretending(monkeypatch)
    run_study(TINY, tmp_path, seeds=1, jobs=2, quiet=True)
    before = (tmp_path / "study.json").read_bytes()
    boss.made.clear()

    says = f"holds another study .tiny at , with other {what}.; give this one another --out"
    with pytest.raises(BeitError, match=says):
        run_study(replace(TINY, **changes), tmp_path, seeds=1)

    assert boss.made == [] and (tmp_path / "study.json").read_bytes() == before


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
    monkeypatch.setattr(experiments.torch.cuda, "device_count", lambda: gpus)
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
        monkeypatch.setattr(experiments, "WORKER", code.format(status=status))
        worker = RunProcess(run, tmp_path, {"PLACE": "here"})
        worker.process.wait(timeout=60)
        outcomes.append(worker.outcome())

    assert [outcome.state for outcome in outcomes] == ["failed", "failed"]
    assert "['tokenizer', 'nano', '--seed', '0'" in outcomes[0].reason
    assert outcomes[0].reason.endswith("here") and run.id in outcomes[0].reason


def test_who_is_stopped_stops_its_workers(tmp_path, monkeypatch):
    started = []

    class Seen(RunProcess):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(self.process)

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "WORKER", "import time; time.sleep(100)")
    monkeypatch.setattr(experiments, "RunProcess", Seen)
    monkeypatch.setattr(experiments.time, "sleep", interrupt)

    with pytest.raises(KeyboardInterrupt):
        run_study(TINY, tmp_path, seeds=2, jobs=2, quiet=True)

    assert [process.poll() for process in started] == 2 * [-signal.SIGTERM]


@pytest.mark.slow  # it imports torch
def test_a_worker_notices_that_whoever_started_it_is_gone():
    "As after kill -9: its own program asks who its parent is."
    slow_main = "from beit_nb import cli; import time; cli.main = lambda words: time.sleep(300); "
    program = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {slow_main + experiments.WORKER!r}])\n"
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


@pytest.mark.slow
def test_real_runs_stopped_between_and_within(tmp_path, monkeypatch):
    "Without workers, in this process: the figures of a study that was stopped twice are the same."
    study = replace(TINY, arms=TINY.arms[:1])
    monkeypatch.setattr(experiments, "worker_places", lambda jobs: None)
    whole = run_study(study, tmp_path / "a", seeds=1, quiet=True)
    run_here = experiments.run_here
    count = iter(range(100))

    def stopped(run, runs):
        number = next(count)
        if number == 1:
            raise KeyboardInterrupt
        if number == 3:
            half = replace(run, changes={**run.changes, "max_steps": 1})
            run_here(half, runs)  # one step of it, as if stopped then
            raise KeyboardInterrupt
        return run_here(run, runs)

    monkeypatch.setattr(experiments, "run_here", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_study(study, tmp_path / "b", seeds=1, quiet=True)
    parts = run_study(study, tmp_path / "b", seeds=1, quiet=True)

    assert parts["values"] == whole["values"] and len(whole["runs"]) == 3
    losses = {n: r["figures"].get("loss") for n, r in whole["runs"].items()}
    assert losses == {n: r["figures"].get("loss") for n, r in parts["runs"].items()}
    assert sum(loss is not None for loss in losses.values()) >= 1


def test_summary():
    values = {
        "quarter": {"accuracy": [0.5, 0.6, 0.7]},
        "half": {"accuracy": [0.53, 0.63, 0.74]},
        "scratch": {"accuracy": [0.5, None, 0.6]},
    }

    base, half, scratch = summarize(TINY, values)

    assert base["mean"] == pytest.approx(60) and base["sd"] == pytest.approx(10)
    assert base["paper"] == 80.0 and "difference" not in base
    assert half["difference"] == pytest.approx(10 / 3) and half["base"] == "quarter"
    assert half["paper_difference"] == 3.0 and half["verdict"] == "reproduced"
    assert (scratch["n"], scratch["pairs"]) == (2, 2)
    assert scratch["paper_difference"] is None and scratch["verdict"] == "undecided"
    assert json.dumps([base, half, scratch])
