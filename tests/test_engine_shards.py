"""beit_nb.engine.shards away from its lesson: any tar, both ways, stopped, damaged, read-only."""

import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from helpers import save_gray
from helpers_processes import run
from helpers_shards import contents, counts, lay_out_tree
from PIL import Image

import beit_nb.engine.files as files
from beit_nb import BeitError, UnreadableImage
from beit_nb.data import class_names
from beit_nb.engine.files import fingerprint
from beit_nb.engine.packing import shard_folder, shard_name
from beit_nb.engine.shards import ImageShards, shard_index
from beit_nb.engine.sources import ImageFolder


def grays(pictures) -> list[int]:
    "The gray of every one-gray picture, in order."
    return [round(float(pictures.pixels(i).float().mean())) for i in range(len(pictures))]


@pytest.fixture
def tree(tmp_path):
    return lay_out_tree(tmp_path / "in")


@pytest.fixture
def packed(tree, tmp_path):
    "The training pictures of the tree in five tars."
    shard_folder(tree / "train", tmp_path / "out", per_shard=2)
    return tmp_path / "out"


def test_a_folder_into_tars(tree, tmp_path, capfd):
    made = shard_folder(tree, tmp_path / "out", per_shard=4)

    said = capfd.readouterr().err
    train = ImageShards(tmp_path / "out" / "train", labels=True)
    val = ImageShards(tmp_path / "out" / "val", labels=True, classes=train.classes)
    assert made == counts(pictures=12, shards=4, damaged=1, others=1)
    assert "beit: left out: cannot read the picture" in said
    assert "broken.jpg" in said
    assert train.classes == val.classes == ["a", "b", "c"]
    assert val.labels.tolist() == [1, 1, 1]
    assert {train.bytes(i): int(y) for i, y in enumerate(train.labels)} == contents(tree / "train")
    assert sorted(grays(train)) == [20 * i for i in range(9)]
    assert train[0].mode == "RGB"
    assert not list((tmp_path / "out").rglob("*.part"))


def test_webdataset_reads_ours(tree, tmp_path):
    import webdataset

    shard_folder(tree, tmp_path / "out", per_shard=4)
    tars = [str(tar) for tar in sorted((tmp_path / "out" / "train").glob("*.tar"))]

    samples = list(webdataset.WebDataset(tars, shardshuffle=False))

    read = {}
    for sample in samples:
        [picture] = [v for k, v in sample.items() if k in ("png", "jpeg", "webp")]
        read[picture] = int(sample["cls"])
    assert read == contents(tree / "train")
    assert len({sample["__key__"] for sample in samples}) == 9


def test_we_read_webdatasets(tree, tmp_path):
    "Several parts a sample, of which only one is the picture; two endings are no picture's."
    import webdataset

    want = contents(tree / "train")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with webdataset.ShardWriter(str(foreign / "s-%03d.tar"), maxcount=2, verbose=0) as w:
        for i, (picture, label) in enumerate(want.items()):
            more = {"json": {"a": 1}, "seg.png": b"no", "txt": "words"}
            w.write({"__key__": f"some/folder/{i:03d}", "jpg": picture, "cls": label} | more)

    theirs = ImageShards(foreign, labels=True)

    assert {theirs.bytes(i): int(y) for i, y in enumerate(theirs.labels)} == want
    assert theirs.classes == ["0", "1", "2"]
    assert theirs.path(0) == f"{foreign}/s-000.tar/some/folder/000.jpg"
    assert ImageShards(foreign, labels=True, classes=["x", "y", "z"]).classes == ["x", "y", "z"]


@pytest.mark.parametrize("kind", ["ustar", "gnu", "pax", "command"])
def test_any_tar(tmp_path, kind):
    "Names longer than a header holds, links and folders, and the tar of the system."
    root = tmp_path / "t"
    name = "x" * 60 + "/" + "y" * (60 if kind == "ustar" else 120)
    for i in range(3):
        save_gray(root / f"{name}{i}.PNG", 50 * i)
    (root / "link.png").symlink_to("x.png")
    tar = tmp_path / "s" / "0.tar"
    tar.parent.mkdir()
    if kind == "command":
        run("tar", "cf", tar, "-C", root, ".")
    else:
        with tarfile.open(tar, "w", format=getattr(tarfile, f"{kind.upper()}_FORMAT")) as t:
            t.add(root, ".")

    pictures = ImageShards(tar.parent)

    assert sorted(grays(pictures)) == [0, 50, 100]
    assert "y" * 20 in pictures.path(0)


def test_a_tar_that_is_cut_short(tree, tmp_path):
    out = tmp_path / "out"
    shard_folder(tree / "train", out, per_shard=100)
    tar = out / "000000.tar"
    whole = tar.read_bytes()
    pictures = ImageShards(out)
    first = pictures.bytes(0)

    tar.write_bytes(whole[: len(whole) // 2])

    with pytest.raises(UnreadableImage, match="^cannot read the picture at byte .*000000.tar"):
        [pictures.bytes(i) for i in range(9)]
    assert all(str(tar) in pictures.path(i) for i in range(9))  # no second error on the way
    assert "at byte" in pictures.path(8)
    with pytest.raises(BeitError, match="000000.tar: .*beit shard"):
        ImageShards(out)
    tar.write_bytes(whole)  # another time stamp: the list is found again
    assert ImageShards(out).bytes(0) == first


def test_every_cut_of_a_tar_is_noticed(packed):
    tar = packed / "000000.tar"
    whole = tar.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for length in (*range(0, end, 512), end // 512 * 512 + 512):
        tar.write_bytes(whole[:length])
        with pytest.raises(BeitError, match="cannot read the shard .*uncompressed .tar files"):
            shard_index(tar)


def test_a_compressed_tar_and_an_empty_one(tree, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as t:
        t.add(tree / "train" / "a" / "note.txt", "note.txt")
    with pytest.raises(BeitError, match="no pictures in the shards"):
        ImageShards(tmp_path)
    with tarfile.open(tmp_path / "0.tar", "w:gz") as t:
        t.add(tree / "train" / "a" / "note.txt", "note.txt")
    with pytest.raises(BeitError, match="uncompressed"):
        ImageShards(tmp_path)


def test_a_damaged_index_is_made_again(packed):
    index = packed / "000000.tar.index.npy"
    good = np.load(index)
    cut = index.read_bytes()[:-9]

    for rubbish in (b"", b"\x93NUMPY", cut):
        index.write_bytes(rubbish)
        assert len(ImageShards(packed)) == 9
        assert np.array_equal(np.load(index)[1:], good[1:])


def test_an_index_of_an_older_version_is_made_again(packed):
    want = ImageShards(packed).fingerprint()
    index = packed / "000000.tar.index.npy"
    good = np.load(index)
    np.save(index, good[:, :3])

    assert ImageShards(packed).fingerprint() == want
    assert np.array_equal(np.load(index), good)


def test_a_folder_that_nobody_may_write_to(packed, monkeypatch):
    for index in packed.glob("*.npy"):
        index.unlink()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.os, "replace", refuse)

    assert len(ImageShards(packed)) == 9
    assert not list(packed.glob("*.npy*"))


def test_classes_that_do_not_fit(packed):
    assert class_names(packed) == ["a", "b", "c"]
    with pytest.raises(BeitError, match="a class 'a' that the training pictures lack"):
        ImageShards(packed, labels=True, classes=["b", "c"])
    (packed / "classes.json").write_text(json.dumps(["a", "b"]))
    with pytest.raises(BeitError, match="class 2 .*of 2 classes"):
        ImageShards(packed, labels=True)


@pytest.mark.parametrize(
    "said", [b"n01440764", b"", None, b"9" * 30], ids=["word", "empty", "none", "huge"]
)
def test_classes_that_are_words(tree, tmp_path, said):
    "Fine for pre-training, one clear line for those who want labels."
    from webdataset.writer import TarWriter

    picture = (tree / "train" / "a" / "pic.0.png").read_bytes()
    (tmp_path / "s").mkdir()
    with TarWriter(str(tmp_path / "s" / "0.tar")) as t:
        for i in range(3):
            t.write({"__key__": str(i), "png": picture} | ({} if said is None else {"cls": said}))

    assert len(ImageShards(tmp_path / "s")) == 3
    with pytest.raises(BeitError, match="class -1 .-1: no number given"):
        ImageShards(tmp_path / "s", labels=True)


def test_a_size_that_no_file_has_is_one_line(tmp_path):
    "A header in GNU's way of writing large numbers, and a picture of 2^70 bytes."
    save_gray(tmp_path / "s" / "a.png", 7)
    tar = tmp_path / "s" / "0.tar"
    with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT) as t:
        t.add(tmp_path / "s" / "a.png", "a.png")
    data = bytearray(tar.read_bytes())
    data[124:136] = b"\x80" + (2**70).to_bytes(11)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    tar.write_bytes(data)

    with pytest.raises(BeitError, match=f"^cannot read the shard {tar}: "):
        shard_index(tar)


@pytest.mark.parametrize("name", ["shards.json", "classes.json"])
def test_damaged_notes_beside_shards_are_one_line(packed, name):
    (packed / name).write_text('{"shards": ')

    with pytest.raises(BeitError, match=f"^{packed / name} is damaged"):
        ImageShards(packed, labels=True)


def test_names_in_other_alphabets(tmp_path):
    "Latin-1 bytes in a name are no UTF-8; packed, listed and told all the same."
    odd = os.fsdecode(b"caf\xe9.png")
    for name in (odd, "two\nlines.png", "日本.png"):
        save_gray(tmp_path / "in" / "a" / name, 7)

    assert shard_folder(tmp_path / "in", tmp_path / "out") == counts(pictures=3, shards=1)
    with tarfile.open(tmp_path / "out" / "x.tar", "w", format=tarfile.GNU_FORMAT) as t:
        t.add(tmp_path / "in" / "a" / odd, odd)
    (tmp_path / "out" / "shards.json").unlink()
    assert odd in ImageShards(tmp_path / "out").path(3)
    assert shard_name(7, tmp_path / "日本.x.jpg") == "00000007__x"


def noise(file, seed):
    "A picture of noise, whose size in bytes depends on the seed."
    file.parent.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(seed).integers(0, 255, (20 + seed, 24, 3), dtype=np.uint8)
    Image.fromarray(x).save(file)


def test_the_fingerprint_is_of_the_pictures(tmp_path):
    for source, seeds in (("one", (0, 1, 2)), ("two", (3, 4, 5))):
        for k, seed in enumerate(seeds):
            noise(tmp_path / source / f"{k}.png", seed)
        shard_folder(tmp_path / source, tmp_path / f"{source}-tars")
    one = ImageShards(tmp_path / "one-tars")

    (tmp_path / "one-tars").rename(tmp_path / "moved")
    (tmp_path / "moved" / "000000.tar").rename(tmp_path / "moved" / "train-0.tar")

    assert ImageShards(tmp_path / "moved").fingerprint() == one.fingerprint()
    assert ImageShards(tmp_path / "two-tars").fingerprint() != one.fingerprint()
    assert one.fingerprint() == fingerprint(one.ends, one.start, one.size, one.checksums)


def test_equal_sizes_under_other_names_are_other_pictures(tmp_path):
    save_gray(tmp_path / "0.png", 7)
    prints = []
    for name in "xy":
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "0.tar", "w") as t:
            t.add(tmp_path / "0.png", f"{name}.png")
        prints.append(ImageShards(tmp_path / name).fingerprint())

    assert prints[0] != prints[1]


def test_chunks_end_with_their_tar(tmp_path):
    for i in range(40):
        save_gray(tmp_path / "in" / f"{i:02d}.png", i)
    shard_folder(tmp_path / "in", tmp_path / "out", per_shard=15)

    pictures = ImageShards(tmp_path / "out", chunk=4)

    assert pictures.chunk_starts.tolist() == [0, 4, 8, 12, 15, 19, 23, 27, 30, 34, 38]
    for i in range(40):
        begin, length = pictures.chunk_of(i)
        assert begin <= pictures.start[i]
        assert pictures.start[i] + pictures.size[i] <= begin + length
        assert begin in pictures.start[pictures.chunk_starts]


def test_reading_ahead_changes_no_byte_and_asks_once_a_chunk(tmp_path):
    for i in range(40):
        save_gray(tmp_path / "in" / f"{i:02d}.png", i)
    shard_folder(tmp_path / "in", tmp_path / "out", per_shard=20)
    plain = ImageShards(tmp_path / "out", chunk=4)
    ahead = ImageShards(tmp_path / "out", chunk=4)
    ahead.read_ahead = True

    order = np.random.default_rng(0).permutation(40)

    assert [ahead.bytes(i) for i in order] == [plain.bytes(i) for i in order]
    assert not plain.reader.requested
    starts = [int(plain.start[i]) for i in plain.chunk_starts]
    assert sorted(start for _, start in ahead.reader.requested) == sorted(starts)


def test_shards_travel_to_spawned_workers(packed):
    pictures = ImageShards(packed, labels=True)
    pictures.pixels(0)

    again = pickle.loads(pickle.dumps(pictures))

    assert torch.equal(again.pixels(0), pictures.pixels(0))
    assert again.path(0) == pictures.path(0)
    assert again.fingerprint() == pictures.fingerprint()


def test_the_folder_and_its_shards_give_the_same_pixels(tree, packed):
    (tree / "train" / "b" / "broken.jpg").unlink()
    folder = ImageFolder(tree / "train", labels=True)
    shards = ImageShards(packed, labels=True)
    number = {folder.bytes(i): i for i in range(9)}

    for k in range(9):
        i = number[shards.bytes(k)]
        assert torch.equal(shards.pixels(k), folder.pixels(i))
        assert shards.labels[k] == folder.labels[i]
        assert shards.path(k).endswith(folder.path(i)[-4:].lower())
