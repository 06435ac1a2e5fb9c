"""beit_nb.explorers.courses: the curves of every recipe, their lengths, and charts of two."""

import math

import numpy as np
import pytest

from beit_nb.configs import Run
from beit_nb.engine.optim import param_groups
from beit_nb.explorers.courses import (
    PANELS,
    course_of,
    layer_decay_of,
    legend,
    recipe_curves,
    run_length,
    schedule_figure,
    schedule_panels,
    value_words,
)
from beit_nb.images import PALETTE
from beit_nb.recipes import COMMANDS, recipe_named
from beit_nb.vit import VisionTransformer

TRAININGS = [name for name, command in COMMANDS.items() if issubclass(command.recipe, Run)]
PRESETS = [(command, name) for command in TRAININGS for name in COMMANDS[command].presets]
LINES = ((PALETTE["blue"], "/>"), (PALETTE["orange"], ' stroke-dasharray="6 4"'))


def test_the_trainings_are_known():
    assert {"tokenizer", "pretrain", "finetune"} <= set(TRAININGS)


@pytest.mark.parametrize("command,name", PRESETS)
def test_curves_of_every_recipe(command, name):
    recipe = recipe_named(command, name)

    curves = recipe_curves(recipe)

    assert set(curves) <= set(PANELS)
    for x, y in curves.values():
        assert len(x) == len(y) and np.isfinite(y).all() and (np.diff(x) >= 0).all()
    # a line falls during the warm-up too, so that it never quite reaches its peak
    least = 0.98 if command != "segment" else 0.85
    assert least * recipe.lr < curves["learning rate"][1].max() <= recipe.lr * (1 + 1e-9)
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


def test_a_course_says_its_moments_in_the_recipes_own_measure():
    finetune = course_of(recipe_named("finetune", "base-in1k"))
    dalle = course_of(recipe_named("tokenizer", "dalle"))

    assert (finetune.at(25), finetune.end) == ("epoch 25", "100") and finetune.warmup == 20
    assert (dalle.at(25), dalle.end) == ("step 750,000", "3,000,000") and dalle.warmup == 0


@pytest.mark.parametrize("command,name", PRESETS)
def test_the_warm_up_ends_where_the_rate_is_highest(command, name):
    recipe = recipe_named(command, name)
    course = course_of(recipe)

    percent, rate = course.curves["learning rate"]

    assert course.steps == run_length(recipe).total
    if course.warmup and command != "tokenizer":
        assert abs(percent[rate.argmax()] - course.warmup) < 1  # two points of the curve


@pytest.fixture(scope="module")
def pair():
    return {
        f"{command} nano": course_of(recipe_named(command, "nano"))
        for command in ("finetune", "tokenizer")
    }


@pytest.mark.slow
def test_panels_show_what_either_recipe_has(pair):
    first = {"finetune nano": pair["finetune nano"]}

    alone = schedule_panels(first, 50)
    both = schedule_panels(pair, 50)

    assert alone.count("<svg") == 4 and both.count("<svg") == 6
    rate = np.interp(50, *pair["finetune nano"].curves["learning rate"])
    assert f"{rate:.3g} a step" in alone
    assert schedule_figure(pair).size == (800, 390)


def test_of_two_equal_curves_both_are_seen(pair):
    course = pair["finetune nano"]

    panels = schedule_panels({"one": course, "other": course}, 50)

    solid, dashed = (panels.count(f'stroke="{c}" stroke-width="1.8"{d}') for c, d in LINES)
    assert solid == dashed == 4
    assert panels.index(PALETTE["blue"]) < panels.index(PALETTE["orange"])  # dashed on top


def test_every_chart_says_its_values_to_those_who_cannot_see_it(pair):
    panels = schedule_panels(pair, 50)

    for name in PANELS:
        told = [
            f"{who} {value_words(name, course, 50)}"
            for who, course in pair.items()
            if name in course.curves
        ]
        assert f'aria-label="{name}: {", ".join(told)}"' in panels


def test_values_have_units_and_layers_can_be_read(pair):
    course = course_of(recipe_named("finetune", "base-in1k"))

    assert value_words("drop path", course, 0) == "10% in the last block"
    assert value_words("learning rate by layer", course, 0) == "patches 0.0037 x the head"
    panels = schedule_panels({"base": course}, 0)
    assert ">0: patches<" in panels and ">13: head<" in panels and ">0.01<" in panels


def test_the_legend_says_where_both_recipes_are(pair):
    text = legend(pair, 50)

    assert "solid: <b>finetune nano</b>, step 100 of 200, warm-up until step 20" in text
    assert "dashed: <b>tokenizer nano</b>, epoch 1 of 2, warm-up until epoch 0.0444" in text
