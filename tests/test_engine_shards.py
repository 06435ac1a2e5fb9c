"""beit_nb.engine.shards away from its lesson: any tar, both ways, stopped, damaged, read-only."""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from helpers import save_gray
from helpers_processes import run
from helpers_shards import contents, counts
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
    at = one.places
    assert one.fingerprint() == fingerprint(at.ends, at.start, at.size, at.checksums)


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
    places = pictures.places
    for i in range(40):
        begin, length = places.chunk_of(i)
        assert begin <= places.start[i]
        assert places.start[i] + places.size[i] <= begin + length
        assert begin in places.start[places.chunk_starts]


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
    starts = [int(plain.places.start[i]) for i in plain.chunk_starts]
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


def a_tar(file, members: dict[str, bytes], **more):
    "A tar with these members, in this order."
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **more) as t:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
    return file


@pytest.fixture
def png(tmp_path):
    return save_gray(tmp_path / "one.png", 50).read_bytes()


def test_members_that_no_sample_has_are_counted(tmp_path, png):
    "Four of six pictures used to be found, without a word."
    members = {f"{k}.png": png for k in range(4)} | {"a.b.png": png, "x/a.c.JPG": png}
    members |= {"._0.png": b"mac", "0.json": b"{}", "0.jpg": png, "e.png": b"", "0.cls": b"7"}
    tar = a_tar(tmp_path / "s" / "0.tar", members)
    with tarfile.open(tar, "a") as t:
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"special-{kind.decode()}.png")
            info.type, info.linkname = kind, "0.png"
            t.addfile(info)

    for _ in range(2):  # found by walking, and then in the index
        pictures = ImageShards(tmp_path / "s")
        assert len(pictures) == 4
        assert pictures.left_out == {
            "pictures with a dot before their ending": [2, "0.tar/a.b.png"],
            "hidden members": [1, "0.tar/._0.png"],
            "members with other endings": [1, "0.tar/0.json"],
            "samples with two pictures, of which one is taken": [1, "0.tar/0.jpg"],
            "pictures that are empty, or of more than 1 GiB": [1, "0.tar/e.png"],
            "links, devices and sparse files": [3, "0.tar/special-1.png"],
        }


@pytest.mark.parametrize("ending", ["cls", "CLS", "Cls"])
def test_classes_in_any_case(tmp_path, png, ending):
    a_tar(tmp_path / "0.tar", {"a.PNG": png, f"a.{ending}": b" 3\n", "b.Jpg": png, "b.cls": b"0"})

    assert ImageShards(tmp_path, labels=True).labels.tolist() == [3, 0]


@pytest.mark.parametrize("digits", [7, 9, 10, 18, 19, 20, 31, 5000])
@pytest.mark.parametrize("sign", ["", "-"])
def test_class_numbers_beyond_all_classes(tmp_path, png, digits, sign):
    a_tar(tmp_path / "0.tar", {"a.png": png, "a.cls": (sign + "9" * digits).encode()})

    assert len(ImageShards(tmp_path)) == 1
    with pytest.raises(BeitError, match="class -1 .-1: no number given"):
        ImageShards(tmp_path, labels=True)
    with pytest.raises(BeitError, match="class -1 .-1: no number given"):
        ImageShards(tmp_path, labels=True, classes=["a"])


@pytest.mark.parametrize("names", ['["a", "a"]', "[1, 2]", '[["a"], "b"]', "[null]", '{"a": 0}'])
def test_names_that_cannot_be_names(tmp_path, png, names):
    a_tar(tmp_path / "0.tar", {"a.png": png, "a.cls": b"0"})
    (tmp_path / "classes.json").write_text(names)

    assert len(ImageShards(tmp_path)) == 1
    with pytest.raises(BeitError, match=f"^{tmp_path}/classes.json is damaged"):
        ImageShards(tmp_path, labels=True)


@pytest.mark.parametrize("plan", ['{"shards": "x"}', '{"shards": null}', '{"shards": 1e12}'])
def test_a_plan_that_claims_nonsense(tmp_path, png, plan):
    a_tar(tmp_path / "0.tar", {"a.png": png})
    (tmp_path / "shards.json").write_text(plan)

    with pytest.raises(BeitError, match="holds 1 of .* shards; let `beit shard` finish"):
        ImageShards(tmp_path)


def nonsense(table: np.ndarray, size: int):
    "Rows as nobody would write them: (row, column, value) in a list with one row of left out."
    yield from ((0, 3, k) for k in (-1, len(table), 10**12))
    yield from ((1, 0, k) for k in (-1, 99))
    yield from ((1, 1, k) for k in (0, -5, 10**15))
    yield from ((1, 2, k) for k in (0, size, 2**62))
    yield from ((2, 0, k) for k in (-512, 0, 513, size, 2**62, table[3, 0]))
    yield from ((2, 1, k) for k in (-1, 0, size, 2**62))
    yield from ((2, 2, k) for k in (-2, 10**6, 2**62))
    yield from ((2, 3, k) for k in (-1, 2**32))


def test_an_index_that_claims_nonsense_is_made_again(tmp_path, png):
    tar = a_tar(tmp_path / "0.tar", {"a.png": png, "b.png": png, "b.txt": b""})
    want = ImageShards(tmp_path).fingerprint()
    index = tmp_path / "0.tar.index.npy"
    good = np.load(index)
    cases = list(nonsense(good, tar.stat().st_size))
    assert len(cases) > 20

    for row, column, value in cases:
        table = good.copy()
        table[row, column] = value
        np.save(index, table)

        assert ImageShards(tmp_path).fingerprint() == want, (row, column, value)
        assert np.array_equal(np.load(index), good), (row, column, value)


@pytest.mark.parametrize("shape", ["(1000000000000, 4)", "(4, 1000000000000)", "(-1, 4)", "(((("])
@pytest.mark.parametrize("kind", ["<i8", "|O"])
def test_an_index_whose_header_lies(tmp_path, png, shape, kind):
    "Neither 32 terabytes nor an object are made of it."
    a_tar(tmp_path / "0.tar", {"a.png": png})
    want = ImageShards(tmp_path).fingerprint()
    index = tmp_path / "0.tar.index.npy"
    data = index.read_bytes()
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    index.write_bytes(data[:10] + text.ljust(117).encode() + b"\n" + data[128:])

    assert ImageShards(tmp_path).fingerprint() == want
    assert index.read_bytes() == data


def test_an_index_that_is_huge_or_no_file(tmp_path, png):
    a_tar(tmp_path / "0.tar", {"a.png": png})
    want = ImageShards(tmp_path).fingerprint()
    index = tmp_path / "0.tar.index.npy"
    with open(index, "ab") as f:
        f.truncate(2**40)  # holes: a terabyte that takes no room
    assert ImageShards(tmp_path).fingerprint() == want

    index.unlink()
    os.mkfifo(index)
    assert ImageShards(tmp_path).fingerprint() == want
    index.unlink()
    index.mkdir()
    assert ImageShards(tmp_path).fingerprint() == want


def test_names_of_tars_that_are_none(tmp_path, png):
    "A folder, a pipe, and what macOS puts beside files."
    a_tar(tmp_path / "0.tar", {"a.png": png})
    (tmp_path / "1.tar").mkdir()
    os.mkfifo(tmp_path / "2.tar")
    (tmp_path / "._0.tar").write_bytes(b"mac")

    assert len(ImageShards(tmp_path)) == 1


def header(name: str, kind: bytes, size: bytes, name_of_size=None) -> bytes:
    "A header of a tar, with a size as it stands in the twelve bytes of the field."
    info = tarfile.TarInfo(name)
    info.type = kind
    data = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    data[124:136] = size
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


NEGATIVE = b"\xff" * 10 + b"\xfc\x00"  # -1024, in GNU's way of writing


@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g", b"S"])
@pytest.mark.parametrize("size", [NEGATIVE, b"\x80" + (2**62).to_bytes(11), b"77777777777\0"])
def test_sizes_that_no_member_has(tmp_path, png, kind, size):
    "A negative one has sent tarfile round and round (CVE-2025-8194), a huge one asked for memory."
    tar = a_tar(tmp_path / "0.tar", {"a.png": png})
    tar.write_bytes(header("b.png", kind, size) + tar.read_bytes())

    with pytest.raises(BeitError, match=f"^cannot read the shard {tar}: ") as e:
        shard_index(tar)
    assert "\n" not in str(e.value)


def test_headers_inside_of_headers(tmp_path):
    "tarfile calls itself for each long name: three thousand of them are too many for it."
    long = header("././@LongLink", b"L", b"00000000002\0") + b"x\0".ljust(512, b"\0")
    tar = tmp_path / "0.tar"
    tar.write_bytes(long * 3000 + bytes(1024))

    with pytest.raises(BeitError, match=f"^cannot read the shard {tar}: "):
        shard_index(tar)
