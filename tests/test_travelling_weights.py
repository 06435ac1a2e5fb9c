"""Whole networks in and out: every direction, bit for bit, with the peers running."""

import re
from argparse import Namespace
from zipfile import ZipFile

import pytest
import timm
import torch
from helpers_models import SIZE, shaken
from safetensors.torch import save_file
from timm.models.beit import Beit

from beit_nb import SAID, BeitError, checkpoints
from beit_nb.checkpoints import (
    from_hf,
    from_timm,
    load_official,
    load_weights,
    save_official,
    to_hf,
    to_timm,
)
from beit_nb.classifier import BeitForImageClassification
from beit_nb.classifier_files import build_classifier
from beit_nb.engine.runs import save_checkpoint
from beit_nb.limits import as_config
from beit_nb.mim import BeitForMaskedImageModeling
from beit_nb.recipes import recipe_named
from beit_nb.vit import VisionTransformer

FORMS = {
    "paper": dict(use_abs_pos_emb=True),
    "per block": dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1),
    "shared": dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1),
}
BASE = dict(embed_dim=768, num_heads=12, depth=2)  # B at reduced depth
LARGE = dict(embed_dim=1024, num_heads=16, depth=2)
forms = pytest.mark.parametrize("form", FORMS)


def classifier(form, size=SIZE, **more):
    return shaken(BeitForImageClassification(7, **size, **FORMS[form], **more)).eval()


def masked(form, size=SIZE):
    return shaken(BeitForMaskedImageModeling(vocab_size=50, **size, **FORMS[form])).eval()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a, b):
    "Within 1e-5 of the largest logit."
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@forms
@pytest.mark.parametrize("wrapped", ("model", "module", "state_dict", None))
def test_official_files_however_wrapped(form, wrapped, tmp_path):
    model = classifier(form, SIZE | dict(embed_dim=256))
    own = model.state_dict()
    file = {wrapped: own, "epoch": 3, "args": Namespace(lr=0.1, device="cuda")} if wrapped else own
    torch.save(file, tmp_path / "official.pth")

    got = load_official(tmp_path / "official.pth")

    assert type(got) is BeitForImageClassification and same(got, model)


def test_a_namespace_is_skipped_and_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    model = classifier("per block")
    torch.save({"model": model.state_dict(), "args": Namespace(x=Bomb())}, tmp_path / "bad.pth")

    with pytest.raises(BeitError, match="refused, nothing in it was run"):
        load_official(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@forms
def test_there_and_back_by_every_road(form, tmp_path):
    size = SIZE | dict(embed_dim=256)
    for model in (classifier(form, size), masked(form, size)):
        save_official(model, tmp_path / "ours.pth")
        save_file(model.state_dict(), tmp_path / "ours.safetensors")
        to_hf(model, tmp_path / "ours")

        assert same(load_official(tmp_path / "ours.pth"), model)
        assert same(load_official(tmp_path / "ours.safetensors"), model)
        assert same(from_hf(tmp_path / "ours"), model)
        assert same(from_timm(model.state_dict()), model)


@pytest.mark.slow
@pytest.mark.parametrize("shape", (BASE, LARGE), ids=("B", "L"))
@pytest.mark.parametrize("img_size", (224, 384))
def test_timm_takes_ours_strictly_and_we_take_timms(shape, img_size):
    name = "beit_base_patch16_224" if shape is BASE else "beit_large_patch16_224"
    theirs = timm.create_model(name, num_classes=7, img_size=img_size, depth=2).eval()
    fields = dict(img_size=img_size, use_abs_pos_emb=False, use_rel_pos_bias=True)
    ours = shaken(BeitForImageClassification(7, **shape, **fields, init_values=0.1)).eval()
    x = torch.randn(1, 3, img_size, img_size)

    theirs.load_state_dict(to_timm(ours), strict=True)
    with torch.no_grad():
        close(ours(x), theirs(x))
        back = from_timm(theirs)
        assert same(back, ours)
        assert torch.equal(back(x), ours(x))


@forms
def test_timm_takes_the_body_of_a_pre_training_strictly(form):
    model = masked(form)
    flags = dict(use_abs_pos_emb=False) | FORMS[form]
    theirs = Beit(num_classes=0, global_pool="token", **SIZE, **flags).eval()
    theirs.load_state_dict(to_timm(model), strict=True)
    x = torch.randn(2, 3, 32, 32)

    with torch.no_grad():
        close(model.norm(model.forward_features(x)), theirs.forward_features(x))


@pytest.mark.parametrize("form", ("paper", "per block"))
@pytest.mark.parametrize("mean", (True, False))
def test_hugging_face_reads_ours_and_we_read_theirs(form, mean, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = classifier(form, use_mean_pooling=mean)
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.BeitForImageClassification.from_pretrained(tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    x = torch.randn(2, 3, 32, 32)

    with torch.no_grad():
        close(ours(x), theirs(x).logits)
    assert same(BeitForImageClassification.from_pretrained(tmp_path / "theirs"), ours)


@pytest.mark.parametrize("channels", (1, 5))
def test_networks_of_other_than_three_channels_travel_too(channels, tmp_path):
    "Grey pictures, and five bands: a mean and a spread for each go along."
    transformers = pytest.importorskip("transformers")
    ours = classifier("per block", in_chans=channels)
    ours.save_pretrained(tmp_path)
    theirs = transformers.BeitForImageClassification.from_pretrained(tmp_path).eval()
    x = torch.randn(2, channels, 32, 32)

    with torch.no_grad():
        close(ours(x), theirs(x).logits)
    assert same(BeitForImageClassification.from_pretrained(tmp_path), ours)
    usual = (0.5,) * (3 if channels == 1 else channels)
    assert load_weights(tmp_path).mean_std == (usual, usual)


def test_a_pre_training_becomes_a_classifier_of_larger_pictures(capfd):
    model = masked("shared")

    new = BeitForImageClassification.from_pretrained(model, num_classes=3, img_size=48)

    tables = [block.attn.relative_position_bias_table for block in new.blocks]
    assert all(torch.equal(table, tables[0]) for table in tables)
    assert tables[0].shape == (23 * 23 + 3, 4)
    assert "fresh: fc_norm.bias, fc_norm.weight, head.bias, head.weight" in capfd.readouterr().err


@pytest.mark.parametrize(
    "kind, source, words",
    [
        (BeitForImageClassification, lambda: masked("shared"), "say num_classes="),
        (BeitForMaskedImageModeling, lambda: classifier("per block"), "say vocab_size="),
        (BeitForImageClassification, lambda: {"a.weight": torch.zeros(2)}, "tensor is no BEiT"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(kind, source, words):
    with pytest.raises(BeitError, match=words) as e:
        kind.from_pretrained(source())
    assert "\n" not in str(e.value)


def test_missing_and_strange_tensors_are_grouped_and_not_dumped():
    own = classifier("per block").state_dict()
    del own["blocks.1.norm1.weight"], own["blocks.1.norm1.bias"]
    own["blocks.1.strange"] = torch.zeros(2)

    with pytest.raises(BeitError, match=r"2 missing \(.*\), 1 unexpected \(blocks.1.strange\)"):
        BeitForImageClassification.from_pretrained(own)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-LFS"),
        (b"<!DOCTYPE html><html>", "page of a web site"),
        (b"", "is empty"),
    ],
)
def test_what_people_save_as_weights(content, words, tmp_path):
    path = tmp_path / "beit.pth"
    path.write_bytes(content)

    with pytest.raises(BeitError, match=words):
        load_weights(path)


@pytest.mark.parametrize("form", ("paper", "per block"))
def test_the_body_of_an_official_segmentation(form, tmp_path, capfd):
    "`state_dict` of mmcv's runner: the BEiT is `backbone`, with a pyramid in it and heads beside."
    body = shaken(VisionTransformer(**SIZE, **FORMS[form])).eval()
    state = {f"backbone.{name}": x for name, x in body.state_dict().items()}
    for name in ("backbone.fpn1.0.weight", "backbone.fpn1.1.running_mean", "decode_head.conv_seg"):
        state[name] = torch.ones(3)
    for i in range(3):
        state[f"backbone.blocks.{i}.attn.relative_position_index"] = torch.zeros(65, 65).long()
    content = {"meta": {"CLASSES": ("wall", "sky")}, "state_dict": state, "optimizer": {}}
    torch.save(content, tmp_path / "upernet.pth")
    SAID.clear()

    got = VisionTransformer.from_pretrained(tmp_path / "upernet.pth", num_heads=4)

    assert same(got, body)
    said = capfd.readouterr().err
    assert "upernet.pth is a network for segmentation; left out: decode_head, fpn1 (3" in said
    new = BeitForImageClassification.from_pretrained(
        tmp_path / "upernet.pth", num_classes=5, num_heads=4
    )
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(new.forward_features(x), body(x)) and new.fc_norm is not None


def of_openmmlab(state):
    "The names of mmpretrain's and mmsegmentation's BEiT, by the rules of their converters."
    rules = (
        (r"^patch_embed\.proj", "patch_embed.projection"),
        (r"^blocks\.(\d+)\.norm", r"layers.\1.ln"),
        (r"^blocks\.(\d+)\.mlp\.fc1", r"layers.\1.ffn.layers.0.0"),
        (r"^blocks\.(\d+)\.mlp\.fc2", r"layers.\1.ffn.layers.1"),
        (r"^blocks", "layers"),
        (r"^norm", "ln1"),
        (r"^fc_norm", "ln2"),
        (r"^(head|lm_head)\.", {"head": "HEAD.fc.", "lm_head": "HEAD.cls_head."}),
    )
    out = {}
    for name, x in state.items():
        for pattern, new in rules:
            found = re.match(pattern, name)
            if found:
                name = re.sub(pattern, new[found[1]] if isinstance(new, dict) else new, name)
                break
        out[f"backbone.{name}".replace("backbone.HEAD.", "head.")] = x
    return out


@forms
@pytest.mark.parametrize("build", (classifier, masked))
def test_files_of_openmmlab(build, form, tmp_path):
    "A checkpoint of mmpretrain: the head lies beside the backbone, the indices are tensors too."
    net = build(form)
    state = of_openmmlab(net.state_dict())
    state["backbone.layers.0.attn.relative_position_index"] = torch.zeros(65, 65).long()
    torch.save({"meta": {"epoch": 3}, "state_dict": state}, tmp_path / "mm.pth")

    got = load_weights(tmp_path / "mm.pth")

    assert got.state.keys() == net.state_dict().keys()
    again = type(net).from_pretrained(got._replace(args=got.args | {"num_heads": 4}))
    assert same(again, net)


def test_a_body_of_openmmlabs_segmentation(tmp_path, capfd):
    body = VisionTransformer(**SIZE, **FORMS["per block"])
    state = of_openmmlab(body.state_dict()) | {"decode_head.conv_seg.weight": torch.zeros(3)}
    torch.save({"state_dict": state}, tmp_path / "mm.pth")
    SAID.clear()

    got = VisionTransformer.from_pretrained(tmp_path / "mm.pth")

    assert same(got, body) and "left out: decode_head" in capfd.readouterr().err


def kept_run(tmp_path, **parts):
    "A checkpoint of `beit finetune` on disk, and the network in it."
    r = recipe_named("finetune", "nano")
    net = shaken(build_classifier(r, 3)).eval()
    content = {"config": as_config("finetune", r), "model": net.state_dict()} | parts
    save_checkpoint(tmp_path / "run.pt", content | {"classes": ["a", "b", "c"]})
    return tmp_path / "run.pt", net


def test_the_running_mean_of_a_run(tmp_path):
    mean = {n: 2 * x for n, x in kept_run(tmp_path)[1].state_dict().items()}
    kept = {f"module.{n}": x for n, x in mean.items()} | {"n_averaged": torch.tensor(7)}
    path, net = kept_run(tmp_path, ema=kept)

    got = load_weights(path, ema=True)

    assert got.state.keys() == mean.keys() and got.classes == ["a", "b", "c"]
    assert all(torch.equal(got.state[n], mean[n]) for n in mean)
    assert torch.equal(load_weights(path).state["cls_token"], net.cls_token)


@pytest.mark.parametrize("name", ("model_ema", "state_dict_ema"))
def test_the_running_mean_in_files_of_others(name, tmp_path):
    "The official code and timm keep it beside the weights, under these names."
    state = classifier("per block").state_dict()
    mean = {n: x / 2 for n, x in state.items()}
    torch.save({name.removesuffix("_ema"): state, name: mean}, tmp_path / "both.pth")

    got = load_weights(tmp_path / "both.pth", ema=True).state

    assert all(torch.equal(got[n], mean[n]) for n in mean)
    assert torch.equal(load_weights(tmp_path / "both.pth").state["cls_token"], state["cls_token"])


def test_no_running_mean_is_said(tmp_path):
    path, net = kept_run(tmp_path)
    to_hf(net, tmp_path / "hf")
    save_official(net, tmp_path / "plain.pth")

    for source, words in (
        (path, "run.pt: this run kept no running mean.*leave --ema out"),
        (tmp_path / "plain.pth", "plain.pth: there is no running mean"),
        (tmp_path / "hf", "knows no running mean"),
    ):
        with pytest.raises(BeitError, match=words):
            load_weights(source, ema=True)


def test_a_name_on_the_hub_is_no_file():
    with pytest.raises(BeitError, match="`hf download microsoft/beit-base-patch16-224 --local-dir"):
        load_weights("microsoft/beit-base-patch16-224")
    with pytest.raises(BeitError) as e:
        load_weights("tests/nothing")
    assert "hub" not in str(e.value)


def test_a_head_without_a_class_is_no_head(tmp_path):
    state = classifier("per block").state_dict()
    state |= {"head.weight": torch.zeros(0, 64), "head.bias": torch.zeros(0)}
    torch.save(state, tmp_path / "none.pth")

    assert "num_classes" not in load_weights(tmp_path / "none.pth").args


def test_half_a_file_says_so(tmp_path):
    path = tmp_path / "half.pth"
    torch.save({"model": classifier("paper").state_dict()}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    with pytest.raises(BeitError, match="damaged or no file of weights.*download it again"):
        load_weights(path)


def test_half_a_safetensors_says_so(tmp_path):
    path = tmp_path / "half.safetensors"
    save_file(classifier("paper").state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    with pytest.raises(BeitError, match="damaged or no file of weights.*download it again"):
        load_weights(path)


def test_an_archive_that_holds_no_weights(tmp_path):
    with ZipFile(tmp_path / "beit.pth", "w") as archive:
        archive.writestr("readme.txt", "pictures")

    with pytest.raises(BeitError, match="a zip archive without any weights of torch"):
        load_weights(tmp_path / "beit.pth")


def test_a_folder_without_its_configuration(tmp_path):
    to_hf(classifier("paper"), tmp_path / "hub")
    (tmp_path / "hub" / "config.json").unlink()
    (tmp_path / "empty").mkdir()

    with pytest.raises(BeitError, match="has no config.json"):
        load_weights(tmp_path / "hub")
    with pytest.raises(BeitError, match="empty is neither a run nor"):
        load_weights(tmp_path / "empty")


def a_run(command, model, tmp_path, **fields):
    "A checkpoint as `beit pretrain` or `beit finetune` leaves one."
    recipe = recipe_named(command, "nano", **fields)
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"config": as_config(command, recipe), "model": model.state_dict()})
    return path


def test_runs_say_how_their_pictures_were_cut(tmp_path):
    model = shaken(build_classifier(recipe_named("finetune", "nano"), 10))

    whole = load_weights(a_run("finetune", model, tmp_path))
    cut = load_weights(a_run("finetune", model, tmp_path, augment="none"))

    assert (whole.view.crop_pct, cut.view.crop_pct) == (1.0, 0.875)
    assert whole.source == "`beit finetune`" and same(load_official(tmp_path / "last.pt"), model)


@pytest.mark.parametrize("kept", ["x", [[0.5] * 5], [[0.5] * 5, [0.0] * 5], [[0.5] * 3] * 2])
def test_a_record_of_mean_and_std_that_is_none(kept, tmp_path):
    r = recipe_named("finetune", "nano", in_chans=5)
    config = as_config("finetune", r) | {"inputs": {"mean_std": kept}}
    state = build_classifier(r, 10).state_dict()
    save_checkpoint(tmp_path / "last.pt", {"config": config, "model": state})

    with pytest.raises(BeitError, match="last.pt: the mean and std of 5 channels .* are damaged"):
        load_weights(tmp_path / "last.pt")


def test_bands_of_a_bare_file_are_assumed_aloud(tmp_path, capfd):
    save_official(classifier("paper", SIZE | dict(in_chans=5)), tmp_path / "five.pth")

    SAID.clear()
    BeitForImageClassification.from_pretrained(tmp_path / "five.pth", num_heads=4)

    assert "do not tell how 5 channels are normalised; taken for" in capfd.readouterr().err


def test_files_that_only_look_like_ours(tmp_path):
    own = classifier("paper", SIZE | dict(embed_dim=256))
    torch.save({"config": {"lr": 0.1}, "model": own.state_dict()}, tmp_path / "theirs.pth")
    config = as_config("tokenizer", recipe_named("tokenizer", "nano"))
    save_checkpoint(tmp_path / "dvae.pt", {"config": config, "model": {"x": torch.zeros(2)}})

    assert same(load_official(tmp_path / "theirs.pth"), own)
    with pytest.raises(BeitError, match="come from `beit tokenizer` and are no BEiT"):
        load_weights(tmp_path / "dvae.pt")


def test_a_network_is_read_once(tmp_path, monkeypatch):
    model = classifier("per block")
    save_official(model, tmp_path / "ours.pth")
    read = []
    whole = checkpoints.read_weights_file
    monkeypatch.setattr(checkpoints, "read_weights_file", lambda p: (read.append(p), whole(p))[1])

    assert same(load_official(tmp_path / "ours.pth"), model)
    assert len(read) == 1


@pytest.mark.parametrize("whose", ("ours", "timm's", "transformers'"))
def test_a_network_in_memory_knows_its_heads(whose, tmp_path, capfd):
    "No tensor of the paper's form tells them; 64 numbers a head would be one head here, not four."
    ours = BeitForImageClassification(7, **SIZE, layer_norm_eps=1e-6 if whose != "ours" else 1e-3)
    model = shaken(ours).eval()
    theirs = model
    if whose == "timm's":
        form = dict(use_abs_pos_emb=True, use_rel_pos_bias=False, init_values=None)
        theirs = timm.models.beit.Beit(num_classes=7, **SIZE, **form).eval()
        theirs.load_state_dict(model.state_dict())
    if whose == "transformers'":
        transformers = pytest.importorskip("transformers")
        model.save_pretrained(tmp_path)
        theirs = transformers.BeitForImageClassification.from_pretrained(tmp_path).eval()

    again = BeitForImageClassification.from_pretrained(theirs)

    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        close(again(x), model(x))
    assert "number of heads" not in capfd.readouterr().err
