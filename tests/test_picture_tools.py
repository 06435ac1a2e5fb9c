"Tools that look at pictures: what is damaged, and options of the other kind of network."

import pytest
from PIL import Image

from beit_nb import BeitError, UnreadableImage
from beit_nb.options import value_of
from beit_nb.picture_tools import Queries, check_kind, each_picture

PLAIN = dict(img_size=None, crop_pct=None, ema=False, scales=(1.0,), flip_test=False)


@pytest.fixture
def files(tmp_path):
    "Two pictures with a broken file between them."
    names = [str(tmp_path / f"{i}.png") for i in range(3)]
    for name in names[::2]:
        Image.new("RGB", (8, 8)).save(name)
    (tmp_path / "1.png").write_bytes(b"no picture")
    return names


def test_all_that_can_be_read_are_answered(files, capsys):
    seen, failed = [], []

    status = each_picture(
        tuple(files),
        lambda path, image: seen.append((path, image.size)),
        lambda path, why: failed.append(path),
    )

    assert status == 1 and failed == [files[1]]
    assert seen == [(files[0], (8, 8)), (files[2], (8, 8))]
    assert "1.png" in capsys.readouterr().err
    assert each_picture((files[0],), lambda path, image: None) == 0


def test_where_none_can_be_read_the_error_is_raised(files):
    with pytest.raises(UnreadableImage):
        each_picture((files[1], files[1]), lambda path, image: None)


@pytest.mark.parametrize(
    ("option", "value", "of_pixels", "says"),
    [
        ("ema", True, True, "--ema is not for a segmentation"),
        ("img_size", 224, True, "--img-size is not for a segmentation"),
        ("flip_test", True, False, "--flip-test is not for a classifier"),
        ("scales", (0.5, 1.0), False, "--scales is not for a classifier"),
    ],
)
def test_an_option_of_the_other_kind_is_refused(option, value, of_pixels, says):
    check_kind(PLAIN | {option: value}, not of_pixels)

    with pytest.raises(BeitError, match=says):
        check_kind(PLAIN | {option: value}, of_pixels)


def test_who_asks_has_a_form():
    assert value_of(["11,13", "cls"], Queries) == ("11,13", "cls")
