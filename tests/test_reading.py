"""Files that others made: what is no JSON and what cannot be read to its end is refused."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from llava.constants import InputError
from llava.reading import parse_json, read_text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": NaN}', "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("1e999", "1e999 is no number"),
        ("9" * 5000, "a number has 5000 digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"a": 1, "b": 2, "a": 1}', "an object has the key 'a' twice"),
        ('{"a": 1', "Expecting"),
        ('"\0"', "Invalid control character"),
        ("", "Expecting value"),
    ],
)
def test_what_is_no_json(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_json(text)


def test_json_that_is_unusual_but_sound() -> None:
    text = '{"": [' + "1" * 32 + ', -0.5e-300, "\\ud83d\\ude00\\u0000", {}]}'
    assert parse_json(text) == {"": [int("1" * 32), -0.5e-300, "😀\0", {}]}
    assert parse_json("[" * 200 + "]" * 200)


@pytest.mark.parametrize(
    ("text", "value"), [('{"a": 1, "a": 2}', {"a": 2}), ("1e999", math.inf), ("9" * 400, int("9" * 400))]
)
def test_settings_are_read_as_python_writes_them(text: str, value: Any) -> None:
    assert parse_json(text, strict=False) == value
    with pytest.raises(ValueError, match=r"twice|is no number|digits"):
        parse_json(text)


def test_settings_too_have_a_depth() -> None:
    assert math.isnan(parse_json(json.dumps(math.nan), strict=False))
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000, strict=False)


def unreadable(folder: Path) -> list[Path]:
    """Paths that are no file to be read to its end."""
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("pipe")
    (folder / "circle").symlink_to("circle")
    (folder / "latin").write_bytes(b"\xe4")
    (folder / "utf16").write_bytes("{}".encode("utf-16"))
    names = ("pipe", "link", "circle", "latin", "utf16", "nowhere", "a\0b", "x" * 300)
    return [folder, Path("/dev/zero"), *(folder / name for name in names)]


def test_what_can_not_be_read_to_its_end_is_refused(tmp_path: Path) -> None:
    """A pipe would be waited for; a device might never end."""
    for file in unreadable(tmp_path):
        with pytest.raises(InputError, match=r"cannot read|codec"):
            read_text(file)


def test_a_file_may_have_a_largest_size(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("four")
    assert read_text(file, 4) == "four"
    with pytest.raises(InputError, match=r"it has 4 bytes, more than 3"):
        read_text(file, 3)
