"Segmentations there and back: the official form, Hugging Face's folder, and what has no form."

import json

import numpy as np
import pytest
import torch
from helpers_models import SIZE
from test_segmentation import hugging_face, ours_like, pictures, trained
from transformers import BeitForSemanticSegmentation as Theirs

from beit_nb import SAID, BeitError
from beit_nb.checkpoints import load_weights
from beit_nb.cli import main
from beit_nb.networks import NETS
from beit_nb.recipes import recipe_named
from beit_nb.segmentation import BeitForSemanticSegmentation
from beit_nb.segmenter_files import official_content, save_segmenter, segmenter_config
from beit_nb.segmenters import read_segmenter
from beit_nb.segmenting import segment, segment_init
from beit_nb.vit import VisionTransformer

torch.set_num_threads(1)
CLASSES = list("abcdefghijk")


def same(a, b):
    "Are all tensors of two networks equal, bit for bit, and named alike?"
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def logits_of(model, images):
    with torch.no_grad():
        return model.heads(model.feature_maps(images))[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of a few steps with UPerNet."
    out = tmp_path_factory.mktemp("segmentation") / "run"
    r = recipe_named(
        "segment", "nano", init=str(NETS / "mim.safetensors"), out=str(out), head="upernet",
        labelled=16, batch_size=4, steps=2, eval_every=2, precision="fp32",
    )  # fmt: skip
    segment(r, quiet=True)
    return r.out


@pytest.mark.slow
@pytest.mark.parametrize("paper", [True, False])
@pytest.mark.parametrize("blocks", [None, (0, 1, 3, 4), (1, 2, 3, 5)])
@pytest.mark.parametrize("auxiliary", [True, False])
def test_their_class_gives_our_logits(tmp_path, paper, blocks, auxiliary):
    "By default the head reads the last block, for which their config has no number."
    ours = trained(ours_like(paper, out_indices=blocks, auxiliary=auxiliary))

    save_segmenter(ours, tmp_path, CLASSES)

    theirs, info = Theirs.from_pretrained(tmp_path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    with torch.no_grad():
        logits = theirs.eval()(pictures()).logits
    few = 1e-5 * logits.std().item()  # of logits of size 1 that is a tenth of what is asked for
    torch.testing.assert_close(logits, logits_of(ours, pictures()), atol=few, rtol=0)
    assert logits.std() > 0.1 and theirs.config.id2label[10] == "k"
    back = read_segmenter(tmp_path)
    assert same(back.model, ours) and back.model.out_indices == ours.out_indices
    assert back.classes == CLASSES


@pytest.mark.parametrize("paper", [True, False])
def test_what_their_class_saves_again(tmp_path, paper):
    "Ours to a folder, through their class, and back: nothing is lost but what it never had."
    ours = trained(ours_like(paper))
    Theirs.from_pretrained(save_segmenter(ours, tmp_path / "a")).save_pretrained(tmp_path / "b")

    assert same(BeitForSemanticSegmentation.from_pretrained(tmp_path / "b"), ours)


def test_numbers_that_may_be_the_official_ones_are_said(tmp_path, capfd):
    "[1, 2, 3, 5] are the official blocks of 6; read as transformers reads them, with a hint."
    theirs = hugging_face(paper=False)
    theirs.config.out_indices = [1, 2, 3, 5]
    theirs.config.save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    SAID.clear()

    with pytest.raises(BeitError, match="give four blocks of 0 to 5"):  # 1: the embeddings
        BeitForSemanticSegmentation.from_pretrained(tmp_path)

    said = capfd.readouterr().err
    assert "out_indices=(1, 2, 3, 5)" in said and "[3, 4, 5, 7] in config.json" in said
    meant = BeitForSemanticSegmentation.from_pretrained(tmp_path, out_indices=(1, 2, 3, 5))
    config = json.loads((tmp_path / "config.json").read_text()) | {"out_indices": [3, 4, 5, 7]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = BeitForSemanticSegmentation.from_pretrained(tmp_path)
    assert again.out_indices == meant.out_indices and same(again, meant)


def test_the_official_form_there_and_back(tmp_path):
    ours = trained(ours_like(paper=False))
    torch.save(official_content(ours, CLASSES), tmp_path / "net.pth")

    back = read_segmenter(tmp_path / "net.pth")

    assert same(back.model, ours) and back.classes == CLASSES
    names = torch.load(tmp_path / "net.pth")["state_dict"]
    assert {  # mmsegmentation's, as the released files have them
        "backbone.fpn1.3.bias",
        "backbone.blocks.0.attn.relative_position_bias_table",
        "decode_head.psp_modules.3.1.bn.running_var",
        "decode_head.fpn_bottleneck.conv.weight",
        "auxiliary_head.convs.0.conv.weight",
        "auxiliary_head.conv_seg.bias",
    } <= names.keys()


@pytest.mark.parametrize(
    "form, to, words",
    [
        (
            dict(decode_head="setr_pup"),
            "official",
            "no BEiT with a setr_pup head; choose --to safe",
        ),
        (dict(decode_head="linear"), "hf", "no BEiT with a linear head"),
        (dict(norm="group"), "hf", "batch norm, not group"),
        (dict(channels=8), "hf", "the head is 8 wide"),
        (dict(out_indices=(0, 0, 1, 2)), "hf", "in their order"),
        (dict(), "timm", "timm has no segmentation"),
    ],
)
def test_what_has_no_form_elsewhere(tmp_path, capsys, form, to, words):
    net = BeitForSemanticSegmentation(7, **{"channels": 64} | SIZE | form)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    out = tmp_path / ("out" if to == "hf" else "out.pth")
    found = BeitForSemanticSegmentation.from_pretrained(
        tmp_path / "net.pth",
        **{"num_heads": 4} | {n: v for n, v in form.items() if n == "out_indices"},
    )
    assert same(found, net)  # every head travels in our names

    if "out_indices" in form:  # no file but a config tells these
        with pytest.raises(BeitError, match=words):
            segmenter_config(found)
        return
    assert main(["convert", str(tmp_path / "net.pth"), str(out), "--to", to]) == 2
    assert words in capsys.readouterr().err and not out.exists()
    plain = tmp_path / "plain.safetensors"
    assert main(["convert", str(tmp_path / "net.pth"), str(plain), "--to", "safetensors"]) == 0
    assert same(read_segmenter(plain).model, net) is (
        "channels" not in form or form["channels"] == 8
    )


@pytest.mark.slow
def test_a_run_by_the_command(run, tmp_path, capsys):
    "A run to each form and back: the same answers, and what is not told is said."
    ours = read_segmenter(run)
    for to, name in (("hf", "hub"), ("official", "net.pth"), ("safetensors", "net.safetensors")):
        assert main(["convert", run, str(tmp_path / name), "--to", to]) == 0
        said = capsys.readouterr().out
        assert "a BEiT that names pixels, 11 classes" in said
        assert ("its scoring" in said) == (to != "safetensors" and ours.view.scale != (128, 32))

        found = read_segmenter(tmp_path / name)

        assert found.classes == ours.classes and same(found.model, ours.model)
    assert read_segmenter(tmp_path / "net.safetensors").view == ours.view
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card and "`beit segment`" in card
    assert main(["convert", run, str(tmp_path / "mean.pth"), "--to", "official", "--ema"]) == 2
    assert "no running mean" in capsys.readouterr().err


def test_the_card_says_how_to_ask(tmp_path, monkeypatch):
    "The lines of Python in the card, as somebody would paste them."
    from PIL import Image

    save_segmenter(trained(ours_like(paper=False)), tmp_path, CLASSES)
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save("picture.png")

    names = {}
    exec(code.replace("path/of/this/folder", str(tmp_path)), names)

    assert names["answers"].shape == (32, 32)  # four times the 8 x 8 patches


def test_a_trained_head_comes_along(run):
    "`beit segment --init` of a segmentation: its heads too, if they are the recipe's."
    r = recipe_named("segment", "nano", init=run, head="upernet", out="x")

    init = segment_init(r)

    assert "decode_head.conv_seg.weight" in init.state and "fpn1.0.weight" in init.state
    other = segment_init(recipe_named("segment", "nano", init=run, head="linear", out="x"))
    assert not any(n.startswith("decode_head") for n in other.state)
    blocks = dict(head="upernet", out_indices=(0, 0, 1, 3))
    with pytest.raises(BeitError, match=r"reads the blocks .*set --out-indices"):
        segment_init(recipe_named("segment", "nano", init=run, out="x", **blocks))


def test_the_body_of_a_run_says_what_it_leaves(run, capfd):
    SAID.clear()
    body = VisionTransformer.from_pretrained(run)

    assert "left out: auxiliary_head, decode_head, fpn1, fpn2" in capfd.readouterr().err
    assert load_weights(run).told["classes"] == read_segmenter(run).classes
    whole = read_segmenter(run).model.state_dict()
    assert all(torch.equal(x, whole[name]) for name, x in body.state_dict().items())


def test_an_empty_block_is_only_one_of_zeros(tmp_path):
    "A folder whose last block computes something keeps it."
    theirs = hugging_face(paper=True)
    theirs.save_pretrained(tmp_path)

    assert load_weights(tmp_path).args["depth"] == 6
