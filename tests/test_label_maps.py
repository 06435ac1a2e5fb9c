"""beit_nb.label_maps away from its lesson: layouts, known sets, shards, and what does not fit."""

import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit_nb import SAID, BeitError
from beit_nb.data import open_data, torchvision_part
from beit_nb.engine.token_files import picture_records
from beit_nb.index_maps import LOOKED_AT, FileMaps
from beit_nb.label_maps import found_names, mask_kind, open_label_maps


def write_pairs(pictures: Path, masks: Path, count: int, labels=(0, 1, 2), ending: str = "jpg"):
    "Pictures of the gray 9 k, with maps of one label each, labels[k] (over and over)."
    for folder in (pictures, masks):
        folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        Image.new("RGB", (8, 6), (9 * k,) * 3).save(pictures / f"p{k:02}.{ending}")
        Image.new("L", (8, 6), labels[k % len(labels)]).save(masks / f"p{k:02}.png")


@pytest.fixture
def folder(tmp_path):
    "Nine pairs to train on, three for val, with labels 0, 1, 2 in turn."
    for part, count in (("train", 9), ("val", 3)):
        write_pairs(tmp_path / "images" / part, tmp_path / "masks" / part, count)
    return tmp_path


def belong_together(maps) -> bool:
    "Is the map of every picture the one that was written for its gray, labels 0, 1, 2 in turn?"
    grays = [round(maps.pixels(i).float().mean().item() / 9) for i in range(len(maps))]
    return [k % 3 for k in grays] == [maps.label_map(i).max().item() for i in range(len(maps))]


@pytest.mark.parametrize(
    "pictures, masks",
    [
        ("images/train", "masks/train"),
        ("images/training", "annotations/training"),
        ("train/images", "train/masks"),
        ("training/images", "training/annotations"),
    ],
)
def test_layouts(tmp_path, pictures, masks):
    write_pairs(tmp_path / pictures / "a" / "b", tmp_path / masks / "a" / "b", 5)

    maps = open_label_maps(str(tmp_path))

    assert len(maps) == 5 and maps.classes == ["0", "1", "2"] and belong_together(maps)


def test_parts_of_a_folder(folder, capsys):
    SAID.clear()

    assert len(open_label_maps(str(folder))) == len(open_label_maps(str(folder), "train+val")) == 9
    assert len(open_label_maps(str(folder), "val")) == 3
    assert capsys.readouterr().err == ""
    assert len(open_label_maps(str(folder), "test")) == 3
    assert "has no test/; its val/ is scored" in capsys.readouterr().err
    with pytest.raises(BeitError, match="unknown split 'all'; there are: train, val"):
        open_label_maps(str(folder), "all")


def test_val_has_the_classes_of_train(folder):
    for k in range(3):
        Image.new("L", (8, 6), 1).save(folder / "masks" / "val" / f"p{k:02}.png")

    assert open_label_maps(str(folder), "val").classes == ["0", "1", "2"]


def test_names_of_classes(folder, capsys):
    SAID.clear()
    (folder / "classes.txt").write_text("nothing\r\ncat\r\nd o g\r\nbird\r\n\r\n")

    maps = open_label_maps(str(folder), reduce_zero_label=True)

    assert maps.classes == ["cat", "d o g", "bird"]
    assert maps.label_map(0).unique().tolist() == [255] and maps.label_map(2).max() == 1
    assert "1 of the 3 classes" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "cat\n\ndog", "cat\ncat", "x\n" * 300, b"\xff\xfe\x00"])
def test_names_that_cannot_be_are_refused(folder, text):
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "classes.txt").write_bytes(data)

    with pytest.raises(BeitError, match=r"classes\.txt must name the labels 0, 1, 2, \.\.\. of"):
        open_label_maps(str(folder))


def test_too_few_names_are_refused(folder):
    (folder / "classes.txt").write_text("cat\ndog\n")

    with pytest.raises(BeitError, match=r"train/p02\.png has the label 2, and the 2 classes are"):
        open_label_maps(str(folder))


def test_many_maps_need_names(folder, monkeypatch):
    maps = open_label_maps(str(folder))
    assert isinstance(maps, FileMaps)
    monkeypatch.setattr("beit_nb.label_maps.LOOKED_AT", 8)

    with pytest.raises(BeitError, match=r"no classes\.txt for the 9 label maps of .*masks/train"):
        found_names(maps.masks)
    assert LOOKED_AT == 1000  # as data/README.md says


def test_what_is_no_set_is_refused(tmp_path):
    for data, words in (
        ("nowhere", "no data at nowhere"),
        ("photos", "photos has no label maps; known sets that have: ade20k, digits, oxford-pets"),
        ("cifar10", "cifar10 has no label maps"),
        (str(tmp_path), "no pictures with label maps for train: put them into .*no folders$"),
    ):
        with pytest.raises(BeitError, match=words):
            open_label_maps(data)


def test_an_empty_folder_is_refused(folder):
    for file in (folder / "masks" / "train").iterdir():
        file.unlink()

    with pytest.raises(BeitError, match=r"no pictures in .*masks/train"):
        open_label_maps(str(folder))


def test_pictures_without_a_map_are_counted_and_named(folder):
    for k in range(4):
        (folder / "masks" / "train" / f"p{k:02}.png").unlink()

    words = r"4 of 9 pictures in .*images/train have no label map in .*: p00, p01, p02, \.\.\.; add"
    with pytest.raises(BeitError, match=words):
        open_label_maps(str(folder))


def test_names_without_any_overlap_are_refused(folder):
    for file in list((folder / "masks" / "train").iterdir()):
        file.rename(file.with_name(f"{file.stem}_mask.png"))

    words = r"no picture in .*images/train has a .*, such as p00\.jpg and p00_mask\.png"
    with pytest.raises(BeitError, match=words):
        open_label_maps(str(folder))


def test_two_of_a_name_are_refused(folder):
    Image.new("L", (8, 6)).save(folder / "masks" / "train" / "p03.tif")

    with pytest.raises(BeitError, match=r"p03\.png and p03\.tif: which is meant"):
        open_label_maps(str(folder))


def test_what_is_left_over_is_said(folder, capsys):
    SAID.clear()
    Image.new("L", (8, 6)).save(folder / "masks" / "train" / "q.png")
    (folder / "images" / "train" / "notes.txt").touch()

    open_label_maps(str(folder))

    said = capsys.readouterr().err
    assert "label maps without a picture: 1 (first: q.png)" in said
    assert "files with other endings: 1 (first: notes.txt)" in said


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda image: image.convert("RGB"), r"masks/train/p04\.png is gray in several channels"),
        (lambda image: image.resize((4, 3)), r"masks/train/p04\.png has 4 x 3 pixels, and its"),
    ],
)
def test_a_wrong_map_is_found_before_a_training(folder, change, words):
    file = folder / "masks" / "train" / "p04.png"
    change(Image.open(file)).save(file)
    (folder / "classes.txt").write_text("a\nb\nc\n")

    with pytest.raises(BeitError, match=words):
        open_label_maps(str(folder))


def lay_out_pets(root: Path) -> None:
    "40 pictures as torchvision lays them out, with trimaps 1, 2, 3 in turn."
    home = root / "oxford-iiit-pet"
    trimaps = home / "annotations" / "trimaps"
    write_pairs(home / "images", trimaps, 28, labels=(1, 2, 3))
    for part, numbers in (("trainval", range(20)), ("test", range(20, 28))):
        lines = [f"p{k:02} {k % 2 + 1} 1 1\n" for k in numbers]
        (home / "annotations" / f"{part}.txt").write_text("".join(lines))


@pytest.fixture
def pets(tmp_path, monkeypatch):
    from torchvision.datasets import OxfordIIITPet

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(OxfordIIITPet, "_download", lambda self: None)
    lay_out_pets(tmp_path / "data")


@pytest.mark.usefixtures("pets")
def test_pets_have_three_classes():
    maps = open_label_maps("oxford-pets")

    assert maps.classes == ["pet", "background", "border"] and belong_together(maps)
    assert open_label_maps("oxford-pets", reduce_zero_label=False).classes[0] == "no label"


@pytest.mark.usefixtures("pets")
@pytest.mark.parametrize("split, count", [("train", 18), ("val", 2), ("test", 8)])
def test_pets_are_split_as_their_breeds_are(split, count):
    maps = open_label_maps("oxford-pets", split)
    base, ids, _ = torchvision_part("oxford-pets", split)
    breeds = open_data("oxford-pets", split, labels=True)

    assert len(maps) == len(breeds) == count
    assert [maps.path(i) for i in range(count)] == [str(base._images[i]) for i in ids]
    assert torch.equal(maps.pixels(1), breeds.pixels(1))


@pytest.mark.parametrize("unpacked", ["", "ADEChallengeData2016"])
def test_ade20k(tmp_path, monkeypatch, unpacked, capsys):
    SAID.clear()
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data" / "ade20k" / unpacked
    write_pairs(root / "images/training", root / "annotations/training", 6, labels=(1, 2, 150))
    write_pairs(root / "images/validation", root / "annotations/validation", 3, labels=(1, 0, 9))
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", "1\t0.1\t9\t1\t1\twall"]
    rows += [f"{k}\t0.1\t9\t1\t0\tthing {k}, object {k}" for k in range(2, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(rows) + "\n")

    maps = open_label_maps("ade20k")
    val = open_label_maps("ade20k", "val")

    assert len(maps.classes) == 150 and maps.classes[149] == "thing 150"
    assert [int(maps.label_map(i).max()) for i in range(3)] == [0, 1, 149]
    assert [int(val.label_map(i).max()) for i in range(3)] == [0, 255, 8]
    assert "147 of the 150 classes" in capsys.readouterr().err
    assert open_label_maps(str(root)).classes == maps.classes  # by its own list, wherever it lies
    assert len(open_label_maps("ade20k", reduce_zero_label=False).classes) == 151


def test_ade20k_to_pretrain_and_to_classify(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data" / "ade20k"
    write_pairs(root / "images/training", root / "annotations/training", 6, labels=(1, 2))

    assert len(open_data("ade20k")) == 6
    assert open_label_maps("ade20k").classes[0] == "1"
    with pytest.raises(BeitError, match="ade20k has a class for every pixel and none for a pict"):
        open_data("ade20k", labels=True)


@pytest.mark.parametrize("ending, mask", [("jpg", "png"), ("webp", "png"), ("png", "mask.png")])
def test_shards(tmp_path, ending, mask):
    write_pairs(tmp_path / "a", tmp_path / "b", 9, ending=ending)
    for part, numbers in (("train", range(7)), ("val", range(7, 9))):
        (tmp_path / "tars" / part).mkdir(parents=True)
        with tarfile.open(tmp_path / "tars" / part / "0.tar", "w") as archive:
            for k in numbers:
                both = [(f"a/p{k:02}.{ending}", ending), (f"b/p{k:02}.png", mask)]
                for file, kind in sorted(both, key=lambda x: x[1]):  # as `tar --sort=name` does
                    archive.add(tmp_path / file, f"in/p{k:02}.{kind}")

    maps = open_label_maps(str(tmp_path / "tars"))
    again = pickle.loads(pickle.dumps(maps))

    assert len(maps) == 7 and belong_together(again) and not maps.left_out
    assert maps.chunk_starts is not None and maps.path(2).endswith(f"/in/p02.{ending}")
    assert all(picture_records(maps)) and len(open_label_maps(str(tmp_path / "tars"), "val")) == 2


def test_shards_without_maps_are_refused(tmp_path):
    write_pairs(tmp_path / "a", tmp_path / "b", 3)
    (tmp_path / "tars" / "train").mkdir(parents=True)
    with tarfile.open(tmp_path / "tars" / "train" / "0.tar", "w") as archive:
        for k in range(3):
            archive.add(tmp_path / "a" / f"p{k:02}.jpg", f"p{k:02}.jpg")
        archive.add(tmp_path / "b" / "p00.png", "p00.png")

    with pytest.raises(BeitError, match=r"2 of 3 pictures in the shards of .*: p01, p02; put NAME"):
        open_label_maps(str(tmp_path / "tars"))


@pytest.mark.parametrize(
    "kinds, mask",
    [
        (["jpg", "png"], "png"),
        (["png", "webp"], "png"),
        (["png"], None),
        (["jpg"], None),
        (["png", "mask.png"], "mask.png"),
        (["jpg", "mask.tif"], "mask.tif"),
    ],
)
def test_which_member_is_the_map(kinds, mask):
    assert mask_kind(kinds) == mask


def test_digits_need_no_file():
    maps = open_label_maps("embedded:digits", "val", reduce_zero_label=True)

    assert maps.classes == [str(k) for k in range(10)]
    present = np.unique(np.stack([maps.label_map(i) for i in range(len(maps))]))
    assert present.tolist() == [*range(10), 255]
