"""beit_nb.explorers.workbench: one picture in six stations, under one pointer."""

from functools import partial

import numpy as np
import pytest
import torch
from numpy.random import default_rng

from beit_nb.attention import attention_maps
from beit_nb.explorers.pad import Box
from beit_nb.explorers.predictor import commonest_tokens, mim_predictor, named_digits
from beit_nb.explorers.workbench import (
    Stations,
    Workbench,
    bench_legend,
    read_picture_whole,
    tell_patch,
)
from beit_nb.images import PALETTE
from beit_nb.masking import blockwise_mask


@pytest.fixture(scope="module")
def predictor():
    return mim_predictor("nowhere")  # those that come with the package


@pytest.fixture
def bench(predictor):
    return Workbench(predictor)


@pytest.fixture(scope="module")
def mask():
    return blockwise_mask((8, 8), 26, 4, rng=default_rng(3))


@pytest.fixture(scope="module")
def reading(predictor, mask):
    return read_picture_whole(predictor, named_digits()["a three"], mask)


def test_reading_is_what_both_networks_say(predictor, mask, reading):
    three = named_digits()["a three"]
    guess = predictor.guess(three, mask)
    ids = predictor.tokenizer.get_codebook_indices(predictor.token_view(three))[0]
    maps = attention_maps(predictor.model, predictor.patch_view(three), guess.mask[None])

    assert torch.equal(reading.odds.argmax(0), ids)
    assert torch.equal(reading.guess.probs, guess.probs)
    taken = maps[-1][0, :, 1 + 10, 1 + 20].mean()  # what patch 10 takes from patch 20
    assert torch.isclose(reading.looks[10].flatten()[20], taken)


def test_a_hidden_and_a_shown_patch_in_words(reading, mask):
    hidden, shown = (int(np.flatnonzero(m)[0]) for m in (mask, ~mask))

    assert "<b>hidden</b>" in tell_patch(reading, hidden)
    assert "the loss does not count" in tell_patch(reading, shown)
    assert f"word <b>{shown + 1}</b> of 64" in tell_patch(reading, shown)


def test_one_patch_is_framed_in_all_stations():
    stations = Stations(8, 8, lambda cell: None)

    stations.show_pointer(21, torch.zeros(8, 8))

    for name, pad in stations.pads.items():
        row, col = divmod(21, 16 if name == "sequence" else 8)
        assert pad.boxes == [Box(row, col, 1, 1, PALETTE["orange"])], name


def test_a_moved_frame_asks_nobody_again():
    heard = []
    stations = Stations(8, 8, heard.append)

    stations.pads["tokens"].pointed = 5
    stations.show_pointer(5, torch.zeros(8, 8))
    stations.pads["tokens"].pointed = -1

    assert heard == [5]


def test_at_the_start_nothing_is_tried_and_nothing_is_wrong(bench):
    assert bench.guide.done == [] and bench.guide.error == ""
    assert bench.mask.sum() > 10


def test_pointing_reads_the_same_patch_everywhere(bench):
    bench.stations.pads["looks"].pointed = 20  # on the stroke of the seven

    assert "word 21 of 64" in bench.describe() and 0 in bench.guide.done
    assert bench.stations.pads["mask"].boxes[0][:2] == (2, 4)


def test_painting_asks_the_network_again(bench):
    cell = int(np.flatnonzero(~bench.mask)[0])
    before = bench.reading.guess.probs

    bench.pad.press(cell)

    assert bench.painted and 1 in bench.guide.done
    assert not torch.equal(bench.reading.guess.probs, before)
    assert bench.reading.guess.mask.flatten()[cell]


def test_a_fault_of_the_network_can_be_found(bench):
    wrong = bench.reading.guess.wrong.flatten().nonzero().flatten().tolist()

    bench.point(wrong[0])
    bench.show_state()

    assert 2 in bench.guide.done


@pytest.mark.parametrize("painted", (False, True), ids=("thrown", "painted"))
def test_the_line_of_code_makes_the_same_bench(bench, predictor, painted):
    bench.menu.choose("a two")
    bench.share.value = 0.25
    bench.throw()
    if painted:
        bench.pad.press(9)
    bench.stations.pads["picture"].pointed = 33

    line = bench.code_line.code
    copy = eval(line)

    assert (copy.mask == bench.mask).all() and copy.describe() == bench.describe()
    assert ("hidden=" in line) == painted


@pytest.mark.parametrize("hidden", ([20, 3, 9], []), ids=("three", "none"))
def test_the_line_of_a_bench_with_given_patches_gives_them_again(predictor, hidden):
    bench = Workbench(predictor, hidden=hidden)

    copy = eval(bench.link())

    assert f"hidden={sorted(hidden)}" in bench.link() and copy.link() == bench.link()
    assert (copy.mask == bench.mask).all() and copy.mask.sum() == len(hidden)
    copy.throw()
    assert "seed=" in copy.link() and "hidden=" not in copy.link()


def test_show_all_hides_nothing(bench):
    bench._throw([])

    assert not bench.mask.any() and "0 of 0 hidden" in bench.describe()


def test_rival_is_the_commonest_token_of_each_place(bench, predictor):
    assert torch.equal(bench.rival, commonest_tokens(predictor.tokenizer, 32))


def test_a_pointer_sends_one_message_to_each_pad(bench, monkeypatch):
    sent = []

    def note(name, key):
        sent.append((name, {key} if isinstance(key, str) else set(key)))

    for name, pad in bench.stations.pads.items():
        monkeypatch.setattr(pad, "send_state", partial(note, name))

    bench.point(9)

    frames = [name for name, key in sent if "boxes" in key]
    assert sorted(frames) == sorted(bench.stations.pads)
    extra = [one for one in sent if "boxes" not in one[1]]
    assert [name for name, _ in extra] == ["looks"]  # its picture


def test_the_bench_says_what_its_colours_mean():
    for color in ("orange", "green", "red"):
        assert PALETTE[color] in bench_legend()
    assert "guessed wrong" in bench_legend() and "dotted" in bench_legend()
