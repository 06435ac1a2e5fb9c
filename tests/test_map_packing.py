"Pictures with label maps in tar shards: there and back, stopped, and what is refused."

import shutil

import numpy as np
import pytest
from PIL import Image

import beit_nb.engine.packing as packing
from beit_nb import BeitError
from beit_nb.cli import main
from beit_nb.label_maps import open_label_maps
from beit_nb.map_packing import holds_maps, shard_maps


def write_pairs(root, part, count, layout="{kind}/{part}", masks="masks", ending="jpg"):
    "Pictures of 8 x 6 pixels, each with a map of its own."
    rng = np.random.default_rng(len(part))
    for kind in ("images", masks):
        (root / layout.format(kind=kind, part=part)).mkdir(parents=True)
    for k in range(count):
        pixels = rng.integers(0, 256, (6, 8, 3), np.uint8)
        labels = rng.integers(0, 3, (6, 8), np.uint8)
        labels[0, 0] = 255
        folder = root / layout.format(kind="images", part=part)
        Image.fromarray(pixels).save(folder / f"p{k:02}.{ending}")
        Image.fromarray(labels).save(root / layout.format(kind=masks, part=part) / f"p{k:02}.png")


@pytest.fixture
def pairs(tmp_path):
    root = tmp_path / "pairs"
    write_pairs(root, "train", 7)
    write_pairs(root, "val", 3)
    (root / "classes.txt").write_text("sky\nsea\nland\n")
    return root


def bytes_of(maps):
    return {maps.bytes(i): maps.masks.bytes(i) for i in range(len(maps))}


def test_there_and_back(pairs, tmp_path):
    made = shard_maps(pairs, tmp_path / "out", per_shard=3)

    assert made == {"pictures": 10, "shards": 4, "damaged": 0, "others": 0}
    for part in ("train", "val"):
        before, after = (open_label_maps(str(x), part) for x in (pairs, tmp_path / "out"))
        assert bytes_of(before) == bytes_of(after) and len(after) == len(before)
        assert after.classes == ["sky", "sea", "land"]


@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize("zipped", [False, True])
def test_ade20ks_layout(tmp_path, ending, zipped):
    "annotations/, training and validation; 0 is no class, which its list of names says."
    root = tmp_path / "in"
    data = root / "ADEChallengeData2016" if zipped else root
    for part, count in (("training", 5), ("validation", 2)):
        write_pairs(data, part, count, masks="annotations", ending=ending)
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", *(f"{k}\t0\t0\t0\t0\tthing {k}" for k in (1, 2))]
    (data / "objectInfo150.txt").write_text("\n".join(rows))

    shard_maps(root, tmp_path / "out")

    before, after = (open_label_maps(str(x), "train") for x in (root, tmp_path / "out"))
    assert after.classes == before.classes == ["thing 1", "thing 2"]
    assert after.reduce_zero_label and bytes_of(before) == bytes_of(after)
    assert len(open_label_maps(str(tmp_path / "out"), "val")) == 2


def test_names_that_nobody_wrote(pairs, tmp_path):
    (pairs / "classes.txt").unlink()

    shard_maps(pairs, tmp_path / "out")

    assert open_label_maps(str(tmp_path / "out"), "train").classes == ["0", "1", "2"]


def test_it_goes_on_where_it_was_stopped(pairs, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    shard_maps(pairs, whole, per_shard=3)
    real, seen = packing.decode_image, []

    def dies(data, describe):
        seen.append(describe())
        if len(seen) > 4:
            raise KeyboardInterrupt
        return real(data, describe)

    monkeypatch.setattr(packing, "decode_image", dies)
    with pytest.raises(KeyboardInterrupt):
        shard_maps(pairs, out, per_shard=3)
    monkeypatch.setattr(packing, "decode_image", real)

    shard_maps(pairs, out, per_shard=3)

    tars = sorted(x.relative_to(whole) for x in whole.rglob("*.tar"))
    assert len(tars) == 4
    assert all((whole / tar).read_bytes() == (out / tar).read_bytes() for tar in tars)


def test_other_maps_are_something_else(pairs, tmp_path):
    shard_maps(pairs, tmp_path / "out", per_shard=3)
    file = pairs / "masks" / "train" / "p03.png"
    file.rename(file.with_suffix(".tif"))

    with pytest.raises(BeitError, match="holds shards of something else"):
        shard_maps(pairs, tmp_path / "out", per_shard=3)


@pytest.mark.parametrize(
    "fault, words",
    [
        (lambda file: file.unlink(), "1 of 7 pictures in .* have no label map"),
        (lambda file: Image.open(file).convert("RGB").save(file), "is gray in several channels"),
        (lambda file: Image.open(file).resize((4, 3), 0).save(file), "4 x 3 pixels, and its"),
        (lambda file: Image.new("L", (8, 6), 9).save(file), "has the label 9, and the 3 classes"),
    ],
)
def test_what_stops_a_training_stops_the_packing(pairs, tmp_path, fault, words):
    fault(pairs / "masks" / "train" / "p03.png")

    with pytest.raises(BeitError, match=words):
        shard_maps(pairs, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_a_damaged_half_takes_its_pair_along(pairs, tmp_path, capfd):
    for file in ("masks/train/p03.png", "images/train/p05.jpg"):
        data = (pairs / file).read_bytes()
        (pairs / file).write_bytes(data[: len(data) // 3])

    made = shard_maps(pairs, tmp_path / "out")

    assert made["pictures"] == 8 and made["damaged"] == 2
    said = capfd.readouterr().err
    assert "p03.png" in said and "p05.jpg" in said
    assert len(open_label_maps(str(tmp_path / "out"), "train")) == 5


def test_no_train(pairs, tmp_path):
    for kind in ("images", "masks"):
        shutil.rmtree(pairs / kind / "train")
    with pytest.raises(BeitError, match="no pictures with label maps for train"):
        shard_maps(pairs, tmp_path / "out")


def test_the_command(pairs, tmp_path, capsys):
    "`beit shard` sees by itself that there are label maps; without them it packs as ever."
    assert holds_maps(pairs) and not holds_maps(pairs / "images")

    assert main(["shard", str(pairs), "--out", str(tmp_path / "out")]) == 0

    assert "10 pictures, 2 shards" in capsys.readouterr().out
    assert len(open_label_maps(str(tmp_path / "out"), "train")) == 7
    assert main(["shard", str(pairs / "images" / "train"), "--out", str(tmp_path / "flat")]) == 0
    assert "7 pictures" in capsys.readouterr().out
    assert main(["shard", str(pairs), "--out", str(pairs / "tars")]) == 2
    assert "lies in" in capsys.readouterr().err
