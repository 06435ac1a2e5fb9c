"The ids of a whole data set on disk: resumed, shared among processes, checked against the data."

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from beit_nb import BeitError
from beit_nb.data import open_data
from beit_nb.engine.augment import TwoViews
from beit_nb.engine.token_files import load_tokens, tokenize_files
from beit_nb.recipes import recipe_named
from beit_nb.targets import tokenize_dataset
from beit_nb.tokenizer import load_tokenizer, train_tokenizer

ENV = os.environ | {"OMP_NUM_THREADS": "1"}
TINY = dict(batch_size=8, precision="fp32", log_every=1, checkpoint_every=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    out = tmp_path_factory.mktemp("tok")
    train_tokenizer(
        recipe_named("tokenizer", "nano", out=str(out), steps=6, width=16, **TINY), quiet=True
    )
    return out


def write_tokens(data, tokenizer, out, **options):
    "As the command `beit tokenize` does."
    return tokenize_files(open_data(str(data)), load_tokenizer(tokenizer), out, **options)


@pytest.mark.slow
def test_tokens_on_disk_are_the_tokens(tokenizer, tmp_path):
    described = write_tokens("digits", tokenizer, tmp_path / "tokens", per_part=5000)
    ids, d = load_tokens(tmp_path / "tokens")
    table = tokenize_dataset(load_tokenizer(tokenizer), open_data("digits"), TwoViews(32))
    assert torch.equal(ids.long(), table) and d == described == json.loads(
        (tmp_path / "tokens" / "tokens.json").read_text()
    ) | dict(damaged=[])
    packed = sum(f.stat().st_size for f in (tmp_path / "tokens").glob("*.npz"))
    assert packed < ids.numel() * 2 / 1.3


@pytest.mark.slow
def test_tokenize_killed_goes_on(tokenizer, tmp_path):
    """SIGKILL at three moments.

    No part is ever broken under its name, sound ones are not made twice, and the ids end the same.
    """
    line = [
        sys.executable,
        "-m",
        "beit_nb",
        "tokenize",
        "digits",
        "--tokenizer",
        str(tokenizer),
        "--out",
        str(tmp_path / "t"),
        "--per-part",
        "600",
        "--batch-size",
        "50",
    ]
    seen = {}
    for n in (1, 6, 12):
        p = subprocess.Popen(line, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.time() + 60
        while (
            len(list((tmp_path / "t").glob("*.npz"))) < n and p.poll() is None and time.time() < end
        ):
            time.sleep(0.01)
        p.send_signal(signal.SIGKILL)
        p.wait()
        for f in (tmp_path / "t").glob("*.npz"):
            with np.load(f) as part:
                assert part["ids"].shape == (600, 8, 8)
            assert seen.setdefault(f.name, f.stat().st_mtime_ns) == f.stat().st_mtime_ns
    assert subprocess.run(line, env=ENV, capture_output=True).returncode == 0
    write_tokens("digits", tokenizer, tmp_path / "whole")
    assert torch.equal(load_tokens(tmp_path / "t")[0], load_tokens(tmp_path / "whole")[0])


def test_tokenize_folder(tokenizer, tmp_path, monkeypatch):
    """Any pictures, with a damaged one, with loader processes, as two processes that share the
    parts; the damaged is recorded.
    """
    rng = np.random.default_rng(0)
    for i in range(11):
        (folder := tmp_path / "pics" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (30 + i, 44, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
    (tmp_path / "pics" / "a" / "4.png").write_bytes(b"no picture")
    words = dict(per_part=4, img_size=64, token_size=32)
    for rank in ("0", "1"):
        with monkeypatch.context() as m:
            m.setenv("RANK", rank), m.setenv("WORLD_SIZE", "2")
            if rank == "1":
                with pytest.raises(BeitError, match="is missing or damaged"):
                    load_tokens(tmp_path / "t")
            write_tokens(
                str(tmp_path / "pics"), tokenizer, tmp_path / "t", workers=int(rank), **words
            )
    ids, d = load_tokens(tmp_path / "t")
    assert ids.shape == (11, 8, 8) and d["pictures"] == 11 and "Lanczos" in d["transform"]
    lost = np.concatenate([np.load(f)["damaged"] for f in sorted((tmp_path / "t").glob("*.npz"))])
    files = open_data(str(tmp_path / "pics")).files
    assert [files[i].name for i in lost] == ["4.png"]


def pictures_in(folder, n=12, classes="ab", seed=0):
    rng = np.random.default_rng(seed)
    for i in range(n):
        (folder / classes[i % len(classes)]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (34, 34 + i, 3), dtype=np.uint8)).save(
            folder / classes[i % len(classes)] / f"{i // len(classes)}.png"
        )
    return folder


def test_repaired_pictures_are_tokenized_again(tokenizer, tmp_path, capfd):
    """A part with a damaged picture is made again once it can be read, and only then.

    Its ids are then its own.
    """
    data = pictures_in(tmp_path / "in")
    broken = data / "b" / "1.png"
    whole = (
        write_tokens(pictures_in(tmp_path / "whole"), tokenizer, tmp_path / "w", per_part=4)
        and load_tokens(tmp_path / "w")[0]
    )
    good = broken.read_bytes()
    words = dict(tokenizer=tokenizer, out=tmp_path / "t", per_part=4)
    broken.write_bytes(b"")
    assert (
        write_tokens(data, **words)["damaged"] == [7] == load_tokens(tmp_path / "t")[1]["damaged"]
    )
    stamps = [f.stat().st_mtime_ns for f in sorted((tmp_path / "t").glob("*.npz"))]
    assert write_tokens(data, **words)["damaged"] == [7]
    assert [f.stat().st_mtime_ns for f in sorted((tmp_path / "t").glob("*.npz"))] == stamps
    # once a call
    assert [
        "b/1.png" in line
        for line in capfd.readouterr().err.splitlines()
        if "passed over: cannot read" in line
    ] == [True, True]
    broken.write_bytes(good)
    assert write_tokens(data, **words)["damaged"] == [] == load_tokens(tmp_path / "t")[1]["damaged"]
    assert [
        f.stat().st_mtime_ns == t for f, t in zip(sorted((tmp_path / "t").glob("*.npz")), stamps)
    ] == [True, False, True]
    assert torch.equal(load_tokens(tmp_path / "t")[0], whole)


@pytest.mark.parametrize("world", [1, 2])
def test_tokenize_stops_at_too_much_damage(tokenizer, tmp_path, monkeypatch, world):
    data = pictures_in(tmp_path / "in")
    for i in range(3):
        (data / "a" / f"{i}.png").write_bytes(b""), (data / "b" / f"{i}.png").write_bytes(b"")
    monkeypatch.setenv("WORLD_SIZE", str(world)), monkeypatch.setenv("RANK", "0")
    for share in (0.01, 0.4, 0):
        with pytest.raises(
            ValueError,
            match=f"^more than max_damaged={share:g} of the 12 pictures of .* are unreadable",
        ):
            write_tokens(data, tokenizer, tmp_path / f"t{share}", per_part=3, max_damaged=share)
    write_tokens(data, tokenizer, tmp_path / "t", per_part=3, max_damaged=0.5)


def test_the_cache_knows_its_pictures(tokenizer, tmp_path):
    """Equal file names in equal order, but a class renamed so that the pictures change places.

    Refused. The same pictures at another place, or named otherwise: not.
    """
    one = pictures_in(tmp_path / "one")
    renamed = pictures_in(tmp_path / "renamed")
    (renamed / "a").rename(renamed / "z")
    words = dict(tokenizer=tokenizer, out=tmp_path / "t", per_part=4)
    write_tokens(one, **words)
    assert [f.name for f in open_data(str(one)).files] == [
        f.name for f in open_data(str(renamed)).files
    ]
    with pytest.raises(BeitError, match="holds other tokens .names"):
        write_tokens(renamed, **words)
    write_tokens(one.rename(tmp_path / "moved"), **words)
    write_tokens(os.path.relpath(tmp_path / "moved"), **words)


def test_tokenize_odd_names(tokenizer, tmp_path):
    data = pictures_in(tmp_path / "in")
    (data / "a" / "0.png").rename(data / "a" / os.fsdecode(b"caf\xe9.png"))
    assert len(write_tokens(data, tokenizer, tmp_path / "t")["names"]) == 16


def test_tokenize_refuses(tokenizer, tmp_path):
    with pytest.raises(BeitError, match="there is no tokenizer at"):
        write_tokens("digits", tmp_path / "none", tmp_path / "t")
    with pytest.raises(BeitError, match="no data at"):
        write_tokens(str(tmp_path / "nowhere"), tokenizer, tmp_path / "t")
    with pytest.raises(BeitError, match="token_size 30 does not divide"):
        write_tokens("digits", tokenizer, tmp_path / "t", token_size=30)
    with pytest.raises(BeitError, match="there are no tokens at"):
        load_tokens(tmp_path / "t")
