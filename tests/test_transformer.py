"""The Transformer's block: against torch and timm, and its fast forms against the plain one."""

import pytest
import torch
import torch.nn.functional as F
from helpers_models import gradients, shaken
from torch import nn

from beit_nb import BeitError
from beit_nb.device import KERNELS
from beit_nb.transformer import (
    Attention,
    Block,
    DropPath,
    Mlp,
    RelativePositionBias,
    add_branch,
    attention,
    attention_probs,
    forward_fast,
    look_up_bias,
    relative_position_index,
)

GRID = (2, 3)
N = 1 + GRID[0] * GRID[1]
D = 16


def set_kernels(monkeypatch, **choices):
    monkeypatch.setitem(KERNELS, "cpu", KERNELS["cpu"]._replace(**choices))


# --- attention


@pytest.mark.parametrize("with_bias", [False, True])
def test_fused_attention_equals_two_products(with_bias, monkeypatch):
    "Outputs and gradients; and the table decides which of them runs."
    calls = []
    fused = F.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(args)
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    inputs = [torch.randn(2, 3, 7, 4, requires_grad=True) for _ in range(3)]
    bias = torch.randn(3, 7, 7, requires_grad=True) if with_bias else None
    wanted = inputs + ([bias] if with_bias else [])
    direction = torch.randn(2, 3, 7, 4)

    results = []
    for choice in (False, True):
        set_kernels(monkeypatch, fused_attention=choice)
        out = attention(*inputs, bias)
        results.append([out, *torch.autograd.grad((out * direction).sum(), wanted)])
        assert len(calls) == int(choice)

    for plain, with_kernel in zip(*results):
        torch.testing.assert_close(plain, with_kernel, atol=1e-6, rtol=1e-5)


def test_fused_attention_in_bf16_takes_a_fp32_bias(monkeypatch):
    q, k, v = (torch.randn(2, 3, 7, 4, dtype=torch.bfloat16) for _ in range(3))
    bias = torch.randn(3, 7, 7)
    plain = attention(q, k, v, bias)

    set_kernels(monkeypatch, fused_attention=True)
    fused = attention(q, k, v, bias)

    assert plain.dtype == fused.dtype == torch.bfloat16
    torch.testing.assert_close(plain, fused, atol=0.03, rtol=0.03)


def test_probs_are_shares_and_follow_the_bias():
    q, k = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    bias = torch.zeros(3, 7, 7)
    bias[:, :, 5] = 100.0

    probs = attention_probs(q, k)
    forced = attention_probs(q, k, bias)

    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 3, 7))
    torch.testing.assert_close(probs, ((q / 2) @ k.mT).softmax(-1))  # sqrt(d) = 2
    assert (forced[..., 5] > 0.999).all()


def test_attention_equals_torch():
    ours = shaken(Attention(D, 4))
    theirs = nn.MultiheadAttention(D, 4, batch_first=True)
    state = {
        "in_proj_weight": ours.qkv.weight,
        "in_proj_bias": torch.cat([ours.q_bias, torch.zeros(D), ours.v_bias]),
        "out_proj.weight": ours.proj.weight,
        "out_proj.bias": ours.proj.bias,
    }
    theirs.load_state_dict(state)
    x = torch.randn(2, N, D)

    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], atol=1e-6, rtol=1e-5)


def test_own_and_shared_bias_add_up():
    layer = shaken(Attention(D, 2, window_size=GRID))
    shared = torch.randn(2, N, N)
    own = layer.bias()

    torch.testing.assert_close(layer.bias(shared), own + shared)
    assert Attention(D, 2).bias() is None
    assert Attention(D, 2).bias(shared) is shared


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(BeitError, match="embed_dim 10 is not divisible by num_heads 4"):
        Attention(10, 4)


# --- relative positions


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (8, 8), (14, 14)])
def test_relative_position_index_equals_timm(grid):
    from timm.models.beit import gen_relative_position_index

    assert torch.equal(relative_position_index(*grid), gen_relative_position_index(grid))


def test_the_same_step_has_the_same_bias():
    rel = shaken(RelativePositionBias((4, 5), 2))
    bias = rel()[:, 1:, 1:].unflatten(1, (4, 5)).unflatten(3, (4, 5))  # (2, y, x, y', x')

    assert torch.equal(bias[:, :-1, :, :-1], bias[:, 1:, :, 1:])
    assert torch.equal(bias[:, :, :-1, :, :-1], bias[:, :, 1:, :, 1:])
    assert len(rel().flatten(1)[0].unique()) == 7 * 9 + 3  # every row of the table is used


def test_an_index_in_a_file_is_ignored():
    rel = RelativePositionBias(GRID, 2)
    state = shaken(RelativePositionBias(GRID, 2)).state_dict()
    assert state.keys() == {"relative_position_bias_table"}

    rel.load_state_dict(state | {"relative_position_index": torch.zeros(1, 1)})

    assert torch.equal(rel.relative_position_index, relative_position_index(*GRID))
    table = state["relative_position_bias_table"]
    assert torch.equal(rel(), look_up_bias(table, relative_position_index(*GRID)))


# --- MLP and drop path


def test_mlp_looks_at_one_token_at_a_time():
    mlp = Mlp(D, 4 * D)
    x = torch.randn(2, N, D)

    torch.testing.assert_close(mlp(x)[:, 3], mlp(x[:, 3]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x))))


def test_drop_path_takes_whole_samples_and_keeps_the_mean():
    drop = DropPath(0.25)

    y = drop(torch.ones(20_000, 2, 3))

    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(y.amax((1, 2)), y.amin((1, 2)))
    assert abs(y.mean() - 1) < 0.02  # five standard errors


def test_drop_path_is_off_in_eval_mode_and_at_zero():
    x = torch.randn(4, 3)
    before = torch.get_rng_state()

    assert DropPath(0.5).eval()(x) is x
    assert DropPath(0.0)(x) is x
    assert torch.equal(torch.get_rng_state(), before)


def test_dropped_samples_are_skipped_only_where_the_table_says_so(monkeypatch):
    cpu = torch.device("cpu")
    assert DropPath(0.5).skips(cpu)
    assert not DropPath(0.5).eval().skips(cpu)
    assert not DropPath(0.0).skips(cpu)

    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not DropPath(0.5).skips(cpu)
    set_kernels(monkeypatch, skip_dropped=False)
    assert not DropPath(0.5).skips(cpu)


# --- the block


def plain(block, x, bias=None):
    "The block as everybody knows it."
    gamma_1 = 1 if block.gamma_1 is None else block.gamma_1
    gamma_2 = 1 if block.gamma_2 is None else block.gamma_2
    x = x + block.drop_path(gamma_1 * block.attn(block.norm1(x), bias))
    x = x + block.drop_path(gamma_2 * block.mlp(block.norm2(x)))
    return x


BLOCKS = {
    "paper": dict(),
    "drop path": dict(drop_path=0.5),
    "everything": dict(drop_path=0.5, init_values=0.1, window_size=GRID),
    "all kept": dict(drop_path=1e-9, init_values=0.1),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("some_tokens", [False, True])
@pytest.mark.parametrize("form", BLOCKS)
@pytest.mark.parametrize("skip", [False, True])
def test_fast_forms_equal_the_plain_residual(skip, form, some_tokens, training, monkeypatch):
    "Outputs, gradients, and the state of the random numbers afterwards."
    set_kernels(monkeypatch, skip_dropped=skip)
    block = shaken(Block(D, 2, **BLOCKS[form])).train(training)
    x = torch.randn(8, N, D, requires_grad=True)
    bias = torch.randn(2, N, N)
    token_index = torch.tensor([0, 3, 8, 20, 21, 55]) if some_tokens else None
    direction = torch.randn(8 * N, D)
    if some_tokens:
        direction = direction[token_index]

    def run(forward):
        block.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        y = forward().flatten(0, -2)
        if len(y) > len(direction):
            y = y[token_index]
        (y * direction).sum().backward()
        grads = [p.grad.clone() for p in block.parameters()]
        return [y.detach(), x.grad, *grads, torch.get_rng_state()]

    wanted = run(lambda: plain(block, x, bias))
    for got in (
        run(lambda: block(x, bias, token_index)),
        run(lambda: forward_fast(block, x, bias, token_index)),
    ):
        for a, b in zip(wanted, got, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_without_drop_path_the_block_is_the_plain_residual_to_the_last_bit():
    block = shaken(Block(D, 2, init_values=0.1, drop_path=0.5)).eval()
    x = torch.randn(2, N, D)

    assert torch.equal(block(x), plain(block, x))
    assert torch.equal(forward_fast(block, x), plain(block, x))


def test_dropped_samples_are_not_computed():
    block = Block(D, 2, drop_path=0.5)
    seen = []
    block.attn.register_forward_pre_hook(lambda layer, args: seen.append(len(args[0])))
    torch.manual_seed(0)
    kept = int((torch.rand(64) >= 0.5).sum())

    torch.manual_seed(0)
    block(torch.randn(64, N, D, generator=torch.Generator()))

    assert seen == [kept] and 0 < kept < 64


def test_the_mlp_is_computed_for_the_wanted_tokens_only():
    block = Block(D, 2)
    seen = []
    block.mlp.register_forward_pre_hook(lambda layer, args: seen.append(tuple(args[0].shape)))

    block(torch.randn(4, N, D), token_index=torch.tensor([1, 9]))

    assert seen == [(2, D)]


@pytest.mark.parametrize("skip", [False, True])
def test_all_samples_dropped_still_gives_every_parameter_a_gradient(skip, monkeypatch):
    "DistributedDataParallel waits for all of them."
    set_kernels(monkeypatch, skip_dropped=skip)
    block = Block(D, 2, drop_path=1 - 1e-9, init_values=0.1)
    x = torch.randn(2, N, D)

    y = block(x)
    y.sum().backward()

    assert torch.equal(y, x)
    for p in block.parameters():
        assert p.grad is not None and (p.grad == 0).all()


@pytest.mark.parametrize("skip", [False, True])
def test_the_stream_stays_fp32_under_bf16(skip, monkeypatch):
    set_kernels(monkeypatch, skip_dropped=skip)
    drop = DropPath(0.5)
    line = nn.Linear(8, 8)
    x = torch.randn(64, 3, 8)

    with torch.autocast("cpu", torch.bfloat16):
        y = add_branch(x, line, drop, drop.draw(x))

    untouched = int((y == x).all(2).all(1).sum())
    assert y.dtype == torch.float32 and 0 < untouched < 64


def test_layer_scale_at_one_is_the_papers_block_and_at_zero_nothing():
    paper = Block(D, 2)
    scaled = Block(D, 2, init_values=1.0)
    ones = {"gamma_1": torch.ones(D), "gamma_2": torch.ones(D)}
    scaled.load_state_dict(paper.state_dict() | ones)
    x = torch.randn(2, N, D)

    assert torch.equal(scaled(x), paper(x))
    with torch.no_grad():
        scaled.gamma_1.zero_()
        scaled.gamma_2.zero_()
    assert torch.equal(scaled(x), x)


def test_gradients_of_a_block_reach_everything():
    block = shaken(Block(D, 2, init_values=0.1, window_size=GRID))
    block(torch.randn(2, N, D)).square().mean().backward()
    assert gradients(block).isfinite().all()
    assert all(p.grad.abs().max() > 0 for p in block.parameters())
