"What answers say: intervals against SciPy, many classes, and letters of other scripts."

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib import font_manager

from beit_nb.labelled_views import Answers
from beit_nb.scores import (
    Scored,
    confusion_figure,
    confusion_matrix,
    fonts_for_names,
    wilson_interval,
)


@pytest.mark.parametrize("right", [0, 1, 13, 20])
def test_intervals_are_those_of_scipy_and_never_a_point(right):
    from scipy.stats import binomtest

    low, high = wilson_interval(right, 20, z=1.959963985)

    theirs = binomtest(right, 20).proportion_ci(0.95, "wilson")
    assert np.allclose((low, high), theirs) and high - low > 0.1


def test_many_classes_are_drawn_in_groups():
    label, guess = torch.arange(21) * 40, torch.arange(21) * 47 % 1000
    columns = dict(number=torch.arange(21), label=label, guess=guess)
    answers = Answers(**columns, in_top5=label == guess, loss=torch.ones(21))
    many = Scored(answers, [f"c{i}" for i in range(1000)])

    assert confusion_matrix(many).shape == (250, 250) and confusion_matrix(many).sum() == 21
    assert len(confusion_figure(many).axes) == 3


def test_wide_fonts_are_taken_where_they_are(monkeypatch):
    monkeypatch.setattr(font_manager, "get_font_names", lambda: ["NanumGothic", "Arial"])

    assert fonts_for_names() == [*plt.rcParams["font.family"], "NanumGothic"]
