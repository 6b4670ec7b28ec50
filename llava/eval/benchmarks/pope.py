"""POPE (arXiv 2305.10355): does the model see things that are not there? Yes/no questions in three categories.

Differs from the released code in: labels are found by (picture, question), where it pairs line by line and a label file
of another revision (POPE's HEAD has 3000 random questions, LLaVA's question file 2910) halves F1 in silence; questions
are told apart by category and id, as ids begin anew in every category in the files of POPE's authors.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from llava.constants import InputError
from llava.eval.benchmarks._common import JsonlBenchmark, gaps, latest, linearised, mean, official
from llava.eval.benchmarks.base import Question, Result, Row, read_jsonl
from llava.schema import TEXT

REVISION = "e3e3926"
LABEL = {"image": TEXT, "text": TEXT, "label": TEXT}
CATEGORY = re.compile(r"[\w-]{1,64}")
Pair = tuple[str, str]
"""Picture and question."""


class Key(NamedTuple):
    """What tells a question apart."""

    id: int | str
    category: str


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
        InputError: a file is missing, no answer belongs to a label, or it cannot be told which question an answer
            belongs to.
    """
    with official(questions, POPE.source):
        asked = _read_questions(questions)
    answers, notes, unknown = _match(rows, asked)
    labelled = sorted({key.category for key in answers})
    judged = {name: _category(name, asked, answers, annotations / f"coco_pope_{name}.json") for name in labelled}
    notes += [note for category in judged.values() for note in category.notes]
    scored = sum(len(category.outcomes) for category in judged.values())
    notes += gaps(len(asked), scored, unknown, notes)
    return {name: category for name, category in judged.items() if category.outcomes}, notes


def _read_questions(file: Path) -> dict[Key, Pair]:
    asked: dict[Key, Pair] = {}
    for number, question in enumerate(POPE().read(file), 1):
        key = Key(question.id, question.extra.get("category", ""))
        if not CATEGORY.fullmatch(key.category):
            raise InputError(f"{str(file)!r}, question {number}: category {key.category[:40]!r} is no name")
        if key in asked:
            raise InputError(f"{str(file)!r}, question {number}: {key.category} has a question {key.id!r} already")
        asked[key] = question.image or "", _question(question.text)
    return asked


def _question(text: str) -> str:
    """Return a question without the requests after it."""
    return text.split("\n")[0].strip()


def _match(rows: Sequence[Row], asked: Mapping[Key, Pair]) -> tuple[dict[Key, Row], list[str], int]:
    """Find the question of every answer: by id, and by category, picture and prompt where the answer names them.

    Returns:
        the answers that count, notes about what was left out, and how many answers belong to no question.

    Raises:
        InputError: answers fit several questions and are not all alike.
    """
    named: dict[Any, list[Key]] = defaultdict(list)
    for key in asked:
        named[key.id].append(key)
    seen: Counter[tuple[Key, ...]] = Counter()

    def place(row: Row) -> tuple[tuple[Key, ...], int]:
        fits = tuple(key for key in named.get(row["question_id"], ()) if _fits(row, key, asked[key]))
        seen[fits] += 1
        return fits, 0 if len(fits) == 1 else seen[fits]

    answers, notes = latest(rows, place)
    found: dict[Key, Row] = {}
    alike: dict[tuple[Key, ...], list[Row]] = {fits: [] for fits in seen if len(fits) > 1}
    for (fits, _), row in answers.items():
        if len(fits) == 1:
            found[fits[0]] = row
        elif fits:
            alike[fits].append(row)
    for fits, several in alike.items():
        same = len({verdict(str(row["text"])) for row in several}) == 1
        if not (same and len(several) == seen[fits] == len(fits)) or found.keys() & set(fits):
            raise InputError(
                f"question {fits[0].id!r} is in {', '.join(key.category for key in fits)}, and the answers to it do not"
                " say which they belong to; answer with llava.eval.answer, which records the category"
            )
        found.update(zip(fits, several, strict=True))
    return found, notes, sum(not fits for fits, _ in answers)


def _fits(row: Row, key: Key, pair: Pair) -> bool:
    """Whether an answer may be to a question of its id, by all that it says about itself."""
    image, prompt = (row.get("metadata") or {}).get("image"), row.get("prompt")
    return (
        row.get("category", key.category) == key.category
        and image in (None, pair[0])
        and (not prompt or _question(prompt) == pair[1])
    )


def _category(name: str, asked: Mapping[Key, Pair], answers: Mapping[Key, Row], file: Path) -> Category:
    if not file.exists():
        raise InputError(f"{str(file)!r} is missing; get it from {POPE.source}")
    with official(file, POPE.source):
        labels = _read_labels(file)
    own = {key: pair for key, pair in asked.items() if key.category == name}
    outcomes = {
        key.id: _outcome(verdict(str(answers[key]["text"])), labels[pair])
        for key, pair in own.items()
        if key in answers and pair in labels
    }
    return Category(outcomes, len(own), _revision(name, set(own.values()), labels.keys()))


def _read_labels(file: Path) -> dict[Pair, bool]:
    """Return for every picture and question whether "yes" is right."""
    labels: dict[Pair, bool] = {}
    for number, row in enumerate(read_jsonl(file, LABEL), 1):
        pair, right = (row["image"], row["text"].strip()), row["label"] != "no"
        if labels.setdefault(pair, right) != right:
            raise InputError(f"{str(file)!r}, label {number} contradicts an earlier one of the same question")
    return labels


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
    """Object hallucination on COCO pictures; papers quote the mean F1 of the three categories.

    Questions without an answer, and rows that report an error, are left out of their category and counted; a category
    without any answer is left out of the mean, which says so.
    """

    name = "pope"
    layout = {**JsonlBenchmark.layout, "category?": TEXT}
    recorded = ("category",)
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

    def read(self, file: Path) -> Sequence[Question]:
        """Read the question file, every question's category in `extra`."""
        return list(super().questions(file))

    def questions(self, file: Path, **options: Any) -> Iterator[Question]:
        """Read the question file; where ids begin anew, the answers file repeats the category beside them."""
        found = self.read(file)
        anew = len({question.id for question in found}) < len(found)
        yield from found if anew else (replace(question, extra={}) for question in found)

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
            per_question=linearised(headline, [(100 / len(judged), _influence(n, c)) for n, c in judged.items()]),
        )


def _metrics(judged: Mapping[str, Category]) -> dict[str, float]:
    measures = ("f1", "accuracy", "precision", "recall", "yes")
    return {f"{m}_{name}": 100 * getattr(category.counts, m) for name, category in judged.items() for m in measures}


def _influence(name: str, category: Category) -> dict[Any, float]:
    """How much each question moves the category's F1 = 2 TP / (2 TP + FP + FN), to first order."""
    counts = category.counts
    scale = max(1, 2 * counts.tp + counts.fp + counts.fn) / len(category.outcomes)
    return {
        Key(question, name): (2 * one.tp - counts.f1 * (2 * one.tp + one.fp + one.fn)) / scale
        for question, one in category.outcomes.items()
    }
