"A study that nobody waits for, and workers that train nothing."

import json
from pathlib import Path

from beit_nb import running
from beit_nb.arms import Arm, Measure, Study
from beit_nb.limits import as_config
from beit_nb.running import Outcome

FEW = {"data": "embedded:digits", "warmup_steps": 2}
TINY = Study(
    name="tiny",
    question="Hide a quarter of the patches, or half?",
    stages={
        "tokenizer": ("nano", FEW | {"steps": 4, "width": 16}),
        "pretrain": (
            "nano",
            FEW | {"steps": 3, "watch_every": None, "batch_size": 8, "depth": 1},
        ),
        "finetune": ("nano", FEW | {"steps": 2, "eval_every": 2, "depth": 1, "split": "test"}),
    },
    arms=(
        Arm("quarter", {"pretrain": {"num_mask_patches": 16}}, {"accuracy": 80.0}),
        Arm("half", {"pretrain": {"num_mask_patches": 32}}, {"accuracy": 83.0}),
        Arm("scratch", without=("pretrain",)),
    ),
    measures=(Measure("accuracy", "finetune", "accuracy"),),
)


def pretend(run, runs, **figures):
    "Leave in a folder what a finished run leaves."
    recipe = run.recipe(runs)
    folder = Path(recipe.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(as_config(run.command, recipe)))
    (folder / "metrics.json").write_text(json.dumps({"finished": True} | figures))


class Pretender:
    """In the place of `RunProcess`: figures from a formula, done at the third look.

    `made`: the names of all runs in the order in which they began. `most`: of those that were at
    work at once. `fails`: names that fail; `stop_at`: the number of the run at which somebody
    presses Ctrl-C.
    """

    def __init__(self, fails=(), stop_at=None):
        self.fails = fails
        self.stop_at = stop_at
        self.made = []
        self.places = []
        self.at_work = self.most = 0

    def __call__(self, run, runs, place):
        if len(self.made) == self.stop_at:
            raise KeyboardInterrupt
        self.made.append(run.id)
        self.places.append(place)
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        return PretendedRun(self, run, runs, place)


class PretendedRun:
    def __init__(self, boss, run, runs, place):
        self.boss, self.run, self.runs, self.place = boss, run, runs, place
        self.process = self  # asked to end where the study is stopped
        self.looks = 0

    def terminate(self):
        self.boss.at_work -= 1

    def join(self):
        pass

    def outcome(self):
        self.looks += 1
        if self.looks < 3:
            return None
        self.boss.at_work -= 1
        if self.run.id in self.boss.fails:
            return Outcome("failed", "the disk is full", 1.0)
        seed = self.run.changes["seed"]
        hidden = [s.changes["num_mask_patches"] for s in self.run.inputs.values() if s.inputs]
        pretend(self.run, self.runs, accuracy=0.5 + 0.01 * sum(hidden) + 0.07 * seed**2)
        return Outcome("finished", "", 1.0)


def pretending(monkeypatch, **options):
    "A `Pretender` in the place of `RunProcess`, and nobody waits between its looks."
    boss = Pretender(**options)
    monkeypatch.setattr(running.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(running, "RunProcess", boss)
    return boss
