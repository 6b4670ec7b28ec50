"""TextVQA (arXiv 1904.08920), validation: reading in pictures, scored against ten people.

The question file hands the model OCR tokens; `ocr=False` asks without them. The two are different benchmarks (61.3 and
64.9 for the same LLaVA-NeXT 7B), so a result says which it is.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava.constants import InputError
from llava.eval.benchmarks._common import JsonlBenchmark, gaps, latest, mean, official, read_json, reports_error
from llava.eval.benchmarks._vqa import vqa_accuracy
from llava.eval.benchmarks.base import Question, Result, Row
from llava.schema import ID, TEXT, Listed

OCR = "Reference OCR token: "
OLD_OCR = "OCR tokens: "
OLD_QUESTION = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


LABELS = {"data": Listed({"image_id": ID, "question": TEXT, "answers": Listed(TEXT)})}


def original_question(prompt: str) -> str:
    """Recover the data set's question, in lower case, from what was asked.

    Raises:
        InputError: the prompt has none of the three known forms.
    """
    lines = prompt.split("\n")
    if prompt.startswith(OLD_OCR) and (found := OLD_QUESTION.search(prompt)):
        return found[1].lower()
    if len(lines) == 3 and OCR in prompt:
        return lines[1 if prompt.startswith(OCR.rstrip()) else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise InputError(
        f"no TextVQA question can be told from the prompt {prompt!r}; give answers to {TextVQA.question_file}"
    )


def without_ocr(text: str) -> str:
    """Drop the lines that hand OCR tokens to the model."""
    return "\n".join(line for line in text.split("\n") if not line.startswith(OCR.rstrip()))


class TextVQA(JsonlBenchmark):
    """Questions whose answer is written in the picture; the questions of a picture share its id.

    A question without an answer, or whose row reports an error, is left out and counted.
    """

    name = "textvqa"
    folder = "textvqa"
    question_file = "llava_textvqa_val_v051_ocr.jsonl"
    image_folder = "train_images"
    labels = ("TextVQA_0.5.1_val.json",)
    source = "eval.zip of LLaVA (questions) and textvqa.org/dataset (train_val_images.zip, TextVQA_0.5.1_val.json)"
    contents = {
        question_file: "5000 questions with OCR tokens",
        image_folder: "OpenImages pictures, those of val among them",
        "TextVQA_0.5.1_val.json": "5000 questions with ten answers each",
    }

    def questions(self, file: Path, **options: Any) -> Iterator[Question]:
        """Read the question file; `ocr=False` drops its line of OCR tokens."""
        for question in super().questions(file):
            yield question if options.get("ocr", True) else replace(question, text=without_ocr(question.text))

    def score(self, rows: Sequence[Row], data: Path) -> Result:
        """Score against the ten people of the annotations beside the questions."""
        return score_against(rows, data / self.labels[0])


def score_against(rows: Sequence[Row], file: Path) -> Result:
    """Score answers against an annotation file, joined on (image id, question).

    Raises:
        InputError: the file cannot be read, or a prompt is no TextVQA prompt.
    """
    with official(file, TextVQA.source):
        entries = read_json(file, LABELS)["data"]
        labels = {(entry["image_id"], entry["question"].lower()): entry["answers"] for entry in entries}
        copies = Counter((entry["image_id"], entry["question"].lower()) for entry in entries)
    answers, notes = latest(rows, _each_occurrence(copies))
    scored = {}
    for (image, question, occurrence), row in answers.items():
        if (image, question) in labels:
            humans = labels[image, question]
            scored[image, question, occurrence] = 100 * vqa_accuracy(str(row["text"]), humans)
    notes += [_prompt_variant(answers.values()), *gaps(len(entries), len(scored), len(answers) - len(scored), notes)]
    accuracy = mean(scored.values())
    return Result(
        benchmark=TextVQA.name,
        metrics={"accuracy": accuracy},
        headline="accuracy",
        n=len(scored),
        notes=tuple(notes),
        per_question=scored,
    )


def _each_occurrence(copies: Mapping[Any, int]) -> Callable[[Row], Any]:
    """Return a key that tells apart equal questions about one picture: two people may have asked the same.

    Args:
        copies: (image id, question) -> how many such questions there are; rows beyond repeat them in turn.
    """
    seen: Counter[Any] = Counter()

    def key(row: Row) -> Any:
        prompt = row.get("prompt") or ""
        try:
            name = row["question_id"], original_question(prompt)
        except InputError:
            if not reports_error(row):  # what could not be asked may not be a question
                raise
            name = row["question_id"], prompt
        seen[name] += 1
        return (*name, (seen[name] - 1) % copies[name] if copies.get(name) else seen[name])

    return key


def _prompt_variant(rows: Iterable[Row]) -> str:
    """Say whether the model was handed OCR tokens."""
    prompts = [row["prompt"] for row in rows]
    handed = [OCR in prompt or prompt.startswith(OLD_OCR) for prompt in prompts]
    if all(handed):
        return "asked with the OCR tokens of the question file"
    if not any(handed):
        return "asked without OCR tokens; compare with numbers of that kind only"
    return (
        f"{sum(handed)} of {len(handed)} questions were asked with OCR tokens, the others without: two runs are mixed"
    )
