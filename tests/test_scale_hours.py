"Pictures are counted as the training counts them; steps, tokens and hours follow."

from dataclasses import replace
from pathlib import Path

import pytest
from helpers_processes import run_python
from PIL import Image

from beit_nb import BeitError
from beit_nb.configs import Run
from beit_nb.data import open_data
from beit_nb.engine.packing import shard_folder
from beit_nb.recipes import DATASETS, recipe_named
from beit_nb.scale.hours import (
    HARDWARE,
    check_machine,
    dataset_size,
    folder_size,
    hours_in_words,
    num_steps,
    paper_mfu,
    tokens_per_image,
    training_hours,
)

BASE = recipe_named("pretrain", "base-in1k")
NANO = recipe_named("pretrain", "nano")
FINETUNE = recipe_named("finetune", "cifar")


@pytest.fixture
def mixed(tmp_path) -> Path:
    "Pictures with many endings, in folders of two classes, and files that are none."
    root = tmp_path / "mixed"
    for i, ending in enumerate(("jpg", "JPEG", "png", "ppm", "pgm", "bmp", "gif", "webp", "tif")):
        file = root / "ab"[i % 2] / "deep" / f"{i}.{ending}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if ending == "pgm" else "RGB", (8, 8)).save(file)
    for name in ("a/x.jfif", "a/notes.txt", "a/.hidden.png", ".thumbs/y.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"")
    return root


# --- pictures


def test_a_folder_counts_as_it_will_be_trained_on(mixed):
    r = replace(NANO, data=str(mixed))

    assert folder_size(r)[0] == dataset_size(r)[0] == len(open_data(str(mixed))) == 9


@pytest.mark.parametrize("labels", [False, True])
def test_tar_shards_count_as_they_will_be_trained_on(mixed, tmp_path, labels):
    (tmp_path / "data").mkdir()
    mixed.rename(tmp_path / "data" / "train")
    shard_folder(tmp_path / "data", tmp_path / "shards", per_shard=4)
    r = replace(FINETUNE if labels else NANO, data=str(tmp_path / "shards"), batch_size=4)

    pictures, classes = dataset_size(r)

    assert pictures == len(open_data(r.data, labels=labels)) == 9
    assert (not labels) or classes == 2
    assert num_steps(replace(r, steps=None, epochs=3), pictures) == 6


def test_classes_and_few_labels(mixed, tmp_path):
    (tmp_path / "data").mkdir()
    mixed.rename(tmp_path / "data" / "train")
    r = replace(FINETUNE, data=str(tmp_path / "data"))

    assert dataset_size(r) == (9, 2)
    assert dataset_size(replace(r, labels_per_class=3)) == (6, 2)


def test_pictures_with_label_maps_count_as_a_segmentation_reads_them(tmp_path):
    for kind in ("images", "masks"):
        folder = tmp_path / kind / "train"
        folder.mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), i).save(folder / f"{i}.png")
    r = replace(recipe_named("segment", "nano"), data=str(tmp_path), labelled=None)

    assert folder_size(r) == dataset_size(r) == (3, 3)
    assert dataset_size(replace(r, reduce_zero_label=True)) == (3, 2)
    assert dataset_size(replace(r, labelled=2)) == (2, 3)


@pytest.mark.parametrize("name", ["digits", "photos"])
def test_embedded_sets_are_as_large_as_the_table_says(name):
    assert dataset_size(replace(NANO, data=name))[0] == len(open_data(name))


def test_known_sets_stand_in_the_table_of_the_recipes():
    assert dataset_size(BASE) == (DATASETS["imagenet"].train_images, 1000) == (1_281_167, 1000)
    assert dataset_size(recipe_named("finetune", "nano")) == (200, 10)
    assert dataset_size(BASE, pictures=5000)[0] == 5000


@pytest.mark.parametrize(
    "says,data,pictures",
    [
        ("how many pictures has 'nowhere'", "nowhere", None),
        ("pictures 0 must be at least 1", "nowhere", 0),
        ("pictures -3 must be at least 1", "imagenet", -3),
    ],
)
def test_what_cannot_be_counted_is_refused(says, data, pictures):
    with pytest.raises(BeitError, match=says):
        dataset_size(replace(BASE, data=data), pictures)


def test_an_empty_folder_is_refused_as_by_the_training(tmp_path):
    with pytest.raises(BeitError, match="no pictures in") as planned:
        dataset_size(replace(NANO, data=str(tmp_path)))
    with pytest.raises(BeitError) as trained:
        open_data(str(tmp_path))

    assert str(planned.value) == str(trained.value)


# --- steps and tokens


@pytest.mark.parametrize(
    "changes,steps",
    [
        ({}, 500_000),
        (dict(steps=1000), 1000),
        (dict(max_steps=7), 7),
        (dict(steps=5, max_steps=7), 5),
        (dict(dry_run=True), 2),
        (dict(epochs=1, batch_size=1_281_167), 1),
    ],
)
def test_steps(changes, steps):
    assert num_steps(replace(BASE, **changes), 1_281_167) == steps


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(BeitError, match="batch_size 2048 is larger than the data set of 2000"):
        num_steps(BASE, 2000)


def test_tokens():
    small = replace(BASE, img_size=112, token_size=56, num_mask_patches=20)

    assert tokens_per_image(BASE) == (196, 75) and tokens_per_image(small) == (49, 20)
    assert tokens_per_image(recipe_named("tokenizer", "imagenet")) == (196, 0)
    assert tokens_per_image(recipe_named("finetune", "base-in1k-384")) == (576, 0)
    assert tokens_per_image(Run()) == (0, 0)


# --- hours


def test_hours_are_work_over_speed():
    assert training_hours(7200e12, gpus=2, peak_tflops=2.0, mfu=0.25) == 2
    assert paper_mfu() == pytest.approx(500_000 * 2048 * 160.1e9 / (16 * 125e12 * 5 * 86400), 1e-3)


def test_hours_in_words():
    said = [hours_in_words(h) for h in (120, 24, 0.5, 0.001)]

    assert said == ["120 hours = 5 days", "24 hours", "30 minutes", "3.6 seconds"]


@pytest.mark.parametrize(
    "says,machine",
    [
        ("unknown hardware 'tpu'; there are: v100", (8, "tpu", 0.4, 8)),
        ("mfu 40 must be a share", (8, "a100", 40, 8)),
        ("mfu 0 must be a share", (8, "a100", 0, 8)),
        ("gpus 0", (0, "a100", 0.4, 8)),
        ("cores 0", (8, "a100", 0.4, 0)),
    ],
)
def test_machines_that_cannot_be(says, machine):
    with pytest.raises(BeitError, match=says):
        check_machine(*machine)


def test_all_listed_machines_can_be():
    for name in HARDWARE:
        check_machine(1, name, 1.0, 1)


def test_known_sets_need_no_torch():
    code = """
import sys
from beit_nb.recipes import recipe_named
from beit_nb.scale.hours import dataset_size
dataset_size(recipe_named("pretrain", "base-in1k"))
assert not {"torch", "numpy"} & set(sys.modules)
"""
    run_python(code)
