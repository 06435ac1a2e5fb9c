"""What a person finds in the folder of a run: pictures on the way, and a page, whether the run has ended or not."""

import json, os, shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit_nb.engine.sources import Digits
from beit_nb.dalle import DalleEncoder, DalleVAE
from beit_nb.finetuning import finetune
from beit_nb.pretraining import pretrain
from beit_nb.reconstructions import ReconstructionCallback, has_decoder, reconstruction_figure
from beit_nb.targets import decoder_of
from beit_nb.probing import probe
from beit_nb.recipes import recipe_named
from beit_nb.report import run_report
from beit_nb.engine.log import read_log
from beit_nb.tokenizer import load_tokenizer, train_tokenizer
from beit_nb.tokens import Tokenizer

SMALL = dict(steps=8, log_every=2, checkpoint_every=2, precision="fp32")
FETCHES = ("http:", "https:", "<script", "<link", 'src="/')


def report(out):
    "The page of a run, which asks nobody for anything."
    html = run_report(out).read_text()
    assert (
        html.startswith("<!doctype html>")
        and html.endswith("</html>")
        and not [x for x in FETCHES if x in html]
    )
    return html


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A tokenizer, a pre-training that is stopped half-way, and its probe."
    top = tmp_path_factory.mktemp("runs")
    train_tokenizer(
        recipe_named(
            "tokenizer", "nano", out=f"{top}/tok", width=32, batch_size=16, **SMALL | dict(steps=24)
        ),
        quiet=True,
    )
    pretrain(recipe(top), quiet=True)
    probe(
        recipe_named(
            "probe", "nano", init=f"{top}/pre", out=f"{top}/probe", labels_per_class=2, draws=1
        ),
        quiet=True,
    )
    return top


def recipe(top, out="pre", **more):
    return recipe_named(
        "pretrain",
        "nano",
        tokenizer=f"{top}/tok",
        out=f"{top}/{out}",
        batch_size=16,
        embed_dim=32,
        num_heads=2,
        depth=2,
        **SMALL | dict(watch_every=2, max_steps=4) | more,
    )


@pytest.fixture
def run(runs, tmp_path):
    "A copy of the stopped pre-training, to be spoilt."
    return Path(shutil.copytree(runs / "pre", tmp_path / "pre"))


def test_a_look_is_a_picture(runs):
    """OUT/watch/STEP.png opens and shows what the model saw, its guess and the truth.

    Three different rows.
    """
    assert sorted(f.name for f in (runs / "pre" / "watch").glob("*.png")) == [
        f"{s:07d}.png" for s in (0, 2, 4)
    ]
    page = np.asarray(Image.open(runs / "pre" / "watch" / "0000004.png")).astype(int)
    assert page.shape == (3 * 100 + 4, 52 + 6 * 100 + 4, 3)
    seen, guess, truth = (page[4 + 100 * i : 100 + 100 * i, 56:] for i in range(3))
    assert np.abs(guess - truth).max() > 20 and np.abs(seen - guess).max() > 20
    w = torch.load(runs / "pre" / "watch" / "0000004.pt", weights_only=True)
    assert not torch.equal(w["guess"], w["ids"]) and torch.equal(
        w["guess"][~w["masks"]], w["ids"][~w["masks"]]
    )
    tokenizer = load_tokenizer(runs / "tok")
    assert torch.equal(w["ids"], tokenizer.get_codebook_indices(w["views"].float() / 255))
    # 32 pixels, three screen pixels each
    painted = (tokenizer.decode(w["ids"])[0] * 255).round().permute(1, 2, 0).int().numpy()
    assert np.abs(truth[:96:3, :96:3] - painted).max() <= 1


def test_looks_go_to_tensorboard(runs):
    "The engine sends what `ReconstructionCallback` returns to TensorBoard, and leaves it out of the log."
    pretrain(recipe(runs, "tb", tensorboard=True), quiet=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs / "tb" / "tb")).Reload()
    assert [e.step for e in events.Images("reconstruction")] == [2, 4]
    assert not [r for r in read_log(runs / "tb") if "reconstruction" in r]


def test_a_tokenizer_that_cannot_paint(runs, tmp_path):
    """DALL-E's encoder alone reads but paints nothing.

    Then ids are shown as colours, and the looks go on.
    """
    blind = Tokenizer(DalleVAE(DalleEncoder(3, 8, 1, vocab_size=256)))
    r = recipe(runs)
    assert (
        not has_decoder(blind)
        and has_decoder(painter(r))
        and painter(replace(r, tokenizer="/gone")) is None
    )
    torch.manual_seed(0)
    from beit_nb.pretraining import build_mim

    watch = ReconstructionCallback(r, tmp_path, Digits("val"), 1, blind)
    picture = watch(3, build_mim(r))["reconstruction"]
    assert picture.dtype == np.uint8 and np.array_equal(
        picture, Image.open(tmp_path / "watch" / "0000003.png")
    )
    cells = picture[204:300, 56:152].reshape(8, 12, 8, 12, 3).swapaxes(1, 2).reshape(64, 144, 3)
    # one colour a token
    assert (cells == cells[:, :1]).all() and len(np.unique(cells[:, 0], axis=0)) == len(
        watch.ids[0].unique()
    ) > 1
    assert len(reconstruction_figure(tmp_path, None).axes) == 6 * 4
    with pytest.raises(ValueError, match="nobody has watched"):
        reconstruction_figure(runs / "tok", None)


def test_tokens_from_disk_are_painted_too(runs):
    "With --tokens no tokenizer runs; if --tokenizer is given still, it paints: the same looks."
    from beit_nb.engine.token_files import tokenize_files

    tokenize_files("digits", runs / "tok", runs / "tokens")
    pretrain(recipe(runs, "table", tokens=f"{runs}/tokens"), quiet=True)
    assert (runs / "table" / "watch" / "0000004.png").read_bytes() == (
        runs / "pre" / "watch" / "0000004.png"
    ).read_bytes()


def test_metrics_hold_the_result(runs):
    metrics = json.loads((runs / "pre" / "metrics.json").read_text())
    last = [r for r in read_log(runs / "pre") if "loss" in r][-1]
    assert (
        last["step"] == metrics["steps"] == 4
        and metrics["loss"] == last["loss"]
        and metrics["mlm_acc"] == last["mlm_acc"]
    )


def test_report_of_a_stopped_run(runs):
    """It says that the run is not finished though it has a metrics.json, and shows its film and
    three groups of curves.
    """
    html = report(runs / "pre")
    assert (
        "beit pretrain" in html
        and "Not finished: step 4 of 8 (50%)" in html
        and "left at this speed" in html
    )
    assert (
        html.count("<img") == 4
        and "(decoded)" in html
        and all(h in html for h in ("What it learns", "How it is driven", "What the machine does"))
    )


def test_report_of_a_finished_run(runs):
    pretrain(recipe(runs, "whole", max_steps=None), quiet=True)
    html = report(runs / "whole")
    assert (
        "Finished: step 8 of 8" in html
        and "Not finished" not in html
        and "left at this speed" not in html
    )
    assert (
        f"<td>mlm_acc</td><td>{json.loads((runs / 'whole' / 'metrics.json').read_text())['mlm_acc']:.3f}</td>"
        in html
    )


def test_report_of_a_running_run(run):
    "No metrics.json yet, the log's last line half written."
    (run / "metrics.json").unlink()
    whole = report(run).split("<footer>")[0]
    with open(run / "log.jsonl", "a") as f:
        f.write('{"step": 6, "loss": 1.2')
    assert report(run).split("<footer>")[0] == whole and "Not finished: step 4 of 8" in whole


def test_report_before_the_first_line(run):
    "A checkpoint may be newer than the log; there may be no log at all."
    (run / "metrics.json").unlink()
    (run / "log.jsonl").unlink()
    html = report(run)
    assert (
        "Not finished: step 4 of 8" in html
        and "What it learns" not in html
        and html.count("<img") == 1
    )
    shutil.rmtree(run / "checkpoints"), shutil.rmtree(run / "watch")
    assert "Not finished: step 0 of 8" in report(run)


def test_report_of_a_failed_run(run):
    """What went wrong stands in it.

    And a run that failed before its first checkpoint has lost its config.json.
    """
    (run / "nonfinite-step-5.json").write_text(
        json.dumps(dict(step=5, loss="nan", grad_norm="nan", samples=["a.png"]))
    )
    assert "It failed: in step 5 the loss was nan" in report(
        run
    ) and "nonfinite-step-5.json" in report(run)
    (run / "config.json").unlink()
    assert "beit run" in report(run)


def test_report_without_the_tokenizer(run):
    "The tokenizer is gone: the film is shown in colours."
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | dict(tokenizer="/gone")))
    html = report(run)
    assert html.count("<img") == 4 and "one colour a token" in html and "(decoded)" not in html


def test_report_of_the_others(runs):
    "A tokenizer paints, a probe has its blocks, a fine-tuning its accuracy."
    assert report(runs / "tok").count("<img") == 4
    html = report(runs / "probe")
    assert (
        '<p class="lead">Finished.' in html
        and html.count("<img") == 1
        and all(f"<td>{k}</td>" in html for k in ("pretrained", "random", "pixels"))
    )
    finetune(
        recipe_named(
            "finetune",
            "nano",
            init=f"{runs}/pre",
            out=f"{runs}/fine",
            batch_size=16,
            embed_dim=32,
            num_heads=2,
            depth=2,
            eval_every=4,
            **SMALL,
        ),
        quiet=True,
    )
    html = report(runs / "fine")
    assert (
        "Finished: step 8 of 8" in html and "<td>accuracy</td>" in html and html.count("<img") == 3
    )


def test_report_is_whole_or_not_at_all(run, monkeypatch):
    """A page that cannot be written leaves the old one.

    A folder without a run is refused and stays as it was.
    """
    before = run_report(run).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left"):
        run_report(run)
    assert (run / "report.html").read_bytes() == before and not list(run.glob("*.part"))
    with pytest.raises(ValueError, match="there is no run in"):
        run_report(run / "watch")
    assert not (run / "watch" / "report.html").exists()
