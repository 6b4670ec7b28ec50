"""Rules for fields: what they take, what they refuse, and how a refused value is quoted."""

import math

import pytest

from llava.constants import InputError
from llava.schema import FLAG, NOTHING, OBJECT, check, choice, either, integer, listed, number, record, shown, text

HUGE = 1 << 800_000


@pytest.mark.parametrize(
    ("rule", "taken", "refused"),
    [
        (integer(1, 9), [1, 9], [0, 10, True, 1.0, "1", None, HUGE, math.nan]),
        (number(0, 1), [0, 1, 0.5], [True, -0.1, 1.1, HUGE, math.nan, math.inf, "0.5", [0.5]]),
        (text(4), ["", "abcd", "é"], ["abcde", 1, None, b"a", "\ud800", ["a"]]),
        (choice("a", "b", False), ["a", "b", False], ["c", 0, 0.0, None, ["a"], {}]),
        (listed(integer(0, 3), 1, 2), [[0], [1, 3]], [[], [1, 2, 3], [4], [True], "12", {"1": 2}, None]),
        (record(w=integer(1, 2), h=integer(1, 2)), [{"w": 1, "h": 2}], [{}, {"w": 1}, {"w": 1, "h": 3}, [1, 2], None]),
        (either(integer(1, 2), NOTHING), [1, None], [3, "x", [None]]),
        (FLAG, [True, False], [0, 1, "true", None]),
        (OBJECT, [{}, {"a": 1}], [[], None, "x"]),
    ],
)
def test_a_rule_takes_what_it_says(rule, taken, refused):
    assert [value for value in taken if not rule.holds(value)] == []
    assert [value for value in refused if rule.holds(value)] == []


def test_a_refusal_names_source_field_rule_and_value():
    rules = {"size": integer(1, 9), "name": text()}
    check({"name": "x", "size": 3, "other": object()}, rules, "config.json")
    check({}, rules, "config.json")
    with pytest.raises(InputError) as caught:
        check({"size": "large", "name": 3}, rules, "config.json")
    assert str(caught.value) == "config.json's size must be an integer in [1, 9], got 'large'"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("x" * 500, f"'{'x' * 80}'…"),
        ("\ud800", r"'\ud800'"),
        ("two\nlines", r"'two\nlines'"),
        (HUGE, "an integer of about 240824 digits"),
        (-HUGE, "an integer of about 240824 digits"),
        ([1, "a", None], "[1, 'a', None]"),
        ([HUGE], "[an integer of about 240824 digits]"),
        ([0] * 10**6, "a list of 1000000"),
        ([[1]], "a list of 1"),
        ([], "[]"),
        ({"a": 1}, "an object of 1"),
        (True, "True"),
        (math.nan, "nan"),
        (None, "None"),
    ],
    ids=lambda value: "",
)
def test_a_quoted_value_is_short_and_printable(value, said):
    assert shown(value) == said
    said.encode()
