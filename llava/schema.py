"""What values that others made may be: one language of layouts, checked at the door and refused in one line.

A layout is a `Rule`, a mapping of field to layout, `Fields`, a `Listed` or an `Every`. A mapping is an object: a name
that ends in `?` may be absent or null, and fields that are not named may be anything. `fault` says what is wrong with
a value, if anything.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from llava.constants import InputError

# Longest name of a file, and of folders and file together, in bytes.
NAME_BYTES, PATH_BYTES = 255, 1024


class Rule(NamedTuple):
    """A layout of values that are looked at as a whole."""

    said: str
    """What they are, in words that follow "not"."""
    holds: Callable[[Any], bool]


class Fields(NamedTuple):
    """An object, as a mapping of layouts, with more said of its names."""

    each: Mapping[str, Any]
    partial: bool = False
    """Any name may be absent."""
    closed: bool = False
    """There are no others."""


class Listed(NamedTuple):
    """A list whose entries are all of one layout."""

    each: Any
    least: int = 0
    most: int | None = None
    """How many there may be; None: any number."""

    @property
    def counted(self) -> str:
        """How many there must be, in words."""
        if self.most is None:
            return f"{self.least} or more"
        return f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"


class Every(NamedTuple):
    """An object of any names whose values are all of one layout."""

    each: Any


def integer(low: int, high: int) -> Rule:
    """Take an integer in [low, high]; True and 1.0 are none."""
    return Rule(f"an integer in [{low}, {high}]", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Rule:
    """Take a finite number in [low, high]."""
    return Rule(f"a number in [{low:g}, {high:g}]", lambda value: type(value) in (int, float) and low <= value <= high)


def text(longest: int) -> Rule:
    """Take a `TEXT` of at most `longest` characters."""
    said = f"a string of at most {longest} whole characters"
    return Rule(said, lambda value: isinstance(value, str) and len(value) <= longest and _encodable(value))


def choice(*values: Any) -> Rule:
    """Take one of these values."""
    said = " or ".join(map(str, values))
    return Rule(said, lambda value: any(type(value) is type(v) and value == v for v in values))


def either(*layouts: Any) -> Rule:
    """Take what is of one of the layouts."""
    said = " or ".join(map(_described, layouts))
    return Rule(said, lambda value: any(fault(value, layout) is None for layout in layouts))


def _described(layout: Any) -> str:
    """Say what a layout is."""
    if isinstance(layout, Rule):
        return layout.said
    if isinstance(layout, Listed):
        return f"a list of {layout.counted}, each {_described(layout.each)}"
    if isinstance(layout, Every):
        return f"an object of which each is {_described(layout.each)}"
    fields = layout.each if isinstance(layout, Fields) else layout
    return f"an object {{{', '.join(f'{name}: {_described(inner)}' for name, inner in fields.items())}}}"


def _encodable(value: Any) -> bool:
    """Whether it is a text that can be written: without half of a surrogate pair, which JSON can express."""
    if not isinstance(value, str):
        return False
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _names_a_file(value: Any) -> bool:
    if not _encodable(value) or not value or "\0" in value or len(value.encode()) > PATH_BYTES:
        return False
    return all(len(part.encode()) <= NAME_BYTES for part in value.split("/"))


STRING = Rule("a string", lambda value: isinstance(value, str))
TEXT = Rule("a string of whole characters", _encodable)
NAME = Rule("the name of a file", _names_a_file)
NAME_OR_NONE = Rule(NAME.said, lambda value: value == "" or _names_a_file(value))
WHOLE = Rule("a whole number", lambda value: type(value) is int)
ID = Rule("a string or a whole number", lambda value: type(value) is int or _encodable(value))
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))
ANYTHING = Rule("anything", lambda value: True)


def fault(value: Any, layout: Any) -> str | None:
    """Return the first thing wrong with a value, such as `.answers[3].answer is null, not a string`; None: nothing."""
    if isinstance(layout, Rule):
        return None if layout.holds(value) else f" is {shown(value)}, not {layout.said}"
    if isinstance(layout, Listed):
        if not isinstance(value, list | tuple):
            return f" is {shown(value)}, not a list"
        if len(value) < layout.least or (layout.most is not None and len(value) > layout.most):
            return f" has {len(value)} entries, not {layout.counted}"
        return _part_fault(enumerate(value), layout.each)
    if not isinstance(value, dict):
        return f" is {shown(value)}, not an object"
    if isinstance(layout, Every):
        return _part_fault(value.items(), layout.each)
    return _field_fault(value, layout if isinstance(layout, Fields) else Fields(layout))


def _part_fault(parts: Iterable[tuple[Any, Any]], layout: Any) -> str | None:
    for place, part in parts:
        if wrong := fault(part, layout):
            return f"[{shown(place)}]{wrong}"
    return None


def _field_fault(value: Mapping[str, Any], fields: Fields) -> str | None:
    for name, inner in fields.each.items():
        field = name.removesuffix("?")
        if field not in value:
            wrong = None if field != name or fields.partial else " is missing"
        else:
            wrong = None if value[field] is None and field != name else fault(value[field], inner)
        if wrong:
            return f".{field}{wrong}"
    unknown = value.keys() - {name.removesuffix("?") for name in fields.each} if fields.closed else ()
    return f" has the unknown field {shown(min(unknown))}" if unknown else None


def check(value: Any, layout: Any, what: str) -> None:
    """Make sure that a value is of a layout.

    Raises:
        InputError: it is not; the message begins with `what`.
    """
    if found := fault(value, layout):
        raise InputError(f"{what}{found}")


def check_settings(found: Mapping[str, Any], layouts: Mapping[str, Any], source: str) -> None:
    """Check the settings that there are layouts for; others, and layouts without their setting, are passed over.

    Args:
        found: what was read.
        layouts: by name.
        source: what the object is called in the message, such as its file.

    Raises:
        InputError: a setting is not of its layout.
    """
    if wrong := fault(found, Fields(layouts, partial=True)):
        raise InputError(f"{source}'s {wrong.removeprefix('.')}")


def shown(value: Any, longest: int = 80) -> str:
    """Return a value as a message may quote it: printable, and not longer than this.

    Nothing is written out only to be cut, as the digits of a number may take longer than all else of a program.
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of about {int(value.bit_length() * math.log10(2))} digits"
    if isinstance(value, str):
        return repr(value[:longest]) + "…" * (len(value) > longest)
    if isinstance(value, list | tuple | dict):
        kind = "an object" if isinstance(value, dict) else "a list"
        plain = len(value) <= 8 and all(isinstance(part, int | float | str | None) for part in value)
        words = f"[{', '.join(map(shown, value))}]" if plain and kind == "a list" else ""
        return words if 0 < len(words) <= longest else f"{kind} of {len(value)}"
    return repr(value)[:longest]


def some(names: Sequence[Any], most: int = 4) -> str:
    """Return the first of some names as a message may list them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
