"Weights that move: resized tables, other heads, and what does not fit."

from dataclasses import replace

import pytest
import torch
from helpers_models import SIZE, shaken

from beit_nb import BeitError, checkpoints, resizing
from beit_nb.checkpoints import load_backbone, load_weights
from beit_nb.classifier import BeitForImageClassification
from beit_nb.classifier_files import build_classifier, build_from_checkpoint, load_classifier
from beit_nb.engine.runs import save_checkpoint
from beit_nb.limits import as_config
from beit_nb.mim import BeitForMaskedImageModeling
from beit_nb.pretraining import build_mim, load_mim
from beit_nb.probing import probe_networks
from beit_nb.recipes import recipe_named
from beit_nb.vit import VisionTransformer

PLUS = dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
SHARED = dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1)


@pytest.mark.parametrize(
    "form", [{}, SHARED, PLUS, dict(use_rel_pos_bias=True, use_shared_rel_pos_bias=True)]
)
def test_a_model_reloads_its_own_kind_exactly(form):
    old = shaken(VisionTransformer(**SIZE, **form)).eval()
    new = VisionTransformer(**SIZE, **form)
    assert load_backbone(new, old.state_dict(), (8, 8)) == []
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(old(x), new.eval()(x))


def test_a_shared_table_means_the_same_in_every_block():
    old = shaken(BeitForMaskedImageModeling(**SIZE, vocab_size=9, **SHARED)).eval()
    new = BeitForImageClassification(10, **SIZE, **PLUS).eval()
    load_backbone(new, old.state_dict(), (8, 8))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        old.forward_features(x), new.forward_features(x), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "form, words",
    [
        (dict(depth=4), "depth is 3 in the checkpoint, but 4 in this model; set it with --depth"),
        (dict(depth=2), "depth is 3 in the checkpoint, but 2"),
        (dict(init_values=None), "gamma_1"),
        (dict(embed_dim=32), "shape"),
        (dict(use_rel_pos_bias=False), "use_rel_pos_bias"),
        (dict(patch_size=8), "patch_embed"),
    ],
)
def test_what_does_not_fit_is_named(form, words):
    old = BeitForMaskedImageModeling(**SIZE, vocab_size=9, **SHARED).state_dict()
    with pytest.raises(BeitError, match=words) as e:
        load_backbone(BeitForImageClassification(10, **SIZE | PLUS | form), old, (8, 8))
    assert "\n" not in str(e.value)


def test_weights_arrive_in_a_model_without_memory():
    old = shaken(BeitForMaskedImageModeling(**SIZE, vocab_size=9, **SHARED))
    real = BeitForImageClassification(10, **SIZE, **PLUS)
    with torch.device("meta"):
        empty = BeitForImageClassification(10, **SIZE, **PLUS)

    fresh = load_backbone(real, old.state_dict(), (8, 8))

    assert load_backbone(empty, old.state_dict(), (8, 8)) == fresh
    want = real.state_dict()
    for name, value in empty.state_dict().items():
        assert value.is_meta if name in fresh else torch.equal(value, want[name]), name


def loaded_classifier(file, r):
    return load_classifier(file)[0]


def loaded_body(file, r):
    return build_from_checkpoint(replace(r, init=str(file)), 10)


def loaded_probe(file, r):
    return probe_networks(load_weights(file), seed=0)[0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("load", [loaded_classifier, loaded_body, loaded_probe])
def test_every_loader_brings_all_weights(load, tmp_path):
    r = recipe_named("finetune", "nano", embed_dim=32, depth=2, num_heads=2)
    saved = shaken(build_classifier(r, 10)).state_dict()
    state = dict(model=saved, config=as_config("finetune", r), classes=[*"0123456789"])
    save_checkpoint(tmp_path / "fine.pt", state)

    loaded = load(tmp_path / "fine.pt", r).state_dict()

    assert loaded.keys() == saved.keys()
    heads = {n for n in saved if n.startswith("head.") and load is loaded_probe}  # another job
    assert all(torch.equal(loaded[n].cpu(), saved[n]) for n in saved.keys() - heads)


@pytest.mark.filterwarnings("error")
def test_a_loaded_pre_training_has_all_weights(tmp_path):
    r = recipe_named("pretrain", "nano", tokenizer="none", embed_dim=32, depth=2, num_heads=2)
    saved = shaken(build_mim(r)).state_dict()
    save_checkpoint(tmp_path / "pre.pt", dict(model=saved, config=as_config("pretrain", r)))

    for model in (load_mim(tmp_path / "pre.pt")[0], loaded_probe(tmp_path / "pre.pt", r)):
        loaded = model.state_dict()
        body = {n for n in saved if n.startswith(("blocks.", "patch_embed.", "cls_token", "pos_"))}
        assert len(body) > 20 and all(torch.equal(loaded[n].cpu(), saved[n]) for n in body)


@pytest.mark.parametrize("how, told", (({}, True), ({"num_heads": 4}, False)))
def test_heads_that_no_file_tells_are_said(capsys, monkeypatch, how, told):
    monkeypatch.setattr("beit_nb.SAID", set())
    state = shaken(BeitForImageClassification(3, **SIZE | {"embed_dim": 48, "num_heads": 4}))

    BeitForImageClassification.from_pretrained(state.state_dict(), **how)

    assert ("do not tell the number of heads" in capsys.readouterr().err) == told


@pytest.mark.parametrize("name", ["load_backbone", "resize_pos_embed", "resize_rel_pos_bias"])
def test_what_lies_in_resizing_is_handed_on(name):
    assert getattr(checkpoints, name) is getattr(resizing, name)
    assert name in checkpoints.__all__


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "runs/per",
            r"nothing at .*runs/per \(do you mean pre\?\); give the --out folder of a run",
        ),
        ("away/from/here", "nothing at .*away/from/here; give"),
        (
            "nets",
            "neither a run nor .* Hugging Face's or timm's.*; of the files .*: mim.safetensors$",
        ),
        ("pictures", "neither a run nor .* no config.json with weights$"),
    ],
)
def test_a_slip_in_a_path_gets_a_hint(source, says, tmp_path):
    (tmp_path / "runs" / "pre").mkdir(parents=True)
    for folder, name in (("nets", "mim.safetensors"), ("pictures", "cat.jpg")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("")

    with pytest.raises(BeitError, match=says):
        load_weights(tmp_path / source)
