"""Masked image modelling: parity with Hugging Face, official files, and what may not leak."""

import re

import pytest
import torch
import torch.nn.functional as F
from helpers_models import FORMS, SIZE, a_batch, forms, gradients, shaken
from safetensors.torch import save_file

from beit_nb import BeitError
from beit_nb.attention import attention_maps
from beit_nb.mim import BeitForMaskedImageModeling, masked_indices, mim_accuracy, mim_loss
from beit_nb.patches import patchify, unpatchify
from beit_nb.transformer import relative_position_index

PLUS = FORMS["shared bias, LayerScale"]


def small(**args):
    return BeitForMaskedImageModeling(**SIZE | dict(vocab_size=50) | args)


# --- official files


@forms
def test_official_files_with_their_index_load_strictly(form):
    model = small(**FORMS[form])
    state = model.state_dict()
    assert not any("index" in k for k in state)
    for k in list(state):
        if k.endswith("relative_position_bias_table"):
            state[k.replace("bias_table", "index")] = relative_position_index(8, 8)

    model.load_state_dict(state)


@pytest.mark.parametrize(
    "count, args",
    [
        (92_089_856, dict()),
        (91_965_776, PLUS),
        (311_674_880, dict(embed_dim=1024, depth=24, num_heads=16)),
        (311_534_016, dict(embed_dim=1024, depth=24, num_heads=16) | PLUS | dict(init_values=1e-5)),
    ],
)
def test_parameter_counts_of_the_official_models(count, args):
    with torch.device("meta"):
        model = BeitForMaskedImageModeling(**args)
    assert sum(p.numel() for p in model.parameters()) == count


# --- Hugging Face

TO_HUGGING_FACE = [
    (r"^(cls_token|mask_token)$", r"beit.embeddings.\1"),
    (r"^pos_embed$", "beit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "beit.embeddings.patch_embeddings.projection"),
    (r"^norm\.", "layernorm."),
    (r"^rel_pos_bias\.", "beit.encoder.relative_position_bias."),
    (r"^blocks\.", "beit.encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.gamma_", ".lambda_"),
    (r"\.attn\.q_bias$", ".attention.attention.query.bias"),
    (r"\.attn\.v_bias$", ".attention.attention.value.bias"),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.attn\.(relative.*)", r".attention.attention.relative_position_bias.\1"),
]


def to_hf_names(state):
    """Our (official) names to the ones that transformers writes on disk.

    The qkv matrix falls into three.
    """
    out = {}
    for key, value in state.items():
        for pattern, new in TO_HUGGING_FACE:
            key = re.sub(pattern, new, key)
        if key.endswith(".attn.qkv.weight"):
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                out[key.replace("attn.qkv", f"attention.attention.{part}")] = rows.clone()
        else:
            out[key] = value.clone()
    return out


def hugging_face_twin(ours, args, folder):
    "The same model in transformers, loaded from a file that holds our weights."
    from transformers import BeitConfig, BeitForMaskedImageModeling as HfBeit

    config = BeitConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=32,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        drop_path_rate=0.0,
        layer_norm_eps=1e-6,
        use_mask_token=True,
        use_mean_pooling=True,
        layer_scale_init_value=args.get("init_values", 0.0),
        use_absolute_position_embeddings=args.get("use_abs_pos_emb", True),
        use_relative_position_bias=args.get("use_rel_pos_bias", False),
        use_shared_relative_position_bias=args.get("use_shared_rel_pos_bias", False),
    )
    config.architectures = ["BeitForMaskedImageModeling"]
    config.save_pretrained(folder)
    weights = to_hf_names(ours.state_dict())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    theirs, report = HfBeit.from_pretrained(folder, output_loading_info=True)
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[fault], fault
    return theirs.eval()


@pytest.mark.parametrize("form", ["paper", "shared bias, LayerScale", "bias per block, LayerScale"])
@torch.no_grad()
def test_hugging_face_logits_and_attention(form, tmp_path):
    ours = shaken(small(**FORMS[form])).eval()
    theirs = hugging_face_twin(ours, FORMS[form], tmp_path)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    images, mask = a_batch()
    hidden = mask.flatten(1)
    close = dict(atol=1e-5, rtol=1e-5)

    logits = theirs(images, bool_masked_pos=hidden).logits
    torch.testing.assert_close(ours(images, mask, return_all_tokens=True), logits, **close)
    torch.testing.assert_close(ours(images, mask), logits[hidden], **close)

    theirs.set_attn_implementation("eager")
    shares = theirs(images, bool_masked_pos=hidden, output_attentions=True).attentions
    for a, b in zip(attention_maps(ours, images, mask), shares, strict=True):
        torch.testing.assert_close(a, b, **close)


# --- hidden and visible


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_hidden_places_only_equals_all_places_and_then_choosing(use_checkpoint):
    model = small(**PLUS, drop_path_rate=0.5, use_checkpoint=use_checkpoint)
    images, mask = a_batch()
    targets = torch.randint(0, 50, (int(mask.sum()),))
    ways = {
        "hidden": lambda: model(images, mask),
        "all": lambda: model(images, mask, return_all_tokens=True)[mask.flatten(1)],
        "index": lambda: model(images, mask, masked_index=masked_indices(mask)),
    }

    grads = {}
    for name, logits in ways.items():
        model.zero_grad()
        torch.manual_seed(0)
        mim_loss(logits(), targets).backward()
        grads[name] = gradients(model)

    assert (grads["all"] - grads["hidden"]).norm() <= 1e-6 * grads["hidden"].norm()
    assert torch.equal(grads["index"], grads["hidden"])


def test_no_pixel_of_a_hidden_patch_is_seen():
    model = shaken(small(**PLUS)).eval()
    images, mask = a_batch()

    def with_noise(where):
        patches = patchify(images, 4)
        return unpatchify(torch.where(where[..., None], torch.randn_like(patches), patches), 4)

    hidden = mask.flatten(1)
    logits = model(images, mask)
    assert torch.equal(model(with_noise(hidden), mask), logits)
    assert not torch.allclose(model(with_noise(~hidden), mask), logits, atol=1e-3)


def test_masked_indices_count_over_the_batch():
    mask = torch.tensor([[[False, True], [False, False]], [[True, False], [False, True]]])
    assert masked_indices(mask).tolist() == [1, 4, 7]
    assert torch.equal(masked_indices(mask), masked_indices(mask.flatten(1)))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x, m: (x, m & False), "raise num_mask_patches"),
        (lambda x, m: (x, m[:2]), "one mask"),
        (lambda x, m: (x, m[:, :7]), "one mask"),
        (lambda x, m: (x[..., :28], m), "wanted"),
        (lambda x, m: (x[:, :1], m), "wanted"),
    ],
)
def test_bad_input_is_named_in_one_line(change, words):
    with pytest.raises(ValueError, match=words) as e:
        small()(*change(*a_batch()))
    assert "\n" not in str(e.value)


def test_an_empty_mask_is_bad_input():
    images, mask = a_batch()
    with pytest.raises(BeitError):
        small()(images, mask & False)


# --- loss and accuracy


def test_loss_is_the_mean_negative_log_probability():
    logits = torch.randn(5, 7)
    targets = torch.tensor([0, 6, 3, 3, 1])
    by_hand = -sum(logits[i].log_softmax(0)[t] for i, t in enumerate(targets)) / 5

    torch.testing.assert_close(mim_loss(logits, targets), by_hand)
    torch.testing.assert_close(mim_loss(logits[None], targets[None]), by_hand)
    assert mim_loss(logits.bfloat16(), targets).dtype == torch.float32


def test_accuracy_counts_first_guesses_and_passes_over_negative_targets():
    logits = F.one_hot(torch.tensor([2, 1, 0, 0]), 3).float()
    assert mim_accuracy(logits, torch.tensor([2, 1, 1, 0])) == 0.75
    assert mim_accuracy(logits, torch.tensor([2, -1, 1, -100])) == 0.5


@forms
def test_bf16_and_checkpointing_keep_loss_and_gradients(form):
    images, mask = a_batch()
    targets = torch.randint(0, 50, (int(mask.sum()),), generator=torch.Generator().manual_seed(2))
    model = shaken(small(**FORMS[form]))

    def loss_and_gradients(bf16):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = mim_loss(model(images, mask), targets)
        loss.backward()
        return loss.item(), gradients(model)

    loss, grads = loss_and_gradients(bf16=False)
    loss16, grads16 = loss_and_gradients(bf16=True)
    model.use_checkpoint = True
    loss_again, grads_again = loss_and_gradients(bf16=False)

    assert abs(loss16 - loss) < 0.02 * loss
    assert (grads16 - grads).norm() < 0.05 * grads.norm()
    assert loss_again == loss
    torch.testing.assert_close(grads_again, grads, atol=1e-7, rtol=1e-5)
