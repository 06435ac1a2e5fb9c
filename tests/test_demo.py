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
from beit_nb.demo import STAGES, arm_recipes, arm_run, best_rates, demo, pretrain_recipe, spread
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


def test_no_training_is_only_warm_up():
    "The rehearsal's are so short that their presets' warm-up would be all of them."
    for plan in (DemoPlan(), DemoPlan(**QUICK)):
        for recipe in (pretrain_recipe(plan), *arm_recipes(plan).values()):
            assert 4 * recipe.warmup_steps <= recipe.steps
    assert pretrain_recipe(DemoPlan()).warmup_steps == 60


def test_arms_differ_in_nothing_else():
    plan = DemoPlan("x", longer=2)
    arms = arm_recipes(plan)

    assert list(arms) == list(ARMS)
    alike = dict(init="", layer_decay=None)
    assert replace(arms["pretrained"], **alike) == arms["scratch_equal_steps"]
    equal = arms["scratch_equal_steps"]
    longer = replace(equal, steps=2 * plan.finetune_steps, eval_every=2 * equal.eval_every)
    assert arms["scratch_best"] == longer
    run = arm_run(plan, "pretrained", 7e-4, 2)
    assert (run.lr, run.seed, run.out) == (7e-4, 2, "x/finetune/pretrained-lr0.0007-draw2")


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


def test_rates_that_were_found_are_not_looked_for_again(tmp_path, monkeypatch):
    "Of one rate nothing is to be chosen; of three, the best on validation digits."
    tried = []

    def fine_tune_all(recipes):
        tried.extend(recipes)
        return [{"accuracy": {3e-4: 0.2, 7e-4: 0.9, 1.5e-3: 0.4}[r.lr]} for r in recipes]

    monkeypatch.setattr("beit_nb.demo.fine_tune_all", fine_tune_all)

    found = best_rates(DemoPlan(str(tmp_path)))
    assert found == {arm: rates[0] for arm, rates in FOUND.items()} and tried == []
    chosen = best_rates(DemoPlan(str(tmp_path), **THOROUGH))
    assert chosen == dict.fromkeys(ARMS, 7e-4) and len(tried) == 9
    assert {r.split for r in tried} == {"val"} and {r.seed for r in tried} == {0}


def test_spread():
    assert spread([1.0, 3.0]) == dict(mean=2.0, std=2**0.5, runs=[1.0, 3.0])
    assert spread([0.5])["std"] == 0


REHEARSAL = """
import sys
sys.path.insert(0, {tests!r})
from helpers_demo import small_demo
if __name__ == "__main__":  # a fork server reads this file too
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
