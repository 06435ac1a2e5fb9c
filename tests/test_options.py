"Words of a command line as fields of a dataclass: which belongs to which, and what it means."

from dataclasses import dataclass, fields
from math import inf
from typing import Literal, get_type_hints

import pytest
from tyro.conf import Positional

from beit_nb import BeitError
from beit_nb.limits import Count, CropScale, Place, Places
from beit_nb.options import (
    check_options,
    read_options,
    room_for_words,
    sort_words,
    unknown_option,
    value_of,
    wants_help,
)
from beit_nb.recipes import COMMANDS


@dataclass
class Toy:
    first: Positional[Place]
    others: Positional[Places] = ()
    side: Count | None = None
    crop_scale: CropScale | None = None
    order: Literal["rows", "columns"] = "rows"
    scale: Literal[2, 4] = 2
    pictures: Places = ()
    loud: bool = False
    no_rest: bool = True


HINTS = get_type_hints(Toy, include_extras=True)


@pytest.mark.parametrize(
    "line, values, strange",
    [
        ("a", dict(first=["a"]), ""),
        ("a b c", dict(first=["a"], others=["b", "c"]), ""),
        ("--side 8 a --loud b", dict(first=["a"], others=["b"], side=["8"], loud=["True"]), ""),
        ("--side=8 --side 9", dict(side=["9"]), ""),
        ("--crop_scale 0.5 1 a", dict(crop_scale=["0.5", "1"], first=["a"]), ""),
        ("--crop-scale=0.5", dict(crop_scale=["0.5"]), ""),
        ("--side -1", dict(side=["-1"]), ""),
        ("--pictures a b --no-loud", dict(pictures=["a", "b"], loud=["False"]), ""),
        ("--pictures a --loud --pictures b c", dict(pictures=["a", "b", "c"], loud=["True"]), ""),
        ("--no-rest --loud=False", dict(no_rest=["True"], loud=["False"]), ""),
        ("--no-no-rest", dict(no_rest=["False"]), ""),
        ("--order a=b", dict(order=["a=b"]), ""),
        ("--order=a=b", dict(order=["a=b"]), ""),
        ("--side", dict(side=[]), ""),
        ("--first a", {}, "--first a"),
        ("--sid 8 --loud", dict(loud=["True"]), "--sid 8"),
        ("--no-side 8", {}, "--no-side 8"),
        ("--no-loud=3 --", {}, "--no-loud=3 --"),
    ],
)
def test_every_word_goes_to_its_field(line, values, strange):
    assert sort_words(HINTS, line.split()) == (values, strange.split())


def test_rooms_of_the_types():
    rooms = {name: room_for_words(hint) for name, hint in HINTS.items()}

    assert (rooms["first"], rooms["others"], rooms["crop_scale"], rooms["loud"]) == (1, inf, 2, 0)
    assert (rooms["side"], rooms["scale"], rooms["order"]) == (1, 1, 1)


@pytest.mark.parametrize(
    "words, hint, value",
    [
        ("8", Count, 8),
        ("1e3", float, 1000.0),
        ("1e3", int, "1e3"),
        ("None", Count | None, None),
        ("None", str, "None"),
        ("", int, ""),
        ("4", Literal[2, 4], 4),
        ("3", Literal[2, 4], "3"),
        ("True", bool, True),
        ("yes", bool, "yes"),
        ("0.5 x", CropScale | None, (0.5, "x")),
        ("None", CropScale | None, None),
    ],
)
def test_what_words_mean(words, hint, value):
    found = value_of(words.split(" "), hint)

    assert found == value and type(found) is type(value)


def test_a_dataclass_from_words():
    values, strange = read_options(Toy, "a --side 3 --scale 4 --crop-scale .2 1 --lod".split())
    toy = check_options(Toy(**values))

    assert toy == Toy("a", side=3, scale=4, crop_scale=(0.2, 1.0)) and strange == ["--lod"]


@pytest.mark.parametrize(
    "line, says",
    [
        ("a --side x", "--side 'x' must be a whole number, at least 1"),
        ("a --side 0 --scale 3", "--side 0 must be at least 1; --scale '3' must be one of 2, 4"),
        ("a --crop-scale 1", r"--crop-scale \(1.0,\) must be two shares of the picture"),
        ("a --side", "--side needs a value: a whole number, at least 1"),
        ("$NOWHERE/x", r"FIRST \$NOWHERE/x must be a path without"),
    ],
)
def test_what_is_wrong_is_said_as_it_was_typed(monkeypatch, line, says):
    monkeypatch.delenv("NOWHERE", raising=False)

    with pytest.raises(BeitError, match=f"^{says}"):
        check_options(Toy(**read_options(Toy, line.split())[0]))


def test_the_neighbor_of_a_mistyped_option():
    near = str(unknown_option("a toy", "--crop_scal=3", ["crop_scale", "side"]))
    far = str(unknown_option("a toy", "--xyz", ["crop_scale"]))

    assert near.startswith("a toy has no option --crop_scal=3 (do you mean --crop-scale?); ")
    assert near.endswith("its options are: --crop-scale --side")
    assert "do you mean" not in far
    assert wants_help(["nano", "-h"]) and not wants_help(["nano", "help"])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_recipe_comes_back_from_its_own_words(command):
    "What str writes of a field is read as the same value, for every preset."
    for _, preset in COMMANDS[command].presets.values():
        words = []
        for field in fields(preset):
            value = getattr(preset, field.name)
            said = value if isinstance(value, tuple) else (value,)
            if isinstance(value, bool) or value in ("", None):  # a switch takes no word after it
                words.append(f"--{field.name}={value}")
            else:
                words += [f"--{field.name}", *map(str, said)]
        values, strange = read_options(type(preset), words)
        assert type(preset)(**values) == preset and strange == []
