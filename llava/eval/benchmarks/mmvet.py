"""MM-Vet (arXiv 2308.02490): free answers, graded by GPT-4 elsewhere."""

from collections.abc import Sequence
from pathlib import Path

from llava.eval.benchmarks._common import JsonlBenchmark, export_path, latest, server_result, write_json
from llava.eval.benchmarks.base import Result, Row


def export_answers(rows: Sequence[Row], file: Path) -> list[Path]:
    """Write the `{"v1_<id>": text}` that the grader takes."""
    answers, _ = latest(rows)
    return write_json(file, {f"v1_{key}": str(row["text"]) for key, row in answers.items()}, indent=2)


class MMVet(JsonlBenchmark):
    """Open questions that need several abilities at once."""

    name = "mmvet"
    folder = "mm-vet"
    question_file = "llava-mm-vet.jsonl"
    image_folder = "images"
    source = "eval.zip of LLaVA (questions) and github.com/yuweihao/MM-Vet, mm-vet.zip (pictures)"
    contents = {question_file: "218 questions", image_folder: "200 pictures"}
    max_new_tokens = 1024

    def score(self, rows: Sequence[Row], data: Path) -> Result:
        """Count the answers; the number is the grader's."""
        answers, notes = latest(rows)
        return server_result(self, len(answers), notes, "the MM-Vet evaluator (a GPT-4 grader)")

    def export(self, rows: Sequence[Row], data: Path, output: Path) -> list[Path]:
        """Write the grader's file."""
        return export_answers(rows, export_path(output, "mm-vet.json"))
