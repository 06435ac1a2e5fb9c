"""beit_nb.explorers.masks, without a browser (that part is test_browser_masks.py)."""

import asyncio

import numpy as np
import pytest
import torch
from numpy.random import default_rng

from beit_nb.explorers.mask_rules import ALGORITHMS, OFFICIAL, RANDOM, MaskRule
from beit_nb.explorers.masks import MaskControls, MaskExplorer, MaskView, StatisticsView
from beit_nb.masking import blockwise_mask


def mean_color(picture, mask):
    "A stand-in for a model: all holes in the mean colour of the rest."
    holes = torch.as_tensor(mask).repeat_interleave(16, 0).repeat_interleave(16, 1)
    return torch.where(holes, picture[:, ~holes].mean(1)[:, None, None], picture)


@pytest.fixture
def explorer():
    return MaskExplorer(seed=3)


def test_controls_keep_the_official_settings():
    controls = MaskControls("chelsea", MaskRule(), 7, 224, [8, 14, 16, 28, 32])

    assert (controls.rule, controls.seed) == (MaskRule(), 7)


def test_controls_say_a_rule():
    controls = MaskControls("chelsea", MaskRule(), 7, 224, [8, 14, 16, 28, 32])

    controls.ratio.value = 0.4
    controls.patch_size.value = 32
    controls.smallest.value = 3
    controls.aspect.value = 0.5
    controls.algorithm.value = RANDOM
    controls.resample.click()

    assert controls.rule == MaskRule(RANDOM, (7, 7), 20, 3, 0.5) and controls.seed == 8


def test_every_algorithm_draws_its_mask(explorer):
    for name in (*ALGORITHMS[1:], OFFICIAL):
        explorer.controls.algorithm.value = name
        assert (explorer.mask == MaskRule(name).mask(default_rng(3))).all()


def test_resample_takes_the_next_seed(explorer):
    explorer.controls.resample.click()

    assert (explorer.mask == blockwise_mask(rng=default_rng(4))).all()
    assert "default_rng(4)" in explorer.mask_view.words.value


def test_a_click_is_counted_as_done_by_hand(explorer):
    before = explorer.mask
    words = explorer.mask_view.words

    explorer.mask_view.pad.press(0)

    assert (explorer.mask != before).sum() == 1 and "by hand" in words.value
    assert f"<b>{explorer.mask.sum()}</b>" in words.value
    explorer.mask_view.pad.press(0)
    assert "by hand" not in words.value


def test_film_ends_where_the_game_ended():
    view = MaskView(392)
    view.show_picture("chelsea")
    view.draw_mask(MaskRule(), 3)
    wanted = view.pad.mask

    waits = [(seconds, view.caption) for seconds in view.play()]

    assert len(waits) == len(view.attempts) == 11
    assert all(0 < seconds <= 0.6 for seconds, _ in waits)
    assert sum("refused" in caption for _, caption in waits) == 5
    assert (view.pad.mask == wanted).all() and "6 blocks in 11 attempts" in view.words.value


async def play_and_touch():
    explorer = MaskExplorer(seed=3)
    explorer.controls.play.click()
    await asyncio.sleep(0.5)
    playing = (explorer.player.busy, len(explorer.mask_view.pad.boxes))
    explorer.mask_view.pad.press(0)
    return playing, explorer


def test_a_hand_stops_the_film():
    (busy, boxes), explorer = asyncio.run(play_and_touch())

    assert busy and boxes == 1
    assert not explorer.player.busy and "stopped by your hand" in explorer.mask_view.words.value


def test_statistics_are_remembered_for_each_rule():
    statistics = StatisticsView(print, draws=50)
    statistics.start(MaskRule())
    first = statistics.charts.value
    statistics.start(MaskRule(RANDOM))
    other = statistics.charts.value
    known = dict(statistics.known)
    statistics.start(MaskRule())

    assert first == statistics.charts.value != other and statistics.known == known
    assert len(known) == 2 and "of 50 draws" in first


def test_clumps_compare_mask_rule_and_chance(explorer):
    clumps = explorer.statistics.clumps.value

    for name in ("this mask", "this rule", "by chance"):
        assert name in clumps
    assert ">0.86<" in clumps and ">0.38<" in clumps


def test_prediction_follows_the_mask():
    explorer = MaskExplorer("coffee", predict=mean_color)
    before = explorer.prediction.gallery.value

    explorer.mask_view.pad.mask = np.ones((14, 14), bool) ^ explorer.mask

    assert "data:image/png" in before and explorer.prediction.gallery.value != before
    assert explorer.controls.patch_size.disabled
    assert [*explorer.prediction.pictures] == ["what the model makes of it"]


def test_predictions_can_have_names():
    explorer = MaskExplorer(predict=lambda x, mask: {"one": x, "two": 1 - x})

    assert [*explorer.prediction.pictures] == ["one", "two"]
    assert explorer.static_picture().width > MaskExplorer().static_picture().width


def test_a_bad_picture_spoils_no_game(explorer):
    before = explorer.mask

    menu = explorer.controls.picture
    menu.upload.set_state({"name": "letter.txt", "content": b"Dear reader", "count": 1})

    assert "letter.txt is not a picture" in menu.upload.says
    assert (explorer.mask == before).all() and menu.name == "chelsea"


def test_a_rule_that_cannot_work_shows_no_mask(explorer):
    explorer.controls.smallest.value = 40
    explorer.controls.ratio.value = 0.1

    assert "so masks would stay empty" in explorer.guide.error
    assert not explorer.mask.any()
