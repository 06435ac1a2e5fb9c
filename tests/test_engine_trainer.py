"Everything that changes on the way is saved and restored, and nothing else decides how it goes on."

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beit_nb import BeitError
from beit_nb.configs import Run
from beit_nb.engine import trainer as trainer_module
from beit_nb.engine.optim import Ema, cosine_schedule
from beit_nb.engine.runs import load_checkpoint
from beit_nb.engine.steps import update_weights
from beit_nb.engine.trainer import Trainer, check_same_step


@pytest.fixture
def recipe(tmp_path):
    return Run(
        out=str(tmp_path), steps=50, batch_size=8, warmup_steps=5, precision="fp32", beta2=0.98
    )


def toy_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def toy_trainer(recipe, model=None, **more):
    model = toy_model() if model is None else model
    return Trainer("toy", recipe, recipe.out, model, recipe.length(10 * 8), **more)


def train(trainer, steps):
    for _ in range(steps):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(trainer.step))
        for group in trainer.optimizer.param_groups:
            group["lr"] = float(trainer.lr[trainer.step]) * group["lr_scale"]
        F.mse_loss(trainer.model(x), x.sum(1, keepdim=True)).backward()
        update_weights(trainer.model, trainer.optimizer, trainer.scaler, None)
        trainer.step += 1


def assert_same_weights(a, b):
    for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(x, y)


def test_two_trainers_of_one_folder_go_on_alike(recipe):
    first = toy_trainer(recipe)
    train(first, 7)
    first.save()

    second = toy_trainer(recipe)
    assert second.step == second.saved_step == 7
    train(first, 5)
    train(second, 5)

    assert_same_weights(first, second)
    for a, b in zip(first.optimizer.state.values(), second.optimizer.state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in ("exp_avg", "exp_avg_sq", "step"))


def test_what_a_checkpoint_holds(recipe):
    trainer = toy_trainer(recipe, metadata={"classes": ["up", "down"]})
    train(trainer, 12)
    trainer.data = {"pictures": 5}
    trainer.save()

    state = load_checkpoint(recipe.out, "toy")

    names = "model optimizer scaler step epoch data random config classes"
    assert set(state) == set(names.split())
    assert (state["step"], state["epoch"]) == (12, 1)
    assert state["data"] == {"pictures": 5, "next_batch": 12}
    assert list(state["model"]) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_an_average_goes_along(recipe):
    model = toy_model()
    ema = Ema(model, decay=0.5)
    trainer = toy_trainer(recipe, model, state={"ema": ema})
    for _ in range(4):
        train(trainer, 1)
        ema.update(model)
    trainer.save()

    other = toy_model()
    again = Ema(other, decay=0.5)
    toy_trainer(recipe, other, state={"ema": again})

    for a, b in zip(ema.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.n_averaged == 4


def test_the_random_generator_goes_on(recipe):
    trainer = toy_trainer(recipe)
    torch.rand(5)
    trainer.save()
    want = torch.rand(3)

    toy_trainer(recipe)

    assert torch.equal(torch.rand(3), want)


def test_another_recipe_is_refused(recipe):
    toy_trainer(recipe).save()
    with pytest.raises(BeitError, match="holds another run .lr 0.001 there, 0.002 now"):
        toy_trainer(replace(recipe, lr=2e-3))


@pytest.mark.parametrize(
    "changes, end", [({}, 50), (dict(max_steps=20), 20), (dict(max_steps=99), 50)]
)
def test_where_a_call_ends(recipe, changes, end):
    assert toy_trainer(replace(recipe, **changes)).end == end
    assert toy_trainer(replace(recipe, **changes, dry_run=True)).end == 2


def test_a_call_never_goes_back(recipe):
    trainer = toy_trainer(recipe)
    train(trainer, 30)
    trainer.save()

    again = toy_trainer(replace(recipe, max_steps=20))

    assert again.step == again.end == 30 and not again.finished


def test_finished_looks_at_the_whole_training(recipe):
    trainer = toy_trainer(replace(recipe, max_steps=20))
    trainer.step = 20
    assert trainer.is_due() and not trainer.finished
    trainer.step = 50
    assert trainer.finished


def test_what_is_due(recipe):
    trainer = toy_trainer(replace(recipe, max_steps=23))
    due = []
    for trainer.step in range(1, 24):
        if trainer.is_due(10, None, 7):
            due.append(trainer.step)
    assert due == [7, 10, 14, 20, 21, 23]


def test_the_schedule_is_the_recipes_or_what_was_handed_in(recipe):
    own = toy_trainer(recipe).lr
    want = cosine_schedule(recipe.lr, recipe.min_lr, 5, 10, warmup_steps=5)
    assert np.array_equal(own, want)
    assert toy_trainer(recipe, lr=np.ones(50)).lr.tolist() == [1.0] * 50


def test_a_batch_that_does_not_fit_is_refused(recipe):
    assert toy_trainer(replace(recipe, device_batch_size=2)).micro_batch_size == 2
    with pytest.raises(BeitError, match="batch_size 8 cannot be reached with 1 process"):
        toy_trainer(replace(recipe, device_batch_size=3))


@pytest.mark.parametrize("found", [[7, 0], [0, 7, 14]])  # the mean of three may be one's own
def test_processes_that_find_different_checkpoints(tmp_path, monkeypatch, found):
    check_same_step(7, tmp_path)
    monkeypatch.setattr(trainer_module, "gather_over_ranks", lambda step: found)
    with pytest.raises(BeitError, match="find different checkpoints in .* must lie on a disk that"):
        check_same_step(7, tmp_path)
