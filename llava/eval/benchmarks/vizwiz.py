"""VizWiz (arXiv 1802.08218): questions of blind people; test scored by EvalAI, val here."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.constants import InputError
from llava.eval.benchmarks._common import (
    JsonlBenchmark,
    export_path,
    latest,
    official,
    read_json,
    server_result,
    unambiguous,
    write_json,
)
from llava.eval.benchmarks._vqa import ANNOTATION, Label, normalise, read_label, vqa_result
from llava.eval.benchmarks.base import Question, Result, Row
from llava.schema import TEXT, Listed

VAL_QUESTIONS = "llava_val.jsonl"
LABELS = Listed({"image": TEXT, "question": TEXT, **ANNOTATION})
Labels = Mapping[str, Mapping[str, Label]]
"""Picture -> question -> label."""


class _Asked(NamedTuple):
    image: str
    question: str
    alone: bool
    """It is the only question of its file about the picture."""


class VizWiz(JsonlBenchmark):
    """Open questions about pictures taken by blind people.

    Scored here, a question without an answer, or whose row reports an error, is left out and counted.
    """

    name = "vizwiz"
    folder = "vizwiz"
    question_file = "llava_test.jsonl"
    image_folder = "test"
    labels = ("val.json",)
    source = "eval.zip of LLaVA (questions) and vizwiz.org/tasks-and-datasets/vqa (pictures, Annotations.zip)"
    contents = {question_file: "8000 questions", image_folder: "8000 pictures"}
    optional = {VAL_QUESTIONS: "the val questions in the same format", "val.json": "to score answers to val here"}

    def score(self, rows: Sequence[Row], data: Path) -> Result:
        """Score answers to the questions of val.json; answers to the test set get no number.

        The answers' question file, `llava_val.jsonl` or `llava_test.jsonl`, says which picture they are about.
        """
        answers, notes = latest(rows)
        labels = self._labels(data / self.labels[0])
        for name in (VAL_QUESTIONS, self.question_file):
            asked = self._asked(data / name, answers) if labels else {}
            found = {key: label for key, entry in asked.items() if (label := _label(labels, entry)) is not None}
            if found:
                return self._result(answers, found, sum(map(len, labels.values())), notes)
        return server_result(self, len(answers), notes, "EvalAI, VizWiz VQA (test-dev)")

    def _result(
        self, answers: Mapping[Any, Row], found: Mapping[Any, Label], labelled: int, notes: list[str]
    ) -> Result:
        texts = {key: str(row["text"]) for key, row in answers.items()}
        # Labels of unasked questions are counted only, so any key will do for them.
        rest = {("unasked", number): Label([], "") for number in range(labelled - len(found))}
        return vqa_result(self.name, texts, {**found, **rest}, notes)

    def _labels(self, file: Path) -> Labels:
        labels: dict[str, dict[str, Label]] = {}
        if file.exists():
            with official(file, self.source):
                entries = read_json(file, LABELS)
                found = unambiguous(((e["image"], e["question"].strip()), read_label(e)) for e in entries)
            for (image, question), label in found.items():
                labels.setdefault(image, {})[question] = label
        return labels

    def _asked(self, file: Path, answers: Mapping[Any, Row]) -> dict[Any, _Asked]:
        """Find the answers' questions in a question file; an answer with another prompt is not to that file."""
        questions = list(self.questions(file)) if file.exists() else []
        number = Counter(q.image for q in questions)
        known = (q for q in questions if q.id in answers and answers[q.id].get("prompt") == q.text)
        return {q.id: _asked(q, number[q.image] == 1) for q in known}

    def export(self, rows: Sequence[Row], data: Path, output: Path) -> list[Path]:
        """Write EvalAI's `[{image, answer}]`.

        Raises:
            InputError: a question of the test set has no answer.
        """
        return export_test(rows, data / self.question_file, export_path(output, "vizwiz_test.json"))


def _asked(question: Question, alone: bool) -> _Asked:
    return _Asked(question.image or "", question.text.split("\n")[0].strip(), alone)


def _label(labels: Labels, asked: _Asked) -> Label | None:
    """Return a picture's label; its question decides only where there are several."""
    found = labels.get(asked.image, {})
    return next(iter(found.values())) if len(found) == 1 and asked.alone else found.get(asked.question)


def export_test(rows: Sequence[Row], questions: Path, file: Path) -> list[Path]:
    """Write normalised answers to all questions of a file, in its order.

    Raises:
        InputError: one has no answer, which EvalAI would refuse; or the file of questions cannot be read.
    """
    answers, _ = latest(rows)
    asked = list(VizWiz().questions(questions))
    missing = [question.id for question in asked if question.id not in answers]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(asked)} questions have no answer ({missing[0]!r}); finish the run first"
        )
    texts = {key: normalise(str(row["text"])) for key, row in answers.items()}
    return write_json(file, [{"image": question.image, "answer": texts[question.id]} for question in asked])
