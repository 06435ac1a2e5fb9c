"""A GPU on paper: steps of training whose tensors have a shape, a type and a place, but no numbers.

torch's FakeTensorMode works out what every operator would return. Two rehearsals together cover a
step, since autograd asks the driver for a stream as soon as a tensor says that it lies on a GPU:

* `on_pretended_gpu`: forward, loss and update with tensors "on CUDA", under CUDA's autocast, while
  what lies on the host is real. Whatever would wait for the GPU, or mix host and device, fails here
  as it would there. There is no autograd; gradients are made up.
* `on_paper`: the whole step with autograd, on a "CPU" for which the table of kernels says what it
  says for CUDA.

Both write down every operator that would launch a kernel. `python tests/rehearsal.py` writes those
of one step of every training to tests/rehearsal.json, which test_rehearsal.py holds them against.
"""

import contextlib
import gc
import json
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils._runtime_estimation import _IGNORE_OPS, get_num_bytes
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from beit_nb import images
from beit_nb.classifier_files import build_classifier
from beit_nb.configs import Run
from beit_nb.dalle import DalleEncoder, DalleVAE
from beit_nb.device import KERNELS
from beit_nb.engine.augment import TwoViews
from beit_nb.engine.loading import ImageBatch, LabelledBatch, PretrainBatch
from beit_nb.engine.optim import Ema
from beit_nb.engine.processes import wrap_model
from beit_nb.engine.steps import map_batch
from beit_nb.engine.trainer import Trainer
from beit_nb.engine.training import train_step
from beit_nb.labelled_views import FinetuneLoss
from beit_nb.masking import blockwise_masks
from beit_nb.pretraining import PretrainLoss, add_masked_indices, build_mim
from beit_nb.recipes import recipe_named
from beit_nb.scale.hours import Gpu
from beit_nb.segmenting import SegmentLoss, build_segmenter
from beit_nb.targets import TableTargets, build_targets
from beit_nb.tokenizer import TokenizerLoss, build_dvae, tokenizer_schedules
from beit_nb.tokens import Tokenizer

FIXTURE = Path(__file__).with_suffix(".json")
TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
HALF = {torch.bfloat16, torch.float16}
aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention
EFFICIENT = aten._scaled_dot_product_efficient_attention
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "linear"}
PRODUCTS |= {FLASH.__name__, EFFICIENT.__name__}


# Tensors without numbers.


class Call(NamedTuple):
    "An operator that ran: which, where, what went in and what came out."

    operator: torch._ops.OpOverload
    place: str  # "tokenizer", or ""
    took: tuple
    made: tuple
    options: dict

    def __str__(self) -> str:
        made = ", ".join(str(x.dtype).removeprefix("torch.") for x in self.made)
        return f"{self.operator.overloadpacket.__name__} {made}".strip()


class Kind(NamedTuple):
    "What a tensor is."

    dtype: torch.dtype
    device: str
    shape: tuple
    channels_last: bool


def kinds(tree) -> tuple[Kind, ...]:
    tensors = [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
    return tuple(
        Kind(
            x.dtype,
            x.device.type,
            tuple(x.shape),
            x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last),
        )
        for x in tensors
    )


def makes_a_view(operator: torch._ops.OpOverload) -> bool:
    "Does it only look at its argument otherwise, without a kernel?"
    aliases = [r.alias_info for r in operator._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


class Operators(TorchDispatchMode):
    "Writes down what runs inside; what is made on a GPU is made without numbers."

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake = fake
        self.calls: list[Call] = []
        self.place = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        fakes = any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs)))
        device = kwargs.get("device")
        to_gpu = not fakes and device is not None and torch.device(device).type == "cuda"
        if to_gpu:
            args = tree_map_only(Tensor, self.fake.from_tensor, args)
        with self.fake if to_gpu else contextlib.nullcontext():
            out = func(*args, **kwargs)
        if (fakes or to_gpu) and func.namespace == "aten" and not makes_a_view(func):
            call = Call(func, self.place, kinds((args, kwargs)), kinds(out), kwargs)
            self.calls.append(call)
        return out


class Memory(TorchDispatchMode):
    """Counts the bytes of all that is kept by somebody while it runs: `now`, and at most, `peak`.

    What checkpointing makes again on paper is held in circles, which on a GPU nobody does: with
    `collect` the garbage is taken out every few operators.
    """

    def __init__(self, collect: bool = False):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known = WeakIdKeyDictionary()
        self.collect = collect
        self.ran = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran += 1
        if self.collect and self.ran % 30 == 0:
            gc.collect()
        out = func(*args, **(kwargs or {}))
        self.note(out)
        return out

    def note(self, tree) -> None:
        for x in tree_leaves(tree):
            if isinstance(x, Tensor) and x.untyped_storage() not in self.known:
                storage = x.untyped_storage()
                self.known[storage] = True
                size = storage.nbytes()
                self.add(size)
                weakref.finalize(storage, self.add, -size)

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


class Work(NamedTuple):
    "What an operator does at least."

    flops: int
    moved: int  # bytes of its inputs and outputs
    half: bool  # in bf16 or fp16

    def multiplies_for(self, gpu: Gpu) -> float:
        "Seconds at the peak of a GPU's tensor cores."
        return self.flops / (1e12 * (gpu.half_tflops if self.half else gpu.fp32_tflops))

    def seconds(self, gpu: Gpu, bandwidth: float) -> float:
        """At least, on a GPU whose memory moves so many bytes a second (Williams et al., 2009).

        So sees it torch.distributed._tools.RuntimeEstimator, which must have a GPU to ask.
        """
        return max(self.multiplies_for(gpu), self.moved / bandwidth)


class AllWork(TorchDispatchMode):
    "Writes down the work of every operator that launches a kernel."

    def __init__(self):
        super().__init__()
        self.done: list[Work] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if func.namespace == "aten" and packet not in _IGNORE_OPS and not makes_a_view(func):
            tensors = [x for x in tree_leaves((out, args, kwargs)) if isinstance(x, Tensor)]
            count = flop_registry.get(packet)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            half = bool(tensors) and tensors[0].dtype in HALF
            self.done.append(Work(flops, sum(map(get_num_bytes, tensors)), half))
        return out


class Sent(TorchDispatchMode):
    "Counts the bytes that this process sends or gets, by collective, while it runs."

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            size = max((x.numel() * x.element_size() for x in tensors), default=0)
            self.bytes[func.overloadpacket.__name__] += size
        return func(*args, **(kwargs or {}))


def apply_anew(module: nn.Module, fn: Callable, recurse: bool = True) -> nn.Module:
    "`nn.Module._apply` for fake tensors, which torch does not let change in place."
    for part in module.modules():
        for name, p in part._parameters.items():
            with torch.no_grad():
                new = p if p is None else fn(p)
            if new is not p:
                part._parameters[name] = nn.Parameter(new, p.requires_grad)
        for name, x in part._buffers.items():
            part._buffers[name] = x if x is None else fn(x)
    return module


def fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """The kernel that CUDA takes for `F.scaled_dot_product_attention`.

    Without a GPU torch would take the products apart. Refuses what the kernels refuse.
    """
    assert q.dtype == k.dtype == v.dtype
    if attn_mask is None and q.dtype != torch.float32:
        return FLASH(q, k, v)[0]
    bias = None
    if attn_mask is not None:
        assert attn_mask.dtype == q.dtype, f"bias {attn_mask.dtype}, queries {q.dtype}"
        bias = attn_mask.expand(len(q), q.shape[1], q.shape[2], k.shape[2])
    return EFFICIENT(q, k, v, bias, True)[0]


class Stage:
    "Where a rehearsal takes place: `device` cuda or cpu, and what has run there."

    def __init__(self, device: str):
        self.device = torch.device(device)
        # on a GPU, host and device meet only by a copy; mixing them is refused there
        self.fake = FakeTensorMode(allow_non_fake_inputs=device == "cuda")
        self.operators = Operators(self.fake)

    @property
    def calls(self) -> list[Call]:
        return self.operators.calls

    def place(self, build: Callable[[], Any]) -> Any:
        "What `build` makes, a module or a tensor, here and without numbers."
        with torch.device("meta"):
            made = build()

        def copy(x: Tensor) -> Tensor:
            return torch.empty(x.shape, dtype=x.dtype, device=self.device)

        with self.fake:
            return apply_anew(made, copy) if isinstance(made, nn.Module) else copy(made)

    def take(self, batch: tuple) -> tuple:
        "A batch as the step gets it: still on the host of a GPU; without numbers where it stays."
        if self.device.type == "cuda":
            return batch
        return map_batch(self.fake.from_tensor, batch)

    def inside(self) -> contextlib.AbstractContextManager:
        "What a CPU makes is without numbers; what a GPU's host makes is real."
        return contextlib.nullcontext() if self.device.type == "cuda" else self.fake

    def tokenize(self, indices_at: Callable) -> Callable:
        "`Tokenizer.indices_at`, whose operators are the tokenizer's."

        def noted(*args):
            self.operators.place = "tokenizer"
            ids = indices_at(*args)
            self.operators.place = ""
            return ids

        return noted


@contextlib.contextmanager
def patched(*patches) -> Iterator[None]:
    "Within it these patches are in force, and no tensor without numbers is left in a cache."
    with contextlib.ExitStack() as stack:
        stack.callback(images._mean_and_std.cache_clear)
        images._mean_and_std.cache_clear()
        for patch in patches:
            stack.enter_context(patch)
        yield


def everywhere(stage: Stage) -> list:
    "What both rehearsals change of torch and of the library."
    return [
        mock.patch.object(nn.Module, "_apply", apply_anew),
        mock.patch.object(F, "scaled_dot_product_attention", fused_attention),
        mock.patch.object(Tokenizer, "indices_at", stage.tokenize(Tokenizer.indices_at)),
    ]


@contextlib.contextmanager
def on_pretended_gpu() -> Iterator[Stage]:
    "Inside, this machine seems to have a GPU: see the module's docstring."
    stage = Stage("cuda")
    with stage.fake:
        pass  # once entered before it seems to have one, torch minds no missing driver
    health = "_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"
    with patched(
        *everywhere(stage),
        mock.patch("torch.cuda.is_available", lambda: True),
        mock.patch("torch.cuda._lazy_init"),
        mock.patch("torch.cuda.current_device", lambda: 0),
        mock.patch("torch.cuda.is_bf16_supported", lambda including_emulation=True: True),
        mock.patch.object(Tensor, "pin_memory", lambda x: x),
        *(mock.patch.object(torch.optim.Optimizer, name, lambda _: None) for name in health),
        torch.no_grad(),
    ):
        only_lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(x, device="cuda")` is a copy
        try:
            yield stage
        finally:
            torch._C._set_only_lift_cpu_tensors(only_lift)


@contextlib.contextmanager
def on_paper() -> Iterator[Stage]:
    "Inside, a CPU without numbers takes CUDA's kernels: see the module's docstring."
    stage = Stage("cpu")
    with patched(
        *everywhere(stage),
        mock.patch.dict(KERNELS, cpu=KERNELS["cuda"]),
        mock.patch("beit_nb.engine.optim.pick_precision", lambda name, device: TYPES[name]),
        # drawn on the host, where nothing waits: `on_pretended_gpu` draws it in earnest
        mock.patch("beit_nb.labelled_views.torch.randint", lambda *args: np.int64(1)),
    ):
        yield stage


# The trainings.

PICTURES = 16  # of a batch
EPOCH = 1_281_167  # pictures of ImageNet-1K


class Training(NamedTuple):
    "One way to train, as its command puts it together."

    command: str
    recipe: Run
    build: Callable[[], nn.Module]
    loss: Callable[[Stage], Callable]  # (model, batch, step) -> loss, metrics
    batch: Callable[[], tuple]  # a micro-batch on the host


def dalle_targets(r: Run, stage: Stage) -> Any:
    "What `build_targets` makes of DALL-E's encoder."
    r = replace(r, tokenizer="dalle")
    encoder = stage.place(DalleEncoder)
    with (
        mock.patch("beit_nb.targets.load_tokenizer", lambda path: Tokenizer(DalleVAE(encoder))),
        mock.patch("beit_nb.targets.warn_unfinished"),
        mock.patch("beit_nb.targets.fingerprint_tokenizer"),
    ):
        return build_targets(r, None, TwoViews(r.img_size))


def table_targets(r: Run, stage: Stage) -> Any:
    "A table of the ids of a thousand pictures."
    table = stage.place(lambda: torch.zeros(1000, 14, 14, dtype=torch.int16))
    with mock.patch("beit_nb.targets.fingerprint"):
        return TableTargets(table)


def pretrain_batch(r: Run, for_tokens: bool = True) -> PretrainBatch:
    "Gray pictures and real masks, as the loader hands them on."
    n = r.batch_size
    mask = blockwise_masks(n, rng=np.random.default_rng(0))
    number = torch.arange(n)
    patch_view = torch.zeros(n, 3, r.img_size, r.img_size, dtype=torch.uint8)
    side = r.token_size if for_tokens else 0  # nobody looks where ids come from a table
    token_view = torch.zeros(n, 3, side, side, dtype=torch.uint8)
    jitter = torch.zeros(n, 3, 3) if r.jitter_on == "device" else None
    return add_masked_indices(PretrainBatch(patch_view, token_view, mask, number, jitter))[0]


def pretraining(
    preset: str, targets: Callable = table_targets, batch_size: int = PICTURES, **changes
) -> Training:
    r = replace(recipe_named("pretrain", preset), batch_size=batch_size, **changes)

    def loss(stage: Stage) -> PretrainLoss:
        return PretrainLoss(targets(r, stage), r.mean_std, r.compile)

    batch = partial(pretrain_batch, r, targets is dalle_targets)
    return Training("pretrain", r, partial(build_mim, r), loss, batch)


def tokenizing(preset: str, **changes) -> Training:
    r = replace(recipe_named("tokenizer", preset), batch_size=PICTURES, **changes)

    def loss(stage: Stage) -> TokenizerLoss:
        return TokenizerLoss(tokenizer_schedules(r, r.length(EPOCH)), r.usage_weight)

    def batch() -> ImageBatch:
        pictures = torch.zeros(PICTURES, 3, r.img_size, r.img_size, dtype=torch.uint8)
        return ImageBatch(pictures, torch.arange(PICTURES))

    return Training("tokenizer", r, partial(build_dvae, r), loss, batch)


def classifying(preset: str, **changes) -> Training:
    r = replace(recipe_named("finetune", preset), batch_size=PICTURES, **changes)

    def loss(stage: Stage) -> FinetuneLoss:
        return FinetuneLoss(r, 1000, PICTURES)

    def batch() -> LabelledBatch:
        pictures = torch.zeros(PICTURES, 3, r.img_size, r.img_size)
        return LabelledBatch(pictures, torch.arange(PICTURES), torch.arange(PICTURES))

    return Training("finetune", r, partial(build_classifier, r, 1000), loss, batch)


def segmenting(preset: str, **changes) -> Training:
    r = replace(recipe_named("segment", preset), batch_size=PICTURES, **changes)

    def batch() -> LabelledBatch:
        pictures = torch.zeros(PICTURES, 3, r.img_size, r.img_size, dtype=torch.uint8)
        return LabelledBatch(pictures, pictures[:, 0], torch.arange(PICTURES))

    return Training(
        "segment", r, partial(build_segmenter, r, 150), lambda stage: SegmentLoss(r), batch
    )


TRAININGS = {
    "pretrain, BEiT+, DALL-E": partial(pretraining, "base-plus-in1k", dalle_targets),
    "pretrain, BEiT+, table": partial(pretraining, "base-plus-in1k"),
    "pretrain, paper, jitter": partial(pretraining, "base-in1k", dalle_targets, jitter_on="device"),
    "tokenizer": partial(tokenizing, "imagenet"),
    "tokenizer, DALL-E": partial(tokenizing, "dalle"),
    "finetune, mixup": partial(classifying, "base-in1k"),
    "finetune, BEiT+, mean of weights": partial(classifying, "base-plus-in1k", ema=0.999),
    "segment, SETR-PUP": partial(segmenting, "base-in1k-pup"),
    "segment, UPerNet": partial(segmenting, "base-plus-in22k"),
}
FEW_BLOCKS = {
    "tokenizer": {},
    "pretrain": {"depth": 2},
    "finetune": {"depth": 2},
    "segment": {"depth": 4, "out_indices": (0, 1, 2, 3)},  # a map of each
}
SHALLOW = {name: FEW_BLOCKS[name.split(",")[0]] for name in TRAININGS}


@cache
def rehearsed(
    name: str, where: Callable, precision: str = "bf16", whole: bool = False
) -> list[Call]:
    "The operators of the second step of a training; of few blocks where it is not the `whole`."
    changes = {} if whole else SHALLOW[name]
    with where() as stage:
        rehearse(stage, TRAININGS[name](precision=precision, **changes))
        return stage.calls


# A step.


def fill_gradients(model: nn.Module) -> None:
    "Some gradient for every weight."
    for p in model.parameters():
        p.grad = torch.empty_like(p)


def made_up_gradients(model: nn.Module, wanted: bool) -> contextlib.AbstractContextManager:
    "In the place of `Tensor.backward`, where that cannot be."
    if not wanted:
        return contextlib.nullcontext()

    def backward(loss: Tensor) -> None:
        fill_gradients(model)

    return mock.patch.object(Tensor, "backward", backward)


def mean_of(stage: Stage, training: Training) -> Ema:
    "A running mean of the weights; its count is on the host, as in a training."
    ema = stage.place(lambda: Ema(training.build(), 0.999))
    ema.n_averaged = torch.tensor(0)
    return ema


def rehearse(stage: Stage, training: Training, steps: int = 2) -> Trainer:
    "Take some steps; `stage.calls` holds the operators of the last one."
    r = training.recipe
    gpu = stage.device.type == "cuda"
    model = stage.place(training.build)
    loss = training.loss(stage)
    ema = mean_of(stage, training) if gpu and getattr(r, "ema", 0) else None
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(training.command, r, Path(out), model, r.length(EPOCH))
    forward = wrap_model(trainer.model, loss).train()
    if gpu:
        model.requires_grad_(False)  # autograd would ask for a stream
    batch = stage.take(training.batch())
    for _ in range(steps):
        stage.calls.clear()
        with stage.operators, stage.inside(), made_up_gradients(model, gpu):
            train_step(trainer, forward, [batch], [1.0])
            if ema:
                ema.update(trainer.model)
    return trainer


class Measured(NamedTuple):
    "What a step on paper takes."

    peak: int  # bytes, at most
    flops: int
    sent: list[int]  # bytes of the gradients that leave a process of DDP, bucket by bucket
    work: list[Work]  # of each operator


def send_nothing(sent: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    "A hook of DDP: note the bytes of a bucket, which stays as it is."
    sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


class OfNoModule:
    """In the place of the counter's tracker, which tells of which module an operator is.

    That waits with a block's gradients until those of all its inputs are there; the bias that all
    blocks share has its own last, so the gradients of all blocks would be counted as held.
    """

    parents = {"Global"}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def measured(training: Training) -> Measured:
    """What a later micro-batch of a step takes.

    The moments of AdamW are there, and so are the gradients of the micro-batch before, as they are
    in the buckets of DDP. With a fake process group of many, DDP itself.
    """
    r = training.recipe
    sent: list[int] = []
    alike = "torch.nn.parallel.distributed."  # whether all processes begin alike: they look at
    with (  # numbers, and ask others
        on_paper() as stage,
        mock.patch(f"{alike}_verify_param_shape_across_processes"),
        mock.patch(f"{alike}_sync_module_states"),
    ):
        model = stage.place(training.build)
        with tempfile.TemporaryDirectory() as out:
            trainer = Trainer(training.command, r, Path(out), model, r.length(EPOCH))
        loss = training.loss(stage)
        batch = stage.take(training.batch())
        memory = Memory(collect=getattr(r, "grad_checkpointing", False))
        memory.note([list(model.parameters()), list(model.buffers())])
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = OfNoModule()
        work = AllWork()
        gc.collect()
        gc.freeze()  # what is there by now is no garbage
        with stage.inside(), memory, counter:
            fill_gradients(model)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad(set_to_none=True)
            forward = wrap_model(model, loss).train()
            if isinstance(forward, DistributedDataParallel):
                forward.register_comm_hook(sent, send_nothing)
            else:
                fill_gradients(model)
            with work:
                train_step(trainer, forward, [batch], [1.0])
        gc.unfreeze()
    return Measured(memory.peak, counter.get_total_flops(), sent, work.done)


# What is wanted of a step.


def name_of(call: Call) -> str:
    return call.operator.overloadpacket.__name__


def crosses(call: Call) -> str:
    "What is wrong with an operator that goes from one device to another, or nothing."
    came = {k.device for k in call.took}
    went = {k.device for k in call.made}
    if "cuda" in came and "cpu" in went:
        return "back to the host"
    if came == {"cpu"} and "cuda" in went and not call.options.get("non_blocking"):
        return "to the device, and the host waits"
    return ""


def meant_in_fp32(call: Call, training: Training) -> bool:
    """Is it a product that is in fp32 on purpose?

    Of DALL-E's frozen encoder all but f(x) of its blocks, so that ids stay; of our own dVAE in
    training the scores.
    """
    if call.place == "tokenizer":
        if name_of(call) == "addmm":
            return True  # the head
        n_out, n_in, kernel, _ = call.took[1].shape
        return kernel == 7 or n_out == 2 * n_in  # the first, and the paths past a block
    vocab_size = getattr(training.recipe, "vocab_size", 0)
    scores = [k for k in (*call.took, *call.made) if vocab_size in k.shape]
    return training.command == "tokenizer" and name_of(call) == "bmm" and len(scores) == 2


def wrong_type(call: Call, training: Training) -> str:
    "What is wrong with the number types of an operator, or nothing."
    # the scaler of fp16 takes the reciprocal of one number in fp64
    if any(k.dtype == torch.float64 and k.shape for k in (*call.took, *call.made)):
        return "fp64"
    half = training.recipe.precision != "fp32"
    if name_of(call) in PRODUCTS and torch.float32 in {k.dtype for k in call.took}:
        if half and not meant_in_fp32(call, training):
            return "a product in fp32"
    return ""


def wrong_layout(call: Call) -> str:
    "What is wrong with the layout of DALL-E's encoder, or nothing."
    if call.place != "tokenizer" or name_of(call) != "convolution":
        return ""
    pictures = call.took[0].shape[1] == 3  # they come as the loader makes them
    kept = call.took[1].channels_last and call.made[0].channels_last
    return "" if kept and (pictures or call.took[0].channels_last) else "not channels_last"


def faults(calls: list[Call], training: Training) -> list[str]:
    "All that is wrong with a step, once each; empty where nothing is."
    found = {}
    for call in calls:
        for wrong in (crosses(call), wrong_type(call, training), wrong_layout(call)):
            if wrong:
                shapes = [list(k.shape) for k in call.took]
                found[f"{wrong}: {call} of {shapes}"] = True
    return list(found)


# The operators of a step, as a file.

LISTED = {  # DALL-E's encoder as a GPU runs it; the others with their backward pass
    "pretrain, BEiT+, DALL-E": on_pretended_gpu,
    "pretrain, paper, jitter": on_pretended_gpu,
    "pretrain, BEiT+, table": on_paper,
    "tokenizer": on_paper,
    "finetune, mixup": on_paper,
    "segment, UPerNet": on_paper,
}


def torch_version() -> str:
    "Major and minor: another one may take products apart otherwise."
    return ".".join(torch.__version__.split(".")[:2])


def operator_list(name: str) -> dict[str, int]:
    "How often each operator runs in a step in bf16, by what it makes; networks of two blocks."
    return dict(sorted(Counter(map(str, rehearsed(name, LISTED[name]))).items()))


def write_fixture() -> None:
    lists = {name: operator_list(name) for name in LISTED}
    FIXTURE.write_text(json.dumps({"torch": torch_version()} | lists, indent=1) + "\n")


if __name__ == "__main__":
    write_fixture()
