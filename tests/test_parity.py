"""Our transformer against the same weights in timm and in Hugging Face transformers."""

import re

import pytest
import torch
from safetensors.torch import save_file

from beit_nb.attention import attention_maps
from beit_nb.mim import BeitForMaskedImageModeling, mim_loss
from beit_nb.vit import VisionTransformer, relative_position_index

SIZE = dict(img_size=32, patch_size=4, embed_dim=64, depth=3, num_heads=4)
FORMS = {
    "paper": dict(),
    "shared bias, LayerScale": dict(
        use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1
    ),
    "bias per block, LayerScale": dict(
        use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1
    ),
    "everything": dict(use_rel_pos_bias=True, use_shared_rel_pos_bias=True, init_values=0.1),
    "no positions": dict(use_abs_pos_emb=False),
}
forms = pytest.mark.parametrize("form", FORMS)


def shaken(model):
    "The model with every parameter moved, so that no zero hides a mistake."
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def a_batch(B=3, masked=0.4):
    g = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, 32, 32, generator=g), torch.rand(B, 8, 8, generator=g) < masked


@forms
def test_timm_logits_and_gradients(form):
    from timm.models.beit import Beit

    ours = shaken(VisionTransformer(**SIZE, **FORMS[form]))
    theirs = Beit(**SIZE, **dict(use_abs_pos_emb=True) | FORMS[form], num_classes=0, global_pool="")
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert set(missing.missing_keys) <= {"norm.weight", "norm.bias"} and not missing.unexpected_keys
    images, _ = a_batch()
    x = ours(images)
    y = theirs.forward_features(images)
    torch.testing.assert_close(theirs.norm(x), y, atol=1e-5, rtol=1e-5)
    # a plain sum of squares is constant after a norm
    direction = torch.randn_like(y)
    (theirs.norm(x) * direction).mean().backward()
    (y * direction).mean().backward()
    for name, p in ours.named_parameters():
        want = theirs.get_parameter(name).grad
        assert want.norm() > 0 and (p.grad - want).norm() <= 1e-5 * want.norm(), name


@forms
def test_timm_weights_load_strictly(form):
    from timm.models.beit import Beit

    theirs = Beit(**SIZE, **dict(use_abs_pos_emb=True) | FORMS[form], num_classes=10)
    body = {
        k: v
        for k, v in theirs.state_dict().items()
        if not k.startswith(("norm.", "fc_norm.", "head."))
    }
    VisionTransformer(**SIZE, **FORMS[form]).load_state_dict(body)


@forms
def test_official_files_with_their_index_load_strictly(form):
    model = BeitForMaskedImageModeling(**SIZE, vocab_size=50, **FORMS[form])
    state = model.state_dict()
    assert not any("index" in k for k in state)
    for k in list(state):
        if k.endswith("relative_position_bias_table"):
            state[k.replace("bias_table", "index")] = relative_position_index(8, 8)
    model.load_state_dict(state)


def to_hf_names(state):
    """Our (official) names to the ones that transformers writes on disk.

    The qkv matrix falls into three.
    """
    rules = [
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
        (
            r"\.attn\.relative_position_bias_table",
            ".attention.attention.relative_position_bias.relative_position_bias_table",
        ),
    ]
    out = {}
    for key, value in state.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        if key.endswith(".attn.qkv.weight"):
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                out[key.replace("attn.qkv", f"attention.attention.{part}")] = rows.clone()
        else:
            out[key] = value.clone()
    return out


@pytest.mark.parametrize("form", ["paper", "shared bias, LayerScale", "bias per block, LayerScale"])
def test_hugging_face_logits(form, tmp_path):
    from transformers import BeitConfig, BeitForMaskedImageModeling as HfBeit

    args = FORMS[form]
    ours = shaken(BeitForMaskedImageModeling(**SIZE, vocab_size=50, **args)).eval()
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
    config.save_pretrained(tmp_path)
    save_file(
        to_hf_names(ours.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    theirs, report = HfBeit.from_pretrained(tmp_path, output_loading_info=True)
    assert (
        not report["missing_keys"]
        and not report["unexpected_keys"]
        and not report["mismatched_keys"]
    )
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    images, mask = a_batch()
    with torch.no_grad():
        logits = theirs.eval()(images, bool_masked_pos=mask.flatten(1)).logits
        torch.testing.assert_close(
            ours(images, mask, return_all_tokens=True), logits, atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            ours(images, mask), logits[mask.flatten(1)], atol=1e-5, rtol=1e-5
        )
        theirs.set_attn_implementation("eager")
        shares = theirs(images, bool_masked_pos=mask.flatten(1), output_attentions=True).attentions
        for a, b in zip(attention_maps(ours, images, mask), shares, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (8, 8), (14, 14)])
def test_relative_position_index_equals_timm(grid):
    from timm.models.beit import gen_relative_position_index

    assert torch.equal(relative_position_index(*grid), gen_relative_position_index(grid))


@pytest.mark.parametrize(
    "count, args",
    [
        (92_089_856, dict()),
        (91_965_776, dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1)),
        (311_674_880, dict(embed_dim=1024, depth=24, num_heads=16)),
        (
            311_534_016,
            dict(
                embed_dim=1024,
                depth=24,
                num_heads=16,
                use_abs_pos_emb=False,
                use_shared_rel_pos_bias=True,
                init_values=1e-5,
            ),
        ),
    ],
)
def test_parameter_counts_of_the_official_models(count, args):
    with torch.device("meta"):
        assert sum(p.numel() for p in BeitForMaskedImageModeling(**args).parameters()) == count


@forms
def test_bf16_and_checkpointing_keep_loss_and_gradients(form):
    images, mask = a_batch()
    targets = torch.randint(0, 50, (int(mask.sum()),), generator=torch.Generator().manual_seed(2))
    model = shaken(BeitForMaskedImageModeling(**SIZE, vocab_size=50, **FORMS[form]))

    def loss_and_gradients(bf16):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = mim_loss(model(images, mask), targets)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, grads = loss_and_gradients(False)
    loss16, grads16 = loss_and_gradients(True)
    model.use_checkpoint = True
    loss_again, grads_again = loss_and_gradients(False)
    assert abs(loss16 - loss) < 0.02 * loss and (grads16 - grads).norm() < 0.05 * grads.norm()
    assert loss_again == loss and torch.allclose(grads_again, grads, atol=1e-7)


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
    model = BeitForMaskedImageModeling(**SIZE, vocab_size=50)
    with pytest.raises(ValueError, match=words) as e:
        model(*change(*a_batch()))
    assert "\n" not in str(e.value)
