"""The steps of all trainings as a GPU would run them, without a GPU and without numbers."""

import json
from dataclasses import replace

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

from beit_nb.device import KERNELS, default_device
from beit_nb.engine.processes import wrap_model
from beit_nb.engine.trainer import Trainer
from beit_nb.engine.training import train_step
from beit_nb.mim import masked_indices, mim_loss
from beit_nb.pretraining import build_mim
from beit_nb.recipes import recipe_named
from beit_nb.scale.flops import flops_per_image
from beit_nb.scale.memory import training_memory

LARGE = pytest.param("large-plus-in22k", marks=pytest.mark.slow)


def count(calls, name):
    return sum(name_of(call).startswith(name) for call in calls)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", TRAININGS)
def test_a_step_on_a_gpu_neither_waits_nor_strays(name, precision):
    training = TRAININGS[name](precision=precision)

    calls = rehearsed(name, on_pretended_gpu, precision)

    assert faults(calls, training) == []
    assert count(calls, "_fused_adamw") == 2  # with weight decay and without
    assert count(calls, "_amp_update_scale") == (precision == "fp16")


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


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("preset", ["base-in1k", "base-plus-in1k", LARGE])
def test_memory_and_work_of_a_step_are_the_planned(preset, precision):
    training = pretraining(preset, batch_size=64, precision=precision)
    r = replace(training.recipe, tokens="a table")

    peak, flops = measured(training)

    planned = sum(training_memory(r, 64).values())
    assert planned == pytest.approx(peak, rel=0.05)  # 1 to 3 % below, for what comes and goes
    # the plan counts the last Mlp for all tokens; the step computes it for the hidden ones
    assert 1 < 64 * sum(flops_per_image(r)) / flops < 1.05


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("preset", ["base-in1k", "base-plus-in1k"])
def test_memory_with_checkpointing_is_the_planned(preset, precision, monkeypatch):
    "In earnest, on a small network: the tensors without numbers hold on to what is recomputed."
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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_step_is_one_graph_for_any_number_of_hidden_patches(checkpointing, monkeypatch):
    "Traced once for the first number, once for all others, and never broken."
    monkeypatch.setitem(KERNELS, "cpu", KERNELS["cuda"])
    torch._dynamo.reset()
    shape = dict(
        embed_dim=48, num_heads=3, depth=2, vocab_size=64, grad_checkpointing=checkpointing
    )
    model = build_mim(replace(recipe_named("pretrain", "base-plus-in1k"), **shape)).train()
    traced = CompileCounterWithBackend("eager")
    model.compile(fullgraph=True, backend=traced)
    times = []

    for hidden in (75, 74, 70, 75, 73, 72, 71, 74, 69, 75):
        mask = torch.arange(196).expand(2, 196) < hidden
        index = masked_indices(mask)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(torch.zeros(2, 3, 224, 224), mask, masked_index=index)
        mim_loss(logits, torch.zeros(2 * hidden, dtype=torch.long)).backward()
        times.append(traced.frame_count)

    assert times == [1] + 9 * [2]


def test_the_script_for_a_gpu_says_where_there_is_none(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(gpu, "QUICK", False)
    with pytest.raises(SystemExit, match="no GPU, so nothing was measured"):
        gpu.main()


def test_the_script_for_a_gpu_measures(monkeypatch, precision_restored):
    "On a CPU, with tiny networks: its lines are right, its figures mean nothing."
    monkeypatch.setattr(gpu, "QUICK", True)

    same, learnt, fast = gpu.equality(), gpu.scaler(), gpu.throughput("fp32", compiled=False)

    assert same["fp32"]["logits"] < 1e-5 and same["bf16"]["gradient"] < 0.1
    assert learnt["last"] < learnt["first"] and learnt["scale"] >= 1
    assert fast["images_per_second"] > 0 and fast["planned_gb"] > 0


@pytest.fixture
def sixteen():
    "This process is the first of sixteen, the others do not exist."
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
    yield init_device_mesh("cpu", (16,))
    dist.destroy_process_group()


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


def test_one_of_sixteen_copies_sends_its_gradients_once(sixteen):
    "In earnest, for DDP looks into its tensors; a small network."
    model = build_mim(recipe_named("pretrain", "nano"))
    gradients = 4 * sum(p.numel() for p in model.parameters())
    mask = torch.arange(64).expand(2, 64) < 26

    def loss(model, images, step):
        return mim_loss(model(images, mask), torch.zeros(52, dtype=torch.long)), {}

    sent = []

    def send(state, bucket):
        sent.append(bucket.buffer().nbytes)
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    forward = wrap_model(model, loss)
    forward.register_comm_hook(None, send)
    forward(torch.zeros(2, 3, 32, 32), 0)[0].backward()

    assert sum(sent) == gradients
