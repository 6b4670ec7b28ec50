"""MMBench (arXiv 2307.06281) in either language: a table of choices with the pictures inside.

Differs from the official evaluation in: the chosen letter is read from an answer by rule, where MMBench's server asks a
chat model when its own rules fail. Answers that name no letter are counted.
"""

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.benchmarks._common import export_path, gaps, latest, mean, server_result, with_groups
from llava.eval.benchmarks._mmbench_table import (
    LETTERS,
    Shown,
    asked_in,
    choices,
    export_table,
    is_none,
    pictures,
    read_table,
    rotated,
)
from llava.eval.benchmarks.base import LETTER, Benchmark, Question, Result, Row

LETTER_CN = "\n请直接回答选项字母。"
# The official table repeats a question with rotated options under its index plus a multiple of this.
ROTATION = 1_000_000
OPENING = re.compile(r"\W*([A-D])(?:[.):,]|\s*$)")
# A letter on its own; "A" before a small word is the article, but in "A or B".
ALONE = re.compile(r"(?<![A-Za-z])(?:([B-D])(?![A-Za-z'])|(A)(?![A-Za-z']|\s+(?!or\b|and\b)[a-z]))")


def choice(text: str, offered: Mapping[str, str]) -> str | None:
    """Tell which letter an answer chooses.

    First a letter at the beginning (`B`, `(B)`, `B. cat`), then the only letter that stands alone, then the only option
    whose text the answer contains.

    Args:
        text: the answer.
        offered: letter -> option, as the model saw them.
    """
    opening = OPENING.match(text)
    if opening and opening[1] in offered:
        return opening[1]
    alone = {first or second for first, second in ALONE.findall(text)} & offered.keys()
    if len(alone) == 1:
        return str(alone.pop())
    quoted = [letter for letter, option in offered.items() if option.strip().lower() in text.lower()]
    return quoted[0] if len(quoted) == 1 else None


class MMBenchBase(Benchmark):
    """MMBench dev: right is a question that is answered right in all of its rotations (circular evaluation).

    A rotation is a row of the table with the question's index plus a multiple of a million, or a round of
    `all_rounds`. A question of which a rotation has no answer, or a row that reports an error, is left out and counted.
    """

    lang: ClassVar[str] = "en"
    image_folder = ""
    source = "mmbench.opencompass.org.cn"
    max_new_tokens = 1024

    def missing(self, data: Path) -> list[Path]:
        """Return the table if it is missing; the pictures are inside."""
        file = data / self.question_file
        return [] if file.exists() else [file]

    def questions(self, file: Path, **options: Any) -> Iterator[Question]:
        """Read the table.

        Args:
            file: the table.
            **options: `single_pred_prompt` appends the request for a letter to what is asked, in `lang` (`en` or `cn`);
                `all_rounds` asks as many times as there are options, which rotate.
        """
        request = LETTER_CN if options.get("lang", self.lang) == "cn" else LETTER
        suffix = request if options.get("single_pred_prompt") else ""
        rows = list(read_table(file, self.source))
        shown = pictures(rows)
        for row in rows:
            yield from _ask(row, shown[int(row["index"])], suffix, bool(options.get("all_rounds")))

    def unit(self, question: Question) -> int:
        """Keep the rotations of a question together, all of which it takes to be right."""
        return int(question.id) % ROTATION

    def score(self, rows: Sequence[Row], data: Path) -> Result:
        """Return circular and vanilla accuracy, and the circular one by category, from the table's answer column.

        Vanilla accuracy is over the answered first rotations. Without a question that has all its answers there is no
        circular accuracy.
        """
        answers, notes = latest(rows, asked_in)
        table = {int(row["index"]): row for row in self._light(data)}
        labelled = {index for index, row in table.items() if row.get("answer") in [*LETTERS]}
        if not any(row.get("answer") for row in table.values()):
            return server_result(self, len(answers), notes, self.source)
        all_rounds = any(asked_in(row)[1] for row in rows)
        members = _rotations(table, all_rounds)
        wanted = {key for keys in members.values() for key in keys if key[0] in labelled}
        said = {key: _said(row, table[key[0]], key[1]) for key, row in answers.items() if key in wanted}
        right = {key: 100.0 * (letter == table[key[0]]["answer"]) for key, letter in said.items()}
        circular = {base: min(right[key] for key in keys) for base, keys in members.items() if right.keys() >= keys}
        once = [value for (index, round_id), value in right.items() if index < ROTATION and round_id == 0]
        vanilla = {"vanilla": mean(once)} if once else {}
        notes += gaps(len(wanted), len(said), len(answers) - len(said), notes)
        begun = {index % ROTATION for index, _ in said}
        notes += _notes(said.values(), len(begun) - len(circular), max(len(members[base]) for base in begun))
        firsts = {base: table[min(members[base])[0]] for base in circular}
        groups = {base: [row["category"]] for base, row in firsts.items() if row.get("category")}
        overall = {"circular": mean(circular.values())} if circular else {}
        return Result(
            benchmark=self.name,
            metrics=with_groups({**overall, **vanilla}, circular, groups),
            headline="circular",
            n=len(circular),
            notes=tuple(notes),
            per_question=circular,
        )

    def _light(self, data: Path) -> Iterator[dict[str, str]]:
        """Read the table without its pictures."""
        for row in read_table(data / self.question_file, self.source):
            yield {name: cell for name, cell in row.items() if name != "image"}

    def export(self, rows: Sequence[Row], data: Path, output: Path) -> list[Path]:
        """Write the server's table with our predictions as xlsx.

        Raises:
            InputError: openpyxl is not installed.
        """
        return export_table(rows, data / self.question_file, export_path(output, f"{self.name}.xlsx"), self.source)


def _rotations(table: Mapping[int, Mapping[str, str]], all_rounds: bool) -> dict[int, set[tuple[int, int]]]:
    """Return what must be answered for a question to be right: base index -> (index, round) of all its rotations."""
    members: dict[int, set[tuple[int, int]]] = {}
    for index, row in table.items():
        rounds = max(1, len(choices(row))) if all_rounds else 1
        members.setdefault(index % ROTATION, set()).update((index, round_id) for round_id in range(rounds))
    return members


def _notes(said: Collection[str | None], incomplete: int, most: int) -> list[str]:
    """Say what a reader must know.

    Args:
        said: the letters read.
        incomplete: questions with an answer to some of their rotations.
        most: rotations of a question at most.
    """
    notes = []
    if incomplete:
        notes.append(
            f"{incomplete} questions are left out of circular accuracy because a rotation of theirs has no answer"
        )
    if most == 1:
        notes.append("every question was asked once: circular equals vanilla accuracy")
    unread = sum(letter is None for letter in said)
    if unread:
        notes.append(
            f"{unread} answers name no option and count as wrong; letters are read by rule, not by a chat model"
        )
    return notes


def _ask(row: Mapping[str, str], picture: Shown, suffix: str, all_rounds: bool) -> Iterator[Question]:
    offered = choices(row)
    stem = row["question"] if is_none(row.get("hint")) else f"{row['hint']}\n{row['question']}"
    # Rotations of a question carry the same picture; named by content, it is encoded once.
    data, image = picture.data, None
    if data is not None:
        image = hashlib.sha1(data.encode(), usedforsecurity=False).hexdigest()[:20] + ".jpg"
    for round_id in range(len(offered) if all_rounds else 1):
        shown = rotated(offered, round_id)
        text = "\n".join([stem, *(f"{letter}. {option}" for letter, option in zip(LETTERS, shown, strict=False))])
        letters = rotated(LETTERS[: len(offered)], round_id)
        extra = {"round_id": round_id, "options": shown, "option_char": letters}
        yield Question(
            id=int(row["index"]),
            text=text + suffix,
            image=image,
            data=data,
            prompt=text,
            extra=extra,
            category=row.get("category") or "",
            error=picture.error,
        )


def _said(answer: Row, row: Mapping[str, str], round_id: int) -> str | None:
    """Return the table's letter of the option that an answer chooses."""
    offered = choices(row)
    shown = dict(zip(LETTERS, rotated(offered, round_id), strict=False))
    letters = dict(zip(LETTERS, rotated(LETTERS[: len(offered)], round_id), strict=False))
    chosen = choice(str(answer["text"]), shown)
    return None if chosen is None else letters[chosen]
