"The main job: it can be stopped, goes on, and never shows the figures of another demo."

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import refused
from helpers_demo import STAGE_FIGURES, count_calls
from helpers_processes import PATIENCE, run, wait_until

from beit_nb import BeitError
from beit_nb.arms import plan_run
from beit_nb.demo import (
    STAGES,
    best_rates,
    demo,
    demo_study,
    finetune_stage,
    pretrain_recipe,
    run_arms,
    spread,
)
from beit_nb.demo_stages import ARMS, FOUND, QUICK, THOROUGH, DemoPlan
from beit_nb.engine.log import read_log
from beit_nb.tools import Demo

ENV = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")


def test_a_rehearsal_never_passes_for_the_demo(tmp_path):
    "Refused in one line before any work, in whatever order, and from the command line too."
    quick = DemoPlan(str(tmp_path), **QUICK)
    count_calls(quick, "dvae")
    count_calls(quick, "probe")
    before = sorted(file.name for file in tmp_path.iterdir())

    with pytest.raises(BeitError, match="tokenizer_steps 60 there, 720 now"):
        demo(DemoPlan(str(tmp_path)))
    line = refused("demo", "--out", tmp_path, says=["holds another demo", "--out"])
    refused("demo", "--out", tmp_path, "--quick", "--seed", 1, says="seed 0 there, 1 now")

    assert "60 there" in line
    assert sorted(file.name for file in tmp_path.iterdir()) == before


@pytest.mark.parametrize("stopped_in", ["dvae", "mim"])
def test_a_rehearsal_that_was_stopped_is_nobody_elses(tmp_path, monkeypatch, stopped_in):
    "In its first stage nothing of it is done; its half-trained tokenizer must not be used."

    def stop(plan):
        raise KeyboardInterrupt

    stages = {name: lambda plan: dict(STAGE_FIGURES["dvae"]) for name in STAGES}
    monkeypatch.setattr("beit_nb.demo.STAGES", stages | {stopped_in: stop})
    monkeypatch.setattr("beit_nb.demo.demo_report", lambda *_: None)  # nothing is there to draw
    with pytest.raises(KeyboardInterrupt):
        demo(DemoPlan(str(tmp_path), **QUICK))

    with pytest.raises(BeitError, match="holds another demo .tokenizer_steps 60 there, 720 now"):
        demo(DemoPlan(str(tmp_path)))
    with pytest.raises(KeyboardInterrupt):  # its own plan goes on
        demo(DemoPlan(str(tmp_path), **QUICK))


def test_options_become_a_plan(monkeypatch):
    plans = []
    monkeypatch.setattr("beit_nb.demo.demo", plans.append)

    Demo().run()
    Demo(quick=True, seed=3).run()
    Demo("elsewhere", quick=True).run()
    monkeypatch.setattr("beit_nb.networks.keep_networks", lambda *words: plans.append(words))
    Demo(thorough=True).run()

    assert plans[0] == DemoPlan()
    assert plans[1] == DemoPlan("runs/demo-quick", seed=3, **QUICK)
    assert plans[2] == DemoPlan("elsewhere", **QUICK)
    assert plans[3] == DemoPlan("runs/demo-thorough", **THOROUGH)
    assert plans[4] == ("runs/demo-thorough", "beit demo --thorough") and len(plans) == 5


def fine_tunings(plan, seed=0):
    "Arm -> the recipe of its run with the first of the plan's rates."
    study = demo_study(plan, {arm: rates[:1] for arm, rates in plan.lrs.items()})
    runs = [plan_run(study, arm, "finetune", seed) for arm in study.arms]
    return {arm: run.recipe("runs") for arm, run in zip(reversed(ARMS), runs)}


def test_no_training_is_only_warm_up():
    "The rehearsal's are so short that their presets' warm-up would be all of them."
    for plan in (DemoPlan(), DemoPlan(**QUICK)):
        for recipe in (pretrain_recipe(plan), *fine_tunings(plan).values()):
            assert 4 * recipe.warmup_steps <= recipe.steps
    assert pretrain_recipe(DemoPlan()).warmup_steps == 60


def test_arms_differ_in_nothing_else():
    plan = DemoPlan("x", longer=2, lrs=dict.fromkeys(ARMS, (7e-4,)))
    arms = fine_tunings(plan, seed=2)

    pretrained, scratch, longer = (replace(arms[name], out="") for name in ARMS)
    assert (pretrained.init, pretrained.lr, pretrained.seed) == ("x/pretrain", 7e-4, 2)
    assert replace(pretrained, init="", layer_decay=None) == scratch
    twice = dict(steps=2 * plan.finetune_steps, eval_every=2 * scratch.eval_every)
    assert replace(scratch, **twice) == longer
    assert len({run.out for run in arms.values()}) == 3
    study = demo_study(plan, plan.lrs)
    assert {arm.base for arm in study.arms} == {"scratch_equal_steps, lr 0.0007"}


def test_the_page_grows_while_the_stages_run(tmp_path, monkeypatch):
    "It is there before the first stage, has each part once it is known, and says when it is all."
    seen = []
    stages = {name: lambda plan, name=name: dict(STAGE_FIGURES[name]) for name in STAGES}
    monkeypatch.setattr("beit_nb.demo.STAGES", stages)
    monkeypatch.setattr("beit_nb.demo.demo_report", lambda _, known: seen.append(list(known)))

    demo(DemoPlan(str(tmp_path), **QUICK))

    names = list(STAGES)
    assert seen[:-1] == [names[:i] for i in range(len(names))]
    assert "seconds" in seen[-1] and seen[-1][: len(names)] == names


def test_what_is_done_is_on_the_first_page_and_a_finished_page_is_made_once(tmp_path, monkeypatch):
    seen = []
    stages = {name: lambda plan, name=name: dict(STAGE_FIGURES[name]) for name in STAGES}
    monkeypatch.setattr("beit_nb.demo.STAGES", stages)
    monkeypatch.setattr("beit_nb.demo.demo_report", lambda _, known: seen.append(list(known)))
    plan = DemoPlan(str(tmp_path), **QUICK)
    demo(plan)
    (tmp_path / "probe.json").unlink()
    seen.clear()

    demo(plan)
    demo(plan)

    first, *last = seen
    assert first == list(STAGES)[:-1] and len(last) == 2
    assert all("seconds" in page and set(STAGES) < set(page) for page in last)


def test_rates_that_were_found_are_not_looked_for_again(tmp_path, monkeypatch):
    "Of one rate nothing is to be chosen; of three, the best on validation digits."
    tried = []

    def run_arms(plan, rates, seeds):
        tried.extend((arm, lr, seed) for arm in rates for lr in rates[arm] for seed in seeds)
        accuracy = {3e-4: 0.2, 7e-4: 0.9, 1.5e-3: 0.4}
        return {(arm, lr): [{"accuracy": accuracy[lr]}] for arm in rates for lr in rates[arm]}

    monkeypatch.setattr("beit_nb.demo.run_arms", run_arms)

    found = best_rates(DemoPlan(str(tmp_path)))
    assert found == {arm: rates[0] for arm, rates in FOUND.items()} and tried == []
    chosen = best_rates(DemoPlan(str(tmp_path), **THOROUGH))
    assert chosen == dict.fromkeys(ARMS, 7e-4) and len(set(tried)) == 9
    assert {seed for *_, seed in tried} == {0}
    mixed = DemoPlan(str(tmp_path), lrs=FOUND | {"pretrained": (3e-4, 7e-4)})
    tried.clear()
    assert best_rates(mixed) == found | {"pretrained": 7e-4} and len(tried) == 2


@pytest.mark.slow
def test_a_fine_tuning_that_fails_stops_the_demo_by_name(tmp_path, monkeypatch):
    "And the runs that did finish are kept: the next call reads them."
    plan = DemoPlan(str(tmp_path), finetune_steps=1, draws=1)
    scratch = {arm: rates for arm, rates in plan.lrs.items() if arm != "pretrained"}
    monkeypatch.setattr("beit_nb.experiments.worker_places", lambda jobs: None)  # in this process
    monkeypatch.setattr("beit_nb.demo.worker_places", lambda: [{}])

    with pytest.raises(BeitError, match="finetune-.* failed: .*/pretrain.*the same command"):
        finetune_stage(plan)  # there is no network to start from
    monkeypatch.setattr("beit_nb.running.run_here", None)  # nothing is left to run
    kept = run_arms(plan, scratch | {"pretrained": ()}, [0])

    assert [len(runs) for runs in kept.values()] == [1, 1]
    assert all(0 <= runs[0]["accuracy"] <= 1 for runs in kept.values())


def test_spread():
    assert spread([1.0, 3.0]) == dict(mean=2.0, std=2**0.5, runs=[1.0, 3.0])
    assert spread([0.5])["std"] == 0


REHEARSAL = """
import sys
sys.path.insert(0, {tests!r})
from helpers_demo import small_demo
sys.exit(small_demo({out!r}, pretrain_steps=60, finetune_steps=2))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("quick_starts")
def test_demo_stops_and_continues(tmp_path):
    """Ctrl-C in the middle of the demo.

    The same command ends it, with every figure and a self-contained report.
    """
    out = tmp_path / "demo"
    tests = str(Path(__file__).parent)
    program = tmp_path / "rehearsal.py"
    program.write_text(REHEARSAL.format(tests=tests, out=str(out)))
    words = [sys.executable, program]
    log = out / "pretrain" / "log.jsonl"

    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV
    )
    wait_until(lambda: len(read_log(log.parent)) >= 2, "two rows", lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=PATIENCE)[0]
    last = out / "pretrain" / "checkpoints" / "last.pt"
    stopped = torch.load(last, weights_only=True)["step"]
    again = run(*words, env=ENV)

    assert process.returncode == 130 and "saved; the same command continues" in said, said
    assert "== dvae ==" not in again.stdout and "== mim ==" in again.stdout
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(steps) and 0 < stopped < steps[-1]
    check_metrics(json.loads((out / "metrics.json").read_text()))
    html = (out / "report.html").read_text()
    assert html.count("<img") >= 7 and "https://" not in html and "http://" not in html


def check_metrics(metrics):
    "The keys that users rely on."
    assert {*STAGES, "seconds", "peak_rss_mb"} <= set(metrics)
    assert {"mse", "pixel_variance", "perplexity", "codes_used"} <= set(metrics["dvae"])
    assert {"masked_top1", "best_constant_top1", "images", "seconds"} <= set(metrics["mim"])
    assert {"labels_per_class", "steps", *ARMS} <= set(metrics["finetune"])
    for arm in ARMS:
        assert {"mean", "std", "runs", "steps", "lr"} <= set(metrics["finetune"][arm])
    assert {"labels", "pretrained", "random", "pixels"} <= set(metrics["probe"])
    assert metrics["finished"] is True
    assert metrics["rehearsal"] is True
