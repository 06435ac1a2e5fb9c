"Segmentations that anybody trained: read, scored, asked; their PNGs hold numbers."

import json

import numpy as np
import pytest
import torch
from helpers_models import SIZE
from PIL import Image
from test_segmentation import hugging_face

from beit_nb import BeitError, segmenters
from beit_nb.checkpoints import load_weights, save_official
from beit_nb.classifier import BeitForImageClassification
from beit_nb.cli import main
from beit_nb.engine.runs import load_checkpoint
from beit_nb.networks import NETS
from beit_nb.recipes import recipe_named
from beit_nb.segmentation import BeitForSemanticSegmentation
from beit_nb.segmenters import (
    PixelPredictor,
    evaluate_segmenter,
    map_score_lines,
    read_segmenter,
    segment_pictures,
    segmenter_of,
    segmenter_of_run,
)
from beit_nb.segmenting import segment

pytestmark = pytest.mark.usefixtures("pages_unpainted")
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of a few steps, and its recipe."
    out = tmp_path_factory.mktemp("segmentation") / "run"
    r = recipe_named(
        "segment", "nano", init=str(NETS / "mim.safetensors"), out=str(out), labelled=32,
        batch_size=8, steps=3, eval_every=3, precision="fp32",
    )  # fmt: skip
    return r, segment(r, quiet=True)


def picture(path, side=(40, 70)):
    g = np.random.default_rng(0)
    Image.fromarray(g.integers(0, 256, (*side, 3), np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize("kind", ["setr_pup", "upernet", "linear"])
@pytest.mark.parametrize("front", ["", "backbone."])
def test_files_in_the_official_names(tmp_path, kind, front):
    torch.manual_seed(0)
    net = BeitForSemanticSegmentation(7, kind, channels=8, use_rel_pos_bias=True, **SIZE).eval()
    state = {
        (n if n.startswith(("decode", "auxiliary")) else front + n): x
        for n, x in net.state_dict().items()
    }
    torch.save({"state_dict": state, "meta": {"CLASSES": list("abcdefg")}}, tmp_path / "net.pth")

    found = read_segmenter(tmp_path / "net.pth")

    assert found.classes == list("abcdefg") and found.count == 7 and found.view.img_size == 32
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(found.model(x), net(x))


def test_a_folder_of_hugging_faces(tmp_path):
    "Its class writes, ours reads: the same logits, though blocks are counted otherwise."
    theirs = hugging_face(paper=False)
    theirs.save_pretrained(tmp_path)

    found = read_segmenter(tmp_path)

    assert found.count == 11 and found.classes == [] and found.model.out_indices == (0, 1, 3, 4)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = found.model.heads(found.model.feature_maps(x))[0]
        torch.testing.assert_close(ours, theirs(x).logits, atol=1e-4, rtol=1e-4)


def test_what_is_no_segmentation(tmp_path):
    save_official(BeitForImageClassification(5, **SIZE), tmp_path / "classifier.pth")
    assert read_segmenter(tmp_path / "classifier.pth") is None
    assert read_segmenter(NETS / "mim.safetensors") is None
    net = BeitForSemanticSegmentation(5, "linear", **SIZE)
    state = net.state_dict()
    del state["decode_head.norm.weight"]
    with pytest.raises(BeitError, match="neither UPerNet's nor SETR's"):
        segmenter_of(load_weights(state))
    for name in ("blocks.1.mlp.fc1.bias", "decode_head.norm.bias"):
        state = net.state_dict()
        del state[name]
        with pytest.raises(BeitError, match=f"1 missing .{name}"):
            segmenter_of(load_weights(state))
    with pytest.raises(BeitError, match="no head that names pixels"):
        segmenter_of(load_weights(NETS / "mim.safetensors"))


@pytest.mark.slow
def test_scored_as_its_training_did(run, tmp_path):
    r, metrics = run

    figures = evaluate_segmenter(read_segmenter(r.out), r.out, "digits", str(tmp_path / "score"))

    assert figures["mIoU"] == metrics["mIoU"] and figures["per_class"] == metrics["per_class"]
    assert figures["interval"] == metrics["interval"]
    low, high = figures["interval"]
    [line, _] = map_score_lines(figures)
    assert low < figures["mIoU"] < high and f"95 % interval {low:.1%} to {high:.1%}" in line
    with pytest.raises(BeitError, match="holds another score"):
        evaluate_segmenter(
            read_segmenter(r.out), r.out, "digits", str(tmp_path / "score"), flip=True
        )
    other = segmenter_of(load_weights(BeitForSemanticSegmentation(5, "linear", **SIZE)))
    with pytest.raises(BeitError, match="knows 5 classes, but digits/val has 11"):
        evaluate_segmenter(other, "x", "digits", str(tmp_path / "other"))


@pytest.mark.slow
def test_what_zero_means_is_what_it_meant_in_training(run, tmp_path):
    "A network of digits that never learnt paper is scored where there is ink."
    r, _ = run
    state = load_checkpoint(r.out)
    state["config"]["reduce_zero_label"] = True
    assert segmenter_of_run(state, r.out).reduce_zero_label
    assert read_segmenter(r.out).reduce_zero_label is None

    net = segmenter_of(load_weights(BeitForSemanticSegmentation(10, "linear", **SIZE)))
    ten = net._replace(reduce_zero_label=True)
    figures = evaluate_segmenter(ten, "ten", "digits", str(tmp_path / "ten"))

    assert [row["class"] for row in figures["per_class"]] == [str(k) for k in range(10)]
    with pytest.raises(BeitError, match="knows 10 classes, but digits/val has 11"):
        evaluate_segmenter(net, "ten", "digits", str(tmp_path / "eleven"))


@pytest.mark.slow
def test_classes_in_another_order(run, tmp_path):
    "A network that numbers its classes otherwise has the same score, found by the names."
    r, metrics = run
    net = read_segmenter(r.out)
    last = net.model.decode_head.conv_seg
    order = torch.randperm(11)
    with torch.no_grad():
        last.weight.copy_(last.weight[order])
        last.bias.copy_(last.bias[order])
    turned = net._replace(classes=[net.classes[i] for i in order])

    figures = evaluate_segmenter(turned, "turned", "digits", str(tmp_path / "score"))

    assert figures["mIoU"] == metrics["mIoU"] and figures["interval"] == metrics["interval"]


def test_an_endless_picture_is_refused_before_it_fills_the_memory(run, monkeypatch):
    monkeypatch.setattr("beit_nb.mask_views.max_pixels", lambda: 1_000_000)
    predict = PixelPredictor(read_segmenter(run[0].out), "run")

    assert predict("a.png", Image.new("RGB", (20, 1))).labels.shape == (1, 20)
    with pytest.raises(BeitError, match="b.png would be looked at with 64,000 x 32 pixels"):
        predict("b.png", Image.new("RGB", (2000, 1)))


def test_the_command_predicts(run, tmp_path, capsys):
    r, _ = run
    images = [picture(tmp_path / f"{name}.jpg") for name in "ab"]
    out = tmp_path / "out"

    assert main(["predict", "--init", r.out, "--images", *images, "--out", str(out)]) == 0

    said = capsys.readouterr().out
    assert "a.jpg: " in said and "%" in said and str(out / "index" / "b.png") in said
    index = Image.open(out / "index" / "a.png")
    assert index.mode == "P" and index.size == (70, 40) and np.asarray(index).max() < 11
    colors = Image.open(out / "colors" / "a.png")
    assert colors.mode == "RGB" and colors.size == (70, 40)
    assert main(["predict", "--init", r.out, "--images", *images, "--grid", "x.png"]) == 2
    assert "paints into --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["--img-size", "64"], "--img-size is not for a segmentation"),
        (["--scales", "9"], "factors from 0.1 to 4"),
        (["--data", "photos"], "photos has no label maps"),
    ],
)
def test_the_command_refuses(run, tmp_path, capsys, words, said):
    r, _ = run
    out = str(tmp_path / "out")

    assert main(["evaluate", r.out, "--data", "digits", "--out", out, *words]) == 2

    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_scores(run, tmp_path, monkeypatch):
    "The options of `beit evaluate` arrive: mirrored pictures too, in a folder of its own."
    monkeypatch.chdir(tmp_path)
    r, metrics = run
    asked = []
    evaluate = segmenters.evaluate_segmenter

    def evaluate_and_note(*args, **options):
        asked.append(options)
        return evaluate(*args, **options)

    monkeypatch.setattr("beit_nb.segmenters.evaluate_segmenter", evaluate_and_note)
    assert main(["evaluate", r.out, "--data", "digits"]) == 0
    more = ["--flip-test", "--scales", "1", "0.5", "--out", "mirrored"]
    assert main(["evaluate", r.out, "--data", "digits", *more]) == 0

    assert [options["flip"] for options in asked] == [False, True]
    assert [list(options["scales"]) for options in asked] == [[1.0], [1.0, 0.5]]
    [plain] = [json.loads(f.read_text()) for f in tmp_path.glob("runs/**/metrics.json")]
    mirrored = json.loads((tmp_path / "mirrored" / "metrics.json").read_text())
    assert plain["mIoU"] == metrics["mIoU"] != mirrored["mIoU"]


def test_the_page_shows_what_it_sees(run):
    r, metrics = run
    [(figure, caption)] = segment_pictures(type(NETS)(r.out), r, metrics)
    assert len(figure.axes) == 24 and "11 in all" in caption
