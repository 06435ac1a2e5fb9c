"""beit_nb.explorers.svg: lines and bars over two axes as text."""

import re

import numpy as np
import pytest

from beit_nb.explorers.svg import chart


def test_chart_reaches_its_limits():
    svg = chart({"squares": (range(5), np.arange(5) ** 2, "#123456")}, xlabel="x", mark=2)

    assert 'points="50.0,98.0' in svg and "272.0,8.0" in svg and "#123456" in svg
    assert svg.count("<line") == 1 and 'aria-label="squares against x"' in svg


def letters(svg):
    "Where the labels at the y axis begin, by a wide estimate of a letter, and their axis."
    ends = re.findall(r'<text x="([\d.]+)" y="[^"]+" text-anchor="end">([^<]+)<', svg)
    axis = re.search(r'd="M(\d+) (\d+)V', svg)
    return [float(x) - 7.7 * len(words) for x, words in ends], *map(int, axis.groups())


@pytest.mark.parametrize("top, unit", [(67.1, "%"), (0.00123, ""), (12345.0, " steps")])
def test_no_label_is_cut_off_at_the_left(top, unit):
    svg = chart({"a": ([0, 1], [0, top], "#123456")}, yunit=unit)

    begins, _, _ = letters(svg)

    assert len(begins) == 2 and min(begins) >= 0


def test_the_axis_begins_below_the_words_on_top():
    line = {"a": ([0, 1], [0, 1], "#123456")}

    plain, worded = chart(line, mark=0.1), chart(line, mark=0.1, mark_words="epoch 25 of 100")

    assert letters(plain)[2] == 6
    words = float(re.search(r'y="([\d.]+)" text-anchor="middle">epoch', worded)[1])
    assert letters(worded)[2] > words


def test_bars_leave_zeros_out():
    svg = chart({"n": ([1, 2, 3], [0, 3, 1], "#123456")}, bars=True)

    assert svg.count("<rect") == 2 and "<polyline" not in svg


def test_chart_of_one_point_divides_by_nothing():
    svg = chart({"n": ([1], [0], "#123456")})

    assert "nan" not in svg and "inf" not in svg
