"""Heads for segmentation against Hugging Face's, SETR's and torch's, and a norm that two processes
share."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BeitConfig
from transformers.models.beit.modeling_beit import BeitFCNHead, BeitFPNNeck, BeitUperHead

from beit_nb import BeitError
from beit_nb.scale.launching import run_distributed
from beit_nb.segheads import (
    BatchNorm,
    ConvModule,
    FCNHead,
    LinearHead,
    SETRUPHead,
    UPerHead,
    norm_layer,
    pyramid_blocks,
    pyramid_steps,
    resize_maps,
    segmentation_loss,
    share_norms,
)

torch.set_num_threads(1)
CONFIG = BeitConfig(
    hidden_size=32, num_labels=7, auxiliary_channels=24, auxiliary_num_convs=1, num_hidden_layers=1
)
RENAMED = (
    ("psp_modules.blocks.0.conv.", "psp_modules.0.1."),
    ("psp_modules.blocks.1.conv.", "psp_modules.1.1."),
    ("psp_modules.blocks.2.conv.", "psp_modules.2.1."),
    ("psp_modules.blocks.3.conv.", "psp_modules.3.1."),
    ("psp_bottleneck.", "bottleneck."),
    ("convolution.", "conv."),
    ("normalization.", "bn."),
    ("classifier.", "conv_seg."),
)


def shaken(module):
    "A module in eval mode in which no number is 0, 1 or the same as its neighbor."
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand_like(value) * 0.3)
    return module.eval()


def as_ours(state):
    "Hugging Face's names of a head in memory to ours."
    renamed = {}
    for name, value in state.items():
        for theirs, ours in RENAMED:
            name = name.replace(theirs, ours)
        renamed[name] = value
    return renamed


def four_maps(dim=32, grid=8, batch=2):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(batch, dim, grid, grid, generator=g) for _ in range(4)]


def levels(maps, fpn1, fpn2):
    a, b, c, d = maps
    return [fpn1(a), fpn2(b), c, F.max_pool2d(d, 2)]


# Blocks and sizes.


@pytest.mark.parametrize(
    "depth, blocks", [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (4, (0, 1, 2, 3))]
)
def test_blocks_are_those_of_the_released_models(depth, blocks):
    assert pyramid_blocks(depth) == blocks


@pytest.mark.parametrize("depth", range(1, 40))
def test_every_depth_has_four_blocks(depth):
    blocks = pyramid_blocks(depth)

    assert list(blocks) == sorted(blocks) and blocks[0] >= 0 and blocks[3] == depth - 1


def test_resizing_lays_edges_on_edges():
    ramp = torch.arange(6.0).view(1, 1, 1, 6)

    large = resize_maps(ramp, (3, 12))

    by_hand = ((torch.arange(12) + 0.5) / 2 - 0.5).clamp(0, 5)
    torch.testing.assert_close(large, by_hand.expand(1, 1, 3, 12))


# The norm.


def test_alone_it_is_torchs_bit_for_bit():
    x = torch.randn(4, 6, 5, 5)
    ours, theirs = BatchNorm(6), nn.BatchNorm2d(6)

    for _ in range(3):
        assert torch.equal(ours(x), theirs(x))

    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_by_sums_it_is_torchs_too():
    weights = torch.randn(4, 6, 5, 5)
    leaves = [(2 + 3 * torch.randn(4, 6, 5, 5)).requires_grad_()]
    leaves.append(leaves[0].detach().clone().requires_grad_())
    ours, theirs = shaken(BatchNorm(6)).train(), nn.BatchNorm2d(6)
    theirs.load_state_dict(ours.state_dict())
    share_norms(ours, lambda sums: sums)

    outputs = [ours(leaves[0]), theirs(leaves[1])]
    for y in outputs:
        (y * weights).sum().backward()

    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, atol=1e-5, rtol=1e-4)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_half_precision_stays_half_and_sums_do_not():
    x = (300 + torch.randn(8, 4, 16, 16)).bfloat16()
    norm = BatchNorm(4)
    share_norms(norm, lambda sums: sums)

    y = norm(x)

    assert y.dtype == torch.bfloat16
    # what bfloat16 leaves of a spread of 1 at 300 are steps of 2; a sum in it would be far off
    torch.testing.assert_close(norm.running_mean, 0.1 * x.float().mean((0, 2, 3)))


def test_one_number_has_no_variance():
    with pytest.raises(BeitError, match="two pictures a step or norm 'group'"):
        norm_layer("batch", 4)(torch.ones(1, 4, 1, 1))
    norm_layer("batch", 4).eval()(torch.ones(1, 4, 1, 1))  # no averages are made


def test_a_norm_that_nobody_knows():
    with pytest.raises(BeitError, match="'batch' or 'group'"):
        norm_layer("instance", 4)


@pytest.mark.parametrize("channels", [4, 24, 64, 768])
def test_group_norm_minds_no_neighbors(channels):
    x = torch.randn(5, channels, 3, 3)
    norm = norm_layer("group", channels)

    torch.testing.assert_close(norm(x)[2:3], norm(x[2:3]), atol=1e-6, rtol=1e-5)


def decoder(norm="batch", dim=16):
    "UPerNet and SETR-PUP together, so that all kinds of norms are asked."
    from beit_nb.segheads import SETRUPHead, UPerHead, pyramid_steps

    torch.manual_seed(0)
    fpn1, fpn2 = pyramid_steps(dim, norm)
    uper = UPerHead(dim, 5, channels=8, norm=norm, dropout=0.0)
    pup = SETRUPHead(dim, 5, channels=8, num_convs=2, norm=norm)
    return nn.ModuleDict(dict(fpn1=fpn1, fpn2=fpn2, uper=uper, pup=pup))


def a_labelled_batch():
    g = torch.Generator().manual_seed(2)
    bright = torch.randn(8, 1, 1, 1, generator=g)  # pictures differ, so halves differ
    maps = [torch.randn(8, 16, 8, 8, generator=g) + bright for _ in range(4)]
    labels = torch.randint(0, 5, (8, 32, 32), generator=g)
    labels[0, :9] = 255
    return maps, labels


def loss_of(model, maps, labels):
    from beit_nb.segheads import segmentation_loss

    outputs = [model["uper"](levels(maps, model["fpn1"], model["fpn2"])), model["pup"](maps)]
    return segmentation_loss(outputs, labels)


def two_steps(norms):
    "Of each norm, for this process's half of a batch: loss, gradients, what the norms remember."
    from beit_nb.engine.processes import mean_over_ranks, rank, sum_over_ranks, wrap_model
    from beit_nb.segheads import share_norms

    maps, labels = a_labelled_batch()
    mine = slice(4 * rank(), 4 * rank() + 4)

    def compute_loss(model, batch, step):
        return loss_of(model, *batch), {}

    results = {}
    for norm in norms:
        model = decoder(norm)
        share_norms(model, sum_over_ranks)
        forward = wrap_model(model, compute_loss)
        for step in range(2):
            model.zero_grad()
            loss, _ = forward(([m[mine] for m in maps], labels[mine]), step)
            loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results[norm] = mean_over_ranks(loss.detach()), gradients, dict(model.named_buffers())
    return results


@pytest.mark.slow
@pytest.mark.usefixtures("quick_starts")
def test_two_processes_are_one():
    norms = ["batch", "group"]

    ranks = run_distributed(two_steps, norms, needs=(decoder, a_labelled_batch, loss_of, levels))

    maps, labels = a_labelled_batch()
    for norm in norms:
        whole = decoder(norm)
        for _ in range(2):
            whole.zero_grad()
            loss = loss_of(whole, maps, labels)
            loss.backward()
        for rank in ranks:
            shared, gradients, buffers = rank[norm]
            torch.testing.assert_close(shared, loss.detach(), atol=1e-6, rtol=0)
            for name, p in whole.named_parameters():
                torch.testing.assert_close(gradients[name], p.grad, atol=1e-6, rtol=0)
            for name, value in whole.named_buffers():
                torch.testing.assert_close(buffers[name], value, atol=1e-6, rtol=0)


def test_a_half_alone_is_another_network():
    "What the test above would notice: without shared sums gradients differ a thousand times more."
    maps, labels = a_labelled_batch()
    whole, half = decoder(), decoder()

    loss_of(whole, maps, labels).backward()
    for mine in (slice(4), slice(4, 8)):
        loss = loss_of(half, [m[mine] for m in maps], labels[mine])
        (loss / 2).backward()

    pairs = zip(whole.parameters(), half.parameters())
    assert max((p.grad - q.grad).abs().max() for p, q in pairs) > 1e-3


# The heads.


def test_upernet_is_hugging_faces():
    theirs, neck = shaken(BeitUperHead(CONFIG)), shaken(BeitFPNNeck(CONFIG))
    ours = UPerHead(32, 7).eval()
    ours.load_state_dict(as_ours(theirs.state_dict()))
    fpn1, fpn2 = pyramid_steps(32)
    names = {"conv_transpose1": "0", "normalization": "1", "conv_transpose2": "3"}
    state = neck.fpn1.state_dict()
    for name, number in names.items():
        state = {n.replace(f"{name}.", f"{number}."): x for n, x in state.items()}
    fpn1.load_state_dict(state)
    fpn2[0].load_state_dict(neck.fpn2.state_dict())
    maps = four_maps(grid=10)

    pyramid = levels(maps, fpn1.eval(), fpn2)

    for a, b in zip(pyramid, neck(maps)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(pyramid), theirs(pyramid), atol=1e-4, rtol=0)


def test_the_auxiliary_head_is_hugging_faces():
    theirs = shaken(BeitFCNHead(CONFIG))
    ours = FCNHead(32, 7, channels=24).eval()
    ours.load_state_dict(as_ours(theirs.state_dict()))
    maps = four_maps()

    torch.testing.assert_close(ours(maps), theirs(maps), atol=1e-5, rtol=1e-5)


def setr(head, tokens, grid):
    "The forward pass of SETR's VisionTransformerUpHead with four convolutions, step by step."
    x = F.layer_norm(tokens, tokens.shape[-1:], head.norm.weight, head.norm.bias, 1e-6)
    x = x.transpose(1, 2).reshape(len(x), -1, grid, grid)
    for i, brick in enumerate(head.convs):
        bn = brick.bn
        x = F.conv2d(x, brick.conv.weight, padding=1)
        x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        x = x.relu()
        if i == 3:
            x = F.conv2d(x, head.conv_seg.weight, head.conv_seg.bias)
        x = F.interpolate(x, size=x.shape[-1] * 2, mode="bilinear", align_corners=False)
    return x


def test_setr_pup_is_setrs():
    head = shaken(SETRUPHead(32, 7, channels=12))
    tokens = torch.randn(2, 25, 32)
    maps = [tokens.mT.unflatten(2, (5, 5))]

    torch.testing.assert_close(head(maps), setr(head, tokens, 5), atol=1e-4, rtol=1e-5)


def test_the_linear_head_is_one_matrix():
    head = shaken(LinearHead(32, 7))
    maps = four_maps()

    logits = head(maps)

    vector = F.layer_norm(maps[3][1, :, 2, 5], (32,), head.norm.weight, head.norm.bias, 1e-6)
    by_hand = head.conv_seg.weight.flatten(1) @ vector + head.conv_seg.bias
    torch.testing.assert_close(logits[1, :, 2, 5], by_hand, atol=1e-5, rtol=1e-5)


def test_names_are_mmsegmentations():
    "As in the released upernet_beit checkpoints, without `decode_head.` and `auxiliary_head.`."
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    bricks = ["bottleneck", "fpn_bottleneck", *(f"psp_modules.{i}.1" for i in range(4))]
    bricks += [f"{part}.{i}" for part in ("lateral_convs", "fpn_convs") for i in range(3)]
    names = {f"{b}.{n}" for b in bricks for n in ["conv.weight", *(f"bn.{n}" for n in norm)]}
    ends = {"conv_seg.weight", "conv_seg.bias"}

    assert set(UPerHead(32, 7).state_dict()) == names | ends
    auxiliary = {"convs.0.conv.weight", *(f"convs.0.bn.{n}" for n in norm)}
    assert set(FCNHead(32, 7).state_dict()) == auxiliary | ends
    fpn1, fpn2 = pyramid_steps(32)
    steps = {"0.weight", "0.bias", "3.weight", "3.bias", *(f"1.{n}" for n in norm)}
    assert set(fpn1.state_dict()) == steps and set(fpn2.state_dict()) == {"0.weight", "0.bias"}


def test_parameters_of_base():
    "ADE20K's 150 classes; the shapes are counted by hand in lesson 60."
    D = 768
    with torch.device("meta"):
        parts = {
            "linear": [LinearHead(D, 150)],
            "setr_pup": [SETRUPHead(D, 150)],
            "upernet": [UPerHead(D, 150), *pyramid_steps(D)],
            "fcn": [FCNHead(D, 150)],
        }
    counted = {k: sum(p.numel() for m in v for p in m.parameters()) for k, v in parts.items()}

    uper_matrices = (4 + 45 + 3 + 27 + 36) * D**2  # pooled, bottleneck, laterals, smooth, the mix
    uper_norms = (4 + 1 + 3 + 3 + 1) * 2 * D
    steps = 3 * 4 * D**2 + 3 * D + 2 * D  # two doublings and a norm, one doubling
    assert counted == {
        "linear": D * 150 + 150 + 2 * D,
        "setr_pup": 9 * 256 * (D + 3 * 256) + 4 * 512 + 256 * 150 + 150 + 2 * D,
        "upernet": uper_matrices + uper_norms + D * 150 + 150 + steps,
        "fcn": 9 * D * 256 + 512 + 256 * 150 + 150,
    }


def test_a_fresh_head_has_no_opinion():
    "conv_seg starts at N(0, 0.01), its bias at 0 (mmsegmentation)."
    head = SETRUPHead(32, 7, channels=64)

    assert (head.conv_seg.bias == 0).all()
    assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.2)
    # kaiming, fan_out: variance 2 / (9 * 64)
    assert ConvModule(32, 64, 3).conv.weight.std().item() == pytest.approx(0.0589, rel=0.05)


# The loss.


def test_loss_counts_all_pixels_and_sees_the_known():
    logits = torch.randn(2, 5, 4, 4)
    labels = torch.randint(0, 5, (2, 8, 8))
    labels[:, :2] = 255

    loss = segmentation_loss([logits], labels)

    known = F.cross_entropy(resize_maps(logits, (8, 8)), labels, ignore_index=255)
    torch.testing.assert_close(loss, known * 6 / 8)


def test_loss_of_auxiliary_heads_weighs_less():
    a, b, c = (torch.randn(2, 5, s, s) for s in (8, 4, 2))
    labels = torch.randint(0, 5, (2, 8, 8))

    parts = [segmentation_loss([x], labels) for x in (a, b, c)]

    whole = segmentation_loss([a, b, c], labels)
    torch.testing.assert_close(whole, parts[0] + 0.4 * (parts[1] + parts[2]))


def test_loss_of_nothing_known_is_zero():
    labels = torch.full((1, 8, 8), 255)

    assert segmentation_loss([torch.randn(1, 5, 4, 4)], labels) == 0
