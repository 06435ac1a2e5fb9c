"""One network in four spellings: names there and back, shapes off the tensors, and the refusals."""

import pytest
import timm
import torch
from timm.models.beit import Beit

from beit_nb import BeitError
from beit_nb.classifier import BeitForImageClassification
from beit_nb.layouts import layout_of, shape_of, to_hf_names, to_official, unwrap
from beit_nb.mim import BeitForMaskedImageModeling

SIZE = dict(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2)
FORMS = {
    "paper": dict(use_abs_pos_emb=True),
    "per block": dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1),
    "shared": dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=1e-5),
}


def classifier(form, mean=True):
    torch.manual_seed(0)
    return BeitForImageClassification(5, use_mean_pooling=mean, **SIZE, **FORMS[form])


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mean", (True, False))
def test_there_and_back_bit_for_bit(form, mean):
    own = classifier(form, mean).state_dict()

    there = to_hf_names(own)

    assert layout_of(there) == "hf" and layout_of(own) == "official"
    assert same(to_official(there), own)


@pytest.mark.parametrize("form", FORMS)
def test_timm_takes_them_strictly_and_answers_the_same(form):
    ours = classifier(form).eval()
    theirs = Beit(num_classes=5, **SIZE, **FORMS["paper"] | FORMS[form]).eval()
    theirs.load_state_dict(to_official(ours.state_dict()), strict=True)
    x = torch.rand(2, 3, 32, 32)

    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-5)
    assert same(to_official(theirs.state_dict()), ours.state_dict())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("task", ("mean", "class token", "mim"))
def test_what_transformers_has_in_memory_is_read(form, task):
    transformers = pytest.importorskip("transformers")
    flags = FORMS[form]
    config = transformers.BeitConfig(
        image_size=32,
        patch_size=8,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        use_absolute_position_embeddings=flags["use_abs_pos_emb"],
        use_relative_position_bias="use_rel_pos_bias" in flags,
        use_shared_relative_position_bias="use_shared_rel_pos_bias" in flags,
        layer_scale_init_value=flags.get("init_values", 0.0),
        use_mean_pooling=task != "class token",
        use_mask_token=task == "mim",
        vocab_size=40,
        num_labels=5,
        layer_norm_eps=1e-6,
    )
    torch.manual_seed(0)
    if task == "mim":
        theirs = transformers.BeitForMaskedImageModeling(config).eval()
        ours = BeitForMaskedImageModeling(vocab_size=40, **SIZE, **flags).eval()
        ask = dict(bool_masked_pos=torch.ones(2, 16, dtype=torch.bool))
        answer = lambda x: ours(x, torch.ones(2, 16, dtype=torch.bool))  # noqa: E731
    else:
        theirs = transformers.BeitForImageClassification(config).eval()
        ours = classifier(form, task == "mean").eval()
        ask = {}
        answer = ours
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x = torch.rand(2, 3, 32, 32)

    ours.load_state_dict(to_official(theirs.state_dict()), strict=True)
    shape = shape_of(ours.state_dict())

    assert shape["num_heads"] == 2 and shape["img_size"] == 32
    logits = theirs(x, **ask).logits
    torch.testing.assert_close(answer(x).reshape(logits.shape), logits, atol=1e-5, rtol=1e-5)


def test_a_training_is_unwrapped():
    own = classifier("paper").state_dict()
    wrapped = {f"model.module.{name}": x for name, x in own.items()}
    wrapped |= {f"model_ema.{name}": 0 * x for name, x in own.items()}
    wrapped["optimizer.exp_avg"] = torch.zeros(2)

    assert same(unwrap(wrapped), own)


def test_a_bias_of_the_keys_is_refused_unless_it_is_zero():
    own = classifier("paper").state_dict()
    there = to_hf_names(own)
    name = "beit.encoder.layer.1.attention.attention.key.bias"
    there[name] = torch.zeros(128)
    assert same(to_official(there), own)

    there[name] = torch.ones(128)
    with pytest.raises(BeitError, match="block 1 has a bias for its keys"):
        to_official(there)


def test_index_buffers_are_dropped():
    own = classifier("per block").state_dict()
    index = "blocks.0.attn.relative_position_index"

    assert same(to_official(own | {index: torch.zeros(17, 17)}), own)


@pytest.mark.parametrize(
    "names, words",
    [
        ("", r"these 0 tensors are no BEiT \(nothing\)$"),
        ("a", r"this tensor is no BEiT \(a\)$"),
        ("abcd", r"these 4 tensors are no BEiT \(a, b, c ...\)$"),
    ],
)
def test_what_is_no_beit_is_refused(names, words):
    with pytest.raises(BeitError, match=words):
        to_official(dict.fromkeys(names, torch.zeros(3)))


def test_a_plain_vit_is_called_so():
    theirs = timm.create_model("vit_tiny_patch16_224", depth=1).state_dict()

    with pytest.raises(BeitError, match="plain ViT and no BEiT: blocks.0.attn.qkv.bias"):
        to_official(theirs)


def test_an_unknown_name_is_named():
    there = to_hf_names(classifier("paper").state_dict())
    there["beit.decoder.weight"] = torch.zeros(3)

    with pytest.raises(BeitError, match="beit.decoder.weight has no place in a BEiT"):
        to_official(there)


@pytest.mark.parametrize("form", FORMS)
def test_the_shape_is_read_off_the_tensors(form):
    own = classifier(form).state_dict()
    shape = shape_of(own)

    assert {name: shape[name] for name in SIZE} == SIZE
    BeitForImageClassification(5, **shape).load_state_dict(own, strict=True)


@pytest.mark.parametrize(
    "name, instead, words",
    [
        ("patch_embed.proj.weight", None, "is missing; the file is incomplete"),
        ("blocks.0.mlp.fc1.weight", None, "is missing; the file is incomplete"),
        ("patch_embed.proj.weight", torch.zeros(128, 192), "2 dimensions, but every BEiT has 4"),
        ("pos_embed", torch.zeros(1, 1 + 10 * 7, 128), "71 rows of positions belong to no square"),
    ],
)
def test_odd_tensors_are_one_line(name, instead, words):
    own = classifier("paper").state_dict()
    del own[name]
    if instead is not None:
        own[name] = instead

    with pytest.raises(BeitError, match=words) as e:
        shape_of(own)
    assert "\n" not in str(e.value)


def test_a_table_of_no_square_is_refused():
    own = classifier("shared").state_dict()
    own["rel_pos_bias.relative_position_bias_table"] = torch.zeros(19 * 13 + 3, 2)

    with pytest.raises(BeitError, match="250 rows of positions"):
        shape_of(own)


def test_a_narrow_network_has_one_head_unless_its_file_says_more():
    narrow = BeitForImageClassification(5, **SIZE | dict(embed_dim=48))
    tables = BeitForImageClassification(5, **SIZE | dict(embed_dim=48), **FORMS["per block"])

    assert shape_of(narrow.state_dict())["num_heads"] == 1
    assert shape_of(tables.state_dict())["num_heads"] == 2
