"""An answers file that survives anything: every answer is on disk at once, none is lost, none is written twice.

Answers go to append-only parts beside the file, one per process and start, and are merged in question order by an
atomic rename when all are there. A part cut off within a line loses that line only; its question is asked again.
"""

import json
import os
from collections.abc import Iterator, Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

from llava.constants import InputError

# What stands beside an answers file: how it was made, and how the run that finished it went.
RECORD, SUMMARY = ".config.json", ".summary.json"


class Journal:
    """The answers to questions 0 … n-1 of one configuration."""

    def __init__(self, file: Path, config: Mapping[str, Any]) -> None:
        """Name the answers file and what its answers depend on; nothing is touched yet."""
        self.file, self.config = file, dict(config)
        self.parts = file.with_name(file.name + ".parts")
        self.record = file.with_name(file.name + RECORD)
        self._part: TextIO | None = None

    def check(self) -> None:
        """Make sure that the answers on disk, if any, were made by this configuration; nothing is touched.

        Raises:
            InputError: they were not, or nobody knows.
        """
        found = self.file.exists() or any(part.stat().st_size for part in self.parts.glob("*"))
        remedy = "give another --answers-file, or --overwrite to discard it"
        if found and not self.record.exists():
            raise InputError(f"{str(self.file)!r} exists, and how it was made is not recorded; {remedy}")
        if found:
            before = json.loads(self.record.read_text())
            differing = [key for key in {**before, **self.config} if before.get(key) != self.config.get(key)]
            if differing:
                said = ", ".join(f"{key} {before.get(key)!r}, now {self.config.get(key)!r}" for key in differing)
                raise InputError(f"{str(self.file)!r} was made with another configuration ({said}); {remedy}")

    def prepare(self, overwrite: bool = False) -> None:
        """Record the configuration; `overwrite` discards what is there. One process does this, before any writes."""
        if overwrite:
            self._discard()
        # In this order: answers without a record are refused, a record without answers is not.
        self.file.parent.mkdir(parents=True, exist_ok=True)
        _replace(self.record, json.dumps(self.config, indent=2) + "\n")
        self.parts.mkdir(exist_ok=True)

    def answered(self) -> set[int]:
        """Return the indices of the questions that have an answer on disk."""
        return {index for index, _ in self._rows()}

    def write(self, index: int, row: Mapping[str, Any]) -> None:
        """Put the answer to a question on disk."""
        if self._part is None:
            self._part = (self.parts / f"{uuid4().hex}.jsonl").open("w", encoding="utf-8")
        self._part.write(json.dumps([index, row]) + "\n")
        self._part.flush()

    def close(self) -> None:
        """Close this process's part."""
        if self._part is not None:
            self._part.close()
            self._part = None

    def merge(self) -> int:
        """Write the answers to questions 0, 1, … up to the first without one; returns their number.

        What stands behind such a gap, as after a run with a limit, stays in the parts; without a gap they are removed.
        One process does this.
        """
        rows = dict(self._rows())
        whole = [rows[index] for index in takewhile(rows.__contains__, count())]
        _replace(self.file, "".join(json.dumps(row) + "\n" for row in whole))
        if len(whole) == len(rows):
            self._remove_parts()
        return len(whole)

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Put the summary of a finished run beside the answers."""
        _replace(self.file.with_name(self.file.name + SUMMARY), json.dumps(summary, indent=2) + "\n")

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Read every whole line of the merged file, whose lines are in question order, and of the parts."""
        if self.file.exists():
            yield from enumerate(_whole_lines(self.file))
        for part in sorted(self.parts.glob("*.jsonl")) if self.parts.exists() else ():
            yield from _whole_lines(part)

    def _discard(self) -> None:
        summary = self.file.with_name(self.file.name + SUMMARY)
        # The record goes last: what is left if this is cut short is still known.
        for file in (self.file, summary):
            file.unlink(missing_ok=True)
        self._remove_parts()
        self.record.unlink(missing_ok=True)

    def _remove_parts(self) -> None:
        if self.parts.exists():
            for part in self.parts.iterdir():
                part.unlink()
            self.parts.rmdir()


def _whole_lines(file: Path) -> Iterator[Any]:
    """Parse the lines that end; what follows the last line end was cut off while being written."""
    with file.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def _replace(file: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all; one process at a time does this."""
    draft = file.with_name(f"{file.name}.draft")
    with draft.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    draft.replace(file)
