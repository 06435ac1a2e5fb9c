"""Which kernels, which precision: the table, and what is refused."""

import pytest
import torch

from beit_nb import BeitError
from beit_nb.device import (
    KERNELS,
    default_device,
    kernels_for,
    pick_precision,
    set_matmul_precision,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_every_device_has_a_row():
    assert kernels_for("cuda") is kernels_for(torch.device("cuda", 1)) is KERNELS["cuda"]
    assert kernels_for("cpu") is kernels_for(CPU) is KERNELS["cpu"]
    assert kernels_for("meta") is KERNELS["cpu"]
    assert kernels_for("cuda").fused_attention and not kernels_for("cpu").fused_attention
    assert kernels_for("cpu").skip_dropped and not kernels_for("cuda").skip_dropped
    assert kernels_for("cpu").tokenizer is None  # ids stay those of fp32


def test_default_device_is_the_current_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device() == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert default_device() == torch.device("cuda", 3)


@pytest.mark.parametrize("name, dtype", [("fp32", None), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_named_precision_is_taken(name, dtype, device):
    assert pick_precision(name, device) == dtype


def test_fp16_is_for_gpus():
    assert pick_precision("fp16", CUDA) == torch.float16
    with pytest.raises(BeitError, match="choose bf16, fp32 or auto"):
        pick_precision("fp16", CPU)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_an_unknown_precision_is_refused(device):
    with pytest.raises(BeitError, match="'fp8'; choose auto, fp32, bf16, fp16"):
        pick_precision("fp8", device)


@pytest.mark.parametrize("fast, dtype", [(True, torch.bfloat16), (False, None)])
def test_auto_takes_bf16_where_the_hardware_multiplies_in_it(fast, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    assert pick_precision("auto", CPU) == dtype
    assert pick_precision("auto", CUDA) == dtype


def test_auto_is_fp32_where_torch_cannot_say(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert pick_precision("auto", CPU) is None


@pytest.mark.parametrize(
    "avx512, amx, device, width, want",
    [
        (True, False, "cpu", 768, "medium"),
        (True, False, "cpu", 512, "medium"),
        (True, False, "cpu", 192, "highest"),  # small matrices lose by it
        (True, True, "cpu", 768, "highest"),  # would be bf16
        (True, False, "cuda", 768, "highest"),  # would be tf32
        (False, False, "cpu", 768, "highest"),
    ],
)
def test_matmul_precision(avx512, amx, device, width, want, monkeypatch, precision_restored):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)

    assert set_matmul_precision(device, width) == want
    assert torch.get_float32_matmul_precision() == want


def test_matmul_precision_stays_highest_where_torch_cannot_say(monkeypatch, precision_restored):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True, raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert set_matmul_precision("cpu", 768) == "highest"


def test_matmul_precision_still_multiplies_in_fp32(precision_restored):
    a, b = torch.randn(256, 768), torch.randn(768, 768)
    set_matmul_precision("cpu", 768)
    # bf16 products would miss by 0.1
    torch.testing.assert_close((a @ b).double(), a.double() @ b.double(), atol=1e-3, rtol=0)
