"""beit_nb.data away from its lesson: known sets without a network, layouts, one door."""

import io
import json
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers import beit, lay_out_bands, refused, save_gray

import beit_nb.data as data
from beit_nb import SAID, BeitError
from beit_nb.data import open_data, sample_labels, torchvision_set
from beit_nb.engine.packing import shard_folder
from beit_nb.engine.token_files import picture_records
from beit_nb.recipes import DATASETS, known_set, recipe_named
from beit_nb.scale.hours import dataset_size

pytestmark = pytest.mark.usefixtures("pages_unpainted")

TORCHVISION_SETS = ("cifar10", "cifar100", "imagenette", "oxford-pets")


def label_of_gray(pictures) -> dict[int, int]:
    "The gray of every one-gray picture -> its label."
    grays = [round(float(pictures.pixels(i).float().mean())) for i in range(len(pictures))]
    return {gray: int(label) for gray, label in zip(grays, pictures.labels)}


def lay_out_imagenette(root: Path) -> None:
    for i in range(40):
        folder = ("n01440764", "n03888257")[i % 2]
        save_gray(root / "imagenette2" / ("train", "val")[i // 20] / folder / f"{i}.JPEG", 5 * i)


def lay_out_pets(root: Path) -> None:
    annotations = root / "oxford-iiit-pet" / "annotations"
    annotations.mkdir(parents=True)
    for part, numbers in (("trainval", range(20)), ("test", range(20, 40))):
        lines = []
        for i in numbers:
            name = f"{('Abyssinian', 'great_pyrenees')[i % 2]}_{i}"
            save_gray(root / "oxford-iiit-pet" / "images" / f"{name}.jpg", 5 * i)
            lines.append(f"{name} {i % 2 + 1} {i % 2 + 1} 1\n")
        (annotations / f"{part}.txt").write_text("".join(lines))


def lay_out_cifar(folder: Path, label_key: str, parts: dict[str, range], meta: str, names: str):
    "Pictures number i have the gray 5 i and the label i % 2."
    folder.mkdir()
    for part, numbers in parts.items():
        grays = (5 * np.array(numbers)).astype(np.uint8)
        content = {
            "data": np.repeat(grays[:, None], 3072, 1),
            label_key: [i % 2 for i in numbers],
        }
        (folder / part).write_bytes(pickle.dumps(content))
    (folder / meta).write_bytes(pickle.dumps({names: ["even", "odd"]}))


@pytest.fixture
def no_network(monkeypatch):
    def download(*_, **__):
        raise OSError("no route to host")

    for module in ("cifar", "imagenette", "oxford_iiit_pet"):
        of_set = getattr(torchvision.datasets, module)
        monkeypatch.setattr(of_set, "download_and_extract_archive", download)


@pytest.fixture
def laid_out(tmp_path, monkeypatch, no_network):
    "Every set of torchvision in miniature, 20 pictures for training and 20 for test."
    lay_out_imagenette(tmp_path)
    lay_out_pets(tmp_path)
    batches = {f"data_batch_{k + 1}": range(4 * k, 4 * k + 4) for k in range(5)}
    lay_out_cifar(
        tmp_path / "cifar-10-batches-py",
        "labels",
        batches | {"test_batch": range(20, 40)},
        "batches.meta",
        "label_names",
    )
    lay_out_cifar(
        tmp_path / "cifar-100-python",
        "fine_labels",
        {"train": range(20), "test": range(20, 40)},
        "meta",
        "fine_label_names",
    )
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_, **__: True)
    return tmp_path


@pytest.mark.parametrize("name", TORCHVISION_SETS)
def test_the_parts_of_known_sets(laid_out, name):
    parts = ("train", "val", "test", "train+val")
    train, val, test, both = (torchvision_set(name, part, laid_out) for part in parts)

    assert [len(part) for part in (train, val, test, both)] == [18, 2, 20, 20]
    assert len(train.classes) == 2
    assert all(isinstance(c, str) for c in train.classes)
    seen = label_of_gray(train) | label_of_gray(val)
    assert len(seen) == 20  # disjoint, and nothing lost
    assert seen == label_of_gray(both)
    assert max(seen) < min(label_of_gray(test))
    for gray, label in (seen | label_of_gray(test)).items():
        assert label == round(gray / 5) % 2


@pytest.mark.parametrize("name", TORCHVISION_SETS)
def test_known_sets_stay_the_same_and_travel(laid_out, name):
    val = torchvision_set(name, "val", laid_out)

    again = pickle.loads(pickle.dumps(torchvision_set(name, "val", laid_out)))

    assert label_of_gray(again) == label_of_gray(val)
    assert again[0].mode == "RGB"
    assert again.fingerprint() == val.fingerprint()


@pytest.mark.parametrize("is_rank_0", [True, False])
def test_rank_0_downloads_before_the_others_look(laid_out, monkeypatch, is_rank_0):
    "Eight processes that unpack one archive into one folder would break it. Each opens it once."
    events = []
    real = data.download_set

    def download_set(*args):
        events.append("look")
        return real(*args)

    def rank_0_first(act):
        events.append("rank 0 first")
        if is_rank_0:
            act()
        events.append("now all")

    monkeypatch.setattr(data, "download_set", download_set)
    monkeypatch.setattr(data, "rank_0_first", rank_0_first)
    torchvision_set("imagenette", "train", laid_out)

    if is_rank_0:
        assert events == ["rank 0 first", "look", "now all"]
    else:
        assert events == ["rank 0 first", "now all", "look"]


@pytest.mark.parametrize("name", TORCHVISION_SETS)
def test_without_a_network_there_is_one_line(tmp_path, no_network, name):
    with pytest.raises(BeitError, match="cannot get .*no route to host.*data/README.md") as e:
        torchvision_set(name, "train", tmp_path)
    assert "\n" not in str(e.value)


def test_the_readme_of_the_data_names_every_known_set():
    text = (Path(__file__).parent.parent / "data" / "README.md").read_text()

    assert all(f"| `{name}` |" in text for name in DATASETS)


def test_labels_of_val_are_those_of_train(tmp_path):
    for i, c in enumerate("abc"):
        save_gray(tmp_path / "train" / c / "x" / f"{i}.png", 10 * i)
    save_gray(tmp_path / "val" / "c" / "1.png", 99)
    save_gray(tmp_path / "train" / ".hidden" / "1.png", 0)

    assert open_data(str(tmp_path), "train", labels=True).classes == ["a", "b", "c"]
    assert label_of_gray(open_data(str(tmp_path), "val", labels=True)) == {99: 2}
    assert len(open_data(str(tmp_path))) == 3


def test_test_is_val_where_there_is_no_test(tmp_path, capsys):
    for split, gray in (("train", 1), ("val", 2)):
        save_gray(tmp_path / split / "a" / "1.png", gray)

    assert label_of_gray(open_data(str(tmp_path), "test", labels=True)) == {2: 0}
    assert "has no test/; its val/ is scored" in capsys.readouterr().err
    save_gray(tmp_path / "test" / "a" / "1.png", 3)
    assert label_of_gray(open_data(str(tmp_path), "test", labels=True)) == {3: 0}
    assert capsys.readouterr().err == ""


def test_layouts_that_cannot_work(tmp_path):
    save_gray(tmp_path / "flat" / "1.png", 0)
    save_gray(tmp_path / "set" / "train" / "a" / "1.png", 0)
    save_gray(tmp_path / "set" / "val" / "d" / "1.png", 0)
    for folder, split, words in (
        ("flat", "train", "has no folder train/; labelled data needs"),
        ("set", "val", "class 'd' that the training pictures lack"),
        ("gone", "val", "no data at .*gone: give a folder of pictures or shards, or one of digits"),
        ("sett", "val", r"no data at .*sett \(do you mean set\?\): give"),
        ("set/train", "train", "set/train is a part of labelled data; give the whole, .*set$"),
    ):
        with pytest.raises(BeitError, match=words):
            open_data(str(tmp_path / folder), split, labels=True)
    with pytest.raises(BeitError, match="photos has no labels; choose another --data"):
        open_data("photos", labels=True)


def test_links_are_followed(tmp_path):
    for c in "ab":
        for k in range(3):
            save_gray(tmp_path / "store" / c / f"{k}.png", 10 * k)
    for split in ("train", "val"):
        (tmp_path / "set" / split).mkdir(parents=True)
        for c in "ab":
            (tmp_path / "set" / split / c).symlink_to(tmp_path / "store" / c)

    val = open_data(str(tmp_path / "set"), "val", labels=True)

    assert len(open_data(str(tmp_path / "set"))) == 6
    assert val.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_imagenet_layouts(tmp_path, monkeypatch):
    "Both sets by name, from data/ of the folder that one stands in; and trees of any depth."
    root = tmp_path / "data"
    for i in range(4):
        folder = f"n0{i // 2}"
        save_gray(root / "imagenet" / ("train", "val")[i % 2] / folder / f"{folder}_{i}.JPEG", i)
    for i in range(3):
        save_gray(root / "imagenet22k" / f"n1{i}" / f"n1{i}_1.JPEG", i)
        save_gray(tmp_path / "deep" / "/".join("abcdef"[: 2 * i]) / f"{i}.Png", i)
    monkeypatch.chdir(tmp_path)

    assert len(open_data("imagenet")) == 2
    assert open_data("imagenet", "val", labels=True).labels.tolist() == [0, 1]
    assert len(open_data("imagenet22k")) == 3
    assert open_data("imagenet22k").labels is None
    assert len(open_data("deep")) == 3


def test_a_known_set_that_is_not_there_says_how_to_lay_it_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BeitError, match="no data at data/imagenet: see data/README.md for how"):
        open_data("imagenet")


def test_shards_by_the_same_door(tmp_path):
    for i in range(6):
        split = ("train", "val")[i // 4]
        save_gray(tmp_path / "in" / split / "ab"[i % 2] / f"{i}.png", 20 * i)
    shard_folder(tmp_path / "in", tmp_path / "out")

    val = open_data(str(tmp_path / "out"), "val", labels=True)

    assert label_of_gray(val) == {80: 0, 100: 1}
    assert len(open_data(str(tmp_path / "out"))) == 4
    assert open_data(str(tmp_path / "out")).labels is None


def test_pictures_beside_shards(tmp_path):
    "A backup among the pictures must not take their place, nor a picture among the shards vanish."
    for i in range(3):
        save_gray(tmp_path / "in" / "a" / f"{i}.png", i)
    shard_folder(tmp_path / "in", tmp_path / "out")
    backup = tmp_path / "in" / "backup.tar"
    (tmp_path / "out" / "000000.tar").rename(backup)

    words = re.escape("in holds shards (backup.tar) and pictures outside of them (a/0.png)")
    with pytest.raises(BeitError, match=words):
        open_data(str(tmp_path / "in"))
    backup.unlink()
    assert len(open_data(str(tmp_path / "in"))) == 3


def test_a_few_labels_of_every_class():
    labels = np.array([0] * 30 + [1] * 20 + [2] * 10)

    few = sample_labels(labels, 5, seed=1)

    assert np.bincount(labels[few]).tolist() == [5, 5, 5]
    assert len(set(few)) == 15
    assert (sample_labels(labels, 5, seed=1) == few).all()
    assert (sample_labels(labels, 5, seed=2) != few).any()
    assert (sample_labels(labels, None) == np.arange(60)).all()
    with pytest.raises(BeitError, match="more than the 10 pictures of the smallest class"):
        sample_labels(labels, 11)


@pytest.mark.parametrize("name", ["digits", "cifar10", "nowhere"])
def test_a_split_that_is_none_is_refused(name):
    line = "^unknown split 'valid'; there are: train, val, test, train.val$"
    with pytest.raises(BeitError, match=line):
        open_data(name, "valid", labels=True)


@pytest.mark.parametrize("name", DATASETS)
def test_a_known_name_and_a_folder_of_that_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    save_gray(tmp_path / name / "1.png", 7)

    def recipe(word):
        return recipe_named("pretrain", "nano", data=word)

    words = f"could be the known set or your folder .*: say embedded:{name} or ./{name}"

    for ask in (open_data, known_set, lambda word: dataset_size(recipe(word))):
        with pytest.raises(BeitError, match=words):
            ask(name)

    for mine in (f"./{name}", f"{name}/", str(tmp_path / name)):
        assert len(open_data(mine)) == 1
        assert known_set(mine) is None
    assert known_set(f"embedded:{name}") == name
    (tmp_path / name).rename(tmp_path / "elsewhere")
    (tmp_path / name).touch()  # a file is no data set
    assert known_set(name) == name


def test_the_set_that_was_meant_is_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_gray(tmp_path / "photos" / "1.png", 7)
    save_gray(tmp_path / "imagenet" / "train" / "a" / "1.png", 7)
    for i in range(2):
        save_gray(tmp_path / "data" / "imagenet" / "train" / "a" / f"{i}.png", 7)

    assert len(open_data("embedded:photos")) == 11 * 512
    assert len(open_data("embedded:imagenet")) == 2
    assert len(open_data("./imagenet")) == 1
    with pytest.raises(BeitError, match="no known set 'zoo'; there are: digits"):
        open_data("embedded:zoo")


@pytest.mark.slow
def test_commands_say_what_they_took(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        save_gray(tmp_path / "photos" / f"{i}.png", 7)
    words = ["tokenizer", "nano", "--max-steps", 1, "--batch-size", 2, "--precision", "fp32"]

    said = refused(
        *words, "--data", "photos", "--out", "t0", says="say embedded:photos or ./photos"
    )
    assert "photos" in said and not (tmp_path / "t0").exists()
    assert "data: the folder ./photos" in beit(*words, "--data", "./photos", "--out", "t1").stdout
    theirs = beit(*words, "--data", "embedded:photos", "--out", "t2").stdout
    assert "data: the known set photos: photographs of scikit-image, embedded" in theirs
    tokens = ["tokenize", "--tokenizer", "t1", "--out", "tokens"]
    refused(*tokens, "photos", says="say embedded:photos or ./")
    assert "data: the folder ./photos" in beit(*tokens, "./photos").stdout


def said_of(capfd, *args, **kwargs) -> list[str]:
    SAID.clear()
    capfd.readouterr()
    open_data(*args, **kwargs)
    return capfd.readouterr().err.splitlines()


def test_what_is_left_out_is_said_once(tmp_path, capfd):
    root = tmp_path / "set"
    for split in ("train", "val", "valid"):
        for c in "ab":
            save_gray(root / split / c / "1.png", 7)
    (root / "train" / "a" / "2.heic").touch()

    lines = said_of(capfd, str(root))

    assert lines == [
        f"beit: left out of {root}/train: files with other endings: 1 (first: a/2.heic); "
        "beside train/, val/ and test/: 1 (first: valid)"
    ]
    open_data(str(root))
    open_data(str(root), labels=True)
    assert capfd.readouterr().err == ""


def test_what_shards_leave_out_is_said(tmp_path, capfd):
    save_gray(tmp_path / "1.png", 7)
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "0.tar", "w") as t:
        for name in ("a.png", "b.c.png", "b.d.png"):
            t.add(tmp_path / "1.png", name)
    for name in ("1.tar.gz", "2.TGZ", "deep/3.tar"):
        save_gray(tmp_path / "set" / f"{name}.png", 7).rename(tmp_path / "set" / name)

    [line] = said_of(capfd, str(tmp_path / "set"))

    assert "pictures with a dot before their ending: 2 (first: 0.tar/b.c.png)" in line
    assert "files with other endings: 3 (first: 1.tar.gz)" in line


def test_classes_without_pictures_are_said(tmp_path, capfd):
    for c in ("cat", "dog"):
        for split in ("train", "val"):
            save_gray(tmp_path / split / c / "1.png", 7)
    for i in range(3000):
        (tmp_path / "train" / f"empty{i:04}").mkdir()

    [line] = said_of(capfd, str(tmp_path), labels=True)

    assert line.endswith("have no picture (empty0000, empty0001, empty0002, ...)")
    assert "3,000 of 3,002 classes" in line
    assert said_of(capfd, str(tmp_path), "val", labels=True) == []  # val may lack some


@pytest.mark.parametrize("names", [("Cat", "cat"), ("caf\u00e9", "cafe\u0301"), ("dog", "dog ")])
def test_classes_of_nearly_one_name_are_said(tmp_path, capfd, names):
    for c in (*names, "other"):
        save_gray(tmp_path / "train" / c / "1.png", 7)

    [line] = said_of(capfd, str(tmp_path), labels=True)

    assert "are told apart" in line
    assert all(repr(name) in line for name in names)


def test_one_class_is_said(tmp_path, capfd):
    for split in ("train", "val"):
        save_gray(tmp_path / split / "images" / "1.png", 7)

    [line] = said_of(capfd, str(tmp_path), labels=True)

    assert "are of one class (images), and every answer is right" in line


@pytest.mark.parametrize("name", ["valid", "validation", "Val", "dev"])
def test_a_val_of_another_name_is_named(tmp_path, name):
    for split in ("train", name):
        save_gray(tmp_path / split / "a" / "1.png", 7)

    with pytest.raises(BeitError, match=f"has no folder val/.*; there are: .*{name}/"):
        open_data(str(tmp_path), "val", labels=True)


def their_shards(root: Path, labels: list[int], names: list[str] | None) -> None:
    "Shards as other people make them: numbers, and perhaps names beside them."
    root.mkdir(parents=True)
    picture = save_gray(root.parent / "1.png", 7)
    with tarfile.open(root / "0.tar", "w") as t:
        for i, label in enumerate(labels):
            t.add(picture, f"{i}.png")
            info = tarfile.TarInfo(f"{i}.cls")
            info.size = len(str(label))
            t.addfile(info, io.BytesIO(str(label).encode()))
    picture.unlink()
    if names is not None:
        (root / "classes.json").write_text(json.dumps(names))


@pytest.mark.parametrize(
    "train, val, says",
    [
        (None, ["0", "1", "2"], None),
        (["a", "b", "c"], None, None),
        (["a", "b", "c"], ["c", "b", "a"], None),
        (None, ["a", "b", "c"], "class 'a' that the training pictures lack; there are: 0, 1, 2"),
        (["a", "b", "c"], ["a", "b", "d"], "class 'd' that the training pictures lack"),
        (["a", "b"], None, "picture of class 2 .*of 2 classes"),
        (["a", "b", "b"], None, "train/classes.json is damaged"),
        (["a", "b", "c"], ["a", "b"], "picture of class 2 .*of 2 classes"),
    ],
)
def test_names_of_train_and_val_that_contradict_each_other(tmp_path, train, val, says):
    their_shards(tmp_path / "train", [0, 1, 2], train)
    their_shards(tmp_path / "val", [2, 0], val)

    def both():
        first = open_data(str(tmp_path), "train", labels=True)
        return first, open_data(str(tmp_path), "val", labels=True)

    if says:
        with pytest.raises(BeitError, match=says):
            both()
    else:
        first, second = both()
        assert first.classes == second.classes == (train or ["0", "1", "2"])
        named = val or first.classes
        assert [second.classes[c] for c in second.labels] == [named[2], named[0]]
    assert len(open_data(str(tmp_path))) == 3  # names do not matter without labels


def test_numbers_of_val_that_train_lacks(tmp_path):
    their_shards(tmp_path / "train", [0, 1, 1], None)
    their_shards(tmp_path / "val", [1, 2], None)

    with pytest.raises(BeitError, match="picture of class 2 .*of 2 classes"):
        open_data(str(tmp_path), "val", labels=True)


def test_a_strange_classes_json_in_a_folder_of_pictures_changes_nothing(tmp_path):
    for c in "ab":
        save_gray(tmp_path / "train" / c / "1.png", 7)
    (tmp_path / "train" / "classes.json").write_text('{"b": 0}')

    assert open_data(str(tmp_path), labels=True).classes == ["a", "b"]


@pytest.mark.parametrize("place", [".", "run", "deep/run"])
def test_a_run_inside_its_data(tmp_path, place):
    "Its own pictures must not become data: refused, or left out, so that it can go on."
    root = tmp_path / "pics"
    for i in range(4):
        save_gray(root / f"{i}.png", 40 * i)
    words = ["tokenizer", "nano", "--data", root, "--out", root / place, "--batch-size", 2]
    words += ["--steps", 4, "--precision", "fp32", "--checkpoint-every", 2]

    if place == ".":
        refused(*words, says="is the folder of a run")
        return
    beit(*words, "--max-steps", 2)
    save_gray(root / place / "watch" / "step-2.png", 7)
    said = beit(*words)
    assert "left out of" in said.stderr and "folders of runs and of Python: 1" in said.stderr
    assert len(open_data(str(root))) == 4
    assert (root / place / "metrics.json").exists()


def test_a_folder_of_bands(tmp_path):
    lay_out_bands(tmp_path / "bands", each=2)

    pictures = open_data(str(tmp_path / "bands"), "val", labels=True, channels=5)

    assert pictures.classes == ["water", "wheat"] and len(pictures) == 4
    assert [x.shape for x in map(pictures.pixels, range(4))] == [(5, 40, 36)] * 4
    assert torch.equal(pictures[3], pictures.pixels(3))
    assert None not in picture_records(pictures)


def test_arrays_beside_usual_pictures_are_no_pictures(tmp_path):
    "A folder that was read yesterday is read alike today, whatever arrays lie in it."
    for name, value in (("a", 0), ("b", 255)):
        save_gray(tmp_path / "mixed" / "train" / name / "1.png", value)
        np.save(tmp_path / "mixed" / "train" / name / "1.npy", np.zeros((3, 8, 8), np.uint8))
        (tmp_path / "arrays" / "train" / name).mkdir(parents=True)
        np.save(tmp_path / "arrays" / "train" / name / "1.npy", np.full((8, 8), value, np.uint8))

    mixed = open_data(str(tmp_path / "mixed"), labels=True)
    gray = open_data(str(tmp_path / "arrays"), labels=True, channels=1)

    assert len(mixed) == 2 and all(mixed.path(i).endswith(".png") for i in range(2))
    assert gray.pixels(1).shape == (3, 8, 8) and gray.pixels(1).min() == 255


def test_bands_where_there_are_none(tmp_path):
    save_gray(tmp_path / "gray" / "train" / "a" / "1.png", 0)
    (tmp_path / "shards" / "train").mkdir(parents=True)
    with tarfile.open(tmp_path / "shards" / "train" / "1.tar", "w"):
        pass

    for place, says in (
        ("digits", "digits has 3 channels, but 5 are asked for"),
        (tmp_path / "gray", "no pictures in .*looked for .npy, .tif, .tiff"),
        (tmp_path / "shards", "shards .*1.tar.* 5 channels are read from a folder"),
    ):
        with pytest.raises(BeitError, match=says):
            open_data(str(place), labels=True, channels=5)
