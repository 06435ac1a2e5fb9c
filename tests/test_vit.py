"""The Vision Transformer: parity with timm, what goes in, how it begins, what comes out."""

from dataclasses import fields
from math import sqrt

import pytest
import torch
from helpers_models import FORMS, SIZE, a_batch, forms, shaken
from torch import nn

from beit_nb import BeitError
from beit_nb.configs import Backbone, PretrainRecipe
from beit_nb.patches import patchify, unpatchify
from beit_nb.task_configs import FinetuneRecipe
from beit_nb.vit import (
    WEIGHT_INITS,
    Embeddings,
    VisionTransformer,
    backbone_args,
    sincos_pos_embed,
    trunc_normal_one_std_,
    xavier_,
)

# --- timm


@forms
def test_timm_logits_and_gradients(form):
    from timm.models.beit import Beit

    ours = shaken(VisionTransformer(**SIZE, **FORMS[form]))
    theirs = Beit(**SIZE, **dict(use_abs_pos_emb=True) | FORMS[form], num_classes=0, global_pool="")
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert set(missing.missing_keys) <= {"norm.weight", "norm.bias"}
    assert not missing.unexpected_keys
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
        assert want.norm() > 0, name
        assert (p.grad - want).norm() <= 1e-5 * want.norm(), name


@forms
def test_timm_weights_load_strictly(form):
    from timm.models.beit import Beit

    theirs = Beit(**SIZE, **dict(use_abs_pos_emb=True) | FORMS[form], num_classes=10)
    heads = ("norm.", "fc_norm.", "head.")
    body = {k: v for k, v in theirs.state_dict().items() if not k.startswith(heads)}

    VisionTransformer(**SIZE, **FORMS[form]).load_state_dict(body)


# --- what goes in


def test_masked_patches_are_the_mask_token_and_know_their_place():
    embeddings = Embeddings(32, 4, 3, 64)
    embeddings.mask_token = nn.Parameter(torch.randn(1, 1, 64))
    nn.init.normal_(embeddings.pos_embed)
    nn.init.normal_(embeddings.cls_token)
    images, mask = a_batch()
    hidden = mask.flatten(1)

    tokens = embeddings.embed(images, mask) - embeddings.pos_embed  # places taken away again

    patches = embeddings.patch_embed(images)
    wanted = torch.where(hidden[..., None], embeddings.mask_token, patches)
    torch.testing.assert_close(tokens[:, 1:], wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens[:, :1], embeddings.cls_token.expand(3, -1, -1))
    assert torch.equal(embeddings.embed(images, hidden), embeddings.embed(images, mask))


def test_masks_that_do_not_fit_are_refused():
    images, mask = a_batch()
    with pytest.raises(ValueError, match="no mask token"):
        VisionTransformer(**SIZE)(images, mask)
    with pytest.raises(ValueError, match=r"make one mask of \(8, 8\) for each image"):
        VisionTransformer(**SIZE)(images, mask[:2])


def test_only_positions_give_the_patches_an_order():
    images, _ = a_batch()
    order = torch.randperm(64)
    shuffled = unpatchify(patchify(images, 4)[:, order], 4)
    blind = VisionTransformer(**SIZE, use_abs_pos_emb=False, weight_init="xavier").eval()
    seeing = VisionTransformer(**SIZE, pos_embed_init="sincos", weight_init="xavier").eval()

    def moved(model):
        return (model(shuffled)[:, 1:] - model(images)[:, 1:][:, order]).abs().max()

    assert moved(blind) < 1e-5
    assert moved(seeing) > 0.01


# --- how it begins


def test_trunc_normal_is_cut_at_one_std():
    draw = trunc_normal_one_std_(torch.empty(200_000))
    reference = nn.init.trunc_normal_(torch.empty(200_000), std=0.02, a=-0.02, b=0.02)

    assert draw.abs().max() <= 0.020001
    assert abs(draw.std() / reference.std() - 1) < 0.01
    assert abs(draw.std() / 0.02 - 0.54) < 0.005
    assert abs(draw.mean()) < 0.0002


def test_xavier_counts_a_convolution_as_a_matrix():
    kernel = nn.Conv2d(3, 64, 4).weight.detach()
    assert xavier_(kernel).shape == (64, 48)
    assert kernel.abs().max() <= sqrt(6 / (64 + 48)) < 1.01 * kernel.abs().max()


def test_sincos_positions():
    table = sincos_pos_embed(3, 5, 8).view(3, 5, 4, 2)
    row, column = torch.arange(3.0), torch.arange(5.0)
    for i, frequency in enumerate((1, 1 / 100)):
        by_row = torch.stack([(row * frequency).sin(), (row * frequency).cos()], 1)
        torch.testing.assert_close(table[:, 2, :2, i], by_row)
        by_column = torch.stack([(column * frequency).sin(), (column * frequency).cos()], 1)
        torch.testing.assert_close(table[1, :, 2:, i], by_column)
    with pytest.raises(BeitError, match="divisible by 4"):
        sincos_pos_embed(3, 5, 6)


@pytest.mark.parametrize("weight_init", WEIGHT_INITS)
def test_initial_weights(weight_init):
    torch.manual_seed(0)
    model = VisionTransformer(**SIZE | dict(embed_dim=128), weight_init=weight_init)
    spread = {"beit": 0.54 * 0.02, "beit_finetune": 0.02, "xavier": sqrt(2 / (128 + 512))}

    for number, block in enumerate(model.blocks, 1):
        layers = {"fc1": block.mlp.fc1.weight, "fc2": block.mlp.fc2.weight * sqrt(2 * number)}
        for name, w in layers.items():
            assert abs(w.std() / spread[weight_init] - 1) < 0.03, (number, name)
        assert (block.mlp.fc1.bias == 0).all() and (block.attn.q_bias == 0).all()
        proj = block.attn.proj.weight * sqrt(2 * number)
        assert abs(proj.std() / block.attn.qkv.weight.std() - 1) < 0.5  # xavier: 256 against 512
    if weight_init == "beit_finetune":  # torch's own, as in the official code
        assert model.patch_embed.proj.bias.abs().max() > 0
    else:
        assert (model.patch_embed.proj.bias == 0).all()
    assert model.pos_embed.std() < 0.03 and model.pos_embed[0, 0].std() > 0


def test_sincos_start_leaves_cls_without_a_place():
    model = VisionTransformer(**SIZE, pos_embed_init="sincos")
    assert (model.pos_embed[0, 0] == 0).all()
    assert torch.equal(model.pos_embed[0, 1:], sincos_pos_embed(8, 8, 64))


@pytest.mark.parametrize("bad", [dict(weight_init="he"), dict(pos_embed_init="cosine")])
def test_unknown_beginnings_are_refused(bad):
    with pytest.raises(BeitError, match=f"{next(iter(bad))}='{next(iter(bad.values()))}'"):
        VisionTransformer(**SIZE, **bad)


def test_the_seed_decides_the_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in VisionTransformer(**SIZE).parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_drop_path_grows_linearly():
    model = VisionTransformer(**SIZE | dict(depth=5), drop_path_rate=0.2)
    rates = [block.drop_path.p for block in model.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert VisionTransformer(**SIZE | dict(depth=1), drop_path_rate=0.2).blocks[0].drop_path.p == 0


# --- what comes out


@forms
def test_intermediates_end_with_the_features(form):
    model = shaken(VisionTransformer(**SIZE, **FORMS[form]))
    images, _ = a_batch()

    streams = model.forward_intermediates(images)

    assert [s.shape for s in streams] == [(3, 65, 64)] * 3
    assert torch.equal(streams[-1], model(images))


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_single_tokens_equal_the_whole_stream(use_checkpoint):
    model = VisionTransformer(**SIZE, drop_path_rate=0.5, use_checkpoint=use_checkpoint)
    images, _ = a_batch()
    token_index = torch.tensor([0, 7, 64, 65, 190])

    torch.manual_seed(0)
    whole = model(images).flatten(0, 1)[token_index]
    torch.manual_seed(0)
    some = model(images, token_index=token_index)

    torch.testing.assert_close(some, whole, atol=1e-5, rtol=1e-5)


def test_checkpointing_saves_memory_and_changes_nothing():
    model = shaken(VisionTransformer(**SIZE, drop_path_rate=0.5))
    images, _ = a_batch()

    def kept_and_gradients():
        kept = []

        def keep(tensor):
            kept.append(tensor.numel())
            return tensor

        model.zero_grad()
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(images).square().mean()
        loss.backward()
        return sum(kept), torch.cat([p.grad.flatten() for p in model.parameters()])

    everything, grads = kept_and_gradients()
    model.use_checkpoint = True
    inputs_only, grads_again = kept_and_gradients()

    assert inputs_only < everything / 5
    torch.testing.assert_close(grads_again, grads, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("recipe", [PretrainRecipe(), FinetuneRecipe()])
def test_backbone_args_are_the_shape_in_a_recipe(recipe):
    recipe.grad_checkpointing = True
    shape = {f.name: getattr(recipe, f.name) for f in fields(Backbone)}

    args = backbone_args(recipe)

    assert args.pop("use_checkpoint") is True
    assert args == shape | dict(
        weight_init=recipe.weight_init, pos_embed_init=recipe.pos_embed_init
    )


def test_the_parts_are_importable_from_vit_and_from_the_top():
    import beit_nb
    from beit_nb import transformer, vit

    for name in ("Attention", "Block", "DropPath", "RelativePositionBias"):
        assert getattr(vit, name) is getattr(transformer, name) is getattr(beit_nb, name)
