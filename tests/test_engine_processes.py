"""Many processes are one training: what they tell each other, and the real engine in two gloo
processes against one."""

import gc
import json
import os
import shutil
import signal
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers_processes import run
from torch import nn

from beit_nb import BeitError
from beit_nb.data import open_data
from beit_nb.engine.loading import TrainLoader, TransformedDataset
from beit_nb.engine.log import read_log
from beit_nb.engine.processes import (
    ModelWithLoss,
    distribute_like,
    exit_status,
    full_tensors,
    gather_over_ranks,
    is_of_a_collective,
    join_processes,
    mean_over_ranks,
    memory_mb,
    no_sync,
    rank,
    rank_0_first,
    shard_model,
    sum_over_ranks,
    world_size,
    wrap_model,
)
from beit_nb.engine.runs import load_checkpoint
from beit_nb.finetuning import finetune
from beit_nb.pretraining import PretrainTransform, pretrain
from beit_nb.recipes import recipe_named
from beit_nb.scale.launching import run_distributed
from beit_nb.tokenizer import train_tokenizer

torch.set_num_threads(1)
STEPS = 12
MOMENT = timedelta(milliseconds=5)
TINY = dict(
    embed_dim=64,
    depth=2,
    steps=STEPS,
    batch_size=16,
    warmup_steps=2,
    precision="fp32",
    log_every=1,
    checkpoint_every=STEPS // 2,
    watch_every=None,
    # views change, so the tokenizer works in every step; masks differ in size, so that
    # means of means would not do
    flip=0.5,
    crop_scale=(0.6, 1.0),
    exact_mask=False,
)
PIXELS = dict(targets="pixels_norm", masking="random", recover="all", tokenizer="")
SMALL_TOKENIZER = dict(width=16, batch_size=16, precision="fp32")
CLASSIFY = dict(
    embed_dim=64,
    depth=2,
    steps=6,
    batch_size=16,
    warmup_steps=2,
    precision="fp32",
    log_every=1,
    eval_every=6,
    drop_path_rate=0.0,
    labels_per_class=4,
)


# Alone, every function answers at once.


def test_alone_a_process_is_number_0_of_1():
    x = torch.tensor(3.0)
    with join_processes():
        assert (rank(), world_size()) == (0, 1)
        assert sum_over_ranks(x) is x and mean_over_ranks(x) is x
        assert gather_over_ranks("a") == ["a"]
        assert full_tensors({"a": {"b": x}}) == {"a": {"b": x}}
        assert distribute_like(x, x) is x


def test_alone_rank_0_first_is_the_call_itself():
    def refuse():
        raise BeitError("seven is no number; give 7")

    assert rank_0_first(lambda: 7) == 7
    with pytest.raises(BeitError, match="give 7"):
        rank_0_first(refuse)


@pytest.mark.parametrize(
    "error, status",
    [(BeitError(), 2), (OSError(), 2), (KeyboardInterrupt(), 130), (ValueError(), 1)],
)
def test_the_exit_status_tells_input_from_defect(error, status):
    assert exit_status(error) == status


def error_of(call):
    with pytest.raises(RuntimeError) as caught:
        call()
    return caught.value


def test_where_an_error_was_raised_tells_a_lost_process_from_a_defect(monkeypatch):
    "Not its words, which torch may change and a defect may share."

    def speak():
        raise RuntimeError("gloo")

    def allocate():
        raise torch.OutOfMemoryError("of which torch makes a RuntimeError too")

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    lonely = torch.distributed.HashStore()
    words = error_of(speak)
    product = error_of(lambda: torch.ones(2, 3) @ torch.ones(2, 3))
    memory = error_of(allocate)
    group = error_of(lambda: torch.distributed.PrefixStore("a", lonely).wait(["b"], 2 * MOMENT))
    plain = error_of(torch.distributed.get_node_local_rank)  # has no type of its own, like gloo's

    assert not any(is_of_a_collective(e) for e in (words, product, memory))
    assert isinstance(group, torch.distributed.DistError) and is_of_a_collective(group)
    assert type(plain) is RuntimeError and is_of_a_collective(plain)


def test_alone_a_model_is_wrapped_with_its_loss_only():
    def compute_loss(model, batch, step):
        return F.mse_loss(model(batch[0]), batch[1]), {"step": step}

    model = nn.Linear(2, 1)
    batch = torch.ones(4, 2), torch.ones(4, 1)
    forward = wrap_model(model, compute_loss)
    with no_sync(forward, last=False):
        loss, metrics = forward(batch, 7)

    assert isinstance(forward, ModelWithLoss) and metrics == {"step": 7}
    assert loss == F.mse_loss(model(batch[0]), batch[1])


def test_only_a_transformer_is_sharded():
    with pytest.raises(BeitError, match="needs a transformer with blocks; set --parallel ddp"):
        shard_model(nn.Linear(2, 1), torch.device("cpu"))


def test_memory_of_this_process():
    gc.collect()  # here and now, and not while we measure
    before = memory_mb("RssAnon")  # without files, which the system drops when it likes
    block = torch.ones(64 * 2**18)  # 64 MB of floats
    assert memory_mb("RssAnon") - before == pytest.approx(block.nbytes / 2**20, abs=4)
    assert memory_mb() >= memory_mb("VmRSS") - 4 > before + 60  # the counters lag a little


# Who sees which picture, and which mask.


SEEN = ("patch_view", "token_view", "mask")


@pytest.fixture(scope="module")
def samples():
    recipe = recipe_named("pretrain", "nano", **TINY)
    return TransformedDataset(open_data("digits"), PretrainTransform(recipe), recipe.seed)


def batches(samples, rank=0, world=1, workers=0):
    "Two steps, each as one micro-batch of this process."
    recipe = recipe_named("pretrain", "nano", **TINY, workers=workers)
    loader = TrainLoader(samples, recipe, 16 // world, rank=rank, world=world)
    return [parts[0]._asdict() for parts, _ in loader.steps(3, 5)]


@pytest.mark.parametrize("rank", [0, 1])
def test_workers_change_neither_views_nor_masks(samples, rank):
    alone = batches(samples, rank, world=2)
    by_workers = batches(samples, rank, world=2, workers=2)
    for a, b in zip(alone, by_workers, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in SEEN)


@pytest.mark.parametrize("name", SEEN)
def test_views_and_masks_differ_between_processes(samples, name):
    first, second = (batches(samples, rank, world=2) for rank in range(2))
    for a, b in zip(first, second, strict=True):
        assert not any(torch.equal(x, y) for x in a[name] for y in b[name])


@pytest.mark.parametrize("name", [*SEEN, "number"])
def test_two_processes_read_the_batch_of_one(samples, name):
    halves = [batches(samples, rank, world=2) for rank in range(2)]
    for step, batch in enumerate(batches(samples)):
        of_both = torch.stack([half[step][name] for half in halves], 1)
        assert torch.equal(of_both.flatten(0, 1), batch[name])


# What two processes tell each other.


def talk():
    "A tensor in shards and whole again, and rank 0's word."
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from beit_nb.engine.processes import (
        distribute_like,
        full_tensors,
        gather_over_ranks,
        mean_over_ranks,
        rank_0_first,
        sum_over_ranks,
    )

    number = torch.tensor(10.0 + rank())
    pulled = torch.tensor(2.0 + rank(), requires_grad=True)
    (sum_over_ranks(pulled).square() * (1 + rank())).backward()
    mesh = init_device_mesh("cpu", (2,))
    part = distribute_tensor(torch.arange(6), mesh, [Shard(0)])
    doubled = full_tensors({"x": distribute_like(2 * torch.arange(6), part)})["x"]
    return dict(
        sum=sum_over_ranks(number).item(),
        pull=pulled.grad.item(),
        mean=mean_over_ranks(number).item(),
        all=gather_over_ranks(rank()),
        part=part.to_local().tolist(),
        doubled=None if doubled is None else doubled.tolist(),
        word=rank_0_first(lambda: f"said by {rank()}"),
    )


@pytest.mark.slow
def test_two_processes_agree(top):
    first, second = torch.load(top / "talks.pt")

    # the sum is 5; rank 0 makes 5 ** 2 of it, rank 1 twice that: slopes 10 and 20
    expected = dict(sum=21.0, pull=30.0, mean=10.5, all=[0, 1], word="said by 0")
    for name, value in expected.items():
        assert first[name] == second[name] == value
    assert first["part"] + second["part"] == list(range(6))
    assert first["doubled"] == [0, 2, 4, 6, 8, 10] and second["doubled"] is None


# The real trainings, in any number of processes.


def train_all(top, jobs):
    """Runs several trainings, one after the other, in the same processes.

    Returns what this rank drew in three steps of two micro-batches, and what it heard (`talk`).
    """
    from typing import NamedTuple

    from beit_nb.configs import Run
    from beit_nb.engine.runs import open_run
    from beit_nb.engine.training import StepLoader, Trainer, fit
    from beit_nb.finetuning import finetune
    from beit_nb.pretraining import pretrain
    from beit_nb.recipes import recipe_named
    from beit_nb.tokenizer import train_tokenizer

    train = dict(tokenizer=train_tokenizer, pretrain=pretrain, finetune=finetune)
    for command, changes in jobs:
        train[command](recipe_named(command, "nano", **changes), quiet=True)
    draws = []

    class Ones(NamedTuple):
        x: torch.Tensor

    class OnesLoader(StepLoader):
        def steps(self, first, last):
            for _ in range(first, last):
                yield [Ones(torch.ones(2, 2))] * 2, [2, 2]

    def compute_loss(model, batch, step):
        draws.append(torch.rand(3))
        return model(batch.x).mean(), {}

    r = Run(
        out=f"{top}/draws", steps=3, batch_size=8, device_batch_size=2, precision="fp32", seed=5
    )
    with open_run("toy", r) as out:
        trainer = Trainer("toy", r, out, nn.Linear(2, 1), r.length(3 * 8), quiet=True)
        fit(trainer, OnesLoader(), compute_loss)
        heard = talk()
    return torch.stack(draws), heard


def pretraining_of(top, name, **changes):
    return TINY | dict(tokenizer=f"{top}/tokenizer", out=f"{top}/{name}") | changes


def run_alone(top, name, **changes):
    pretrain(recipe_named("pretrain", "nano", **pretraining_of(top, name, **changes)), quiet=True)


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    "A folder with a small tokenizer, the runs of one process, and those of two."
    top = tmp_path_factory.mktemp("processes")
    tokenizer = SMALL_TOKENIZER | dict(steps=10, log_every=10)
    train_tokenizer(recipe_named("tokenizer", "nano", out=f"{top}/tokenizer", **tokenizer), True)
    run_alone(top, "one")
    run_alone(top, "micro-batches", device_batch_size=4)
    run_alone(top, "half", max_steps=STEPS // 2)
    shutil.copytree(top / "half", top / "half-to-two")
    run_alone(top, "half")
    run_alone(top, "pixels-of-one", **PIXELS)
    classify = CLASSIFY | dict(init=f"{top}/one")
    finetune(recipe_named("finetune", "nano", out=f"{top}/classify-one", **classify), quiet=True)

    pretrainings = {
        "ddp": {},
        "ddp-micro-batches": dict(device_batch_size=2),
        "ddp-workers": dict(workers=2),
        "fsdp": dict(parallel="fsdp", grad_checkpointing=True),
        "fsdp-micro-batches": dict(parallel="fsdp", device_batch_size=4),
        "two-to-one": dict(parallel="fsdp", max_steps=STEPS // 2),
        "half-to-two": dict(parallel="fsdp"),
        "process": dict(loss_mean="process"),
        "pixels-of-two": PIXELS,
    }
    jobs = [("pretrain", pretraining_of(top, k, **v)) for k, v in pretrainings.items()]
    for parallel in ("ddp", "fsdp"):
        where = dict(out=f"{top}/classify-{parallel}", parallel=parallel)
        jobs.append(("finetune", classify | where))
    for workers in (0, 2):
        where = dict(out=f"{top}/tokenizer-{workers}", workers=workers)
        jobs.append(("tokenizer", SMALL_TOKENIZER | where | dict(steps=5, log_every=2)))
    draws, talks = zip(*run_distributed(train_all, str(top), jobs, needs=(talk,)))
    torch.save(draws, top / "draws.pt")
    torch.save(talks, top / "talks.pt")
    run_alone(top, "two-to-one")  # the checkpoint of two FSDP processes goes on in this one
    return top


def weights(folder, command="pretrain"):
    return load_checkpoint(folder, command)["model"]


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def rows(folder):
    return [row for row in read_log(folder) if "loss" in row]


WAYS = [
    "micro-batches",
    "half",
    "ddp",
    "ddp-micro-batches",
    "ddp-workers",
    "fsdp",
    "fsdp-micro-batches",
    "half-to-two",
    "two-to-one",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_every_way_is_the_same_training(top, name):
    """Loss and gradient norm of every step, and the weights after the last, are those of one
    process with the whole batch."""
    one = rows(top / "one")
    other = rows(top / name)
    assert [row["step"] for row in other] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "mlm_acc"):
        largest = max(1, *(abs(row[key]) for row in one))
        off = max(abs(a[key] - b[key]) for a, b in zip(one, other, strict=True))
        assert off < 1e-6 * largest, key
    assert largest_difference(weights(top / name), weights(top / "one")) < 1e-6


@pytest.mark.slow
def test_the_switches_too(top):
    "Pixels of all patches, and masks of another kind."
    one, two = (rows(top / f"pixels-of-{n}") for n in ("one", "two"))

    for a, b in zip(one, two, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-6 and "mlm_acc" not in b
    assert largest_difference(weights(top / "pixels-of-two"), weights(top / "pixels-of-one")) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_fine_tuning_too(top, parallel):
    folders = [top / "classify-one", top / f"classify-{parallel}"]
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in folders)
    model, other = (weights(folder, "finetune") for folder in folders)

    assert largest_difference(model, other) < 1e-6
    assert one["accuracy"] == two["accuracy"]
    assert abs(one["curve"][-1][1] - two["curve"][-1][1]) < 1e-9


@pytest.mark.slow
def test_the_mean_of_means_is_another_training(top):
    "loss_mean 'process', the official code's: so the test above can tell the difference."
    assert largest_difference(weights(top / "process"), weights(top / "one")) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "ddp", "fsdp"])
def test_metrics_are_global(top, name):
    "One log for all; metrics.json counts the pictures of every process."
    metrics = json.loads((top / name / "metrics.json").read_text())

    assert metrics["images"] == STEPS * 16
    assert [p.name for p in (top / name).glob("log*")] == ["log.jsonl"]
    assert len(rows(top / name)) == STEPS


@pytest.mark.slow
def test_chance_differs_per_rank_and_follows_the_seed(top):
    first, second = torch.load(top / "draws.pt")

    assert first.shape == second.shape == (6, 3)
    different = {tuple(draw) for draw in torch.cat([first, second]).tolist()}
    assert len(different) == 12, "every micro-batch of every process draws its own"


@pytest.mark.slow
def test_workers_change_no_gumbel_noise(top):
    with_workers = weights(top / "tokenizer-2", "tokenizer")
    without = weights(top / "tokenizer-0", "tokenizer")
    assert largest_difference(with_workers, without) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("quick_starts")
def test_a_batch_that_cannot_be_divided(top):
    "One line, exit status 2 in the process that says it, nobody waits, nothing is left behind."
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--batch-size", "33", "--tokenizer", top / "tokenizer", "--out", top / "odd"]

    ended = run(
        *[*torchrun, "--nproc-per-node=2", "-m", "beit_nb", "pretrain", "nano", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        ok=None,
    )

    [line] = [x for x in ended.stderr.splitlines() if x.startswith("beit: error:")]
    assert "batch_size 33" in line and "2 processes" in line
    assert ended.returncode != 0 and "exitcode  : 2 " in ended.stderr
    before_torchrun_speaks = ended.stderr.split("torch/distributed/elastic")[0]
    assert 'Traceback (most recent call last):\n  File "/' not in before_torchrun_speaks
    assert not (top / "odd" / "config.json").exists()


def killed_once(folder, changes):
    "The real pre-training, in which rank 1 kills itself after step 8 of its first life."
    from beit_nb.engine import training
    from beit_nb.pretraining import pretrain
    from beit_nb.recipes import recipe_named

    train_step = training.train_step
    first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def deadly(trainer, *args):
        if first_life and trainer.step == 8 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(trainer, *args)

    training.train_step = deadly
    pretrain(recipe_named("pretrain", "nano", out=folder, **changes), quiet=True)
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"])


@pytest.mark.slow
@pytest.mark.usefixtures("quick_starts")
def test_a_killed_process_comes_back(top):
    """--max-restarts: the second life goes on from the checkpoint of step 6, and ends with the
    very weights of the run that nobody killed."""
    changes = TINY | dict(tokenizer=str(top / "tokenizer"))

    lives = run_distributed(killed_once, str(top / "killed"), changes, restarts=1)

    assert lives == [1, 1]
    assert largest_difference(weights(top / "killed"), weights(top / "ddp")) == 0
    assert [row["step"] for row in rows(top / "killed")] == list(range(1, STEPS + 1))


def test_refusals_of_rank_0_are_waited_for():
    from beit_nb.engine.processes import refused_by_rank_0

    store = torch.distributed.HashStore()
    store.set("refused", "")
    assert refused_by_rank_0(store)


def test_nothing_is_joined_twice(monkeypatch):
    "Inside of a group, or without torchrun, join_processes starts nothing."
    import beit_nb.engine.processes as processes

    def forbidden():
        raise AssertionError("a group was started")

    monkeypatch.setattr(processes, "_start_process_group", forbidden)
    inside = SimpleNamespace(is_initialized=lambda: True)
    with join_processes():
        pass
    monkeypatch.setattr(processes, "dist", inside)
    with join_processes():
        pass
