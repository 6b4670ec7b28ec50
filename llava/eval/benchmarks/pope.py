"""POPE (arXiv 2305.10355): does the model see things that are not there? Yes/no questions in three categories.

Differs from the released code in: labels are found by (picture, question), where it pairs line by line and a label file
of another revision (POPE's HEAD has 3000 random questions, LLaVA's question file 2910) halves F1 in silence.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.constants import InputError
from llava.eval.benchmarks._common import JsonlBenchmark, gaps, latest, linearised, mean, official
from llava.eval.benchmarks.base import Result, Row, read_jsonl

REVISION = "e3e3926"
Pair = tuple[str, str]
"""Picture and question."""


class Counts(NamedTuple):
    """Outcomes of yes/no questions; "yes" is the positive. Every ratio is 0 where its denominator is."""

    tp: int = 0
    fp: int = 0
    tn: int = 0
    fn: int = 0

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return (self.tp + self.tn) / max(1, sum(self))

    @property
    def precision(self) -> float:
        """Share of right ones among "yes"."""
        return self.tp / max(1, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """Share found of what is there."""
        return self.tp / max(1, self.tp + self.fn)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.tp / max(1, 2 * self.tp + self.fp + self.fn)

    @property
    def yes(self) -> float:
        """Share of "yes" among the answers."""
        return (self.tp + self.fp) / max(1, sum(self))


class Category(NamedTuple):
    """One category, judged."""

    outcomes: Mapping[Any, Counts]
    """Question id -> its one outcome."""
    questions: int
    """Questions asked in the question file."""
    notes: Sequence[str]

    @property
    def counts(self) -> Counts:
        """All outcomes together."""
        return Counts(*map(sum, zip(*self.outcomes.values(), strict=True)))


def verdict(text: str) -> bool:
    """Read an answer: "no" if a word before the first full stop is No, no or not, else "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"}.intersection(words)


def judge(rows: Sequence[Row], questions: Path, annotations: Path) -> tuple[dict[str, Category], list[str]]:
    """Judge answers category by category, in alphabetical order; categories without answers are left out.

    Args:
        rows: answers.
        questions: the question file, which knows picture and category of an answer.
        annotations: folder of `coco_pope_<category>.json`.

    Raises:
        InputError: a file is missing, or no answer belongs to a label.
    """
    answers, notes = latest(rows)
    asked: dict[str, dict[Any, Pair]] = {}
    with official(questions, POPE.source):
        for row in read_jsonl(questions):
            pair = row["image"], row["text"].split("\n")[0].strip()
            asked.setdefault(row["category"], {})[row["question_id"]] = pair
    answered = {name: pairs for name, pairs in sorted(asked.items()) if pairs.keys() & answers.keys()}
    judged = {n: _category(n, pairs, answers, annotations / f"coco_pope_{n}.json") for n, pairs in answered.items()}
    notes += [note for category in judged.values() for note in category.notes]
    scored = sum(len(category.outcomes) for category in judged.values())
    known = set().union(*asked.values()) if asked else set()
    notes += gaps(sum(map(len, asked.values())), scored, len(answers.keys() - known))
    return {name: category for name, category in judged.items() if category.outcomes}, notes


def _category(name: str, asked: Mapping[Any, Pair], answers: Mapping[Any, Row], file: Path) -> Category:
    if not file.exists():
        raise InputError(f"{str(file)!r} is missing; get it from {POPE.source}")
    with official(file, POPE.source):
        labels = {(row["image"], row["text"].strip()): row["label"] != "no" for row in read_jsonl(file)}
    outcomes = {
        key: _outcome(verdict(str(answers[key]["text"])), labels[pair])
        for key, pair in asked.items()
        if key in answers and pair in labels
    }
    notes = _revision(name, set(asked.values()), labels.keys())
    return Category(outcomes, len(asked), notes)


def _outcome(said: bool, true: bool) -> Counts:
    return Counts(
        tp=int(said and true), fp=int(said and not true), tn=int(not (said or true)), fn=int(true and not said)
    )


def _revision(name: str, asked: set[Pair], labelled: Iterable[Pair]) -> list[str]:
    """Say that questions and labels are not of one revision."""
    pairs = set(labelled)
    if asked == pairs:
        return []
    return [
        f"{name}: labels are of another revision than the questions ({len(asked - pairs)} of {len(asked)} questions"
        f" have no label, {len(pairs - asked)} of {len(pairs)} labels no question); POPE commit {REVISION} matches"
    ]


class POPE(JsonlBenchmark):
    """Object hallucination on COCO pictures; papers quote the mean F1 of the three categories."""

    name = "pope"
    folder = "pope"
    question_file = "llava_pope_test.jsonl"
    image_folder = "val2014"
    labels = ("coco/coco_pope_adversarial.json", "coco/coco_pope_popular.json", "coco/coco_pope_random.json")
    source = (
        f"eval.zip of LLaVA (questions), cocodataset.org (val2014) and github.com/AoiDragon/POPE at {REVISION} (labels)"
    )
    contents = {
        question_file: "8910 questions",
        image_folder: "COCO val2014 pictures",
        **{
            name: f"{number} labels, as of POPE commit {REVISION}"
            for name, number in zip(labels, (3000, 3000, 2910), strict=True)
        },
    }

    def score(self, rows: Sequence[Row], data: Path) -> Result:
        """Return F1, accuracy, precision, recall and share of yes of each category, and the mean F1, all ×100."""
        judged, notes = judge(rows, data / self.question_file, (data / self.labels[0]).parent)
        if len(judged) < len(self.labels):
            notes.append(f"mean F1 is over {', '.join(judged)} alone")
        headline = 100 * mean(category.counts.f1 for category in judged.values())
        return Result(
            benchmark=self.name,
            metrics={"f1": headline, **_metrics(judged)},
            headline="f1",
            n=sum(len(category.outcomes) for category in judged.values()),
            notes=tuple(notes),
            per_question=linearised(headline, [(100 / len(judged), _influence(c)) for c in judged.values()]),
        )


def _metrics(judged: Mapping[str, Category]) -> dict[str, float]:
    measures = ("f1", "accuracy", "precision", "recall", "yes")
    return {f"{m}_{name}": 100 * getattr(category.counts, m) for name, category in judged.items() for m in measures}


def _influence(category: Category) -> dict[Any, float]:
    """How much each question moves the category's F1 = 2 TP / (2 TP + FP + FN), to first order."""
    counts = category.counts
    scale = max(1, 2 * counts.tp + counts.fp + counts.fn) / len(category.outcomes)
    return {
        key: (2 * one.tp - counts.f1 * (2 * one.tp + one.fp + one.fn)) / scale for key, one in category.outcomes.items()
    }
