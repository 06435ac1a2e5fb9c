"""beit_nb.engine.walks away from its lesson: links, pipes, deep and closed folders, odd members."""

import errno
import os
import socket
import tarfile
from contextlib import chdir

import pytest
from helpers import save_gray

from beit_nb import BeitError
from beit_nb.engine.notes import MAX_FILE_BYTES
from beit_nb.engine.walks import (
    EXTENSIONS,
    WHY_LEFT_OUT,
    LeftOut,
    class_folders,
    class_number,
    image_names,
    sample_key,
    tar_files,
    walk_files,
    why_left_out,
)


def test_order_is_that_of_paths(tmp_path):
    "A folder a-b and a folder a: in the order of their parts, as ever."
    names = ["a-b/1.png", "a/2.png", "a/c/3.png", "a/c.png", "B/4.png", "5.png"]
    for name in names:
        save_gray(tmp_path / name, 0)

    found = [tmp_path / name for name in image_names(tmp_path)]
    assert found == sorted(tmp_path / name for name in names)


def test_every_ending_is_a_picture_in_any_case(tmp_path):
    for ending in EXTENSIONS:
        (tmp_path / f"a{ending}").touch()
        (tmp_path / f"B{ending.upper()}").touch()
    for name in ("a.txt", ".png", "png", "a.png.part", "a.jpgx"):
        (tmp_path / name).touch()

    assert len(list(image_names(tmp_path))) == 2 * len(EXTENSIONS)


def test_links_are_followed_but_not_in_circles(tmp_path):
    for folder in "ab":
        for k in range(3):
            save_gray(tmp_path / "store" / folder / f"{k}.png", 10 * k)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").symlink_to(tmp_path / "store" / "a")
    (tmp_path / "store" / "a" / "up").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "b" / "dead.png").symlink_to("/nowhere.png")

    assert len(list(image_names(tmp_path / "store"))) == 6
    assert len(list(image_names(tmp_path / "store" / "b"))) == 3
    assert [name for name in walk_files(tmp_path / "set") if "up" not in name] == [
        "a/0.png",
        "a/1.png",
        "a/2.png",
    ]


def test_folders_without_pictures_are_refused(tmp_path):
    (tmp_path / "note.txt").touch()
    with pytest.raises(BeitError, match=r"no pictures in .* \(looked for .bmp, .*at any depth"):
        list(image_names(tmp_path))
    with pytest.raises(BeitError, match="does not exist; give a folder of pictures"):
        list(image_names(tmp_path / "note.txt"))


@pytest.mark.parametrize("maps", ["masks", "annotations"])
def test_label_maps_are_no_pictures(tmp_path, maps):
    save_gray(tmp_path / "images" / "train" / "1.png", 7)
    save_gray(tmp_path / maps / "train" / "1.png", 1)

    with pytest.raises(
        BeitError, match=rf"label maps \({maps}/\) .* give .*/images for the pictures"
    ):
        list(image_names(tmp_path))

    assert list(image_names(tmp_path / "images")) == ["train/1.png"]
    (tmp_path / "images").rename(tmp_path / "cats")
    assert len(list(image_names(tmp_path))) == 2  # two folders of pictures, whatever their names


def test_class_folders_are_sorted_and_seen(tmp_path):
    for name in ("b", "a", ".git"):
        (tmp_path / name).mkdir()
    (tmp_path / "c.png").touch()

    assert class_folders(tmp_path) == ["a", "b"]


def left_out_of(folder, pictures: list[str]) -> dict[str, list]:
    "What a walk leaves out of a folder in which it must find just these pictures."
    left_out = LeftOut()
    assert list(image_names(folder, left_out)) == pictures
    return dict(left_out)


@pytest.mark.slow
@pytest.mark.parametrize("long", ["d", "d" * 200])
def test_twelve_hundred_nested_folders(tmp_path, long):
    "Some are too deep for a path that the system takes; these are counted."
    save_gray(tmp_path / "1.png", 1)
    here = os.open(tmp_path, os.O_RDONLY)
    chain = [here]
    for _ in range(1200):
        os.mkdir(long, dir_fd=here)
        here = os.open(long, os.O_RDONLY, dir_fd=here)
        chain.append(here)
    os.close(os.open("z.png", os.O_CREAT, dir_fd=here))
    try:
        left_out = LeftOut()
        found = list(image_names(tmp_path, left_out))
        if long == "d":
            assert [name.count("/") for name in found] == [0, 1200] and not left_out
        else:
            assert found == ["1.png"]
            assert left_out["folders that cannot be opened"][0] == 1
    finally:  # rmtree gives up at such depths
        os.unlink("z.png", dir_fd=here)
        for above in reversed(chain[:-1]):
            os.close(chain.pop())
            os.rmdir(long, dir_fd=above)
        os.close(chain.pop())


@pytest.mark.parametrize("target", ["/", "..", ".", "me", "../..", "/proc/self/root"])
def test_endless_links_are_counted(tmp_path, target):
    save_gray(tmp_path / "set" / "a" / "1.png", 1)
    (tmp_path / "set" / "a" / "me").symlink_to(target)

    left_out = left_out_of(tmp_path / "set", ["a/1.png"])

    assert left_out == {"links that are not followed": [1, "a/me"]}


def test_a_linked_folder_is_followed_and_no_further(tmp_path):
    "Links to links: each pair doubles the ways, so that thirty of them would take a lifetime."
    for k in range(40):
        (tmp_path / "store" / str(k)).mkdir(parents=True)
        for way in "xy":
            (tmp_path / "store" / str(k) / way).symlink_to(tmp_path / "store" / str(k + 1))
    save_gray(tmp_path / "store" / "0" / "1.png", 1)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").symlink_to(tmp_path / "store" / "0")

    assert left_out_of(tmp_path / "set", ["a/1.png"]) == {"links that are not followed": [2, "a/x"]}
    assert len(list(walk_files(tmp_path / "store"))) == 1


def test_two_folders_that_link_to_each_other(tmp_path):
    for here, there in ("ab", "ba"):
        save_gray(tmp_path / here / "1.png", 1)
        (tmp_path / here / "other").symlink_to(tmp_path / there)

    left_out = left_out_of(tmp_path, ["a/1.png", "a/other/1.png", "b/1.png", "b/other/1.png"])

    assert left_out == {"links that are not followed": [2, "a/other/other"]}


def test_special_files_with_the_names_of_pictures(tmp_path, deadline):
    save_gray(tmp_path / "1.png", 1)
    os.link(tmp_path / "1.png", tmp_path / "2.png")  # a second name is a picture like any other
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as s, chdir(tmp_path):
        s.bind("socket.png")
    (tmp_path / "zeros.jpg").symlink_to("/dev/zero")
    (tmp_path / "dead.jpg").symlink_to("/nowhere")
    (tmp_path / "folder.jpg").mkdir()

    left_out = left_out_of(tmp_path, ["1.png", "2.png"])

    assert left_out == {
        "links that are not followed": [2, "dead.jpg"],
        "pipes, sockets and devices": [2, "pipe.jpg"],
    }


@pytest.mark.parametrize("why", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_folder_that_cannot_be_opened_is_counted(tmp_path, monkeypatch, why):
    for name in "abc":
        save_gray(tmp_path / name / "1.png", 1)
    real = os.scandir

    def scandir(path):
        if path.rstrip("/").endswith(("/b", "nothing")):
            raise OSError(why, os.strerror(why), path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)

    left_out = left_out_of(tmp_path, ["a/1.png", "c/1.png"])

    assert left_out == {"folders that cannot be opened": [1, "b/"]}
    (tmp_path / "nothing").mkdir()
    with pytest.raises(BeitError, match="no pictures in .*left out: folders that cannot be opened"):
        list(image_names(tmp_path / "nothing"))


def test_other_endings_are_counted(tmp_path):
    names = ["a.heic", "b.HEIC", "c/d.txt", "e.jpg.part", "f"]
    for name in ["1.png", *names]:
        save_gray(tmp_path / f"{name}.png", 1).rename(tmp_path / name)

    left_out = left_out_of(tmp_path, ["1.png"])

    assert left_out == {"files with other endings": [5, "a.heic"]}
    assert str(LeftOut(left_out)) == "files with other endings: 5 (first: a.heic)"


def test_runs_and_environments_are_no_data(tmp_path):
    save_gray(tmp_path / "a" / "1.png", 1)
    for name in (".lock", "config.json", "watch/step-1.png"):
        save_gray(tmp_path / "a" / "run" / f"{name}.png", 1).rename(tmp_path / "a" / "run" / name)
    for folder in ("venv", ".venv"):
        save_gray(tmp_path / folder / "lib" / "icon.png", 1)
        (tmp_path / folder / "pyvenv.cfg").touch()

    left_out = left_out_of(tmp_path, ["a/1.png"])

    assert left_out == {"folders of runs and of Python": [2, "a/run/"], "hidden": [1, ".venv"]}
    assert class_folders(tmp_path) == ["a"]
    assert class_folders(tmp_path / "a") == []
    with pytest.raises(BeitError, match="a/run is the folder of a run"):
        list(image_names(tmp_path / "a" / "run"))


def test_a_set_with_a_config_json_is_no_run(tmp_path):
    save_gray(tmp_path / "set" / "1.png", 1)
    (tmp_path / "set" / "config.json").write_text("{}")

    assert list(image_names(tmp_path)) == ["set/1.png"]
    assert list(image_names(tmp_path / "set")) == ["1.png"]


@pytest.mark.parametrize(
    "name, key, kind",
    [
        ("7.jpg", "7", "jpg"),
        ("a.b/7.JPG", "a.b/7", "jpg"),  # dots of folders do not count
        ("a/cat.1.jpg", "a/cat", "1.jpg"),
        ("a/.7.jpg", "a/", "7.jpg"),
        ("a/7", "a/7", ""),
    ],
)
def test_a_member_belongs_to_a_sample(name, key, kind):
    assert sample_key(name) == (key, kind)


@pytest.mark.parametrize(
    "name, size, kind, why",
    [
        ("7.cls", 0, tarfile.REGTYPE, None),
        ("7.webp", 1, tarfile.REGTYPE, None),
        ("7.webp", MAX_FILE_BYTES, tarfile.REGTYPE, None),
        ("7.webp", MAX_FILE_BYTES + 1, tarfile.REGTYPE, "more than 1 GiB"),
        ("7.webp", 0, tarfile.REGTYPE, "empty"),
        ("7.webp", 1, tarfile.LNKTYPE, "links"),
        ("7.cls", 1, tarfile.FIFOTYPE, "devices"),
        (".7.webp", 1, tarfile.REGTYPE, "hidden"),
        ("7.1.webp", 1, tarfile.REGTYPE, "a dot before"),
        ("7.webp.txt", 1, tarfile.REGTYPE, "other endings"),
        ("7", 1, tarfile.REGTYPE, "other endings"),
    ],
)
def test_why_a_member_is_left_out(name, size, kind, why):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind

    reason = why_left_out(member)

    assert (reason is None) if why is None else why in WHY_LEFT_OUT[reason]


def test_class_numbers_have_six_digits():
    texts = (b"7", b" 12\n", b"999999", b"1000000", b"-1", b"1.0", b"cat", b"")
    assert [class_number(text) for text in texts] == [7, 12, 999_999, -1, -1, -1, -1, -1]


def test_shards_of_a_folder_are_its_files_in_order(tmp_path):
    for name in ("b.tar", "a.tar", ".c.tar", "a.tar.index.npy", "d.TAR", "e.tar.gz"):
        (tmp_path / name).touch()
    (tmp_path / "f.tar").mkdir()
    (tmp_path / "f.tar" / "g.tar").touch()

    assert [tar.name for tar in tar_files(tmp_path)] == ["a.tar", "b.tar"]
    assert tar_files(str(tmp_path)) == tar_files(tmp_path)
    assert tar_files(tmp_path / "none") == []
