"""beit_nb.explorers.patches: the same patch under one frame in the picture and in the sequence."""

import numpy as np
import pytest

from beit_nb import BeitError
from beit_nb.explorers.patches import PatchExplorer, picture_notes, sequence_notes

SETTINGS = [(16, 1, False, 37), (32, 0.5, True, 100), (14, 2, True, 4), (56, 1, False, 15)]


def pixels(picture):
    return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.parametrize("size,stride,shuffled,place", SETTINGS)
def test_the_same_patch_stands_in_picture_and_sequence(size, stride, shuffled, place):
    explorer = PatchExplorer("astronaut", patch_size=size, stride=stride, shuffled=shuffled)

    explorer.sequence.press(place)

    assert f"number <b>{place + 1}</b>" in explorer.words.value
    step = int(size * stride)
    row, col = (n * step for n in explorer.chosen)
    patch = pixels(explorer.picture.resize((224, 224)))[row : row + size, col : col + size]
    side = explorer.sequence.image.width // explorer.cut.side
    top, left = (n * side for n in divmod(place, explorer.cut.side))
    tile = pixels(explorer.sequence.image)[top + 2 : top + side, left + 2 : left + side]
    assert np.abs(tile.mean((0, 1)) - patch.mean((0, 1))).max() < 12
    [box] = explorer.pad.boxes
    assert (box[0] * explorer.cut.cell, box[1] * explorer.cut.cell) == (row, col)
    assert box[2] * explorer.cut.cell == box[3] * explorer.cut.cell == size
    assert explorer.pad.cursor == box[0] * explorer.pad.cols + box[1]


def test_a_pointer_moves_both_frames_and_they_return():
    explorer = PatchExplorer(shuffled=True)
    at_rest = (list(explorer.pad.boxes), list(explorer.sequence.boxes))

    for pad, other in ((explorer.pad, explorer.sequence), (explorer.sequence, explorer.pad)):
        pad.pointed = 17
        [box] = pad.boxes
        assert box[:2] == divmod(17, 14) and other.boxes[0][:2] != box[:2]
        pad.pointed = -1
        assert (list(explorer.pad.boxes), list(explorer.sequence.boxes)) == at_rest
    assert explorer.chosen == (6, 6) and 0 not in explorer.guide.done


def test_gaps_are_hatched_and_a_click_there_changes_nothing():
    explorer = PatchExplorer(patch_size=16, stride=1, patch=(2, 2))
    whole = bytes(explorer.pad.picture)

    explorer.controls.stride.value = 2
    before = list(explorer.pad.boxes)
    explorer.pad.press(15)  # row 1, column 1
    explorer.pad.pointed = 1

    assert bytes(explorer.pad.picture) != whole and explorer.pad.notes[15] == "in no patch"
    assert explorer.pad.boxes == before and explorer.chosen == (1, 1)
    assert "<b>75%</b> of the picture lies in no patch" in explorer.words.value
    explorer.controls.stride.value = 1
    assert bytes(explorer.pad.picture) == whole


def test_arrow_keys_walk_over_the_gaps():
    explorer = PatchExplorer(patch_size=32, stride=2, patch=(0, 0))

    seen = []
    for _ in range(3):
        explorer.pad.cursor += 1  # what the key does
        seen.append(explorer.chosen)

    assert seen == [(0, 0), (0, 1), (0, 1)]


def test_the_place_in_the_picture_stays_when_the_grid_changes():
    explorer = PatchExplorer(patch=(3, 10))
    place = explorer.at

    for size, stride, patch in (
        (56, 1, (0, 2)),
        (8, 0.5, (13, 41)),
        (16, 2, (2, 5)),
        (16, 1, (3, 10)),
    ):
        explorer.controls.patch_size.value = size
        explorer.controls.stride.value = stride
        assert explorer.chosen == patch and explorer.at == place


def test_only_a_new_grid_sends_pictures():
    explorer = PatchExplorer()
    sent = []
    for pad in (explorer.pad, explorer.sequence):
        pad.observe(lambda change: sent.append(change["owner"]), "picture")

    explorer.pad.press(3)
    explorer.sequence.pointed = 5
    assert sent == []
    explorer.controls.patch_size.value = 28

    assert sent == [explorer.sequence]


@pytest.mark.parametrize("size,stride,shuffled,place", SETTINGS)
def test_link_makes_the_same_again(size, stride, shuffled, place):
    explorer = PatchExplorer("coffee", patch_size=size, stride=stride, shuffled=shuffled)
    explorer.sequence.press(place)

    again = eval(explorer.link())

    assert again.link() == explorer.link() == explorer.code_line.code
    assert again.words.value == explorer.words.value
    assert again.pad.get_state(("boxes", "cursor")) == explorer.pad.get_state(("boxes", "cursor"))
    assert again.sequence.picture == explorer.sequence.picture


def test_acts_are_open_until_they_are_done():
    explorer = PatchExplorer()
    assert explorer.guide.done == []

    explorer.pad.press(3)
    assert explorer.guide.done == [0]
    explorer.controls.patch_size.value = 8
    explorer.controls.shuffle.click()

    assert explorer.guide.done == [0, 1, 2]


def test_price_follows_the_controls():
    explorer = PatchExplorer()
    words = explorer.words
    assert "<b>196</b> tokens" in words.value and "number <b>91</b>" in words.value

    explorer.controls.patch_size.value = 8
    explorer.controls.stride.value = 0.5

    assert "<b>3,025</b> tokens" in words.value and explorer.sequence.rows == 55
    assert explorer.pad.rows == 56 and explorer.guide.error == ""


def test_every_cell_says_what_it_is():
    explorer = PatchExplorer(patch_size=56, shuffled=True)
    places = explorer.places

    assert explorer.pad.unit == "patch"
    assert picture_notes(explorer.cut, places)[6] == f"number {places[6] + 1}"
    row, col = divmod(int(explorer.order[2]), 4)
    assert sequence_notes(explorer.cut, explorer.order)[2] == f"has number 3, patch {row},{col}"
    explorer.controls.stride.value = 0.5
    assert explorer.pad.unit == "cell" and explorer.pad.notes[0].startswith("of patch 0,0, number")


def test_a_patch_that_is_none_is_refused():
    with pytest.raises(BeitError, match=r"\(6, 6\) is not among 4 x 4"):
        PatchExplorer(patch_size=56, patch=(6, 6))


def test_mistakes_are_one_line_and_the_picture_stays(tmp_path):
    explorer = PatchExplorer()
    before = bytes(explorer.pad.picture)

    for bad in (b"not a picture", str(tmp_path / "nothing.png")):
        explorer.controls.picture.value = bad
        assert explorer.guide.error
        assert "Traceback" not in explorer.guide.error
        assert bytes(explorer.pad.picture) == before
    explorer.controls.picture.value = "coffee"
    assert explorer.guide.error == "" and bytes(explorer.pad.picture) != before


def test_no_picture_at_all_is_a_line_too(tmp_path):
    explorer = PatchExplorer(str(tmp_path / "nothing.png"))

    data, _ = explorer._repr_mimebundle_()

    assert "image/png" not in data and explorer.guide.error
