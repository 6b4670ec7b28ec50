"""ScienceQA (arXiv 2209.09513), test: school questions with choices, half of them about a picture.

Papers that print "SQA" mean the accuracy on the questions with a picture (2017 of 4241), which is the headline here.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.eval.benchmarks._common import gaps, latest, make_questions, mean, official, read_json
from llava.eval.benchmarks.base import LETTER, Benchmark, Question, Result, Row
from llava.schema import ANYTHING, ID, NAME_OR_NONE, TEXT, WHOLE, Every, Listed

IMAGE = "<image>"
ENTRY = {"id": ID, "conversations": Listed({"value": TEXT}, least=1), "image?": NAME_OR_NONE}
"""Layout of an entry of LLaVA's list."""
PROBLEM = {"answer": WHOLE, "choices": Listed(TEXT)}
"""Layout of ScienceQA's account of a problem, as far as scores look at it."""
LETTERS = ("A", "B", "C", "D", "E")
FAILED = "FAILED"
# What upstream records as the prompt of a question without an answer.
UNKNOWN = "Unknown"
# The last dot stands for any character: "The answer is B" alone is not recognised.
STATED = re.compile(r"The answer is ([A-Z]).")


def parse(text: str, letters: Sequence[str] = LETTERS) -> str:
    """Read the letter an answer chooses; `FAILED` where none can be told."""
    if text in letters:
        return text
    if len(text) >= 3 and text[0] in letters and text[1:3] == ". ":
        return text[0]
    stated = STATED.findall(text)
    return str(stated[0]) if len(stated) == 1 else FAILED


class Verdict(NamedTuple):
    """One question of the split, judged."""

    question_id: str
    parsed: str
    predicted: int
    """Number of the chosen choice; -1: none of them."""
    answer: int
    text: str
    prompt: str

    @property
    def right(self) -> bool:
        """Whether the right choice was chosen."""
        return self.predicted == self.answer

    @property
    def multimodal(self) -> bool:
        """Whether the question was asked about a picture; a missing answer was not."""
        return IMAGE in self.prompt


def judge(
    answers: Mapping[Any, Row], base_dir: Path, split: str = "test", letters: Sequence[str] = LETTERS
) -> list[Verdict]:
    """Judge every question of a split, a missing answer as `FAILED`.

    Args:
        answers: question id -> row.
        base_dir: folder of `problems.json` and `pid_splits.json`.
        split: key of the latter.
        letters: names of the choices.

    Raises:
        InputError: a label file is missing, or not in the official layout.
    """
    splits, file = base_dir / "pid_splits.json", base_dir / "problems.json"
    with official(splits, ScienceQA.source):
        wanted = read_split(splits, split)
    with official(file, ScienceQA.source):
        problems = read_problems(file, wanted, letters)
    by_text = {str(key): row for key, row in answers.items()}
    return [_verdict(key, problems[key], by_text.get(key), letters) for key in wanted]


def read_split(file: Path, split: str) -> list[str]:
    """Return the ids of a split's problems; to be called within `official`.

    Raises:
        ValueError: there is no such split, or it names a problem twice.
    """
    splits = read_json(file, Every(Listed(TEXT)))
    if split not in splits:
        raise ValueError(f"there is no split {split!r} among {', '.join(splits)}")
    repeated = [key for key, times in Counter(splits[split]).items() if times > 1]
    if repeated:
        raise ValueError(f"split {split!r} names problem {repeated[0]!r} twice")
    return list(splits[split])


def read_problems(
    file: Path, wanted: Iterable[str], letters: Sequence[str] = LETTERS, layout: Mapping[str, Any] = PROBLEM
) -> dict[str, Any]:
    """Return all problems by id; to be called within `official`.

    Raises:
        ValueError: one that is wanted is not there, or its answer is none of its choices that have a letter.
    """
    problems: dict[str, Any] = read_json(file, Every(layout))
    for key in wanted:
        if key not in problems:
            raise ValueError(f"there is no problem {key!r}")
        offered = min(len(problems[key]["choices"]), len(letters))
        if not 0 <= problems[key]["answer"] < offered:
            raise ValueError(f"the answer of problem {key!r} is {problems[key]['answer']}, of {offered} choices")
    return problems


def _verdict(key: str, problem: Mapping[str, Any], row: Row | None, letters: Sequence[str]) -> Verdict:
    text, prompt = (str(row["text"]), row.get("prompt") or "") if row else (FAILED, UNKNOWN)
    parsed = parse(text, letters)
    offered = letters[: len(problem["choices"])]
    predicted = offered.index(parsed) if parsed in offered else -1
    return Verdict(key, parsed, predicted, problem["answer"], text, prompt)


def coverage(verdicts: Sequence[Verdict]) -> list[str]:
    """Say how many questions have no answer, and how many answers name no choice."""
    notes = []
    missing = sum(verdict.prompt == UNKNOWN for verdict in verdicts)
    if missing:
        notes.append(
            f"{missing} of {len(verdicts)} questions have no answer and count as wrong questions without a picture"
        )
    failed = sum(verdict.parsed == FAILED for verdict in verdicts) - missing
    if failed:
        notes.append(f"{failed} answers name no choice and count as wrong")
    return notes


class ScienceQA(Benchmark):
    """Multiple-choice questions from school science.

    A question without an answer, or whose row reports an error, is left out of both accuracies and counted. In
    upstream's script (`llava.eval.eval_science_qa`) it is wrong in the accuracy over all.
    """

    name = "scienceqa"
    folder = "scienceqa"
    question_file = "llava_test_CQM-A.json"
    image_folder = "images/test"
    labels = ("problems.json", "pid_splits.json")
    source = "eval.zip of LLaVA (questions) and github.com/lupantech/ScienceQA (problems, splits, images/test)"
    contents = {
        question_file: "4241 questions, 2017 with a picture",
        image_folder: "2017 pictures, <question>/image.png",
        "problems.json": "21208 problems with their answers",
        "pid_splits.json": "which problems are in the test split",
    }
    max_new_tokens = 1024

    def questions(self, file: Path, **options: Any) -> Iterator[Question]:
        """Read LLaVA's list of conversations; `single_pred_prompt` appends the request for a letter when asking."""
        suffix = LETTER if options.get("single_pred_prompt") else ""
        with official(file, self.source):
            entries = read_json(file, Listed(ANYTHING))

        def make(entry: Row) -> Question:
            text = entry["conversations"][0]["value"].replace(IMAGE, "").strip()
            image = entry.get("image") or None
            prompt = f"{IMAGE}\n{text}" if image else text
            category = "with a picture" if image else "without"
            return Question(id=entry["id"], text=text + suffix, image=image, prompt=prompt, category=category)

        yield from make_questions(file, entries, ENTRY, {"conversations": [{"value": ""}]}, make)

    def score(self, rows: Sequence[Row], data: Path) -> Result:
        """Return the accuracy on questions with a picture and on all, over those that have an answer."""
        answers, notes = latest(rows)
        judged = judge(answers, data)
        verdicts = [verdict for verdict in judged if verdict.prompt != UNKNOWN]
        values = {verdict.question_id: 100.0 * verdict.right for verdict in verdicts}
        shown = {verdict.question_id: values[verdict.question_id] for verdict in verdicts if verdict.multimodal}
        notes += [*gaps(len(judged), len(verdicts), len(answers) - len(verdicts), notes), *coverage(verdicts)]
        if not shown:
            notes.append("no answer is to a question with a picture: there is no img_accuracy")
        notes.append("papers quote img_accuracy, over the questions with a picture")
        return Result(
            benchmark=self.name,
            metrics=({"img_accuracy": mean(shown.values())} if shown else {}) | {"accuracy": mean(values.values())},
            headline="img_accuracy",
            n=len(shown),
            notes=tuple(notes),
            per_question=shown,
        )
