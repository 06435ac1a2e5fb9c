"The tools of the command `beit`: predict, attention, tokenize, shard, plan, report."

import json
import shutil
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from helpers import FEW_STEPS, SMALL_BODY, beit, refused, unpainted
from PIL import Image

from beit_nb.engine.log import read_log
from beit_nb.scale.bench import BENCHES
from beit_nb.scale.hours import HARDWARE
from beit_nb.tools import TOOLS, Bench


@pytest.fixture
def white(tmp_path):
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save(tmp_path / "white.png")
    return tmp_path / "white.png"


def weights(run):
    return torch.load(run / "checkpoints" / "last.pt", weights_only=True)["model"]


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_says_what_it_does(tool):
    page = beit(tool, "--help").stdout
    first = (TOOLS[tool].__doc__ or "").splitlines()[0]

    assert f"beit {tool}" in page and first[:40] in page


def test_predict(runs, white):
    said = beit("predict", "--init", runs / "fine", "--images", white, "--top", 10).stdout
    probs = [float(word.rstrip(",")) for word in said.split()[2::2]]

    assert len(probs) == 10 and abs(sum(probs) - 1) < 0.01
    assert probs == sorted(probs, reverse=True)
    refused("predict", "--init", runs / "fine", "--images", "none.png", says="none.png")
    refused("predict", "--init", runs / "fine", "--images", white, "--top", 0, says="top 0 must be")
    refused("predict", "--init", runs / "pre", "--images", white, says="has no head for classes")


@pytest.fixture
def six(tmp_path):
    "Six pictures, of which the second and the fifth are broken."
    files = [tmp_path / f"{i}.png" for i in range(6)]
    for i, file in enumerate(files):
        Image.fromarray(np.full((32, 32), 40 * i, np.uint8)).save(file)
    files[1].write_bytes(files[1].read_bytes()[:60])
    files[4].write_text("no picture")
    return files


def test_predict_answers_all_that_it_can(runs, six):
    said = beit("predict", "--init", runs / "fine", "--images", *six, ok=1)

    answered = [line.split(": ")[0] for line in said.stdout.splitlines()]
    assert answered == [str(six[i]) for i in (0, 2, 3, 5)]
    assert [str(six[i]) in said.stderr for i in range(6)] == [False, True, False] * 2
    assert "Traceback" not in said.stderr


@pytest.mark.slow
def test_attention_draws_all_that_it_can(runs, six, tmp_path):
    out = tmp_path / "maps"

    said = beit("attention", runs / "pre", *six, "--out", out, ok=1)

    drawn = [str(out / f"{name}.png") for name in (0, 2, 3, 5, "distance")]
    named = [line.split(": ")[0] for line in said.stdout.splitlines()]
    assert named == drawn == sorted(map(str, out.iterdir()))


def test_none_of_the_pictures_can_be_read(runs, six, tmp_path):
    predict = ["predict", "--init", runs / "fine", "--images"]
    for words in (predict, ["attention", runs / "pre"]):
        said = beit(*words, six[1], six[4], ok=2).stderr.splitlines()

        assert len(said) == 2 and str(six[1]) in said[0]
        assert said[1].startswith("beit: error: ") and str(six[4]) in said[1]


@pytest.mark.slow
def test_pictures_of_one_name_are_all_drawn(runs, white, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(white, tmp_path / name / "white.png")
    before = white.read_bytes()
    files = [white, tmp_path / "a" / "white.png", tmp_path / "b" / "white.png"]

    beit("attention", runs / "pre", *files, "--out", tmp_path)

    assert white.read_bytes() == before  # drawn beside it, not over it
    assert {f"white-{i}.png" for i in (2, 3, 4)} <= {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize("place", ["", "below"])
def test_no_drawing_becomes_data(runs, white, tmp_path, place):
    "The next training there would learn from it."
    path = tmp_path / "pre.pt"
    state = torch.load(runs / "pre" / "checkpoints" / "last.pt", weights_only=True)
    state["config"]["data"] = str(tmp_path)
    torch.save(state, path)
    out = tmp_path / place

    refused("attention", path, white, "--out", out, says=f"{out} lies in")


@pytest.mark.parametrize(
    "words, says",
    [
        (["predict", "--init", "", "--images", "x"], "init is empty"),
        (["shard", "x", "--out", ""], "out is empty"),
        (["tokenize", "", "--tokenizer", "x"], "data is empty"),
        (["report", ""], "out is empty"),
    ],
)
def test_an_empty_path_is_not_the_folder_where_one_stands(words, says):
    refused(*words, says=says)


def test_no_pictures_and_pictures_that_look_like_options(runs, white, monkeypatch):
    monkeypatch.chdir(white.parent)
    for name in ("-white.png", "--white.png"):
        shutil.copy(white, white.parent / name)
    words = ["predict", "--init", runs / "fine", "--images"]

    refused(*words, says="--images needs a value")
    refused(*words, "--white.png", says="--images needs a value")
    refused(*words, white, "--white.png", says="the file of that name is ./--white.png")
    assert beit(*words, "-white.png", "./--white.png").stdout.count("white.png: ") == 2


def test_tokens_of_an_unfinished_tokenizer_are_no_secret(runs, tmp_path):
    shutil.copytree(runs / "tok", tmp_path / "tok")
    (tmp_path / "tok" / "metrics.json").unlink()
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")

    said = beit("tokenize", tmp_path, "--tokenizer", tmp_path / "tok", "--out", tmp_path / "ids")

    assert "has not finished; its weights are taken as they are" in said.stderr


@pytest.mark.parametrize("tool", ["tokenize digits --tokenizer {runs}/tok", "bench masks"])
def test_a_file_in_the_place_of_the_folder(runs, white, tool):
    words = tool.format(runs=runs).split()

    said = beit(*words, "--out", white, ok=2).stderr.splitlines()

    assert said[-1] == f"beit: error: --out {white} is a file, or lies in one; choose a folder"


@pytest.mark.parametrize(
    "words, field",
    [
        ("predict --init x --images y --top -1", "--top -1"),
        ("predict --init x --images y --top 0", "--top 0"),
        ("tokenize digits --tokenizer x --token-size -32", "--token-size -32"),
        ("tokenize digits --tokenizer x --img-size 0", "--img-size 0"),
        ("tokenize digits --tokenizer x --per-part -1", "--per-part -1"),
        ("tokenize digits --tokenizer x --per-part 0", "--per-part 0"),
        ("tokenize digits --tokenizer x --batch-size 0", "--batch-size 0"),
        ("tokenize digits --tokenizer x --workers -1", "--workers -1"),
        ("tokenize digits --tokenizer x --workers 100000", "--workers 100000"),
        ("tokenize digits --tokenizer x --max-damaged 2", "--max-damaged 2.0"),
        ("shard x --out y --per-shard -4", "--per-shard -4"),
        ("demo --seed -1", "--seed -1"),
        ("bench masks --threads 0", "--threads 0"),
        ("plan nano --gpus 0", "--gpus 0"),
        ("plan nano --gpus 10000000000", "--gpus 10000000000"),
        ("plan nano --mfu 0", "--mfu 0.0"),
        ("plan nano --mfu nan", "--mfu nan"),
        ("plan nano --cores -1", "--cores -1"),
        ("plan nano --pictures -5", "--pictures -5"),
    ],
)
def test_every_number_of_a_tool_is_checked_before_anything_is_read(words, field):
    refused(*words.split(), says=f"beit: error: {field} must be ")


def test_attention(runs, white, tmp_path):
    for run in ("pre", "fine"):
        said = beit("attention", runs / run, white, "--out", tmp_path / "maps").stdout
        assert said.startswith(f"{tmp_path}/maps/white.png: 3 heads of block 3, asked by 4,4 of 8")
        assert Image.open(tmp_path / "maps" / "white.png").size[0] > 200


@pytest.mark.slow
@pytest.mark.usefixtures("pages_unpainted")
def test_probe(runs, tmp_path):
    few = ["--labels-per-class", 2, "--draws", 1, "--out", tmp_path]
    beit("probe", "nano", "--init", runs / "pre", *few)
    metrics = json.loads((tmp_path / "metrics.json").read_text())

    assert {"pretrained", "random", "pixels"} <= set(metrics)
    assert len(metrics["pretrained"]["layers"]) == 4


@pytest.mark.slow  # 14,400 pictures
def test_tokens_from_disk_give_the_same_training(runs, tmp_path):
    "Bit for bit the training that the tokenizer gives; tokens of something else are refused."
    made = ["tokenize", "digits", "--tokenizer", runs / "tok", "--out", tmp_path / "tokens"]
    words = ["pretrain", "nano", *FEW_STEPS, *SMALL_BODY, "--tokenizer", runs / "tok"]
    tokens = ["--tokens", tmp_path / "tokens"]

    said = beit(*made).stdout
    with unpainted():
        beit(*words, *tokens, "--out", tmp_path / "pre", "--watch-every", 2)

    assert "14,400 pictures, 8 x 8 tokens" in said
    assert len(list((tmp_path / "tokens").glob("part-*.npz"))) == 4
    wanted = weights(runs / "pre")
    for name, x in weights(tmp_path / "pre").items():
        assert torch.equal(x, wanted[name]), name
    out = ["--out", tmp_path / "x"]
    missing = ["--tokens", tmp_path / "none"]
    refused(*words, *missing, *out, says=["there are no tokens", "beit tokenize"])
    refused(*words, *tokens, "--flip", 0.5, *out, says="tokens")
    refused("tokenize", "digits", "--tokenizer", tmp_path, *out, says="no checkpoint")
    refused(*made, "--per-part", 0, says="--per-part 0 must be at least 1")


@pytest.mark.slow
@pytest.mark.usefixtures("pages_unpainted")
def test_a_substitutes_tokens_are_never_learnt(runs, photos, tmp_path):
    """A picture that could not be read when the tokens were made is passed over later, repaired or
    not; `beit tokenize` again mends it."""
    pictures = tmp_path / "pictures"
    shutil.copytree(photos, pictures)
    tokens = tmp_path / "tokens"
    made = ["tokenize", pictures, "--tokenizer", runs / "tok", "--out", tokens]
    made += ["--max-damaged", 0.5]
    words = ["pretrain", "nano", *"--precision fp32 --steps 3".split(), *SMALL_BODY]
    words += ["--data", pictures, "--tokenizer", runs / "tok", "--tokens", tokens]

    first = beit(*made)
    Image.new("RGB", (40, 40), "red").save(pictures / "train" / "cat" / "broken.jpg")
    before = beit(*words, "--out", tmp_path / "a")
    second = beit(*made)
    after = beit(*words, "--out", tmp_path / "b")

    assert "1 unreadable" in first.stdout and "unreadable" not in second.stdout
    assert "broken.jpg when its tokens were made" in before.stderr
    assert "broken" not in after.stderr
    damaged = [json.loads((tmp_path / run / "metrics.json").read_text())["damaged"] for run in "ab"]
    assert damaged == [1, 0]


@pytest.mark.slow
@pytest.mark.usefixtures("pages_unpainted")
def test_shards_train_like_the_folder(photos, tmp_path):
    """The same pictures and labels: a training whose batches hold all of them goes the same way.

    Shards are packed and shuffled in an order of their own, so a sum is added up in another order,
    and nothing else may differ: chance plays no part in this training.
    """
    folder = tmp_path / "folder"
    shards = tmp_path / "shards"
    shutil.copytree(photos, folder)
    (folder / "train" / "cat" / "broken.jpg").unlink()
    train = ["finetune", "nano", *FEW_STEPS, *SMALL_BODY, "--labels-per-class", 8]
    train += "--augment none --drop-path-rate 0 --init-scale 1 --warmup-steps 0".split()

    said = beit("shard", folder, "--out", shards, "--per-shard", 5).stdout
    losses = {}
    for data in (folder, shards):
        run = tmp_path / f"run-{data.name}"
        beit(*train, "--data", data, "--out", run)
        losses[data] = [row[k] for row in read_log(run) for k in ("loss", "val_loss") if k in row]

    assert "24 pictures, 6 shards, 0 damaged" in said
    assert len(list((shards / "train").glob("*.tar"))) == 4
    assert len(losses[folder]) == 3 and losses[folder][0] != losses[folder][1]
    np.testing.assert_allclose(losses[folder], losses[shards], rtol=1e-2)
    refused("shard", tmp_path / "nowhere", "--out", tmp_path / "s", says="nowhere")


def test_a_damaged_picture_is_told_when_sharding(photos, tmp_path):
    said = beit("shard", photos, "--out", tmp_path / "shards").stdout

    assert "24 pictures" in said and "1 damaged" in said


def test_plan():
    said = beit("plan", "base-in1k", "--gpus", 16, "--hardware", "v100").stdout
    large = beit("plan", "large-in1k").stdout
    finetune = beit("plan", "base-in1k", "--command", "finetune", "--batch-size", 64).stdout

    assert "500,000 steps" in said and "92,089,856" in said and "160.1 GFLOP" in said
    assert "311,674,880" in large
    assert "finetune base-in1k on 8 x A100" in finetune and "steps of 64 pictures" in finetune
    refused("plan", "huge", says=["huge", "base-in1k"])
    refused("plan", "nano", "--gpus", 0, says="gpus")
    refused("plan", "nano", "--hardware", "tpu", says=["tpu", *HARDWARE])
    refused("plan", "nano", "--gpu", 1, says=["no option --gpu ", "--gpus"])
    refused("plan", "nano", "--command", "probe", says="probe")
    refused("plan", "nano", "--command", "dream", says=["dream", "pretrain"])


def test_help_names_the_hardware():
    page = beit("plan", "--help").stdout

    assert ", ".join(HARDWARE) in page


def test_bench_offers_every_benchmark():
    names, _ = get_args(get_type_hints(Bench)["names"])

    assert get_args(names) == tuple(BENCHES)


@pytest.mark.usefixtures("pages_unpainted")
def test_report(runs, tmp_path):
    page = runs / "pre" / "report.html"
    page.unlink()

    said = beit("report", runs / "pre").stdout

    assert said.strip() == str(page) and page.exists()
    refused("report", tmp_path, says="there is no run in")


def test_half_a_drawing_is_none(runs, white, tmp_path, monkeypatch):
    "A disk that is full is named, and what would not fit is taken away."
    from matplotlib.figure import Figure

    def full(self, file):
        file.write(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    attention = ["attention", runs / "pre", white, "--out", tmp_path / "a"]

    refused(*attention, says=f"cannot write {tmp_path}/a/white.png: No space left on device")

    assert not list((tmp_path / "a").iterdir())
