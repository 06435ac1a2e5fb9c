"""beit_nb.explorers.masks, without a browser (that part is test_browser_masks.py)."""

import asyncio

import pytest
import torch
from numpy.random import default_rng

from beit_nb.explorers.mask_rules import ALGORITHMS, OFFICIAL, RANDOM, MaskRule
from beit_nb.explorers.masks import MaskExplorer
from beit_nb.images import house_pictures
from beit_nb.masking import blockwise_mask


def mean_color(picture, mask):
    "A stand-in for a model: all holes in the mean colour of the rest."
    holes = torch.as_tensor(mask).repeat_interleave(16, 0).repeat_interleave(16, 1)
    return torch.where(holes, picture[:, ~holes].mean(1)[:, None, None], picture)


@pytest.fixture
def explorer():
    return MaskExplorer()


def again(explorer):
    "The explorer that its line of code makes."
    return eval(explorer.link(), {"MaskExplorer": MaskExplorer, "MaskRule": MaskRule})


def screen(explorer):
    "What of an explorer must be the same for the same state."
    view = explorer.mask_view
    return (
        view.pad.marked,
        view.pad.boxes,
        view.pad.picture,
        view.words.value,
        view.line.code,
        view.scrubber.value,
        explorer.controls.rule,
        explorer.controls.seed,
        explorer.statistics.counts.value,
        explorer.statistics.clumps.value,
    )


def test_the_first_sight_shows_blocks_and_refusals(explorer):
    assert (explorer.mask == blockwise_mask(rng=default_rng(3))).all()
    assert "6 blocks in 11 attempts, 5 refused" in explorer.mask_view.words.value


@pytest.mark.parametrize("name", ("ratio", "smallest"))
def test_the_first_presses_of_a_slider_change_the_mask(explorer, name):
    slider = getattr(explorer.controls, name)
    masks = []
    for _ in range(3):  # one that does nothing looks broken
        masks.append(explorer.mask)
        slider.index += 1
        assert (explorer.mask != masks[-1]).any()


def test_every_algorithm_draws_its_mask(explorer):
    for name in (*ALGORITHMS[1:], OFFICIAL):
        explorer.controls.algorithm.choose(name)
        assert (explorer.mask == MaskRule(name).mask(default_rng(3))).all()


def test_resample_takes_the_next_seed(explorer):
    explorer.controls.resample.click()

    assert (explorer.mask == blockwise_mask(rng=default_rng(4))).all()
    assert "default_rng(4)" in explorer.mask_view.line.code


def test_a_click_is_counted_as_done_by_hand(explorer):
    before = explorer.mask
    words = explorer.mask_view.words

    explorer.mask_view.pad.press(0)

    assert (explorer.mask != before).sum() == 1 and "by hand" in words.value
    assert f">{explorer.mask.sum()}</span>" in words.value
    assert f"this mask: {explorer.mask.sum()}" in explorer.statistics.counts.value
    explorer.mask_view.pad.press(0)
    assert "by hand" not in words.value


def paint(explorer):
    explorer.mask_view.pad.press(0)
    explorer.mask_view.pad.press(20)


def scrub(explorer):
    explorer.mask_view.scrubber.value = 4


def scrub_and_paint(explorer):
    scrub(explorer)
    paint(explorer)


def other_settings(explorer):
    explorer.controls.picture.menu.choose("rocket")
    explorer.controls.algorithm.choose(RANDOM)
    explorer.controls.patch_size.value = 28
    explorer.controls.ratio.value = 0.6


@pytest.mark.slow
@pytest.mark.parametrize("act", (lambda e: None, paint, scrub, scrub_and_paint, other_settings))
def test_the_link_makes_the_same_screen(explorer, act):
    act(explorer)

    assert screen(again(explorer)) == screen(explorer)


def test_an_uploaded_picture_is_linked_by_its_file_and_one_of_yours_not_at_all():
    own = MaskExplorer({"a cat": house_pictures()[0]})

    assert own.link() == "" and MaskExplorer({"a cat": "chelsea"}).link() != ""
    assert MaskExplorer(predict=mean_color).link() == ""


def drag(explorer, cells):
    "What the browser sends while a finger is drawn over these cells."
    pad = explorer.mask_view.pad
    stroke = pad.stroke + 1
    for cell in cells:
        pad.set_state({"stroke": stroke, "marked": sorted({*pad.marked} ^ {cell})})


def test_undo_takes_back_stroke_by_stroke(explorer):
    states = [screen(explorer)]
    assert explorer.buttons.undo.disabled
    acts = (
        lambda: drag(explorer, [0, 1, 2, 3]),
        lambda: drag(explorer, [30]),
        explorer.buttons.clear.click,
        lambda: drag(explorer, [50, 51]),
        explorer.buttons.invert.click,
    )
    for act in acts:
        act()
        states.append(screen(explorer))
    assert explorer.mask.sum() == 194

    for state in reversed(states[:-1]):
        assert not explorer.buttons.undo.disabled
        explorer.buttons.undo.click()
        assert screen(explorer) == state
    assert explorer.buttons.undo.disabled


@pytest.mark.parametrize(
    "act",
    (
        lambda e: e.controls.resample.click(),
        other_settings,
        scrub,
        lambda e: e.buttons.play.click(),
        lambda e: e.buttons.step.click(),
    ),
    ids="resample settings scrub play step".split(),
)
def test_what_a_hand_painted_is_never_lost(explorer, act):
    explorer.controls.picture.menu.choose("rocket")
    paint(explorer)
    painted = screen(explorer)

    act(explorer)
    lost = screen(explorer)
    explorer.buttons.undo.click()

    assert lost != painted and screen(explorer) == painted


def test_another_picture_keeps_what_was_painted(explorer):
    paint(explorer)
    painted = explorer.mask

    explorer.controls.picture.menu.choose("rocket")

    assert (explorer.mask == painted).all()


def test_the_ground_of_the_screen_changes_nothing(explorer):
    scrub_and_paint(explorer)
    before = screen(explorer)

    explorer.guide.ground = [True, 2]

    assert screen(explorer) == before


def test_steps_go_through_the_game_and_begin_anew(explorer):
    seen = []
    for _ in range(13):
        explorer.buttons.step.click()
        seen.append(explorer.mask_view.state.attempt)

    assert seen == [*range(1, 12), None, 1]


def test_a_film_ends_where_the_game_ended(explorer):
    before = screen(explorer)
    seen = []
    explorer.mask_view.scrubber.observe(lambda change: seen.append(change.new), "value")

    explorer.buttons.play.click()  # at once, without an event loop

    assert seen == [*range(1, 13)] and screen(explorer) == before
    assert explorer.buttons.play.description == "Play" and explorer.guide.done == [0]


async def play_and(act):
    explorer = MaskExplorer()
    explorer.buttons.play.click()
    await asyncio.sleep(0.4)
    playing = (explorer.player.busy, explorer.mask_view.state.attempt)
    act(explorer)
    return playing, explorer


@pytest.mark.parametrize(
    "act",
    (
        lambda e: e.mask_view.pad.press(0),
        lambda e: e.buttons.play.click(),
        lambda e: e.controls.resample.click(),
        scrub,
    ),
    ids="hand pause resample scrub".split(),
)
def test_what_stops_a_film(act):
    (busy, attempt), explorer = asyncio.run(play_and(act))

    assert busy and attempt == 1
    assert not explorer.player.busy and explorer.buttons.play.description == "Play"


def test_a_paused_film_stays_where_it_is():
    _, explorer = asyncio.run(play_and(lambda e: e.buttons.play.click()))

    assert explorer.mask_view.state.attempt == 1 and "attempt 1 of 11" in explorer.describe()


def test_a_rule_that_cannot_work_is_said_beside_its_slider(explorer):
    before = screen(explorer)[:6]

    explorer.controls.smallest.value = 76

    says = explorer.controls.smallest.says
    assert says.startswith("no block of 76 patches fits into 75") and explorer.guide.error == ""
    assert screen(explorer)[:6] == before
    assert all("stale" in view._dom_classes for view in explorer.results)
    explorer.controls.smallest.value = 75
    assert explorer.controls.smallest.says == "" and "2 blocks in 2" in explorer.describe()
    assert not any("stale" in view._dom_classes for view in explorer.results)


def test_undo_also_leaves_a_wrong_setting(explorer):
    paint(explorer)
    painted = screen(explorer)
    explorer.controls.smallest.value = 90
    explorer.buttons.clear.click()

    explorer.buttons.undo.click()

    assert screen(explorer) == painted and explorer.controls.smallest.says == ""


def test_from_random_patches_back_to_a_rule_that_cannot_work(explorer):
    explorer.controls.algorithm.choose(RANDOM)
    explorer.controls.ratio.value = 0.05
    explorer.controls.algorithm.choose(OFFICIAL)

    assert "no block of 16 patches fits into 10" in explorer.controls.smallest.says
    assert not explorer.controls.smallest.disabled


def test_no_act_is_done_at_first_and_all_can_be_done(explorer):
    assert explorer.guide.done == []

    explorer.buttons.play.click()
    explorer.controls.smallest.value = 100
    assert explorer.guide.done == [0, 1]
    explorer.buttons.invert.click()
    explorer.buttons.clear.click()
    for col in (1, 2, 5, 9):  # a wide stripe and two narrow ones
        assert explorer.guide.done == [0, 1]
        drag(explorer, range(col, 196, 14))

    assert explorer.guide.done == [0, 1, 2]


def test_prediction_follows_the_mask():
    explorer = MaskExplorer("coffee", predict=mean_color)
    before = explorer.prediction.gallery.value

    explorer.buttons.invert.click()

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
    missing = MaskExplorer("missing.png")

    assert "letter.txt is not a picture" in menu.upload.says
    assert (explorer.mask == before).all() and menu.name == "chelsea"
    assert "missing.png is not a picture" in missing.guide.error
    assert (missing.mask == before).all()
