"""Small Transformers in every form that goes by the name of BEiT, for comparisons."""

import pytest
import torch

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
    "Images (B, 3, 32, 32) and masks (B, 8, 8)."
    g = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, 32, 32, generator=g), torch.rand(B, 8, 8, generator=g) < masked


def gradients(model):
    "All gradients of a model, one after the other."
    return torch.cat([p.grad.flatten() for p in model.parameters()])
