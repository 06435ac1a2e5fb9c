"The ids of a whole data set on disk: resumed, shared among processes, checked against the data."

import io
import json
import multiprocessing
import os
import sys
import zipfile

import numpy as np
import pytest
import torch
from helpers_processes import PATIENCE, torchrun_environment, wait_until
from PIL import Image

from beit_nb import BeitError
from beit_nb.cli import main
from beit_nb.data import open_data
from beit_nb.engine import token_files
from beit_nb.engine.augment import TwoViews
from beit_nb.engine.files import read_json, write_json
from beit_nb.engine.sources import Digits
from beit_nb.engine.token_files import load_tokens, read_description, read_part, tokenize_files
from beit_nb.recipes import recipe_named
from beit_nb.targets import tokenize_dataset
from beit_nb.tokenizer import load_tokenizer, train_tokenizer

pytestmark = pytest.mark.usefixtures("pages_unpainted")

FORK = multiprocessing.get_context("fork")  # a process to kill, without importing torch again
TINY = dict(steps=6, width=16, batch_size=8, precision="fp32", log_every=1, checkpoint_every=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    "The folder of a small tokenizer."
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(recipe_named("tokenizer", "nano", out=str(out), **TINY), quiet=True)
    return out


def write_tokens(data, tokenizer, out, **options):
    "As the command `beit tokenize` does."
    return tokenize_files(open_data(str(data)), load_tokenizer(tokenizer), out, **options)


def noisy_pictures(folder, n=12, classes="ab"):
    "n pictures of different sizes, one after the other in folders a, b, a, b, ..."
    rng = np.random.default_rng(0)
    for i in range(n):
        home = folder / classes[i % len(classes)]
        home.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (34, 34 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / f"{i // len(classes)}.png")
    return folder


def stamps(out):
    return [f.stat().st_mtime_ns for f in sorted(out.glob("part-*.npz"))]


@pytest.mark.slow
def test_tokens_on_disk_are_the_tokens(tokenizer, tmp_path):
    digits = Digits("test")
    network = load_tokenizer(tokenizer)

    described = tokenize_files(digits, network, tmp_path, per_part=300)
    ids, found = load_tokens(tmp_path)

    assert torch.equal(ids.long(), tokenize_dataset(network, digits, TwoViews(32)))
    on_disk = json.loads((tmp_path / "tokens.json").read_text())
    assert found == described == on_disk | {"damaged": []}
    packed = sum(f.stat().st_size for f in tmp_path.glob("*.npz"))
    assert packed < ids.numel() * 2 / 1.3


@pytest.mark.slow
def test_tokenize_killed_goes_on(tokenizer, tmp_path):
    """SIGKILL at three moments.

    No part is ever broken under its name, sound ones are not made twice, and the ids end the same.
    """
    out = tmp_path / "tokens"
    words = ("digits", tokenizer, out)
    options = dict(per_part=600, batch_size=50)
    made = {}
    for n in (1, 6, 12):
        run = FORK.Process(target=write_tokens, args=words, kwargs=options)
        run.start()
        wait_until(lambda n=n: len(list(out.glob("*.npz"))) >= n, f"part {n}", run.is_alive)
        run.kill()
        run.join(PATIENCE)
        assert run.exitcode == -9, "it must have been killed"
        for f in out.glob("*.npz"):
            with np.load(f) as part:
                assert part["ids"].shape == (600, 8, 8)
            assert made.setdefault(f.name, f.stat().st_mtime_ns) == f.stat().st_mtime_ns

    write_tokens(*words, **options)

    write_tokens("digits", tokenizer, tmp_path / "whole")
    assert torch.equal(load_tokens(out)[0], load_tokens(tmp_path / "whole")[0])


def tokenize_in_one_of_four(words, env, said):
    "The body of a child: `beit tokenize WORDS`; what it says goes to a file."
    os.environ.update(env)
    told = os.open(said, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(told, 1)
    os.dup2(told, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.exit(main(["tokenize", *map(str, words)]))


def four_processes(said, *words):
    "The exit statuses of four processes that tokenize, begun at one moment as torchrun would."
    family = [
        FORK.Process(target=tokenize_in_one_of_four, args=(words, env, said))
        for env in torchrun_environment(4)
    ]
    for process in family:
        process.start()
    for process in family:
        process.join(PATIENCE)
    return [process.exitcode for process in family]


@pytest.mark.slow
def test_four_processes_tokenize_together(tokenizer, tmp_path):
    "Three times from nothing: all begin at one moment, with one tokens.json to write."
    data = noisy_pictures(tmp_path / "in", n=40)
    said = tmp_path / "said.txt"
    options = ["--tokenizer", tokenizer, "--per-part", 3]
    write_tokens(data, tokenizer, tmp_path / "alone", per_part=3)
    for k in range(3):
        out = tmp_path / f"out{k}"

        statuses = four_processes(said, data, *options, "--out", out)

        assert statuses == [0] * 4, said.read_text()
        assert load_tokens(out)[1] == load_tokens(tmp_path / "alone")[1]
        assert torch.equal(load_tokens(out)[0], load_tokens(tmp_path / "alone")[0])
        assert len(list(out.iterdir())) == 1 + 14, "tokens.json and the parts, nothing else"


@pytest.mark.slow
def test_four_processes_refuse_with_one_voice(tokenizer, tmp_path):
    data = noisy_pictures(tmp_path / "in")
    said = tmp_path / "said.txt"
    write_tokens(data, tokenizer, tmp_path / "out", per_part=3)
    options = ["--tokenizer", tokenizer, "--per-part", 4, "--out", tmp_path / "out"]

    assert four_processes(said, data, *options) == [2] * 4

    assert said.read_text().count("holds other tokens (per_part 3 there, 4 now)") == 1


def as_process(monkeypatch, number, count):
    "Let `tokenize_files` believe that it is one of several processes."
    monkeypatch.setattr(token_files, "rank", lambda: number)
    monkeypatch.setattr(token_files, "world_size", lambda: count)


def test_processes_share_the_parts(tokenizer, tmp_path, monkeypatch):
    "Any pictures, with a damaged one, with loader processes."
    data = noisy_pictures(tmp_path / "in", n=11)
    (data / "a" / "4.png").write_bytes(b"no picture")
    options = dict(per_part=4, img_size=64, token_size=32)

    as_process(monkeypatch, 0, 2)
    write_tokens(data, tokenizer, tmp_path / "out", **options)
    with pytest.raises(BeitError, match="is missing or damaged"):
        load_tokens(tmp_path / "out")
    as_process(monkeypatch, 1, 2)
    write_tokens(data, tokenizer, tmp_path / "out", workers=1, **options)

    ids, found = load_tokens(tmp_path / "out")
    assert ids.shape == (11, 8, 8) and found["pictures"] == 11
    assert "Lanczos" in found["transform"]
    [damaged] = found["damaged"]
    assert open_data(str(data)).files[damaged].name == "4.png"


def test_repaired_pictures_are_tokenized_again(tokenizer, tmp_path, capfd):
    """A part with a damaged picture is made again once it can be read, and only then.

    Its ids are then its own.
    """
    data = noisy_pictures(tmp_path / "in")
    out = tmp_path / "out"
    write_tokens(data, tokenizer, tmp_path / "whole", per_part=4)
    broken = data / "b" / "1.png"
    good = broken.read_bytes()
    broken.write_bytes(b"")

    first = write_tokens(data, tokenizer, out, per_part=4)
    before = stamps(out)
    second = write_tokens(data, tokenizer, out, per_part=4)

    assert first["damaged"] == second["damaged"] == load_tokens(out)[1]["damaged"] == [7]
    assert stamps(out) == before
    lines = [x for x in capfd.readouterr().err.splitlines() if "passed over: cannot read" in x]
    assert len(lines) == 2 and all("b/1.png" in x for x in lines), "once a call"

    broken.write_bytes(good)
    third = write_tokens(data, tokenizer, out, per_part=4)

    assert third["damaged"] == load_tokens(out)[1]["damaged"] == []
    assert [a == b for a, b in zip(stamps(out), before)] == [True, False, True]
    assert torch.equal(load_tokens(out)[0], load_tokens(tmp_path / "whole")[0])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("share", [0.01, 0.4, 0])
def test_tokenize_stops_at_too_much_damage(tokenizer, tmp_path, monkeypatch, world, share):
    data = noisy_pictures(tmp_path / "in")
    for name in ("a/0", "a/1", "a/2", "b/0", "b/1", "b/2"):
        (data / f"{name}.png").write_bytes(b"")
    as_process(monkeypatch, 0, world)

    line = f"^more than max_damaged={share:g} of the 12 pictures of .* are unreadable"
    with pytest.raises(BeitError, match=line):
        write_tokens(data, tokenizer, tmp_path / "out", per_part=3, max_damaged=share)
    write_tokens(data, tokenizer, tmp_path / "out", per_part=3, max_damaged=0.5)


def test_tokens_know_their_pictures(tokenizer, tmp_path):
    """Equal file names in equal order, but a class renamed so that the pictures change places:
    refused. The same pictures at another place, or named otherwise: not."""
    data = noisy_pictures(tmp_path / "one")
    renamed = noisy_pictures(tmp_path / "renamed")
    (renamed / "a").rename(renamed / "z")
    names = [[f.name for f in open_data(str(folder)).files] for folder in (data, renamed)]
    assert names[0] == names[1]
    write_tokens(data, tokenizer, tmp_path / "out", per_part=4)

    with pytest.raises(BeitError, match="holds other tokens .names"):
        write_tokens(renamed, tokenizer, tmp_path / "out", per_part=4)
    moved = data.rename(tmp_path / "moved")
    write_tokens(moved, tokenizer, tmp_path / "out", per_part=4)
    write_tokens(os.path.relpath(moved), tokenizer, tmp_path / "out", per_part=4)


def test_odd_file_names(tokenizer, tmp_path):
    data = noisy_pictures(tmp_path / "in")
    (data / "a" / "0.png").rename(data / "a" / os.fsdecode(b"caf\xe9.png"))
    assert len(write_tokens(data, tokenizer, tmp_path / "out")["names"]) == 16


def test_tokenize_refuses(tokenizer, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(BeitError, match="there is no tokenizer at"):
        write_tokens("digits", tmp_path / "none", out)
    with pytest.raises(BeitError, match="no data at"):
        write_tokens(tmp_path / "nowhere", tokenizer, out)
    with pytest.raises(BeitError, match="token_size 30 does not divide"):
        write_tokens("digits", tokenizer, out, token_size=30)
    with pytest.raises(BeitError, match="there are no tokens at"):
        load_tokens(out)


DAMAGES = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:50]),
    "empty": lambda file: file.write_bytes(b""),
    "a list": lambda file: write_json(file, [1, 2]),
    "no grid": lambda file: write_json(file, {**read_json(file), "grid": [8]}),
    "no parts": lambda file: write_json(file, {**read_json(file), "per_part": 0}),
    "words": lambda file: write_json(file, {**read_json(file), "pictures": "many"}),
    "no names": lambda file: write_json(file, {"pictures": 1}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_description_is_one_line(tokenizer, tmp_path, damage):
    "Refused by its name before a part is read; where it is gone, the same command writes it again."
    data = noisy_pictures(tmp_path / "in")
    out = tmp_path / "out"
    described = write_tokens(data, tokenizer, out)
    damage(out / "tokens.json")

    for read in (read_description, load_tokens):
        with pytest.raises(BeitError, match=f"^{out}/tokens.json is damaged .*; delete it") as e:
            read(out)
        assert "\n" not in str(e.value)
    with pytest.raises(BeitError, match="is damaged|holds other tokens"):
        write_tokens(data, tokenizer, out, per_part=5)
    (out / "tokens.json").unlink()
    assert write_tokens(data, tokenizer, out) == described


def test_fields_of_a_later_version_are_other_tokens(tokenizer, tmp_path):
    data = noisy_pictures(tmp_path / "in")
    write_tokens(data, tokenizer, tmp_path / "out")
    file = tmp_path / "out" / "tokens.json"
    write_json(file, read_json(file) | {"colors": "gray"})

    with pytest.raises(BeitError, match="holds other tokens .colors 'gray' there, None now"):
        write_tokens(data, tokenizer, tmp_path / "out")


SHAPE = (4, 2, 2)
SOUND = {"ids": np.arange(16, dtype=np.uint16).reshape(SHAPE), "damaged": np.array([1, 3])}


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": SOUND["ids"] + np.uint16(1)},  # the last id is none of the 16
        {"ids": SOUND["ids"].astype(np.int64) - 9},
        {"ids": SOUND["ids"].astype(np.float32)},
        {"ids": SOUND["ids"].astype(object)},
        {"ids": SOUND["ids"].T.copy(order="F")},
        {"ids": SOUND["ids"][:3]},
        {"ids": np.zeros((10**6, 2, 2), np.uint16)},  # small on the disk, large in memory
        {"damaged": np.array([7])},  # a picture of another part
        {"damaged": np.array([-1])},
        {"damaged": np.zeros(10**6, np.int64)},
        {"damaged": np.array([[1]])},
        {"damaged": np.array(["a"])},
    ],
)
def test_parts_that_say_something_else(tmp_path, changes):
    np.savez_compressed(tmp_path / "sound.npz", **SOUND)
    np.savez_compressed(tmp_path / "part.npz", **SOUND | changes)

    ids, damaged = read_part(tmp_path / "sound.npz", SHAPE, 16)
    assert ids.tolist() == SOUND["ids"].tolist() and damaged.tolist() == [1, 3]
    assert read_part(tmp_path / "part.npz", SHAPE, 16) is None


def test_a_part_claims_no_more_than_its_bytes_can_hold(tmp_path):
    "10^12 rows, by its own head and by tokens.json: no room is made for them."
    head = io.BytesIO()
    said = {"descr": "<u2", "fortran_order": False, "shape": (10**12, 2, 2)}
    np.lib.format.write_array_header_1_0(head, said)
    with zipfile.ZipFile(tmp_path / "part-00000.npz", "w") as archive:
        archive.writestr("ids.npy", head.getvalue())
    described = dict(pictures=2**31 - 1, vocab_size=16, grid=[2, 2], img_size=8, token_size=8)
    described |= dict(per_part=2**31 - 1, names="x")
    (tmp_path / "tokens.json").write_text(json.dumps(described))

    assert read_part(tmp_path / "part-00000.npz", (10**12, 2, 2), 16) is None
    with pytest.raises(BeitError, match="2,147,483,647 pictures, more than its parts can hold"):
        load_tokens(tmp_path)
    for changes in (
        {"pictures": 10**12},
        {"per_part": -1},
        {"grid": [2, 2.0]},
        {"vocab_size": "9"},
    ):
        (tmp_path / "tokens.json").write_text(json.dumps(described | changes))
        with pytest.raises(BeitError, match="tokens.json is damaged"):
            load_tokens(tmp_path)
