"""Views and batches: the official pipeline's pictures, faults, and samples that repeat for any number of processes and workers."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from beit_nb.engine.shards import ImageShards, shard_folder
from beit_nb.engine.sources import ImageFolder, Photos
from beit_nb.engine.augment import TwoViews
from beit_nb.engine.loading import TrainLoader, TransformedDataset, leave_signals, shuffled, batch_indices
from beit_nb.recipes import PretrainRecipe

RECIPE = replace(PretrainRecipe(), batch_size=4)


def grey(file, value: int, size=(24, 20)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(file)


def transform(picture, number, rng):
    return TwoViews(16, 8, (0.2, 1.0), 0.4, 0.5)(picture) + (number, torch.rand(()), rng.random())


def later(picture, number, rng):
    return TwoViews(16, 8, (0.2, 1.0), 0.4, 0.5, "device")(picture) + (number,)


def test_device_jitter_for_any_number_of_workers():
    r = replace(RECIPE, seed=1)
    samples = TransformedDataset(Photos(2), later, 1)
    alone = list(TrainLoader(samples, r)(0, 3))
    helped = list(TrainLoader(samples, replace(r, workers=2))(0, 3))
    for a, b in zip(alone, helped, strict=True):
        assert len(a) == 4 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def through(load: TrainLoader, last: int = 20):
    "As `fit` goes through the batches, asking after each; the rows for the log."
    for batch in load(0, last):
        if load.found:
            yield batch, load.agree()
        else:
            yield batch, {}


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_pictures(tmp_path, workers, capfd):
    for i in range(8):
        grey(tmp_path / f"{i}.png", 10 * i)
    for i in (2, 3):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    r = replace(RECIPE, max_damaged=0.25, workers=workers)
    for pixels in (False, True):
        # ten epochs, two damaged
        got, rows = zip(*through(TrainLoader(TransformedDataset(ImageFolder(tmp_path), transform, pixels=pixels), r)))
        numbers = [x for b in got for x in b[2].tolist()]
        assert len(numbers) == 80 and not {2, 3} & set(numbers) and numbers.count(4) == 30
        said = [
            l
            for l in capfd.readouterr().err.splitlines()
            if l.startswith("beit: passed over: cannot read")
        ]
        # once, whoever met it
        assert len(said) == 2 and {n for n in ("2.png", "3.png") if any(n in l for l in said)} == {
            "2.png",
            "3.png",
        }
        rows = [row for row in rows if row]
        assert rows[-1]["damaged"] == 2 and sorted(
            p for row in rows for p in row["passed_over"]
        ) == [str(tmp_path / "2.png"), str(tmp_path / "3.png")]
    # one is always forgiven, unless the share is 0
    for share, n in ((0.24, 2), (0.01, 2), (0, 1)):
        with pytest.raises(
            ValueError,
            match=rf"^more than max_damaged={share:g} of the 8 pictures of .* are unreadable: [{n}2] so far, such as .*/[23].png;",
        ):
            list(
                through(
                    TrainLoader(TransformedDataset(ImageFolder(tmp_path), transform), replace(r, max_damaged=share))
                )
            )
    (tmp_path / "3.png").unlink(), grey(tmp_path / "3.png", 1)
    assert (
        len(
            list(
                through(TrainLoader(TransformedDataset(ImageFolder(tmp_path), transform), replace(r, max_damaged=0.01)))
            )
        )
        == 20
    )
    for bad in (-0.1, 1.5, 100):
        with pytest.raises(ValueError, match="max_damaged .* is no share"):
            TrainLoader(TransformedDataset(ImageFolder(tmp_path), transform), replace(r, max_damaged=bad))
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(
        ValueError, match="none of the 8 pictures of .*: cannot read the picture .*0.png"
    ):
        TransformedDataset(ImageFolder(tmp_path), transform)[0]


def test_damaged_in_a_shard(tmp_path, capfd):
    import tarfile

    for i in range(12):
        grey(tmp_path / "in" / f"{i}.png", 10 * i)
    (tmp_path / "in" / "7.png").write_bytes(b"no picture")
    (tmp_path / "s").mkdir()
    with tarfile.open(tmp_path / "s" / "0.tar", "w") as t:
        for i in range(12):
            t.add(tmp_path / "in" / f"{i}.png", f"{i}.png")
    got = [
        n
        for b, _ in through(
            TrainLoader(
                TransformedDataset(ImageShards(tmp_path / "s"), transform, pixels=True), replace(RECIPE, workers=2)
            ),
            6,
        )
        for n in b[2].tolist()
    ]
    assert (
        sorted(got) == sorted([*range(7), 8, 8, *range(9, 12)] * 2)
        and "s/0.tar/7.png" in capfd.readouterr().err
    )
    with pytest.raises(ValueError, match="such as .*s/0.tar/7.png; repair"):
        list(
            through(
                TrainLoader(TransformedDataset(ImageShards(tmp_path / "s"), transform), replace(RECIPE, max_damaged=0)),
                6,
            )
        )


@pytest.mark.parametrize("pixels", [False, True])
def test_a_file_deleted_under_way(tmp_path, pixels):
    for i in range(4):
        grey(tmp_path / f"{i}.png", i)
    samples = TransformedDataset(ImageFolder(tmp_path), lambda picture, number, rng: (number,), pixels=pixels)
    (tmp_path / "2.png").unlink()
    assert [samples[i] for i in range(4)] == [(0, -1), (1, -1), (3, 2), (3, -1)]


def test_pictures_put_aside(tmp_path, capfd):
    """They can be read, but must not be used (their tokens are another's).

    Passed over, named and counted as if they were broken.
    """
    for i in range(8):
        grey(tmp_path / f"{i}.png", i)
    pictures = ImageFolder(tmp_path)
    pictures.excluded |= {5: "cannot read the picture 5.png when its tokens were made"}
    got, rows = zip(*through(TrainLoader(TransformedDataset(pictures, transform), replace(RECIPE, workers=2)), 4))
    assert sorted(n for b in got for n in b[2].tolist()) == sorted([0, 1, 2, 3, 4, 6, 6, 7] * 2)
    assert [row["passed_over"] for row in rows if row] == [
        [str(tmp_path / "5.png")]
    ] and "beit: passed over: cannot read the picture 5.png when" in capfd.readouterr().err


@pytest.fixture
def bad_eighth(tmp_path):
    "Forty pictures, five of them broken."
    for i in range(40):
        grey(tmp_path / "in" / f"{i:02d}.png", i, (32, 32))
    for i in range(3, 40, 8):
        (tmp_path / "in" / f"{i:02d}.png").write_bytes(b"no picture")
    return tmp_path / "in"


def test_the_book_outlives_a_stop(bad_eighth):
    """Each piece of the run meets less than the limit.

    Together it is more. Then a repaired picture counts no more.
    """
    r = replace(RECIPE, max_damaged=0.1)
    book = {}
    met = []
    with pytest.raises(ValueError, match="are unreadable: 5 so far"):
        # stopped after every step
        for step in range(10):
            load = TrainLoader(TransformedDataset(ImageFolder(bad_eighth), transform), r)
            book = load.resume(book)
            for _ in load(step, step + 1):
                load.found and load.agree()
            # plain data: whole numbers and letters
            book = json.loads(json.dumps(book))
            met.append(len(book["damaged"]))
    assert met == sorted(met) and met[-1] <= 4 and book["damaged"] == sorted(book["damaged"])
    grey(bad_eighth / f"{book['damaged'][0]:02d}.png", 1)
    assert (
        TrainLoader(TransformedDataset(ImageFolder(bad_eighth), transform), r).resume(book)["damaged"]
        == book["damaged"][1:]
    )


def test_changed_data_is_refused(tmp_path):
    for i in range(8):
        grey(tmp_path / "in" / f"{i}.png", i)
    load = lambda folder: TrainLoader(TransformedDataset(ImageFolder(folder), transform), RECIPE)
    # an old checkpoint knows nothing of pictures
    book = load(tmp_path / "in").resume(dict(next_batch=0))
    assert set(book) == {"pictures", "names", "damaged", "next_batch"} and book["pictures"] == 8
    (tmp_path / "in").rename(tmp_path / "moved")
    # another place is none of our business
    load(tmp_path / "moved").resume(book)
    (tmp_path / "moved" / "3.png").rename(tmp_path / "moved" / "9.png")
    with pytest.raises(
        ValueError, match="moved has changed since this run began .8 pictures then, 8 now"
    ):
        load(tmp_path / "moved").resume(book)
    grey(tmp_path / "moved" / "3.png", 1)
    with pytest.raises(ValueError, match="8 pictures then, 9 now"):
        load(tmp_path / "moved").resume(book)


WORKER = """
import sys, torch.distributed as dist
from dataclasses import replace
from beit_nb.engine.sources import Folder
from beit_nb.engine.loading import Batches, Samples
from beit_nb.recipes import PretrainRecipe
from beit_nb.engine.processes import rank, world_size, sum_over_ranks
import torch
dist.init_process_group("gloo")
load = Batches(Samples(Folder(sys.argv[1]), lambda p, n, g: (n,), pixels=True), replace(PretrainRecipe(), batch_size=8, max_damaged=float(sys.argv[2]), workers=1), rank(), world_size())
book, rows = load.resume({}), []
try:
    for batch in load(0, 10):
        if sum_over_ranks(torch.tensor(load.found)): rows.append(load.agree())
    print(rank(), "went through", sum(len(row.get("passed_over", [])) for row in rows), book["damaged"])
except ValueError as e: print(rank(), "stopped:", e)
"""


@pytest.mark.parametrize(
    "share,ends",
    [
        (0.1, "stopped: more than max_damaged=0.1 of the 40 pictures"),
        (0.125, "went through 5 [3, 11, 19, 27, 35]"),
    ],
)
def test_processes_pool_what_they_found(bad_eighth, tmp_path, share, ends):
    """Five of forty are broken.

    Each of two processes meets less than the four that are forgiven; and every file is named once.
    """
    (tmp_path / "worker.py").write_text(WORKER)
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(tmp_path / "worker.py"),
            str(bad_eighth),
            str(share),
        ],
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert run.stdout.count(ends) == 2, run.stdout + run.stderr[-2000:]
    named = [l.split(": ")[2] for l in run.stderr.splitlines() if "passed over" in l]
    assert len(named) == len(set(named)) == 5


def test_training_keeps_the_book(bad_eighth, tmp_path, capfd):
    """Through `fit`: rows in log.jsonl, the list in the checkpoint, the count in metrics.json.

    Stopped, continued, and refused when a picture is new.
    """
    from beit_nb.recipes import recipe_named
    from beit_nb.engine.log import read_log
    from beit_nb.engine.runs import load_checkpoint
    from beit_nb.tokenizer import train_tokenizer

    r = recipe_named(
        "tokenizer",
        "nano",
        data=str(bad_eighth),
        out=str(tmp_path / "run"),
        steps=5,
        width=16,
        batch_size=8,
        max_damaged=0.125,
        checkpoint_every=1,
        max_steps=2,
    )
    train_tokenizer(r, quiet=True)
    first = load_checkpoint(tmp_path / "run", "tokenizer")["data"]
    train_tokenizer(replace(r, max_steps=None), quiet=True)
    state = load_checkpoint(tmp_path / "run", "tokenizer")["data"]
    rows = [row for row in read_log(tmp_path / "run") if "passed_over" in row]
    assert (
        first["damaged"] == sorted(set(first["damaged"]) & set(state["damaged"]))
        and state["damaged"] == [3, 11, 19, 27, 35]
        and state["pictures"] == 40
    )
    assert (
        sorted(p for row in rows for p in row["passed_over"])
        == [str(bad_eighth / f"{i:02d}.png") for i in state["damaged"]]
        and rows[-1]["damaged"] == 5
    )
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["damaged"] == 5
    assert sum("passed over" in l for l in capfd.readouterr().err.splitlines()) == 5
    grey(bad_eighth / "0new.png", 1)
    with pytest.raises(ValueError, match="has changed since this run began"):
        train_tokenizer(replace(r, max_steps=None), quiet=True)


def test_evaluation_passes_over_damage(tmp_path, capfd):
    """An empty file in val/ must stop neither the score of a fine-tuning nor a probe.

    It is named once and left out, or the next stands in with its own label.
    """
    from beit_nb.data import open_data
    from beit_nb.finetuning import build_classifier, evaluate_classifier
    from beit_nb.probing import all_features, raw_pixels
    from beit_nb.recipes import recipe_named

    for c in range(2):
        for i in range(5):
            grey(tmp_path / "val" / "ab"[c] / f"{i}.png", 100 * c + 5 * i, (32, 32))
    (tmp_path / "val" / "a" / "4.png").write_bytes(b"")
    r = recipe_named("finetune", "nano", depth=1, precision="fp32")
    pictures = ImageFolder(tmp_path / "val", labels=True)
    model = build_classifier(r, 2)
    for _ in range(2):
        score = evaluate_classifier(model, r, pictures, chunk=3)
    (tmp_path / "val" / "a" / "4.png").unlink()
    assert score.pop("val_damaged") == 1 and score == pytest.approx(
        evaluate_classifier(model, r, ImageFolder(tmp_path / "val", labels=True))
    )
    features, seen = all_features(dict(pixels=raw_pixels), pictures, 32, chunk=4)
    assert seen.tolist() == [0, 1, 2, 3, 5, 5, 6, 7, 8, 9] and np.allclose(
        features["pixels"][0, 4], 100 / 255
    )
    assert (
        sum("passed over" in l and "a/4.png" in l for l in capfd.readouterr().err.splitlines()) == 1
    )


def test_batches_depend_on_seed_and_step_only(tmp_path):
    for i in range(22):
        grey(tmp_path / "in" / f"{i}.jpg", 10 * i, (40, 30))
    shard_folder(tmp_path / "in", tmp_path / "out", per_shard=5)
    r = replace(PretrainRecipe(), batch_size=6, seed=3)
    for pictures in (Photos(2), ImageShards(tmp_path / "out", run=2)):
        samples = TransformedDataset(pictures, transform, r.seed, pixels=True)
        # 22 pictures: 3 steps an epoch
        whole = list(TrainLoader(samples, r)(0, 7))
        for other in (
            list(TrainLoader(samples, replace(r, workers=2))(2, 7)),
            [b for k in range(2, 7) for b in TrainLoader(samples, r)(k, k + 1)],
        ):
            assert all(
                torch.equal(x, y)
                for a, b in zip(whole[2:], other, strict=True)
                for x, y in zip(a, b, strict=True)
            )
        halves = [list(TrainLoader(samples, r, rank, 2)(0, 7)) for rank in range(2)]
        for step, batch in enumerate(whole):
            assert torch.equal(torch.stack([h[step][2] for h in halves], 1).flatten(), batch[2])
            # whoever asks: the whole batch, with names
            for rank in range(2):
                told = TrainLoader(samples, r, rank, 2).sources(step)
                assert [t["number"] for t in told] == batch[2].tolist() and [
                    t["path"] for t in told
                ] == [pictures.path(n) for n in batch[2].tolist()]
        json.dumps(told)
    assert not torch.equal(
        whole[0][0],
        list(TrainLoader(TransformedDataset(pictures, transform, 4, pixels=True), replace(r, seed=4))(0, 1))[0][0],
    )


@pytest.mark.parametrize(
    "length,batch,world",
    [
        (n, b, w)
        for n in (24, 25, 31, 47, 48, 97)
        for b, w in ((6, 1), (6, 2), (6, 3), (12, 4), (24, 8))
    ],
)
def test_every_sample_once_for_any_number_of_processes(length, batch, world):
    """All processes make the same number of steps (the official code can make one too many), no
    batch is short, nothing comes twice in an epoch.
    """
    per_epoch = length // batch
    for runs in (None, [0], list(range(0, length, 7))):
        ranks = [
            list(batch_indices(length, batch, 1, 0, 3 * per_epoch, r, world, runs=runs))
            for r in range(world)
        ]
        assert all(
            len(r) == 3 * per_epoch and all(len(b) == batch // world for b in r) for r in ranks
        )
        for epoch in range(3):
            keys = [
                k for r in ranks for b in r[epoch * per_epoch : (epoch + 1) * per_epoch] for k in b
            ]
            assert len(set(keys)) == len(keys) == per_epoch * batch > length - batch and {
                k // length for k in keys
            } == {epoch}
        alone = list(batch_indices(length, batch, 1, 0, 3 * per_epoch, runs=runs))
        assert all(
            sorted(k for r in ranks for k in r[s]) == sorted(alone[s]) for s in range(3 * per_epoch)
        )
        for start in (1, per_epoch, 2 * per_epoch + 1):
            assert (
                list(batch_indices(length, batch, 1, start, 3 * per_epoch, runs=runs)) == alone[start:]
            )


def test_shuffle_of_runs():
    """A permutation that stays in a window of `mix` runs, new in each epoch.

    A million pictures in well under a second.
    """
    starts = np.arange(0, 1000, 10)
    order = shuffled(1000, np.random.default_rng(0), starts, mix=20)
    assert sorted(order) == list(range(1000))
    for w in range(5):
        assert len(set(order[200 * w : 200 * (w + 1)] // 10)) == 20
    assert (order != shuffled(1000, np.random.default_rng(1), starts, mix=20)).any()
    place = np.empty(1000)
    place[order] = np.arange(1000)
    assert abs(np.corrcoef(np.arange(1000), place)[0, 1]) < 0.3
    began = time.process_time()
    assert (
        len(shuffled(1_000_000, np.random.default_rng(0), np.arange(0, 1_000_000, 64))) == 1_000_000
    )
    assert time.process_time() - began < 3


def test_shards_are_read_in_runs(tmp_path):
    """What training asks of the disk.

    For a window of runs, only those; and a subset of the pictures is shuffled freely.
    """
    for i in range(40):
        grey(tmp_path / "in" / f"{i}.png", i)
    shard_folder(tmp_path / "in", tmp_path / "out", per_shard=20)
    pictures = ImageShards(tmp_path / "out", run=4)
    assert pictures.run_starts.tolist() == list(range(0, 40, 4))
    load = TrainLoader(TransformedDataset(pictures, transform), RECIPE)
    assert (
        load.run_starts is pictures.run_starts
        and TrainLoader(TransformedDataset(pictures, transform, ids=range(30)), RECIPE).run_starts is None
    )
    assert sorted(s["number"] for k in range(10) for s in load.sources(k)) == list(range(40))
    assert not pictures.read_ahead and len(list(load(0, 10))) == 10 and pictures.read_ahead
    # each announced once
    assert sorted(start for _, start in pictures.pieces.reported) == sorted(
        int(pictures.start[r]) for r in pictures.run_starts
    )


def test_workers_leave_signals_alone():
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        leave_signals(0)
        for s in before:
            os.kill(os.getpid(), s)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def test_samples_travel_to_spawned_workers(tmp_path):
    grey(tmp_path / "1.png", 7)
    for pictures in (ImageFolder(tmp_path), Photos()):
        again = pickle.loads(pickle.dumps(TransformedDataset(pictures, transform, pixels=True)))
        assert torch.equal(again[0][0], TransformedDataset(pictures, transform)[0][0])


def test_batches_refuse():
    samples = TransformedDataset(Photos(1), transform)
    for batch, world, words in (
        (12, 1, "larger than the data set of 11 pictures"),
        (8, 3, "3 processes"),
    ):
        with pytest.raises(ValueError, match=words):
            TrainLoader(samples, replace(RECIPE, batch_size=batch), 0, world)
