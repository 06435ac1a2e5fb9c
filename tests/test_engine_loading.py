"""Batches that are the same for any number of processes, workers and stops; pictures nobody can
read; and the one walk over a data set."""

import json
import os
import pickle
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import save_gray
from helpers_processes import run
from torch import Tensor

from beit_nb import BeitError
from beit_nb.configs import PretrainRecipe
from beit_nb.engine.augment import TwoViews
from beit_nb.engine.loading import (
    ImageBatch,
    TrainLoader,
    TransformedDataset,
    collate,
    exclude,
    sequential_batches,
)
from beit_nb.engine.log import read_log
from beit_nb.engine.packing import shard_folder
from beit_nb.engine.runs import load_checkpoint
from beit_nb.engine.shards import ImageShards
from beit_nb.engine.sources import ImageDataset, ImageFolder, Photos
from beit_nb.recipes import recipe_named
from beit_nb.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("pages_unpainted")

RECIPE = replace(PretrainRecipe(), batch_size=4)


class Sample(NamedTuple):
    patch_view: Tensor
    token_view: Tensor
    number: int
    torch_dice: Tensor
    numpy_dice: float


class Numbered(NamedTuple):
    number: int


def transform(picture, number, rng):
    views = TwoViews(16, 8, (0.2, 1.0), 0.4, 0.5)(picture)
    return Sample(views.patch_view, views.token_view, number, torch.rand(()), rng.random())


def numbered(picture, number, rng):
    return Numbered(number)


def loader(samples, recipe=RECIPE, rank=0, world=1):
    "A step is one micro-batch."
    return TrainLoader(samples, recipe, recipe.batch_size // world, rank=rank, world=world)


def batches(load, first, last):
    return [parts[0] for parts, _ in load.steps(first, last)]


def through(load, last=20):
    "As `fit` goes through the batches, asking after each; the rows for the log."
    for parts, _ in load.steps(0, last):
        yield parts[0], load.agree() if load.new_unreadable else {}


def equal(a, b):
    return all(torch.equal(*map(torch.as_tensor, xy)) for xy in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pixels", [False, True])
def test_damaged_pictures_are_replaced_named_and_counted(tmp_path, workers, pixels, capfd):
    for i in range(8):
        save_gray(tmp_path / f"{i}.png", 10 * i)
    for i in (2, 3):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    r = replace(RECIPE, max_damaged=0.25, workers=workers)
    samples = TransformedDataset(ImageFolder(tmp_path), transform, pixels=pixels)

    ten_epochs, rows = zip(*through(loader(samples, r)))

    numbers = [n for batch in ten_epochs for n in batch.number.tolist()]
    assert len(numbers) == 80 and not {2, 3} & set(numbers)
    assert numbers.count(4) == 30  # it stands in for both
    lines = capfd.readouterr().err.splitlines()
    named = [line for line in lines if line.startswith("beit: passed over: cannot read")]
    assert len(named) == 2 and all(any(f"{i}.png" in line for line in named) for i in (2, 3))
    rows = [row for row in rows if row]
    assert rows[-1]["damaged"] == 2
    passed_over = sorted(path for row in rows for path in row["passed_over"])
    assert passed_over == [str(tmp_path / "2.png"), str(tmp_path / "3.png")]


@pytest.mark.parametrize("share, n", [(0.24, 2), (0.01, 2), (0, 1)])
def test_too_much_damage_stops_the_run(tmp_path, share, n):
    "One is always forgiven, unless the share is 0."
    for i in range(8):
        save_gray(tmp_path / f"{i}.png", 10 * i)
    for i in (2, 3):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    samples = TransformedDataset(ImageFolder(tmp_path), transform)
    line = rf"^more than max_damaged={share:g} of the 8 pictures of .* are unreadable: [{n}2] so "
    with pytest.raises(BeitError, match=line + r"far, such as .*/[23].png;"):
        list(through(loader(samples, replace(RECIPE, max_damaged=share))))


def test_a_repaired_picture_is_welcome(tmp_path):
    for i in range(8):
        save_gray(tmp_path / f"{i}.png", 10 * i)
    (tmp_path / "2.png").write_bytes(b"no picture")
    (tmp_path / "3.png").write_bytes(b"no picture")
    save_gray(tmp_path / "3.png", 1)
    samples = TransformedDataset(ImageFolder(tmp_path), transform)
    assert len(list(through(loader(samples, replace(RECIPE, max_damaged=0.01))))) == 20


def test_nothing_can_be_read(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    samples = TransformedDataset(ImageFolder(tmp_path), transform)
    line = "none of the 8 pictures of .*: cannot read the picture .*0.png"
    with pytest.raises(BeitError, match=line):
        samples[0]


def test_an_error_of_a_transform_is_not_damage(tmp_path):
    "Damage is known by its type: a ValueError that happens to say so is a defect and comes out."
    save_gray(tmp_path / "0.png", 0)

    def broken(picture, number, rng):
        raise ValueError("cannot read the picture: a defect of ours")

    with pytest.raises(ValueError, match="a defect of ours"):
        TransformedDataset(ImageFolder(tmp_path), broken)[0]


def test_damage_in_a_shard(tmp_path, capfd):
    for i in range(12):
        save_gray(tmp_path / "in" / f"{i}.png", 10 * i)
    (tmp_path / "in" / "7.png").write_bytes(b"no picture")
    (tmp_path / "s").mkdir()
    with tarfile.open(tmp_path / "s" / "0.tar", "w") as tar:
        for i in range(12):
            tar.add(tmp_path / "in" / f"{i}.png", f"{i}.png")
    samples = TransformedDataset(ImageShards(tmp_path / "s"), transform, pixels=True)

    two_epochs = [b for b, _ in through(loader(samples, replace(RECIPE, workers=2)), 6)]

    numbers = sorted(n for batch in two_epochs for n in batch.number.tolist())
    assert numbers == sorted([*range(7), 8, 8, *range(9, 12)] * 2)
    assert "s/0.tar/7.png" in capfd.readouterr().err
    with pytest.raises(BeitError, match="such as .*s/0.tar/7.png; repair"):
        list(through(loader(samples, replace(RECIPE, max_damaged=0)), 6))


@pytest.mark.parametrize("pixels", [False, True])
def test_a_file_deleted_under_way(tmp_path, pixels):
    for i in range(4):
        save_gray(tmp_path / f"{i}.png", i)
    samples = TransformedDataset(ImageFolder(tmp_path), numbered, pixels=pixels)
    (tmp_path / "2.png").unlink()
    found = [(sample.number, replaced) for sample, replaced in (samples[i] for i in range(4))]
    assert found == [(0, -1), (1, -1), (3, 2), (3, -1)]


def test_excluded_pictures_count_as_damaged(tmp_path, capfd):
    "They can be read, but must not be used: their tokens are another's."
    for i in range(8):
        save_gray(tmp_path / f"{i}.png", i)
    pictures = ImageFolder(tmp_path)
    exclude(pictures, [5])
    samples = TransformedDataset(pictures, transform)

    got, rows = zip(*through(loader(samples, replace(RECIPE, workers=2)), 4))

    numbers = sorted(n for batch in got for n in batch.number.tolist())
    assert numbers == sorted([0, 1, 2, 3, 4, 6, 6, 7] * 2)
    assert [row["passed_over"] for row in rows if row] == [[str(tmp_path / "5.png")]]
    line = f"beit: passed over: cannot read the picture {tmp_path / '5.png'} when"
    assert line in capfd.readouterr().err


@pytest.fixture
def bad_eighth(tmp_path):
    "Forty pictures, five of them broken."
    for i in range(40):
        save_gray(tmp_path / "in" / f"{i:02d}.png", i, (32, 32))
    for i in range(3, 40, 8):
        (tmp_path / "in" / f"{i:02d}.png").write_bytes(b"no picture")
    return tmp_path / "in"


def test_the_list_of_damage_outlives_a_stop(bad_eighth):
    "Each piece of the run meets less than the limit; together it is more."
    r = replace(RECIPE, max_damaged=0.1)
    kept = {}
    met = []
    with pytest.raises(BeitError, match="are unreadable: 5 so far"):
        for step in range(10):  # stopped after every step
            load = loader(TransformedDataset(ImageFolder(bad_eighth), transform), r)
            load.load_state_dict(kept)
            for _ in load.steps(step, step + 1):
                if load.new_unreadable:
                    load.agree()
            # plain data: whole numbers and letters
            kept = json.loads(json.dumps(load.state_dict()))
            met.append(len(kept["damaged"]))
    assert met == sorted(met) and met[-1] <= 4 and kept["damaged"] == sorted(kept["damaged"])
    # and a repaired picture counts no more
    save_gray(bad_eighth / f"{kept['damaged'][0]:02d}.png", 1, (32, 32))
    load = loader(TransformedDataset(ImageFolder(bad_eighth), transform), r)
    load.load_state_dict(kept)
    assert load.state_dict()["damaged"] == kept["damaged"][1:]


def test_changed_data_is_refused(tmp_path):
    for i in range(8):
        save_gray(tmp_path / "in" / f"{i}.png", i)

    def resume(folder, kept):
        load = loader(TransformedDataset(ImageFolder(folder), transform))
        load.load_state_dict(kept)
        return load.state_dict()

    kept = resume(tmp_path / "in", {"next_batch": 0})  # an old checkpoint knows no pictures
    assert set(kept) == {"pictures", "names", "damaged"} and kept["pictures"] == 8
    (tmp_path / "in").rename(tmp_path / "moved")
    resume(tmp_path / "moved", kept)  # another place is none of our business
    (tmp_path / "moved" / "3.png").rename(tmp_path / "moved" / "9.png")
    line = "moved has changed since this run began .8 pictures then, 8 now"
    with pytest.raises(BeitError, match=line):
        resume(tmp_path / "moved", kept)
    save_gray(tmp_path / "moved" / "3.png", 1)
    with pytest.raises(BeitError, match="8 pictures then, 9 now"):
        resume(tmp_path / "moved", kept)


WORKER = """
import sys
from dataclasses import replace
from typing import NamedTuple

import torch

from beit_nb import BeitError, say
from beit_nb.configs import PretrainRecipe
from beit_nb.engine.loading import TrainLoader, TransformedDataset
from beit_nb.engine.processes import join_processes, rank, sum_over_ranks, world_size
from beit_nb.engine.sources import ImageFolder


class Numbered(NamedTuple):
    number: int


with join_processes():
    r = replace(PretrainRecipe(), batch_size=8, max_damaged=float(sys.argv[2]), workers=1)
    samples = TransformedDataset(ImageFolder(sys.argv[1]), lambda p, n, g: Numbered(n), pixels=True)
    load = TrainLoader(samples, r, 4, rank=rank(), world=world_size())
    rows = []
    try:
        for _ in load.steps(0, 10):
            if sum_over_ranks(torch.tensor(load.new_unreadable)):
                rows.append(load.agree())
        told = sum(len(row.get("passed_over", [])) for row in rows)
        say(f"{rank()} went through {told} {load.unreadable.damaged}")
    except BeitError as e:
        say(f"{rank()} stopped: {e}")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "share, ends",
    [
        (0.1, "stopped: more than max_damaged=0.1 of the 40 pictures"),
        (0.125, "went through 5 [3, 11, 19, 27, 35]"),
    ],
)
@pytest.mark.usefixtures("quick_starts")
def test_processes_pool_what_they_found(bad_eighth, tmp_path, share, ends):
    "Each of two processes meets less than the four that are forgiven; each file is named once."
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ended = run(
        *[*torchrun, "--nproc-per-node=2", tmp_path / "worker.py", bad_eighth, share],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        ok=None,
    )
    assert ended.stdout.count(ends) == 2, ended.stdout + ended.stderr[-2000:]
    named = [line.split(": ")[2] for line in ended.stderr.splitlines() if "passed over" in line]
    assert len(named) == len(set(named)) == 5


def test_training_keeps_the_list_of_damage(bad_eighth, tmp_path, capfd):
    "Through `fit`: rows in log.jsonl, the list in the checkpoint, the count in metrics.json."
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
    )

    train_tokenizer(replace(r, max_steps=2), quiet=True)
    first = load_checkpoint(tmp_path / "run", "tokenizer")["data"]
    train_tokenizer(r, quiet=True)
    last = load_checkpoint(tmp_path / "run", "tokenizer")["data"]

    assert set(first["damaged"]) <= set(last["damaged"])
    assert last["damaged"] == [3, 11, 19, 27, 35] and last["pictures"] == 40
    rows = [row for row in read_log(tmp_path / "run") if "passed_over" in row]
    passed_over = sorted(path for row in rows for path in row["passed_over"])
    assert passed_over == [str(bad_eighth / f"{i:02d}.png") for i in last["damaged"]]
    assert rows[-1]["damaged"] == 5
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["damaged"] == 5
    assert sum("passed over" in line for line in capfd.readouterr().err.splitlines()) == 5
    save_gray(bad_eighth / "0new.png", 1)
    with pytest.raises(BeitError, match="has changed since this run began"):
        train_tokenizer(r, quiet=True)


@pytest.mark.slow
def test_batches_depend_on_seed_and_step_only(tmp_path):
    for i in range(22):
        save_gray(tmp_path / "in" / f"{i}.jpg", 10 * i, (40, 30))
    shard_folder(tmp_path / "in", tmp_path / "out", per_shard=5)
    r = replace(PretrainRecipe(), batch_size=6, seed=3)
    for pictures in (Photos(2), ImageShards(tmp_path / "out", chunk=2)):
        samples = TransformedDataset(pictures, transform, r.seed, pixels=True)
        whole = batches(loader(samples, r), 0, 7)  # 22 pictures: 3 steps an epoch
        with_workers = batches(loader(samples, replace(r, workers=2)), 2, 7)
        one_by_one = [batches(loader(samples, r), k, k + 1)[0] for k in range(2, 7)]
        for other in (with_workers, one_by_one):
            assert all(equal(a, b) for a, b in zip(whole[2:], other, strict=True))
        halves = [batches(loader(samples, r, rank, 2), 0, 7) for rank in range(2)]
        for step, batch in enumerate(whole):
            of_both = torch.stack([half[step].number for half in halves], 1).flatten()
            assert torch.equal(of_both, batch.number)
            for rank in range(2):  # whoever is asked: the whole batch, with names
                sources = loader(samples, r, rank, 2).sources(step)
                numbers = batch.number.tolist()
                assert [s["number"] for s in sources] == numbers
                assert [s["path"] for s in sources] == [pictures.path(n) for n in numbers]
                json.dumps(sources)
        other_seed = TransformedDataset(pictures, transform, 4, pixels=True)
        other = batches(loader(other_seed, replace(r, seed=4)), 0, 1)[0]
        assert not torch.equal(whole[0].patch_view, other.patch_view)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_leaves_the_generators_alone(workers):
    "Whoever draws a weight before or after loading a sample draws the same."
    samples = TransformedDataset(Photos(1), transform, pixels=True)
    torch.manual_seed(0)
    np.random.seed(0)
    want = torch.rand(3), np.random.rand(3)
    torch.manual_seed(0)
    np.random.seed(0)
    samples[5]
    got = torch.rand(3), np.random.rand(3)
    assert torch.equal(got[0], want[0]) and (got[1] == want[1]).all()
    # and a sample does not depend on what the process drew before
    assert equal(samples[5][0], samples[5][0])
    alone = batches(loader(samples, replace(RECIPE, workers=workers)), 0, 2)
    torch.rand(7)
    again = batches(loader(samples, replace(RECIPE, workers=0)), 0, 2)
    assert all(equal(a, b) for a, b in zip(alone, again, strict=True))


def test_micro_batches_are_the_batch_in_parts():
    samples = TransformedDataset(Photos(2), transform, pixels=True)
    r = replace(RECIPE, batch_size=6)
    [(parts, counts)] = TrainLoader(samples, r, 4).steps(0, 1)
    whole = batches(loader(samples, r), 0, 1)[0]
    assert counts == [4, 2]
    assert all(torch.equal(torch.cat(x), y) for x, y in zip(zip(*parts), whole, strict=True))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_sample_once_with_workers(workers):
    samples = TransformedDataset(ImageDataset(26, torch.tensor), numbered)
    r = replace(RECIPE, batch_size=8, workers=workers, max_damaged=0.0)
    seen = [
        int(n)
        for rank in range(2)
        for batch in batches(loader(samples, r, rank, 2), 0, 6)
        for n in batch.number
    ]
    alone = [int(n) for batch in batches(loader(samples, r), 0, 6) for n in batch.number]
    assert Counter(seen) == Counter(alone)
    assert len(set(seen[:12] + seen[24:36])) == 24, "the first epoch"


def test_shards_are_read_in_runs(tmp_path):
    "What training asks of the disk; a subset of the pictures is shuffled freely."
    for i in range(40):
        save_gray(tmp_path / "in" / f"{i}.png", i)
    shard_folder(tmp_path / "in", tmp_path / "out", per_shard=20)
    pictures = ImageShards(tmp_path / "out", chunk=4)
    assert pictures.chunk_starts.tolist() == list(range(0, 40, 4))
    load = loader(TransformedDataset(pictures, transform))
    assert load.order.chunk_starts is pictures.chunk_starts
    part = TransformedDataset(pictures, transform, ids=range(30))
    assert loader(part).order.chunk_starts is None
    numbers = [s["number"] for step in range(10) for s in load.sources(step)]
    assert sorted(numbers) == list(range(40))
    assert not pictures.read_ahead
    assert len(batches(load, 0, 10)) == 10 and pictures.read_ahead


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_once_is_every_picture_one_time(tmp_path, workers, world, capfd):
    for i in range(10):
        save_gray(tmp_path / f"{i}.png", i)
    (tmp_path / "4.png").write_bytes(b"no picture")

    def walk(rank):
        samples = TransformedDataset(ImageFolder(tmp_path), numbered)
        return list(sequential_batches(samples, 3, workers, rank, world))

    shares = [walk(rank) for rank in range(world)]

    assert len({len(share) for share in shares}) == 1, "all call the model equally often"
    valid = [n for s in shares for w in s for n in w.batch.number[w.valid].tolist()]
    assert sorted(valid) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert [n for s in shares for w in s for n in w.unreadable] == [4]
    assert capfd.readouterr().err.count("passed over") == 1


def test_a_field_that_is_none_stays_none():
    class Maybe(NamedTuple):
        x: Tensor
        jitter: Tensor | None = None

    batch, replaced = collate([(Maybe(torch.ones(2)), -1), (Maybe(torch.zeros(2)), 7)])
    assert isinstance(batch, Maybe) and batch.x.shape == (2, 2) and batch.jitter is None
    assert replaced.tolist() == [-1, 7]


def test_samples_travel_to_spawned_workers(tmp_path):
    save_gray(tmp_path / "1.png", 7)
    for pictures in (ImageFolder(tmp_path), Photos()):
        samples = TransformedDataset(pictures, transform, pixels=True)
        again = pickle.loads(pickle.dumps(samples))
        assert equal(again[0][0], samples[0][0])


@pytest.mark.parametrize(
    "batch, world, words", [(12, 1, "larger than the data set of 11"), (8, 3, "3 processes")]
)
def test_batches_that_cannot_be_are_refused(batch, world, words):
    samples = TransformedDataset(Photos(1), transform)
    with pytest.raises(BeitError, match=words):
        TrainLoader(samples, replace(RECIPE, batch_size=batch), 4, rank=0, world=world)


def test_image_batches_collate():
    pictures = TransformedDataset(
        Photos(1), lambda p, n, g: ImageBatch(TwoViews(8)(p).patch_view, n)
    )
    [walked] = sequential_batches(pictures, 11)
    assert walked.batch.image.shape == (11, 3, 8, 8) and walked.valid.all()
