"The registry of commands, and what `--data` knows by name."

from dataclasses import fields, replace
from pkgutil import resolve_name

import pytest
from helpers_processes import run_python

from beit_nb import BeitError
from beit_nb.configs import Run
from beit_nb.data import open_data
from beit_nb.limits import as_config
from beit_nb.recipes import COMMANDS, DATASETS, from_config, recipe_named


def test_the_functions_of_the_registry_exist():
    for command in COMMANDS.values():
        assert callable(resolve_name(command.run))
        assert not command.pictures or callable(resolve_name(command.pictures))
        for _, recipe in command.presets.values():
            assert type(recipe) is command.recipe


def test_what_is_shown_is_also_drawn():
    for command in COMMANDS.values():
        if issubclass(command.recipe, Run):
            assert {*command.shown, *command.cards} <= set(command.curves)


def test_no_torch_is_imported():
    code = "import sys, beit_nb.recipes; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    run_python(code)


def test_recipe_named():
    recipe = recipe_named("pretrain", "nano", seed=7)

    assert recipe == replace(COMMANDS["pretrain"].presets["nano"][1], seed=7)
    assert COMMANDS["pretrain"].presets["nano"][1].seed == 0
    with pytest.raises(BeitError, match="unknown training 'train'.*; there are: tokenizer"):
        recipe_named("train", "nano")
    with pytest.raises(
        BeitError, match="unknown pretrain recipe 'huge'; there are: nano, photos, cifar"
    ):
        recipe_named("pretrain", "huge")
    with pytest.raises(
        BeitError,
        match=r"^unknown field of a pretrain recipe 'lrr' \(do you mean lr\?\)",
    ):
        recipe_named("pretrain", "nano", lrr=1)


def test_a_config_of_another_version():
    config = as_config("probe", recipe_named("probe", "nano"))

    assert from_config(config | {"field_of_tomorrow": 1}) == recipe_named("probe", "nano")
    with pytest.raises(BeitError, match="unknown training 'dream'"):
        from_config(config | {"command": "dream"})
    with pytest.raises(BeitError, match="^draws 0 must be at least 1$"):
        from_config(config | {"draws": 0})


@pytest.mark.parametrize("name", ["digits", "photos"])
def test_embedded_data_sets_are_as_they_are_described(name):
    pictures = open_data(name, "train", labels=name == "digits")

    assert len(pictures) == DATASETS[name].train_images
    if name == "digits":
        assert len(pictures.classes) == DATASETS[name].classes


def test_data_sets_of_the_presets_are_known():
    for command in COMMANDS.values():
        for _, recipe in command.presets.values():
            assert recipe.data in DATASETS
    assert {field.name for field in fields(Run)} >= {"data", "out"}
