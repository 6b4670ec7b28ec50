"""GQA (arXiv 1902.09506), testdev_balanced: one-word answers, equal to the label or wrong."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.constants import InputError
from llava.eval.benchmarks._common import (
    JsonlBenchmark,
    export_path,
    gaps,
    latest,
    mean,
    official,
    read_json,
    with_groups,
    write_json,
)
from llava.eval.benchmarks.base import Result, Row
from llava.schema import FLAG, TEXT, Every

LABELS = Every({"answer": TEXT, "types": {"structural": TEXT}, "isBalanced?": FLAG})


class Label(NamedTuple):
    """What GQA says about one question."""

    answer: str
    structure: str
    """Structural type: `query`, `verify`, `choose`, `logical` or `compare`."""


def prediction(text: str) -> str:
    """Return what is compared with the label: lower case, without full stops at the end."""
    return text.rstrip(".").lower()


def export_predictions(rows: Sequence[Row], file: Path) -> list[Path]:
    """Write the `[{questionId, prediction}]` that GQA's own `eval.py` takes."""
    answers, _ = latest(rows)
    listed = [{"questionId": key, "prediction": prediction(str(row["text"]))} for key, row in answers.items()]
    return write_json(file, listed)


class GQA(JsonlBenchmark):
    """Compositional questions about Visual Genome pictures.

    A question without an answer, or whose row reports an error, is left out and counted.
    """

    name = "gqa"
    folder = "gqa"
    question_file = "llava_gqa_testdev_balanced.jsonl"
    image_folder = "data/images"
    labels = ("data/testdev_balanced_questions.json",)
    source = "eval.zip of LLaVA (questions) and cs.stanford.edu/people/dorarad/gqa/download.html (pictures, labels)"
    contents = {
        question_file: "12578 questions",
        image_folder: "GQA's pictures",
        "data/testdev_balanced_questions.json": "12578 answers, out of questions1.2.zip",
    }

    def score(self, rows: Sequence[Row], data: Path) -> Result:
        """Compare with the label letter by letter; also apart for binary and open questions and structural types.

        Differs from GQA's script in: questions without an answer are counted and left out, where it stops.
        """
        labels = self._labels(data)
        answers, notes = latest(rows)
        scored = {
            key: 100.0 * (prediction(str(row["text"])) == labels[str(key)].answer)
            for key, row in answers.items()
            if str(key) in labels
        }
        notes += gaps(len(labels), len(scored), len(answers) - len(scored), notes)
        groups = {key: _groups(labels[str(key)]) for key in scored}
        metrics = with_groups({"accuracy": mean(scored.values())}, scored, groups)
        return Result(
            benchmark=self.name,
            metrics=metrics,
            headline="accuracy",
            n=len(scored),
            notes=tuple(notes),
            per_question=scored,
        )

    def _labels(self, data: Path) -> dict[str, Label]:
        """Read the balanced questions' labels, from `data/` or the folder of GQA's archive inside it."""
        file = self._label_file(data)
        with official(file, self.source):
            questions: Mapping[str, Any] = read_json(file, LABELS)
            balanced = {key: entry for key, entry in questions.items() if entry.get("isBalanced") is not False}
            labels = {key: Label(entry["answer"], entry["types"]["structural"]) for key, entry in balanced.items()}
        if not labels:
            raise InputError(f"{str(file)!r} holds no balanced questions; get it from {self.source}")
        return labels

    def _label_file(self, data: Path) -> Path:
        file = data / self.labels[0]
        inside = file.parent / "questions1.2" / file.name
        return inside if inside.exists() and not file.exists() else file

    def lacking(self, data: Path) -> list[str]:
        """Return what is not there; the labels may be in the folder of GQA's archive."""
        return [name for name in super().lacking(data) if name != self.labels[0] or not self._label_file(data).exists()]

    def export(self, rows: Sequence[Row], data: Path, output: Path) -> list[Path]:
        """Write the predictions file of GQA's own script."""
        return export_predictions(rows, export_path(output, "testdev_balanced_predictions.json"))


def _groups(label: Label) -> tuple[str, str]:
    return ("open" if label.structure == "query" else "binary"), f"structural_{label.structure}"
