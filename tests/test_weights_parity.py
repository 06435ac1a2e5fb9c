"""Logits against timm and Hugging Face, both ways: B and L at 224 and 384 pixels.

Base has all of its twelve blocks at 224 pixels, and at 384 in the form that is released at that
size, the paper's classifier. Elsewhere two blocks do: each block is spelled like the next, and of
large no more fit into memory.

`pytest -s tests/test_weights_parity.py` prints the largest error of each direction, over the
largest logit.
"""

import pytest
import timm
import torch
import transformers
from helpers_models import shaken

from beit_nb.checkpoints import load_model, load_weights, save_official
from beit_nb.classifier import BeitForImageClassification
from beit_nb.converting import convert, timm_arguments, timm_state
from beit_nb.mim import BeitForMaskedImageModeling
from beit_nb.vit import VisionTransformer

SHAPES = {"B": dict(embed_dim=768, num_heads=12), "L": dict(embed_dim=1024, num_heads=16)}
FORMS = {
    ("paper", "classifier"): dict(use_abs_pos_emb=True),
    ("paper", "mim"): dict(use_abs_pos_emb=True),
    ("BEiT+", "classifier"): dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1),
    ("BEiT+", "mim"): dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1),
}
everywhere = [
    pytest.mark.parametrize("job", ("classifier", "mim")),
    pytest.mark.parametrize("form", ("paper", "BEiT+")),
    pytest.mark.parametrize("img_size", (224, 384)),
    pytest.mark.parametrize("shape", SHAPES),
]


def in_all(test):
    for mark in everywhere:
        test = mark(test)
    return test


def network(shape, img_size, form, job):
    kind = BeitForMaskedImageModeling if job == "mim" else BeitForImageClassification
    head = dict(vocab_size=50) if job == "mim" else dict(num_classes=7)
    fields = SHAPES[shape] | FORMS[form, job] | head
    whole = shape == "B" and (img_size == 224 or (form, job) == ("paper", "classifier"))
    depth = 12 if whole else 2
    return shaken(kind(img_size=img_size, depth=depth, **fields)).eval()


def error(a, b):
    return float((a - b).abs().max() / b.abs().max())


def tell(direction, peer, case, value):
    print(f"\n{direction} {peer.__name__} {peer.__version__}, {case}: {value:.1e}", end="")
    assert value <= 1e-5


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(autouse=True)
def nothing_is_drawn(monkeypatch):
    "All parameters are moved or loaded; to draw what they begin with takes a third of the time."
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda x, *args, **options: x.zero_())


@pytest.mark.slow
@in_all
@torch.no_grad()
def test_timm(shape, img_size, form, job):
    ours = network(shape, img_size, form, job)
    x = torch.randn(1, 3, img_size, img_size)
    case = f"{shape} {img_size} {form} {job}"
    weights = load_weights(ours)
    name, args = timm_arguments(weights)
    theirs = timm.create_model(name, **args).eval()

    theirs.load_state_dict(timm_state(weights.state), strict=True)

    if job == "mim":
        ask = dict(use_abs_pos_emb=form == "paper", use_rel_pos_bias=form != "paper")
        back = VisionTransformer.from_pretrained(theirs, use_shared_rel_pos_bias=False, **ask)
        features = theirs.forward_features(x)
        tell("to", timm, case, error(ours.norm(ours.forward_features(x)), features))
        tell("from", timm, case, error(theirs.norm(back(x)), features))
    else:
        back = load_model(theirs)
        tell("to", timm, case, error(ours(x), theirs(x)))
        tell("from", timm, case, error(back(x), theirs(x)))
        assert same(back.state_dict(), ours.state_dict())


@pytest.mark.slow
@in_all
@torch.no_grad()
def test_hugging_face(shape, img_size, form, job, tmp_path):
    ours = network(shape, img_size, form, job)
    case = f"{shape} {img_size} {form} {job}"
    save_official(ours, tmp_path / "ours.pth")
    kind = "BeitForMaskedImageModeling" if job == "mim" else "BeitForImageClassification"
    x = torch.randn(1, 3, img_size, img_size)
    hidden = torch.rand(1, (img_size // 16) ** 2) < 0.4

    convert(tmp_path / "ours.pth", tmp_path / "hub", "hf")
    theirs = getattr(transformers, kind).from_pretrained(tmp_path / "hub").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_model(tmp_path / "theirs")

    if job == "mim":
        logits = theirs(x, bool_masked_pos=hidden).logits
        answers = [net(x, hidden, return_all_tokens=True) for net in (ours, back)]
    else:
        logits = theirs(x).logits
        answers = [net(x) for net in (ours, back)]
    tell("to", transformers, case, error(answers[0], logits))
    tell("from", transformers, case, error(answers[1], logits))
    assert same(back.state_dict(), ours.state_dict())
