"A training that names pixels: scored as torchmetrics does, stopped, in two processes, in parts."

import json
import multiprocessing
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_processes import PATIENCE, torchrun_environment
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from beit_nb import BeitError
from beit_nb.engine.optim import recipe_schedule
from beit_nb.engine.processes import (
    join_processes,
    mean_over_ranks,
    rank,
    sum_over_ranks,
    world_size,
    wrap_model,
)
from beit_nb.engine.runs import load_checkpoint
from beit_nb.images import MEAN_STD
from beit_nb.label_maps import open_label_maps
from beit_nb.mask_views import MapView
from beit_nb.networks import NETS
from beit_nb.recipes import recipe_named
from beit_nb.segheads import segmentation_loss, share_norms
from beit_nb.segmentation import (
    BeitForSemanticSegmentation,
    confusion_table,
    picture_counts,
    segmentation_scores,
)
from beit_nb.segmenting import (
    build_segmenter,
    class_scores,
    confusion_share,
    score_maps,
    segment,
)
from beit_nb.task_configs import SegmentRecipe

FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.usefixtures("pages_unpainted")
torch.set_num_threads(1)
FEW = 24  # pictures of the held-out digits in these tests


@pytest.fixture(scope="module")
def few_digits():
    "The embedded digits, of which only a few are held out, so that scores take no time."
    patch = pytest.MonkeyPatch()
    opened = {split: open_label_maps("digits", split) for split in ("train", "val")}
    opened["val"].length = FEW
    patch.setattr("beit_nb.segmenting.open_label_maps", lambda data, split, zero: opened[split])
    yield opened
    patch.undo()


def tiny(out, **changes):
    fields = dict(
        data="digits", out=str(out), img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2,
        weight_init="xavier", mean_std="beit", scale=(32, 32), ratio_range=None, cat_max_ratio=1.0,
        photometric=False, flip=0.5, head="setr_pup", channels=8, steps=4, batch_size=4,
        lr=3e-3, min_lr=0.0, warmup_steps=1, precision="fp32", labelled=40, eval_every=2,
    )  # fmt: skip
    return SegmentRecipe(**fields | changes)


def model_of(out):
    return load_checkpoint(out)["model"]


def assert_same_weights(one, two):
    assert one.keys() == two.keys()
    assert [n for n in one if not torch.equal(one[n], two[n])] == []


# The scores.


def test_scores_are_those_of_torchmetrics():
    g = torch.Generator().manual_seed(3)
    truth = torch.randint(0, 7, (4, 30, 20), generator=g)
    answers = torch.where(torch.rand(4, 30, 20, generator=g) < 0.6, truth, (truth + 1) % 7)
    truth[truth == 5] = 255  # a class that does not occur, but is answered
    answers[answers == 6] = 0
    truth[truth == 6] = 0  # one that neither occurs nor is answered

    table = confusion_table(answers, truth, 7)

    scores = segmentation_scores(table)
    theirs = MulticlassJaccardIndex(7, average="none", ignore_index=255)(answers, truth)
    ours = {row["class"]: row["IoU"] for row in class_scores(table, "abcdefg")}
    assert set(ours) == set("abcdef")  # torchmetrics says 0 of the one that is nowhere
    torch.testing.assert_close(torch.tensor(list(ours.values())).float(), theirs[:6])
    assert ours["f"] == 0 and scores["mIoU"] == pytest.approx(theirs[:6].mean().item())
    accuracy = MulticlassAccuracy(7, average="none", ignore_index=255)(answers, truth)
    there = [0, 1, 2, 3, 4]
    assert scores["mAcc"] == pytest.approx(accuracy[there].mean().item())
    whole = MulticlassAccuracy(7, average="micro", ignore_index=255)(answers, truth)
    assert scores["aAcc"] == pytest.approx(whole.item())


def test_scores_of_processes_add_up(few_digits):
    "Tables of the two halves of a set are the table of the set."
    maps = few_digits["val"]
    model = build_segmenter(tiny("x"), 11).eval()
    how = MapView(32, (32, 32)), MEAN_STD["beit"], "fp32"

    whole = score_maps(model, maps, *how)

    assert whole.table.dtype == torch.int64 and whole.table.sum() == FEW * 32 * 32
    assert torch.equal(whole.pictures.sum(0), picture_counts(whole.table))
    few = confusion_share(model, maps, *how, most=6)
    assert few.table.sum() == 6 * 32 * 32 and few.pictures.shape == (6, 3, 11)
    assert few.pictures[:, 1].sum(1).tolist() == [32 * 32] * 6


def test_shares_of_two_processes_hold_other_pictures(few_digits, monkeypatch):
    "What one process leaves at zero the other counts, unreadable pictures neither."
    maps = few_digits["val"]
    model = build_segmenter(tiny("x"), 11).eval()
    how = MapView(32, (32, 32)), MEAN_STD["beit"], "fp32"
    whole = score_maps(model, maps, *how)
    shares = []
    monkeypatch.setattr("beit_nb.mask_views.world_size", lambda: 2)
    for number in (0, 1):
        monkeypatch.setattr("beit_nb.mask_views.rank", lambda number=number: number)
        shares.append(confusion_share(model, maps, *how))

    assert torch.equal(sum(share.pictures for share in shares), whole.pictures)
    assert all(0 < share.pictures[:, 1].sum() < FEW * 32 * 32 for share in shares)


# The schedule.


def test_the_rate_is_mmcvs():
    "poly with power 1, linear warm-up from a ratio of 1e-6 (mmcv's PolyLrUpdaterHook)."
    r = SegmentRecipe(lr=7e-4, min_lr=0.0, warmup_steps=1500)
    ours = recipe_schedule(r, 160_000, 100)
    for step in (0, 1, 750, 1499, 1500, 80_000, 159_999):
        regular = (7e-4 - 0.0) * (1 - step / 160_000) ** 1.0 + 0.0
        k = (1 - step / 1500) * (1 - 1e-6)
        theirs = regular if step >= 1500 else regular * (1 - k)
        assert ours[step] == pytest.approx(theirs, rel=1e-3, abs=1e-9)
    bare = recipe_schedule(replace(r, warmup_steps=0), 10, 1)
    assert np.allclose(bare[:], 7e-4 * (1 - np.arange(10) / 10))


# The training.


def test_stopped_and_continued_is_the_same(few_digits, tmp_path):
    "Weights, the buffers of batch norm and the scores, bit for bit."
    whole = segment(tiny(tmp_path / "one"), quiet=True)
    for max_steps in (3, None):
        m = segment(tiny(tmp_path / "two", max_steps=max_steps), quiet=True)

    assert m["finished"] and m["mIoU"] == whole["mIoU"] and m["per_class"] == whole["per_class"]
    one, two = (model_of(tmp_path / name) for name in ("one", "two"))
    assert_same_weights(one, two)
    assert one["decode_head.convs.0.bn.running_var"].ne(1).any()
    assert one["decode_head.convs.0.bn.num_batches_tracked"] == 4
    assert [step for step, _ in m["curve"]] == [2, 4]
    again = segment(tiny(tmp_path / "two"), quiet=True)  # nothing is left to do
    assert json.loads(json.dumps(m)) == again


def in_one_of_two(recipe, env):
    "The body of a child: one process of two."
    os.environ.update(env)
    with join_processes():
        segment(recipe, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_two_processes_are_one(few_digits, tmp_path, norm):
    "Batch norms see the pictures of both. Where nothing is dropped by chance, as in each process."
    form = dict(norm=norm, steps=2, drop_path_rate=0.0)
    alone = segment(tiny(tmp_path / "alone", **form), quiet=True)
    recipe = tiny(tmp_path / "together", **form)
    family = [
        FORK.Process(target=in_one_of_two, args=(recipe, env)) for env in torchrun_environment(2)
    ]
    for process in family:
        process.start()
    for process in family:
        process.join(PATIENCE)

    assert [process.exitcode for process in family] == [0, 0]
    together = json.loads((tmp_path / "together" / "metrics.json").read_text())
    assert together["mIoU"] == pytest.approx(alone["mIoU"], abs=1e-3)
    one, two = (model_of(tmp_path / name) for name in ("alone", "together"))
    moved = model_of(tmp_path / "alone")["decode_head.conv_seg.weight"].abs().max()
    assert moved > 1e-3
    for name, w in one.items():
        # Adam's steps of 3e-3 divide by gradients that may be rounding alone
        torch.testing.assert_close(two[name], w, rtol=1e-4, atol=1e-5, msg=name)


def three_steps(head, dtype):
    "Of three steps of Adam: losses, gradients, running statistics, weights, each as one vector."
    torch.manual_seed(0)
    form = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    model = BeitForSemanticSegmentation(11, head, channels=8, **form).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0  # each process would drop others
    if world_size() > 1:
        share_norms(model, sum_over_ranks)
    g = torch.Generator().manual_seed(1)
    images = torch.randn(3, 8, 3, 32, 32, generator=g).to(dtype)
    labels = torch.randint(0, 11, (3, 8, 32, 32), generator=g)

    def compute_loss(model, batch, step):
        return segmentation_loss(model(images[step, batch], True), labels[step, batch]), {}

    forward = wrap_model(model, compute_loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    share = 8 // world_size()
    seen = []
    for step in range(3):
        optimizer.zero_grad()
        loss, _ = forward(slice(share * rank(), share * (rank() + 1)), step)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        optimizer.step()
        told = [mean_over_ranks(loss.detach())], gradients, model.buffers(), model.parameters()
        seen.append([torch.cat([x.detach().double().flatten() for x in xs]) for xs in told])
    return seen


CASES = [(head, dtype) for head in ("setr_pup", "upernet") for dtype in ("float32", "float64")]


def every_case():
    return {case: three_steps(case[0], getattr(torch, case[1])) for case in CASES}


def one_of_two(out, env):
    "The body of a child: what one process of two has learnt."
    os.environ.update(env)
    with join_processes():
        seen = every_case()
        if rank() == 0:
            torch.save(seen, out)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*broadcast_buffers")
def test_a_step_of_two_processes_is_that_of_one(tmp_path):
    """Loss, gradients and running statistics within 1e-6 in single precision, 1e-13 in double.

    What Adam makes of the rounding in three steps is larger in single precision, and only there.
    """
    family = [
        FORK.Process(target=one_of_two, args=(tmp_path / "two", env))
        for env in torchrun_environment(2)
    ]
    for process in family:
        process.start()
    for process in family:
        process.join(PATIENCE)

    assert [process.exitcode for process in family] == [0, 0]
    two = torch.load(tmp_path / "two")
    for case, alone in every_case().items():
        apart = [
            [((a - b).norm() / b.norm()).item() for a, b in zip(*pair)]
            for pair in zip(two[case], alone)
        ]
        print(*case, *([f"{x:.1e}" for x in step] for step in apart))
        most = 1e-6 if case[1] == "float32" else 1e-13
        assert max(apart[0][:3]) < most, case
        assert max(apart[-1]) < 100 * most, case


def momentum(out):
    "The first moments of a run's Adam, one after the other: after one step, its gradient."
    moments = load_checkpoint(out)["optimizer"]["state"].values()
    return torch.cat([of_one["exp_avg"].flatten() for of_one in moments])


def test_parts_of_a_step(few_digits, tmp_path):
    "With group norm a step in parts is the step; with batch norm the parts see less."
    distance = {}
    for norm in ("group", "batch"):
        steps = dict(norm=norm, steps=1, lr=1e-3, warmup_steps=0, drop_path_rate=0.0)
        segment(tiny(tmp_path / f"{norm}-whole", **steps), quiet=True)
        segment(tiny(tmp_path / f"{norm}-parts", device_batch_size=2, **steps), quiet=True)
        one, two = (momentum(tmp_path / f"{norm}-{how}") for how in ("whole", "parts"))
        distance[norm] = (one - two).norm() / one.norm()

    assert distance["group"] < 1e-5 < 1e-2 < distance["batch"]


def test_from_pre_trained_weights(few_digits, tmp_path):
    "The body is the checkpoint's, and so is the first score, whatever the seed of the body."
    r = recipe_named("segment", "nano", init=str(NETS / "mim.safetensors"), out=str(tmp_path / "a"))
    segment(replace(r, steps=1, lr=1e-9, min_lr=0.0, warmup_steps=0), quiet=True)

    from beit_nb.checkpoints import load_weights

    there = load_weights(NETS / "mim.safetensors").state
    here = model_of(tmp_path / "a")
    for name in ("blocks.3.mlp.fc1.weight", "patch_embed.proj.weight", "pos_embed"):
        torch.testing.assert_close(here[name], there[name].float(), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(labelled=4000), "labelled 4000 asks for more than 3600"),
        (dict(head="upernet", batch_size=1), "two pictures at once"),
        (dict(head="upernet", device_batch_size=1), "--norm group"),
        (dict(batch_size=64), "larger than the data set of 40"),
        (dict(init=str(NETS / "mim.safetensors")), "patch_size is 4"),
        (dict(init="nowhere.pth"), "nowhere.pth"),
    ],
)
def test_refused_before_the_first_step(few_digits, tmp_path, changes, words):
    with pytest.raises(BeitError, match=words):
        segment(tiny(tmp_path / "run", **changes), quiet=True)

    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_rehearsal(few_digits, tmp_path):
    m = segment(tiny(tmp_path / "run", dry_run=True, steps=50), quiet=True)

    assert not m["finished"] and m["steps"] == 2 and "per_class" not in m
