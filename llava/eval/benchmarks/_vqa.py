"""EvalAI's answer normaliser and the accuracy over ten human answers, shared by VQAv2, VizWiz and TextVQA.

The normaliser keeps the quirks of the published evaluators, because published numbers contain them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from llava.constants import InputError
from llava.eval.benchmarks._common import gaps, mean, with_groups
from llava.eval.benchmarks.base import Result
from llava.schema import TEXT, Listed

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = {"a", "an", "the"}
# The published pattern is meant to spare decimals, but its look-behind never fires and its flag is read as a count.
FULL_STOP = re.compile(r"\.(?!\d)")
FULL_STOPS_DELETED = 32
HUMANS = 10
AGREEING = 3


@cache
def contractions() -> dict[str, str]:
    """Return the VQA table of contractions written without their apostrophe."""
    file = Path(__file__).parents[1] / "vqa_contractions.json"
    table: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return table


def _strip_punctuation(text: str) -> str:
    """Delete a sign everywhere if it touches a space anywhere in `text`, else put a space in its place."""
    cleaned = text
    for sign in PUNCTUATION:
        touches = f"{sign} " in text or f" {sign}" in text
        cleaned = cleaned.replace(sign, "" if touches else " ")
    return FULL_STOP.sub("", cleaned, count=FULL_STOPS_DELETED)


@lru_cache(maxsize=65536)
def normalise(text: str) -> str:
    """Bring an answer into the form in which EvalAI compares: `"The two, dogs."` -> `"2 dogs"`."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = [NUMBERS.get(word, word) for word in _strip_punctuation(text).split()]
    return " ".join(contractions().get(word, word) for word in words if word not in ARTICLES)


def answer_scores(humans: Sequence[str]) -> dict[str, float]:
    """Return what every distinct (normalised) human answer is worth, in [0, 1].

    Each is compared with the ten sets that leave one person out: min(1, agreeing / 3), averaged.

    Raises:
        InputError: there are not ten human answers.
    """
    if len(humans) != HUMANS:
        raise InputError(f"a question has {len(humans)} human answers instead of {HUMANS}; get the labels anew")
    said = [normalise(human) for human in humans]
    return {answer: mean(_left_out(said, answer)) for answer in said}


def _left_out(said: Sequence[str], answer: str) -> list[float]:
    count = said.count(answer)
    return [min(1.0, (count - (other == answer)) / AGREEING) for other in said]


def vqa_accuracy(prediction: str, humans: Sequence[str]) -> float:
    """Return the VQA accuracy of one prediction, in [0, 1]."""
    return answer_scores(humans).get(normalise(prediction), 0.0)


class Label(NamedTuple):
    """What the annotations say about one question."""

    humans: Sequence[str]
    kind: str
    """Answer type, such as `yes/no`, `number` or `other`."""


ANNOTATION = {"answers": Listed({"answer": TEXT}), "answer_type?": TEXT}
"""Layout of an entry of an annotation file of VQAv2 or VizWiz."""


def read_label(annotation: Mapping[str, Any]) -> Label:
    """Read one entry of an annotation file of VQAv2 or VizWiz."""
    return Label([answer["answer"] for answer in annotation["answers"]], annotation.get("answer_type") or "other")


def vqa_result(name: str, answers: Mapping[Any, str], labels: Mapping[Any, Label], notes: Sequence[str]) -> Result:
    """Score answers against ten human answers each, overall and by answer type.

    Args:
        name: the benchmark's.
        answers: question -> text.
        labels: question -> label, of all questions.
        notes: what is already known.
    """
    scored = {key: 100 * vqa_accuracy(text, labels[key].humans) for key, text in answers.items() if key in labels}
    more = gaps(len(labels), len(scored), len(answers) - len(scored), notes)
    kinds = {key: [labels[key].kind] for key in scored}
    metrics = with_groups({"accuracy": mean(scored.values())}, scored, kinds)
    return Result(
        benchmark=name,
        metrics=metrics,
        headline="accuracy",
        n=len(scored),
        notes=(*notes, *more),
        per_question=scored,
    )
