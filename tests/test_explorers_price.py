"""beit_nb.explorers.price: what the gradient of a soft choice is worth, and its chart."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from beit_nb.explorers.price import (
    TAUS,
    PriceFigure,
    exact_gradient,
    gradient_errors,
    toy_log_likelihood,
)
from beit_nb.gumbel import sample_gumbel

LOGITS = torch.tensor([0.0, 1.0, -1.0])


@pytest.fixture(scope="module")
def errors():
    "Bias and spread (33, 2) at TAUS."
    noise = sample_gumbel((1000, 3), generator=torch.Generator().manual_seed(0))
    return np.array([gradient_errors(LOGITS, noise, tau) for tau in TAUS])


def test_exact_gradient_is_autograds():
    leaf = LOGITS.clone().requires_grad_()

    (leaf.softmax(0) @ toy_log_likelihood(torch.eye(3))).backward()

    assert_close(exact_gradient(LOGITS), leaf.grad)


def test_cold_is_shaky_and_hot_is_wrong():
    noise = sample_gumbel((20_000, 3), generator=torch.Generator().manual_seed(0))

    errors = np.array([gradient_errors(LOGITS, noise, tau) for tau in TAUS[::4]])

    assert (np.diff(errors[:, 1]) < 0).all()  # spread
    assert errors[-1, 0] > 5 * errors[1, 0]  # bias at 8 and at 1/16


def test_the_chart_is_pure(errors):
    price = PriceFigure()

    assert price(errors, 1.0).tobytes() != price(errors, 2.0).tobytes()
    assert price(errors, 1.0).tobytes() == price(errors, 1.0).tobytes()


def test_the_lines_are_drawn_anew_when_they_have_moved(errors):
    halved = errors / 2
    price, again = PriceFigure(), PriceFigure()

    before = price(errors, 1.0).tobytes()

    assert price(halved, 1.0).tobytes() == again(halved, 1.0).tobytes() != before
