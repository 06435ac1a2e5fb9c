"""beit_nb.explorers.recipes: the curves of every recipe, and the explorer over them."""

import math

import numpy as np
import pytest

from beit_nb.configs import Run
from beit_nb.engine.optim import param_groups
from beit_nb.explorers.recipes import (
    PANELS,
    ScheduleExplorer,
    layer_decay_of,
    recipe_curves,
    schedule_figure,
    schedule_panels,
)
from beit_nb.recipes import COMMANDS, recipe_named
from beit_nb.vit import VisionTransformer

TRAININGS = [name for name, command in COMMANDS.items() if issubclass(command.recipe, Run)]
PRESETS = [(command, name) for command in TRAININGS for name in COMMANDS[command].presets]


def test_the_trainings_are_known():
    assert {"tokenizer", "pretrain", "finetune"} <= set(TRAININGS)


@pytest.mark.parametrize("command,name", PRESETS)
def test_curves_of_every_recipe(command, name):
    recipe = recipe_named(command, name)

    curves = recipe_curves(recipe)

    assert set(curves) <= set(PANELS)
    for x, y in curves.values():
        assert len(x) == len(y) and np.isfinite(y).all() and (np.diff(x) >= 0).all()
    assert 0.98 * recipe.lr < curves["learning rate"][1].max() <= recipe.lr * (1 + 1e-9)
    assert (curves["weight decay"][1] == recipe.weight_decay).all()


@pytest.mark.parametrize("name", COMMANDS["tokenizer"].presets)
def test_temperature_runs_from_start_to_end(name):
    recipe = recipe_named("tokenizer", name)

    _, tau = recipe_curves(recipe)["temperature"]

    assert math.isclose(tau[0], recipe.tau_start) and math.isclose(tau[-1], recipe.tau_end)


def test_a_run_that_stops_early_has_the_curves_of_the_whole():
    "--max-steps and --dry-run stop a run, and its schedules are still those of all its steps."
    whole = recipe_curves(recipe_named("pretrain", "nano"))
    for changes in (dict(max_steps=7), dict(dry_run=True)):
        stopped = recipe_curves(recipe_named("pretrain", "nano", **changes))
        assert all(np.array_equal(stopped[name][1], y) for name, (_, y) in whole.items())


def test_dalles_schedules_are_those_of_its_training():
    recipe = recipe_named("tokenizer", "dalle")

    curves = recipe_curves(recipe)

    percent, rate = curves["learning rate"]
    assert np.allclose(rate[percent > 40.5], recipe.min_lr)  # 1.2 of 3 million steps
    percent, tau = curves["temperature"]
    assert np.allclose(tau[percent > 5.5], recipe.tau_end)  # 150,000 steps


@pytest.mark.parametrize("command", ("pretrain", "finetune"))
def test_depth_is_that_of_the_network(command):
    recipe = recipe_named(command, "base-in1k", depth=4, embed_dim=48, num_heads=3)
    rate = recipe.drop_path_rate
    shape = dict(embed_dim=48, depth=4, num_heads=3)
    network = VisionTransformer(32, 16, **shape, drop_path_rate=rate)

    curves = recipe_curves(recipe)

    assert np.allclose(curves["drop path"][1], [b.drop_path.p for b in network.blocks])
    groups = param_groups(network, 0.05, layer_decay_of(recipe))
    scales = {round(group["lr_scale"], 9) for group in groups}
    assert scales <= set(np.round(curves["learning rate by layer"][1], 9))


def test_panels_show_what_either_recipe_has():
    finetune, tokenizer = (
        recipe_curves(recipe_named(command, "nano")) for command in ("finetune", "tokenizer")
    )

    alone = schedule_panels([finetune], 50)
    both = schedule_panels([finetune, tokenizer], 50)

    assert alone.count("<svg") == 4 and both.count("<svg") == 6
    assert f">{np.interp(50, *finetune['learning rate']):.3g}<" in alone
    assert schedule_figure([finetune, tokenizer]).size == (800, 360)


def test_knobs_turn_the_blue_recipe_only():
    explorer = ScheduleExplorer()
    other = explorer.curves[1]["learning rate"][1].copy()

    explorer.controls.warmup.value = 40
    explorer.controls.decay.value = 0.5

    percent, rate = explorer.curves[0]["learning rate"]
    assert 39 < percent[rate.argmax()] < 41
    assert explorer.curves[0]["learning rate by layer"][1][0] == 0.5**13
    assert np.array_equal(explorer.curves[1]["learning rate"][1], other)


def test_another_recipe_sets_the_knobs():
    explorer = ScheduleExplorer()
    controls = explorer.controls

    controls.recipe.value = "pretrain base-plus-in22k"
    assert controls.warmup.disabled and controls.decay.disabled and controls.warmup.value == 0
    controls.recipe.value = "finetune large-in1k"

    assert controls.decay.value == 0.75 and controls.warmup.value == 5
    assert not controls.warmup.disabled and not controls.decay.disabled


def test_another_moment_computes_nothing_anew():
    explorer = ScheduleExplorer()
    curves = explorer.curves
    before = explorer.view.value

    explorer.controls.percent.value = 60

    assert explorer.curves is curves and explorer.view.value != before
