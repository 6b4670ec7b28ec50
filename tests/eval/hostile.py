"""Damages to question, answer and label files: fields of wrong types, odd JSON, odd bytes, things that are no files."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

# What stands in for a field, as JSON text, as Python's json cannot write all of it.
VALUES = [
    *("null", "true", "false", "0", "-1", "1.5", '""', '"x"', "[]", "{}", "[null]", '{"a": null}', "NaN", "Infinity"),
    *("-Infinity", "1e999", "9" * 5000, "-" + "9" * 25, '"\\ud800"', '"\\u0000"', '"../x"', '"/etc/passwd"'),
    *('"' + "x" * 300 + '"', '"' + "a/" * 3000 + '"', "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000),
    *('"circular"', '"accuracy"', '"no"', '"adversarial"', '[["x"]]', '"<image>"', '{"a": 1, "a": 2}', '"\\n\\t"'),
]
MARK = "<<here>>"
BYTES = [b"\x00", b"\xff", b"\xed\xa0\x80", b"\n", b"\r", b'"', b"\t", b"{", b"]", b"\xef\xbb\xbf", b" " * 100_000]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the parts of a JSON value are."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from _places(part, (*path, key))


def _put(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """Change a part of a value, which is changed in place."""
    holder = [value]
    spot: Any = holder
    for key in (0, *path)[:-1]:
        spot = spot[key]
    change(spot, (0, *path)[-1])
    return holder[0] if holder else None


def damage_json(text: str, random: Random) -> str:
    """Replace, remove or repeat a part of a JSON value."""
    value = json.loads(text)
    path = random.choice(list(_places(value)))
    if path and random.random() < 0.2:
        return json.dumps(_put(value, path, lambda spot, key: spot.__delitem__(key)))
    if path and isinstance(path[-1], str) and random.random() < 0.1:
        return json.dumps(value).replace(f'"{path[-1]}":', f'"{path[-1]}": 1, "{path[-1]}":', 1)
    changed = _put(value, path, lambda spot, key: spot.__setitem__(key, MARK))
    return json.dumps(changed).replace(f'"{MARK}"', random.choice(VALUES))


def damage_lines(text: str, random: Random, damage: Callable[[str, Random], str]) -> str:
    """Repeat, drop, exchange or damage lines."""
    lines = text.splitlines()
    place = random.randrange(len(lines))
    kind = random.random()
    if kind < 0.1:
        lines.insert(random.randrange(len(lines) + 1), lines[place])
    elif kind < 0.2:
        del lines[place]
    elif kind < 0.25:
        random.shuffle(lines)
    else:
        lines[place] = damage(lines[place], random)
    return "\n".join(lines) + "\n"


def damage_cells(line: str, random: Random) -> str:
    """Replace, remove or add a cell of a table."""
    cells = line.split("\t")
    place = random.randrange(len(cells))
    odd = ["", "nan", "1", "2", "-1", "9" * 5000, "x", "1.0", '"', "A", "D", "AB", "²", "\x00", "index", "0001"]
    cells[place : place + random.choice([0, 1, 1, 1])] = random.choice([[], [random.choice(odd)], [random.choice(odd)]])
    return "\t".join(cells)


def damage_bytes(data: bytes, random: Random) -> bytes:
    """Cut a file off, or put odd bytes into it."""
    place = random.randrange(len(data) + 1)
    if random.random() < 0.3:
        return data[:place]
    return data[:place] + random.choice(BYTES) + data[place + random.choice([0, 1, 10]) :]


def damage_file(file: Path, random: Random) -> None:
    """Damage a file; put it back by writing its bytes with `restore`."""
    data = file.read_bytes()
    kind = random.random()
    if kind < 0.05:
        file.unlink()
        [lambda: os.mkfifo(file), file.mkdir, lambda: file.symlink_to("/dev/zero"), lambda: None][random.randrange(4)]()
        return
    if kind < 0.25:
        file.write_bytes(damage_bytes(data, random))
        return
    text = data.decode()
    if file.suffix in (".tsv", ".txt"):
        text = damage_lines(text, random, damage_cells)
    elif file.suffix == ".jsonl" or file.name.startswith("coco_pope_"):
        text = damage_lines(text, random, damage_json)
    else:
        text = damage_json(text, random)
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def restore(file: Path, data: bytes) -> None:
    """Put a file back, whatever has become of it."""
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)
    file.write_bytes(data)
