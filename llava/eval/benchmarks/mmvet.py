"""MM-Vet (arXiv 2308.02490): free answers, graded by GPT-4 elsewhere.

Data of one's own may carry `mentions.json` instead: question id -> things an answer must mention, each a list of words.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.benchmarks._common import (
    JsonlBenchmark,
    export_path,
    gaps,
    latest,
    mean,
    official,
    read_json,
    server_result,
    write_json,
)
from llava.eval.benchmarks.base import Result, Row
from llava.schema import TEXT, Every, Listed

MENTIONS = "mentions.json"
LABELS = Every(Listed(Listed(TEXT)))


def export_answers(rows: Sequence[Row], file: Path) -> list[Path]:
    """Write the `{"v1_<id>": text}` that the grader takes."""
    answers, _ = latest(rows)
    return write_json(file, {f"v1_{key}": str(row["text"]) for key, row in answers.items()}, indent=2)


def mentioned(text: str, things: Sequence[Sequence[str]]) -> list[bool]:
    """Say of every thing whether one part of an answer, between commas, has all its words; a part counts once."""
    parts = text.lower().split(",")
    found = []
    for words in things:
        part = next((p for p in parts if all(re.search(rf"\b{re.escape(w.lower())}\b", p) for w in words)), None)
        found.append(part is not None)
        if part is not None:
            parts.remove(part)
    return found


class MMVet(JsonlBenchmark):
    """Open questions that need several abilities at once.

    The grader gets the answers there are; with `mentions.json`, a question without an answer, or whose row reports an
    error, is left out and counted.
    """

    name = "mmvet"
    folder = "mm-vet"
    question_file = "llava-mm-vet.jsonl"
    image_folder = "images"
    source = "eval.zip of LLaVA (questions) and github.com/yuweihao/MM-Vet, mm-vet.zip (pictures)"
    contents = {question_file: "218 questions", image_folder: "200 pictures"}
    max_new_tokens = 1024

    def score(self, rows: Sequence[Row], data: Path) -> Result:
        """Count the answers, as the number is the grader's; with `mentions.json`, the share of things mentioned."""
        answers, notes = latest(rows)
        if (data / MENTIONS).exists():
            return self._mentioned(answers, data / MENTIONS, notes)
        return server_result(self, len(answers), notes, "the MM-Vet evaluator (a GPT-4 grader)")

    def _mentioned(self, answers: Mapping[Any, Row], file: Path, notes: list[str]) -> Result:
        with official(file, "whoever made these data"):
            wanted = {str(key): things for key, things in read_json(file, LABELS).items()}
        known = {key: str(row["text"]) for key, row in answers.items() if str(key) in wanted}
        scored = {key: 100 * mean(mentioned(text, wanted[str(key)])) for key, text in known.items()}
        return Result(
            benchmark=self.name,
            metrics={"mentioned": mean(scored.values())},
            headline="mentioned",
            n=len(scored),
            notes=(*notes, *gaps(len(wanted), len(scored), len(answers) - len(scored), notes)),
            per_question=scored,
        )

    def export(self, rows: Sequence[Row], data: Path, output: Path) -> list[Path]:
        """Write the grader's file."""
        return export_answers(rows, export_path(output, "mm-vet.json"))
