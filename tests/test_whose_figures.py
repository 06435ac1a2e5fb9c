"""Whose figures are these: what a run was made of, and the order in which it saves and looks.

A run records what its inputs were, goes on wherever they lie, and is refused or done again where
they are others; and whatever fails beside the training, the training is kept.
"""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import beit, red_and_blue, refused, save_gray
from PIL import Image

from beit_nb import BeitError, finetuning, pretraining, tokenizer
from beit_nb.engine import sources, training
from beit_nb.engine.log import read_log, read_metrics
from beit_nb.engine.runs import load_checkpoint
from beit_nb.engine.sources import EncodedImages
from beit_nb.engine.token_files import picture_records
from beit_nb.finetuning import finetune
from beit_nb.pretraining import pretrain
from beit_nb.probing import probe
from beit_nb.recipes import recipe_named
from beit_nb.report import run_report
from beit_nb.task_configs import ProbeRecipe
from beit_nb.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("pages_unpainted")

torch.set_num_threads(1)
TOKENIZER = dict(steps=4, width=16, vocab_size=32, batch_size=4, precision="fp32")
SHAPE = dict(embed_dim=32, depth=2, num_heads=2, drop_path_rate=0.0)
SMALL = SHAPE | dict(batch_size=4, precision="fp32", warmup_steps=0, log_every=1)


@pytest.fixture
def top(tmp_path):
    "A folder with pictures of two classes, where the runs go too."
    red_and_blue(tmp_path / "pics")
    return tmp_path


def train_dvae(top, out="tok", **changes):
    options = TOKENIZER | dict(data=f"{top}/pics", out=f"{top}/{out}") | changes
    return train_tokenizer(recipe_named("tokenizer", "nano", **options), quiet=True)


def pretraining_of(top, **changes):
    options = SMALL | dict(data=f"{top}/pics", out=f"{top}/pre", tokenizer=f"{top}/tok")
    options |= dict(vocab_size=32, steps=4, watch_every=None)
    return recipe_named("pretrain", "nano", **options | changes)


def train_body(top, **changes):
    return pretrain(pretraining_of(top, **changes), quiet=True)


def finetuning_of(top, **changes):
    options = SMALL | dict(data=f"{top}/pics", out=f"{top}/fine", steps=6, eval_every=2)
    return recipe_named("finetune", "nano", labels_per_class=None, **options | changes)


def fine(top, **changes):
    return finetune(finetuning_of(top, **changes), quiet=True)


def figures(out):
    return json.loads((Path(out) / "metrics.json").read_text())


def step_of(out):
    return load_checkpoint(out)["step"]


def empty_files(folder):
    kept = {}
    for file in Path(folder).rglob("*.png"):
        kept[file] = file.read_bytes()
        file.write_bytes(b"")
    return kept


# --- save first, then look


@pytest.mark.parametrize("every", [2, 4, 100])
def test_an_evaluation_that_fails_costs_nothing(top, every):
    "A val/ of empty files: the step is saved, the line says so; mended, the run is as any other."
    straight = fine(top, out=f"{top}/straight", eval_every=every)
    kept = empty_files(top / "pics" / "val")

    with pytest.raises(BeitError, match=r"can be read.*step \d of 6 is saved.*same command") as e:
        fine(top, eval_every=every, checkpoint_every=100)

    assert "\n" not in str(e.value)
    assert step_of(top / "fine") == min(every, 6)
    assert (top / "fine" / "config.json").exists()
    for file, content in kept.items():
        file.write_bytes(content)
    again = fine(top, eval_every=every, checkpoint_every=100)
    assert again["accuracy"] == straight["accuracy"] and again["curve"] == straight["curve"]
    assert again["steps"] == 6 and read_metrics(top / "fine") is not None


@pytest.mark.parametrize("wrong", [RuntimeError("out of memory"), OSError(28, "No space left")])
def test_any_failure_of_a_look_is_after_the_save(top, monkeypatch, wrong):
    def fail(*_, **__):
        raise wrong

    monkeypatch.setattr(finetuning, "evaluate_classifier", fail)
    with pytest.raises(type(wrong)):
        fine(top, eval_every=3, checkpoint_every=100)
    assert step_of(top / "fine") == 3

    monkeypatch.undo()
    assert fine(top, eval_every=3, checkpoint_every=100)["steps"] == 6


@pytest.mark.parametrize("kind", ["tokenizer", "pretrain"])
def test_looks_of_the_other_trainings_come_after_the_save_too(top, monkeypatch, kind):
    def fail(*_, **__):
        raise RuntimeError("the look failed")

    train_dvae(top)
    if kind == "tokenizer":
        monkeypatch.setattr(tokenizer.HardMetrics, "__call__", fail)
        with pytest.raises(RuntimeError):
            train_dvae(top, out="run")
    else:
        monkeypatch.setattr(pretraining.ReconstructionCallback, "write", fail)
        with pytest.raises(RuntimeError):
            train_body(top, out=f"{top}/run", watch_every=3, max_steps=3)

    # the pre-training looks before its first step, where there is nothing to lose
    assert kind == "pretrain" or step_of(top / "run") == 1


def test_a_log_that_cannot_be_written_comes_after_the_save(top, monkeypatch):
    write = training.RunLog.write

    def full(self, step, values):
        if step == 4:
            raise BeitError("cannot write log.jsonl: No space left on device")
        write(self, step, values)

    monkeypatch.setattr(training.RunLog, "write", full)
    with pytest.raises(BeitError, match="No space left.*step 4 of 6 is saved"):
        fine(top, checkpoint_every=100)
    assert step_of(top / "fine") == 4


def test_a_kill_between_save_and_look_leaves_no_hole(top, monkeypatch):
    "The look is made up for: the curve is that of a run that nobody stopped."
    straight = fine(top, out=f"{top}/straight")

    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    monkeypatch.setattr(finetuning, "evaluate_classifier", die)
    with pytest.raises(Killed):
        fine(top, checkpoint_every=2)
    monkeypatch.undo()

    again = fine(top, checkpoint_every=2)
    assert again["curve"] == straight["curve"]
    rows = [(r["step"], sorted(r)[0]) for r in read_log(top / "fine")]
    assert rows == [(r["step"], sorted(r)[0]) for r in read_log(top / "straight")]


def test_a_rehearsal_scores_a_part_of_val_and_writes_a_page(top):
    words = ["finetune", "nano", "--data", top / "pics", "--out", top / "fine", "--batch-size", 4]
    words += ["--labels-per-class", "None", "--steps", 6, "--eval-every", 6]
    words += ["--warmup-steps", 0, "--layer-decay", 1]
    beit(*words, "--dry-run")
    assert "Not finished" in (top / "fine" / "report.html").read_text()
    assert read_metrics(top / "fine") is None
    assert not any("accuracy" in row for row in read_log(top / "fine"))
    shutil.rmtree(top / "fine")

    empty_files(top / "pics" / "val")
    refused(*words, "--dry-run", says="can be read")


def test_a_rehearsal_loads_its_own_checkpoint(top, monkeypatch):
    loaded = []
    load = training.load_checkpoint
    monkeypatch.setattr(
        training, "load_checkpoint", lambda *words: loaded.append(words) or load(*words)
    )
    fine(top, dry_run=True)
    assert loaded


def test_the_recipe_of_work_that_was_done_stays(top, monkeypatch):
    "Steps were taken and logged, and no checkpoint could be written: config.json stays."

    def fail(*_):
        raise BeitError("cannot write last.pt: No space left on device")

    monkeypatch.setattr("beit_nb.engine.trainer.save_checkpoint", fail)
    with pytest.raises(BeitError, match="No space left"):
        fine(top, checkpoint_every=3)
    assert (top / "fine" / "config.json").exists()


# --- checks before anything is built


@pytest.mark.parametrize("kind", ["tokenizer", "pretrain", "finetune"])
def test_fewer_pictures_than_a_batch(top, kind):
    train_dvae(top)
    out = dict(batch_size=64, out=f"{top}/run")
    with pytest.raises(BeitError, match="batch_size 64 is larger than the data set of 16 pictures"):
        if kind == "tokenizer":
            train_dvae(top, **TOKENIZER | out | dict(steps=None, epochs=1), data=f"{top}/pics")
        elif kind == "pretrain":
            train_body(top, steps=None, epochs=1, **out)
        else:
            fine(top, steps=None, epochs=1, **out)
    assert not (top / "run" / "config.json").exists()


def test_labels_that_do_not_fill_a_batch(top):
    with pytest.raises(BeitError, match="batch_size 4 is larger than the data set of 2 pictures"):
        finetune(replace(finetuning_of(top), labels_per_class=1), quiet=True)


@pytest.mark.parametrize("recorded", [True, False])
def test_another_number_of_classes_is_one_line(top, monkeypatch, recorded):
    "Also of a run of an earlier version, which recorded nothing."
    fine(top, max_steps=2)
    if not recorded:
        forget_records(top / "fine")
    for split in ("train", "val"):
        shutil.copytree(top / "pics" / split / "red", top / "pics" / split / "green")
    if recorded:
        monkeypatch.setattr(finetuning, "build_from_checkpoint", None)  # who builds, fails

    with pytest.raises(BeitError, match="since this run began") as e:
        fine(top)
    assert "\n" not in str(e.value)


def forget_records(out):
    "What an earlier version would have left."
    file = Path(out) / "config.json"
    config = json.loads(file.read_text())
    config.pop("inputs", None)
    file.write_text(json.dumps(config))
    for checkpoint in (Path(out) / "checkpoints").glob("*.pt"):
        state = torch.load(checkpoint, weights_only=True)
        state["config"].pop("inputs", None)
        torch.save(state, checkpoint)


def test_a_class_without_pictures_that_came_later(top):
    fine(top, max_steps=2)
    for split in ("train", "val"):
        (top / "pics" / split / "aaa").mkdir()
    with pytest.raises(BeitError, match="since this run began"):
        fine(top)


# --- figures belong to the step that is shown


@pytest.mark.slow
def test_a_stop_a_kill_and_one_more_call(top, monkeypatch):
    "Killed between its last checkpoint and its last line: one more call has the right figures."
    fine(top, out=f"{top}/straight")
    straight = figures(top / "straight")
    fine(top, max_steps=2)
    assert figures(top / "fine")["steps"] == 2

    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    monkeypatch.setattr(finetuning, "write_metrics", die)
    with pytest.raises(Killed):
        fine(top)
    monkeypatch.undo()
    assert not (top / "fine" / "metrics.json").exists()  # the old ones are of another step
    page = run_report(top / "fine").read_text()
    assert "Finished" not in page and "Final figures" not in page

    fine(top)
    same = "accuracy curve steps images finished".split()
    assert [figures(top / "fine")[k] for k in same] == [straight[k] for k in same]


def test_accuracy_is_that_of_the_step_shown(top):
    stopped = fine(top, max_steps=3)
    assert stopped["steps"] == 3 and stopped["accuracy"] is None
    assert [step for step, _ in stopped["curve"]] == [2]
    stopped = fine(top, max_steps=4)
    assert stopped["accuracy"] == stopped["curve"][-1][1] and stopped["curve"][-1][0] == 4


def test_going_back_takes_the_figures_along(top, monkeypatch):
    "The newest checkpoint is lost: a run that is under way again shows no final figures."
    fine(top, checkpoint_every=2)
    (top / "fine" / "checkpoints" / "last.pt").write_bytes(b"ashes")

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train_step", die)
    with pytest.raises(KeyboardInterrupt):
        fine(top)
    assert read_metrics(top / "fine") is None
    assert "Final figures" not in run_report(top / "fine").read_text()


@pytest.mark.parametrize("how", [dict(dry_run=True), dict(max_steps=2)])
def test_whoever_builds_on_an_unfinished_run_is_told(top, capsys, how):
    train_dvae(top, **how)
    train_body(top)
    assert f"the run in {top}/tok has not finished" in capsys.readouterr().err
    fine(top, init=f"{top}/pre")
    assert "has not finished" not in capsys.readouterr().err


# --- what the inputs were


@pytest.mark.slow
def test_new_weights_at_the_old_place_have_figures_of_their_own(top):
    train_dvae(top)
    train_body(top)
    fine(top, init=f"{top}/pre")
    shutil.rmtree(top / "pre")
    train_body(top, seed=1)

    with pytest.raises(BeitError, match="holds another run .init .* has changed since this run"):
        fine(top, init=f"{top}/pre")
    assert fine(top, init=f"{top}/pre", out=f"{top}/second")["steps"] == 6


def test_a_new_tokenizer_at_the_old_place_is_refused(top):
    train_dvae(top)
    train_body(top, max_steps=2)
    shutil.rmtree(top / "tok")
    train_dvae(top, seed=1)
    with pytest.raises(BeitError, match="holds another run .tokenizer .* has changed since"):
        train_body(top)


@pytest.mark.slow
def test_new_token_files_at_the_old_place_are_refused(top):
    train_dvae(top)
    train_dvae(top, out="tok2", seed=1)
    tokenize = ["tokenize", top / "pics", "--out", top / "ids", "--tokenizer"]
    beit(*tokenize, top / "tok")
    train_body(top, tokenizer="", tokens=f"{top}/ids", max_steps=2)
    shutil.rmtree(top / "ids")
    beit(*tokenize, top / "tok2")
    with pytest.raises(BeitError, match="holds another run .tokens .* has changed since"):
        train_body(top, tokenizer="", tokens=f"{top}/ids")


@pytest.mark.parametrize("finished", [False, True])
def test_other_pictures_of_the_same_names_are_refused(top, finished):
    fine(top, max_steps=None if finished else 2)
    red = next((top / "pics" / "train" / "red").glob("*.png"))
    red.write_bytes(next((top / "pics" / "train" / "blue").glob("*.png")).read_bytes())
    with pytest.raises(BeitError, match="holds another run .data .* has changed since"):
        fine(top)


def test_other_pictures_to_be_scored_on_are_scored(top):
    "The training is the same: nothing is trained again, but the figures are."
    first = fine(top, lr=3e-3, steps=20, eval_every=20)
    val = top / "pics" / "val"
    (val / "red").rename(val / "x")
    (val / "blue").rename(val / "red")
    (val / "x").rename(val / "blue")
    before = (top / "fine" / "checkpoints" / "last.pt").stat().st_mtime_ns

    second = fine(top, lr=3e-3, steps=20, eval_every=20)

    assert second["accuracy"] == pytest.approx(1 - first["accuracy"])
    assert (top / "fine" / "checkpoints" / "last.pt").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_probe_of_new_weights_is_made_again(top):
    train_dvae(top)
    train_body(top)
    r = ProbeRecipe(data=f"{top}/pics", init=f"{top}/pre", out=f"{top}/probe", labels_per_class=4)
    probe(r, quiet=True)
    (top / "probe" / "metrics.json").write_text('{"finished": true, "pretrained": "of before"}')
    shutil.rmtree(top / "pre")
    train_body(top, seed=1)
    assert probe(r, quiet=True)["pretrained"] != "of before"

    shutil.copytree(top / "pre", top / "other")
    assert probe(replace(r, init=f"{top}/other"), quiet=True)["labels"] == 8  # the same weights
    train_body(top, out=f"{top}/third", seed=2)
    with pytest.raises(BeitError, match="holds another run"):
        probe(replace(r, init=f"{top}/third"), quiet=True)


@pytest.mark.slow
def test_tokens_and_tokenizer_that_contradict_each_other(top):
    train_dvae(top)
    train_dvae(top, out="tok2", seed=1)
    beit("tokenize", top / "pics", "--out", top / "ids", "--tokenizer", top / "tok")

    for watch in (None, 2):
        with pytest.raises(BeitError, match="ids were written by another tokenizer") as e:
            train_body(top, tokens=f"{top}/ids", tokenizer=f"{top}/tok2", watch_every=watch)
        assert "\n" not in str(e.value)
    train_body(top, tokens=f"{top}/ids", watch_every=2)  # its own: welcome
    train_body(top, tokens=f"{top}/ids", tokenizer=f"{top}/gone", out=f"{top}/pre2")


# --- the same things elsewhere


@pytest.mark.slow
def test_paths_are_not_compared_as_letters(top, monkeypatch):
    "A slash more, an absolute path, another working directory, moved inputs: the run goes on."
    monkeypatch.chdir(top)
    train_dvae(top)
    here = dict(data="pics", tokenizer="tok")
    train_body(top, max_steps=1, **here)
    train_body(top, max_steps=2, data="pics/", tokenizer="tok/")
    train_body(top, max_steps=3, data=f"{top}/pics", tokenizer=f"{top}/tok/checkpoints/last.pt")
    (top / "elsewhere").mkdir()
    monkeypatch.chdir(top / "elsewhere")
    os.rename(top / "tok", top / "moved")
    train_body(top, data="../pics", tokenizer="../moved")
    assert step_of(top / "pre") == 4
    assert json.loads((top / "pre" / "config.json").read_text())["tokenizer"] == "../moved"

    fine(top, init=f"{top}/pre", max_steps=2)
    os.rename(top / "pre", top / "body")
    os.rename(top / "pics", top / "pictures")
    fine(top, init=f"{top}/body/", data=f"{top}/pictures")
    assert figures(top / "fine")["steps"] == 6


def test_something_and_nothing_are_not_the_same(top):
    train_dvae(top)
    train_body(top)
    fine(top, init=f"{top}/pre", max_steps=2)
    with pytest.raises(BeitError, match="holds another run"):
        fine(top)
    fine(top, out=f"{top}/scratch", max_steps=2)
    with pytest.raises(BeitError, match="holds another run"):
        fine(top, out=f"{top}/scratch", init=f"{top}/pre")


def test_a_refused_input_leaves_the_record_as_it_was(top):
    train_dvae(top)
    train_dvae(top, out="tok2", seed=1)
    train_body(top, max_steps=2)
    with pytest.raises(BeitError, match="holds another run"):
        train_body(top, tokenizer=f"{top}/tok2", max_steps=2)
    config = json.loads((top / "pre" / "config.json").read_text())
    assert config["tokenizer"] == f"{top}/tok"
    train_body(top)


def test_runs_of_earlier_versions_go_on(top):
    train_dvae(top, max_steps=2)
    forget_records(top / "tok")
    train_dvae(top)
    train_body(top, max_steps=2)
    forget_records(top / "pre")
    train_body(top)
    fine(top, init=f"{top}/pre", max_steps=2)
    forget_records(top / "fine")
    fine(top, init=f"{top}/pre")
    assert [step_of(top / name) for name in ("tok", "pre", "fine")] == [4, 4, 6]


def test_the_record_outlives_config_json(top):
    train_dvae(top)
    train_body(top, max_steps=2)
    (top / "pre" / "config.json").unlink()
    shutil.rmtree(top / "tok")
    train_dvae(top, seed=1)
    with pytest.raises(BeitError, match="holds another run .tokenizer"):
        train_body(top)


def test_repaired_pictures_are_welcome(top):
    "A picture that was damaged when the run began may be mended; others are known to be the same."
    victim = next((top / "pics" / "train" / "red").glob("*.png"))
    sound = victim.read_bytes()
    victim.write_bytes(b"")
    fine(top, max_steps=2)
    victim.write_bytes(sound)
    fine(top, max_steps=3)
    victim.write_bytes(b"")  # and damaged again
    fine(top, max_steps=4)
    victim.write_bytes(sound)
    assert fine(top)["steps"] == 6
    victim.write_bytes(next((top / "pics" / "train" / "blue").glob("*.png")).read_bytes())
    with pytest.raises(BeitError, match="holds another run .data"):
        fine(top)


def test_ids_of_other_pictures_of_the_same_names(top):
    "Neither handed out again by the command that writes them, nor read by a pre-training."
    train_dvae(top)
    tokenize = ["tokenize", top / "pics", "--tokenizer", top / "tok", "--out", top / "ids"]
    beit(*tokenize)
    beit(*tokenize)
    red = next((top / "pics" / "train" / "red").glob("*.png"))
    red.write_bytes(next((top / "pics" / "train" / "blue").glob("*.png")).read_bytes())

    refused(*tokenize, says="holds other tokens")
    with pytest.raises(BeitError, match="other pictures of the same names"):
        train_body(top, tokenizer="", tokens=f"{top}/ids")


def test_ids_of_an_earlier_version_are_read(top):
    train_dvae(top)
    tokenize = ["tokenize", top / "pics", "--tokenizer", top / "tok", "--out", top / "ids"]
    beit(*tokenize)
    file = top / "ids" / "tokens.json"
    described = json.loads(file.read_text())
    file.write_text(json.dumps({k: described[k] for k in described if k not in NEW_IN_TOKENS}))

    train_body(top, tokens=f"{top}/ids")
    beit(*tokenize)
    assert json.loads(file.read_text()) == described


NEW_IN_TOKENS = ("records", "encoder")


# --- every picture of a small set counts, whatever its size and its date say


def draw_another(file):
    "Another picture in a file of the same name, size and time."
    before = file.stat()
    value = 250 if Image.open(file).getpixel((0, 0))[0] < 200 else 5
    save_gray(file, value, size=(8, 8))
    file.write_bytes(file.read_bytes().ljust(before.st_size, b"\0")[: before.st_size])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def many(tmp_path):
    "A folder with 100 pictures to train on and 40 to be scored on."
    for part, count in (("train", 100), ("val", 40)):
        for i in range(count):
            save_gray(tmp_path / "pics" / part / "ab"[i % 2] / f"{i:03d}.png", i, size=(32, 32))
    return tmp_path


@pytest.mark.parametrize("number", [1, 50, 98])
def test_any_picture_of_a_small_set_that_is_another(many, number):
    fine(many, max_steps=2)
    victim = sorted((many / "pics" / "train").rglob("*.png"))[number]
    draw_another(victim)
    with pytest.raises(BeitError, match="holds another run .data .* has changed since"):
        fine(many)


def test_any_picture_that_is_scored_counts(many):
    fine(many)
    before = figures(many / "fine")["scored_on"]
    draw_another(sorted((many / "pics" / "val").rglob("*.png"))[1])
    fine(many)
    assert figures(many / "fine")["scored_on"] != before


@pytest.mark.parametrize("command", ["tokenize", "shard"])
def test_what_was_made_of_other_pictures(many, command):
    train_dvae(many)
    line = [command, many / "pics", "--out", many / "made"]
    line += ["--tokenizer", many / "tok"] if command == "tokenize" else []
    beit(*line)
    beit(*line)
    draw_another(sorted((many / "pics" / "train").rglob("*.png"))[1])

    said = refused(*line, says="other" if command == "tokenize" else "shards of something else")

    assert len(said) < 200  # no list of fingerprints


def test_a_large_set_is_known_by_a_part_of_each_part(monkeypatch):
    "The cost stands: 32 times 64 files or a megabyte, whatever comes."
    read = []
    file = b"a picture"
    monkeypatch.setattr(sources, "decode_image", lambda *_: None)

    class Large(EncodedImages):
        def bytes(self, i):
            read.append(i)
            return file

        def path(self, i):
            return str(i)

    picture_records(Large(10**6))
    assert len(read) == 32 * 64 and min(np.diff(sorted(read))) == 1 and max(read) > 950_000
    read.clear()
    file = bytes(2**21)
    assert len(picture_records(Large(10**6))) == 2 + 32 and len(read) == 32


# --- workers load what is scored, too


@pytest.mark.slow
def test_workers_score_the_same(many):
    first = fine(many)
    second = fine(many, out=f"{many}/two", workers=2)
    assert {**first, "peak_rss_mb": 0} == {**second, "peak_rss_mb": 0}

    r = ProbeRecipe(data=f"{many}/pics", init=f"{many}/fine", labels_per_class=4)
    alone = probe(replace(r, out=f"{many}/probe"), quiet=True)
    together = probe(replace(r, out=f"{many}/probe-2", workers=2), quiet=True)
    assert {**alone, "peak_rss_mb": 0} == {**together, "peak_rss_mb": 0}
    assert probe(replace(r, out=f"{many}/probe", workers=1), quiet=True)["labels"] == 8


def test_a_worker_that_scores_may_die(many, monkeypatch):
    class Fatal(finetuning.ScoredTransform):
        def __call__(self, *args):
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(finetuning, "ScoredTransform", Fatal)
    with pytest.raises(BeitError, match="worker was killed by SIGKILL.*step 2 of 6 is saved"):
        fine(many, workers=1, checkpoint_every=100)


def test_figures_outlive_the_log(top):
    train_dvae(top)
    train_body(top)
    before = figures(top / "pre")
    (top / "pre" / "log.jsonl").unlink()
    train_body(top)
    assert figures(top / "pre") == before and "loss" in before


def test_a_curve_is_of_one_set(many):
    "A run that goes on is scored on the pictures that it was scored on."
    fine(many, max_steps=3)
    victim = sorted((many / "pics" / "val").rglob("*.png"))[1]
    sound = victim.read_bytes()
    draw_another(victim)
    with pytest.raises(BeitError, match="holds another run .split 'val' has changed since"):
        fine(many)
    victim.write_bytes(sound)
    assert fine(many)["steps"] == 6
    with pytest.raises(BeitError, match="split 'val' there, 'test' now"):
        fine(many, split="test")
