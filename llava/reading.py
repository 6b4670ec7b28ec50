"""Files that others made, read to their end or refused in one line: no pipe is waited for, no number taken for another.

Standard library only, as what is read first says whether anything else is needed.
"""

import json
import math
import stat
from pathlib import Path
from typing import Any

from llava.constants import InputError
from llava.schema import shown

# Longest integer in a file: ids have 19 digits at most, and arithmetic on thousands of them stops a run.
DIGITS = 32


def check_regular(file: Path, largest: float = math.inf) -> None:
    """Make sure that a file can be read to its end: that it is no folder, no pipe and no device.

    Args:
        file: the file.
        largest: bytes that it may have.

    Raises:
        InputError: it is one of these, or larger, or there is none.
    """
    try:
        found = file.stat()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {str(file)!r} ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"cannot read {str(file)!r} (it is a folder, a pipe or a device, not a file)")
    if found.st_size > largest:
        raise InputError(f"cannot read {str(file)!r} (it has {found.st_size:,} bytes, more than {largest:,})")


def read_text(file: Path, largest: float = math.inf) -> str:
    """Read a file of UTF-8.

    Raises:
        InputError: it cannot be read, or is something else, see `check_regular`.
    """
    check_regular(file, largest)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {str(file)!r} ({error})") from error


def parse_json(text: str, strict: bool = True) -> Any:
    """Parse JSON as the standard has it: without NaN, without infinities, without an object's key twice.

    Args:
        text: JSON.
        strict: False: as Python writes and reads it, as in settings that are published.

    Raises:
        ValueError: it is none, or has numbers or a depth that nothing can be done with.
    """
    try:
        return _STRICT.decode(text) if strict else json.loads(text)
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
    return value if math.isfinite(value) else _constant(digits[:DIGITS])


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"an object has the key {shown(twice)} twice")
    return made


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_float)
