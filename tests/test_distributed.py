"Many processes are one training: the real engine in two gloo processes against one, and every sample once an epoch."

import json, os, shutil, subprocess, sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from beit_nb.data import open_data
from beit_nb.engine.sources import ImageDataset
from beit_nb.scale.launching import bytes_on_the_wire, run_distributed, torchrun, scaled_lr
from beit_nb.finetuning import finetune
from beit_nb.engine.loading import TrainLoader, TransformedDataset, batch_indices
from beit_nb.pretraining import PretrainTransform, pretrain
from beit_nb.recipes import recipe_named
from beit_nb.engine.log import read_log
from beit_nb.engine.runs import load_checkpoint
from beit_nb.tokenizer import train_tokenizer

torch.set_num_threads(1)
STEPS = 20
TINY = dict(
    embed_dim=64,
    depth=2,
    steps=STEPS,
    batch_size=16,
    warmup_steps=2,
    precision="fp32",
    log_every=1,
    checkpoint_every=10,
    watch_every=None,
    # views change, so the tokenizer works in every step; masks differ in size, so that
    # means of means would not do
    flip=0.5,
    crop_scale=(0.6, 1.0),
    exact_mask=False,
)


def run(top, name, **changes):
    "The real pre-training, in whatever company this process is."
    pretrain(
        recipe_named(
            "pretrain",
            "nano",
            **TINY | dict(tokenizer=f"{top}/tokenizer", out=f"{top}/{name}") | changes,
        ),
        quiet=True,
    )


def company(top, jobs):
    """Runs several trainings, one after the other, in the same two processes.

    Returns what this rank saw of chance, and what it held.
    """
    from beit_nb.finetuning import finetune
    from beit_nb.pretraining import pretrain
    from beit_nb.recipes import Run, recipe_named
    from beit_nb.engine.runs import open_run
    from beit_nb.tokenizer import train_tokenizer
    from beit_nb.engine.training import Trainer, fit

    train = dict(tokenizer=train_tokenizer, pretrain=pretrain, finetune=finetune)
    for command, changes in jobs:
        train[command](recipe_named(command, "nano", **changes), quiet=True)
    draws = []

    def loss_of(model, bite, step):
        draws.append(torch.rand(3))
        return model(bite[0]).mean(), {}

    with open_run(
        "toy",
        r := Run(
            out=f"{top}/draws", steps=3, batch_size=8, device_batch_size=2, precision="fp32", seed=5
        ),
    ) as out:
        t = Trainer("toy", r, out, nn.Linear(2, 1), 3, 3, quiet=True)
        fit(t, lambda first, last: ([torch.ones(4, 2)] for _ in range(first, last)), loss_of)
    return torch.stack(draws)


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    "A folder with a small tokenizer, the runs of one process, and those of two."
    top = tmp_path_factory.mktemp("distributed")
    tokenizer = dict(width=16, steps=30, batch_size=16, precision="fp32", log_every=10)
    train_tokenizer(
        recipe_named("tokenizer", "nano", out=f"{top}/tokenizer", **tokenizer), quiet=True
    )
    run(top, "one")
    classify = dict(
        embed_dim=64,
        depth=2,
        steps=10,
        batch_size=16,
        warmup_steps=2,
        precision="fp32",
        log_every=1,
        eval_every=10,
        drop_path_rate=0.0,
        init=f"{top}/one",
        labels_per_class=4,
    )
    finetune(recipe_named("finetune", "nano", out=f"{top}/classify-one", **classify), quiet=True)
    run(top, "bites", device_batch_size=4)
    run(top, "half", max_steps=10)
    shutil.copytree(top / "half", top / "half-to-two")
    of = lambda name, **changes: (
        "pretrain",
        TINY | dict(tokenizer=f"{top}/tokenizer", out=f"{top}/{name}") | changes,
    )
    jobs = [
        of("ddp"),
        of("ddp-bites", device_batch_size=2),
        of("ddp-workers", workers=2),
        of("fsdp", parallel="fsdp", grad_checkpointing=True),
        of("fsdp-bites", parallel="fsdp", device_batch_size=4),
        of("two-to-one", parallel="fsdp", max_steps=10),
        of("half-to-two", parallel="fsdp"),
        of("process", loss_mean="process"),
        *(
            ("finetune", classify | dict(out=f"{top}/classify-{p}", parallel=p))
            for p in ("ddp", "fsdp")
        ),
        *(
            (
                "tokenizer",
                tokenizer | dict(out=f"{top}/tokenizer-{w}", workers=w, steps=5, log_every=2),
            )
            for w in (0, 2)
        ),
    ]
    torch.save(run_distributed(company, str(top), jobs), top / "draws.pt")
    run(top, "two-to-one")  # the checkpoint of two FSDP processes goes on in this one
    return top


def weights(folder, command="pretrain"):
    return load_checkpoint(folder, command)["model"]


def gap(a, b):
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def rows(folder):
    return [r for r in read_log(folder) if "loss" in r]


@pytest.mark.parametrize(
    "name",
    [
        "bites",
        "half",
        "ddp",
        "ddp-bites",
        "ddp-workers",
        "fsdp",
        "fsdp-bites",
        "half-to-two",
        "two-to-one",
    ],
)
def test_every_way_is_the_same_training(top, name):
    """Loss and gradient norm of every step, and the weights after the last.

    Those of one process with the whole batch.
    """
    if name == "half":
        run(top, "half")
    one = rows(top / "one")
    other = rows(top / name)
    assert [r["step"] for r in other] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "mlm_acc"):
        assert max(abs(a[key] - b[key]) for a, b in zip(one, other)) < 1e-6 * max(
            1, *(abs(a[key]) for a in one)
        ), key
    difference = gap(weights(top / name), weights(top / "one"))
    print(f"{name}: largest difference of a weight {difference:.1e}")
    assert difference < 1e-6


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_fine_tuning_too(top, parallel):
    assert (
        gap(
            weights(top / f"classify-{parallel}", "finetune"),
            weights(top / "classify-one", "finetune"),
        )
        < 1e-6
    )
    one, two = (
        json.loads((top / f"classify-{k}" / "metrics.json").read_text()) for k in ("one", parallel)
    )
    assert (
        one["accuracy"] == two["accuracy"] and abs(one["curve"][-1][1] - two["curve"][-1][1]) < 1e-9
    )


def test_the_mean_of_means_is_another_training(top):
    "loss_mean 'process', the official code's: so the test above can tell the difference."
    assert gap(weights(top / "process"), weights(top / "one")) > 1e-5


def test_metrics_are_global(top):
    "One log for all, whose samples count every process; metrics.json too."
    for name in ("one", "ddp", "fsdp"):
        assert json.loads((top / name / "metrics.json").read_text())["images"] == STEPS * 16
    assert not list((top / "ddp").glob("log*1*")) and len(rows(top / "ddp")) == STEPS


def test_chance_differs_per_rank_and_follows_the_seed(top):
    a, b = torch.load(top / "draws.pt")
    assert (
        a.shape == b.shape == (6, 3) and len({tuple(x) for x in torch.cat([a, b]).tolist()}) == 12
    ), "every bite of every process draws its own"
    assert (
        gap(weights(top / "tokenizer-0", "tokenizer"), weights(top / "tokenizer-2", "tokenizer"))
        == 0
    ), "workers change no Gumbel noise"


def test_masks_differ_per_rank_and_not_with_workers():
    r = recipe_named("pretrain", "nano", **TINY)
    samples = TransformedDataset(open_data("digits"), PretrainTransform(r), r.seed)
    load = lambda rank, world, workers: [
        [x.clone() for x in b]
        for b in TrainLoader(samples, SimpleNamespace(**vars(r) | dict(workers=workers)), rank, world)(
            3, 5
        )
    ]
    alone = load(0, 1, 0)
    parts = [load(k, 2, 0) for k in range(2)]
    for k in range(2):
        for x, y in zip(parts[k], load(k, 2, 2)):
            assert all(torch.equal(a, b) for a, b in zip(x, y)), "workers change nothing"
    for step in range(2):
        a = parts[0][step]
        b = parts[1][step]
        for part in range(3):
            assert not any(torch.equal(x, y) for x in a[part] for y in b[part]), (
                "no view, no mask twice"
            )
        for x, whole in zip(zip(a, b), alone[step]):
            assert torch.equal(torch.stack(x, 1).flatten(0, 1), whole), (
                "the company reads the batch of one"
            )


@pytest.mark.parametrize(
    "n,batch,world",
    [(48, 12, 1), (50, 12, 2), (61, 12, 3), (37, 8, 4), (64, 64, 8), (101, 10, 5), (1000, 96, 16)],
)
def test_every_sample_once_an_epoch(n, batch, world):
    per_epoch = n // batch
    for epoch in range(3):
        keys = [
            k
            for rank in range(world)
            for b in batch_indices(n, batch, 7, epoch * per_epoch, (epoch + 1) * per_epoch, rank, world)
            for k in b
        ]
        assert (
            max(Counter(k % n for k in keys).values()) == 1
            and len(keys) == per_epoch * batch
            and {k // n for k in keys} == {epoch}
        )
    first, second = (
        [k % n for b in batch_indices(n, batch, 7, e * per_epoch, (e + 1) * per_epoch) for k in b]
        for e in range(2)
    )
    assert first != second, "another shuffle every epoch"
    if n % batch == 0:
        assert sorted(first) == sorted(second) == list(range(n))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_sample_once_with_workers(workers):
    samples = TransformedDataset(ImageDataset(26, torch.tensor), lambda picture, number, rng: (number,), 0)
    r = SimpleNamespace(batch_size=8, seed=0, workers=workers, max_damaged=0.0)
    seen = [int(i) for rank in range(2) for b in TrainLoader(samples, r, rank, 2)(0, 6) for i in b[0]]
    assert sorted(Counter(seen).values()) == sorted(
        Counter([int(i) for b in TrainLoader(samples, r)(0, 6) for i in b[0]]).values()
    )
    assert len(set(seen[:12] + seen[24:36])) == 24, "the first epoch"


def torchrun(*words, processes=2, timeout=300):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            "-m",
            "beit_nb",
            *map(str, words),
        ],
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_a_batch_that_cannot_be_divided(top):
    """One line, exit status 2 in the process that says it, nobody waits for anybody, nothing is
    left behind.
    """
    r = torchrun(
        "pretrain",
        "nano",
        "--batch-size",
        33,
        "--tokenizer",
        top / "tokenizer",
        "--out",
        top / "odd",
    )
    lines = [l for l in r.stderr.splitlines() if l.startswith("beit: error:")]
    assert (
        r.returncode != 0
        and len(lines) == 1
        and "batch_size 33" in lines[0]
        and "2 processes" in lines[0]
    ), r.stderr
    assert (
        "exitcode  : 2 " in r.stderr
        and 'Traceback (most recent call last):\n  File "/'
        not in r.stderr.split("torch/distributed/elastic")[0]
    )
    assert not (top / "odd" / "config.json").exists()


def restarted(folder, changes):
    "The real pre-training, in which rank 1 kills itself after step 13 of its first life."
    from beit_nb import training
    from beit_nb.pretraining import pretrain
    from beit_nb.recipes import recipe_named

    step = training.train_step
    first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def deadly(t, *args):
        if first_life and t.step == 13 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(t, *args)

    training.train_step = deadly
    pretrain(recipe_named("pretrain", "nano", out=folder, **changes), quiet=True)
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def test_a_killed_process_comes_back(top):
    """--max-restarts: the second life goes on from the checkpoint of step 10, and ends with the
    very weights of the run that nobody killed.
    """
    assert run_distributed(
        restarted, str(top / "killed"), TINY | dict(tokenizer=str(top / "tokenizer")), restarts=1
    ) == [1, 1]
    assert gap(weights(top / "killed"), weights(top / "ddp")) == 0
    assert [r["step"] for r in rows(top / "killed")] == list(range(1, STEPS + 1))


def test_helpers(tmp_path):
    with pytest.raises(RuntimeError, match="exit status 1(.|\n)*ValueError: nothing here"):
        (tmp_path / "bad.py").write_text("raise ValueError('nothing here')")
        torchrun(tmp_path / "bad.py", processes=1)
    assert (
        bytes_on_the_wire(100, 1) == 0
        and bytes_on_the_wire(100, 4) == 150
        and bytes_on_the_wire(100, 4, "fsdp") == 225
    )
    with pytest.raises(ValueError, match="unknown rule"):
        scaled_lr(1e-3, 2, 1, "cube")
