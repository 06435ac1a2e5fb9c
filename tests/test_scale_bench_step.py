"One pre-training step, three ways. No time is asserted: the machine is not ours alone."

import math

import pytest
import torch

from beit_nb import BeitError
from beit_nb.layouts import to_official
from beit_nb.mim import masked_indices
from beit_nb.recipes import recipe_named
from beit_nb.scale import bench_step as b
from beit_nb.scale.flops import flops_per_image
from beit_nb.scale.peers import TINY_SHAPE, masks_on_device

STAGES = ["tokenizer", "forward", "backward", "optimizer"]


class Ticks:
    "A clock that moves by one second whenever it is read."

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


def made(name, mode="fp32", batch=4, clock=None):
    if name == "hf":
        pytest.importorskip("transformers")
    step = b.STEPS[name](TINY_SHAPE, batch, clock=clock)
    step.set_mode(mode)
    return step


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,mode",
    [
        ("official", "fp32"),
        ("official", "bf16"),
        ("hf", "fp32"),
        ("ours", "fp32"),
        ("ours", "bf16"),
        ("ours", "bf16 all"),
    ],
)
def test_a_step_learns(name, mode, precision_restored):
    "It starts at the loss of knowing nothing, and on the same pictures the loss falls."
    s = made(name, mode)
    for group in s.optimizer.param_groups:
        group["lr"] = 3e-3

    losses = [b.run_step(s).item() for _ in range(8)]

    assert abs(losses[0] - math.log(64)) < 0.2
    assert losses[-1] < 0.7 * losses[0]


def test_all_get_the_same_pictures_mask_and_tokenizer():
    official, ours, theirs = made("official"), made("ours"), made("hf")

    for s in (ours, theirs):
        for name in ("patch_view", "token_view", "mask"):
            assert torch.equal(getattr(s, name), getattr(official, name))
        for mine, other in zip(s.encoder.parameters(), official.encoder.parameters()):
            assert torch.equal(mine, other)


def test_with_the_same_weights_all_have_the_same_targets_and_loss(precision_restored):
    official, ours, theirs = made("official"), made("ours"), made("hf")
    weights = to_official(theirs.model.state_dict())
    for model in (official.model.model, ours.model):
        assert not model.load_state_dict(weights, strict=False).unexpected_keys
    found = []
    for s in (official, ours, theirs):
        s.model.eval()  # no drop path
        mask, masked_index = masks_on_device(s.mask, s.device)
        targets = s.targets(mask, masked_index)
        found.append((targets, s.loss(mask, masked_index, targets)))

    assert len(found[0][0]) == official.mask.sum()
    for targets, loss in found[1:]:
        assert torch.equal(targets, found[0][0])
        torch.testing.assert_close(loss, found[0][1], atol=1e-5, rtol=1e-5)


def test_only_ours_changes_the_tokenizer_in_bf16_all():
    made_so = [made(name, "bf16 all").tokenizer_dtype for name in ("official", "ours")]

    assert made_so == [None, torch.bfloat16]


def test_modes_share_a_model_and_change_the_tokenizer():
    steps = b.build_steps(TINY_SHAPE, 2, torch.device("cpu"), Ticks())

    fp32, half, whole = (steps[f"ours, {mode}"] for mode in ("fp32", "bf16", "bf16 all"))
    assert fp32.model is half.model is whole.model
    assert fp32.tokenizer_dtype is half.tokenizer_dtype is None
    assert whole.tokenizer_dtype is torch.bfloat16
    assert all(step.times == {} and step.optimizer.state for step in steps.values())
    dtypes = {p.dtype for p in fp32.dvae.parameters()}
    assert dtypes == {torch.float32}  # the half-precision one is a copy


def test_who_is_not_installed_is_left_out(monkeypatch, capsys):
    def missing(*args):
        raise BeitError("no such model here")

    monkeypatch.setitem(b.STEPS, "hf", missing)
    steps = b.build_steps(TINY_SHAPE, 2, torch.device("cpu"), None)

    assert not [name for name in steps if name.startswith("hf")]
    assert capsys.readouterr().out == "without hf: no such model here\n"


def test_the_clock_is_read_after_each_stage():
    s = made("ours", clock=Ticks())

    b.run_step(s)

    assert s.times == {stage: [i] for i, stage in enumerate(["start", *STAGES], 1)}


def test_the_models_operators_are_sorted_and_leave_no_gradient():
    s = made("ours")

    kinds = b.model_seconds(s)

    assert list(kinds) == ["products", "attention", "rest", "between"]
    assert all(kinds[name] > 0 for name in ("products", "attention", "rest"))
    assert all(p.grad is None for p in s.model.parameters())


def test_one_picture_is_given_back_also_after_an_error():
    s = made("official")
    whole = s.patch_view, s.token_view, s.mask
    with pytest.raises(RuntimeError), b.one_picture(s):
        assert len(s.patch_view) == len(s.token_view) == len(s.mask) == 1
        raise RuntimeError

    assert all(x is y for x, y in zip(whole, (s.patch_view, s.token_view, s.mask)))


def test_work_is_what_the_formulas_say():
    "The official step at a tiny size; ours leaves out what nobody reads."
    official, ours = made("official", batch=1), made("ours", batch=1)
    hidden = len(masked_indices(official.mask))
    size = TINY_SHAPE | dict(num_mask_patches=hidden, token_size=64)
    r = recipe_named("pretrain", "base-plus-in1k", **size)

    flops = b.flops_of_step(official)

    assert flops[1] == flops_per_image(r).model
    assert all(0 < mine < theirs for mine, theirs in zip(b.flops_of_step(ours), flops))
    assert all(p.grad is None for p in official.model.parameters()) and official.model.training


def test_each_part_has_the_floor_of_its_precision():
    peaks = dict(fp32=1.0, bf16=2.0)
    floors = [b.floor_seconds(made("ours", mode, 2), (3, 8), peaks) for mode in ("fp32", "bf16")]
    floors.append(b.floor_seconds(made("ours", "bf16 all", 2), (3, 8), peaks))

    assert floors == [2 * (3 + 8), 2 * (3 + 4), 2 * (1.5 + 4)]


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    assert 0 < b.step_memory("ours", "fp32", batch=2, shape=TINY_SHAPE) < 1000
