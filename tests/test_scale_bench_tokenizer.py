"""The clock of the tokenizer: ours against the published package, on equal tokens."""

import sys

import torch
from helpers_dalle import published, refusal

from beit_nb.scale.bench import bench_tokenizer


def test_bench_compares_and_counts_equal_tokens(monkeypatch):
    small = published()[0]
    monkeypatch.setattr("dall_e.Encoder", lambda: small)
    threads = torch.get_num_threads()

    result = bench_tokenizer(batch=2, repeats=3, size=48)

    assert result["ids_equal"] == 1
    assert result["ratio_low"] <= result["ratio"] <= result["ratio_high"]
    assert result["seconds"].keys() == {"published", "ours"}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert torch.get_num_threads() == threads


def test_bench_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "dall_e", None)

    assert "pip install" in refusal(bench_tokenizer)
