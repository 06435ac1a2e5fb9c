"What a run tells: its log, its rates, and the step in which a number is none."

import io
import json
import math
from contextlib import closing

import numpy as np
import pytest
import torch

from beit_nb import BeitError
from beit_nb.engine import log as log_module
from beit_nb.engine.log import (
    Progress,
    RunLog,
    StepMetrics,
    first_nonfinite,
    read_log,
    read_metrics,
    stop_on_nonfinite,
    write_metrics,
)


def write_rows(out, start, steps, total=100):
    with closing(RunLog(out, start, total, quiet=True)) as log:
        for step in steps:
            log.write(step, {"loss": 1.0 / step})


def test_rows_come_back_as_they_were_written(tmp_path):
    values = {"loss": 0.5, "damaged": 2, "passed_over": ["a.jpg", "ü.jpg"]}
    with closing(RunLog(tmp_path, 0, 10, quiet=True)) as log:
        log.write(3, values | {"view": np.zeros((2, 2, 3), np.uint8)})
        log.write(4, {"view": np.zeros((2, 2, 3), np.uint8)})  # nothing for the JSON

    assert read_log(tmp_path) == [{"step": 3} | values]


def test_what_a_kill_left_is_read(tmp_path):
    assert read_log(tmp_path) == []
    (tmp_path / "log.jsonl").write_text('{"step": 5}\n{"step": 10}\n{"step": 15, "lo')
    assert [row["step"] for row in read_log(tmp_path)] == [5, 10]


@pytest.mark.parametrize("start", [0, 5, 12, 100])
def test_steps_that_happen_again_are_forgotten(tmp_path, start):
    write_rows(tmp_path, 0, range(5, 101, 5))

    write_rows(tmp_path, start, range(start + 1, start + 3))

    steps = [row["step"] for row in read_log(tmp_path)]
    assert steps == [*range(5, start + 1, 5), start + 1, start + 2]
    assert not list(tmp_path.glob("*.part"))


def test_other_processes_neither_write_nor_speak(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(log_module, "rank", lambda: 1)

    with closing(RunLog(tmp_path, 0, 10, tensorboard=True)) as log:
        log.write(10, {"loss": 1.0})

    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_a_full_disk_is_said_in_one_line(tmp_path):
    log = RunLog(tmp_path, 0, 10, quiet=True)
    log.file = tmp_path / "no-folder" / "log.jsonl"

    with closing(log), pytest.raises(BeitError, match="cannot write .*log.jsonl"):
        log.write(1, {"loss": 1.0})


def test_a_plain_line_every_five_seconds(capsys):
    row = {"loss": 1.23456, "grad_norm": 3.0, "images_per_s": 480.0, "seconds_left": 3700.0}
    progress = Progress(start=0, total=40, label="toy")

    progress.show(10, row)  # too early
    progress.printed_at -= 6
    progress.show(20, row)
    progress.show(30, row)  # too early again
    progress.show(40, row | {"seconds_left": 0.0})  # the last one, always

    assert capsys.readouterr().out.splitlines() == [
        "toy 20/40: loss 1.235, images_per_s 480, 1:01:40 left",
        "toy 40/40: loss 1.235, images_per_s 480, 0:00:00 left",
    ]


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)

    with closing(Progress(start=10, total=40, label="toy", shown=("mse",))) as progress:
        progress.show(20, {"mse": 0.5, "loss": 1.0})

    assert "20/40" in terminal.getvalue() and "mse 0.5" in terminal.getvalue()
    assert "loss" not in terminal.getvalue()
    assert capsys.readouterr().out == ""


class Clock:
    "A time that passes only when somebody says so."

    now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(log_module, "time", clock)
    return clock


def test_metrics_are_read_at_once_and_rates_follow_the_clock(clock):
    metrics = StepMetrics()
    for x in (1.0, 2.0, 3.0):
        metrics.rows.append({"loss": torch.tensor(x), "accuracy": torch.tensor(x / 4)})
    clock.now += 2
    metrics.seconds_waited = 0.5

    table = metrics.read()
    rates = metrics.rates(batch_size=32, device=torch.device("cpu"))

    assert table == {"loss": [1, 2, 3], "accuracy": [0.25, 0.5, 0.75]}
    assert rates["images_per_s"] == pytest.approx(48)
    assert rates["data_share"] == pytest.approx(0.25)
    assert rates["seconds_per_step"] == pytest.approx(2 / 3)
    assert rates["memory_mb"] > 10


def test_waiting_for_batches_is_remembered(clock):
    "And the time between them, in which the caller works, is not."

    def slow():
        for batch in range(3):
            clock.now += 0.25
            yield batch

    metrics = StepMetrics()
    seen = []
    for batch in metrics.timed(slow()):
        clock.now += 1
        seen.append(batch)

    assert seen == [0, 1, 2]
    assert metrics.seconds_waited == 0.75
    metrics.restart()
    assert metrics.seconds_waited == 0 and metrics.rows == []


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "loss, norm, step, step_fp16",
    [
        ([1, 1, 1], [1, 1, 1], None, None),
        ([1, NAN, NAN], [1, NAN, NAN], 1, 1),
        ([1, 1, 1], [1, 1, INF], 2, None),  # fp16's scaler skips such a step
        ([-INF, 1, 1], [1, 1, 1], 0, 0),
    ],
)
def test_the_first_number_that_is_none(loss, norm, step, step_fp16):
    table = {"loss": loss, "grad_norm": norm}
    assert first_nonfinite(table) == step
    assert first_nonfinite(table, skips_overflow=True) == step_fp16


@pytest.mark.parametrize(
    "saved, kept", [(4, "last.pt has sound weights, of step 4"), (0, "no che")]
)
def test_the_guilty_batch_is_kept(tmp_path, saved, kept):
    sources = [{"number": 7, "path": "7.png"}]

    with pytest.raises(FloatingPointError, match="in step 6 the loss is nan.*lower --lr") as e:
        stop_on_nonfinite(tmp_path, 5, NAN, 2.0, sources, saved)

    assert kept in str(e.value) and "\n" not in str(e.value)
    record = json.loads((tmp_path / "nonfinite-step-6.json").read_text())
    assert record == {"step": 6, "loss": "nan", "grad_norm": "2.0", "samples": sources}


@pytest.mark.parametrize(
    "line", ["3", "[]", "{}", '{"step": -5}', '{"step": "5"}', '{"step": 1e9}']
)
def test_a_line_without_a_step(tmp_path, line):
    (tmp_path / "log.jsonl").write_text('{"step": 3, "loss": 1}\n' + line)

    with pytest.raises(BeitError, match=r"log.jsonl is damaged .line 2 has no step"):
        read_log(tmp_path)


def test_bytes_that_are_no_text_are_passed_over(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 3}\n\xff\xfe\n' + b"[" * 10**5)

    assert read_log(tmp_path) == [{"step": 3}]


def test_figures_of_a_finished_run_only(tmp_path):
    assert read_metrics(tmp_path) is None

    part = write_metrics(tmp_path, {"mse": 0.5}, finished=False)
    assert json.loads((tmp_path / "metrics.json").read_text()) == part
    assert part["finished"] is False and read_metrics(tmp_path) is None

    whole = write_metrics(tmp_path, {"mse": 0.25})
    assert read_metrics(tmp_path) == whole
    assert whole["finished"] is True and whole["mse"] == 0.25 and whole["peak_rss_mb"] > 50


def test_figures_of_an_older_version_are_no_finished_run(tmp_path):
    "They do not say whether the run went to its end."
    (tmp_path / "metrics.json").write_text('{"mse": 0.25}')
    assert read_metrics(tmp_path) is None


def test_damaged_figures_are_one_line(tmp_path):
    (tmp_path / "metrics.json").write_text('{"finished": tr')
    with pytest.raises(BeitError, match=f"^{tmp_path}/metrics.json is damaged .*; delete it"):
        read_metrics(tmp_path)
