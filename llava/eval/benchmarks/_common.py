"""What the benchmarks share: reading official files, choosing rows, saying what is missing, writing exports."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from llava.constants import InputError
from llava.eval.benchmarks.base import Benchmark, Question, Result, Row, read_jsonl
from llava.output import write_whole
from llava.reading import parse_json, read_text
from llava.schema import ANYTHING, ID, NAME, STRING, TEXT, WHOLE, check, fault

T = TypeVar("T")


class JsonlBenchmark(Benchmark):
    """A benchmark whose question file has one object a line and whose text is asked as it stands."""

    layout: ClassVar[Mapping[str, Any]] = {"question_id": ID, "text": TEXT, "image?": NAME}
    """Of a line of the question file."""
    recorded: ClassVar[tuple[str, ...]] = ()
    """Fields of a question's line that the answers file repeats."""

    def questions(self, file: Path, **options: Any) -> Iterator[Question]:
        """Read `question_id, image, text` of every line; options change nothing."""

        def make(row: Row) -> Question:
            extra = {name: row[name] for name in self.recorded if row.get(name) is not None}
            category = str(row.get("category") or "")
            return Question(
                id=row["question_id"], text=row["text"], image=row.get("image"), extra=extra, category=category
            )

        yield from make_questions(file, read_jsonl(file), self.layout, {"text": ""}, make)


def make_questions(
    file: Path,
    rows: Sequence[Any],
    layout: Mapping[str, Any],
    blank: Mapping[str, Any],
    make: Callable[[Row], Question],
) -> list[Question]:
    """Make questions of the entries of a question file; one with a field of a wrong type becomes one with an `error`.

    Args:
        file: where they are from.
        rows: the entries.
        layout: what they must be; the first field is the question's id.
        blank: what stands in for a field of a wrong type in a question that cannot be asked.
        make: turns an entry of this layout into a question.

    Raises:
        InputError: an entry is no object, lacks a field or has no usable id, so that its answer could not be recorded;
            or none can be asked.
    """
    key = next(iter(layout))
    present = {name: ANYTHING for name in layout if not name.endswith("?")} | {key: ID}
    questions = []
    for number, row in enumerate(rows, 1):
        check(row, present, f"{str(file)!r}, question {number}")
        if wrong := fault(row, layout):
            bad = {name.removesuffix("?") for name, inner in layout.items() if fault(row, {name: inner})}
            question = make({**row, **{name: blank.get(name) for name in bad}})
            error = f"{file.name!r}, question {number}{wrong}"
            questions.append(replace(question, image=None, error=error))
        else:
            questions.append(make(row))
    if questions and all(question.error for question in questions):
        raise InputError(f"{str(file)!r} has no question that can be asked ({questions[0].error})")
    return questions


@contextmanager
def official(file: Path, source: str) -> Iterator[None]:
    """Turn what goes wrong with a file that others made into an `InputError` that says where to get it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {str(file)!r} ({error.strerror}); get it from {source}") from error
    except InputError as error:
        raise error if source in str(error) else InputError(f"{error}; get it from {source}") from error
    except ValueError as error:
        raise InputError(f"{str(file)!r} is not in the official layout ({error}); get it from {source}") from error


def read_json(file: Path, layout: Any = ANYTHING) -> Any:
    """Read a JSON file of a layout; to be called within `official`."""
    value = parse_json(read_text(file))
    if wrong := fault(value, layout):
        raise ValueError(f"it{wrong}")
    return value


def unambiguous(pairs: Iterable[tuple[Any, T]]) -> dict[Any, T]:
    """Return a mapping; to be called within `official`.

    Raises:
        ValueError: a key comes twice, with different values.
    """
    made: dict[Any, T] = {}
    for key, value in pairs:
        if made.setdefault(key, value) != value:
            raise ValueError(f"there are two different labels of {key!r}")
    return made


ANSWER = {
    "question_id": ID,
    "text": TEXT,
    "prompt?": STRING,
    "metadata?": {"error?": STRING, "image?": STRING},
    "category?": STRING,
    "round_id?": WHOLE,
}
"""Layout of a row of an answers file, as far as scores look at it."""


def reports_error(row: Row) -> bool:
    """Whether a row of an answers file says why there is no answer."""
    return bool((row.get("metadata") or {}).get("error"))


def by_id(row: Row) -> Any:
    """Key of an answer where question ids are unique."""
    return row["question_id"]


def by_prompt(row: Row) -> Any:
    """Key of an answer where the questions of a picture share their id."""
    return row["question_id"], row.get("prompt") or ""


def latest(rows: Sequence[Row], key: Callable[[Row], Any] = by_id) -> tuple[dict[Any, Row], list[str]]:
    """Choose the rows that count: of several answers to a question the last, and none that reports an error.

    Args:
        rows: of an answers file.
        key: tells questions apart.

    Returns:
        key -> row, and notes about what was left out.

    Raises:
        InputError: there is no row, one without `question_id` or `text`, one with a field of a wrong type, or two
            that `key` takes for answers to one question though they were asked differently.
    """
    if not rows:
        raise InputError("the answers file holds no answers; run the benchmark first")
    for number, row in enumerate(rows, 1):
        if "question_id" not in row or "text" not in row:
            raise InputError(f"answer {number} has no question_id or no text; give an answers file in LLaVA's format")
        if wrong := fault(row, ANSWER):
            raise InputError(f"answer {number}{wrong}; give an answers file in LLaVA's format")
    found: dict[Any, Row] = {}
    for row in rows:
        name = key(row)
        prompts = {found.get(name, row).get("prompt"), row.get("prompt")} - {None, ""}
        if len(prompts) > 1:
            raise InputError(
                f"question {row['question_id']!r} is answered under two prompts; give the answers of one run to "
                "questions each of which has an id of its own"
            )
        found[name] = row
    errors = [name for name, row in found.items() if reports_error(row)]
    notes = []
    if len(found) < len(rows):
        notes.append(f"{len(rows) - len(found)} of {len(rows)} rows repeat a question; the last answer counts")
    if errors:
        notes.append(f"{len(errors)} rows report an error instead of an answer and count as missing")
    return {name: row for name, row in found.items() if name not in set(errors)}, notes


def gaps(labelled: int, scored: int, unknown: int, known: Sequence[str] = ()) -> list[str]:
    """Say how many labelled questions have an answer, if not all, and how many answers no label; no other is scored.

    Args:
        labelled: number of labelled questions.
        scored: how many of them have an answer.
        unknown: answers to no labelled question.
        known: notes about what was left out before, which explain why nothing is left.

    Raises:
        InputError: nothing is left to score.
    """
    if not scored:
        why = f" ({'; '.join(known)})" if known else ""
        raise InputError(
            f"no answer belongs to a labelled question{why}; check that --data and the answers are of one set"
        )
    notes = []
    if scored < labelled:
        notes.append(f"{scored} of {labelled} questions have an answer; the score is over these")
    if unknown:
        notes.append(
            f"{unknown} answers belong to no labelled question, or to one that has its answer, and are left out"
        )
    return notes


def mean(values: Iterable[float]) -> float:
    """Return the mean, 0 of nothing."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def grouped(values: Mapping[Any, float], groups: Mapping[Any, Iterable[str]]) -> dict[str, float]:
    """Return the mean of `values` in every group, groups in alphabetical order.

    Args:
        values: question -> its value.
        groups: question -> names of the groups it is in.
    """
    members: dict[str, list[float]] = {}
    for question, value in values.items():
        for name in groups.get(question, ()):
            members.setdefault(name, []).append(value)
    return {name: mean(members[name]) for name in sorted(members)}


def with_groups(
    main: Mapping[str, float], values: Mapping[Any, float], groups: Mapping[Any, Iterable[str]]
) -> dict[str, float]:
    """Return the main numbers, then the mean in every group; a group of the same name does not replace them."""
    return {**main, **grouped(values, groups), **main}


def linearised(headline: float, parts: Sequence[tuple[float, Mapping[Any, float]]]) -> dict[Any, float]:
    """Spread a number that is no mean over questions, so that intervals can be resampled from it.

    A headline h = Σ_c w_c f_c over groups c of n_c questions, each f_c smooth in means over its group, moves to first
    order by w_c / n_c times the sum of its questions' influences. Question i of N thus stands for
    h + w_c · influence_i · N / n_c: the mean of all is h, their spread that of h.

    Args:
        headline: h.
        parts: (w_c, question -> influence, which sums to 0) of every group.
    """
    total = sum(len(influence) for _, influence in parts)
    return {
        question: headline + weight * value * total / len(influence)
        for weight, influence in parts
        for question, value in influence.items()
    }


def server_result(benchmark: Benchmark, n: int, notes: Iterable[str], where: str) -> Result:
    """Return the result of a set whose labels are not public: no number, and where to get one."""
    notes = (*notes, f"labels are not public: export the answers and submit them to {where}")
    return Result(benchmark=benchmark.name, metrics={}, headline="accuracy", n=n, scored="server", notes=notes)


def export_path(output: Path, default: str) -> Path:
    """Return the file to write; `output` is the file, or a folder where it gets its usual name."""
    return output if output.suffix == Path(default).suffix else output / default


def write_json(path: Path, value: Any, indent: int | None = None) -> list[Path]:
    """Write a JSON file in UTF-8, ASCII only as upstream's are; returns it in a list, as exports do."""
    write_whole(path, json.dumps(value, indent=indent))
    return [path]
