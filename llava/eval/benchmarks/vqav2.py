"""VQAv2 (arXiv 1612.00837): short answers, scored against ten people; the test sets by EvalAI, val2014 here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from llava.eval.benchmarks.base import Result, Row, read_jsonl
from llava.schema import ID, Listed

FULL_TEST = "llava_vqav2_mscoco_test2015.jsonl"

LABELS = {"annotations": Listed({"question_id": ID, **ANNOTATION})}


class VQAv2(JsonlBenchmark):
    """Open questions about COCO pictures.

    Scored here, a question without an answer, or whose row reports an error, is left out and counted.
    """

    name = "vqav2"
    folder = "vqav2"
    question_file = "llava_vqav2_mscoco_test-dev2015.jsonl"
    image_folder = "test2015"
    labels = ("v2_mscoco_val2014_annotations.json",)
    source = "eval.zip of LLaVA (questions) and visualqa.org/download.html (test2015 pictures, val2014 annotations)"
    contents = {question_file: "107394 questions, those of test-dev2015", image_folder: "COCO test2015 pictures"}
    optional = {
        FULL_TEST: "all test2015 questions, which a submission lists",
        "v2_mscoco_val2014_annotations.json": "to score answers to val2014 here",
    }

    def score(self, rows: Sequence[Row], data: Path) -> Result:
        """Score answers to val2014; answers to a test set get no number, as its labels are EvalAI's."""
        answers, notes = latest(rows)
        labels = self._labels(data / self.labels[0])
        if not labels.keys() & answers.keys():
            return server_result(self, len(answers), notes, "EvalAI, VQA Challenge (test-dev)")
        return vqa_result(self.name, {key: str(row["text"]) for key, row in answers.items()}, labels, notes)

    def _labels(self, file: Path) -> dict[Any, Label]:
        if not file.exists():
            return {}
        with official(file, self.source):
            annotations = read_json(file, LABELS)["annotations"]
            return unambiguous((entry["question_id"], read_label(entry)) for entry in annotations)

    def export(self, rows: Sequence[Row], data: Path, output: Path) -> list[Path]:
        """Write EvalAI's `[{question_id, answer}]` over the full test set, `""` where there is no answer."""
        return export_test(rows, data / FULL_TEST, export_path(output, "vqav2_test2015.json"))


def export_test(rows: Sequence[Row], questions: Path, file: Path) -> list[Path]:
    """Write normalised answers to all questions of a file, in its order.

    Raises:
        InputError: the file of questions cannot be read.
    """
    answers, _ = latest(rows)
    with official(questions, VQAv2.source):
        asked = [row["question_id"] for row in read_jsonl(questions, {"question_id": ID})]
    texts = {key: normalise(str(row["text"])) for key, row in answers.items()}
    return write_json(file, [{"question_id": key, "answer": texts.get(key, "")} for key in asked])
