"Folders of Hugging Face's: what transformers reads from us, and what we read from it."

import json
import re

import pytest
import torch
from helpers_models import shaken
from PIL import Image
from safetensors.torch import load_file, save_file

from beit_nb import SAID, BeitError
from beit_nb.classifier import BeitForImageClassification, hf_preprocessing
from beit_nb.hub import hf_config, model_card, read_hf_folder, write_hf_folder
from beit_nb.images import IMAGENET_MEAN_STD
from beit_nb.layouts import to_official
from beit_nb.mim import BeitForMaskedImageModeling
from beit_nb.vit import VisionTransformer

SMALL = dict(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2)
SCALE = dict(init_values=0.1)
BASE = dict(img_size=64, embed_dim=768, depth=3, num_heads=12)
LARGE = dict(img_size=64, embed_dim=1024, depth=2, num_heads=16)
POSITIONS = {
    "absolute": dict(),
    "absolute, LayerScale": SCALE,
    "shared": dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True) | SCALE,
    "per block": dict(use_abs_pos_emb=False, use_rel_pos_bias=True) | SCALE,
    "per block, no LayerScale": dict(use_abs_pos_emb=False, use_rel_pos_bias=True),
}


def classifier(pooling=True, **args):
    model = BeitForImageClassification(5, use_mean_pooling=pooling, **args)
    return shaken(model).eval()


def mim(**args):
    return shaken(BeitForMaskedImageModeling(vocab_size=50, **args)).eval()


def theirs(name, folder):
    "The network that transformers builds from a folder; all tensors must find their place."
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[fault], fault
    return model.eval()


@torch.no_grad()
def logits_of(model, their=False):
    "Logits of two pictures; of all patches in pre-training, with some of them hidden."
    size = model.config.image_size if their else model.patch_embed.img_size[0]
    g = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, size, size, generator=g)
    if "lm_head.weight" not in model.state_dict():
        return model(images).logits if their else model(images)
    patch = model.config.patch_size if their else model.patch_embed.patch_size
    hidden = torch.rand(2, (size // patch) ** 2, generator=g) < 0.4
    if their:
        return model(images, bool_masked_pos=hidden).logits
    return model(images, hidden, return_all_tokens=True)


def relative_error(ours, others):
    return float((ours - others).abs().max() / others.abs().max())


def assert_same_state(found, model):
    own = model.state_dict()
    assert found.keys() == own.keys()
    assert [n for n in own if not torch.equal(found[n], own[n])] == []


def rebuilt(found, kind):
    model = kind(**found.args)
    model.load_state_dict(found.state)
    return model.eval()


def edit(folder, **changes):
    "Change values of a config.json; None takes one out."
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


# --- what transformers reads from us


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, form, pooling",
    [(BASE, form, True) for form in POSITIONS]
    + [(LARGE, "per block", True), (BASE, "absolute", False), (BASE, "per block", False)],
)
def test_transformers_reads_a_classifier(shape, form, pooling, tmp_path):
    ours = classifier(pooling, **shape, **POSITIONS[form])

    write_hf_folder(tmp_path, ours.state_dict(), "abcde")

    twin = theirs("BeitForImageClassification", tmp_path)
    assert relative_error(logits_of(ours), logits_of(twin, True)) < 1e-5
    assert twin.config.id2label[3] == "d" and twin.config.label2id["e"] == 4
    assert_same_state(read_hf_folder(tmp_path).state, ours)


@pytest.mark.slow
@pytest.mark.parametrize("shape, form", [(BASE, form) for form in POSITIONS] + [(LARGE, "shared")])
def test_transformers_reads_a_pretrained_network(shape, form, tmp_path):
    ours = mim(**shape, **POSITIONS[form])

    write_hf_folder(tmp_path, ours.state_dict())

    twin = theirs("BeitForMaskedImageModeling", tmp_path)
    assert relative_error(logits_of(ours), logits_of(twin, True)) < 1e-5
    # a second final norm would be 2 * width more
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in ours.parameters())
    assert_same_state(read_hf_folder(tmp_path).state, ours)


def test_transformers_prepares_pictures_as_we_say(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = classifier(**SMALL)
    write_hf_folder(tmp_path, model.state_dict(), mean_std=IMAGENET_MEAN_STD, crop_pct=0.8)
    images = torch.full((3, 50, 70), 255, dtype=torch.uint8)

    processor = transformers.BeitImageProcessor.from_pretrained(tmp_path)
    x = processor(images, return_tensors="pt")["pixel_values"]

    mean, std = (torch.tensor(v)[:, None, None] for v in IMAGENET_MEAN_STD)
    assert x.shape == (1, 3, 32, 32) and processor.size["shortest_edge"] == 40
    torch.testing.assert_close(x[0], ((1 - mean) / std).expand(3, 32, 32), atol=1e-5, rtol=1e-5)


def test_every_value_that_changes_the_result_is_written():
    "Whatever transformers' default is: a file that is silent about one of these is a trap."
    transformers = pytest.importorskip("transformers")

    config = hf_config(mim(**SMALL, **POSITIONS["shared"]).state_dict())

    assert BEIT_VALUES <= transformers.BeitConfig.__dataclass_fields__.keys()
    assert BEIT_VALUES <= config.keys()
    assert config["layer_norm_eps"] == 1e-6  # theirs: 1e-12
    assert config["use_mean_pooling"] is True and config["use_mask_token"] is True


BEIT_VALUES = {
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "use_mask_token",
    "use_absolute_position_embeddings",
    "use_relative_position_bias",
    "use_shared_relative_position_bias",
    "layer_scale_init_value",
    "drop_path_rate",
    "use_mean_pooling",
}


def test_paper_form_says_positions_and_no_layer_scale():
    config = hf_config(classifier(**SMALL).state_dict())
    assert config["use_absolute_position_embeddings"] is True
    assert config["layer_scale_init_value"] == 0


def test_what_tensors_do_not_tell_is_handed_in(tmp_path):
    shape = SMALL | dict(num_heads=4)
    ours = classifier(**shape)

    write_hf_folder(tmp_path, ours.state_dict(), known=dict(num_heads=4, drop_path_rate=0.2))

    found = read_hf_folder(tmp_path)
    assert found.args["num_heads"] == 4 and found.args["drop_path_rate"] == 0.2
    assert relative_error(logits_of(ours), logits_of(rebuilt(found, type(ours)))) == 0


# --- what we read from transformers


def a_folder_of_theirs(folder, name, largest="50GB", **args):
    transformers = pytest.importorskip("transformers")
    config = transformers.BeitConfig(
        hidden_size=128,
        num_attention_heads=2,
        intermediate_size=512,
        image_size=32,
        patch_size=8,
        **dict(num_hidden_layers=2, layer_norm_eps=1e-6) | args,
    )
    model = shaken(getattr(transformers, name)(config)).eval()
    model.save_pretrained(folder, max_shard_size=largest)
    return model


THEIR_FORMS = {
    "absolute": dict(use_absolute_position_embeddings=True, layer_scale_init_value=0.0),
    "shared": dict(use_shared_relative_position_bias=True),
    "per block": dict(use_relative_position_bias=True),
}
their_forms = pytest.mark.parametrize("form", THEIR_FORMS)


@pytest.mark.parametrize("pooling", [True, False], ids=["mean", "class token"])
@their_forms
def test_a_classifier_that_transformers_saved(form, pooling, tmp_path):
    args = THEIR_FORMS[form] | dict(use_mean_pooling=pooling, id2label=dict(enumerate("xyz")))
    saved = a_folder_of_theirs(tmp_path, "BeitForImageClassification", **args)

    found = read_hf_folder(tmp_path)

    ours = rebuilt(found, BeitForImageClassification)
    assert relative_error(logits_of(ours), logits_of(saved, True)) < 1e-5
    assert found.classes == ["x", "y", "z"]


@their_forms
def test_a_pretrained_network_that_transformers_saved(form, tmp_path):
    args = THEIR_FORMS[form] | dict(vocab_size=40, use_mask_token=True)
    saved = a_folder_of_theirs(tmp_path, "BeitForMaskedImageModeling", **args)

    found = read_hf_folder(tmp_path)

    ours = rebuilt(found, BeitForMaskedImageModeling)
    assert relative_error(logits_of(ours), logits_of(saved, True)) < 1e-5


@pytest.mark.parametrize("zipped", [True, False], ids=["torch 1.6", "before"])
def test_pytorch_model_bin_in_the_names_of_either_generation(zipped, tmp_path):
    saved = a_folder_of_theirs(tmp_path, "BeitForImageClassification", **THEIR_FORMS["shared"])
    old = load_file(tmp_path / "model.safetensors")
    new = saved.state_dict()  # as in memory
    assert old.keys() != new.keys()
    (tmp_path / "model.safetensors").unlink()
    states = []
    for state in (old, new):
        path = tmp_path / "pytorch_model.bin"
        torch.save(dict(state), path, _use_new_zipfile_serialization=zipped)
        states.append(read_hf_folder(tmp_path).state)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_the_small_number_in_the_norms_is_kept(tmp_path):
    "transformers' own default, with tokens so small that it decides the answer."
    args = THEIR_FORMS["absolute"] | dict(layer_norm_eps=1e-12)
    saved = a_folder_of_theirs(tmp_path / "theirs", "BeitForImageClassification", **args)
    with torch.no_grad():
        for p in saved.parameters():
            p.mul_(1e-2)
    saved.save_pretrained(tmp_path / "theirs")

    ours = BeitForImageClassification.from_pretrained(tmp_path / "theirs")

    assert relative_error(logits_of(ours), logits_of(saved, True)) < 1e-5
    official = BeitForImageClassification.from_pretrained(tmp_path / "theirs", layer_norm_eps=1e-6)
    assert relative_error(logits_of(official), logits_of(saved, True)) > 1e-3
    ours.save_pretrained(tmp_path / "ours")
    assert (
        relative_error(
            logits_of(theirs("BeitForImageClassification", tmp_path / "ours"), True),
            logits_of(ours),
        )
        < 1e-5
    )


def in_parts(folder, zipped=None):
    "A folder of theirs in parts: their own, or pytorch_model.bin as older versions cut it."
    args = THEIR_FORMS["per block"] | dict(id2label=dict(enumerate("xyz")))
    saved = a_folder_of_theirs(folder, "BeitForImageClassification", "400KB", **args)
    index = folder / "model.safetensors.index.json"
    parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    assert len(parts) > 2
    if zipped is not None:
        where = json.loads(index.read_text().replace(".safetensors", ".bin"))
        for part in parts:
            tensors = load_file(folder / part)
            name = part.replace(".safetensors", ".bin")
            torch.save(tensors, folder / name, _use_new_zipfile_serialization=zipped)
            (folder / part).unlink()
        index.unlink()
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(where))
    return saved


@pytest.mark.parametrize("zipped", [None, True, False], ids=["safetensors", "torch 1.6", "before"])
def test_weights_in_parts(zipped, tmp_path):
    saved = in_parts(tmp_path, zipped)

    found = read_hf_folder(tmp_path)

    ours = rebuilt(found, BeitForImageClassification)
    assert relative_error(logits_of(ours), logits_of(saved, True)) < 1e-5


def lose_a_part(folder, index):
    next(folder.glob("*-00002-of-*")).unlink()


def lose_a_tensor(folder, index):
    index["weight_map"]["beit.decoder.weight"] = index["weight_map"].popitem()[1]


def climb(folder, index):
    index["weight_map"]["classifier.bias"] = "../model.safetensors"


def no_map(folder, index):
    index["weight_map"] = ["model.safetensors"]


def number(folder, index):
    index["weight_map"]["classifier.bias"] = 7


@pytest.mark.parametrize(
    "fault, words",
    [
        (lose_a_part, "00002-of-.* is no file"),
        (lose_a_tensor, r"no part holds beit.decoder.weight \(1 such"),
        (climb, "does not map tensors to files of its folder"),
        (no_map, "does not map tensors to files of its folder"),
        (number, "does not map tensors to files of its folder"),
    ],
)
def test_parts_that_do_not_make_a_whole(fault, words, tmp_path):
    in_parts(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    fault(tmp_path, index)
    path.write_text(json.dumps(index))

    with pytest.raises(BeitError, match=words) as e:
        read_hf_folder(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("form", ["absolute", "per block"])
def test_the_body_of_a_network_for_segmentation(form, tmp_path, capfd):
    transformers = pytest.importorskip("transformers")
    args = THEIR_FORMS[form] | dict(num_hidden_layers=4, out_indices=[1, 2, 3, 4])
    saved = a_folder_of_theirs(tmp_path, "BeitForSemanticSegmentation", **args)
    SAID.clear()
    capfd.readouterr()

    body = VisionTransformer.from_pretrained(tmp_path)

    said = capfd.readouterr().err
    assert "left out: auxiliary_head, decode_head, fpn1, fpn2" in said and said.count("\n") == 1
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs = saved.beit(images).last_hidden_state
        assert relative_error(body(images), theirs) < 1e-5
    assert isinstance(saved, transformers.BeitForSemanticSegmentation)
    new = BeitForImageClassification.from_pretrained(tmp_path, num_classes=3)
    assert new.fc_norm is not None  # the mean of the patches, as ever


def test_names_of_classes_count_by_their_order(tmp_path):
    "Hugging Face took two of ImageNet-22K's names out, and left their numbers unused."
    write_hf_folder(tmp_path, classifier(**SMALL).state_dict())

    edit(tmp_path, id2label={"0": "a", "10": "e", "3": "b", "4": "c", "6": "d"})
    assert read_hf_folder(tmp_path).classes == [*"abcde"]

    edit(tmp_path, id2label={"0": "a"})
    with pytest.raises(BeitError, match="names 1 classes, but its head has 5"):
        read_hf_folder(tmp_path)


def test_a_pickle_that_wants_to_run_is_refused(tmp_path):
    class Bad:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    write_hf_folder(tmp_path, classifier(**SMALL).state_dict())
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": Bad()}, tmp_path / "pytorch_model.bin")

    with pytest.raises(BeitError, match="refused"):
        read_hf_folder(tmp_path)
    assert not (tmp_path / "ran").exists()


# --- wrong folders


def two_norms(folder):
    pytest.importorskip("transformers")
    args = dict(use_mask_token=True, use_mean_pooling=False, vocab_size=9)
    a_folder_of_theirs(folder, "BeitForMaskedImageModeling", **args)


def body_alone(folder):
    a_folder_of_theirs(folder, "BeitModel")


def half(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def without(name):
    "A fault: the folder's file of weights lacks a tensor."

    def take_out(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, path, {"format": "pt"})

    return take_out


FAULTS = {
    "no config.json": lambda f: (f / "config.json").unlink(),
    "no weights; expected model.safetensors": lambda f: (f / "model.safetensors").unlink(),
    "damaged or no file of weights": half,
    "config.json is damaged": lambda f: (f / "config.json").write_text("{"),
    "type 'vit'": lambda f: edit(f, model_type="vit"),
    "type None": lambda f: edit(f, model_type=None),
    "hidden_act": lambda f: edit(f, hidden_act="relu"),
    "image_size": lambda f: edit(f, image_size=[32, 64]),
    "num_hidden_layers 0": lambda f: edit(f, num_hidden_layers=0),
    "intermediate_size 1.5": lambda f: edit(f, intermediate_size=1.5),
    "patch_size '8'": lambda f: edit(f, patch_size="8"),
    "15 missing": lambda f: edit(f, num_hidden_layers=3),
    "unexpected .*gamma_1": lambda f: edit(f, layer_scale_init_value=0),
    "2 missing .*norm.*2 unexpected": lambda f: edit(f, use_mean_pooling=False),
    "of another shape": lambda f: edit(f, intermediate_size=256),
    "layer_norm_eps -1": lambda f: edit(f, layer_norm_eps=-1),
    "1 missing .head.bias": without("classifier.bias"),
    "two final norms": two_norms,
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_wrong_folder_is_one_line(words, tmp_path):
    write_hf_folder(tmp_path, classifier(**SMALL, **SCALE).state_dict())

    FAULTS[words](tmp_path)

    with pytest.raises(BeitError, match=words) as e:
        read_hf_folder(tmp_path)
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_a_block_without_its_keys_is_one_line(tmp_path):
    name = "beit.encoder.layer.1.attention.attention.key.weight"
    write_hf_folder(tmp_path, classifier(**SMALL).state_dict())

    without(name)(tmp_path)

    with pytest.raises(BeitError, match=f"{name} is missing"):
        read_hf_folder(tmp_path)


def test_a_body_without_a_head_is_one_line(tmp_path):
    body_alone(tmp_path)
    with pytest.raises(BeitError) as e:
        read_hf_folder(tmp_path)
    assert "\n" not in str(e.value)


def test_a_network_without_a_head_or_with_other_labels_is_refused_and_nothing_written(tmp_path):
    state = classifier(**SMALL).state_dict()
    body = {n: x for n, x in state.items() if not n.startswith("head")}
    for tensors, classes, words in ((body, (), "no head"), (state, "abc", "3 names of classes")):
        with pytest.raises(BeitError, match=words):
            write_hf_folder(tmp_path / "new", tensors, classes)
    assert not (tmp_path / "new").exists()


# --- the other files


def test_preprocessing_and_classes_come_back(tmp_path):
    state = classifier(**SMALL).state_dict()
    write_hf_folder(tmp_path, state, "vwxyz", IMAGENET_MEAN_STD, crop_pct=0.8)
    found = read_hf_folder(tmp_path)
    assert found.classes == [*"vwxyz"] and found.view.crop_pct == 0.8
    assert tuple(map(tuple, found.mean_std)) == IMAGENET_MEAN_STD


def test_the_card_says_what_is_known_and_no_more():
    config = hf_config(classifier(**SMALL).state_dict())
    about = {"title": "Mine", "license": "mit", "recipe": "nano", "data": "digits", "top-1": 0.5}
    full = model_card(config, hf_preprocessing(32), 1234, about)
    bare = model_card(config, hf_preprocessing(32), 1234)
    for words in ("license: mit", "# Mine", "| recipe | nano |", "| data | digits |", "1,234"):
        assert words in full
    assert full.startswith("---\nlibrary_name: transformers\nlicense: mit\ntags:\n")
    assert "license" not in bare and "recipe" not in bare


@pytest.mark.parametrize("build, says", [(classifier, r"1\.000|0\.\d"), (mim, r"\d")])
def test_the_lines_of_the_card_run(build, says, tmp_path, monkeypatch, capsys):
    write_hf_folder(tmp_path, build(**SMALL).state_dict())
    Image.new("RGB", (50, 40), "red").save(tmp_path / "picture.png")
    lines = (tmp_path / "README.md").read_text().split("```")[1].removeprefix("python")
    monkeypatch.chdir(tmp_path)

    exec(lines.replace("path/of/this/folder", "."), {})

    assert re.search(says, capsys.readouterr().out)


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("config.json", [1], "holds no dict"),
        ("config.json", {"id2label": {"cat": "0"}}, "does not map numbers to names"),
        ("config.json", {"id2label": ["cat"]}, "does not map numbers to names"),
        ("config.json", {"id2label": {"0": 1, "1": None}}, "id2label in .*/config.json does not"),
        ("config.json", {"id2label": {"0": "cat"}}, "/config.json names 1 classes, but its head"),
        ("preprocessor_config.json", "none", "holds no dict"),
        ("preprocessor_config.json", {"size": None}, "resizes to None; for a network of 32 pix"),
        ("preprocessor_config.json", {"size": {"longest_edge": 40}}, "resizes to {"),
        ("preprocessor_config.json", {"size": 8}, "resizes to 8; .* from 32 to 640"),
        ("preprocessor_config.json", {"image_mean": 0.5}, "normalises by 0.5"),
        ("preprocessor_config.json", {"image_std": [0.5, "half", 0.5]}, "normalises by"),
        ("preprocessor_config.json", {"image_std": [0.5, 0, 0.5]}, "divides by an image_std of 0"),
    ],
)
def test_odd_settings_are_one_line(file, content, words, tmp_path):
    write_hf_folder(tmp_path, classifier(**SMALL).state_dict(), crop_pct=0.5)
    path = tmp_path / file
    if isinstance(content, dict):
        content = json.loads(path.read_text()) | content
    path.write_text(json.dumps(content))

    with pytest.raises(BeitError, match=words) as e:
        read_hf_folder(tmp_path)
    assert "\n" not in str(e.value)


# --- traps on their side


def test_their_body_alone_brings_a_norm_that_nobody_trained(tmp_path):
    "BeitModel of a pre-training draws a pooler; its hidden states come before the final norm."
    transformers = pytest.importorskip("transformers")
    ours = mim(**SMALL, **POSITIONS["shared"])
    write_hf_folder(tmp_path, ours.state_dict())

    body, report = transformers.BeitModel.from_pretrained(tmp_path, output_loading_info=True)

    assert set(report["missing_keys"]) == {"pooler.layernorm.weight", "pooler.layernorm.bias"}
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        stream = ours.forward_features(images)
        states = body.eval()(images).last_hidden_state
        assert relative_error(stream, states) < 1e-5 < relative_error(ours.norm(stream), states)


def test_a_fresh_network_of_theirs_begins_otherwise(tmp_path):
    "Zeros for [S], mask and positions, and deep blocks as strong as the first: not BEiT's start."
    transformers = pytest.importorskip("transformers")
    ours = BeitForMaskedImageModeling(vocab_size=50, **SMALL)
    config = hf_config(ours.state_dict())

    fresh = transformers.BeitForMaskedImageModeling(transformers.BeitConfig(**config))
    begun = to_official(fresh.state_dict())

    own = ours.state_dict()
    for name in ("cls_token", "mask_token", "pos_embed"):
        assert own[name].any() and not begun[name].any()

    def strength(state):
        "Of the last block's way out, over that of its way in; its layer divides by sqrt(2 * 2)."
        mlp = (state[f"blocks.1.mlp.{part}.weight"].std() for part in ("fc2", "fc1"))
        return float(next(mlp) / next(mlp))

    assert strength(begun) == pytest.approx(1, rel=0.05)
    assert strength(own) == pytest.approx(0.5, rel=0.05)


# --- folders of timm's


def timms(folder, **changes):
    "A folder that timm saved, with changes of its config.json."
    from timm.models import create_model, save_for_hf

    size = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2, num_classes=5)
    save_for_hf(create_model("beit_base_patch16_224", **size), folder)
    edit(folder, **changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"pretrained_cfg": {"crop_pct": 90}}, "crop_pct 90"),
        ({"pretrained_cfg": {"crop_mode": "border"}}, "crop_mode 'border'"),
        ({"pretrained_cfg": {"mean": 0.5}}, "normalises by 0.5"),
        ({"pretrained_cfg": {"std": [0.5, 0, 0.5]}}, "and std"),
        ({"pretrained_cfg": [1]}, "holds no"),
        ({"label_names": ["cat", "dog"]}, "names 2 classes, but its head has 5"),
        ({"label_names": "cat"}, "does not map numbers to names"),
        ({"model_type": "vit"}, "type 'vit'"),
    ],
)
def test_odd_folders_of_timms_are_one_line(changes, words, tmp_path):
    timms(tmp_path, **changes)

    with pytest.raises(BeitError, match=words) as e:
        read_hf_folder(tmp_path)
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_timms_folders_of_other_networks(tmp_path):
    import timm
    from timm.models import save_for_hf

    save_for_hf(timm.create_model("vit_tiny_patch16_224", depth=1), tmp_path)

    with pytest.raises(BeitError, match=f"{tmp_path}: this is a plain ViT and no BEiT"):
        read_hf_folder(tmp_path)


def test_what_timm_says_of_names_and_heads(tmp_path):
    names = {"0": "a", "1": "b", "2": "c", "3": "d", "4": "e"}
    timms(tmp_path, label_names=names, pretrained_cfg=None, model_args={"num_heads": 2})

    found = read_hf_folder(tmp_path)

    assert found.classes == [*"abcde"] and found.mean_std == IMAGENET_MEAN_STD
    assert found.view.crop_pct == 0.875 and found.args["num_heads"] == 2 and not found.guessed
