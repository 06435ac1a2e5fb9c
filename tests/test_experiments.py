"A study from its runs to its figures: what is kept, what is taken from there, what is made anew."

import json
import shutil
import signal
import time
from dataclasses import replace

import pytest
from helpers_studies import TINY, pretending

from beit_nb import BeitError, experiments, running
from beit_nb.arms import Arm, plan_run, study_graph
from beit_nb.engine.files import read_json
from beit_nb.experiments import run_study, summarize
from beit_nb.running import RunProcess


def without_seconds(record):
    "A record but for what the clock says, and which call it was that made a run."
    return record | {
        "runs": {n: r | {"seconds": 0, "machine": ""} for n, r in record["runs"].items()},
    }


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


def test_a_call_for_some_arms_and_seeds_leaves_the_others(tmp_path, monkeypatch):
    "They stay as they are, with their seconds, although the folders of their runs are gone."
    boss = pretending(monkeypatch)
    whole = run_study(TINY, tmp_path, seeds=3, jobs=2, quiet=True)
    shutil.rmtree(tmp_path / "runs")
    boss.made.clear()
    some = replace(TINY, arms=TINY.arms[:2])

    assert run_study(some, tmp_path, seeds=2, jobs=2, quiet=True) == whole
    assert boss.made == [] and read_json(tmp_path / "study.json") == whole

    more = run_study(some, tmp_path, seeds=4, jobs=2, quiet=True)

    assert sorted(boss.made) == sorted(study_graph(some, [3]))
    assert {name: more["runs"][name] for name in whole["runs"]} == whole["runs"]
    assert all(run["seconds"] == 1.0 for run in more["runs"].values())
    assert [row["n"] for row in more["summary"]] == [4, 4, 3]
    assert more["values"]["scratch"]["accuracy"] == [*whole["values"]["scratch"]["accuracy"], None]


@pytest.mark.parametrize("what", ["version", "measures", "arm"])
def test_what_cannot_be_compared_does_not_stay(tmp_path, monkeypatch, what):
    pretending(monkeypatch)
    record = run_study(TINY, tmp_path, seeds=2, jobs=2, quiet=True)
    some = replace(TINY, arms=TINY.arms[:2])
    if what == "version":
        record["version"] = "0.0"
    elif what == "measures":
        record["study"]["measures"][0]["key"] = "loss"
    else:  # half was another arm, so of it only what this call makes counts
        record["study"]["arms"][1]["changes"]["pretrain"]["num_mask_patches"] = 31
    (tmp_path / "study.json").write_text(json.dumps(record))

    after = run_study(some, tmp_path, seeds=1, jobs=2, quiet=True)

    if what == "arm":
        assert after["values"]["half"]["accuracy"][1] is None and after["seeds"] == [0, 1]
        assert after["values"]["scratch"] == record["values"]["scratch"]
    else:
        assert list(after["values"]) == ["quarter", "half"] and after["seeds"] == [0]


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

    says = f"holds another study .tiny, with other {what}.; give this one another --out"
    with pytest.raises(BeitError, match=says):
        run_study(replace(TINY, **changes), tmp_path, seeds=1)

    assert boss.made == [] and (tmp_path / "study.json").read_bytes() == before


@pytest.mark.parametrize(
    "place, value",
    [
        ("seeds", None),
        ("seeds", ["0"]),
        ("values", [1]),
        ("values", {"quarter": {"accuracy": 3}}),
        ("runs", []),
        ("study", []),
        ("study", "tiny"),
        ("arms", "all"),
        ("arms", [{"name": "quarter"}]),
        ("arms", [{"nom": "quarter", "changes": {}, "without": []}]),
    ],
)
def test_nothing_is_taken_from_an_edited_file(tmp_path, monkeypatch, place, value):
    "It has the right version, but not the form of a study.json; the study is made, and kept anew."
    boss = pretending(monkeypatch)
    whole = run_study(TINY, tmp_path, seeds=1, quiet=True)
    made = len(boss.made)
    changed = {"study": whole["study"] | {"arms": value}} if place == "arms" else {place: value}
    (tmp_path / "study.json").write_text(json.dumps(whole | changed))

    again = run_study(TINY, tmp_path, seeds=1, quiet=True)

    assert again["values"] == whole["values"] and again["study"] == whole["study"]
    assert len(boss.made) == made  # the runs themselves were all there


def sleep_long(words, environment, said):
    "In the place of a run."
    time.sleep(100)


def test_who_is_stopped_stops_its_workers(tmp_path, monkeypatch):
    started = []

    class Seen(RunProcess):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(self.process)

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "work", sleep_long)
    monkeypatch.setattr(running, "RunProcess", Seen)
    monkeypatch.setattr(running.time, "sleep", interrupt)

    with pytest.raises(KeyboardInterrupt):
        run_study(TINY, tmp_path, seeds=2, jobs=2, quiet=True)

    assert [process.exitcode for process in started] == 2 * [-signal.SIGTERM]


@pytest.mark.slow
def test_real_runs_stopped_between_and_within(tmp_path, monkeypatch):
    "Without workers, in this process: the figures of a study that was stopped twice are the same."
    study = replace(TINY, arms=TINY.arms[:1])
    monkeypatch.setattr(experiments, "worker_places", lambda jobs: None)
    whole = run_study(study, tmp_path / "a", seeds=1, quiet=True)
    run_here = running.run_here
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

    monkeypatch.setattr(running, "run_here", stopped)
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
