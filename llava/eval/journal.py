"""An answers file that survives anything: every answer is on disk at once, none is lost, none is written twice.

Answers go to append-only parts beside the file, one per process and start, and are merged in question order by an
atomic rename when all are there. A part cut off within a line loses that line only; its question is asked again.

A row belongs to the question whose id and prompt it has, wherever it stands. What belongs to none, or is no row at all,
is put aside under the name of its file with `.damaged` behind it, and said in `notes`.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

from llava.constants import InputError
from llava.eval.benchmarks.base import Question, Row
from llava.eval.lock import Lock
from llava.eval.record import differences
from llava.utils import write_whole

# What stands beside an answers file: how it was made, and how the run that finished it went.
RECORD, SUMMARY = ".config.json", ".summary.json"
REMEDY = "give another --answers-file, or --overwrite to discard it"
# What may be wrong with lines.
UNREADABLE, STRANGE, REPEATED = "lines that are no answers", "lines of no question", "lines that repeat a question"


class Journal:
    """The answers to questions 0 … n-1 of one configuration."""

    def __init__(self, file: Path, config: Mapping[str, Any], questions: Sequence[Question]) -> None:
        """Name the answers file, what its answers depend on and the questions; nothing is touched yet."""
        self.file, self.config, self.questions = file, dict(config), questions
        self.parts = file.with_name(file.name + ".parts")
        self.record = file.with_name(file.name + RECORD)
        self.summary = file.with_name(file.name + SUMMARY)
        self.lock = Lock(file.with_name(file.name + ".lock"))
        self.notes: list[str] = []
        """What was found damaged and what became of it, a line each."""
        self._part: FileIO | None = None
        self._places: dict[tuple[str, str], list[int]] = {}
        for place, question in enumerate(questions):
            self._places.setdefault(_key(question.id, prompt_of(question)), []).append(place)

    def check_kind(self) -> None:
        """Make sure that what has the name of the answers file is one that may be replaced; nothing is touched.

        Raises:
            InputError: it is a folder, a pipe or a device.
        """
        if self.file.exists() and not self.file.is_file():
            raise InputError(f"{str(self.file)!r} is no regular file; give another --answers-file")

    def check(self, follow: Iterable[str] = ()) -> None:
        """Make sure that the answers on disk, if any, were made by this configuration; nothing is touched.

        Args:
            follow: keys of the configuration that nobody asked for: they become those of the answers.

        Raises:
            InputError: they were made by another, or nobody knows by which.
        """
        if not self.file.exists() and not any(part.is_file() and part.stat().st_size for part in self._listed()):
            return
        if not self.record.exists():
            raise InputError(f"{str(self.file)!r} exists, and how it was made is not recorded; {REMEDY}")
        before = _object(self.record)
        if before is None:
            raise InputError(
                f"{str(self.file)!r} exists, and the record of how it was made, {str(self.record)!r}, is damaged; "
                f"bring that back, {REMEDY}"
            )
        self.config |= {key: before[key] for key in follow if isinstance(before.get(key), str)}
        differing = differences(before, self.config)
        if differing:
            said = ", ".join(differing)
            raise InputError(f"{str(self.file)!r} was made with another configuration ({said}); {REMEDY}")

    def read(self) -> "Found":
        """Read what is on disk; nothing is touched.

        Raises:
            InputError: there are rows, and none of them belongs to the questions.
        """
        found = Found()
        for file in (*([self.file] if self.file.exists() else []), *self._listed()):
            flaws: Counter[str] = Counter()
            if not file.is_file():
                flaws["what is no file"] += 1
            else:
                for hint, row in _lines(file, part=file != self.file):
                    flaws[self._take(found, file, hint, row)] += 1
            del flaws[""]
            if flaws:
                found.flaws[file] = flaws
        if not found.rows and any(flaws[STRANGE] for flaws in found.flaws.values()):
            raise InputError(f"no answer in {str(self.file)!r} belongs to these questions; {REMEDY}")
        return found

    def prepare(self, overwrite: bool = False) -> None:
        """Record the configuration and put aside what is damaged; `overwrite` discards what is there.

        One process does this, which holds the lock, before any writes.
        """
        if overwrite:
            self._discard()
        for file in (self.record, self.summary):
            if os.path.lexists(file) and _object(file) is None:
                self._put_aside(file, "it is damaged")
        if os.path.lexists(self.parts) and not self.parts.is_dir():
            self._put_aside(self.parts, "it is no folder")
        # In this order: answers without a record are refused, a record without answers is not.
        write_whole(self.record, json.dumps(self.config, indent=2) + "\n")
        self.parts.mkdir(exist_ok=True)
        self._repair()

    def write(self, place: int, row: Mapping[str, Any]) -> None:
        """Put the answer to a question on disk.

        Raises:
            OSError: the machine refuses it; what was written of it is a line cut off.
        """
        if self._part is None:
            self._part = self._new_part()
        _write(self._part, place, row)

    def close(self) -> None:
        """Close this process's part."""
        if self._part is not None:
            self._part.close()
            self._part = None

    def merge(self, wanted: Iterable[int]) -> dict[int, Row]:
        """Write the answers to the questions that were asked for, in question order; returns them.

        Those to others, as of a run without the limit that was stopped, stay in the file or in the parts, wherever they
        are; without such the parts are removed. One process does this.
        """
        found = self.read()
        shown = {place: found.rows[place] for place in sorted({*wanted, *found.merged} & found.rows.keys())}
        write_whole(self.file, "".join(json.dumps(row) + "\n" for row in shown.values()))
        if len(shown) == len(found.rows):
            self._remove_parts()
        return shown

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Put the summary of a finished run beside the answers."""
        write_whole(self.summary, json.dumps(summary, indent=2) + "\n")

    def summarised(self) -> Row:
        """Return the summary of the run that finished the answers; empty where there is none."""
        return _object(self.summary) or {}

    def _take(self, found: "Found", file: Path, hint: int | None, row: Row | None) -> str:
        """Take in one line; returns what is wrong with it, if anything is.

        Args:
            found: what was read so far.
            file: where the line stands.
            hint: which of the questions that are alike it answers.
            row: None: it is no row.
        """
        if row is None:
            return UNREADABLE
        picture = row["metadata"].get("image")
        places = self._places.get(_key(row["question_id"], row["prompt"]), [])
        places = [place for place in places if picture is None or self.questions[place].image in (None, picture)]
        if not places:
            return STRANGE
        free = (place for place in places if place not in found.rows)
        place = hint if hint in places else next(free, places[0])
        again = file == self.file and place in found.merged
        if file == self.file:
            found.merged[place] = None
        old = found.rows.get(place)
        if old is None or failed(old):
            found.rows[place], found.source[place] = row, file
        elif not failed(row) and row.get("answer_id") != old.get("answer_id"):
            again = True  # a part that outlived the merge has the same answer, and an error may have been retried
        return REPEATED if again else ""

    def _listed(self) -> list[Path]:
        return sorted(self.parts.iterdir()) if self.parts.is_dir() else []

    def _repair(self) -> None:
        """Put files with flaws aside, whose other lines go on in a part of their own."""
        found = self.read()
        if not found.in_order:
            self.notes.append(f"the lines of {str(self.file)!r} were not in question order; they are put in order")
        for file, flaws in found.flaws.items():
            kept = [place for place, source in found.source.items() if source == file]
            if kept:
                with self._new_part() as part:
                    for place in kept:
                        _write(part, place, found.rows[place])
                    os.fsync(part.fileno())
            said = ", ".join(f"{what} ({number})" for what, number in flaws.items())
            self._put_aside(file, f"{said}; {len(kept)} answers are kept")

    def _put_aside(self, file: Path, why: str) -> None:
        """Give a damaged file another name, under which nothing reads it."""
        name = file.name if file.parent == self.file.parent else f"{self.file.name}.{file.name}"
        names = (self.file.with_name(f"{name}.damaged{number or ''}") for number in count())
        aside = next(path for path in names if not os.path.lexists(path))
        file.rename(aside)
        self.notes.append(f"{str(file)!r} is now {aside.name!r}: {why}")

    def _new_part(self) -> FileIO:
        # Unbuffered: what a full disk refused must not be tried again at the end.
        return FileIO(self.parts / f"{uuid4().hex}.jsonl", "x")

    def _discard(self) -> None:
        # The record goes last: what is left if this is cut short is still known.
        for file in (self.file, self.summary):
            file.unlink(missing_ok=True)
        self._remove_parts()
        self.record.unlink(missing_ok=True)

    def _remove_parts(self) -> None:
        for part in self._listed():
            if part.is_dir() and not part.is_symlink():
                self._put_aside(part, "it is no file")
            else:
                part.unlink()
        with suppress(FileNotFoundError):
            self.parts.rmdir()


@dataclass(kw_only=True)
class Found:
    """What is on disk of an answers file."""

    rows: dict[int, Row] = field(default_factory=dict)
    """The row of every question that has one, by its place among the questions; an answer goes before an error."""
    source: dict[int, Path] = field(default_factory=dict)
    """Where it stands."""
    merged: dict[int, None] = field(default_factory=dict)
    """Places of the answers file's rows, in its order."""
    flaws: dict[Path, Counter[str]] = field(default_factory=dict)
    """File -> what is wrong with its lines, counted."""

    @property
    def in_order(self) -> bool:
        """The answers file is in question order."""
        return list(self.merged) == sorted(self.merged)

    @property
    def errors(self) -> dict[int, Row]:
        """The rows that say why a question could not be asked."""
        return {place: row for place, row in self.rows.items() if failed(row)}


def failed(row: Row) -> bool:
    """Whether a row says why its question could not be asked."""
    return bool(row["metadata"].get("error"))


def prompt_of(question: Question) -> str:
    """Return what a question's row has as `prompt`."""
    return question.text if question.prompt is None else question.prompt


def _key(number: Any, prompt: str) -> tuple[str, str]:
    """Return what tells questions apart; 1, "1" and true are three ids."""
    return json.dumps(number), prompt


def _write(part: FileIO, place: int, row: Mapping[str, Any]) -> None:
    data = memoryview(json.dumps([place, row]).encode() + b"\n")
    while data:
        data = data[part.write(data) :]


def _lines(file: Path, part: bool) -> Iterator[tuple[int | None, Row | None]]:
    """Parse an answers file, or a part, whose lines name the place too; None for what is no row.

    What follows the last line end of a part was cut off while being written.
    """
    with file.open("rb") as lines:
        for line in lines:
            try:
                value = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError):
                if line.endswith(b"\n") or not part:
                    yield None, None
                continue
            named = part and isinstance(value, list) and len(value) == 2
            place, row = value if named else (None, None if part else value)
            yield (place if type(place) is int else None), (row if _is_row(row) else None)


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or "question_id" not in row:
        return False
    return all(isinstance(row.get(name), kind) for name, kind in (("prompt", str), ("text", str), ("metadata", dict)))


def _object(file: Path) -> Row | None:
    """Return a JSON file's object; None: it holds none, or there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
