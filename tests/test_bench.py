"""The benchmarks run and say what they must; the competitors compute the same. No time is asserted: the machine is not ours alone."""

import json

import pytest
import torch

from beit_nb.engine.winograd import optimize_for_inference
from beit_nb import bench as b
from beit_nb.dalle import DalleEncoder, DalleVAE
from beit_nb.masking import blockwise_masks
from beit_nb.mim import BeitForMaskedImageModeling, masked_indices, mim_loss
from beit_nb.device import KERNELS, kernels_for, set_matmul_precision
from beit_nb.vit import Block, DropPath


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# --- equality


def test_base_model_equals_the_official_style_in_fp32(form=b.PLUS):
    """BEiT-B/16 at full size, one picture.

    Logits to 1e-5, gradients to 1e-5 of their length, also with the matrix products that `set_matmul_precision`
    chooses.
    """
    torch.manual_seed(0)
    ours = BeitForMaskedImageModeling(**form)
    theirs = b.OfficialStyle(ours)
    images = torch.randn(1, 3, 224, 224)
    mask = blockwise_masks(1).flatten(1)
    targets = torch.randint(0, 8192, (int(mask.sum()),))
    want = theirs(images, mask)
    mim_loss(want, targets).backward()
    before = torch.get_float32_matmul_precision()
    try:
        # with the choice for large models, and without
        for width in (768, 64):
            set_matmul_precision("cpu", width)
            ours.zero_grad()
            got = ours(images, mask)
            mim_loss(got, targets).backward()
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
            assert (gradients(ours) - gradients(theirs)).norm() <= 1e-5 * gradients(theirs).norm()
    finally:
        torch.set_float32_matmul_precision(before)


def test_tokens_at_full_size_equal_the_official_style():
    torch.manual_seed(0)
    encoder = DalleEncoder().requires_grad_(False)
    images = torch.rand(2, 3, 112, 112)
    want = b.official_tokens(encoder, images)
    dall_e = pytest.importorskip("dall_e")
    theirs = dall_e.Encoder()
    theirs.load_state_dict(encoder.state_dict())
    from beit_nb.dvae import map_pixels

    with torch.no_grad():
        assert torch.equal(theirs(map_pixels(images)).argmax(1), want)
    masked_index = masked_indices(blockwise_masks(2))
    with torch.no_grad():
        ours = optimize_for_inference(DalleVAE(encoder))
        assert torch.equal(ours.get_codebook_indices(images), want) and torch.equal(
            ours.indices_at(images, masked_index), want.flatten()[masked_index]
        )
        half = optimize_for_inference(ours, torch.bfloat16)
        # near-ties may flip
        assert (half.get_codebook_indices(images) == want).float().mean() > 0.99


@pytest.mark.parametrize("form", [b.PLUS, dict(use_abs_pos_emb=True), dict(use_abs_pos_emb=False)])
def test_small_model_equals_the_official_style(form):
    torch.manual_seed(0)
    ours = BeitForMaskedImageModeling(
        img_size=32,
        patch_size=4,
        embed_dim=64,
        depth=3,
        num_heads=4,
        vocab_size=50,
        weight_init="xavier",
        **form,
    )
    theirs = b.OfficialStyle(ours)
    images = torch.randn(3, 3, 32, 32)
    mask = blockwise_masks(3, (8, 8), 24, 4).flatten(1)
    x = ours(images, mask)
    y = theirs(images, mask)
    x.square().mean().backward(), y.square().mean().backward()
    torch.testing.assert_close(x, y, atol=1e-5, rtol=0)
    assert (gradients(ours) - gradients(theirs)).norm() <= 1e-5 * gradients(theirs).norm()


# --- drop path and the last block


def test_skipping_dropped_samples_changes_nothing(monkeypatch):
    "Same draws: outputs and gradients of the road that skips and of the road that multiplies by 0."
    torch.manual_seed(0)
    ours = BeitForMaskedImageModeling(
        img_size=32,
        patch_size=4,
        embed_dim=32,
        depth=4,
        num_heads=2,
        vocab_size=50,
        drop_path_rate=0.6,
        weight_init="xavier",
        **b.PLUS,
    )
    images = torch.randn(6, 3, 32, 32)
    mask = blockwise_masks(6, (8, 8), 24, 4)
    results = []
    for skip in (True, False):
        monkeypatch.setitem(KERNELS, "cpu", kernels_for("cpu")._replace(skip_dropped=skip))
        ours.zero_grad()
        torch.manual_seed(1)
        logits = ours(images, mask)
        logits.square().mean().backward()
        results.append((logits, gradients(ours)))
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def test_skipping_goes_with_activation_checkpointing():
    "The second pass through a block must drop the samples of the first."
    torch.manual_seed(0)
    ours = BeitForMaskedImageModeling(
        img_size=32,
        patch_size=4,
        embed_dim=32,
        depth=3,
        num_heads=2,
        vocab_size=50,
        drop_path_rate=0.6,
        weight_init="xavier",
        **b.PLUS,
    )
    images = torch.randn(6, 3, 32, 32)
    mask = blockwise_masks(6, (8, 8), 24, 4)
    results = []
    for ours.use_checkpoint in (False, True):
        ours.zero_grad()
        torch.manual_seed(1)
        ours(images, mask).square().mean().backward()
        results.append(gradients(ours))
    torch.testing.assert_close(*results, atol=1e-7, rtol=1e-5)


def test_all_samples_dropped_still_gives_every_parameter_a_gradient():
    "DistributedDataParallel waits for all of them."
    block = Block(16, 2, drop_path=1 - 1e-9, init_values=0.1)
    x = torch.randn(2, 5, 16)
    y = block(x)
    y.sum().backward()
    assert torch.equal(y, x) and all(
        p.grad is not None and (p.grad == 0).all() for p in block.parameters()
    )


def test_drop_path_in_bf16_keeps_the_stream_in_fp32():
    drop = DropPath(0.5)
    line = torch.nn.Linear(8, 8)
    x = torch.randn(64, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = drop(x, line)
    assert y.dtype == torch.float32 and 0 < ((y == x).all(2).all(1)).sum() < 64


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_places_only_equals_all_places_and_then_choosing(checkpointing):
    torch.manual_seed(0)
    ours = BeitForMaskedImageModeling(
        img_size=32,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        vocab_size=50,
        use_checkpoint=checkpointing,
        **b.PLUS,
    )
    images = torch.randn(3, 3, 32, 32)
    mask = blockwise_masks(3, (8, 8), 24, 4).flatten(1)
    targets = torch.randint(0, 50, (int(mask.sum()),))
    grads = []
    for logits in (
        lambda: ours(images, mask),
        lambda: ours(images, mask, return_all_tokens=True)[mask],
        lambda: ours(images, mask, masked_index=masked_indices(mask)),
    ):
        ours.zero_grad()
        mim_loss(logits(), targets).backward()
        grads.append(gradients(ours))
    for g in grads[1:]:
        assert (g - grads[0]).norm() <= 1e-6 * grads[0].norm()


def test_tune_never_touches_cuda_small_models_or_amx(monkeypatch):
    before = torch.get_float32_matmul_precision()
    try:
        monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
        for amx, device, width, want in (
            (False, "cpu", 768, "medium"),
            (True, "cpu", 768, "highest"),
            (False, "cuda", 768, "highest"),
            (False, "cpu", 192, "highest"),
        ):
            monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
            assert set_matmul_precision(device, width) == want == torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)


# --- the command's function


@pytest.mark.parametrize("name", list(b.BENCHES))
def test_quick_form_prints_a_table_and_writes_json(name, tmp_path, capsys):
    for peer in dict(step=["transformers"], small=["timm"], tokenizer=["dall_e"]).get(name, []):
        pytest.importorskip(peer)
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    got = b.bench([name], threads=1, out=tmp_path, quick=True)
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (threads, precision)
    text = capsys.readouterr().out
    assert (
        got.keys() == {name}
        and text.startswith(name)
        and json.loads((tmp_path / "bench.json").read_text()) == json.loads(json.dumps(got))
    )
    result = got[name]
    assert (
        result["quick"]
        and result["threads"] == 1
        and result["machine"]["torch"] == torch.__version__
    )
    if name == "tokenizer":
        assert (
            result["ids_equal"] == 1
            and result["ratio_low"] <= result["ratio"] <= result["ratio_high"]
        )
        return
    for key, row in result["rows"].items():
        assert (
            key in text
            and row["low"] <= row["seconds"] <= row["high"]
            and row["per_second"] > 0
            and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        )
    assert any(k.startswith("ours") for k in result["rows"])
    if name == "step":
        assert (
            set(result["rows"]["ours, fp32"]["stages"])
            == {"tokenizer", "forward", "backward", "optimizer"}
            and result["rows"]["ours, fp32"]["memory_mb"] > 0
        )


def test_results_of_other_benchmarks_stay_in_the_file(tmp_path):
    (tmp_path / "bench.json").write_text('{"small": 1}')
    assert b.bench(["masks"], 1, tmp_path, quick=True).keys() == {"small", "masks"}


def test_an_unknown_name_is_named(tmp_path):
    with pytest.raises(ValueError, match="no benchmark 'speed'; choose from step, small"):
        b.bench(["speed"], out=tmp_path)
