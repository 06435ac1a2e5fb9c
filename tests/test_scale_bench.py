"`beit bench`: which benchmarks run, what is printed, what is kept."

import json

import pytest
import torch

from beit_nb import BeitError
from beit_nb.scale import bench as b
from beit_nb.scale.timing import machine

ROWS = {"ours": dict(seconds=2.0, low=1.0, high=3.0, per_second=4.0, ratio=1.0)}
ROWS["ours"] |= dict(ratio_low=1.0, ratio_high=1.0)


@pytest.fixture
def two(monkeypatch):
    "Two benchmarks that note how they were called, and one whose peer is missing."
    calls = []

    def benchmark(name):
        def run(threads, quick):
            calls.append((name, threads, torch.get_num_threads(), quick))
            torch.set_float32_matmul_precision("medium")
            return dict(rows=ROWS, items="cakes")

        return run

    def missing(threads, quick):
        raise BeitError("it compares with a peer; pip install peer")

    benches = dict(one=benchmark("one"), gone=missing, two=benchmark("two"))
    monkeypatch.setattr(b, "BENCHES", benches)
    return calls


def test_all_are_run_and_what_is_not_installed_is_passed_over(two, tmp_path, capsys):
    results = b.bench(out=tmp_path)
    said = capsys.readouterr().out

    assert [call[0] for call in two] == ["one", "two"] and list(results) == ["one", "two"]
    assert "gone: it compares with a peer; pip install peer" in said
    assert said.startswith("one  ") and "\ntwo  " in said and "cakes/s" in said


def test_what_was_asked_for_and_is_not_installed_is_refused(two, tmp_path):
    with pytest.raises(BeitError, match="pip install peer"):
        b.bench(["one", "gone"], out=tmp_path)

    assert b.read_results(tmp_path / "bench.json").keys() == {"one"}  # what was done is kept


def test_a_result_is_kept_with_its_threads_and_machine(two, tmp_path):
    b.bench(["two"], threads=3, out=tmp_path, quick=True)
    [kept] = json.loads((tmp_path / "bench.json").read_text()).values()

    assert two == [("two", 3, 3, True)]
    assert kept["rows"] == ROWS and kept["threads"] == 3 and kept["quick"] is True
    assert kept["machine"] == json.loads(json.dumps(machine()))


def test_other_results_stay_in_the_file_and_the_same_are_replaced(two, tmp_path):
    file = tmp_path / "bench.json"
    file.write_text('{"small": 1, "one": 2}')

    b.bench(["one"], 1, tmp_path)
    kept = json.loads(file.read_text())

    assert kept["small"] == 1 and kept["one"]["rows"] == ROWS


def test_settings_of_the_process_are_put_back(two, tmp_path):
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()

    b.bench(["one"], threads=threads + 1, out=tmp_path)
    with pytest.raises(BeitError):
        b.bench(["gone"], threads=threads + 1, out=tmp_path)

    assert torch.get_num_threads() == threads
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize(
    "says,wrong",
    [
        ("no benchmark 'speed'; choose from step, small, loader, masks", dict(names=["speed"])),
        ("threads 0 must be 1 or more", dict(names=["masks"], threads=0)),
    ],
)
def test_refused_before_anything_runs(says, wrong, tmp_path):
    with pytest.raises(BeitError, match=says):
        b.bench(**wrong, out=tmp_path / "bench")

    assert not (tmp_path / "bench").exists()


def test_a_damaged_file_is_refused_and_left_alone(two, tmp_path):
    file = tmp_path / "bench.json"
    file.write_text("{,}")

    with pytest.raises(BeitError, match="bench.json is damaged"):
        b.bench(["one"], out=tmp_path)
    assert file.read_text() == "{,}" and two == []


@pytest.mark.slow
@pytest.mark.parametrize("name", list(b.BENCHES))
def test_the_quick_form_runs_everything(name, tmp_path, capsys):
    for peer in dict(step=["transformers"], small=["timm"], tokenizer=["dall_e"]).get(name, []):
        pytest.importorskip(peer)

    result = b.bench([name], threads=1, out=tmp_path, quick=True)[name]
    said = capsys.readouterr().out

    assert said.startswith(name) and result["quick"]
    if name == "tokenizer":
        assert result["ids_equal"] == 1
    peers = [row for row in result["rows"] if not row.startswith("ours")]
    assert peers and len(peers) < len(result["rows"]) and all(row in said for row in peers)
    if name == "step":
        ours = result["rows"]["ours, fp32"]
        assert list(ours["stages"]) == ["tokenizer", "forward", "backward", "optimizer"]
        assert ours["memory_mb"] > 0 and 0 < ours["share_of_peak"] < 1
        parts = ["tokenizer", "products", "attention", "rest", "between", "optimizer"]
        assert list(ours["shares"]) == parts and sum(ours["shares"].values()) == pytest.approx(1)
        assert result["work_per_image"] == pytest.approx(160.1e9, 1e-3)
