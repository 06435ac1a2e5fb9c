"`beit ablate`: what it lists, refuses, counts, writes for a cluster, and answers."

import json

import pytest
from helpers import FETCHES, beit, refused, unpainted
from helpers_processes import run_python
from helpers_studies import Pretender

from beit_nb import running
from beit_nb.ablating import depth, study_figure, summary_lines, table_lines
from beit_nb.arms import study_graph
from beit_nb.recipes import recipe_named
from beit_nb.scale.hours import run_flops
from beit_nb.scale.plan import plan_training
from beit_nb.studies import STUDIES, study_named

FEW = ("--arms", "40 %", "10 %", "--set", "pretrain.steps=3")


@pytest.fixture
def boss(monkeypatch):
    "Runs that train nothing, and nobody waits for."
    boss = Pretender()
    monkeypatch.setattr(running, "RunProcess", boss)
    monkeypatch.setattr(running.time, "sleep", lambda seconds: None)
    return boss


def test_no_torch_is_imported():
    run_python("import sys, beit_nb.ablating; sys.exit('torch' in sys.modules)")


def test_alone_it_lists_the_studies():
    said = beit("ablate").stdout

    assert all(f"  {name} " in said for name in STUDIES)
    assert "arms: 40 %, 10 %" in said and "[nano, base-in1k]" in said


def test_wrong_words():
    refused("ablate", "mask-ration", says="unknown study 'mask-ration' (do you mean mask-ratio?)")
    refused("ablate", "longer", "--scale", "nan", says="(do you mean nano?); there are: nano")
    refused("ablate", "longer", "--arms", "3 steps", says="unknown arm of longer '3 steps'")
    refused("ablate", "longer", "--set", "pretrain.lr=fast", says="lr 'fast' must be a finite")
    refused("ablate", "longer", "--seeds", 0, says="--seeds 0 must be at least 1")


def test_what_it_will_cost(tmp_path):
    said = beit("ablate", "mask-ratio", *FEW, "--dry-run", "--out", tmp_path / "x").stdout

    *runs, total = said.splitlines()
    assert len(runs) == 3 * (1 + 2 * 3) and total.startswith("21 runs, ")
    assert runs[1].split("FLOP  ")[1].startswith("beit pretrain nano --seed 0")
    assert not (tmp_path / "x").exists()


def test_flops_are_those_of_beit_plan():
    study = study_named("longer", "base-in1k")
    recipe = recipe_named("pretrain", "base-in1k", epochs=300, tokenizer="data/dalle")
    plan = plan_training(recipe)

    run = next(iter(study_graph(study, [0]).values()))

    assert run_flops(run.recipe("runs")) == plan.samples * sum(plan.flops)


def test_it_answers(tmp_path, boss):
    out = tmp_path / "x"
    with unpainted():
        said = beit("ablate", "mask-ratio", *FEW, "--jobs", 2, "--out", out).stdout
        again = beit("ablate", "mask-ratio", *FEW, "--out", out).stdout

    assert len(boss.made) == 21
    assert "How much of a picture should be hidden?" in said
    assert "10 %  3  " in said and "-20.0 [-20.0, -20.0]  40 %" in said and "lower" in said
    assert said.split("\n\n")[1:] == again.split("\n\n")[1:]
    record = json.loads((out / "study.json").read_text())
    assert record["study"]["name"] == "mask-ratio" and len(record["runs"]) == 21
    page = (out / "report.html").read_text()
    assert "-20.0 [-20.0, -20.0]" in page and not any(bait in page for bait in FETCHES)


def test_some_arms_leave_the_others_in_the_file(tmp_path, boss):
    "The others stay in study.json and on the page, and the status speaks of those asked for."
    graph = study_graph(study_named("mask-ratio", "nano"), [0])
    lost = [name for name, run in graph.items() if run.changes.get("num_mask_patches") == 58]
    boss.fails = lost  # the arm of 90 %
    words = ("ablate", "mask-ratio", "--seeds", 1, "--jobs", 2, "--out", tmp_path)
    with unpainted():
        beit(*words, "--arms", "40 %", "90 %", "10 %", ok=1)
        said = beit(*words, "--arms", "20 %", "40 %").stdout

    arms = [line.split()[0] for line in said.splitlines() if " %  1 " in line]
    assert arms[:3] == ["40", "10", "20"]  # that of 90 % has no figure
    record = json.loads((tmp_path / "study.json").read_text())
    assert [arm["name"] for arm in record["study"]["arms"]] == ["40 %", "10 %", "90 %", "20 %"]
    assert record["runs"][lost[0]]["state"] == "failed"
    assert "Not finished: 3" in (tmp_path / "report.html").read_text()


def test_what_failed_is_on_the_page_and_in_the_status(tmp_path, boss):
    graph = study_graph(study_named("mask-ratio", "nano"), [0])
    boss.fails = [name for name, run in graph.items() if run.command == "probe"][:1]
    whole = ("--arms", "40 %", "10 %", "--seeds", 1, "--jobs", 2)

    with unpainted():
        beit("ablate", "mask-ratio", *whole, "--out", tmp_path, ok=1)

    page = (tmp_path / "report.html").read_text()
    assert "Not finished: 1" in page and "the disk is full" in page


def test_only_the_report(tmp_path, boss):
    with unpainted():
        said = beit("ablate", "mask-ratio", *FEW, "--report", "--out", tmp_path, ok=1).stdout

    assert boss.made == [] and "unfinished: nothing was to be run" in said


def test_a_cluster(tmp_path, boss):
    folder = tmp_path / "my slurm"
    words = ("mask-ratio", *FEW, "--seeds", 1, "--out", tmp_path / "x")

    said = beit("ablate", *words, "--write-slurm", folder).stdout

    task, tasks, submit = (folder / name for name in ("task.sh", "tasks.txt", "submit.sh"))
    assert said.split("\n")[:3] == [str(task), str(tasks), str(submit)]
    lines = submit.read_text().splitlines()
    arrays = [line.split("--array=")[1].split()[0] for line in lines if "--array" in line]
    numbers = [int(n) for array in arrays for n in array.split(",")]
    assert len(arrays) == 3 and sorted(numbers) == list(range(7))
    assert "afterany:$job0" in submit.read_text() and lines[-1].count("--report") == 1
    command = task.read_text().splitlines()[-1]
    assert "'40 %' '10 %' --set pretrain.steps=3" in command
    assert command.endswith('--task "$SLURM_ARRAY_TASK_ID"')
    assert len(tasks.read_text().splitlines()) == 7
    run_python(
        "import subprocess, sys; subprocess.run(['bash', '-n', sys.argv[1]], check=True)", submit
    )


def test_the_tasks_of_a_cluster_make_the_study(tmp_path, boss):
    words = ("ablate", "mask-ratio", *FEW, "--seeds", 1, "--out", tmp_path)
    refused(*words, "--task", 1, says="--task 1 reads tokenizer-")
    refused(*words, "--task", 7, says="--task 7 does not exist; this study has 0 to 6")

    for number in range(7):
        beit(*words, "--task", number)

    assert len(boss.made) == 7
    with unpainted():
        said = beit(*words, "--report").stdout
    assert len(boss.made) == 7 and "undecided" in said  # one seed has no interval


def test_depths():
    graph = study_graph(study_named("mask-ratio", "nano"), [0])

    depths = {run.command: depth(run) for run in graph.values()}

    assert depths == {"tokenizer": 0, "pretrain": 1, "finetune": 2, "probe": 2}


def test_lines_and_picture_of_little():
    "One seed, no interval; no row with a difference; a measure that nobody has."
    base = dict(measure="m", arm="a", n=1, mean=1.0, sd=None, paper=None)
    other = base | dict(
        arm="b", difference=1.0, low=None, high=None, paper_difference=2.0, verdict="undecided"
    )
    nobody = base | dict(measure="none", n=0, mean=None)
    study = dict(name="x", scale="nano", question="?", source="")
    record = dict(study=study, seeds=[0], summary=[base, other | {"base": "a"}, nobody])

    lines = summary_lines(record)
    figure = study_figure(record)
    empty = study_figure(record | {"summary": [base]})

    assert lines[-1].split() == ["b", "1", "1.0", "+1.0", "a", "+2.0", "undecided"]
    assert [ax.get_title("left") for ax in figure.axes] == ["m"] and len(empty.axes) == 1
    assert table_lines([{"a": "1"}, {"a": "22"}]) == ["a", "1", "22"]


def test_says_on_which_machines_its_runs_were_made():
    study = {"name": "longer", "scale": "nano", "question": "How long?"}
    record = {"study": study, "seeds": [0, 1], "summary": []}

    def first_line(*machines):
        runs = {str(i): {"machine": where} for i, where in enumerate(machines)}
        return summary_lines({**record, "runs": runs})[0]

    assert first_line("B", "A", "B") == "longer at nano, 2 seeds, made on A and on B: How long?"
    assert first_line("A", "") == "longer at nano, 2 seeds, partly made on A: How long?"
    assert first_line("", None) == "longer at nano, 2 seeds: How long?"
