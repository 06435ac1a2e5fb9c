"""beit_nb.engine.files away from its lesson: full disks, long lists, odd names, open files."""

import errno
import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_gray
from helpers_processes import PATIENCE, run_python, wait_until

from beit_nb import BeitError
from beit_nb.engine.files import (
    EXTENSIONS,
    FileList,
    LeftOut,
    atomic_write,
    class_folders,
    explain_write_errors,
    fingerprint,
    image_names,
    is_running,
    read_file,
    read_json,
    remove_leftovers,
    walk_files,
    write_json,
)

# A disk that is full after 100 kB, and three ways to meet its end.
FULL_DISK = """
import resource, signal, sys, numpy, torch
from beit_nb import BeitError
from beit_nb.engine.files import atomic_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
for write in (
    lambda f: f.write(bytes(300_000)),
    lambda f: torch.save(torch.zeros(300_000), f),
    lambda f: numpy.save(f, numpy.zeros(300_000)),
):
    try:
        with atomic_write(sys.argv[1]) as f:
            write(f)
    except BeitError as e:
        print(e)
"""


def write_until_killed(file: Path) -> None:
    for k in range(1_000_000):
        with atomic_write(file) as f:
            for _ in range(50):
                f.write(bytes([k % 256]) * 4000)


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path):
    file = tmp_path / "page"
    rng = np.random.default_rng(0)
    parts = 0
    for _ in range(20):
        writer = multiprocessing.get_context("fork").Process(target=write_until_killed, args=[file])
        writer.start()
        wait_until(file.exists, "the first page", writer.is_alive, pause=0.001)
        time.sleep(rng.uniform(0, 0.02))
        writer.kill()
        writer.join(PATIENCE)

        page = file.read_bytes()

        assert len(page) == 200_000
        assert len(set(page)) == 1
        parts += len(list(tmp_path.glob("page.*.part")))
    assert parts  # some were killed in the middle
    with atomic_write(file) as f:
        f.write(b"new")
    assert [f.name for f in tmp_path.iterdir()] == ["page"]  # what they left is gone


def write_and_read(file: Path, letter: str, start) -> None:
    "Write a file of one letter many times; the exit status is that of the process."
    start.wait()
    for _ in range(50):
        write_json(file, {"words": 2000 * letter})
        assert len(set(read_json(file)["words"])) == 1


def test_several_processes_may_write_one_file(tmp_path):
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(4)
    page = tmp_path / "page.json"
    writers = [fork.Process(target=write_and_read, args=(page, w, start)) for w in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)

    assert [writer.exitcode for writer in writers] == [0, 0, 0, 0]
    assert [f.name for f in tmp_path.iterdir()] == ["page.json"]


def test_only_what_dead_writers_left_is_taken_away(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(PATIENCE)
    assert is_running(os.getpid()) and not is_running(dead.pid)
    stay = [
        f"page.{os.getpid()}-ab.part",  # at work
        f"pages.{dead.pid}-ab.part",  # of another file
        f"page.{'9' * 30}-ab.part",  # no process has such a number
        "page.part",
        "page",
    ]
    for name in [*stay, f"page.{dead.pid}-ab.part"]:
        (tmp_path / name).touch()

    remove_leftovers(tmp_path / "page")

    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(stay)


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe\x00", b"[1, 2]", b"7"])
def test_damaged_json_is_one_line(tmp_path, content):
    file = tmp_path / "page.json"
    file.write_bytes(content)

    with pytest.raises(BeitError, match=rf"^{file} is damaged \(.*\); delete it") as e:
        read_json(file)
    assert "\n" not in str(e.value)


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path):
    file = tmp_path / "page"
    file.write_text("old")

    said = run_python(FULL_DISK, file).stdout.splitlines()

    assert len(said) == 3
    for line in said:
        assert line.startswith(f"cannot write {file}: ")
        assert "make room, or choose another --out" in line
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["page"]


def test_a_place_that_is_no_folder_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "page", tmp_path / "nowhere" / "page"):
        with pytest.raises(BeitError, match="cannot write .*page: No"), atomic_write(place):
            pass
    with pytest.raises(BeitError, match="cannot write .*log"):
        with explain_write_errors("log"):
            open(tmp_path / "nowhere" / "log", "a")


@pytest.mark.parametrize("fault", [ZeroDivisionError, RuntimeError, KeyboardInterrupt])
def test_faults_that_are_not_the_disks_pass_through(tmp_path, fault):
    "An error of the network that is being saved must not read as a full disk."
    with pytest.raises(fault), atomic_write(tmp_path / "page") as f:
        f.write(b"half")
        raise fault("mine")
    assert not list(tmp_path.iterdir())


def test_nested_with_the_explanation_of_appends(tmp_path):
    with explain_write_errors(tmp_path / "a"), atomic_write(tmp_path / "a") as f:
        f.write(b"new")
    with pytest.raises(BeitError, match="^cannot write .*/no/a: No such file") as e:
        with explain_write_errors(tmp_path / "no" / "a"), atomic_write(tmp_path / "no" / "a"):
            pass
    assert (tmp_path / "a").read_bytes() == b"new"
    assert str(e.value).count("cannot write") == 1


def test_json(tmp_path):
    data = {"name": "x", "sizes": [1, 2], "none": None}

    write_json(tmp_path / "x.json", data)

    assert json.loads((tmp_path / "x.json").read_text()) == data
    assert (tmp_path / "x.json").read_text().splitlines()[1] == ' "name": "x",'
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"no": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == data


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


def test_class_folders_are_sorted_and_seen(tmp_path):
    for name in ("b", "a", ".git"):
        (tmp_path / name).mkdir()
    (tmp_path / "c.png").touch()

    assert class_folders(tmp_path) == ["a", "b"]


def test_a_list_of_millions_is_small():
    "Below 60 bytes a picture (a Path has 506), and no object that a worker could copy."
    names = [f"n{c:08d}/n{c:08d}_{k}.JPEG" for c in range(20) for k in range(1000)]
    tracemalloc.start()
    files = FileList("root", iter(names))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()

    assert held / len(names) < 60
    assert list(files) == [Path("root", name) for name in names]
    assert pickle.loads(pickle.dumps(files))[-1] == files[19_999]
    for i in (20_000, -20_001):
        with pytest.raises(IndexError):
            files[i]
    assert len(FileList("root", [])) == 0


def test_names_that_are_not_utf8():
    odd = [os.fsdecode(b"caf\xe9.png"), "two\nlines.png", "日本.png"]
    files = FileList("a", odd)

    assert [file.name for file in files] == odd
    assert len({fingerprint(name) for name in odd}) == 3


def test_fingerprints_of_everything():
    x = torch.arange(6.0)
    plain = ["ab", b"ab", bytearray(b"abc"), 7, None]
    things = [*plain, np.arange(3), x, x.half(), x.bfloat16(), x[::2]]

    prints = {fingerprint(thing) for thing in things}

    assert len(prints) == len(things) - 1  # the text "ab" and the bytes b"ab" are the same
    assert fingerprint(x.reshape(2, 3).T) == fingerprint(x.reshape(2, 3).T.contiguous())
    assert fingerprint(x.requires_grad_()) == fingerprint(x.detach().numpy())
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert all(len(p) == 16 for p in prints)


def left_out_of(folder, pictures: list[str]) -> dict[str, list]:
    "What a walk leaves out of a folder in which it must find just these pictures."
    left_out = LeftOut()
    assert list(image_names(folder, left_out)) == pictures
    return dict(left_out)


@pytest.fixture
def deadline():
    "Whoever waits for a pipe is woken after some seconds."

    def late(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


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


def test_what_is_no_regular_file_is_not_read(tmp_path, deadline):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(OSError):
            read_file(place)
    with pytest.raises(OSError):
        read_json(tmp_path / "pipe")
    with open(tmp_path / "holes", "wb") as f:
        f.truncate(2**40)  # a terabyte that takes no room
    with pytest.raises(OSError, match="no regular file of at most 1 GiB"):
        read_file(tmp_path / "holes")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(BeitError, match="deep.json is damaged"):
        read_json(tmp_path / "deep.json")
