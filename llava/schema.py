"""What the fields of a JSON object may hold: one rule a field, checked at the door, refused by name in one line."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llava.constants import InputError


class Rule(NamedTuple):
    """What a field may hold."""

    said: str
    """The rule in words, as they follow "must be"."""
    holds: Callable[[Any], bool]


def integer(low: int, high: int) -> Rule:
    """Take an integer in [low, high]; True and 1.0 are none."""
    return Rule(f"an integer in [{low}, {high}]", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Rule:
    """Take a finite number in [low, high]."""
    return Rule(f"a number in [{low:g}, {high:g}]", lambda value: type(value) in (int, float) and low <= value <= high)


def text(longest: int = 10_000) -> Rule:
    """Take a string of at most `longest` characters, all of which can be encoded: no half of a surrogate pair."""
    return Rule(f"a text of at most {longest} characters", lambda value: _is_text(value, longest))


def _is_text(value: Any, longest: int) -> bool:
    return isinstance(value, str) and len(value) <= longest and not any("\ud800" <= c <= "\udfff" for c in value)


def choice(*values: Any) -> Rule:
    """Take one of these values."""
    return Rule(", ".join(map(str, values)), lambda value: any(type(value) is type(v) and value == v for v in values))


def listed(rule: Rule, least: int = 0, most: int = 10_000) -> Rule:
    """Take a list of `least` to `most` values, each by the rule."""
    count = f"{least}" if least == most else f"{least} to {most}"
    said = f"a list of {count}, each {rule.said}"
    return Rule(said, lambda v: isinstance(v, list) and least <= len(v) <= most and all(map(rule.holds, v)))


def record(**rules: Rule) -> Rule:
    """Take an object with exactly these fields."""
    said = ", ".join(f"{name}: {rule.said}" for name, rule in rules.items())
    return Rule(
        f"an object {{{said}}}",
        lambda v: isinstance(v, dict) and v.keys() == rules.keys() and all(rules[k].holds(v[k]) for k in rules),
    )


def either(*rules: Rule) -> Rule:
    """Take what one of the rules takes."""
    return Rule(" or ".join(rule.said for rule in rules), lambda value: any(rule.holds(value) for rule in rules))


FLAG = Rule("true or false", lambda value: isinstance(value, bool))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))
NOTHING = Rule("null", lambda value: value is None)


def check(found: Mapping[str, Any], rules: Mapping[str, Rule], source: str) -> None:
    """Check the fields that rules are given for; others, and rules without their field, are passed over.

    Args:
        found: what was read.
        rules: by field.
        source: what the object is called in the message, such as its file.

    Raises:
        InputError: a field breaks its rule.
    """
    for name, rule in rules.items():
        if name in found and not rule.holds(found[name]):
            raise InputError(f"{source}'s {name} must be {rule.said}, got {shown(found[name])}")


def shown(value: Any, longest: int = 80) -> str:
    """Return a value as a message may quote it: printable, and not longer than this.

    Nothing is written out only to be cut, as the digits of a number may take longer than all else of a program.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of about {int(value.bit_length() * math.log10(2))} digits"
    if isinstance(value, str):
        quoted = ascii(value[:longest]) if not _is_text(value, len(value)) else repr(value[:longest])
        return quoted + ("…" if len(value) > longest else "")
    if isinstance(value, list | tuple | dict):
        kind = "an object" if isinstance(value, dict) else "a list"
        plain = len(value) <= 8 and all(isinstance(part, int | float | str | None) for part in value)
        words = f"[{', '.join(map(shown, value))}]" if plain and kind == "a list" else ""
        return words if 0 < len(words) <= longest else f"{kind} of {len(value)}"
    return repr(value)[:longest]
