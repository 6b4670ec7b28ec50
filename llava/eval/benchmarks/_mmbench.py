"""MMBench (arXiv 2307.06281) in either language: a table of choices with the pictures inside.

Differs from the official evaluation in: the chosen letter is read from an answer by rule, where MMBench's server asks a
chat model when its own rules fail. Answers that name no letter are counted.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.benchmarks._common import export_path, gaps, grouped, latest, mean, server_result
from llava.eval.benchmarks._mmbench_table import LETTERS, asked_in, choices, export_table, is_none, read_table, rotated
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
    """MMBench dev: right is a question that is answered right in all of its rotations (circular evaluation)."""

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
        for row in read_table(file, self.source):
            yield from _ask(row, request if options.get("single_pred_prompt") else "", bool(options.get("all_rounds")))

    def unit(self, question: Question) -> int:
        """Keep the rotations of a question together, all of which it takes to be right."""
        return int(question.id) % ROTATION

    def score(self, rows: Sequence[Row], data: Path) -> Result:
        """Return circular and vanilla accuracy, and the circular one by category, from the table's answer column."""
        answers, notes = latest(rows, asked_in)
        table = {int(row["index"]): row for row in self._light(data)}
        if not any(row.get("answer") for row in table.values()):
            return server_result(self, len(answers), notes, self.source)
        known = {key: row for key, row in answers.items() if key[0] in table}
        said = {key: _said(row, table[key[0]], key[1]) for key, row in known.items()}
        right = {key: 100.0 * (letter == table[key[0]]["answer"]) for key, letter in said.items()}
        circular: dict[int, float] = {}
        for (index, _), value in right.items():
            base = index % ROTATION
            circular[base] = min(value, circular.get(base, value))
        once = [value for (index, round_id), value in right.items() if index < ROTATION and round_id == 0]
        vanilla = {"vanilla": mean(once)} if once else {}
        notes += self._notes(said, gaps(len(table), len({key[0] for key in said}), len(answers) - len(known)))
        groups = {index: [table[index]["category"]] for index in circular if "category" in table.get(index, {})}
        return Result(
            benchmark=self.name,
            metrics={"circular": mean(circular.values()), **vanilla, **grouped(circular, groups)},
            headline="circular",
            n=len(circular),
            notes=tuple(notes),
            per_question=circular,
        )

    def _notes(self, said: Mapping[Any, str | None], coverage: Sequence[str]) -> list[str]:
        notes = list(coverage)
        asked = len({(index % ROTATION) for index, _ in said})
        if len(said) == asked:
            notes.append("every question was asked once: circular equals vanilla accuracy")
        unread = sum(letter is None for letter in said.values())
        if unread:
            notes.append(
                f"{unread} answers name no option and count as wrong; letters are read by rule, not by a chat model"
            )
        return notes

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


def _ask(row: Mapping[str, str], suffix: str, all_rounds: bool) -> Iterator[Question]:
    offered = choices(row)
    stem = row["question"] if is_none(row.get("hint")) else f"{row['hint']}\n{row['question']}"
    # Rotations of a question carry the same picture; named by content, it is encoded once.
    image = hashlib.sha1(row["image"].encode(), usedforsecurity=False).hexdigest()[:20] + ".jpg"
    for round_id in range(len(offered) if all_rounds else 1):
        shown = rotated(offered, round_id)
        text = "\n".join([stem, *(f"{letter}. {option}" for letter, option in zip(LETTERS, shown, strict=False))])
        letters = rotated(LETTERS[: len(offered)], round_id)
        extra = {"round_id": round_id, "options": shown, "option_char": letters}
        yield Question(
            id=int(row["index"]),
            text=text + suffix,
            image=image,
            data=row["image"],
            prompt=text,
            extra=extra,
            category=row.get("category", ""),
        )


def _said(answer: Row, row: Mapping[str, str], round_id: int) -> str | None:
    """Return the table's letter of the option that an answer chooses."""
    offered = choices(row)
    shown = dict(zip(LETTERS, rotated(offered, round_id), strict=False))
    letters = dict(zip(LETTERS, rotated(LETTERS[: len(offered)], round_id), strict=False))
    chosen = choice(str(answer["text"]), shown)
    return None if chosen is None else letters[chosen]
