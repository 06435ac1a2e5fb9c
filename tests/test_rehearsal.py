"""The steps of all trainings as a GPU would run them, without a GPU and without numbers."""

import json
from dataclasses import replace
from inspect import signature

import gpu
import pytest
import torch
import torch.distributed as dist
from rehearsal import (
    FIXTURE,
    LISTED,
    TRAININGS,
    Memory,
    Sent,
    faults,
    made_up_gradients,
    measured,
    name_of,
    on_paper,
    on_pretended_gpu,
    operator_list,
    pretraining,
    rehearse,
    rehearsed,
    torch_version,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from beit_nb.device import KERNELS, default_device, pick_precision
from beit_nb.engine.loading import PretrainBatch
from beit_nb.engine.processes import wrap_model
from beit_nb.engine.trainer import Trainer
from beit_nb.engine.training import train_step
from beit_nb.mim import mim_loss
from beit_nb.pretraining import PretrainLoss, add_masked_indices, build_mim
from beit_nb.recipes import recipe_named
from beit_nb.scale.flops import flops_per_image
from beit_nb.scale.hours import HARDWARE
from beit_nb.scale.memory import training_memory
from beit_nb.scale.plan import plan_training
from beit_nb.targets import TableTargets

LARGE = pytest.param("large-plus-in22k", marks=pytest.mark.slow)


def count(calls, name):
    return sum(name_of(call).startswith(name) for call in calls)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", TRAININGS)
def test_a_step_on_a_gpu_neither_waits_nor_strays(name, precision):
    training = TRAININGS[name](precision=precision)

    calls = rehearsed(name, on_pretended_gpu, precision)

    assert faults(calls, training) == []
    assert count(calls, "_fused_adamw") == 2  # with weight decay and without
    assert count(calls, "_amp_update_scale") == (precision == "fp16")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_a_step_with_its_backward_pass_keeps_to_its_types(name):
    training = TRAININGS[name](precision="bf16")

    calls = rehearsed(name, on_paper)

    assert faults(calls, training) == []
    if training.command == "finetune":  # a product for the input, and one for the weights
        assert count(calls, "mm") == 2 * count(calls, "addmm")


def careless(stage, how):
    "A step of pre-training whose loss does something that it should not."
    training = TRAININGS["pretrain, BEiT+, table"](precision="bf16", depth=2)
    make_loss = training.loss

    def loss_of(stage):
        loss = make_loss(stage)

        def worse(model, batch, step):
            value, metrics = loss(model, batch, step)
            return how(value, model, batch), metrics

        return worse

    training = training._replace(loss=loss_of)
    rehearse(stage, training, steps=1)
    return faults(stage.calls, training)


@pytest.mark.parametrize(
    "how, says",
    [
        (lambda loss, model, batch: loss + loss.cpu().to(loss.device), "back to the host"),
        (lambda loss, model, batch: loss * loss.new_tensor(2.0), "the host waits"),
        (lambda loss, model, batch: loss[None].double()[0].float(), "fp64"),
    ],
)
def test_what_strays_is_found(how, says):
    with on_pretended_gpu() as stage:
        found = careless(stage, how)

    assert any(says in fault for fault in found)


def with_a_product_in_fp32(loss, model, batch):
    with torch.autocast(batch.mask.device.type, enabled=False):
        weight = model.lm_head.weight
        return loss + (weight @ weight.T)[0, 0]


def test_a_product_in_fp32_is_found():
    with on_paper() as stage:
        found = careless(stage, with_a_product_in_fp32)

    assert any("a product in fp32: mm" in fault for fault in found)


@pytest.mark.parametrize(
    "how",
    [
        lambda loss, model, batch: loss * loss.item(),
        lambda loss, model, batch: loss + len(batch.mask.nonzero()),
        lambda loss, model, batch: loss if loss > 0 else -loss,
    ],
)
def test_a_step_that_waits_for_the_gpu_is_refused(how):
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
    )

    with on_pretended_gpu() as stage:
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            careless(stage, how)


def test_host_and_device_do_not_mix():
    with on_pretended_gpu() as stage:
        with pytest.raises(RuntimeError, match="same device"):
            careless(stage, lambda loss, model, batch: loss + torch.ones(2))


def test_the_pretended_gpu_is_gone_afterwards():
    before = default_device()
    with on_pretended_gpu():
        assert default_device() == torch.device("cuda", 0)

    assert default_device() == before
    assert torch.ones(2).pin_memory if torch.cuda.is_available() else True


@pytest.mark.parametrize(
    "where, kernel",
    [
        (on_pretended_gpu, "_scaled_dot_product_flash_attention"),
        (on_paper, "_scaled_dot_product_flash_attention_backward"),
    ],
)
def test_plain_attention_runs_as_flash_attention(where, kernel):
    calls = rehearsed("finetune, mixup", where)
    assert count(calls, kernel) == 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_relative_bias_has_the_type_of_the_queries(precision):
    calls = rehearsed("finetune, BEiT+, mean of weights", on_paper, precision)
    entered = [c for c in calls if name_of(c) == "_scaled_dot_product_efficient_attention"]

    assert len(entered) == 2
    for call in entered:
        q, k, v, bias = call.took
        assert bias.dtype == q.dtype and bias.shape[-1] == 197


@pytest.mark.parametrize("name", LISTED)
def test_the_operators_of_a_step_are_the_known_ones(name):
    "If the change is meant: `python tests/rehearsal.py` writes the file anew."
    known = json.loads(FIXTURE.read_text())
    if known["torch"] != torch_version():
        pytest.skip(f"the operators were written down with torch {known['torch']}")

    assert operator_list(name) == known[name]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("preset", ["base-in1k", "base-plus-in1k", LARGE])
def test_memory_and_work_of_a_step_are_the_planned(preset, precision):
    training = pretraining(preset, batch_size=64, precision=precision)
    r = replace(training.recipe, tokens="a table")

    peak, flops, _, work = measured(training)

    planned = sum(training_memory(r, 64).values())
    assert planned == pytest.approx(peak, rel=0.05)  # 1 to 3 % below, for what comes and goes
    # the plan counts the last Mlp for all tokens; the step computes it for the hidden ones
    assert 1 < 64 * sum(flops_per_image(r)) / flops < 1.05
    a100, h100 = (roofline_share(work, name, f"{preset}, {precision}") for name in BANDWIDTH)
    assert a100 > MFU  # what `beit plan` assumes can be reached there
    assert h100 < a100  # its tensor cores have grown more than its memory's bandwidth


MFU = signature(plan_training).parameters["mfu"].default
BANDWIDTH = {"a100": 2.039e12, "h100": 3.35e12}  # bytes a second, of NVIDIA's data sheets (SXM)


def roofline_share(work, name, said):
    """Which share of the peak a step reaches if each operator is as fast as its data sheet lets it.

    Said too (`pytest -s -k planned`). Inputs that are still in a cache come faster than that.
    """
    gpu = HARDWARE[name]
    seconds = sum(w.seconds(gpu, BANDWIDTH[name]) for w in work)
    share = sum(w.multiplies_for(gpu) for w in work) / seconds
    print(f"{said}, 64 pictures, {gpu.name}: {1e3 * seconds:.1f} ms, {share:.0%} of the peak")
    return share


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["base-in1k", "base-plus-in1k"])
def test_memory_with_checkpointing_is_the_planned(preset):
    training = pretraining(preset, batch_size=64, precision="bf16", grad_checkpointing=True)
    r = replace(training.recipe, tokens="a table")

    peak, flops, _, _ = measured(training)

    assert sum(training_memory(r, 64).values()) == pytest.approx(peak, rel=0.1)
    assert 1 < 64 * sum(flops_per_image(r)) / flops < 1.05


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("preset", ["base-in1k", "base-plus-in1k"])
def test_memory_with_checkpointing_of_a_small_network(preset, precision, monkeypatch):
    "In earnest, with numbers."
    monkeypatch.setitem(KERNELS, "cpu", KERNELS["cuda"])
    small = dict(embed_dim=192, num_heads=3, img_size=128, token_size=64, vocab_size=512)
    r = replace(recipe_named("pretrain", preset), num_mask_patches=26, tokens="a table", **small)
    r = replace(r, precision=precision, grad_checkpointing=True)
    model = build_mim(r)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, ids = torch.zeros(16, 3, 128, 128), torch.zeros(16 * 26, dtype=torch.long)
    mask = torch.arange(64).expand(16, 64) < 26
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    memory = Memory()
    memory.note([(p, p.grad) for p in model.parameters()])

    with memory:
        optimizer.step()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = mim_loss(model(images, mask), ids)
        loss.backward()

    assert sum(training_memory(r, 16).values()) == pytest.approx(memory.peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_step_is_traced_once_for_any_number_of_hidden_patches(
    checkpointing, monkeypatch
):
    "And it is one graph, never broken. That the loss says so is what the second trace needs."
    monkeypatch.setitem(KERNELS, "cpu", KERNELS["cuda"])
    shape = dict(
        embed_dim=48, num_heads=3, depth=2, vocab_size=64, grad_checkpointing=checkpointing
    )
    targets = TableTargets(torch.zeros(2, 14, 14, dtype=torch.int16))

    def traces(compiled, numbers):
        torch._dynamo.reset()
        model = build_mim(replace(recipe_named("pretrain", "base-plus-in1k"), **shape)).train()
        traced = CompileCounterWithBackend("eager")
        model.compile(fullgraph=True, backend=traced)
        loss = PretrainLoss(targets, "beit", compiled)
        for hidden in numbers:
            mask = (torch.arange(196).expand(2, 196) < hidden).view(2, 14, 14)
            views = torch.zeros(2, 3, 224, 224, dtype=torch.uint8), torch.zeros(2, 3, 0, 0)
            batch, _ = add_masked_indices(PretrainBatch(*views, mask, torch.arange(2)))
            with torch.autocast("cpu", torch.bfloat16):
                value, _ = loss(model, batch, 0)
            value.backward()
            yield traced.frame_count

    assert list(traces(True, (75, 74, 70, 75, 73, 72, 71, 74, 69, 75))) == 10 * [1]
    assert list(traces(False, (75, 74))) == [1, 2]


def test_the_script_for_a_gpu_says_where_there_is_none(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(gpu, "QUICK", False)
    with pytest.raises(SystemExit, match="no GPU, so nothing was measured"):
        gpu.main()


@pytest.mark.slow
def test_the_script_for_a_gpu_measures_and_keeps_it(monkeypatch, tmp_path, precision_restored):
    "All of it on a CPU, with tiny networks: its lines are right, its figures mean nothing."
    file = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "QUICK", True)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--quick", str(file)])

    gpu.main()

    got = json.loads(file.read_text())
    failed = {name: x for name, x in got.items() if name in gpu.parts() and isinstance(x, str)}
    assert not failed and got.keys() > gpu.parts().keys()
    assert got["equality"]["fp32"]["logits"] < 1e-5 and got["equality"]["bf16"]["gradient"] < 0.1
    assert set(got["waiting"].values()) == {"does not wait"} and len(got["waiting"]) == 2
    assert got["scaler"]["last"] < got["scaler"]["first"] and got["scaler"]["scale"] >= 1
    precisions = 2 if pick_precision("auto", default_device()) else 1  # bf16 only where it is
    assert min(got["loader"].values()) > 0 and len(got["small"]) == 6 * precisions
    fast = got["step, fp32"]
    assert fast["images_per_second"] > 0 and fast["planned_gb"] > 0


@pytest.mark.slow
def test_the_script_for_a_gpu_on_a_pretended_one(monkeypatch):
    "The lines that only a machine with CUDA takes; autograd alone is left out, as everywhere here."
    told = []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda: None)
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", told.append)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 2e9)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(gpu, "QUICK", True)

    with on_pretended_gpu() as stage:

        def without_autograd(trainer, *args):
            model = trainer.model.requires_grad_(False)
            with stage.operators, made_up_gradients(model, True):
                return train_step(trainer, *args)

        class Pretended:
            device = stage.device
            place = staticmethod(stage.place)

        monkeypatch.setattr(gpu, "Device", Pretended)
        monkeypatch.setattr(gpu, "train_step", without_autograd)
        said = gpu.waiting()
        fast = gpu.throughput("fp16", compiled=False)
        named = set(gpu.parts())
        peak = gpu.peak_of_data_sheet()

    assert set(said.values()) == {"does not wait"} and told == ["error", "default"] * len(said)
    assert fast["memory_gb"] == 2 and fast["mfu"] > 0
    assert peak == 989e12  # the H200 computes as fast as the H100
    assert named > {"step, bf16", "step, fp16"}


@pytest.fixture
def sixteen():
    "This process is the first of sixteen, the others do not exist."
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
    yield init_device_mesh("cpu", (16,))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["base-plus-in1k", LARGE])
def test_one_of_sixteen_shards_holds_and_sends_its_part(preset, sixteen, monkeypatch, tmp_path):
    "The mesh is made before, since it tells the others its numbers."
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda *a: sixteen)
    monkeypatch.setattr("beit_nb.engine.trainer.gather_over_ranks", lambda x: [x])
    training = pretraining(preset, batch_size=16 * 8, parallel="fsdp", precision="bf16")
    r = training.recipe
    sent = Sent()

    with on_paper() as stage:
        model = stage.place(training.build)
        in_blocks = 4 * sum(p.numel() for p in model.blocks.parameters())
        whole = 4 * sum(p.numel() for p in model.parameters())
        loss = training.loss(stage)
        batch = stage.take(pretraining(preset, batch_size=8).batch())
        with stage.inside(), sent:
            trainer = Trainer("pretrain", r, tmp_path, model, r.length(1000))
            forward = wrap_model(trainer.model, loss, trainer.sharded).train()
            train_step(trainer, forward, [batch], [1.0])
        held = 4 * sum(p.to_local().numel() for p in model.parameters())
        moments = 4 * sum(
            state["exp_avg"].to_local().numel() for state in trainer.optimizer.state.values()
        )

    plan = training_memory(replace(r, tokens="a table"), 8, gpus=16)
    assert held == moments == pytest.approx(plan["weights"], rel=0.01)  # rows are not cut
    # forward and again backward, but for what stands around the blocks, which stays
    assert sent.bytes["_allgather_base_"] == pytest.approx(whole + in_blocks, rel=0.01)
    assert sent.bytes["_reduce_scatter_base_"] == pytest.approx(whole, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["base-plus-in1k", LARGE])
def test_one_of_sixteen_copies_holds_and_sends_what_is_planned(preset, sixteen, monkeypatch):
    "The whole model in every process; its gradients leave once, bucket by bucket."
    monkeypatch.setattr("beit_nb.engine.trainer.gather_over_ranks", lambda x: [x])
    one = pretraining(preset, batch_size=16, precision="bf16")
    r = replace(one.recipe, batch_size=16 * 16)

    peak, _, sent, _ = measured(one._replace(recipe=r))

    plan = training_memory(replace(r, tokens="a table"), 16, gpus=16)
    assert sum(plan.values()) == pytest.approx(peak, rel=0.1)
    assert sum(sent) == plan["gradients"] == plan["weights"]
