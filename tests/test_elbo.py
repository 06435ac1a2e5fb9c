"""beit_nb.elbo away from its lesson: other types and shapes, gradients, refusals, and the lesson's
folded solution."""

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


def assert_equal(a, b):
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def random_world(rows=False, seed=0, tokens=5, pixels=6, pictures=7):
    "A model, pictures, and beliefs about their tokens; with `rows`, a prior for each picture."
    g = torch.Generator().manual_seed(seed)
    prior_shape = (pictures, tokens) if rows else (tokens,)
    log_prior = torch.randn(prior_shape, generator=g, dtype=torch.float64).log_softmax(-1)
    stamps = torch.rand(tokens, pixels, generator=g, dtype=torch.float64)
    x = torch.bernoulli(torch.full((pictures, pixels), 0.5, dtype=torch.float64), generator=g)
    q = torch.randn(pictures, tokens, generator=g, dtype=torch.float64).softmax(-1)
    return DiscreteLatentModel(log_prior, stamps), x, q


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_gap_is_kl_in_worlds_with_any_prior(rows, seed):
    model, x, q = random_world(rows, seed)

    log_joint = model.joint(x)
    bound = elbo(log_joint, q)

    assert_equal(log_evidence(log_joint) - bound, kl_categorical(q, posterior(log_joint)))
    reconstruction = (q * model.log_likelihood(x)).sum(-1)
    assert_equal(reconstruction - kl_categorical(q, model.log_prior.exp()), bound)


@pytest.mark.parametrize("shape, dim", [((3, 11), -1), ((2, 11, 4, 5), 1), ((11,), 0)])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_kl_uniform_is_kl_to_the_uniform(shape, dim, dtype, atol):
    logits = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    q = logits.softmax(dim).movedim(dim, -1)

    kl = kl_uniform(logits, dim)

    uniform = torch.full_like(q, 1 / 11)
    torch.testing.assert_close(kl, kl_categorical(q, uniform), atol=atol, rtol=0)


def test_kl_uniform_is_stable():
    logits = torch.tensor([[0.0, 1e5, -1e5], [3e4, 3e4, 3e4]], requires_grad=True)

    kl = kl_uniform(logits)
    kl.sum().backward()

    torch.testing.assert_close(kl, torch.tensor([math.log(3), 0.0]), atol=1e-5, rtol=0)
    assert logits.grad.isfinite().all()


def test_kl_uniform_has_the_right_gradient():
    logits = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(lambda x: kl_uniform(x, dim=1), logits)


def test_points_and_impossible_tokens():
    point = torch.tensor([0.0, 1.0, 0.0])
    p = torch.tensor([0.5, 0.5, 0.0])

    assert kl_categorical(point, p).item() == pytest.approx(math.log(2))
    assert kl_categorical(p, point).item() == math.inf
    assert kl_categorical(p, p).item() == 0


@pytest.mark.parametrize(
    "call, said",
    [
        (
            lambda: DiscreteLatentModel(torch.zeros(2), torch.rand(3, 4)),
            "2 prior values for 3 stamps",
        ),
        (lambda: elbo(torch.zeros(2, 3), torch.randn(2, 3)), "rows of q are not probabilities"),
        (
            lambda: kl_categorical(torch.full((3,), 1 / 3), torch.ones(3)),
            "rows of p are not probabilities",
        ),
    ],
)
def test_refusals_name_the_fault(call, said):
    with pytest.raises(ValueError, match=said) as e:
        call()
    assert "\n" not in str(e.value)


def folded_solution(start):
    "The Python code under <details> in the lesson that begins with `start`."
    for cell in json.loads(LESSON.read_text())["cells"]:
        code = re.search(r"```python\n(.*?)```", "".join(cell["source"]), re.S)
        if cell["cell_type"] == "markdown" and code and code[1].startswith(start):
            return code[1]
    raise LookupError(start)


def test_the_folded_solution_reaches_the_smallest_factorised_gap():
    names = {"torch": torch}
    exec(folded_solution("def best_factorised"), names)
    stamps = torch.tensor(
        [[0.90, 0.15, 0.85, 0.10], [0.85, 0.90, 0.10, 0.20], [0.95, 0.10, 0.20, 0.80]]
    )
    a, b = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    pairs = DiscreteLatentModel(torch.full((9,), 1 / 9).log(), torch.maximum(stamps[a], stamps[b]))
    table = pairs.joint(torch.tensor([[1.0, 1, 1, 0]]))[0]

    q1, q2 = names["best_factorised"](table.reshape(3, 3))

    gap = log_evidence(table) - elbo(table, (q1[:, None] * q2).flatten())
    assert 0.36 < gap < 0.369
