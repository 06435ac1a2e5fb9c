"""beit_nb.engine.files away from its lesson: full disks, long lists, odd names, open files."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_processes import PATIENCE, said_on_a_full_disk, wait_until
from safetensors.torch import save_file

from beit_nb import BeitError, UnreadableImage
from beit_nb.engine.files import (
    FileList,
    FileReader,
    atomic_write,
    explain_write_errors,
    fingerprint,
    is_running,
    make_folder,
    read_file,
    read_json,
    remove_leftovers,
    safetensors_notes,
    write_json,
)


def write_on_a_full_disk(file: Path) -> None:
    "Three ways to meet its end."
    for write in (
        lambda f: f.write(bytes(300_000)),
        lambda f: torch.save(torch.zeros(300_000), f),
        lambda f: np.save(f, np.zeros(300_000)),
    ):
        try:
            with atomic_write(file) as f:
                write(f)
        except BeitError as e:
            print(e)


def write_until_killed(file: Path) -> None:
    for k in range(1_000_000):
        with atomic_write(file) as f:
            for _ in range(50):
                f.write(bytes([k % 256]) * 4000)


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "content", [b"", b'{"a": ', b"\xff\xfe\x00", b"[1, 2]", b"7", rb'{"\ud800": 1}']
)
def test_damaged_json_is_one_line(tmp_path, content):
    file = tmp_path / "page.json"
    file.write_bytes(content)

    with pytest.raises(BeitError, match=rf"^{file} is damaged \(.*\); delete it") as e:
        read_json(file)
    assert "\n" not in str(e.value)


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "file").touch()

    assert make_folder(tmp_path / "a" / "b").is_dir()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BeitError, match=f"--out {out} is a file, or lies in one"):
            make_folder(out)


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path):
    file = tmp_path / "page"
    file.write_text("old")

    said = said_on_a_full_disk(partial(write_on_a_full_disk, file)).splitlines()

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


def test_a_reader_of_many_files_keeps_few_open(tmp_path):
    files = []
    for k in range(9):
        files.append(tmp_path / str(k))
        files[-1].write_bytes(bytes(range(k, k + 100)))
    reader = FileReader(max_open=2)

    pieces = [reader.read(file, 10, 3) for file in files]

    assert pieces == [bytes([k + 10, k + 11, k + 12]) for k in range(9)]
    assert list(reader.open) == files[-2:]
    assert [reader.read(file, 10, 3) for file in reversed(files)] == pieces[::-1]
    assert pickle.loads(pickle.dumps(reader)).open == {}


def test_what_the_reader_cannot_read_is_an_unreadable_picture(tmp_path):
    (tmp_path / "short").write_bytes(b"12345")
    reader = FileReader()
    with pytest.raises(UnreadableImage, match="at byte 3 of .*short: the file is shorter"):
        reader.read(tmp_path / "short", 3, 3)
    with pytest.raises(UnreadableImage, match="at byte 0 of .*gone: No such file"):
        reader.read(tmp_path / "gone", 0, 1)
    reader.read_ahead(tmp_path / "gone", 0, 1)  # only a wish: it fails silently


def test_a_piece_is_read_ahead_once(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(bytes(10))
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: asked.append(args[1]), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)  # macOS has neither
    reader = FileReader()
    for start in [0, 1, 0, 1, *range(2, 1001), 0]:  # 0 has been forgotten at the end
        reader.read_ahead(tmp_path / "x", start, 1)

    assert asked == [0, 1, *range(2, 1001), 0]
    assert len(reader.requested) == 1000


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"null",
        (2).to_bytes(8, "little") + b"{}",
        (22).to_bytes(8, "little") + b'{"__metadata__": "no"}',
        (2**62).to_bytes(8, "little") + b"{",  # it claims more than there is
        (2**20).to_bytes(8, "little") + b"[" * 2**20,
        b"\xff" * 100,
    ],
)
def test_files_without_notes_have_none(tmp_path, content):
    (tmp_path / "x").write_bytes(content)

    assert safetensors_notes(tmp_path / "x") == {}


def test_notes_are_read_without_the_tensors(tmp_path):
    "Half of the file is enough for them."
    save_file({"w": torch.zeros(1000)}, tmp_path / "x", {"made by": "höchstselbst"})
    whole = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(whole[: len(whole) // 2])

    assert safetensors_notes(tmp_path / "x") == {"made by": "höchstselbst"}
