"Schedules, parameter groups, micro-batches and averages, against numbers from outside."

import numpy as np
import pytest
import torch
from timm.models.beit import Beit
from timm.optim import param_groups_layer_decay
from torch import nn

import beit_nb.engine.optim as optim
from beit_nb import BeitError
from beit_nb.configs import Run, TokenizerRecipe
from beit_nb.engine.optim import (
    Ema,
    build_optimizer,
    cosine_schedule,
    layer_id,
    loss_weights,
    micro_batch_size,
    param_groups,
    placement_of,
    recipe_schedule,
    warmup_length,
    warn_if_only_rising,
)
from beit_nb.task_configs import SegmentRecipe


def test_the_papers_schedule():
    "Table 12: 800 epochs of 625 steps, 10 of them warm-up."
    lr = cosine_schedule(1.5e-3, 1e-5, 800, 625, warmup_epochs=10)

    assert len(lr) == 500_000 and lr[0] == 0
    assert lr[6_249] == lr[6_250] == lr.max() == 1.5e-3
    assert (np.diff(lr[6_250:]) < 0).all() and 1e-5 < lr[-1] < 1.00001e-5
    half_way = 6_250 + (500_000 - 6_250) // 2
    assert lr[half_way] == pytest.approx((1.5e-3 + 1e-5) / 2)


def test_the_official_log():
    "The authors logged 1.0015e-5 as the mean of their last of 300 epochs (unilm#383)."
    lr = cosine_schedule(1.5e-3, 1e-5, 300, 625, warmup_epochs=10)
    assert f"{lr[-625:].mean():.4e}" == "1.0015e-05"


def test_as_torchs_cosine():
    "Without warm-up: torch's CosineAnnealingLR."
    ours = cosine_schedule(0.1, 0.01, 1, 50)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50, eta_min=0.01)
    for lr in ours:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("steps, warm", [(5, 9), (5, 5), (5, 0), (1, 0), (1, 1)])
def test_schedules_of_short_trainings(steps, warm):
    "As long as the training, whatever the warm-up."
    lr = cosine_schedule(1.0, 0.0, 1, steps, warmup_steps=warm)
    assert len(lr) == steps and np.isfinite(lr).all()
    assert lr[0] == (0 if warm else 1)


def test_a_warm_up_in_steps_wins_over_one_in_epochs():
    by_epochs = warmup_length(None, 2.04, steps_per_epoch=10)
    by_steps = warmup_length(7, 2.04, steps_per_epoch=10)
    none = warmup_length(0, 2.04, steps_per_epoch=10)

    assert (by_epochs, by_steps, none) == (20, 7, 0)


@pytest.mark.parametrize("warm, said", [(101, True), (8, True), (4, False)])
def test_a_rate_that_only_rises_is_said(capsys, warm, said):
    warn_if_only_rising(Run(warmup_steps=warm), total=8, per_epoch=1)
    assert ("only rises" in capsys.readouterr().err) == said


def test_a_straight_line_falls_from_its_first_step_on(capsys):
    "So it never only rises, however long its warm-up is."
    warn_if_only_rising(SegmentRecipe(warmup_steps=9), total=8, per_epoch=1)
    assert capsys.readouterr().err == ""


def test_each_training_has_its_decay():
    "Half a cosine; one that ends with lr_steps; mmcv's line, which a recipe may exchange."
    shared = dict(lr=1.0, min_lr=0.1, warmup_steps=10)
    run, early, line, cosine = (
        recipe_schedule(recipe, 100, 10)[:]
        for recipe in (
            Run(**shared),
            TokenizerRecipe(**shared, lr_steps=40),
            SegmentRecipe(**shared),
            SegmentRecipe(**shared, schedule="cosine"),
        )
    )

    assert (run == cosine_schedule(1.0, 0.1, 10, 10, warmup_steps=10)).all()
    assert (early[:40] == cosine_schedule(1.0, 0.1, 4, 10, warmup_steps=10)).all()
    assert (early[40:] == 0.1).all()
    assert np.allclose(np.diff(line[10:]), -0.9 / 100)
    assert (cosine == run).all()


@pytest.fixture(scope="module")
def timms_beit():
    return Beit(img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=2, use_abs_pos_emb=True)


def sorting(model, groups):
    "The name of every parameter -> its rate and its decay."
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.mark.parametrize("layer_decay", [0.5, 0.65, 1.0])
def test_parameters_are_sorted_as_in_timm(timms_beit, layer_decay):
    theirs = param_groups_layer_decay(
        timms_beit, 0.05, timms_beit.no_weight_decay(), layer_decay=layer_decay
    )
    ours = param_groups(timms_beit, 0.05, layer_decay)
    assert sorting(timms_beit, ours) == sorting(timms_beit, theirs)
    assert len(sorting(timms_beit, ours)) == len(list(timms_beit.parameters()))


def test_without_layer_decay_there_are_two_groups(timms_beit):
    groups = param_groups(timms_beit, 0.05)
    assert sorted(g["weight_decay"] for g in groups) == [0.0, 0.05]
    assert all(g["lr_scale"] == 1 for g in groups)


def test_frozen_parameters_stay_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    params = [p for g in param_groups(model, 0.05) for p in g["params"]]
    assert {id(p) for p in params} == {id(p) for p in model[1].parameters()}


def test_the_layer_of_a_name():
    names = ["cls_token", "mask_token", "pos_embed", "patch_embed.proj.weight"]
    names += ["blocks.0.norm1.weight", "blocks.11.mlp.fc2.bias"]
    names += ["rel_pos_bias.relative_position_bias_table", "fc_norm.weight", "lm_head.weight"]
    assert [layer_id(name, 12) for name in names] == [0, 0, 0, 0, 1, 12, 13, 13, 13]


@pytest.mark.parametrize(
    "batch, device_batch, world, size",
    [
        (2048, None, 1, 2048),
        (2048, None, 16, 128),
        (2048, 64, 16, 64),
        (8, 99, 2, 4),
        (1, None, 1, 1),
    ],
)
def test_what_a_process_takes_at_once(batch, device_batch, world, size):
    assert micro_batch_size(batch, device_batch, world) == size


@pytest.mark.parametrize(
    "batch, device_batch, world, words",
    [
        (2048, None, 12, "12 processes that take 170 .* set --batch-size 2040"),
        (2048, 100, 1, "1 process that takes 100 .* set --batch-size 2000"),
        (3, None, 4, "4 processes that take 1 .* set --batch-size 4"),
    ],
)
def test_a_batch_that_cannot_be_cut_evenly_is_refused(batch, device_batch, world, words):
    with pytest.raises(BeitError, match=f"batch_size {batch} cannot be reached with {words}"):
        micro_batch_size(batch, device_batch, world)


COUNTS = [[4, 6], [30]]  # micro-batches of two processes


def gradient_of_step(loss_mean):
    "Weighed in each process, averaged over both, by hand."
    torch.manual_seed(0)
    w = torch.ones(5, requires_grad=True)
    data = [[torch.randn(n, 5) for n in counts] for counts in COUNTS]
    per_process = []
    for parts, counts in zip(data, COUNTS):
        weights = loss_weights(counts, 40, 2, loss_mean)
        loss = sum(k * (x @ w).square().mean() for k, x in zip(weights, parts))
        per_process.append(torch.autograd.grad(loss, w)[0])
    everything = (torch.cat([x for parts in data for x in parts]) @ w).square().mean()
    return sum(per_process) / 2, torch.autograd.grad(everything, w)[0]


def test_a_batch_in_parts_has_the_gradient_of_the_whole():
    in_parts, whole = gradient_of_step("global")
    torch.testing.assert_close(in_parts, whole)


def test_the_mean_of_means_has_not():
    in_parts, whole = gradient_of_step("process")
    assert (in_parts - whole).abs().max() > 0.05
    assert loss_weights([4, 6], 40, 2, "process") == [0.4, 0.6]


@pytest.mark.parametrize("loss_mean", ["global", "process"])
def test_a_mean_over_nothing_is_refused(loss_mean):
    "Every mask of the step is empty; in pre-training the counts are hidden patches."
    with pytest.raises(BeitError, match="nothing to learn from"):
        loss_weights([0, 0], 0, 1, loss_mean)


def test_an_average_is_torchs_sum_by_hand():
    model = nn.Linear(3, 2)
    ema = Ema(model, decay=0.9)
    want = None
    for _ in range(5):
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p))
        ema.update(model)
        now = model.weight.detach().clone()
        want = now if want is None else 0.9 * want + 0.1 * now
    torch.testing.assert_close(ema.module.weight, want)
    assert not ema.module.weight.equal(model.weight)


def test_an_average_is_bit_for_bit_that_of_torch():
    model = nn.BatchNorm1d(3)  # with buffers
    ours, theirs = Ema(model, decay=0.999), Ema(model, decay=0.999)
    for _ in range(4):
        model(torch.randn(8, 3))
        with torch.no_grad():
            model.weight.normal_()
        ours.update(model)
        theirs.update_parameters(model)

    assert ours.n_averaged == 4
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


def test_an_average_survives_a_stop():
    torch.manual_seed(0)
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    ema = Ema(models[0], decay=0.9)
    ema.update(models[0])

    again = Ema(models[1], decay=0.9)
    again.load_state_dict(ema.state_dict())
    ema.update(models[1])
    again.update(models[1])

    assert torch.equal(ema.module.weight, again.module.weight)
    assert again.n_averaged == 2


def test_a_schedule_has_no_table():
    "A thousand million steps: what is asked is computed, and is what a table would say."
    recipe = Run(lr=2e-3, min_lr=1e-5, warmup_steps=20)
    short = recipe_schedule(recipe, 100, 10)
    table = cosine_schedule(2e-3, 1e-5, 10, 10, warmup_steps=20)
    long = recipe_schedule(recipe, 10**9, 10)

    assert [short[i] for i in range(100)] == table.tolist() == list(short)
    assert (np.asarray(short) == table).all() and (short[7:90:3] == table[7:90:3]).all()
    assert (short[np.array([3, 99])] == table[[3, 99]]).all() and short[-1] == table[-1]
    assert len(long) == 10**9 and long[19] == long[20] == 2e-3 and long[-1] == pytest.approx(1e-5)
    with pytest.raises(IndexError):
        short[100]


def test_the_optimizer_is_the_papers():
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    optimizer = build_optimizer(model, Run(beta2=0.98))

    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.98) and optimizer.defaults["eps"] == 1e-8
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.05, 0.0]


def test_shards_do_not_go_with_fp16(monkeypatch):
    monkeypatch.setattr(optim, "world_size", lambda: 2)
    monkeypatch.setattr(optim, "pick_precision", lambda *_: torch.float16)

    assert not placement_of(Run()).sharded
    with pytest.raises(BeitError, match="does not go with fp16; set --precision bf16 or"):
        placement_of(Run(parallel="fsdp"))
