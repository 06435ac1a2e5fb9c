"Checks on logs made by hand: what each calls fine, look, broken, and where it does not know."

import math

import numpy as np
import pytest

from beit_nb.health import (
    RunCourse,
    check_alphabet,
    check_gradient,
    check_loss,
    check_masks,
    check_numbers,
    check_schedule,
    columns_of,
    settled,
)


def course(rows=40, total=None, config=(), measured=(), **columns):
    "A pre-training whose columns are numbers, or functions of the line."
    lines = [
        {"step": 20 * (i + 1)} | {k: f(i) if callable(f) else f for k, f in columns.items()}
        for i in range(rows)
    ]
    config = dict(vocab_size=256, num_mask_patches=26) | dict(config)
    return RunCourse("pretrain", columns_of(lines), config, total=total, measured=dict(measured))


def test_a_column_has_its_own_steps():
    columns = columns_of([{"step": 1, "loss": 2.0}, {"step": 2, "knn": 0.5, "curve": [1]}])

    assert columns["knn"][0].tolist() == [2] and columns["loss"][1].tolist() == [2.0]
    assert "curve" not in columns and "step" not in columns


def test_nothing_is_known_of_an_empty_log():
    empty = RunCourse("pretrain", {}, dict(vocab_size=256, num_mask_patches=26))

    for check in (check_schedule, check_masks, check_alphabet, check_loss, check_gradient):
        assert check(empty)[0].grade == "unknown"
    assert empty.reached == 0 and empty.late("loss") is None


def test_the_warm_up_is_no_time_to_judge():
    "Every landmark is above it: a rate that rises has taught nothing yet."
    rising = course(10, total=10_000, loss=5.55, lr=lambda i: 1e-4 * (i + 1))
    over = course(40, total=10_000, loss=5.55, lr=lambda i: 1e-4 * min(i + 1, 10))

    assert not settled(rising) and check_loss(rising)[0].grade == "unknown"
    assert check_loss(over)[0].cause == "frozen-weights"


@pytest.mark.parametrize(
    ("total", "grade"), [(800, "look"), (8000, "fine")], ids=["at its end", "early"]
)
def test_a_plateau_is_a_fault_only_late(total, grade):
    known = dict(token_entropy=4.3, place_entropy=2.9)
    rests = course(40, total, measured=known, loss=lambda i: 2.9 + 2 * 0.5**i, lr=1e-3)

    assert check_loss(rests)[0].grade == grade


def test_a_loss_that_never_was_a_number_is_found_by_its_step():
    broken = course(loss=lambda i: math.nan if i == 3 else 5.0)

    [finding] = check_numbers(broken)

    assert "step 80" in finding.said and finding.cause == "diverged"


def test_finite_losses_are_counted_in_words_that_fit():
    one = RunCourse("pretrain", columns_of([dict(step=1, loss=6.0, grad_norm=math.inf)]))
    two = RunCourse("pretrain", columns_of([dict(step=1, loss=6.0), dict(step=2, loss=5.9)]))

    [of_one], [of_two] = check_numbers(one), check_numbers(two)

    assert of_one.said.startswith("the one logged loss is finite; a gradient norm that is not")
    assert of_two.said == "all 2 logged losses are finite"


def test_the_rate_is_blamed_before_anything_else():
    high = course(loss=lambda i: 5.0 if i < 3 else 9.0, lr=1.5e-2)
    high.recipe_lr = 1.5e-3

    assert check_loss(high)[0].cause == check_schedule(high)[0].cause == "learning-rate-too-high"


@pytest.mark.parametrize(
    ("masked", "cause"), [(25.1, ""), (20.0, "masks-differ"), (3.0, "masks-empty")]
)
def test_masks(masked, cause):
    assert check_masks(course(masked=masked))[0].cause == cause


def test_the_entropy_of_a_short_log_may_differ_more():
    "Five standard errors of a line of one step, of forty lines of 400."
    asked = dict(token_entropy=4.0, token_entropy_spread=0.1, batches=16)
    asked |= dict(constant_acc=0.1, constant_acc_spread=0.01)
    logged = dict(token_entropy=4.25, constant_acc=0.1)

    long = course(measured=asked, **logged)
    short = course(2, measured=asked, **logged)
    short.columns = {k: (steps / 20, v) for k, (steps, v) in short.columns.items()}

    assert check_alphabet(long)[0].cause == "token-view"
    assert check_alphabet(short)[0].cause == ""


def test_values_are_finite_ones():
    odd = course(4, grad_norm=lambda i: [1.0, math.inf, math.nan, 3.0][i])

    np.testing.assert_array_equal(odd.values("grad_norm"), [1.0, 3.0])
    assert odd.late("grad_norm") == 3.0
