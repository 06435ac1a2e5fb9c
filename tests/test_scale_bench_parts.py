"The benchmarks of the parts. No time is asserted: the machine is not ours alone."

import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers_dalle import published, refusal
from PIL import Image

from beit_nb.scale import bench_parts as b


def test_small_models_are_built_in_both_settings_and_the_setting_is_put_back():
    layers = pytest.importorskip("timm.layers")
    before = layers.use_fused_attn()

    models = b.small_models(b.SMALL_SHAPE)

    fused = {name: m.blocks[0].attn.fused_attn for name, m in models.items() if "timm" in name}
    assert fused == {name: "fused" in name for name in fused} and len(fused) == 4
    assert layers.use_fused_attn() == before
    assert {"ours, paper", "ours, BEiT+"} <= models.keys()


def test_small_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.layers", None)

    assert "pip install timm" in refusal(b.bench_small, 1)


def test_a_pass_reaches_every_parameter_and_leaves_none():
    model = torch.nn.Linear(4, 4)
    seen = []
    model.weight.register_hook(lambda grad: seen.append(grad.dtype))

    b.forward_backward(model, torch.randn(2, 4), bf16=True)

    assert seen == [torch.float32] and model.weight.grad is None


def test_the_fastest_of_timm_is_the_peer(monkeypatch):
    pytest.importorskip("timm")

    def fake(candidates, turns, clock):
        return {name: [2.0 if "plain, bf16" in name else 4.0] for name in candidates}

    monkeypatch.setattr(b, "time_in_turns", fake)
    monkeypatch.setattr(b, "pick_precision", lambda precision, device: torch.bfloat16)
    result = b.bench_small(1, quick=True)

    assert result["fastest_of_timm"] == "timm ViT, plain, bf16"
    assert result["ours_against_fastest"] == 0.5
    assert result["rows"]["timm Beit, plain, bf16"]["per_second"] == 4 / 2


def test_bf16_is_left_out_where_it_would_be_imitated(monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setattr(b, "pick_precision", lambda precision, device: None)

    result = b.bench_small(1, quick=True)

    assert result["fastest_of_timm"].endswith("fp32") and result["ours_against_fastest"] > 0
    assert len(result["rows"]) == 6 and all(name.endswith("fp32") for name in result["rows"])


def test_both_make_as_many_masks_as_are_divided_by(monkeypatch):
    made = dict(official=0, ours=0)
    monkeypatch.setattr(b, "official_mask", lambda: made.update(official=made["official"] + 1))
    monkeypatch.setattr(b, "blockwise_mask", lambda rng: made.update(ours=made["ours"] + 1))

    row = b.bench_masks(1, quick=True)["rows"]["ours"]

    assert made == dict(official=2 * 20, ours=2 * 20)  # a turn, and one that warms up
    assert row["per_second"] == pytest.approx(20 / row["seconds"])


def test_jpegs_have_the_size_that_is_asked_for(tmp_path):
    files = b.write_jpegs(tmp_path, size=(100, 60))

    assert len(files) >= 10 and len(set(files)) == len(files)
    for file in files:
        with Image.open(file) as image:
            assert image.format == "JPEG" and image.size == (100, 60)
            assert np.asarray(image).std() > 5  # no empty border


def test_every_turn_of_the_loader_is_a_new_epoch(monkeypatch):
    keys, decoded = [], []

    class Samples:
        def __init__(self, pictures, transform, seed, pixels):
            self.place = transform

        def __getitem__(self, key):
            keys.append((self.place, key))

    monkeypatch.setattr(b, "write_jpegs", lambda folder: ["a.jpg", "b.jpg"])
    monkeypatch.setattr(b, "ImageFolder", lambda folder: Namespace(pixels=decoded.append))
    monkeypatch.setattr(b, "OfficialViews", lambda: lambda file: None)
    monkeypatch.setattr(b, "PretrainTransform", lambda recipe: recipe.jitter_on)
    monkeypatch.setattr(b, "TransformedDataset", Samples)

    rows = b.bench_loader(1, quick=True)["rows"]

    ways = ["ours", "ours, jitter on the device"]
    assert list(rows) == ["official", "decoding alone", *ways] and decoded == [0, 1, 0, 1]
    floor = rows["decoding alone"]["seconds"]
    assert all(rows[name]["share_of_peak"] == floor / rows[name]["seconds"] for name in ways)
    for place in ("loader", "device"):
        assert [key for p, key in keys if p == place] == [0, 1, 2, 3]


def test_a_shard_is_the_same_however_many_look(tmp_path):
    "And both sides of the benchmark pack every picture that they are divided by."
    b.write_jpegs(tmp_path, size=(64, 48))
    pictures = b.ImageFolder(tmp_path)
    for threads in (1, 3):
        b.shard_part(tmp_path / f"{threads}.tar", pictures, [4, 0, 7], threads=threads)

    rows = b.bench_shard(1, quick=True)["rows"]

    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "3.tar").read_bytes()
    assert list(rows) == ["one thread", "ours, a thread a core", "decoding alone"]
    assert all(row["per_second"] > 0 for row in rows.values())


def test_what_the_seconds_go_to(monkeypatch):
    "Work over peak is the floor; Winograd's products are products."
    spent = {"products": 2.0, "attention": 1.0, "rest": 1.0, "between": 0.0}
    monkeypatch.setattr(b, "operator_seconds", lambda run: dict(spent))
    row, only = dict(seconds=4.0), dict(seconds=4.0)
    cpu = torch.device("cpu")

    def multiply():
        return torch.ones(8, 9) @ torch.ones(9, 10)

    b.add_roofline(row, multiply, 720.0, cpu)
    b.add_roofline(only, multiply, 720.0, cpu, only_products=True)

    assert row["floor"] == 2 and row["share_of_peak"] == 0.5
    assert row["shares"] == {"products": 0.5, "attention": 0.25, "rest": 0.25, "between": 0.0}
    assert only["shares"] == {"products": 0.75, "rest": 0.25, "between": 0.0}
    assert row["at_peak"] == only["at_peak"] == 2 / 3


# --- the tokenizer


@pytest.mark.slow
def test_bench_compares_and_counts_equal_tokens(monkeypatch):
    small = published()[0]
    monkeypatch.setattr("dall_e.Encoder", lambda: small)
    threads = torch.get_num_threads()

    result = b.bench_tokenizer(batch=2, turns=3, size=48)

    assert result["ids_equal"] == 1 and result["ids_equal_bf16"] > 0.8
    assert list(result["rows"]) == ["published", "ours, fp32", "ours, bf16"]
    assert all(row["seconds"] > 0 for row in result["rows"].values())
    assert torch.get_num_threads() == threads and result["threads"] == 1


@pytest.mark.slow
def test_other_tokens_would_be_noticed(monkeypatch):
    "The share of equal ids is measured, and not taken for granted."
    small = published()[0]
    monkeypatch.setattr("dall_e.Encoder", lambda: small)
    monkeypatch.setattr(b, "map_pixels", lambda images: 1 - images)  # what the published one reads

    assert b.bench_tokenizer(batch=2, turns=1, size=48)["ids_equal"] < 1


def test_bench_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "dall_e", None)

    assert "pip install" in refusal(b.bench_tokenizer)
