"The trained networks that the package brings: they load, say who made them, and can do it."

import json
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
from helpers import refused

from beit_nb import BeitError, __version__
from beit_nb.demo_stages import THOROUGH, DemoPlan, settings_of
from beit_nb.engine.augment import TwoViews
from beit_nb.engine.files import safetensors_notes, write_json
from beit_nb.engine.log import write_metrics
from beit_nb.engine.runs import load_checkpoint, save_checkpoint
from beit_nb.engine.sources import Digits
from beit_nb.images import to_float
from beit_nb.limits import as_config
from beit_nb.networks import NETS, keep_networks, ready_networks, save_network
from beit_nb.pretraining import build_mim, evaluate_mim, load_mim
from beit_nb.recipes import recipe_named
from beit_nb.targets import tokenize_dataset
from beit_nb.tokenizer import build_dvae, evaluate_tokenizer, is_dalle, load_tokenizer

ROOT = Path(__file__).parents[1]
BROUGHT = {"tokenizer": THOROUGH["tokenizer_steps"], "mim": THOROUGH["pretrain_steps"]}


def notes_of(name):
    return safetensors_notes(NETS / f"{name}.safetensors")


@pytest.fixture
def demo(tmp_path):
    "What a finished demo leaves of its two networks, which have learnt nothing."
    for run, stage, build in (("tokenizer", "dvae", build_dvae), ("pretrain", "mim", build_mim)):
        recipe = recipe_named(run, "nano", steps=3)
        state = {"config": as_config(run, recipe), "model": build(recipe).state_dict(), "step": 3}
        save_checkpoint(tmp_path / "demo" / run / "checkpoints" / "last.pt", state)
        write_json(tmp_path / "demo" / f"{stage}.json", {"result": {"seconds": 2.0}})
        write_metrics(tmp_path / "demo" / run, {"steps": 3})
    return tmp_path / "demo"


def test_the_package_brings_two_small_networks():
    "Within 2 MB, named in setup.py's package data and in the source archive."
    files = sorted(file.name for file in NETS.iterdir())

    assert files == ["README.md", "mim.safetensors", "tokenizer.safetensors"]
    assert sum((NETS / file).stat().st_size for file in files) < 2.05e6
    for data in ("nets", "bands", "cards"):
        assert f'"{data}/*"' in (ROOT / "setup.py").read_text()
        assert f"recursive-include beit_nb/{data} *" in (ROOT / "MANIFEST.in").read_text()


@pytest.mark.parametrize("name", BROUGHT)
def test_they_say_who_made_them(name):
    "The command, the version, as many steps as it makes; the note beside too."
    notes = notes_of(name)

    assert notes["command"] == "beit demo --thorough"
    assert notes["version"] == __version__
    assert notes["steps"] == str(BROUGHT[name])
    told = (NETS / "README.md").read_text()
    assert notes["command"] in told and f"{BROUGHT[name]:,} steps" in told


def test_the_tokenizer_does_what_its_notes_say():
    "Its error on the test digits, as float32 in the demo and as float16 here: half a percent."
    figures = json.loads(notes_of("tokenizer")["figures"])

    tokenizer = load_tokenizer(NETS / "tokenizer.safetensors")
    found = evaluate_tokenizer(tokenizer, to_float(Digits("test").images))

    assert found["mse"] == pytest.approx(figures["mse"], rel=5e-3)
    assert found["perplexity"] == pytest.approx(figures["perplexity"], rel=5e-3)
    assert found["mse"] < 0.05 * found["pixel_variance"]


@pytest.mark.slow
def test_the_mim_does_what_its_notes_say():
    "Within half a percentage point of what the demo measured, and far above a constant guess."
    figures = json.loads(notes_of("mim")["figures"])

    model, recipe = load_mim(NETS / "mim.safetensors")
    tokenizer = load_tokenizer(NETS / "tokenizer.safetensors")
    prior = tokenize_dataset(tokenizer, Digits("train", places=1), TwoViews(recipe.img_size))
    found = evaluate_mim(model, recipe, tokenizer, Digits("test"), prior)

    assert found["masked_top1"] == pytest.approx(figures["masked_top1"], abs=5e-3)
    assert found["masked_top1"] > found["best_constant_top1"] + 0.15


def test_kept_networks_are_those_of_the_demo_in_float16(demo):
    nets = keep_networks(demo, "beit demo --thorough")

    model, recipe = load_mim(nets / "mim.safetensors")
    trained = load_checkpoint(demo / "pretrain")["model"]
    assert recipe == recipe_named("pretrain", "nano", steps=3)
    for name, x in model.state_dict().items():
        assert x.dtype == torch.float32 and torch.equal(x, trained[name].half().float())
    tokenizer = load_tokenizer(nets / "tokenizer.safetensors")
    assert tokenizer.vocab_size == 256 and tokenizer.img_size == 32
    notes = safetensors_notes(nets / "mim.safetensors")
    assert json.loads(notes["figures"]) == {"seconds": 2.0} and notes["steps"] == "3"


def test_a_demo_without_networks_keeps_none(tmp_path):
    with pytest.raises(BeitError, match="there is no tokenizer"):
        keep_networks(tmp_path, "beit demo --thorough")


def test_your_own_demo_goes_first(demo):
    mine = ready_networks(demo)
    (demo / "tokenizer" / "metrics.json").unlink()
    brought = ready_networks(demo)

    assert mine[:2] == (demo / "tokenizer", demo / "pretrain") and "your own" in mine.whose
    assert brought.tokenizer.parent == brought.mim.parent == NETS
    assert "came with beit_nb" in brought.whose


def test_a_network_of_ours_is_not_taken_for_dalles(tmp_path):
    "Both may end with .safetensors; and a bad file is refused in one line whoever reads it."
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"<html>no weights</html>")

    assert not is_dalle(NETS / "tokenizer.safetensors") and is_dalle(file)
    for load in (load_tokenizer, load_mim):
        with pytest.raises(BeitError):
            load(file)
    with pytest.raises(BeitError, match="comes from `beit pretrain`"):
        load_tokenizer(NETS / "mim.safetensors")


@pytest.mark.parametrize("recipe", ["{", "[]", "{}", '{"command": 3}', '{"command": "walk"}'])
def test_a_recipe_that_somebody_has_changed_is_refused(tmp_path, recipe):
    file = tmp_path / "mim.safetensors"
    save_network(file, build_mim(recipe_named("pretrain", "nano")), {}, {"recipe": recipe})

    with pytest.raises(BeitError, match="mim.safetensors"):
        load_mim(file)


def test_thorough_is_the_demo_with_more_steps():
    "The two networks get more, with three seeds; every arm the grid, the longest three times."
    changed = {
        name
        for name, value in settings_of(DemoPlan(**THOROUGH)).items()
        if value != settings_of(DemoPlan())[name]
    }

    assert changed == {"tokenizer_steps", "pretrain_steps", "longer", "seeds", "lrs"}
    assert THOROUGH["seeds"] == 3 and {len(rates) for rates in THOROUGH["lrs"].values()} == {3}
    assert THOROUGH["tokenizer_steps"] == 3 * DemoPlan.tokenizer_steps
    assert THOROUGH["pretrain_steps"] == 5 * DemoPlan.pretrain_steps
    assert (THOROUGH["longer"], DemoPlan.longer) == (3, 2)
    refused("demo", "--quick", "--thorough", says="choose one of them")


def test_lab_is_what_reading_needs():
    "An extra of its own: JupyterLab and the explorers' widgets, and no tool for changing things."
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")

    lab = ini["DEFAULT"]["lab_requirements"].split()

    assert lab == ["jupyterlab", "ipywidgets", "anywidget"]
    assert '"lab": lab_requirements' in (ROOT / "setup.py").read_text()
