"What a field may hold: types, limits with both ends, paths that are spelt out."

import math
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest

from beit_nb.limits import (
    Count,
    Place,
    Places,
    Share,
    Size,
    expand_paths,
    has_kind,
    has_type,
    limit_of,
    nearest,
    no_such,
    spelt_out,
    wrong_fields,
)


@dataclass
class Toy:
    side: Size = 8
    share: Share = 0.5
    stop: Count | None = None
    order: Literal["rows", "columns"] = "rows"
    loud: bool = False
    name: str = ""
    query: tuple[int, int] = (3, 3)
    out: Place = "runs/toy"
    more: Places = ()


WRONG = [
    (dict(side=0), "side 0 must be at least 1"),
    (dict(side=2**16 + 1), "side 65537 must be at most 65,536"),
    (dict(side=10**30), f"side {10**30} must be at most 65,536"),
    (dict(side=8.0), "side 8.0 must be a whole number, at least 1"),
    (dict(side=math.nan), "side nan must be a whole number, at least 1"),
    (dict(side="8"), "side '8' must be a whole number, at least 1"),
    (dict(side=True), "side True must be a whole number, at least 1"),
    (dict(side=None), "side None must be a whole number, at least 1"),
    (dict(share=math.nan), "share nan must be from 0 to 1"),
    (dict(share="half"), "share 'half' must be from 0 to 1"),
    (dict(stop=0), "stop 0 must be at least 1"),
    (dict(order="spiral"), "order 'spiral' must be one of rows, columns"),
    (dict(order=["rows"]), "order ['rows'] must be one of rows, columns"),
    (dict(loud=1), "loud 1 must be True or False"),
    (dict(name=b"x"), "name b'x' must be text"),
    (dict(query=(1,)), "query (1,) must be 2 values, each a whole number"),
    (dict(query=(1, "2")), "query (1, '2') must be 2 values, each a whole number"),
    (dict(out=3), "out 3 must be a path without ~ or $VARIABLE"),
    (dict(more=("a", 3)), "more ('a', 3) must be a path without ~ or $VARIABLE"),
]


@pytest.mark.parametrize("changes, says", WRONG)
def test_what_cannot_stand_in_a_field(changes, says):
    [fault] = wrong_fields(Toy, changes)
    assert fault.startswith(says)


def test_what_can():
    assert wrong_fields(Toy, vars(Toy())) == []
    assert wrong_fields(Toy, dict(side=np.int64(2**16), share=np.float32(1), stop=10**9)) == []
    assert wrong_fields(Toy, dict(share=1, order="columns", more=("a", "b c"))) == []


def test_faults_are_told_with_the_names_that_the_reader_writes():
    [fault] = wrong_fields(Toy, {"side": 0}, "--{}".format)
    assert fault == "--side 0 must be at least 1"


def test_a_name_that_nothing_has_and_its_neighbor():
    names = ("rows", "columns")

    refusal = no_such("order", "colums", iter(names))

    assert str(refusal) == (
        "unknown order 'colums' (do you mean columns?); there are: rows, columns"
    )
    assert nearest("spiral", names) == ""


def test_limits_are_read_off_the_types():
    assert limit_of(str) is None and limit_of(tuple[int, int]) is None
    assert limit_of(Count | None) is limit_of(Count)
    assert limit_of(Literal[2, 4]).words == "one of 2, 4"
    assert has_type(None, Count | None) and not has_type(None, Count)


def test_parts_of_a_checkpoint_have_kinds():
    assert has_kind(0, int) and has_kind({}, dict[str, int]) and has_kind([], list[str])
    assert has_kind({"a": [1]}, dict) and has_kind({"a": 1}, dict[str, int])
    for value, kind in (
        (-1, int),
        (True, int),
        (1.0, int),
        ({1: 1}, dict[str, int]),
        ({"a": "1"}, dict[str, int]),
        ([["a"]], list[str]),
        (("a",), list[str]),
        (None, dict),
    ):
        assert not has_kind(value, kind)


def test_paths(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("NOWHERE", raising=False)

    for path in ("runs/a", "./~", "./$HOME", "a~", "50$", "", "/data/x", "caf\udce9"):
        assert spelt_out(path) and expand_paths(Toy(out=path)).out == path
    for path in ("~", "~/a", "$HOME/a", "${HOME}", "a/$HOME"):
        assert not spelt_out(path)
        assert spelt_out(expand_paths(Toy(out=path)).out)
    assert expand_paths(Toy(more=("~/a", "b"))).more == ("/home/me/a", "b")
    for path in ("~no-such-user/a", "$NOWHERE/a", "a/${NOWHERE}"):
        assert not spelt_out(expand_paths(Toy(out=path)).out)
    os.mkdir("~")
    assert spelt_out("~") and expand_paths(Toy(out="~")).out == "~"
