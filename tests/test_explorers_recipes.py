"""beit_nb.explorers.recipes: two recipes over their run, with knobs."""

import pytest

from beit_nb import BeitError
from beit_nb.configs import Run
from beit_nb.explorers.recipes import ScheduleExplorer, known_recipes
from beit_nb.recipes import COMMANDS


@pytest.fixture
def explorer():
    return ScheduleExplorer()


def test_every_preset_of_a_training_can_be_chosen():
    trainings = [name for name, command in COMMANDS.items() if issubclass(command.recipe, Run)]

    names = known_recipes()

    assert {"tokenizer", "pretrain", "finetune"} <= set(trainings)
    assert [*names] == [f"{name} {p}" for name in trainings for p in COMMANDS[name].presets]


def test_knobs_turn_the_first_recipe_only(explorer):
    other = explorer.courses[1]

    explorer.controls.warmup.value = 40
    explorer.controls.decay.value = 0.5

    first = explorer.courses[0]
    percent, rate = first.curves["learning rate"]
    assert 39 < percent[rate.argmax()] < 41 and first.warmup == 40
    assert first.curves["learning rate by layer"][1][0] == 0.5**13
    assert explorer.courses[1] is other
    assert "finetune base-in1k (turned)" in explorer.view.value


@pytest.mark.parametrize("name", known_recipes())
def test_a_recipe_sets_the_knobs_without_being_turned(explorer, name):
    explorer.controls.recipe.choose(name)

    recipe = known_recipes()[name]
    controls = explorer.controls
    assert controls.turned_recipe() == recipe and controls.changes() == {}
    assert controls.warmup.disabled == (recipe.warmup_steps is not None)
    assert controls.decay.disabled == (getattr(recipe, "layer_decay", None) is None)
    assert explorer.guide.error == "" and controls.warmup.says == ""


def test_another_moment_computes_nothing_anew(explorer):
    courses = [*explorer.courses]
    before = explorer.view.value

    explorer.controls.percent.value = 60

    assert all(new is old for new, old in zip(explorer.courses, courses))
    assert explorer.view.value != before


def test_a_warm_up_as_long_as_the_run_is_refused_beside_its_slider(explorer, capsys):
    explorer.controls.recipe.choose("finetune base-in1k-384")
    before = explorer.view.value

    explorer.controls.warmup.value = 10

    assert explorer.controls.warmup.says == "the whole run has 10 epochs; take less"
    assert "stale" in explorer.view._dom_classes and explorer.view.value == before
    explorer.controls.warmup.value = 9.5
    assert explorer.controls.warmup.says == "" and "stale" not in explorer.view._dom_classes
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "state",
    [
        dict(),
        dict(recipe="tokenizer dalle", beside="tokenizer nano", percent=0),
        dict(recipe="pretrain nano", beside="pretrain nano", percent=100),
        dict(percent=70, warmup_epochs=5.5, layer_decay=0.9),
    ],
    ids=str,
)
def test_link_makes_the_same_again(state):
    explorer = ScheduleExplorer(**state)

    again = eval(explorer.link())

    assert again.link() == explorer.link() == explorer.code_line.code
    assert again.view.value == explorer.view.value
    assert explorer.percent == state.get("percent", 25)


def test_acts_are_open_until_they_are_done(explorer):
    assert explorer.guide.done == []

    explorer.controls.percent.value = 20
    assert explorer.guide.done == [0]
    explorer.controls.decay.value = 1
    explorer.controls.beside.choose("tokenizer dalle")

    assert explorer.guide.done == [0, 1, 2]


def test_an_unknown_recipe_is_one_line():
    with pytest.raises(BeitError, match="'finetune huge' is no recipe; there are tokenizer nano"):
        ScheduleExplorer("finetune huge")
