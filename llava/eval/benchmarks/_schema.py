"""What official files and answers must look like, as tables of field and type, and reading what others made.

A layout is a `Kind`, a mapping of field to layout (a name that ends in `?` may be absent or null; fields that are not
named may be anything), a `Listed` or an `Every`. `fault` says what is wrong with a value, if anything.
"""

import json
import math
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llava.constants import InputError

# Longest integer in a file: ids have 19 digits at most, and arithmetic on thousands of them stops a run.
DIGITS = 32
# Longest name of a file, and of folders and file together, in bytes.
NAME_BYTES, PATH_BYTES = 255, 1024
SHOWN = 40


class Kind(NamedTuple):
    """A type of value that holds no others."""

    words: str
    """What it is, for people."""
    holds: Callable[[Any], bool]


class Listed(NamedTuple):
    """A list whose entries are all of one layout."""

    each: Any
    least: int = 0
    """How many there must be."""


class Every(NamedTuple):
    """An object of any names whose values are all of one layout."""

    each: Any


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


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


STRING = Kind("a string", lambda value: isinstance(value, str))
TEXT = Kind("a string of whole characters", _encodable)
NAME = Kind("the name of a file", _names_a_file)
NAME_OR_NONE = Kind(NAME.words, lambda value: value == "" or _names_a_file(value))
WHOLE = Kind("a whole number", _whole)
ID = Kind("a string or a whole number", lambda value: _whole(value) or _encodable(value))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
ANYTHING = Kind("anything", lambda value: True)


def fault(value: Any, layout: Any) -> str | None:
    """Return the first thing wrong with a value, such as `.answers[3].answer is null, not a string`; None: nothing."""
    if isinstance(layout, Kind):
        return None if layout.holds(value) else f" is {_shown(value)}, not {layout.words}"
    if isinstance(layout, Listed):
        if not isinstance(value, list | tuple):
            return f" is {_shown(value)}, not a list"
        short = f" has {len(value)} entries, not {layout.least} or more" if len(value) < layout.least else None
        return short or _part_fault(enumerate(value), layout.each)
    if not isinstance(value, dict):
        return f" is {_shown(value)}, not an object"
    return _part_fault(value.items(), layout.each) if isinstance(layout, Every) else _field_fault(value, layout)


def _part_fault(parts: Iterable[tuple[Any, Any]], layout: Any) -> str | None:
    for place, part in parts:
        if wrong := fault(part, layout):
            return f"[{_shown(place)}]{wrong}"
    return None


def _field_fault(value: Mapping[str, Any], layout: Mapping[str, Any]) -> str | None:
    for name, inner in layout.items():
        field = name.removesuffix("?")
        if field not in value:
            wrong = None if field != name else " is missing"
        else:
            wrong = None if value[field] is None and field != name else fault(value[field], inner)
        if wrong:
            return f".{field}{wrong}"
    return None


def _shown(value: Any) -> str:
    """Quote a value in short."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, str):
        return repr(value[:SHOWN]) + "…" * (len(value) > SHOWN)
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)[:SHOWN]


def check(value: Any, layout: Any, what: str) -> None:
    """Make sure that a value is of a layout.

    Raises:
        InputError: it is not; the message begins with `what`.
    """
    if found := fault(value, layout):
        raise InputError(f"{what}{found}")


def check_regular(file: Path) -> None:
    """Make sure that a file can be read to its end: that it is no folder, no pipe and no device.

    Raises:
        InputError: it is one of these, or there is none.
    """
    try:
        if stat.S_ISREG(file.stat().st_mode):
            return
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {str(file)!r} ({getattr(error, 'strerror', None) or error})") from error
    raise InputError(f"cannot read {str(file)!r} (it is a folder, a pipe or a device, not a file)")


def read_text(file: Path) -> str:
    """Read a file of UTF-8.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    check_regular(file)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {str(file)!r} ({error})") from error


def parse_json(text: str) -> Any:
    """Parse JSON as the standard has it: without NaN, without infinities, without an object's key twice.

    Raises:
        ValueError: it is none, or has numbers or a depth that nothing can be done with.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _constant(digits[:SHOWN])


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"an object has the key {_shown(twice)} twice")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_float)
