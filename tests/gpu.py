"""What one GPU really does, in at most eight minutes: `python tests/gpu.py [OUT.json]`.

The rehearsal on paper (tests/rehearsal.py) says what a step asks of a GPU; this says what it gets:
CPU against GPU, whether a step waits, whether fp16's scaler lives, and pictures a second of the
base model with DALL-E's tokenizer (random weights: the work is the same), compiled or not. Prints
one JSON object with the name of the hardware, and keeps the file up to date after every part, so
that who is stopped keeps what was measured. Where there is no GPU, it says so in one line.

`--quick` runs every line with tiny networks, on a CPU too; then times mean nothing.
"""

import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rehearsal import (
    EPOCH,
    SHALLOW,
    TRAININGS,
    Training,
    dalle_targets,
    pretrain_batch,
    pretraining,
)

from beit_nb.configs import Run
from beit_nb.device import default_device, pick_precision, set_matmul_precision
from beit_nb.engine.processes import wrap_model
from beit_nb.engine.trainer import Trainer
from beit_nb.engine.training import train_step
from beit_nb.mim import masked_indices, mim_loss
from beit_nb.pretraining import build_mim
from beit_nb.recipes import recipe_named
from beit_nb.scale.bench_parts import bench_loader, bench_small
from beit_nb.scale.flops import flops_per_image
from beit_nb.scale.hours import HARDWARE
from beit_nb.scale.memory import training_memory
from beit_nb.scale.timing import machine, machine_peaks

LIMIT = 480  # seconds
TINY = dict(img_size=32, token_size=16, embed_dim=48, depth=2, num_heads=3, num_mask_patches=2)
QUICK = "--quick" in sys.argv


class Device:
    "The place where a training puts what it builds, as `rehearsal.Stage` is one."

    device = default_device()

    def place(self, build: Callable):
        with self.device:  # a GPU draws the first weights sooner than a CPU
            made = build()
        return made.to(self.device)


def clean() -> None:
    "Give back what earlier parts held: models lie in circles that only the collector finds."
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def threads(count: int):
    "Inside, torch computes with so many threads."
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def no_waiting():
    "Inside, whatever makes the host wait for the GPU raises RuntimeError."
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")


def shaped(r: Run) -> Run:
    "A recipe as it is, or as small as can be."
    return replace(r, **TINY) if QUICK else r


def stepper(training: Training) -> tuple[Trainer, Callable]:
    "A training, and a function that takes its next step with the same pictures again."
    r = training.recipe
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as out:
        model = Device().place(training.build)
        trainer = Trainer(training.command, r, Path(out), model, r.length(EPOCH))
    if r.compile:
        trainer.model.compile()
    forward = wrap_model(trainer.model, training.loss(Device())).train()
    batch = training.batch()
    if torch.cuda.is_available():
        batch = type(batch)(*(None if x is None else x.pin_memory() for x in batch))
    return trainer, lambda: train_step(trainer, forward, [batch], [1.0])


def base(batch_size: int, **changes) -> Training:
    "Pre-training of BEiT+ base with DALL-E's tokenizer in the loop."
    training = pretraining("base-plus-in1k", dalle_targets, batch_size, **changes)
    if not QUICK:
        return training
    r = shaped(training.recipe)
    small = pretraining("base-plus-in1k", dalle_targets, batch_size, **changes, **TINY)
    return small._replace(batch=lambda: tiny_batch(r))


def tiny_batch(r: Run):
    mask = torch.zeros(r.batch_size, 2, 2, dtype=torch.bool)
    mask[:, 0] = True
    whole = pretrain_batch(replace(r, jitter_on="loader"))
    return whole._replace(mask=mask, masked_index=masked_indices(mask))


# The parts. Each returns what goes into the JSON.


def equality() -> dict:
    "Logits and gradients of the same weights on the CPU and here, in fp32 and in half precision."
    r = shaped(recipe_named("pretrain", "base-plus-in1k"))
    side = r.img_size // r.patch_size
    torch.manual_seed(0)
    model = build_mim(replace(r, drop_path_rate=0.0))
    images = torch.randn(2, 3, r.img_size, r.img_size)
    mask = torch.rand(2, side, side) < 0.4
    mask[:, 0, 0] = True
    ids = torch.randint(r.vocab_size, (int(mask.sum()),))
    out = {}

    def answer(device: torch.device, dtype: torch.dtype | None) -> list[torch.Tensor]:
        model.to(device).zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(images.to(device), mask.to(device)).float()
        mim_loss(logits, ids.to(device)).backward()
        return [x.detach().cpu() for x in (logits, model.patch_embed.proj.weight.grad)]

    want = answer(torch.device("cpu"), None)
    kinds = {"fp32": None, "bf16": torch.bfloat16}
    if Device.device.type == "cuda":
        kinds["fp16"] = torch.float16
    for name, dtype in kinds.items():
        got = answer(Device.device, dtype)
        logits, gradient = (((a - b).norm() / b.norm()).item() for a, b in zip(got, want))
        out[name] = {"logits": logits, "gradient": gradient}
    return out


def waiting() -> dict:
    """Steps of every training, the second of which must not wait; what waited, in words.

    In bf16 and, one of them, with fp16's scaler. Networks of few blocks: all blocks are alike.
    """
    out = {}
    precisions = dict.fromkeys(TRAININGS, half_precision())
    if Device.device.type == "cuda":
        precisions["pretrain, BEiT+, table, fp16"] = "fp16"
    for name, precision in precisions.items():
        training = name.removesuffix(", fp16")
        if QUICK and not training.startswith("finetune"):
            continue
        out[name] = waits(TRAININGS[training](precision=precision, **SHALLOW[training]))
        clean()
    return out


def waits(training: Training) -> str:
    "What a step that is not the first waits for."
    _, step = stepper(training)
    step()
    wait()
    try:
        with no_waiting():
            step()
    except RuntimeError as e:
        return str(e).splitlines()[0]
    return "does not wait"


def scaler() -> dict:
    "Does fp16 learn the same pictures by heart, with a scale that is no collapse?"
    precision = "fp16" if torch.cuda.is_available() else "fp32"
    # no warm-up; the recipe's rate, meant for 2,048 pictures, would be large for 16
    rate = dict(warmup_steps=0) | ({} if QUICK else dict(lr=3e-4))
    trainer, step = stepper(base(4 if QUICK else 16, precision=precision, **rate))
    losses = [step()["loss"].item() for _ in range(3 if QUICK else 30)]
    return {"first": losses[0], "last": losses[-1], "scale": trainer.scaler.get_scale()}


def half_precision() -> str:
    return "bf16" if pick_precision("auto", Device.device) else "fp32"


def peak_of_data_sheet() -> float:
    "Operations a second that the maker promises in half precision; measured where it is not known."
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    for key, gpu in HARDWARE.items():
        if key.upper() in name.upper() or (key == "h100" and "H200" in name):
            return gpu.half_tflops * 1e12
    return machine_peaks(Device.device, 256 if QUICK else 8192)["bf16"]


def throughput(precision: str, compiled: bool) -> dict:
    "Pictures a second of whole steps, their share of the peak, and memory beside the plan."
    batch_size = 4 if QUICK else 128
    training = base(batch_size, precision=precision, compile=compiled)
    clean()
    begun = time.perf_counter()
    _, step = stepper(training)
    for _ in range(1 if QUICK else 5):
        step()
    wait()
    ready = time.perf_counter() - begun
    seconds = []
    for _ in range(2 if QUICK else 5):
        start = time.perf_counter()
        for _ in range(1 if QUICK else 10):
            step()
        wait()
        seconds.append((time.perf_counter() - start) / (1 if QUICK else 10))
    r = training.recipe
    rate = batch_size / statistics.median(seconds)
    gigabytes = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    return {
        "images_per_second": rate,
        "slowest": batch_size / max(seconds),
        "mfu": rate * sum(flops_per_image(r)) / peak_of_data_sheet(),
        "seconds_until_warm": ready,
        "memory_gb": gigabytes,
        "planned_gb": sum(training_memory(r, batch_size).values()) / 1e9,
    }


def loader() -> dict:
    "Pictures a second of one core, jitter in the loader or left to the GPU."
    with threads(1):
        rows = bench_loader(1, QUICK, turns=5)["rows"]
    return {name: row["per_second"] for name, row in rows.items()}


def small() -> dict:
    rows = bench_small(torch.get_num_threads(), QUICK)["rows"]
    return {name: row["per_second"] for name, row in rows.items()}


def parts() -> dict[str, Callable[[], dict]]:
    "What is measured, in this order, while there is time."
    named = {"equality": equality, "waiting": waiting, "scaler": scaler, "loader": loader}
    named["small"] = small
    kinds = ("bf16", "fp16") if torch.cuda.is_available() else ("fp32",)
    for compiled in (False,) if QUICK else (False, True):
        for precision in kinds:
            words = f"step, {precision}{', compiled' if compiled else ''}"
            named[words] = lambda p=precision, c=compiled: throughput(p, c)
    return named


def main() -> None:
    if not torch.cuda.is_available() and not QUICK:
        sys.exit("tests/gpu.py: this machine has no GPU, so nothing was measured")
    begun = time.perf_counter()
    set_matmul_precision(Device.device, 768)
    torch.backends.cudnn.allow_tf32 = False  # equality is that of fp32
    result: dict = {"machine": machine(), "quick": QUICK}
    for name, part in parts().items():
        start = time.perf_counter()
        if start - begun > LIMIT - 100:
            result[name] = "no time was left"
            continue
        try:
            result[name] = part()
        except Exception as e:  # the others may still say something
            result[name] = f"{type(e).__name__}: {e}"
        torch.backends.cudnn.allow_tf32 = True  # as a training finds it
        result[f"seconds of {name}"] = time.perf_counter() - start
        clean()
        keep(result)
    print(json.dumps(result, indent=1))


def keep(result: dict) -> None:
    "Write what is known by now to the files that were named."
    for file in sys.argv[1:]:
        if not file.startswith("-"):
            Path(file).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
