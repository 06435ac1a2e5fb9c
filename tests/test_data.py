"""Sources of pictures: layouts on disk, known sets without a network, faults, and tar shards in both directions."""

import io
import json
import os
import pickle
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import beit_nb.data as data
from beit_nb.data import KNOWN, open_data, torchvision_set
from beit_nb.engine.files import FileList, fingerprint
from beit_nb.engine.shards import ImageShards, shard_folder
from beit_nb.engine.sources import Digits, ImageFolder, Photos, ImageDataset, decode_image
from beit_nb.engine.files import list_images
from beit_nb.images import load_image, photos


def grey(file: Path, value: int, size=(24, 20)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(file)


def values(pictures):
    "Grey value of every picture -> label."
    assert all(pictures[i].mode == "RGB" for i in range(len(pictures)))
    return {
        round(float(np.asarray(pictures[i]).mean())): int(y) for i, y in enumerate(pictures.labels)
    }


@pytest.fixture
def fake(tmp_path, monkeypatch):
    "Every set of torchvision in miniature, where its class expects it; nothing may be fetched."
    (pets := tmp_path / "oxford-iiit-pet" / "annotations").mkdir(parents=True)
    lines = {"trainval": [], "test": []}
    for i in range(40):
        split = "trainval" if i < 20 else "test"
        grey(
            tmp_path
            / "imagenette2"
            / ("train" if i < 20 else "val")
            / ("n01440764", "n03888257")[i % 2]
            / f"{i}.JPEG",
            5 * i,
        )
        name = f"{('Abyssinian', 'great_pyrenees')[i % 2]}_{i}"
        grey(tmp_path / "oxford-iiit-pet" / "images" / f"{name}.jpg", 5 * i)
        lines[split].append(f"{name} {i % 2 + 1} {i % 2 + 1} 1")
    for split, text in lines.items():
        (pets / f"{split}.txt").write_text("\n".join(text) + "\n")
    for folder, key, files, meta, names in (
        (
            "cifar-10-batches-py",
            "labels",
            [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"],
            "batches.meta",
            "label_names",
        ),
        ("cifar-100-python", "fine_labels", ["train", "test"], "meta", "fine_label_names"),
    ):
        (tmp_path / folder).mkdir()
        n = 4 if len(files) == 6 else 20
        for k, f in enumerate(files):
            n = 20 if f == "test" or f == "test_batch" else n
            i = (
                np.arange(n)
                + k * n * (f not in ("test", "test_batch"))
                + 20 * (f in ("test", "test_batch"))
            )
            (tmp_path / folder / f).write_bytes(
                pickle.dumps(
                    {
                        "data": np.repeat((5 * i).astype(np.uint8)[:, None], 3072, 1),
                        key: (i % 2).tolist(),
                    }
                )
            )
        (tmp_path / folder / meta).write_bytes(pickle.dumps({names: ["even", "odd"]}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *a, **k: True)

    def no_network(*a, **k):
        raise AssertionError("tried to download")

    for module in ("cifar", "imagenette", "oxford_iiit_pet"):
        monkeypatch.setattr(
            getattr(torchvision.datasets, module), "download_and_extract_archive", no_network
        )
    return tmp_path


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenette", "oxford-pets"])
def test_known_sets(fake, name):
    train, val, test, both = (
        torchvision_set(name, s, fake) for s in ("train", "val", "test", "train+val")
    )
    assert (
        [len(s) for s in (train, val, test, both)] == [18, 2, 20, 20]
        and all(isinstance(c, str) for c in train.classes)
        and len(train.classes) == 2
    )
    seen = values(train) | values(val)
    # disjoint, and nothing lost
    assert len(seen) == 20 and seen == values(both) and max(seen) < min(values(test))
    assert all(y == round(v / 5) % 2 for v, y in (seen | values(test)).items())
    # always the same tenth
    assert values(torchvision_set(name, "val", fake)) == values(val)
    # as spawned workers need
    pickle.loads(pickle.dumps(train))[0]


def test_no_network_is_one_line(tmp_path, monkeypatch):
    def no_network(*a, **k):
        raise OSError("no route to host")

    for module in ("cifar", "imagenette", "oxford_iiit_pet"):
        monkeypatch.setattr(
            getattr(torchvision.datasets, module), "download_and_extract_archive", no_network
        )
    for name in ("cifar10", "cifar100", "imagenette", "oxford-pets"):
        with pytest.raises(ValueError, match="cannot get .*no route to host.*data/README.md") as e:
            torchvision_set(name, "train", tmp_path)
        assert "\n" not in str(e.value)


def test_readme_names_every_known_set():
    text = (Path(__file__).parent.parent / "data" / "README.md").read_text()
    assert all(f"| `{name}` |" in text for name in KNOWN)


def test_labels_of_val_are_those_of_train(tmp_path):
    for i, c in enumerate("abc"):
        grey(tmp_path / "train" / c / "x" / f"{i}.png", 10 * i)
    grey(tmp_path / "val" / "c" / "1.png", 99)
    grey(tmp_path / "train" / ".hidden" / "1.png", 0)
    assert open_data(str(tmp_path), "train", labels=True).classes == ["a", "b", "c"]
    assert (
        values(open_data(str(tmp_path), "val", labels=True))
        == {99: 2}
        == values(open_data(str(tmp_path), "test", labels=True))
    )
    assert len(open_data(str(tmp_path))) == 3
    grey(tmp_path / "val" / "d" / "1.png", 0)
    with pytest.raises(ValueError, match="class 'd'"):
        open_data(str(tmp_path), "val", labels=True)
    grey(tmp_path / "train" / "loose.png", 0)
    with pytest.raises(ValueError, match="outside of class folders .loose.png"):
        open_data(str(tmp_path), "train", labels=True)


def test_many_classes_are_fast(tmp_path, monkeypatch):
    "ImageNet-22K has 14 million pictures in 21,841 classes: no search through a list for each."
    import time, beit_nb.engine.shards as d

    root = tmp_path / "x"
    root.mkdir()
    names = [f"n{i:05d}" for i in range(2000)]
    monkeypatch.setattr(
        d, "image_names", lambda r: (f"{n}/{k}.jpg" for n in names for k in range(20))
    )
    t = time.process_time()
    assert len(ImageFolder(root, labels=True, classes=names)) == 40_000
    assert time.process_time() - t < 5


def test_a_list_of_millions_is_small(tmp_path):
    """Packed names: below 60 bytes a picture (a Path has 506), no object a worker could copy.

    And found without asking the disk for each.
    """
    import time, tracemalloc

    for c in range(20):
        (folder := tmp_path / f"n{c:08d}").mkdir()
        for k in range(300):
            (folder / f"n{c:08d}_{k}.JPEG").touch()
    began = time.process_time()
    tracemalloc.start()
    pictures = ImageFolder(tmp_path)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(pictures) == 6000 and held / 6000 < 60 and time.process_time() - began < 1.5
    assert [str(f.relative_to(tmp_path)) for f in pictures.files] == sorted(
        str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*.JPEG")
    )
    assert pictures.files[5999] == pictures.files[-1] and len(FileList(tmp_path, [])) == 0
    with pytest.raises(IndexError):
        pictures.files[6000]


def test_order_is_that_of_paths(tmp_path):
    "A folder a-b and a folder a: in the order of their parts, as ever."
    names = ["a-b/1.png", "a/2.png", "a/c/3.png", "a/c.png", "B/4.png", "5.png"]
    for n in names:
        grey(tmp_path / n, 0)
    assert list_images(tmp_path) == sorted(tmp_path / n for n in names)


def test_links_are_followed_but_not_in_circles(tmp_path):
    for c in "ab":
        for k in range(3):
            grey(tmp_path / "store" / c / f"{k}.png", 10 * k)
    for split in ("train", "val"):
        (tmp_path / "set" / split).mkdir(parents=True)
        for c in "ab":
            (tmp_path / "set" / split / c).symlink_to(tmp_path / "store" / c)
    assert len(open_data(str(tmp_path / "set"))) == 6
    assert open_data(str(tmp_path / "set"), "val", labels=True).labels.tolist() == [
        0,
        0,
        0,
        1,
        1,
        1,
    ]
    assert shard_folder(tmp_path / "set", tmp_path / "out") == dict(
        pictures=12, shards=2, damaged=0, others=0
    )
    (tmp_path / "store" / "a" / "up").symlink_to(tmp_path / "store")  # a circle
    (tmp_path / "store" / "b" / "dead.png").symlink_to("/nowhere.png")
    assert len(list_images(tmp_path / "store")) == 6
    assert len(list_images(tmp_path / "set" / "train" / "b")) == 3


def test_imagenet_layouts(tmp_path, monkeypatch):
    "Both sets by name, from data/ of the folder that one stands in; and trees of any depth."
    for i in range(4):
        grey(
            tmp_path
            / "data"
            / "imagenet"
            / ("train", "val")[i % 2]
            / f"n0{i // 2}"
            / f"n0{i // 2}_{i}.JPEG",
            50 * i,
        )
    for i in range(3):
        grey(tmp_path / "data" / "imagenet22k" / f"n1{i}" / f"n1{i}_1.JPEG", 50 * i)
    for i in range(3):
        grey(tmp_path / "deep" / "/".join("abcdef"[: 2 * i]) / f"{i}.Png", 50 * i)
    monkeypatch.chdir(tmp_path)
    assert len(open_data("imagenet")) == 2 and open_data(
        "imagenet", "val", labels=True
    ).labels.tolist() == [0, 1]
    assert len(open_data("imagenet22k")) == 3 and open_data("imagenet22k").labels is None
    assert len(open_data("deep")) == 3


def jpeg(image, **more) -> bytes:
    with io.BytesIO() as f:
        image.save(f, "JPEG", **more)
        return f.getvalue()


def by_pil(blob: bytes):
    return torch.from_numpy(np.array(load_image(io.BytesIO(blob)))).permute(2, 0, 1)


def test_fast_decoder_is_pil(tmp_path):
    "Every kind of file gives the pixels that PIL gives, and is damaged where PIL says so."
    cat = photos()["chelsea"]
    kinds = [
        jpeg(cat),
        jpeg(cat, progressive=True),
        jpeg(cat, subsampling=0),
        jpeg(cat, subsampling=1),
        jpeg(cat.convert("L")),
        jpeg(cat.convert("CMYK")),
    ]
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        kinds.append(jpeg(cat, exif=exif))
    for kind in ("PNG", "WEBP", "GIF", "TIFF", "BMP"):
        with io.BytesIO() as f:
            cat.save(f, kind)
            kinds.append(f.getvalue())
    for blob in kinds:
        assert torch.equal(decode_image(blob, lambda: "x"), by_pil(blob))
    whole = kinds[0]
    rng = np.random.default_rng(0)
    broken = [whole[:n] for n in (0, 1, 2, 10, 700, len(whole) // 2, len(whole) - 1)]
    for _ in range(60):
        blob = bytearray(whole)
        for place in rng.integers(2, len(blob), rng.choice([1, 5, 20])):
            blob[place] = rng.integers(256)
        broken.append(bytes(blob))
    refused = 0
    for blob in broken:
        try:
            want = by_pil(blob)
        except ValueError:
            want = None
            refused = refused + 1
        if want is not None:
            assert torch.equal(decode_image(blob, lambda: "x"), want)
        else:
            with pytest.raises(ValueError, match="^cannot read the picture cat.jpg"):
                decode_image(blob, lambda: "cat.jpg")
    assert 7 <= refused < len(broken)


@pytest.mark.parametrize("size", [14_000, 30_000])
def test_a_header_that_claims_too_much(size, tmp_path):
    "631 bytes that would be 2.7 GB: refused before anything is decoded, by both readers alike."
    bomb = bytearray(jpeg(photos()["chelsea"].resize((16, 16))))
    i = bomb.index(b"\xff\xc0") + 5
    bomb[i : i + 4] = size.to_bytes(2, "big") * 2
    (tmp_path / "bomb.jpg").write_bytes(bomb)
    for read in (
        lambda: decode_image(bytes(bomb), lambda: "bomb.jpg"),
        lambda: ImageFolder(tmp_path).pixels(0),
        lambda: ImageFolder(tmp_path)[0],
    ):
        with pytest.raises(
            ValueError, match="^cannot read the picture .*bomb.jpg: .*decompression bomb"
        ):
            read()


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_greys_in_floats(tmp_path, white):
    want = np.array(photos()["chelsea"].convert("L"))
    Image.fromarray(np.float32(want) / 255 * white).save(tmp_path / "x.tif")
    assert np.abs(np.array(load_image(tmp_path / "x.tif"), int)[..., 0] - want).max() <= 1
    # 16 bits stay 16 bits, however dark
    Image.fromarray(np.uint16(want)).save(tmp_path / "dark.png")
    assert np.array(load_image(tmp_path / "dark.png")).max() <= 1


def test_a_file_that_has_gone_is_damaged(tmp_path):
    for i in range(3):
        grey(tmp_path / f"{i}.png", i)
    pictures = ImageFolder(tmp_path)
    (tmp_path / "1.png").unlink(), (tmp_path / "2.png").unlink(), (tmp_path / "2.png").mkdir()
    for i in (1, 2):
        for read in (pictures.__getitem__, pictures.pixels):
            with pytest.raises(ValueError, match=f"^cannot read the picture .*{i}.png: "):
                read(i)


def test_names_in_other_alphabets(tmp_path):
    "Latin-1 bytes in a name are no UTF-8; packed, listed and told all the same."
    odd = os.fsdecode(b"caf\xe9.png")
    for name in (odd, "two\nlines.png", "\u65e5\u672c.png"):
        grey(tmp_path / "in" / "a" / name, 7)
    assert shard_folder(tmp_path / "in", tmp_path / "out") == dict(
        pictures=3, shards=1, damaged=0, others=0
    )
    pictures = ImageFolder(tmp_path / "in", labels=True)
    assert len({pictures.path(i) for i in range(3)}) == 3 and len(pictures.fingerprint()) == 16
    assert [os.fsencode(f.name) for f in pictures.files] == sorted(
        [b"caf\xe9.png", b"two\nlines.png", "\u65e5\u672c.png".encode()], key=os.fsdecode
    )
    with tarfile.open(tmp_path / "out" / "x.tar", "w", format=tarfile.GNU_FORMAT) as t:
        t.add(tmp_path / "in" / "a" / odd, odd)
    (tmp_path / "out" / "shards.json").unlink()
    assert odd in ImageShards(tmp_path / "out").path(3)


def test_fingerprints(tmp_path):
    """Other pictures, another order, another class.

    Another fingerprint. Another place or way to say it: the same.
    """
    for c in "ab":
        for k in range(3):
            Image.fromarray(
                np.random.default_rng([k, ord(c)]).integers(0, 255, (20 + k, 24, 3), dtype=np.uint8)
            ).save(
                (tmp_path / c / f"{k}.png").parent.mkdir(parents=True, exist_ok=True)
                or tmp_path / c / f"{k}.png"
            )

    def folder(name, *files):
        for f, source in files:
            (
                (tmp_path / name / f).parent.mkdir(parents=True, exist_ok=True),
                (tmp_path / name / f).write_bytes((tmp_path / source).read_bytes()),
            )
        return tmp_path / name

    one = folder("one", ("ant/0.png", "a/0.png"), ("bee/1.png", "b/1.png"))
    # equal names and count, under the other class
    swapped = folder("swapped", ("bee/0.png", "a/0.png"), ("ant/1.png", "b/1.png"))
    moved = folder("deep/down/moved", ("ant/0.png", "a/0.png"), ("bee/1.png", "b/1.png"))
    assert (
        ImageFolder(one).fingerprint()
        == ImageFolder(moved).fingerprint()
        == ImageFolder(os.path.relpath(one)).fingerprint()
        == ImageFolder(one, labels=True).fingerprint()
    )
    assert ImageFolder(one).fingerprint() != ImageFolder(swapped).fingerprint()
    many = folder("many", *((f"{k}.png", f"a/{k}.png") for k in range(3)))
    other = folder("other", *((f"{k}.png", f"b/{k}.png") for k in range(3)))
    for source, out in ((many, "s1"), (other, "s2")):
        shard_folder(source, tmp_path / out)
    first = ImageShards(tmp_path / "s1").fingerprint()
    # moved
    (tmp_path / "s1").rename(tmp_path / "s3")
    # and renamed
    (tmp_path / "s3" / "000000.tar").rename(tmp_path / "s3" / "train-0.tar")
    # and others of equal count in its place
    (tmp_path / "s2").rename(tmp_path / "s1")
    assert ImageShards(tmp_path / "s3").fingerprint() == first != ImageShards(tmp_path / "s1").fingerprint()
    same = tmp_path / "same"
    # equal sizes, only the names differ
    for k, name in enumerate(("x", "y")):
        (same / name).mkdir(parents=True)
        with tarfile.open(same / name / "0.tar", "w") as t:
            t.add(tmp_path / "a" / "0.png", f"{name}.png")
    assert ImageShards(same / "x").fingerprint() != ImageShards(same / "y").fingerprint()
    assert (
        ImageDataset(3, None, name="x").fingerprint()
        != ImageDataset(4, None, name="x").fingerprint()
        != Digits("val").fingerprint()
        != Digits("test").fingerprint()
    )
    assert fingerprint("ab", "c") != fingerprint("a", "bc")


def test_pictures_beside_shards(tmp_path):
    "A backup among the pictures must not take their place, nor a picture among the shards vanish."
    for i in range(3):
        grey(tmp_path / "in" / "a" / f"{i}.png", i)
    with tarfile.open(tmp_path / "in" / "backup.tar", "w") as t:
        t.add(tmp_path / "in" / "a" / "0.png", "0.png")
    with pytest.raises(
        ValueError, match=r"in holds shards \(backup.tar\) and pictures outside of them \(a/0.png\)"
    ):
        open_data(str(tmp_path / "in"))
    (tmp_path / "in" / "backup.tar").rename(tmp_path / "backup.tar")
    assert len(open_data(str(tmp_path / "in"))) == 3


def test_without_torchvisions_decoder(tmp_path, monkeypatch):
    "It is to leave torchvision one day: the same pixels by PIL, and no warning while it is there."
    import warnings

    blobs = [
        jpeg(photos()["chelsea"]),
        jpeg(photos()["coffee"].convert("L")),
        jpeg(photos()["coffee"].convert("CMYK")),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        want = [decode_image(b, lambda: "x") for b in blobs]
    asked = []
    monkeypatch.setattr(data, "load_image", lambda f: asked.append(f) or load_image(f))
    monkeypatch.setattr(torch.ops, "image", None)
    assert (
        all(torch.equal(decode_image(b, lambda: "x"), w) for b, w in zip(blobs, want)) and len(asked) == 3
    )
    with pytest.raises(ValueError, match="^cannot read the picture x"):
        decode_image(blobs[0][:900], lambda: "x")


@pytest.fixture
def tree(tmp_path):
    """Twelve pictures in two classes, a third one only in train.

    A note, a hidden file and a broken picture.
    """
    for i in range(12):
        grey(
            tmp_path
            / "in"
            / ("train" if i < 9 else "val")
            / "abc"[i % 3 if i < 9 else 1]
            / ("deep" if i % 2 else "")
            / f"pic.{i}.{('png', 'JPEG', 'webp')[i // 4]}",
            20 * i,
        )
    (tmp_path / "in" / "train" / "a" / "note.txt").write_text("hello")
    (tmp_path / "in" / "train" / "b" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    return tmp_path / "in"


def test_shards_both_ways(tree, tmp_path, capfd):
    import webdataset

    out = tmp_path / "out"
    assert shard_folder(tree, out, per_shard=4) == dict(pictures=12, shards=4, damaged=1, others=1)
    assert (
        "beit: left out: cannot read the picture" in (said := capfd.readouterr().err)
        and "broken.jpg" in said
    )
    train, val = (open_data(str(out), s, labels=True) for s in ("train", "val"))
    assert (len(train), len(val)) == (9, 3) and train.classes == val.classes == ["a", "b", "c"]
    assert values(train) == {20 * i: i % 3 for i in range(9)} and values(val) == {
        20 * i: 1 for i in (9, 10, 11)
    }
    want = {
        f.read_bytes(): "abc".index(f.relative_to(tree / "train").parts[0])
        for f in (tree / "train").rglob("pic.*")
    }
    theirs = list(webdataset.WebDataset([str(t) for t in train.tars], shardshuffle=False))
    assert {
        next(v for k, v in x.items() if k in ("png", "jpeg", "webp")): int(x["cls"]) for x in theirs
    } == want and len({x["__key__"] for x in theirs}) == 9
    assert {train.bytes(i): int(y) for i, y in enumerate(train.labels)} == want
    assert all(
        torch.equal(train.pixels(i), torch.from_numpy(np.array(train[i])).permute(2, 0, 1))
        for i in range(9)
    )
    assert not [f for f in out.rglob("*") if f.name.endswith(".part")]
    assert len(open_data(str(out))) == 9 and open_data(str(out)).labels is None

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with webdataset.ShardWriter(str(foreign / "s-%03d.tar"), maxcount=2, verbose=0) as w:
        for i, (blob, y) in enumerate(want.items()):
            w.write(
                {
                    "__key__": f"some/folder/{i:03d}",
                    "jpg": blob,
                    "cls": y,
                    "json": {"a": 1},
                    "seg.png": b"no",
                    "txt": "words",
                }
            )
    theirs = ImageShards(foreign, labels=True)
    assert {
        theirs.bytes(i): int(y) for i, y in enumerate(theirs.labels)
    } == want and theirs.classes == ["0", "1", "2"]
    assert theirs.path(0) == f"{foreign}/s-000.tar/some/folder/000.jpg"
    assert ImageShards(foreign, labels=True, classes=["x", "y", "z"]).classes == ["x", "y", "z"]


@pytest.mark.parametrize("kind", ["ustar", "gnu", "pax", "command"])
def test_shards_of_any_tar(tmp_path, kind):
    "Names longer than a header holds, links and folders, and the tar of the system."
    root = tmp_path / "t"
    name = "x" * 60 + "/" + "y" * (60 if kind == "ustar" else 120)
    for i in range(3):
        grey(root / f"{name}{i}.PNG", 50 * i)
    (root / "link.png").symlink_to("x.png")
    tar = tmp_path / "s" / "0.tar"
    tar.parent.mkdir()
    if kind == "command":
        subprocess.run(["tar", "cf", tar, "-C", root, "."], check=True)
    else:
        with tarfile.open(
            tar,
            "w",
            format=dict(ustar=tarfile.USTAR_FORMAT, gnu=tarfile.GNU_FORMAT, pax=tarfile.PAX_FORMAT)[
                kind
            ],
        ) as t:
            t.add(root, ".")
    shards = ImageShards(tar.parent)
    assert sorted(round(float(np.asarray(shards[i]).mean())) for i in range(len(shards))) == [
        0,
        50,
        100,
    ]
    assert "y" * 20 in shards.path(0)


def test_sharding_goes_on_where_it_was_stopped(tree, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    out = tmp_path / "out"
    shard_folder(tree / "train", whole, per_shard=2)
    real = data.decode
    n = [0]

    def dies(*a):
        n[0] += 1
        if n[0] > 5:
            raise KeyboardInterrupt
        return real(*a)

    monkeypatch.setattr(data, "decode", dies)
    with pytest.raises(KeyboardInterrupt):
        shard_folder(tree / "train", out, per_shard=2)
    left = {t.name: t.stat().st_mtime_ns for t in out.glob("*.tar")}
    assert len(left) == 2 and not list(out.glob("*.part"))
    with pytest.raises(ValueError, match="holds 2 of 5 shards; let `beit shard` finish"):
        open_data(str(out))
    monkeypatch.setattr(data, "decode", real)
    again = shard_folder(tree / "train", out, per_shard=2)
    assert (
        again
        == shard_folder(tree / "train", out, per_shard=2)
        == dict(pictures=9, shards=5, damaged=1, others=1)
    )
    assert all((out / t).stat().st_mtime_ns == when for t, when in left.items())
    assert [t.read_bytes() for t in sorted(out.glob("*.tar"))] == [
        t.read_bytes() for t in sorted(whole.glob("*.tar"))
    ]
    grey(tree / "train" / "a" / "new.png", 3)
    with pytest.raises(ValueError, match="something else"):
        shard_folder(tree / "train", out, per_shard=2)
    with pytest.raises(ValueError, match="something else"):
        shard_folder(tree / "train", out, per_shard=3)
    with pytest.raises(ValueError, match="per_shard 0"):
        shard_folder(tree / "train", out, per_shard=0)


def test_faults_of_shards(tree, tmp_path):
    out = tmp_path / "out"
    shard_folder(tree / "train", out, per_shard=100)
    tar = out / "000000.tar"
    shards = ImageShards(out)
    first = shards.bytes(0)
    whole = tar.read_bytes()
    index = out / "000000.tar.index.npy"
    # cut short while in use, and afterwards
    tar.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="^cannot read the picture at byte .*000000.tar"):
        [shards.bytes(i) for i in range(9)]
    # no second error on the way to the message
    assert all(str(tar) in shards.path(i) for i in range(9)) and "at byte" in shards.path(8)
    with pytest.raises(ValueError, match="000000.tar: .*beit shard"):
        ImageShards(out)
    # another time stamp: the list is found again
    tar.write_bytes(whole)
    assert ImageShards(out).bytes(0) == first
    for rubbish in (b"", b"\x93NUMPY", index.read_bytes()[:-9]):
        index.write_bytes(rubbish)
        assert ImageShards(out).bytes(0) == first and len(np.load(index)) == 10
    (empty := tmp_path / "empty").mkdir()
    with tarfile.open(empty / "0.tar", "w") as t:
        t.add(tree / "train" / "a" / "note.txt", "note.txt")
    with pytest.raises(ValueError, match="no pictures in the shards"):
        open_data(str(empty))
    with tarfile.open(empty / "0.tar", "w:gz") as t:
        t.add(tree / "train" / "a" / "note.txt", "note.txt")
    with pytest.raises(ValueError, match="uncompressed"):
        open_data(str(empty))
    (out / "classes.json").write_text(json.dumps(["a", "b"]))
    with pytest.raises(ValueError, match="class 2 .*of 2 classes"):
        ImageShards(out, labels=True)


def test_classes_that_are_words(tree, tmp_path):
    """Other people write the name of a class where we want a number.

    Fine for pre-training, one clear line for who wants labels.
    """
    import webdataset

    blob = (tree / "train" / "a" / "pic.0.png").read_bytes()
    for folder, said in (("words", b"n01440764"), ("empty", b""), ("none", None)):
        (tmp_path / folder).mkdir()
        with webdataset.TarWriter(str(tmp_path / folder / "0.tar")) as t:
            for i in range(3):
                t.write({"__key__": str(i), "png": blob} | ({} if said is None else {"cls": said}))
        assert len(open_data(str(tmp_path / folder))) == 3
        with pytest.raises(ValueError, match="class -1 .-1: no number given"):
            ImageShards(tmp_path / folder, labels=True)


def test_an_index_of_an_older_version(tree, tmp_path):
    shard_folder(tree / "train", tmp_path / "out", per_shard=100)
    want = ImageShards(tmp_path / "out").fingerprint()
    index = tmp_path / "out" / "000000.tar.index.npy"
    np.save(index, np.load(index)[:, :3])
    assert ImageShards(tmp_path / "out").fingerprint() == want and np.load(index).shape == (10, 4)


def test_shards_in_a_folder_that_nobody_may_write(tree, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shard_folder(tree / "train", out, per_shard=5)
    for f in out.glob("*.npy"):
        f.unlink()

    def refuse(*a, **k):
        raise PermissionError(13, "no")

    monkeypatch.setattr(data, "whole_file", refuse)
    assert len(ImageShards(out)) == 9 and not list(out.glob("*.npy"))


def test_many_shards_few_open_files(tree, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shard_folder(tree / "train", out, per_shard=1)
    shards = ImageShards(out)
    shards.pieces.most = 2
    before = len(os.listdir("/proc/self/fd"))
    want = [shards.bytes(i) for i in range(9)]
    assert len(os.listdir("/proc/self/fd")) <= before + 2 and len(set(want)) == 9
    assert [shards.bytes(i) for i in reversed(range(9))] == want[::-1]


def test_sources_travel_to_spawned_workers(tree, tmp_path):
    shard_folder(tree / "train", tmp_path / "out")
    for pictures in (Digits("val"), ImageFolder(tree / "val"), Photos(), ImageShards(tmp_path / "out")):
        pictures.pixels(0)
        again = pickle.loads(pickle.dumps(pictures))
        assert (
            torch.equal(again.pixels(0), pictures.pixels(0))
            and len(again) == len(pictures)
            and again.path(0) == pictures.path(0)
        )
