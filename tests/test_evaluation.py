"A score of anybody's checkpoint: the peers' own pipelines, processes and workers, bad input."

import json
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import beit, red_and_blue, refused
from helpers_models import SIZE, shaken
from helpers_processes import run
from PIL import Image
from timm.data import create_transform

from beit_nb import BeitError, evaluation
from beit_nb.checkpoints import load_weights, save_pretrained
from beit_nb.classifier import BeitForImageClassification
from beit_nb.data import open_data
from beit_nb.device import KERNELS
from beit_nb.evaluation import (
    check_out,
    check_scored_memory,
    evaluate,
    read_answers,
    score_folder,
)
from beit_nb.finetuning import finetune
from beit_nb.recipes import recipe_named
from beit_nb.scores import confusion_matrix, confusions, figures_of, standard_error

NAMES = [f"kind{i}" for i in range(7)]


def lay_out(root, names, each=3, damaged=False, square=False):
    "Noisy pictures of odd sizes: root/val/<class>/<number>.png."
    rng = np.random.default_rng(5)
    for name in names:
        folder = root / "val" / name
        folder.mkdir(parents=True)
        for i in range(each):
            height, width = rng.integers(20, 90, 2)
            height = width if square else height
            coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
            image = Image.fromarray(coarse).resize((int(width), int(height)))
            image.save(folder / f"{i}.png")
    if damaged:
        (root / "val" / names[0] / "0.png").write_bytes(b"broken")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("data"), NAMES)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    form = dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
    model = shaken(BeitForImageClassification(len(NAMES), **SIZE, **form)).eval()
    with torch.no_grad():
        model.head.weight.mul_(30)  # answers that differ from picture to picture
        model.head.bias.sub_(model(torch.randn(50, 3, 32, 32)).mean(0))
    return model


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.pth"
    torch.save({"model": network.state_dict()}, path)
    return path


def guesses(init, data, out, **how):
    evaluate(str(init), str(data), str(out), precision="fp32", quiet=True, **how)
    return read_answers(out).answers.guess.tolist()


@pytest.mark.parametrize("changes", [{}, dict(crop_pct=0.6), dict(img_size=48, crop_pct=1.0)])
def test_timms_own_pipeline_and_network_guess_the_same(pictures, network, file, tmp_path, changes):
    from timm.models.beit import Beit

    ours = guesses(file, pictures, tmp_path, **changes)

    size = changes.get("img_size", SIZE["img_size"])
    model = load_weights(file)
    form = dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
    theirs = Beit(num_classes=len(NAMES), **(SIZE | {"img_size": size}), **form).eval()
    state = BeitForImageClassification.from_pretrained(model, img_size=size).state_dict()
    theirs.load_state_dict(state)
    prepare = create_transform(
        size,
        crop_pct=changes.get("crop_pct", 224 / 256),
        interpolation="bicubic",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    held_out = open_data(str(pictures), "val", labels=True)
    with torch.no_grad():
        batch = torch.stack([prepare(held_out[i]) for i in range(len(held_out))])
        want = theirs(batch).argmax(1).tolist()
    assert ours == want and len(set(want)) > 2


SQUASH = {"size": {"height": 40, "width": 40}, "resample": 2}
BYTES = {"do_rescale": False, "image_mean": [90.0] * 3, "image_std": [70.0] * 3}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, SQUASH, {"do_normalize": False}, BYTES], ids=str)
def test_hugging_faces_own_pipeline_and_network_guess_the_same(network, tmp_path, changes):
    from transformers import BeitForImageClassification as Theirs
    from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil

    pictures = lay_out(tmp_path / "data", NAMES, square=changes is not SQUASH)
    folder = save_pretrained(network, tmp_path / "hf", NAMES, ((0.4,) * 3, (0.3,) * 3), 0.8)
    steps = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(steps | changes))

    ours = guesses(folder, pictures, tmp_path / "out")

    prepare = BeitImageProcessorPil.from_pretrained(folder)
    held_out = open_data(str(pictures), "val", labels=True)
    images = [held_out[i] for i in range(len(held_out))]
    model = Theirs.from_pretrained(folder).eval()
    with torch.no_grad():
        want = [
            model(**prepare(image, return_tensors="pt")).logits.argmax(1).item() for image in images
        ]
    assert ours == want and len(set(want)) > 1


@pytest.mark.slow
@pytest.mark.usefixtures("quick_starts")
def test_neither_processes_nor_workers_change_a_figure(file, tmp_path):
    "22 pictures of which one is broken: an uneven share, and a last round that is filled up."
    data = lay_out(tmp_path / "data", [*NAMES, "kind7"][:7], damaged=True)
    words = ["evaluate", str(file), "--data", str(data), "--precision", "fp32", "--batch-size", "4"]

    run(sys.executable, "-m", "beit_nb", *words, "--out", tmp_path / "one")
    run(sys.executable, "-m", "beit_nb", *words, "--out", tmp_path / "ahead", "--workers", "2")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "-m", "beit_nb"]
    run(*torchrun, *words, "--out", tmp_path / "two", "--workers", "1")

    one = read_answers(tmp_path / "one").answers
    assert one.number.tolist() == list(range(1, 21))  # each once; number 0 is broken
    for other in ("ahead", "two"):
        answers = read_answers(tmp_path / other).answers
        for column in ("number", "label", "guess", "in_top5"):
            assert torch.equal(getattr(one, column), getattr(answers, column))
        torch.testing.assert_close(one.loss, answers.loss, atol=1e-5, rtol=1e-5)
        figures = json.loads((tmp_path / other / "metrics.json").read_text())
        assert figures["unreadable"] == 1 and figures["pictures"] == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "augment, crop, changes",
    [
        ("shift", 1.0, {}),
        ("none", 224 / 256, {}),
        ("none", 0.7, dict(crop_pct=0.7, in_chans=1, ema=0.5)),
    ],
)
def test_a_run_is_scored_as_it_scored_itself(tmp_path, augment, crop, changes):
    data = red_and_blue(tmp_path / "data")
    r = recipe_named("finetune", "nano", data=str(data), out=str(tmp_path / "run"), steps=3)
    r.labels_per_class = None
    r.batch_size = 4
    r.augment = augment
    vars(r).update(changes)
    own = finetune(r, quiet=True)

    figures = evaluate(r.out, str(data), str(tmp_path / "score"), quiet=True)

    assert figures["accuracy"] == own["accuracy"] and figures["crop_pct"] == crop
    assert "top5" not in figures  # of two classes


def test_figures_by_hand(pictures, file, tmp_path):
    evaluate(str(file), str(pictures), str(tmp_path), quiet=True)
    scored = read_answers(tmp_path)
    label, guess = (x.numpy() for x in scored.answers[1:3])

    figures = figures_of(scored)
    matrix = confusion_matrix(scored)

    want = np.zeros((7, 7), int)
    for a, b in zip(label, guess):
        want[a, b] += 1
    assert (matrix == want).all() and figures["pictures"] == 21
    assert figures["accuracy"] == (label == guess).mean()
    assert sum(x["pictures"] for x in confusions(scored, 99)) == (label != guess).sum()
    first = figures["confusions"][0]
    at = NAMES.index(first["class"]), NAMES.index(first["taken_for"])
    assert (
        first["pictures"]
        == want[at]
        == max(want[a, b] for a in range(7) for b in range(7) if a != b)
    )
    assert standard_error(0.5, 100) == 0.05


def test_classes_are_matched_by_name(network, pictures, tmp_path):
    "The same answers, whatever order the network has its classes in."
    order = [3, 0, 6, 1, 5, 2, 4]
    mixed = BeitForImageClassification.from_pretrained(network.state_dict())
    with torch.no_grad():
        mixed.head.weight.copy_(network.head.weight[order])
        mixed.head.bias.copy_(network.head.bias[order])
    save_pretrained(network, tmp_path / "a", NAMES)
    save_pretrained(mixed, tmp_path / "b", [NAMES[i] for i in order])

    a = evaluate(str(tmp_path / "a"), str(pictures), str(tmp_path / "x"), quiet=True)
    b = evaluate(str(tmp_path / "b"), str(pictures), str(tmp_path / "y"), quiet=True)

    by_name = [{row["class"]: row["right"] for row in figures["per_class"]} for figures in (a, b)]
    assert by_name[0] == by_name[1] and a["accuracy"] == b["accuracy"]


def test_fewer_classes_than_the_network_knows(network, pictures, tmp_path):
    save_pretrained(network, tmp_path / "net", NAMES)
    some = lay_out(tmp_path / "some", NAMES[4:6])

    figures = evaluate(str(tmp_path / "net"), str(some), str(tmp_path / "out"), quiet=True)

    assert [row["class"] for row in figures["per_class"]] == NAMES[4:6]
    assert figures["classes"] == 7 and figures["pictures"] == 6


def test_bad_input_is_one_line(network, file, pictures, tmp_path):
    four = lay_out(tmp_path / "four", NAMES[:4])
    named = save_pretrained(network, tmp_path / "named", NAMES)
    strange = lay_out(tmp_path / "strange", ["kind1", "kind9"])
    body = {k: v for k, v in network.state_dict().items() if not k.startswith("head")}
    torch.save(body, tmp_path / "body.pth")
    half = {k: v for k, v in network.state_dict().items() if "blocks.1.mlp" not in k}
    torch.save(half, tmp_path / "half.pth")

    def refuse(init, data, says, *more):
        refused("evaluate", init, "--data", data, "--out", tmp_path / "out", *more, says=says)

    refuse(file, four, "tells 7 classes apart, without names, but")
    refuse(named, strange, ["1 of the 2 classes of", "(kind9)"])
    refuse(tmp_path / "body.pth", pictures, "no head for classes; fine-tune it first")
    refuse(tmp_path / "half.pth", pictures, "missing")
    refuse(file, pictures, "img_size 50 is not divisible by patch_size", "--img-size", "50")
    refuse(file, pictures, "lower --img-size or --batch-size", "--img-size", "65536")
    refuse(file, pictures, "--crop-pct 1.5 must be", "--crop-pct", "1.5")
    refuse(file, pictures, "--crop-pct 0.0001 must be from 0.05", "--crop-pct", "0.0001")
    refuse(file, tmp_path / "nowhere", "no data at")
    refuse(file, "photos", "photos has no labels")
    refuse(tmp_path / "none.pth", pictures, "none.pth")
    assert not (tmp_path / "out").exists()


def test_a_network_of_broken_numbers_has_no_score(network, pictures, tmp_path):
    state = {k: v.clone() for k, v in network.state_dict().items()}
    state["blocks.0.attn.qkv.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")

    said = beit("evaluate", tmp_path / "nan.pth", "--data", pictures, "--out", tmp_path / "o", ok=1)

    last = said.stderr.splitlines()[-1]
    assert "nan.pth answers 21 of 21 pictures with numbers that are not finite" in last
    assert not said.stdout.count("top-1") and not (tmp_path / "o" / "metrics.json").exists()


@pytest.mark.slow
def test_the_running_mean_has_a_score_of_its_own(tmp_path):
    data = red_and_blue(tmp_path / "data")
    r = recipe_named("finetune", "nano", data=str(data), out=str(tmp_path / "run"), steps=3)
    own = finetune(replace(r, ema=0.5, batch_size=4, labels_per_class=None), quiet=True)

    words = ("evaluate", r.out, "--data", data, "--ema", "--out", tmp_path / "score")
    said = beit(*words).stdout

    scored = json.loads((tmp_path / "score" / "metrics.json").read_text())
    assert scored["accuracy"] == own["ema_accuracy"] and "top-1" in said
    refused(*words[:-1], tmp_path / "score", "--no-ema", says="holds another score")


def test_a_score_replaces_no_run_and_lies_in_no_data(pictures, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"command": "finetune"}')
    with pytest.raises(BeitError, match="holds a run"):
        check_out(str(tmp_path / "run"), "digits")
    with pytest.raises(BeitError, match="lies in"):
        check_out(str(pictures / "val" / "kind0"), str(pictures))
    assert check_out(str(tmp_path / "new"), "digits").is_dir()


@pytest.mark.slow
def test_a_score_replaces_only_itself(file, pictures, tmp_path):
    asked = ("evaluate", file, "--data", pictures, "--out", tmp_path / "out")
    beit(*asked)
    beit(*asked)  # the same once more
    before = (tmp_path / "out" / "metrics.json").read_bytes()

    others = [
        beit(*asked, *more, ok=2) for more in (("--crop-pct", "0.5"), ("--precision", "bf16"))
    ]

    assert all("holds another score" in said.stderr for said in others)
    assert (tmp_path / "out" / "metrics.json").read_bytes() == before


@pytest.mark.slow
def test_the_command_leaves_figures_a_picture_and_a_page(file, pictures, tmp_path):
    said = beit("evaluate", file, "--data", pictures, "--out", tmp_path / "out").stdout

    assert "top-1" in said and "(95 % interval " in said and "top-5" in said
    assert "seen at 32 pixels, the middle of 36 (crop_pct 0.875)" in said
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"answers.npz", "config.json", "confusion.png", "metrics.json", "report.html"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "beit evaluate" in page and "taken for" in page and "data:image/png" in page
    assert f"net.pth on the val pictures of {pictures}" in page and "95 % interval" in page
    assert all(f"<td>{name}</td>" in page for name in NAMES)  # a table of all classes
    beit("evaluate", file, "--data", pictures, "--out", tmp_path / "out")  # once more, over it
    (tmp_path / "out" / "answers.npz").write_bytes(b"x")
    beit("report", tmp_path / "out")
    assert "damaged" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_every_checkpoint_set_and_split_has_a_folder_of_its_own(
    network, file, pictures, tmp_path, monkeypatch
):
    "Two networks, one after the other, and nothing said of --out."
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        other = {name: x.clone() for name, x in network.state_dict().items()}
        other["head.bias"][0] += 100  # the first class, whatever it sees
    torch.save({"model": other}, tmp_path / "other.pth")

    first = evaluate(str(file), str(pictures), quiet=True)
    second = evaluate("other.pth", str(pictures), quiet=True)

    folders = sorted((tmp_path / "runs" / "evaluate").iterdir())
    assert len(folders) == 2 and first["accuracy"] != second["accuracy"]
    kept = {json.loads((f / "config.json").read_text())["init"]: f for f in folders}
    for init, figures in ((str(file), first), ("other.pth", second)):
        metrics = json.loads((kept[init] / "metrics.json").read_text())
        assert metrics["accuracy"] == figures["accuracy"]
    weights = [json.loads((f / "config.json").read_text())["weights"] for f in folders]
    assert weights[0] != weights[1]


def test_folders_of_scores_are_told_apart():
    asked = [
        (i, d, s) for i in ("a", "a/b", "b") for d in ("digits", "./d") for s in ("val", "test")
    ]

    assert len({score_folder(*words) for words in asked}) == len(asked)
    assert all(score_folder(*words).count("/") == 2 for words in asked)


def test_a_score_replaces_no_folder_of_hugging_face(network, pictures, tmp_path):
    "Its config.json says what network it is; a probe of it leaves it alone, too."
    folder = save_pretrained(network, tmp_path / "hf", NAMES)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    said = "config.json is of no run of `beit`; choose another folder"
    refused("evaluate", folder, "--data", pictures, "--out", folder, says=said)
    refused("probe", "nano", "--init", folder, "--data", "digits", "--out", folder, says=said)

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_names_of_classes_are_no_formulas(file, tmp_path):
    "matplotlib takes what stands between two $ for one."
    data = lay_out(tmp_path / "data", [*NAMES[:-1], "$\\x^$"])

    beit("evaluate", file, "--data", data, "--out", tmp_path / "out")

    assert (tmp_path / "out" / "confusion.png").stat().st_size > 1000
    assert read_answers(tmp_path / "out").names[0] == "$\\x^$"


def test_letters_that_no_font_has_make_no_warning(file, tmp_path):
    "matplotlib warned of each, between the lines of the score."
    data = lay_out(tmp_path / "data", [*NAMES[:-1], "\U0001f408\u732b"])

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        beit("evaluate", file, "--data", data, "--out", tmp_path / "out")

    assert not [w for w in warned if "Glyph" in str(w.message)]
    assert read_answers(tmp_path / "out").names[-1] == "\U0001f408\u732b"


@pytest.mark.parametrize(("form", "fits"), [({}, True), ({"use_rel_pos_bias": True}, False)])
def test_a_bias_larger_than_the_memory(form, fits, monkeypatch):
    "Two copies of 12 heads x 16,385 x 16,385 floats are 26 GB; fused attention has no scores."
    args = dict(patch_size=16, embed_dim=768, num_heads=12, mlp_ratio=4.0)
    args |= dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=False) | form
    monkeypatch.setattr("beit_nb.evaluation.machine_memory", lambda: 24e9)
    monkeypatch.setattr(evaluation, "kernels_for", lambda device: KERNELS["cuda"])

    with nullcontext() if fits else pytest.raises(BeitError, match="1 pictures of 2048"):
        check_scored_memory(args, 2048, 1)

    monkeypatch.setattr(evaluation, "kernels_for", lambda device: KERNELS["cpu"])
    with pytest.raises(BeitError, match="16 pictures of 2048"):  # 16 times their scores: 206 GB
        check_scored_memory(args, 2048, 16)


def test_a_folder_of_timms_is_scored_as_timm_scores_it(network, pictures, tmp_path):
    "What `hf download timm/...` brings; crop, mean and names of classes are in its config.json."
    from timm.data import resolve_data_config
    from timm.models import create_model, save_for_hf

    size = SIZE | dict(num_classes=len(NAMES))
    theirs = create_model("beit_base_patch16_224", **size).eval()
    theirs.load_state_dict(network.state_dict())
    save_for_hf(theirs, tmp_path / "timm", {"label_names": NAMES}, safe_serialization=True)

    ours = guesses(tmp_path / "timm", pictures, tmp_path / "out")

    size = {"input_size": (3, 32, 32)}
    prepare = create_transform(**resolve_data_config(size, model=theirs))
    held_out = open_data(str(pictures), "val", labels=True)
    with torch.no_grad():
        batch = torch.stack([prepare(held_out[i]) for i in range(len(held_out))])
        want = theirs(batch).argmax(1).tolist()
    assert ours == want and len(set(want)) > 2
    weights = load_weights(tmp_path / "timm")
    assert weights.classes == NAMES and weights.view.crop_pct == 0.9
    again = create_model(f"local-dir:{tmp_path}/timm", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(batch), theirs(batch))  # timm reads what we read
