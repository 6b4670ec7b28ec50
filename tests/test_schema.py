"""Layouts: what they take, what they refuse and where, and how a refused value is quoted."""

import math
from typing import Any

import pytest

from llava.constants import InputError
from llava.schema import (
    FLAG,
    ID,
    NAME,
    OBJECT,
    TEXT,
    Every,
    Fields,
    Listed,
    check_settings,
    choice,
    either,
    fault,
    integer,
    number,
    shown,
    text,
)

HUGE = 1 << 800_000
BOX = Fields({"w": integer(1, 2), "h": integer(1, 2)}, closed=True)


@pytest.mark.parametrize(
    ("layout", "taken", "refused"),
    [
        (integer(1, 9), [1, 9], [0, 10, True, 1.0, "1", None, HUGE, math.nan]),
        (number(0, 1), [0, 1, 0.5], [True, -0.1, 1.1, HUGE, math.nan, math.inf, "0.5", [0.5]]),
        (text(4), ["", "abcd", "é"], ["abcde", 1, None, b"a", "\ud800", ["a"]]),
        (choice("a", "b", False), ["a", "b", False], ["c", 0, 0.0, None, ["a"], {}]),
        (Listed(integer(0, 3), 1, 2), [[0], [1, 3]], [[], [1, 2, 3], [4], [True], "12", {"1": 2}, None]),
        (BOX, [{"w": 1, "h": 2}], [{}, {"w": 1}, {"w": 1, "h": 3}, {"w": 1, "h": 2, "d": 1}, [1, 2], None]),
        (either(integer(1, 2), text(1)), [1, "x"], [3, "xx", [1], None]),
        (either(integer(1, 2), BOX), [1, {"w": 1, "h": 2}], [3, {}, {"w": 1, "h": 2, "d": 1}, [1]]),
        (Fields({"w": FLAG}, partial=True), [{}, {"w": True}, {"d": 1}], [{"w": None}, {"w": 1}, [], None]),
        (FLAG, [True, False], [0, 1, "true", None]),
        (OBJECT, [{}, {"a": 1}], [[], None, "x"]),
    ],
)
def test_a_layout_takes_what_it_says(layout, taken, refused):
    assert [value for value in taken if fault(value, layout)] == []
    assert [value for value in refused if not fault(value, layout)] == []


def test_a_refusal_names_source_field_rule_and_value():
    layouts = {"size": integer(1, 9), "name?": text(9)}
    check_settings({"name": "x", "size": 3, "other": object()}, layouts, "config.json")
    check_settings({"name": None}, layouts, "config.json")
    with pytest.raises(InputError) as caught:
        check_settings({"size": "large", "name": 3}, layouts, "config.json")
    assert str(caught.value) == "config.json's size is 'large', not an integer in [1, 9]"
    with pytest.raises(InputError) as caught:
        check_settings({"size": None}, layouts, "config.json")
    assert str(caught.value) == "config.json's size is null, not an integer in [1, 9]"


@pytest.mark.parametrize(
    ("value", "layout", "wrong"),
    [
        ([1], Listed(FLAG, 2, 2), " has 1 entries, not 2"),
        ([1], Listed(FLAG, 2, 3), " has 1 entries, not 2 to 3"),
        ([True, 1], Listed(FLAG, 1, 3), "[1] is 1, not true or false"),
        ({"w": 1, "h": 1, "x": 1, "d": 1}, BOX, " has the unknown field 'd'"),
        (0, either(text(3), BOX), " is 0, not a string of at most 3 whole characters or an object "
            "{w: an integer in [1, 2], h: an integer in [1, 2]}"),
        (0, either(Listed(FLAG, 2), Every(FLAG)), " is 0, not a list of 2 or more, each true or false or an object of "
            "which each is true or false"),
        (4, choice(3), " is 4, not 3"),
        (4, choice("left", "right"), " is 4, not left or right"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_place(value, layout, wrong):
    assert fault(value, layout) == wrong


LAYOUT = {"id": ID, "said": Listed({"value": TEXT}, least=1), "image?": NAME}


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ({"id": 1, "said": [{"value": "x"}]}, None),
        ({"id": "1", "said": [{"value": "x", "more": [None]}], "image": None, "other": float("nan")}, None),
        ({"id": 1, "said": [{"value": "x"}], "image": "a/ä.png"}, None),
        ([], " is [], not an object"),
        (None, " is null, not an object"),
        ({"said": []}, ".id is missing"),
        ({"id": 1}, ".said is missing"),
        ({"id": True, "said": []}, ".id is true, not a string or a whole number"),
        ({"id": 1.5, "said": []}, ".id is 1.5, not a string or a whole number"),
        ({"id": "\ud800", "said": []}, ".id is '\\ud800', not a string or a whole number"),
        ({"id": 1, "said": []}, ".said has 0 entries, not 1 or more"),
        ({"id": 1, "said": "x"}, ".said is 'x', not a list"),
        ({"id": 1, "said": [{"value": "x"}, {}]}, ".said[1].value is missing"),
        ({"id": 1, "said": [{"value": 5}]}, ".said[0].value is 5, not a string of whole characters"),
        ({"id": 1, "said": [{"value": "\udfff"}]}, ".said[0].value is '\\udfff', not a string of whole characters"),
        ({"id": 1, "said": [{"value": "x"}], "image": {}}, ".image is an object of 0, not the name of a file"),
        ({"id": 1, "said": [{"value": "x"}], "image": "a\0"}, ".image is 'a\\x00', not the name of a file"),
        ({"id": 1, "said": [{"value": "x"}], "image": "ä" * 128}, f".image is '{'ä' * 80}'…, not the name of a file"),
        ({"id": 1, "said": [{"value": "x"}], "image": "a/" * 999}, f".image is '{'a/' * 40}'…, not the name of a file"),
    ],
)
def test_fault(value: Any, wrong: str | None) -> None:
    assert fault(value, LAYOUT) == wrong


def test_fault_in_an_object_of_any_names() -> None:
    assert fault({"a": {"x": True}, "b": {"x": 1}}, Every({"x": FLAG})) == "['b'].x is 1, not true or false"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("x" * 500, f"'{'x' * 80}'…"),
        ("\ud800", r"'\ud800'"),
        ("two\nlines", r"'two\nlines'"),
        (HUGE, "an integer of about 240824 digits"),
        (-HUGE, "an integer of about 240824 digits"),
        ([1, "a", None], "[1, 'a', null]"),
        ([HUGE], "[an integer of about 240824 digits]"),
        ([0] * 10**6, "a list of 1000000"),
        ([[1]], "a list of 1"),
        ([], "[]"),
        ({"a": 1}, "an object of 1"),
        (True, "true"),
        (math.nan, "nan"),
        (None, "null"),
    ],
    ids=lambda value: "",
)
def test_a_quoted_value_is_short_and_printable(value, said):
    assert shown(value) == said
    said.encode()
