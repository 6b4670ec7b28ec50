"""MME (arXiv 2306.13394): yes/no questions, two a picture, in ten perception and four cognition categories.

Differs from the released code in: answers are paired by picture, so that order, tabs and line breaks shift nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.eval.benchmarks._common import (
    JsonlBenchmark,
    by_prompt,
    gaps,
    latest,
    linearised,
    mean,
    official,
    unambiguous,
)
from llava.eval.benchmarks.base import SHORT_ANSWER, Question, Result, Row
from llava.output import write_whole
from llava.reading import read_text

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
YES_OR_NO = "Please answer yes or no."


class Label(NamedTuple):
    """One line of a ground-truth file."""

    question: str
    """As written there."""
    answer: str


class Picture(NamedTuple):
    """Where the questions of a picture are: `<category>/…/<stem>.txt`."""

    category: str
    stem: str


Labels = Mapping[Picture, Mapping[str, Label]]
"""Picture -> plain question -> label."""
Judged = Mapping[Picture, Sequence[bool]]
"""Picture -> for every question, whether the answer is right; only pictures all of whose questions have an answer."""


def plain(text: str) -> str:
    """Return a question without the requests around it."""
    return text.replace(SHORT_ANSWER.strip(), "").replace(YES_OR_NO, "").strip()


def picture(question_id: str) -> Picture:
    """Split a question id such as `artwork/images/14777.jpg` or `code_reasoning/0020.png`."""
    parts = question_id.split("/")
    return Picture(parts[0], parts[-1].split(".")[0])


def verdict(text: str) -> str:
    """Read an answer: `yes` or `no` where it is among the first four characters, else `other`."""
    head = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in head), "other")


def read_labels(release: Path) -> Labels:
    """Read the ground truth of all categories from MME's release.

    Raises:
        InputError: there is none, or a line is not `question<tab>answer`.
    """
    labels: dict[Picture, dict[str, Label]] = {}
    for category in (*PERCEPTION, *COGNITION):
        folder = release / category / "questions_answers_YN"
        for file in sorted((folder if folder.exists() else release / category).glob("*.txt")):
            with official(file, MME.source):
                found = [_read_label(line.strip()) for line in read_text(file).split("\n") if line.strip()]
                labels[Picture(category, file.stem)] = unambiguous((plain(label.question), label) for label in found)
    with official(release, MME.source):
        if not labels:
            raise FileNotFoundError(2, "no ground truth <category>/*.txt inside")
    return labels


def _read_label(line: str) -> Label:
    cells = line.split("\t")
    if len(cells) != 2 or cells[1].lower() not in ("yes", "no"):
        raise ValueError(f"{line[:80]!r} is not a question, a tab, and Yes or No")
    return Label(*cells)


class MME(JsonlBenchmark):
    """Fourteen abilities; a category is worth acc + acc+, 200 at most. Papers quote the sum over perception.

    A picture one of whose questions has no answer, or a row that reports an error, is left out and counted, from acc
    and acc+ alike.
    """

    name = "mme"
    folder = "MME"
    question_file = "llava_mme.jsonl"
    image_folder = "MME_Benchmark_release_version"
    labels = ("MME_Benchmark_release_version",)
    source = (
        "eval.zip of LLaVA (questions) and github.com/BradyFU/Awesome-Multimodal-Large-Language-Models (on request)"
    )
    contents = {
        question_file: "2374 questions",
        image_folder: "a folder for each of the 14 categories, with pictures and <picture>.txt labels",
    }

    def unit(self, question: Question) -> Picture:
        """Keep the questions of a picture together, which acc+ wants both right."""
        return picture(str(question.id))

    def score(self, rows: Sequence[Row], data: Path) -> Result:
        """Return acc, acc+ and their sum of each category, and the sums over perception, cognition and all."""
        labels = read_labels(data / self.labels[0])
        matched, notes = _match(rows, labels)
        complete = {key: said for key, said in matched.items() if len(said) == len(labels[key])}
        judged = {key: _judge(said, labels[key]) for key, said in complete.items()}
        answered = sum(len(said) for said in matched.values())
        scored = sum(map(len, judged.values()))
        if answered > scored:
            notes.append(f"{answered - scored} answers are left out because another question of their picture has none")
        categories = {c: {k: v for k, v in judged.items() if k.category == c} for c in (*PERCEPTION, *COGNITION)}
        present = {name: found for name, found in categories.items() if found}
        notes += gaps(sum(map(len, labels.values())), scored, 0, notes)
        if len(present) < len(categories):
            notes.append(f"only {len(present)} of {len(categories)} categories have answers; sums are over these")
        return _result(present, notes)

    def export(self, rows: Sequence[Row], data: Path, output: Path) -> list[Path]:
        """Write `<category>.txt` into a folder, as MME's `calculation.py --results_dir` takes it.

        A line is `<picture>.txt, question, label, answer`, separated by tabs; those of a picture stand together, and
        tabs and line breaks of an answer become spaces.
        """
        labels = read_labels(data / self.labels[0])
        matched, _ = _match(rows, labels)
        lines: dict[str, list[str]] = {}
        for key in sorted(matched):
            for question, label in labels[key].items():
                if question in matched[key]:
                    cells = f"{key.stem}.txt", label.question, label.answer, " ".join(matched[key][question].split())
                    lines.setdefault(key.category, []).append("\t".join(cells) + "\n")
        for category, written in lines.items():
            write_whole(output / f"{category}.txt", "".join(written))
        return [output / f"{category}.txt" for category in lines]


def _match(rows: Sequence[Row], labels: Labels) -> tuple[dict[Picture, dict[str, str]], list[str]]:
    """Sort answers to picture and plain question; say how many have no label."""
    answers, notes = latest(rows, by_prompt)
    matched: dict[Picture, dict[str, str]] = {}
    for (question_id, prompt), row in answers.items():
        key, question = picture(str(question_id)), plain(prompt)
        if question in labels.get(key, {}):
            matched.setdefault(key, {})[question] = str(row["text"])
    unknown = len(answers) - sum(map(len, matched.values()))
    if unknown:
        notes.append(f"{unknown} answers belong to no labelled question and are left out")
    return matched, notes


def _judge(said: Mapping[str, str], labels: Mapping[str, Label]) -> list[bool]:
    return [verdict(text) == labels[question].answer.lower() for question, text in said.items()]


def _worth(right: Sequence[bool]) -> float:
    """What a picture adds to its category's mean: acc + acc+, 0 to 200."""
    return 100 * mean(right) + 100 * all(right)


def _result(categories: Mapping[str, Judged], notes: Sequence[str]) -> Result:
    metrics: dict[str, float] = {}
    for name, found in categories.items():
        answers = [right for picture in found.values() for right in picture]
        metrics[f"{name}_acc"] = 100 * mean(answers)
        metrics[f"{name}_acc+"] = 100 * mean(map(all, found.values()))
        metrics[name] = metrics[f"{name}_acc"] + metrics[f"{name}_acc+"]
    sums = {
        "perception": sum(metrics.get(name, 0.0) for name in PERCEPTION),
        "cognition": sum(metrics.get(name, 0.0) for name in COGNITION),
    }
    headline = "perception" if set(PERCEPTION) & categories.keys() else "cognition"
    counted = {
        name: categories[name] for name in (PERCEPTION if headline == "perception" else COGNITION) if name in categories
    }
    return Result(
        benchmark=MME.name,
        metrics={**sums, "total": sum(sums.values()), **metrics},
        headline=headline,
        n=sum(len(right) for found in counted.values() for right in found.values()),
        notes=tuple(notes),
        per_question=linearised(sums[headline], [(1.0, _influence(found)) for found in counted.values()]),
    )


def _influence(found: Judged) -> dict[Any, float]:
    """How much each picture lies above its category's mean."""
    worth = {picture: _worth(right) for picture, right in found.items()}
    middle = mean(worth.values())
    return {picture: value - middle for picture, value in worth.items()}
