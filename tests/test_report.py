"What a page says of a run: finished, stopped, at work, failed, and without its pictures."

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import FETCHES, unpainted
from PIL import Image

from beit_nb import BeitError
from beit_nb.charts import cell_text
from beit_nb.data import open_data
from beit_nb.engine.log import read_log
from beit_nb.engine.token_files import picture_records
from beit_nb.finetuning import finetune
from beit_nb.pretraining import pretrain
from beit_nb.probing import probe
from beit_nb.recipes import recipe_named
from beit_nb.report import RunStatus, failures_html, run_report, run_status
from beit_nb.tokenizer import train_tokenizer

SMALL = dict(steps=8, batch_size=16, log_every=2, checkpoint_every=2, precision="fp32")
BODY = dict(embed_dim=32, num_heads=2, depth=2)


def report(out):
    "The page of a run, which asks nobody for anything."
    html = run_report(out).read_text()
    assert html.startswith("<!doctype html>") and html.endswith("</html>")
    assert not [bait for bait in FETCHES if bait in html]
    return html


def pretrain_recipe(top, out, **changes):
    return recipe_named(
        "pretrain",
        "nano",
        tokenizer=f"{top}/tok",
        out=f"{top}/{out}",
        **SMALL | BODY | dict(watch_every=2) | changes,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A tokenizer, a pre-training that is stopped half-way, and its probe."
    top = tmp_path_factory.mktemp("runs")
    short = SMALL | dict(steps=24, width=32)
    few = dict(labels_per_class=2, draws=1)
    with unpainted():
        train_tokenizer(recipe_named("tokenizer", "nano", out=f"{top}/tok", **short), quiet=True)
        pretrain(pretrain_recipe(top, "pre", max_steps=4), quiet=True)
        probe(
            recipe_named("probe", "nano", init=f"{top}/pre", out=f"{top}/probe", **few), quiet=True
        )
    return top


@pytest.fixture
def run(runs, tmp_path):
    "A copy of the stopped pre-training, to be spoilt."
    return Path(shutil.copytree(runs / "pre", tmp_path / "pre"))


@pytest.mark.slow
def test_stopped_run(runs):
    "Not finished though there is a metrics.json; its film, and three groups of curves."
    html = report(runs / "pre")

    assert json.loads((runs / "pre" / "metrics.json").read_text())["finished"] is False
    assert "<h1>beit pretrain</h1>" in html and "Not finished: step 4 of 8 (50%)" in html
    assert "left at this speed" in html and "Final figures" not in html
    assert html.count("<img") == 4 and "(decoded)" in html
    for heading in ("What it learns", "How it is driven", "What the machine does"):
        assert heading in html


@pytest.mark.slow
def test_finished_run(runs):
    with unpainted():
        pretrain(pretrain_recipe(runs, "whole"), quiet=True)
    metrics = json.loads((runs / "whole" / "metrics.json").read_text())
    last = [row for row in read_log(runs / "whole") if "loss" in row][-1]

    html = report(runs / "whole")

    assert metrics["loss"] == last["loss"] and metrics["mlm_acc"] == last["mlm_acc"]
    assert "Finished: step 8 of 8 (100%)." in html and "Not finished" not in html
    assert "left at this speed" not in html
    assert f"<td>mlm_acc</td><td>{cell_text(metrics['mlm_acc'])}</td>" in html


@pytest.mark.usefixtures("pages_unpainted")
def test_running_run(run):
    "No metrics.json yet, the log's last line half written."
    (run / "metrics.json").unlink()
    whole = report(run).split("<footer>")[0]
    with open(run / "log.jsonl", "a") as f:
        f.write('{"step": 6, "loss": 1.2')

    assert report(run).split("<footer>")[0] == whole
    assert "Not finished: step 4 of 8" in whole


@pytest.mark.usefixtures("pages_unpainted")
def test_run_before_its_first_line(run):
    "A checkpoint may be newer than the log; there may be no log at all."
    (run / "log.jsonl").unlink()
    html = report(run)
    assert "Not finished: step 4 of 8" in html
    assert "What it learns" not in html and html.count("<img") == 1

    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "watch")
    html = report(run)
    assert "Not finished: step 0 of 8" in html and "No pictures: nobody has watched" in html


@pytest.mark.usefixtures("pages_unpainted")
def test_failed_run(run):
    record = dict(step=5, loss="nan", grad_norm="nan", samples=["a.png"])
    (run / "nonfinite-step-5.json").write_text(json.dumps(record))

    html = report(run)

    assert "It failed: in step 5 the loss was nan" in html and "nonfinite-step-5.json" in html


@pytest.mark.usefixtures("pages_unpainted")
def test_run_that_lost_its_config(run):
    "The checkpoints know it; a run that failed before the first of them is drawn without."
    (run / "config.json").unlink()
    assert "<h1>beit pretrain</h1>" in report(run)

    shutil.rmtree(run / "checkpoints")
    html = report(run)
    assert "<h1>beit run</h1>" in html and "What it learns" in html


def test_damaged_config(run):
    (run / "config.json").write_text('{"command": "pretr')

    with pytest.raises(BeitError, match="config.json is damaged"):
        run_report(run)


@pytest.mark.usefixtures("pages_unpainted")
def test_without_the_tokenizer(run):
    "What was painted while it trained is shown; an earlier version kept no more than tokens."
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | dict(tokenizer="/gone")))
    assert "(decoded)" in report(run)
    for look in (run / "watch").glob("*.pt"):
        kept = torch.load(look, weights_only=True)
        torch.save(kept | {"painted": None}, look)

    html = report(run)

    assert html.count("<img") == 4 and "one colour a token" in html and "(decoded)" not in html


@pytest.mark.slow
def test_tokenizer(runs, tmp_path):
    "It paints; where its pictures have moved, the page says so in their place."
    assert report(runs / "tok").count("<img") == 4

    moved = Path(shutil.copytree(runs / "tok", tmp_path / "tok"))
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | dict(data="/nowhere")))
    with unpainted():
        html = report(moved)
    assert html.count("<img") == 3 and "<p>No pictures: " in html and "/nowhere" in html


@pytest.mark.usefixtures("pages_unpainted")
def test_a_strangers_run_shows_no_picture_of_ours(runs, tmp_path):
    "Its config.json names a folder of ours: what the run recorded of its pictures must be of it."
    ours = tmp_path / "ours"
    ours.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (90 * i, 0, 0)).save(ours / f"{i}.png")
    run = Path(shutil.copytree(runs / "tok", tmp_path / "tok"))
    config = json.loads((run / "config.json").read_text()) | dict(data=str(ours))
    images = {}

    for what, record in (
        ("none", None),
        ("unreadable", [None] * 5),
        ("right", picture_records(open_data(str(ours)))),
    ):
        (run / "config.json").write_text(json.dumps(config | {"inputs": {"data": record}}))
        images[what] = report(run).count("<img")

    assert images == {"none": 3, "unreadable": 3, "right": 4}


def test_probe(runs):
    html = report(runs / "probe")

    assert '<p class="lead">Finished.' in html and html.count("<img") == 2
    for features in ("pretrained", "random", "pixels"):
        assert f"<td>{features}</td>" in html


@pytest.mark.slow
def test_finetune(runs):
    recipe = recipe_named(
        "finetune", "nano", init=f"{runs}/pre", out=f"{runs}/fine", eval_every=4, **SMALL | BODY
    )
    with unpainted():
        finetune(recipe, quiet=True)

    html = report(runs / "fine")

    assert "Finished: step 8 of 8" in html and "<span>accuracy</span>" in html
    assert "<td>accuracy</td>" in html and html.count("<img") == 3


@pytest.mark.usefixtures("pages_unpainted")
def test_whole_or_not_at_all(run, monkeypatch):
    "A page that cannot be written leaves the old one; where there is no run nothing is written."

    def full(*_):
        raise OSError(28, "No space left on device")

    before = run_report(run).read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BeitError, match="No space left"):
        run_report(run)
    with pytest.raises(BeitError, match="there is no run in"):
        run_report(run / "watch")

    assert (run / "report.html").read_bytes() == before and not list(run.glob("*.part"))
    assert not (run / "watch" / "report.html").exists()


LOG = [{"step": step, "epoch": step / 20, "loss": 1.0} for step in (20, 40, 60)]


@pytest.mark.parametrize(
    "config, metrics, wanted",
    [
        ({"epochs": 4}, None, RunStatus(60, 80, False)),
        ({"epochs": 4}, {"finished": False}, RunStatus(60, 80, False)),
        ({"epochs": 4, "steps": 60}, {"finished": True}, RunStatus(60, 60, True)),
        ({}, {"finished": True}, RunStatus(60, None, True)),
    ],
)
def test_progress(tmp_path, config, metrics, wanted):
    if metrics:
        (tmp_path / "metrics.json").write_text(json.dumps(metrics))

    assert run_status(tmp_path, config, LOG) == wanted


def test_progress_counts_only_the_checkpoints_of_the_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("step-0000070.pt", "step-old.pt", "step-0000900-old.pt"):
        (tmp_path / "checkpoints" / name).touch()

    assert run_status(tmp_path, {}, LOG).step == 70


def test_a_damaged_failure_is_one_line(tmp_path):
    file = tmp_path / "nonfinite-step-3.json"
    file.write_text('{"step": 3, ')

    with pytest.raises(BeitError, match=f"^{file} is damaged"):
        failures_html(tmp_path)


def test_progress_in_words():
    assert str(RunStatus(600, 1200, False)) == "step 600 of 1,200 (50%)"
    assert str(RunStatus(7, None, False)) == "step 7"
