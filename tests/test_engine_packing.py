"""beit_nb.engine.packing away from its lesson: stopped, resumed, and what stays out is counted."""

import pytest
from helpers import beit, refused, save_gray
from helpers_shards import counts

import beit_nb.engine.packing as packing
import beit_nb.engine.walks as walks
from beit_nb import BeitError
from beit_nb.engine.packing import shard_folder
from beit_nb.engine.shards import ImageShards


def test_sharding_goes_on_where_it_was_stopped(tree, packed, tmp_path, monkeypatch):
    out = tmp_path / "again"
    real = packing.decode_image
    seen = []

    def dies(data, describe):
        seen.append(describe())
        if len(seen) > 5:
            raise KeyboardInterrupt
        return real(data, describe)

    monkeypatch.setattr(packing, "decode_image", dies)
    with pytest.raises(KeyboardInterrupt):
        shard_folder(tree / "train", out, per_shard=2)
    left = {tar.name: tar.stat().st_mtime_ns for tar in out.glob("*.tar")}
    with pytest.raises(BeitError, match="holds 2 of 5 shards; let `beit shard` finish"):
        ImageShards(out)
    monkeypatch.setattr(packing, "decode_image", real)

    made = shard_folder(tree / "train", out, per_shard=2)

    assert len(left) == 2
    assert not list(out.glob("*.part"))
    assert made == counts(pictures=9, shards=5, damaged=1, others=1)
    assert shard_folder(tree / "train", out, per_shard=2) == made
    assert all((out / name).stat().st_mtime_ns == when for name, when in left.items())
    for tar in packed.glob("*.tar"):
        assert (out / tar.name).read_bytes() == tar.read_bytes()


def test_another_folder_or_size_is_something_else(tree, packed):
    with pytest.raises(BeitError, match="something else"):
        shard_folder(tree / "train", packed, per_shard=3)
    with pytest.raises(BeitError, match="per_shard 0 is not a number of pictures"):
        shard_folder(tree / "train", packed, per_shard=0)
    save_gray(tree / "train" / "a" / "new.png", 3)
    with pytest.raises(BeitError, match="something else"):
        shard_folder(tree / "train", packed, per_shard=2)
    (packed / "shards.json").unlink()
    with pytest.raises(BeitError, match="something else"):
        shard_folder(tree / "train", packed, per_shard=2)


@pytest.mark.parametrize("where", ["", "a/"], ids=["flat", "classes"])
def test_a_folder_is_walked_once(tmp_path, monkeypatch, where):
    "A network file system with fourteen million pictures takes an hour to list."
    source = tmp_path / "in"
    for k in range(3):
        save_gray(source / f"{where}{k}.png", k)
    (source / "note.txt").touch()
    walked = []
    real = walks.walk_files

    def walk(folder, left_out=None):
        walked.append(folder)
        return real(folder, left_out)

    monkeypatch.setattr(walks, "walk_files", walk)

    assert shard_folder(source, tmp_path / "out") == counts(pictures=3, shards=1, others=1)
    assert walked == [source]


def test_links_are_packed_but_not_in_circles(tmp_path):
    for folder in "ab":
        for k in range(3):
            save_gray(tmp_path / "store" / folder / f"{k}.png", 10 * k)
    for split in ("train", "val"):
        (tmp_path / "set" / split).mkdir(parents=True)
        for folder in "ab":
            (tmp_path / "set" / split / folder).symlink_to(tmp_path / "store" / folder)
    (tmp_path / "store" / "a" / "up").symlink_to(tmp_path / "store" / "a")

    made = shard_folder(tmp_path / "set", tmp_path / "out")

    assert made == counts(pictures=12, shards=2)


@pytest.mark.parametrize("name", ["valid", "validation", "VAL", "unlabelled"])
def test_a_part_of_another_name_is_said(tree, tmp_path, capfd, name):
    save_gray(tree / name / "a" / "1.png", 7)

    shard_folder(tree, tmp_path / "out")

    said = capfd.readouterr().err
    assert f"left out of {tree}: beside train/, val/ and test/: 1 (first: {name})" in said


def test_all_that_is_left_out_is_counted_once(tree, tmp_path, capfd):
    for name in ("a/photo.heic", "a/other.HEIC", "b/.hidden/1.png"):
        save_gray(tree / "train" / (name + ".png"), 7).rename(tree / "train" / name)

    made = shard_folder(tree, tmp_path / "out")

    said = capfd.readouterr().err
    assert made["others"] == 3  # and the note
    assert said.count("files with other endings: 3 (first: a/note.txt)") == 1
    assert said.count("hidden: 1 (first: b/.hidden)") == 1


@pytest.mark.parametrize("place", ["", "shards", "train/shards", "train/a", "val/../x"])
def test_shards_inside_their_source_are_refused(tree, place):
    before = sorted(tree.rglob("*"))

    line = refused("shard", tree, "--out", tree / place, says="whose pictures are to be packed")

    assert str(tree) in line
    assert sorted(tree.rglob("*")) == before


def test_a_link_into_the_source_is_inside(tree, tmp_path):
    (tmp_path / "door").symlink_to(tree)
    refused("shard", tree, "--out", tmp_path / "door" / "x", says="to be packed")
    refused("shard", tmp_path / "door", "--out", tree, says="to be packed")
    beit("shard", tree, "--out", tmp_path / "in-shards")  # a name that begins alike is outside


def test_runs_are_not_packed(tree, tmp_path, capfd):
    run = tree / "train" / "a" / "run"
    save_gray(run / "watch" / "1.png", 7)
    (run / "config.json").write_text("{}")
    (run / ".lock").touch()

    made = shard_folder(tree / "train", tmp_path / "out")

    assert made["pictures"] == 9
    assert "folders of runs and of Python: 1 (first: a/run/)" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["digits", "nowhere"])
def test_only_folders_are_packed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    refused(
        "shard", name, "--out", "x", says=f"there is no folder {name}; `beit shard` packs folders"
    )
