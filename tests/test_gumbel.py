"""beit_nb.gumbel away from its lesson: half precision, other axes, seeds, schedules' ends."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from beit_nb.gumbel import gumbel_max, gumbel_softmax, sample_gumbel, temperature_schedule


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_finite_repeatable_and_of_the_right_kind(dtype):
    noise = sample_gumbel((200_000,), generator(), dtype=dtype)

    assert noise.dtype == dtype
    assert noise.isfinite().all()
    assert torch.equal(noise, sample_gumbel((200_000,), generator(), dtype=dtype))
    noise = noise.double()
    assert abs(noise.mean() - np.euler_gamma) < 0.02
    assert abs(noise.std() - np.pi / 6**0.5) < 0.02
    # the right tail, P(g > 6) = 0.25 %, which half precision would cut off if u were drawn in it
    assert abs((noise > 6).double().mean() - 0.0025) < 0.0006


def test_uniform_numbers_of_0_and_1_give_finite_noise(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([0.0, 1.0]))

    noise = sample_gumbel((2,))

    assert noise.isfinite().all()
    assert noise[0] < -4 and noise[1] > 16


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_draws_follow_the_softmax_along_any_axis(dim):
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    many = logits.view(1, 4, 1).expand(100, 4, 300).movedim(1, dim)

    ids = gumbel_max(many, dim, generator())

    assert ids.dtype == torch.int64
    shares = ids.flatten().bincount(minlength=4) / ids.numel()
    torch.testing.assert_close(shares, logits.softmax(0), atol=0.01, rtol=0)


@pytest.mark.parametrize("hard", [False, True])
def test_a_soft_draw_leads_where_gumbel_max_draws(hard):
    logits = torch.randn(2, 6, 3, 3, generator=generator())

    soft = gumbel_softmax(logits, 0.3, hard, dim=1, generator=generator(1))

    assert torch.equal(soft.argmax(1), gumbel_max(logits, 1, generator(1)))
    torch.testing.assert_close(soft.sum(1), torch.ones(2, 3, 3))
    if hard:
        assert soft.max(1).values.unique().tolist() == [1]


def test_half_precision_logits_do_not_tie():
    logits = torch.zeros(8192, 50, dtype=torch.bfloat16)

    soft = gumbel_softmax(logits, 1 / 16, hard=True, dim=0, generator=generator())

    assert soft.dtype == torch.bfloat16
    assert torch.equal(soft.float().sum(0), torch.ones(50))


def test_straight_through_has_the_gradient_of_the_soft_draw():
    logits = torch.randn(5, generator=generator(), requires_grad=True)
    noise = sample_gumbel((5,), generator(1))
    weights = torch.arange(5.0)

    soft, hard = (gumbel_softmax(logits, 0.7, h, noise=noise) for h in (False, True))
    (of_soft,) = torch.autograd.grad(soft @ weights, logits)
    (of_hard,) = torch.autograd.grad(hard @ weights, logits)

    assert torch.equal(hard.detach(), F.one_hot(soft.argmax(), 5).float())
    torch.testing.assert_close(of_hard, of_soft)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: sample_gumbel((2,), dtype=torch.int64), "noise cannot be torch.int64"),
        (lambda: gumbel_softmax(torch.zeros(2), tau=0), "must be above 0"),
        (lambda: gumbel_softmax(torch.zeros(2), tau=float("nan")), "must be above 0"),
        (lambda: gumbel_softmax(torch.zeros(2, dtype=torch.int64)), "not ids"),
        (lambda: gumbel_softmax(torch.zeros(2), noise=torch.zeros(3)), "does not fit logits"),
        (lambda: temperature_schedule(1, 0, 10), "must all be above 0"),
        (lambda: temperature_schedule(1, 0.1, 0), "must all be above 0"),
    ],
)
def test_refusals_name_the_fault(call, said):
    with pytest.raises(ValueError, match=said) as e:
        call()
    assert "\n" not in str(e.value)


def test_the_schedules_ends():
    tau = temperature_schedule(1, 1 / 16, steps=5, total=8)

    assert tau.shape == (8,)
    assert tau[0] == 1
    assert (tau[4:] == 1 / 16).all()
    assert (np.diff(tau) <= 0).all()
    assert np.isclose(tau[2], (1 + 1 / 16) / 2)  # half-way down after half of the steps
    assert temperature_schedule(1, 1 / 16, steps=1).tolist() == [1]
    assert len(temperature_schedule(1, 1 / 16, steps=100, total=7)) == 7  # stopped on the way
