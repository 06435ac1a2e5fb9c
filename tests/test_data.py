"""Sources of pictures: layouts on disk, known sets without a network, faults, and batches that repeat."""
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from beit_nb.data import KNOWN, Digits, Folder, Order, Photos, Samples, TwoViews, batches, open_data, torchvision_set
from beit_nb.recipes import PretrainRecipe


def grey(file: Path, value: int, size=(24, 20)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(file)


def values(pictures):
    "Grey value of every picture -> label."
    assert all(pictures[i].mode == "RGB" for i in range(len(pictures)))
    return {round(float(np.asarray(pictures[i]).mean())): int(y) for i, y in enumerate(pictures.labels)}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    "Every set of torchvision in miniature, where its class expects it; nothing may be fetched."
    (pets := tmp_path / "oxford-iiit-pet" / "annotations").mkdir(parents=True)
    lines = {"trainval": [], "test": []}
    for i in range(40):
        split = "trainval" if i < 20 else "test"
        grey(tmp_path / "imagenette2" / ("train" if i < 20 else "val") / ("n01440764", "n03888257")[i % 2] / f"{i}.JPEG", 5 * i)
        name = f"{('Abyssinian', 'great_pyrenees')[i % 2]}_{i}"
        grey(tmp_path / "oxford-iiit-pet" / "images" / f"{name}.jpg", 5 * i)
        lines[split].append(f"{name} {i % 2 + 1} {i % 2 + 1} 1")
    for split, text in lines.items(): (pets / f"{split}.txt").write_text("\n".join(text) + "\n")
    for folder, key, files, meta, names in (("cifar-10-batches-py", "labels", [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"], "batches.meta", "label_names"),
                                            ("cifar-100-python", "fine_labels", ["train", "test"], "meta", "fine_label_names")):
        (tmp_path / folder).mkdir()
        n = 4 if len(files) == 6 else 20
        for k, f in enumerate(files):
            n = 20 if f == "test" or f == "test_batch" else n
            i = np.arange(n) + k * n * (f not in ("test", "test_batch")) + 20 * (f in ("test", "test_batch"))
            (tmp_path / folder / f).write_bytes(pickle.dumps({"data": np.repeat((5 * i).astype(np.uint8)[:, None], 3072, 1), key: (i % 2).tolist()}))
        (tmp_path / folder / meta).write_bytes(pickle.dumps({names: ["even", "odd"]}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *a, **k: True)
    def no_network(*a, **k): raise AssertionError("tried to download")
    for module in ("cifar", "imagenette", "oxford_iiit_pet"):
        monkeypatch.setattr(getattr(torchvision.datasets, module), "download_and_extract_archive", no_network)
    return tmp_path


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenette", "oxford-pets"])
def test_known_sets(fake, name):
    train, val, test, both = (torchvision_set(name, s, fake) for s in ("train", "val", "test", "train+val"))
    assert [len(s) for s in (train, val, test, both)] == [18, 2, 20, 20] and all(isinstance(c, str) for c in train.classes) and len(train.classes) == 2
    seen = values(train) | values(val)
    assert len(seen) == 20 and seen == values(both) and max(seen) < min(values(test))       # disjoint, and nothing lost
    assert all(y == round(v / 5) % 2 for v, y in (seen | values(test)).items())
    assert values(torchvision_set(name, "val", fake)) == values(val)                         # always the same tenth
    pickle.loads(pickle.dumps(train))[0]                                                     # as spawned workers need


def test_no_network_is_one_line(tmp_path, monkeypatch):
    def no_network(*a, **k): raise OSError("no route to host")
    for module in ("cifar", "imagenette", "oxford_iiit_pet"):
        monkeypatch.setattr(getattr(torchvision.datasets, module), "download_and_extract_archive", no_network)
    for name in ("cifar10", "cifar100", "imagenette", "oxford-pets"):
        with pytest.raises(ValueError, match="cannot get .*no route to host.*data/README.md") as e: torchvision_set(name, "train", tmp_path)
        assert "\n" not in str(e.value)


def test_readme_names_every_known_set():
    text = (Path(__file__).parent.parent / "data" / "README.md").read_text()
    assert all(f"| `{name}` |" in text for name in KNOWN)


def test_labels_of_val_are_those_of_train(tmp_path):
    for i, c in enumerate("abc"): grey(tmp_path / "train" / c / "x" / f"{i}.png", 10 * i)
    grey(tmp_path / "val" / "c" / "1.png", 99)
    grey(tmp_path / "train" / ".hidden" / "1.png", 0)
    assert open_data(str(tmp_path), "train", labels=True).classes == ["a", "b", "c"]
    assert values(open_data(str(tmp_path), "val", labels=True)) == {99: 2} == values(open_data(str(tmp_path), "test", labels=True))
    assert len(open_data(str(tmp_path))) == 3
    grey(tmp_path / "val" / "d" / "1.png", 0)
    with pytest.raises(ValueError, match="class 'd'"): open_data(str(tmp_path), "val", labels=True)
    grey(tmp_path / "train" / "loose.png", 0)
    with pytest.raises(ValueError, match="outside of class folders .loose.png"): open_data(str(tmp_path), "train", labels=True)


def test_many_classes_are_fast(tmp_path, monkeypatch):
    "ImageNet-22K has 14 million pictures in 21,841 classes: no search through a list for each."
    import time, beit_nb.data as d
    root = tmp_path / "x"
    root.mkdir()
    names = [f"n{i:05d}" for i in range(5000)]
    monkeypatch.setattr(d, "list_images", lambda r: [root / n / f"{k}.jpg" for n in names for k in range(20)])
    t = time.process_time()
    assert len(Folder(root, labels=True, classes=names)) == 100_000
    assert time.process_time() - t < 5


def transform(picture, number, rng):
    return TwoViews(16, 8, (0.2, 1.0), 0.4, 0.5)(picture) + (number, torch.rand(()), rng.random())


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_pictures(tmp_path, workers, capfd):
    for i in range(8): grey(tmp_path / f"{i}.png", 10 * i)
    for i in (2, 3): (tmp_path / f"{i}.png").write_bytes(b"no picture")
    r = replace(PretrainRecipe(), batch_size=4, max_damaged=2, workers=workers)
    rows = [x for b in batches(Samples(Folder(tmp_path), transform), r)(0, 20) for x in b[2].tolist()]     # ten epochs, two damaged
    assert len(rows) == 80 and not {2, 3} & set(rows) and rows.count(4) == 30
    said = [l for l in capfd.readouterr().err.splitlines() if l.startswith("beit: passed over: cannot read")]
    assert len(said) <= 2 * max(1, workers) and {"2.png", "3.png"} == {n for n in ("2.png", "3.png") if any(n in l for l in said)}
    with pytest.raises(ValueError, match="max_damaged=1 unreadable"):
        list(batches(Samples(Folder(tmp_path), transform), replace(r, max_damaged=1))(0, 20))
    for i in range(8): (tmp_path / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="none of the 8 pictures"): Samples(Folder(tmp_path), transform)[0]


def test_batches_depend_on_seed_and_step_only():
    r = replace(PretrainRecipe(), batch_size=6, seed=3)
    samples = Samples(Photos(2), transform, r.seed)
    whole = list(batches(samples, r)(0, 7))                                 # 22 pictures: 3 steps an epoch
    for other in (list(batches(samples, replace(r, workers=2))(2, 7)), [b for k in range(2, 7) for b in batches(samples, r)(k, k + 1)]):
        assert all(torch.equal(x, y) for a, b in zip(whole[2:], other, strict=True) for x, y in zip(a, b, strict=True))
    halves = [list(batches(samples, r, rank, 2)(0, 7)) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.stack([h[step][2] for h in halves], 1).flatten(), batch[2])
    assert not torch.equal(whole[0][0], list(batches(Samples(Photos(2), transform, 4), replace(r, seed=4))(0, 1))[0][0])


def test_sources_travel_to_spawned_workers(tmp_path):
    grey(tmp_path / "1.png", 7)
    for pictures in (Digits("val"), Folder(tmp_path), Photos()):
        again = pickle.loads(pickle.dumps(Samples(pictures, transform)))
        assert torch.equal(again[0][0], Samples(pictures, transform)[0][0])


def test_views_of_odd_pictures():
    for size in ((1, 1), (1, 300), (300, 2), (5, 7)):
        for views in (TwoViews(16, 8), TwoViews(16, 8, (0.08, 1.0), 0.4, 0.5)):
            a, b = views(Image.new("RGB", size, (10, 20, 30)))
            assert a.shape == (3, 16, 16) and b.shape == (3, 8, 8) and a.dtype == b.dtype == torch.uint8


def test_order_refuses():
    with pytest.raises(ValueError, match="larger than the data set"): Order(3, 4, 0, 0, 1)
    with pytest.raises(ValueError, match="3 processes"): Order(30, 4, 0, 0, 1, world=3)
