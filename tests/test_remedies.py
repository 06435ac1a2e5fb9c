"The page of a diagnosis: its order, its width, and that strangers' names cannot move a cursor."

import json
import math

from beit_nb.health import Finding, RunCourse, check_masks, columns_of
from beit_nb.remedies import (
    CAUSES,
    Examination,
    as_data,
    check_pixels,
    checks_of,
    findings_of,
    page_lines,
)


def seen(*findings, **columns):
    lines = [{"step": 20} | columns]
    return Examination("runs/a", RunCourse("pretrain", columns_of(lines), total=40), [*findings])


def test_the_worst_cause_comes_first_and_each_once():
    found = seen(
        Finding("a", "look", "", "slow-data"),
        Finding("b", "broken", "", "masks-empty"),
        Finding("c", "look", "", "slow-data"),
    )

    assert found.causes == ["masks-empty", "slow-data"] and found.status == 3


def test_to_be_outside_is_a_cause_only_where_there_is_no_other():
    outside = Finding("band of loss", "look", "", "outside-the-band")

    assert seen(outside).causes == ["outside-the-band"]
    assert seen(outside, Finding("a", "look", "", "slow-data")).causes == ["slow-data"]


def test_a_page_is_a_page():
    "With every cause at once it is at most 100 columns wide."
    found = seen(*(Finding("check", "look", "word " * 60, name) for name in CAUSES), loss=1.0)

    lines = page_lines(found)

    assert max(map(len, lines)) <= 100
    assert lines[0] == "runs/a: pretrain, step 20 of 40" and lines[1] == "verdict: look at it"
    for name in CAUSES:
        assert name == "outside-the-band" or any(name in line for line in lines)


def test_what_is_not_judged_stands_apart():
    text = "\n".join(page_lines(seen(Finding("masks", "unknown", "the log does not tell"))))

    assert "verdict: fine" in text and text.index("Not judged:") < text.index("masks")


def test_data_are_json():
    data = as_data(seen(Finding("a", "fine", "good"), loss=math.nan, lr=1e-3))

    again = json.loads(json.dumps(data, allow_nan=False))

    assert again["late"] == {"lr": 1e-3} and again["status"] == 0
    assert again["findings"][0] == {"check": "a", "grade": "fine", "said": "good", "cause": ""}


def test_where_nothing_is_hidden_tokens_and_loss_say_nothing():
    lines = [{"step": 20 * i, "loss": 0.1, "masked": 0.2, "token_entropy": 0.1} for i in range(40)]
    config = dict(vocab_size=256, num_mask_patches=26)

    found = findings_of(RunCourse("pretrain", columns_of(lines), config), None, [])

    assert {f.check: f.cause for f in found}["masks"] == "masks-empty"
    assert {"tokens", "loss"}.isdisjoint(f.check for f in found)


def test_pixels_have_a_check_of_their_own():
    lines = [{"step": 20 * i, "loss": 0.5, "constant_mse": 0.5} for i in range(40)]
    course = RunCourse("pretrain", columns_of(lines), dict(targets="pixels", masking="none"))

    checks = checks_of(course)

    assert check_pixels in checks and check_masks not in checks
    assert check_pixels(course)[0].cause == "not-learning"
