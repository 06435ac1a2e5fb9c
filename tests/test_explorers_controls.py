"""beit_nb.explorers.controls: sliders over lists, pictures to take and to touch, a guide."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from beit_nb.explorers.controls import CodeLine, Field, Guide, Menu, Part, Picture, Slider, Upload
from beit_nb.explorers.figures import DARK_INK, PAPER, Screen
from beit_nb.explorers.pad import asset
from beit_nb.explorers.tokens import Tiles


def test_browser_half_asks_only_for_traits_of_the_parts():
    parts = (
        Guide(),
        Slider("n", [1], 1),
        Menu("rule", {"a": 1}, "a"),
        Field("seed", 1),
        Upload(),
        Picture(),
        CodeLine(),
        Tiles("tokens"),
    )
    known = {name for part in parts for name in part.traits(sync=True)}
    asked = {piece.split('"')[0] for piece in asset("controls.js").split('model.get("')[1:]}

    assert asked and asked <= known


@pytest.mark.parametrize("kind", ("guide", "slider", "menu", "field", "upload", "picture", "code"))
def test_every_kind_has_a_function_in_the_browser(kind):
    parts = asset("controls.js").split("const PARTS = {")[1].split("}")[0]

    assert f"{kind}: render" in parts
    assert Part(kind=kind)._esm == asset("controls.js")


def test_what_python_sets_becomes_the_nearest_value_and_is_heard_once():
    slider = Slider("n", [1, 2, 4, 8, 16], 1)
    heard = []
    slider.observe(lambda change: heard.append(change.new), "value")

    slider.value = 11

    assert heard == [8] and slider.index == 3


def test_what_the_browser_moves_is_heard():
    slider = Slider("n", [1, 2, 4], 1)

    slider.set_state({"index": 2})

    assert slider.value == 4


def test_a_mark_stands_exactly_at_its_value():
    slider = Slider("beta", [1, 4, 16], 1, marks={6.6: "DALL-E", 1: "ELBO"})

    places = {name: slider.values[index] for index, name in slider.marks}

    assert places == {"DALL-E": 6.6, "ELBO": 1}
    assert slider.values == [1, 4, 6.6, 16]


def test_every_value_has_its_words():
    slider = Slider("size", [8, 16], 8, text=lambda n: f"{n} pixels", help="of a patch")

    assert slider.texts == ["8 pixels", "16 pixels"] and slider.help == "of a patch"


def test_touches_are_shares_of_the_picture():
    touches = []
    picture = Picture()
    picture.show(Image.fromarray(np.zeros((20, 40, 3), np.uint8)), "black", density=2)

    picture.on_touch(lambda *touch: touches.append(touch))
    picture.set_state({"touch": ["press", 0.25, 1.0, 1]})
    picture.set_state({"touch": ["press", 0.25, 1.0, 2]})  # the same place again

    assert touches == [("press", 0.25, 1.0)] * 2
    assert picture.touchable and picture.width == 20 and picture.alt == "black"


def test_a_guide_tells_where_it_stands():
    guide = Guide("see", ["try"], "notice")
    paper = guide.screen

    guide.set_state({"ground": [True, 2]})

    assert paper == PAPER and guide.screen == Screen(DARK_INK, 2)


def test_a_choice_that_is_added_is_chosen_at_once():
    menu = Menu("rule", {"a": 1, "b": 2}, "b")
    seen = []
    menu.observe(lambda change: seen.append(change.new), "value")

    menu.add("c", 3)
    menu.add("c", 4)  # another value of that name

    assert seen == [3, 4] and menu.names == ["a", "b", "c"] and menu.name == "c"


def test_a_choice_in_the_browser_is_heard():
    menu = Menu("rule", {"a": 1, "b": 2}, "b")

    menu.set_state({"index": 0})

    assert (menu.name, menu.value) == ("a", 1)


@pytest.mark.parametrize("typed,taken", ((999, 255), (-1, 0), (7, 7)))
def test_a_number_stays_within_its_limits(typed, taken):
    field = Field("token", 3, max=255)

    field.value = typed

    assert field.value == taken


@pytest.mark.parametrize(
    "part",
    (
        Guide("see"),
        Slider("n", [1], 1),
        Menu("rule", {"blockwise": 1}, "blockwise"),
        Field("seed", 1),
        Upload(),
        CodeLine("print(1)"),
    ),
    ids=lambda part: part.kind,
)
def test_every_part_has_a_picture_for_pages_without_a_kernel(part):
    data, _ = part._repr_mimebundle_()
    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("L")

    assert np.asarray(picture).min() < 128  # something is written on it


def test_a_picture_is_its_own_static_picture():
    part = Picture()
    part.show(Image.new("RGB", (3, 2), "red"))

    data, _ = part._repr_mimebundle_()

    assert Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).size == (3, 2)


def test_tiles_are_their_own_static_picture():
    part = Tiles("tokens")
    part.show(np.zeros((2, 4, 4, 3), np.uint8))

    data, _ = part._repr_mimebundle_()

    assert "image/png" in data
