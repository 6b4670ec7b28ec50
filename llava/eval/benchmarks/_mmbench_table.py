"""The table of MMBench: reading it with its pictures, and writing what its server takes."""

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.constants import InputError
from llava.eval.benchmarks._common import latest, official
from llava.eval.benchmarks.base import Row
from llava.output import write_whole
from llava.reading import check_regular

LETTERS = "ABCD"
# What pandas, with which upstream reads the table, takes for an empty cell.
EMPTY = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip
NOT_SUBMITTED = {"hint", "category", "source", "image", "comment", "l2-category"}
PREDICTION_COLUMN = 6
CELL_LIMIT = 2**31 - 1
COLUMNS = {"index", "question", "A", "B", "image"}
# Longest cell that can name another row instead of carrying a picture, as in VLMEvalKit; no picture is as short.
REFERENCE = 64
INDEX_DIGITS = 18


def read_table(file: Path, source: str) -> Iterator[dict[str, str]]:
    """Read an MMBench table row by row: tabs between cells, double quotes around cells that hold tabs or line breaks.

    The limit on the length of a cell is raised for the process: a picture is one cell.

    Raises:
        InputError: the file is missing, is no table, lacks a column, or an index is no number or stands there twice.
    """
    csv.field_size_limit(CELL_LIMIT)
    with official(file, source):
        check_regular(file)
        with file.open(newline="", encoding="utf-8-sig") as stream:
            table = csv.DictReader(stream, delimiter="\t", restval="")
            try:
                yield from _checked(table)
            except (csv.Error, ValueError) as error:
                raise InputError(f"{str(file)!r}, line {table.line_num}: {error}") from error


def _checked(table: "csv.DictReader[str]") -> Iterator[dict[str, str]]:
    """Read the rows of a table, cells beyond the last column left out."""
    names = table.fieldnames or ()
    if lacking := COLUMNS - set(names):
        raise ValueError(f"there is no column {', '.join(sorted(lacking))}")
    if len(set(names)) < len(names):
        raise ValueError("two columns have the same name")
    seen: set[int] = set()
    for row in table:
        cell = row["index"]
        if not cell.isdecimal() or len(cell) > INDEX_DIGITS:
            raise ValueError(f"index {cell[:20]!r} is no number")
        if int(cell) in seen:
            raise ValueError(f"index {cell} stands there twice; answers to it cannot be told apart")
        seen.add(int(cell))
        yield {name: cell for name, cell in row.items() if name is not None}


class Shown(NamedTuple):
    """The picture of a row."""

    data: str | None = None
    """In base64."""
    error: str | None = None
    """Why there is none."""


def pictures(rows: Iterable[Mapping[str, str]]) -> dict[int, Shown]:
    """Return the picture of every row by its index; a cell that is another row's index stands for that row's picture.

    Published tables write the picture of a question once and let its rotations name it.
    """
    cells = {int(row["index"]): row["image"].strip() for row in rows}
    return {index: _follow(index, cells) for index in cells}


def _follow(index: int, cells: Mapping[int, str]) -> Shown:
    passed = {index}
    while cells[index].isdecimal() and len(cells[index]) <= REFERENCE:
        named = int(cells[index])
        if named not in cells:
            return Shown(error=f"the image cell of row {index} names row {named}, which is not in the table")
        if named in passed:
            return Shown(error=f"the image cell of row {index} names row {named}, which leads back to it")
        passed.add(named)
        index = named
    return Shown(error=f"row {index} has no picture") if is_none(cells[index]) else Shown(cells[index])


def is_none(cell: str | None) -> bool:
    """Whether a cell counts as empty."""
    return cell is None or cell in EMPTY or cell.lower() in ("nan", "none")


def choices(row: Mapping[str, str]) -> list[str]:
    """Return the options up to the first empty one."""
    cells = [row.get(letter) for letter in LETTERS]
    count = next((number for number, cell in enumerate(cells) if is_none(cell)), len(cells))
    return [str(cell) for cell in cells[:count]]


def rotated(sequence: Sequence[str], round_id: int) -> list[str]:
    """Return a list whose first `round_id` entries have moved to its end."""
    return [*sequence[round_id:], *sequence[:round_id]]


def asked_in(row: Row) -> tuple[int, int]:
    """Key of an answer: question and round.

    Raises:
        InputError: they are no numbers.
    """
    try:
        return int(row["question_id"]), int(row.get("round_id", 0))
    except (TypeError, ValueError) as error:
        raise InputError(f"{row['question_id']!r} is no MMBench question; give answers to MMBench") from error


def _cells(writer: Callable[[Any], Any], row: Sequence[Any]) -> list[Any]:
    """Make cells that stay text, formulas included, and hold no character that xlsx cannot."""
    cells = [writer(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "", c) if isinstance(c, str) else c) for c in row]
    for cell in cells:
        if isinstance(cell.value, str):
            cell.data_type = "s"
    return cells


def export_table(rows: Sequence[Row], table: Path, file: Path, source: str) -> list[Path]:
    """Copy a table without pictures and hints, with the answers of the first round in column `prediction`.

    Differs from upstream in: columns that a release of the table lacks are not missed, and of an answers file with all
    rounds the unrotated one is submitted, where upstream's last row wins.

    Raises:
        InputError: openpyxl is not installed, or the table cannot be read.
    """
    try:
        from openpyxl import Workbook
        from openpyxl.cell import WriteOnlyCell
    except ImportError as error:
        raise InputError(
            "writing xlsx needs openpyxl, which is not installed; pip install 'globalcom2[eval]'"
        ) from error
    answers, _ = latest(rows, asked_in)
    lines = list(_submitted(table, source, answers))  # all of them, as a book that is begun must be saved
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    for line in lines:
        sheet.append(_cells(lambda value: WriteOnlyCell(sheet, value), line))
    written = io.BytesIO()  # an archive that cannot be closed complains of it once more when it is collected
    book.save(written)
    write_whole(file, written.getvalue())
    return [file]


def _submitted(table: Path, source: str, answers: Mapping[tuple[int, int], Row]) -> Iterator[list[Any]]:
    """Return the head of the server's table, then its rows."""
    names: list[str] = []
    for row in read_table(table, source):
        kept = {name: cell for name, cell in row.items() if name not in NOT_SUBMITTED}
        if not names:
            names = list(kept)
            names.insert(PREDICTION_COLUMN, "prediction")
            yield names
        index = int(row["index"])
        answer = answers.get((index, 0))
        values: dict[str, Any] = {name: None if is_none(cell) else cell for name, cell in kept.items()}
        values |= {"index": index, "prediction": str(answer["text"]) if answer else None}
        yield [values[name] for name in names]
