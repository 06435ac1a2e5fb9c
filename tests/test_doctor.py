"Every fault is made in a real training of forty steps, and recognised; sound runs are called so."

import json
import math
import shutil

import numpy as np
import pytest
import torch
from helpers import beit, refused

from beit_nb import BeitError, pretraining, targets
from beit_nb.bands import read_band
from beit_nb.doctor import examine, open_course, wanted_rates
from beit_nb.engine import training
from beit_nb.engine.log import read_log
from beit_nb.images import MEAN_STD, normalize, to_float
from beit_nb.recipes import recipe_named
from beit_nb.targets import TokenizerTargets
from beit_nb.tokenizer import train_tokenizer

ALPHABET = dict(batch_size=32, width=16, vocab_size=64, code_dim=16, log_every=1, precision="fp32")
SMALL = dict(vocab_size=64, embed_dim=48, num_heads=3, depth=2, batch_size=16, precision="fp32")
SHORT = dict(steps=40, warmup_steps=10, lr=6e-3, log_every=4, watch_every=None)


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    "A tokenizer that lives, one that has died, and a band of three seeds."
    top = tmp_path_factory.mktemp("doctor")
    dead = dict(logits="linear", usage_weight=0.0)
    for name, changes in (("tok", dict(steps=2)), ("dead", dead | dict(steps=10))):
        recipe = recipe_named("tokenizer", "nano", out=f"{top}/{name}", **ALPHABET | changes)
        train_tokenizer(recipe, quiet=True)
    runs = [trained(top, f"seed-{seed}", seed=seed) for seed in range(3)]
    beit("doctor", *runs, "--write-band", top / "tiny.json")
    return top


def trained(top, name, tokenizer="tok", **changes):
    "The folder of a pre-training, made once."
    out, tokenizer = f"{top}/{name}", f"{top}/{tokenizer}"
    if (top / name).exists():
        return top / name
    fields = SMALL | SHORT | dict(out=out, tokenizer=tokenizer) | changes
    pretraining.pretrain(recipe_named("pretrain", "nano", **fields), quiet=True)
    return top / name


def diagnosed(top, run):
    "What the doctor finds, compared with the band: status, likely causes."
    seen = examine(run, read_band(top / "tiny.json"))
    return seen.status, seen.causes


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 4])
def test_a_sound_run_is_called_sound(top, seed):
    "Seeds that the band has not seen."
    run = trained(top, f"unseen-{seed}", seed=seed)

    seen = examine(run, read_band(top / "tiny.json"))

    assert (seen.status, seen.causes) == (0, []), seen.findings
    judged = {finding.check for finding in seen.findings if finding.grade == "fine"}
    assert judged >= {"numbers", "masks", "tokens", "loss", "weights", "band of loss"}


@pytest.mark.slow
def test_a_learning_rate_ten_times_too_high(top):
    assert diagnosed(top, trained(top, "rate", lr=6e-2)) == (1, ["learning-rate-too-high"])


@pytest.mark.slow
def test_a_collapsed_codebook(top):
    run = trained(top, "collapsed", "dead")

    assert diagnosed(top, run)[1] == ["collapsed-codebook"]
    assert diagnosed(top, run)[0] > 0
    seen = examine(top / "dead")
    assert (seen.status, seen.causes) == (3, ["collapsed-codebook"])


@pytest.mark.slow
def test_masks_that_are_almost_empty(top, monkeypatch):
    "One patch hidden in every other picture."

    def gives_up(r):
        return lambda rng: (np.arange(64).reshape(8, 8) == 9) & (rng.random() < 0.5)

    with monkeypatch.context() as m:
        m.setattr(targets, "mask_maker", gives_up)
        run = trained(top, "masks")

    assert diagnosed(top, run) == (3, ["masks-empty"])


def without_masks_in_the_log(run, to):
    "A copy of a run whose log is that of an earlier version."
    shutil.copytree(run, to)
    old = [{k: row[k] for k in ("step", "loss", "mlm_acc", "lr")} for row in read_log(run)]
    (to / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    return to


@pytest.mark.slow
def test_masks_that_are_all_empty(top, tmp_path, monkeypatch):
    "The training stops at such a step in one line; the doctor draws the masks of the recipe again."
    old = without_masks_in_the_log(top / "seed-0", tmp_path / "old")
    with monkeypatch.context() as m:
        m.setattr(targets, "mask_maker", lambda r: lambda rng: np.zeros((8, 8), bool))
        with pytest.raises(BeitError, match="nothing to learn from, no hidden patch"):
            trained(top, "nothing-hidden")
        empty = diagnosed(top, old)

    assert empty == (3, ["masks-empty"])
    assert diagnosed(top, old) == (0, [])


@pytest.mark.slow
@pytest.mark.parametrize("times", [1 / 3, 1 / 2, 2, 3])
def test_a_sweep_of_the_learning_rate_is_no_fault(top, times):
    "Of the band's own rate; ten times is another matter, above."
    run = trained(top, f"swept-{times:.2g}", lr=6e-3 * times)

    seen = examine(run, read_band(top / "tiny.json"))

    assert (seen.status, seen.causes) == (0, []), seen.findings


@pytest.mark.slow
@pytest.mark.parametrize(
    "view",
    [
        lambda x: normalize(to_float(x), MEAN_STD["imagenet"]),
        lambda x: x.float(),
    ],
    ids=["imagenet", "0-to-255"],
)
def test_a_token_view_normalised_otherwise(top, monkeypatch, view, request):
    with monkeypatch.context() as m:
        m.setattr(targets, "to_float", view)
        run = trained(top, f"view-{request.node.callspec.id}")

    assert diagnosed(top, run) == (3, ["token-view"])


@pytest.mark.slow
def test_shuffled_tokens(top, monkeypatch):
    hidden = TokenizerTargets.hidden

    def in_another_order(self, batch):
        ids = hidden(self, batch)
        return ids[torch.randperm(len(ids))]

    with monkeypatch.context() as m:
        m.setattr(TokenizerTargets, "hidden", in_another_order)
        run = trained(top, "shuffled")

    assert diagnosed(top, run) == (3, ["shuffled-tokens"])


@pytest.mark.slow
def test_frozen_blocks(top, monkeypatch):
    build = pretraining.build_mim

    def build_frozen(r):
        model = build(r)
        model.blocks.requires_grad_(False)
        return model

    with monkeypatch.context() as m:
        m.setattr(pretraining, "build_mim", build_frozen)
        run = trained(top, "frozen")

    assert diagnosed(top, run) == (3, ["frozen-weights"])


@pytest.mark.slow
def test_an_optimizer_that_never_steps(top, monkeypatch):
    "Seen by the log alone, as well: no checkpoint."
    with monkeypatch.context() as m:
        m.setattr(training, "update_weights", lambda *_: torch.tensor(1.0))
        run = trained(top, "still")
    shutil.rmtree(run / "checkpoints")

    status, causes = diagnosed(top, run)

    assert status == 3 and causes == ["frozen-weights"]


def test_what_is_gone_is_told(top, tmp_path):
    "Without tokenizer and checkpoints, and with the log of an earlier version."
    run = without_masks_in_the_log(top / "seed-0", tmp_path / "old")
    shutil.rmtree(run / "checkpoints")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"tokenizer": "gone"}))

    seen = examine(run)

    unknown = {finding.check for finding in seen.findings if finding.grade == "unknown"}
    assert seen.status == 0
    assert unknown >= {"masks", "tokens", "tokenizer", "weights", "gradient", "waiting"}


def test_a_run_that_has_hardly_begun(top):
    run = trained(top, "young", max_steps=8)

    seen = examine(run)

    assert seen.status == 0
    assert {f.check: f.grade for f in seen.findings}["loss"] == "unknown"


def test_a_loss_that_is_no_number(top, tmp_path):
    "The engine stops such a run, and leaves a file about it."
    run = tmp_path / "nan"
    shutil.copytree(top / "seed-0", run)
    (run / "metrics.json").unlink(missing_ok=True)
    (run / "nonfinite-step-9.json").write_text('{"step": 9, "loss": "nan", "grad_norm": "nan"}')

    seen = examine(run)

    assert seen.status == 3 and seen.causes[0] == "diverged"


def test_the_rates_of_a_recipe_are_those_of_the_engine(top):
    for name in ("seed-0", "tok"):
        course = open_course(top / name)

        np.testing.assert_allclose(course.values("wanted_lr"), course.values("lr"), rtol=1e-9)


def official(epochs, **changes):
    "Lines as the official code writes them."
    falls = 6.3 + 2.7 * np.exp(-np.arange(epochs) / 40)
    lines = []
    for epoch, loss in enumerate(falls):
        rate = 1.5e-3 if epoch < epochs - 1 else 1e-5
        line = dict(train_lr=rate, train_min_lr=rate, train_loss=float(loss), train_mlm_acc=0.05)
        line |= dict(train_loss_scale=4096.0, train_grad_norm=0.42, n_parameters=91_965_776)
        lines.append(json.dumps(line | dict(epoch=epoch) | changes))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("changes", "status", "cause"),
    [
        ({}, 0, None),
        (dict(train_grad_norm=math.nan), 0, None),  # fp16's skipped steps
        (dict(train_loss=math.nan), 3, "diverged"),
        (dict(train_lr=1.5e-2), 1, "learning-rate-too-high"),
        (dict(train_loss=0.1), 1, "collapsed-codebook"),
        (dict(train_loss=9.01), 3, "frozen-weights"),
        (dict(train_loss=7.5), 1, "outside-the-band"),
    ],
)
def test_a_log_of_the_official_code(tmp_path, changes, status, cause):
    (tmp_path / "log.txt").write_text(official(300, **changes))

    seen = examine(tmp_path)

    assert seen.status == status, seen.findings
    assert not cause or seen.causes[0] == cause


@pytest.mark.slow
def test_the_command(top):
    sick = trained(top, "rate", lr=6e-2)
    band = ["--band", top / "tiny.json"]

    page = beit("doctor", sick, *band, ok=1).stdout
    data = json.loads(beit("doctor", sick, *band, "--json", ok=1).stdout)
    both = beit("doctor", top / "dead", top / "seed-0", "--json", ok=3).stdout

    assert "learning-rate-too-high" in page and "Not judged:" in page
    assert max(map(len, page.splitlines()[1:])) <= 100 and len(page.splitlines()) < 60
    assert data["status"] == 1 and "learning-rate-too-high" in data["causes"]
    assert [json.loads(line)["status"] for line in both.splitlines()] == [3, 0]


def test_refusals(top, tmp_path):
    (tmp_path / "log.txt").write_text("hello\n[]\n")
    (tmp_path / "no.json").write_text("{}")
    tiny = top / "tiny.json"

    refused("doctor", says="RUNS")
    refused("doctor", tmp_path / "nowhere", says=["nowhere", "--out"])
    refused("doctor", tmp_path, says="no log of the official code")
    refused("doctor", tmp_path / "log.txt", says="train_loss")
    refused("doctor", top / "seed-0", "--band", tmp_path / "no.json", says="no.json is no band")
    refused("doctor", top / "tok", "--band", tiny, says="beit pretrain")
    (tmp_path / "log.txt").write_text(official(3))
    refused("doctor", tmp_path, "--band", tiny, says="counts epochs; a band counts steps")
    refused("doctor", top / "seed-0", "--write-band", tmp_path / "b.json", says="three seeds")
    assert not (tmp_path / "b.json").exists()


def test_a_segmentations_straight_line_is_what_its_recipe_asks_for():
    "Its rates fall in a line; half a cosine would call a sound run wrong."
    recipe = recipe_named("segment", "nano")
    steps = np.arange(1, 201)

    rates = wanted_rates(recipe, steps, 200, 50)

    after = rates[recipe.warmup_steps :]
    assert np.allclose(after, recipe.lr * (1 - np.arange(recipe.warmup_steps, 200) / 200))
