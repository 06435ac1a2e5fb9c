"""beit convert: there and back in every direction, with the peers reading what it writes."""

import json
import os
import shutil

import pytest
import timm
import torch
from helpers import beit, refused
from helpers_dalle import published, save_published
from helpers_models import SIZE, shaken

from beit_nb import BeitError, converting
from beit_nb.checkpoints import load_model, load_weights, save_official
from beit_nb.classifier import BeitForImageClassification
from beit_nb.converting import convert, timm_arguments, timm_state
from beit_nb.engine.files import safetensors_notes
from beit_nb.engine.runs import save_checkpoint
from beit_nb.limits import as_config
from beit_nb.mim import BeitForMaskedImageModeling
from beit_nb.networks import NETS
from beit_nb.pretraining import build_mim
from beit_nb.recipes import recipe_named
from beit_nb.tokenizer import load_dalle, load_tokenizer
from beit_nb.vit import VisionTransformer

BODY = SIZE | dict(embed_dim=128, num_heads=2)  # heads of 64: what no table tells is guessed right
FORMS = {
    "paper": dict(use_abs_pos_emb=True),
    "per block": dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1),
    "shared": dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1),
    "both tables": dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, use_rel_pos_bias=True),
}
ENDS = {"official": "beit.pth", "timm": "beit.bin", "hf": "beit", "safetensors": "b.safetensors"}
forms = pytest.mark.parametrize("form", FORMS)


def network(job, form, **more):
    if job == "mim":
        return shaken(BeitForMaskedImageModeling(50, **BODY, **FORMS[form], **more)).eval()
    return shaken(BeitForImageClassification(7, **BODY, **FORMS[form], **more)).eval()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a, b):
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.fixture
def start(tmp_path):
    "A network as an official file."

    def save(model):
        save_official(model, tmp_path / "start.pth")
        return tmp_path / "start.pth"

    return save


@pytest.mark.slow
@forms
@pytest.mark.parametrize("job", ("classifier", "mim"))
def test_there_and_back_in_every_direction(job, form, start, tmp_path):
    "Through each format, from each to each, and home: the same bits."
    model = network(job, form)
    path = start(model)
    kept = [to for to in ENDS if to != "timm" or (job == "classifier" and form != "shared")]
    for number, (one, other) in enumerate((a, b) for a in kept for b in kept):
        there = tmp_path / f"{number}a" / ENDS[one]
        further = tmp_path / f"{number}b" / ENDS[other]
        convert(path, there, one)
        convert(there, further, other)

        assert same(load_weights(further).state, model.state_dict()), (one, other)


@forms
@pytest.mark.parametrize("job", ("classifier", "mim"))
def test_timm_builds_and_loads_it_by_the_line_that_is_told(job, form, start, tmp_path):
    model = network(job, form)
    said = convert(start(model), tmp_path / "beit.safetensors", "timm")

    theirs = eval(said[1]).eval()  # loads strictly

    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        if job == "mim":
            close(theirs.forward_features(x), model.norm(model.forward_features(x)))
        else:
            close(theirs(x), model(x))
    body = load_weights(tmp_path / "beit.safetensors").state
    own = model.state_dict()
    assert all(torch.equal(x, own[name]) for name, x in body.items() if name in own)
    tables = [x for name, x in body.items() if name not in own]
    assert len(tables) == (3 if form == "shared" else 0)
    assert all(torch.equal(x, own["rel_pos_bias.relative_position_bias_table"]) for x in tables)


@pytest.mark.parametrize("mean", (True, False))
def test_timm_reads_both_ways_of_pooling(mean, start, tmp_path):
    model = network("classifier", "per block", use_mean_pooling=mean)
    said = convert(start(model), tmp_path / "beit.pth", "timm")
    x = torch.randn(2, 3, 32, 32)

    close(eval(said[1]).eval()(x), model(x))


def test_the_registered_shapes_need_no_arguments(tmp_path):
    "What the world has as files: BEiT+ of 1,000 classes."
    for name, size in (("base", {}), ("large", dict(embed_dim=1024, depth=24, num_heads=16))):
        form = dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
        with torch.device("meta"):
            ours = BeitForImageClassification(1000, **size, **form)
            theirs = timm.create_model(f"beit_{name}_patch16_224")

        told = timm_arguments(load_weights(ours))

        assert told == (f"beit_{name}_patch16_224", {})
        assert theirs.state_dict().keys() == timm_state(ours.state_dict()).keys()


@forms
@pytest.mark.parametrize("job", ("classifier", "mim"))
def test_hugging_face_reads_it(job, form, start, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = network(job, form, layer_norm_eps=1e-6)
    convert(start(model), tmp_path / "hub", "hf")
    kind = "BeitForMaskedImageModeling" if job == "mim" else "BeitForImageClassification"

    theirs = getattr(transformers, kind).from_pretrained(tmp_path / "hub").eval()

    x = torch.randn(2, 3, 32, 32)
    hidden = torch.rand(2, 64) < 0.4
    with torch.no_grad():
        if job == "mim":
            ours = model(x, hidden, return_all_tokens=True)
            close(theirs(x, bool_masked_pos=hidden).logits, ours)
        else:
            close(theirs(x).logits, model(x))


def test_broken_numbers_are_not_converted(tmp_path):
    state = network("classifier", "paper").state_dict()
    state["blocks.0.mlp.fc1.weight"][0, 0] = float("inf")
    torch.save(state, tmp_path / "a.pth")

    said = ["a.pth are broken", "not finite (blocks.0.mlp.fc1.weight)"]
    refused("convert", tmp_path / "a.pth", tmp_path / "b", "--to", "hf", says=said)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("form", ENDS)
def test_a_network_with_a_hole_is_not_converted(form, tmp_path):
    "Nor one that is no BEiT, such as timm's ViT; nothing is written."
    hole = network("classifier", "per block").state_dict()
    del hole["blocks.1.mlp.fc1.weight"]
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    for state, says in ((hole, "1 missing"), (vit.state_dict(), "qkv.bias|q_bias")):
        torch.save(state, tmp_path / "start.pth")
        with pytest.raises(BeitError, match=says):
            convert(tmp_path / "start.pth", tmp_path / "new" / ENDS[form], form)
    assert not (tmp_path / "new").exists()


def test_a_folder_of_theirs_goes_home(tmp_path):
    "Names of classes, normalisation and eps travel between folders; a file says what it lost."
    model = network("classifier", "paper", layer_norm_eps=1e-5)
    mean_std = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    model.save_pretrained(tmp_path / "a", classes=[*"abcdefg"], mean_std=mean_std, crop_pct=0.8)

    assert len(convert(tmp_path / "a", tmp_path / "b", "hf")) == 2
    again = load_weights(tmp_path / "b")
    assert again.classes == [*"abcdefg"] and again.args["layer_norm_eps"] == 1e-5
    assert tuple(map(tuple, again.mean_std)) == mean_std and again.view.crop_pct == 0.8
    [_, said] = convert(tmp_path / "a", tmp_path / "c.pth", "official")
    for words in ("the names of 7 classes", "mean (0.1, 0.2, 0.3)", "crop_pct 0.8", "eps 1e-05"):
        assert words in said


def test_what_timm_has_no_place_for_is_said(start, tmp_path):
    *_, said = convert(start(network("mim", "shared")), tmp_path / "beit.pth", "timm")

    assert said.startswith("not in it: that all blocks shared one table of relative positions; ")
    assert "lm_head.bias, lm_head.weight, mask_token" in said


def test_what_a_format_refuses_is_one_line_and_leaves_nothing(start, tmp_path):
    body = shaken(VisionTransformer(**BODY, qkv_bias=False))
    path = start(body)
    for to, words in (("timm", "no BEiT without a final norm"), ("hf", "have no head")):
        with pytest.raises(BeitError, match=words):
            convert(path, tmp_path / ENDS[to], to)
    model = shaken(BeitForImageClassification(7, **BODY, qkv_bias=False))
    with pytest.raises(BeitError, match="no BEiT without q_bias and v_bias"):
        convert(start(model), tmp_path / "beit", "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["start.pth"]


# --- the command, runs of ours and tokenizers


def test_a_run_of_ours_becomes_a_file_that_all_commands_read(runs, tmp_path):
    plain = tmp_path / "fine.safetensors"
    beit("convert", runs / "fine", plain, "--to", "safetensors")

    before, after = load_weights(runs / "fine"), load_weights(plain)

    assert same(after.state, before.state) and after.classes == before.classes
    assert after._replace(state={}) == before._replace(state={})
    assert safetensors_notes(plain).keys() == {"recipe", "classes"}
    beit("predict", "--init", plain, "--images", NETS.parent.parent / "nbs" / "story.png")


def test_a_card_tells_the_run(runs, tmp_path):
    said = beit("convert", runs / "fine", tmp_path / "hub", "--to", "hf").stdout

    card = (tmp_path / "hub" / "README.md").read_text()
    assert "| trained by | `beit finetune` |" in card and "| data | digits |" in card
    assert "| updates | 4 |" in card and "| accuracy | " in card and "rss" not in card
    assert "transformers.BeitForImageClassification.from_pretrained" in said


def test_a_license_stands_in_the_card_and_nowhere_else(runs, tmp_path):
    beit("convert", runs / "fine", tmp_path / "hub", "--to", "hf", "--license", "apache-2.0")
    words = ("convert", runs / "fine", tmp_path / "net.pth", "--to", "timm", "--license", "mit")
    refused(*words, says="--license goes into the model card, which --to timm has not")

    card = (tmp_path / "hub" / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in card and not (tmp_path / "net.pth").exists()


def test_a_tokenizer_of_ours_becomes_plain_numbers(runs, tmp_path):
    plain = tmp_path / "tok.safetensors"
    beit("convert", runs / "tok", plain, "--to", "safetensors")

    before, after = load_tokenizer(runs / "tok"), load_tokenizer(plain)

    assert same(after.dvae.state_dict(), before.dvae.state_dict())
    assert after.img_size == before.img_size
    assert all(x.dtype == torch.float32 for x in after.dvae.state_dict().values())
    refused("convert", runs / "tok", tmp_path / "t", "--to", "hf", says="safetensors only")


@pytest.mark.parametrize("what", (".", "encoder.pkl", "decoder.pkl"))
def test_pickles_of_dalle_become_plain_numbers(what, tmp_path):
    pair = published()
    folder = save_published(pair, tmp_path)

    convert(folder / what, tmp_path / "dalle.safetensors", "safetensors")

    numbers = load_dalle(tmp_path / "dalle.safetensors").state_dict()
    for half, net in zip(("encoder", "decoder"), pair):
        own = {f"{half}.{n}": x for n, x in net.state_dict().items()}
        if half in what or what == ".":
            assert own and all(torch.equal(numbers[name], x) for name, x in own.items())
        else:
            assert not any(name.startswith(half) for name in numbers)


def test_the_command_says_what_it_needs(tmp_path):
    save_official(network("classifier", "paper"), tmp_path / "a.pth")
    out = tmp_path / "b.pth"
    refused("convert", tmp_path / "a.pth", out, says="needs --to")
    refused("convert", tmp_path / "a.pth", out, "--to", "keras", says=["--to", "official"])
    refused("convert", tmp_path / "none.pth", out, "--to", "timm", says="there is nothing at")
    on_hub = "microsoft/beit-base-patch16-224"
    refused("convert", on_hub, out, "--to", "timm", says=f"`hf download {on_hub} --local-dir")
    out.write_text("mine")
    refused("convert", tmp_path / "a.pth", out, "--to", "timm", says="exists; choose another name")
    assert out.read_text() == "mine"
    beit("convert", tmp_path / "a.pth", out, "--to", "timm", "--overwrite")
    assert load_weights(out).args["num_classes"] == 7


@pytest.mark.parametrize(
    "out, to, words",
    [
        ("b.npz", "timm", "ends with .pth or .pt or .bin or .safetensors"),
        ("b.safetensors", "official", "ends with .pth or .pt"),
        ("b.pth", "safetensors", "ends with .safetensors"),
        ("b.pth", "hf", "writes a folder"),
        ("file", "hf", "writes a folder"),
        ("folder.pth", "official", "writes a file"),
        ("folder", "hf", "exists; choose another name"),
        ("a.pth", "official", "is what shall be converted"),
    ],
)
def test_where_it_may_not_go(out, to, words, tmp_path):
    for name in ("folder", "folder.pth"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    for name in ("a.pth", "file"):
        (tmp_path / name).write_text("mine")

    with pytest.raises(BeitError, match=words):
        convert(tmp_path / "a.pth", tmp_path / out, to)


def test_a_full_disk_leaves_what_was_there(start, tmp_path, monkeypatch):
    path = start(network("classifier", "paper"))
    for to, name in ENDS.items():
        convert(path, tmp_path / "out" / name, to)
    before = {f: f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()}
    other = network("classifier", "per block")
    save_official(other, path)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for to, name in ENDS.items():
        with pytest.raises(BeitError, match="No space left"):
            convert(path, tmp_path / "out" / name, to, overwrite=True)

    after = {f: f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert after == before


def test_a_folder_that_is_replaced_keeps_what_else_is_in_it(start, tmp_path):
    convert(start(network("classifier", "paper")), tmp_path / "hub", "hf")
    (tmp_path / "hub" / "notes.txt").write_text("mine")

    convert(start(network("mim", "shared")), tmp_path / "hub", "hf", overwrite=True)

    assert (tmp_path / "hub" / "notes.txt").read_text() == "mine"
    assert isinstance(load_model(tmp_path / "hub"), BeitForMaskedImageModeling)
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["vocab_size"] == 50


def test_a_stop_leaves_no_half_folder(start, tmp_path, monkeypatch):
    def stop(*args, **more):
        raise KeyboardInterrupt

    path = start(network("classifier", "paper"))
    monkeypatch.setattr(converting, "write_hf_folder", stop)

    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "hub", "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["start.pth"]


def test_no_run_is_replaced(runs, start, tmp_path):
    "Not its folder, nor a checkpoint of it: both hold more than weights."
    path = start(network("classifier", "paper"))
    run = tmp_path / "run"
    shutil.copytree(runs / "fine", run)
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}

    for out, to in ((run, "hf"), (run / "checkpoints" / "last.pt", "official")):
        refused(
            "convert", path, out, "--to", to, "--overwrite", says=f"belongs to the run in {run}"
        )
    with pytest.raises(BeitError, match="is that of a run"):
        load_model(path).save_pretrained(run)

    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before


def test_no_network_is_written_over_itself(start, tmp_path):
    hub = load_model(start(network("classifier", "paper"))).save_pretrained(tmp_path / "hub")
    lone = tmp_path / "lone" / "model.safetensors"
    lone.parent.mkdir()
    shutil.copy(hub / "model.safetensors", lone)
    before = lone.read_bytes()

    for source, out, to in ((hub, hub / lone.name, "safetensors"), (lone, lone.parent, "hf")):
        refused("convert", source, out, "--to", to, "--overwrite", says="what shall be converted")

    assert lone.read_bytes() == (hub / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("there", (".", "./", "../here"))
def test_into_the_folder_where_one_stands(there, start, tmp_path, monkeypatch):
    path = start(network("classifier", "paper"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    beit("convert", path, there, "--to", "hf")

    assert load_weights(tmp_path / "here").args["num_classes"] == 7
    assert {f.name for f in tmp_path.iterdir()} == {"here", "start.pth"}


def test_pixels_are_no_tokens(tmp_path):
    "A network that guesses pixels has a head of 48 numbers, which are no visual tokens."
    recipe = recipe_named("pretrain", "nano", targets="pixels")
    content = {"model": build_mim(recipe).state_dict(), "config": as_config("pretrain", recipe)}
    save_checkpoint(tmp_path / "run.pt", content)

    with pytest.raises(BeitError, match="transformers has no BEiT that guesses pixels"):
        convert(tmp_path / "run.pt", tmp_path / "hub", "hf")
    told, gone = convert(tmp_path / "run.pt", tmp_path / "b.pth", "official")

    assert "a BEiT in pre-training that guesses pixels, " in told
    assert "that its head guesses pixels and no tokens" in gone
    assert [*convert(tmp_path / "run.pt", tmp_path / "b.safetensors", "safetensors")][1:] == []
    assert not (tmp_path / "hub").exists()


def test_how_pictures_are_prepared_goes_from_folder_to_folder(tmp_path):
    "Squashed and bilinear, as in the published folders of Hugging Face's."
    network("classifier", "paper").save_pretrained(tmp_path / "a")
    steps = json.loads((tmp_path / "a" / "preprocessor_config.json").read_text())
    theirs = steps | {"size": 32, "resample": 2, "do_center_crop": False}
    (tmp_path / "a" / "preprocessor_config.json").write_text(json.dumps(theirs))

    assert len(convert(tmp_path / "a", tmp_path / "b", "hf")) == 2  # nothing is lost

    before, after = load_weights(tmp_path / "a").view, load_weights(tmp_path / "b").view
    assert before == after and (after.crop_mode, after.interpolation) == ("squash", "bilinear")
