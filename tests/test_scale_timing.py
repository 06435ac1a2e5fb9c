"The stopwatch: turns, ratios turn by turn, peaks, and what is printed of them."

import os
import time

import pytest
import torch

import beit_nb
from beit_nb.scale import timing

MACHINE = "cpu family gpu beit_nb torch python".split()


class FakeClock:
    "Seconds that a test lets pass."

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


def test_candidates_take_turns_and_the_warm_up_is_forgotten():
    clock = FakeClock()
    order = []

    def run(name, seconds):
        order.append(name)
        clock.passes(seconds.pop(0))

    candidates = {
        "a": lambda times=[100.0, 1.0, 2.0]: run("a", times),
        "b": lambda times=[100.0, 3.0, 4.0]: run("b", times),
    }

    seconds = timing.time_in_turns(candidates, turns=2, clock=clock)

    assert order == ["a", "b"] * 3
    assert seconds == {"a": [1.0, 2.0], "b": [3.0, 4.0]}


def test_ratios_are_of_the_same_turn():
    "A machine that slows down tenfold changes no ratio; the ratio of medians would be another."
    seconds = {"base": [2.0, 30.0, 40.0], "new": [1.0, 10.0, 40.0]}

    rows = timing.compare(seconds, items=8, base="base")

    assert rows["new"] == dict(
        seconds=10.0,
        low=1.0,
        high=40.0,
        per_second=0.8,
        ratio=2.0,
        ratio_low=1.0,
        ratio_high=3.0,
    )
    assert rows["base"]["ratio_low"] == rows["base"]["ratio_high"] == 1


def test_a_base_with_another_number_of_turns_is_a_defect():
    with pytest.raises(ValueError):
        timing.compare({"base": [1.0], "new": [1.0, 2.0]}, 1, "base")


def test_which_clock():
    cpu = torch.device("cpu")

    assert timing.clock_for(cpu, threads=1) is time.thread_time
    assert timing.clock_for(cpu, threads=2) is time.perf_counter
    assert timing.clock_for(torch.device("cuda"), threads=1) is timing.gpu_clock


@pytest.mark.gpu
def test_a_gpu_is_waited_for():
    a = torch.randn(4096, 4096, device="cuda")
    start = timing.gpu_clock()
    for _ in range(20):
        a = a @ a / 4096
    launched = time.perf_counter() - start

    assert timing.gpu_clock() - start > launched


def test_the_peak_is_the_work_over_the_best_time(monkeypatch):
    monkeypatch.setattr(timing, "time_in_turns", lambda *args: dict(product=[4.0, 0.5, 2.0]))

    assert timing.peak_flops(width=10) == 2 * 10**3 / 0.5
    assert timing.machine_peaks(width=10) == dict(fp32=4000.0, bf16=4000.0)


def test_operators_are_sorted_by_what_they_do():
    "A product, an attention and a norm of one call, and Python that sleeps between them."
    a, heads = torch.randn(200, 200), torch.randn(4, 200, 32)

    def run():
        torch.nn.functional.layer_norm(a @ a, (200,))
        (heads @ heads.mT).softmax(2)
        time.sleep(0.05)

    run()
    seconds = timing.operator_seconds(run)

    assert list(seconds) == ["products", "attention", "rest", "between"]
    assert all(x > 0 for x in seconds.values()) and seconds["between"] > 0.04
    names = "mm", "bmm", "_log_softmax", "convolution_backward"
    kinds = [timing.operator_kind(name) for name in names]
    assert kinds == ["products", "attention", "rest", "products"]


def test_stages_are_timed_between_two_readings():
    "The median over three steps, of which one was slow."
    times = {
        "start": [0.0, 10.0, 20.0],
        "forward": [1.0, 15.0, 21.0],
        "backward": [3.0, 17.0, 23.0],
    }

    assert timing.stage_seconds(times) == dict(forward=1.0, backward=2.0)
    with pytest.raises(ValueError):
        timing.stage_seconds({"start": [0.0, 10.0], "forward": [1.0]})


def test_the_models_stages_are_divided_by_kinds_of_operators():
    stages = dict(tokenizer=2.0, forward=1.0, backward=4.0, optimizer=1.0)

    shares = timing.step_shares(stages, dict(products=3.0, rest=1.0))

    assert list(shares) == ["tokenizer", "products", "rest", "optimizer"]
    assert shares == pytest.approx(
        dict(tokenizer=2 / 8, products=3.75 / 8, rest=1.25 / 8, optimizer=1 / 8)
    )


def test_a_row_tells_what_is_missing_to_its_floor():
    shares = timing.as_shares({"tokenizer": 1.0, "products": 2.0, "rest": 1.0})

    told = timing.roofline(8.0, 6.0, shares, of_products=3.0)

    assert told["shares"] == {"tokenizer": 0.25, "products": 0.5, "rest": 0.25}
    assert told["floor"] == 6 and told["share_of_peak"] == 0.75 and told["at_peak"] == 3 / 4
    assert "at_peak" not in timing.roofline(8.0, 6.0, {"decoding": 1.0})
    said = timing.shares_text(told)
    assert said == "  tokenizer 25%, products 50%, rest 25%; products at 75% of the peak"


def test_a_floor_adds_up_the_parts():
    assert timing.roofline_seconds([6.0, 8.0], [3.0, 2.0]) == 6
    with pytest.raises(ValueError):
        timing.roofline_seconds([1.0], [1.0, 2.0])


def test_a_figure_from_another_process():
    code = "import os; print('pid', os.getpid())"

    assert timing.run_alone(code) != os.getpid()
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        timing.run_alone("1 / 0")


def test_a_process_that_does_not_end_is_ended():
    began = time.perf_counter()

    with pytest.raises(RuntimeError, match="was not done after 0.5 seconds"):
        timing.run_alone("import time; time.sleep(60)", timeout=0.5)

    assert time.perf_counter() - began < 30


def test_the_machine_is_named():
    described = timing.machine()

    assert described["torch"] == torch.__version__
    assert described["beit_nb"] == beit_nb.__version__
    assert described["cpu"] and described.keys() == set(MACHINE)


def test_a_table_shows_every_row_and_the_figures_behind_it():
    rows = timing.compare(dict(a=[2.0, 3.0], b=[1.0, 1.0]), 4, "a")
    result = dict(rows=rows, items="cakes", ours_against_a=2.5, ids_equal=1.0, threads=7)

    title, *lines = timing.results_table("baking", result).splitlines()

    assert title.split()[:2] == ["baking", "seconds"] and "cakes/s" in title
    assert lines[0].split()[:2] == ["a", "2.5"]
    assert lines[1].split() == "b 1 (1 .. 1) 4 2.50 (2.00 .. 3.00)".split()
    assert lines[2:] == ["ours_against_a: 2.50", "ids_equal: 1.00"]


def test_a_table_with_memory():
    rows = timing.compare(dict(a=[2.0], b=[1.0]), 4, "a")
    rows["a"] |= dict(share_of_peak=0.5)
    rows["b"] |= dict(share_of_peak=0.25, memory_mb=123.4)

    title, a, b = timing.results_table("baking", dict(rows=rows, items="cakes")).splitlines()

    assert title.endswith("memory of peak")
    assert a.endswith("       -     50%") and b.endswith("  123 MB     25%")
    assert len(title) == len(a) == len(b)


def test_a_figure_that_a_row_does_not_have_is_a_dash():
    "Such as the share of a row that is the floor itself; nothing of it prints `nan`."
    rows = timing.compare(dict(floor=[2.0], slow=[4.0]), 4, "floor")
    rows["slow"] |= dict(share_of_peak=0.5)

    title, floor, slow = timing.results_table("x", dict(rows=rows, items="cakes")).splitlines()

    assert floor.split()[-1] == "-" and slow.split()[-1] == "50%"
    assert len(title) == len(floor) == len(slow)
