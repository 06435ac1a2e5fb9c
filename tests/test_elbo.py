"""beit_nb.elbo away from its lesson: other types and shapes, gradients, refusals, and the lesson's folded solutions."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from beit_nb.elbo import (
    DiscreteLatentModel,
    elbo,
    kl_categorical,
    kl_uniform,
    log_evidence,
    posterior,
)

LESSON = Path(__file__).parents[1] / "nbs" / "02_elbo.ipynb"


def random_world(tokens=5, pixels=6, pictures=7, rows=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    log_prior = torch.randn(
        *([pictures] if rows else []), tokens, generator=g, dtype=torch.float64
    ).log_softmax(-1)
    model = DiscreteLatentModel(
        log_prior, torch.rand(tokens, pixels, generator=g, dtype=torch.float64)
    )
    x = torch.bernoulli(torch.full((pictures, pixels), 0.5, dtype=torch.float64), generator=g)
    return model, x, torch.randn(pictures, tokens, generator=g, dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("rows", [False, True])
def test_gap_is_kl_in_worlds_with_any_prior(rows):
    for seed in range(20):
        model, x, q = random_world(rows=rows, seed=seed)
        table = model.joint(x)
        torch.testing.assert_close(
            log_evidence(table) - elbo(table, q),
            kl_categorical(q, posterior(table)),
            atol=1e-12,
            rtol=0,
        )
        rent = kl_categorical(q, model.log_prior.exp())
        torch.testing.assert_close(
            (q * model.log_likelihood(x)).sum(-1) - rent, elbo(table, q), atol=1e-12, rtol=0
        )


@pytest.mark.parametrize("shape, dim", [((3, 11), -1), ((2, 11, 4, 5), 1), ((11,), 0)])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_kl_uniform_is_kl_to_the_uniform(shape, dim, dtype, atol):
    logits = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    q = logits.softmax(dim).movedim(dim, -1)
    torch.testing.assert_close(
        kl_uniform(logits, dim), kl_categorical(q, torch.full_like(q, 1 / 11)), atol=atol, rtol=0
    )


def test_kl_uniform_is_stable_and_has_the_right_gradient():
    logits = torch.tensor([[0.0, 1e5, -1e5], [3e4, 3e4, 3e4]], requires_grad=True)
    kl = kl_uniform(logits)
    torch.testing.assert_close(kl, torch.tensor([math.log(3), 0.0]), atol=1e-5, rtol=0)
    kl.sum().backward()
    assert logits.grad.isfinite().all()
    assert torch.autograd.gradcheck(
        lambda l: kl_uniform(l, dim=1),
        torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True),
    )


def test_points_and_impossible_tokens():
    point = torch.tensor([0.0, 1.0, 0.0])
    p = torch.tensor([0.5, 0.5, 0.0])
    assert kl_categorical(point, p).item() == pytest.approx(math.log(2))
    assert kl_categorical(p, point).item() == math.inf
    assert kl_categorical(p, p).item() == 0


def test_refusals_name_the_fault():
    with pytest.raises(ValueError, match="2 prior values for 3 stamps"):
        DiscreteLatentModel(torch.zeros(2), torch.rand(3, 4))
    with pytest.raises(ValueError, match="rows of q are not probabilities"):
        elbo(torch.zeros(2, 3), torch.randn(2, 3))
    with pytest.raises(ValueError, match="rows of p are not probabilities"):
        kl_categorical(torch.full((3,), 1 / 3), torch.ones(3))


def test_the_folded_solution_reaches_the_smallest_factorised_gap():
    solution = next(
        s
        for c in json.loads(LESSON.read_text())["cells"]
        if "def best_factorised" in (s := "".join(c["source"])) and c["cell_type"] == "markdown"
    )
    names = {"torch": torch}
    exec(re.search(r"```python\n(.*?)```", solution, re.S)[1], names)
    stamps = torch.tensor(
        [[0.90, 0.15, 0.85, 0.10], [0.85, 0.90, 0.10, 0.20], [0.95, 0.10, 0.20, 0.80]]
    )
    a, b = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    pairs = DiscreteLatentModel(torch.full((9,), 1 / 9).log(), torch.maximum(stamps[a], stamps[b]))
    table = pairs.joint(torch.tensor([[1.0, 1, 1, 0]]))[0]
    q1, q2 = names["best_factorised"](table.reshape(3, 3))
    gap = log_evidence(table) - elbo(table, (q1[:, None] * q2).flatten())
    assert 0.36 < gap < 0.369
