"""Which runs are looked at: those a grid lists, or all finished ones under a folder, scored.

Nothing that stands beside them costs anything: what is left out, and why, is a note.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from llava.constants import InputError
from llava.eval import benchmarks
from llava.eval.benchmarks.base import Result, read_jsonl
from llava.eval.cells import OWN, Key, method_key, read_cells
from llava.eval.intervals import pictures
from llava.eval.journal import RECORD, SUMMARY
from llava.eval.published import UPPER
from llava.eval.record import MEANT
from llava.schema import some

# Files that a note names; of more it gives the number.
NAMED = 5


class Listed(NamedTuple):
    """An answers file and how it was made."""

    answers: Path
    benchmark: str
    key: Key
    config: dict[str, Any]
    """Everything answers depend on, the method left out: what two runs must share to be compared."""
    given: int
    """Answers in it."""

    @property
    def setting(self) -> tuple[str, int]:
        """What runs of one benchmark share that can be compared: the configuration, and the number of answers."""
        # Two spellings of a path are the same, and so are paths of which the record has what they lead to.
        paths = {name: _place(self.config[name]) for name in MEANT if self.config.get(name)}
        known = {name: None for name, meant in MEANT.items() if meant in self.config}
        return json.dumps({**self.config, **paths, **known}, sort_keys=True), self.given


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished and scored answers file."""

    listed: Listed
    result: Result
    pictures: Mapping[str, str]
    """Question id -> what it is about."""
    seconds: float | None
    """Wall time from the first picture to the last answer, if it was one uninterrupted run."""

    @property
    def benchmark(self) -> str:
        """Name of the benchmark."""
        return self.listed.benchmark

    @property
    def key(self) -> Key:
        """Method and ratio."""
        return self.listed.key

    @property
    def answers(self) -> Path:
        """The file."""
        return self.listed.answers

    @property
    def model_path(self) -> str:
        """The checkpoint, as it was given."""
        return str(self.listed.config["model_path"])

    @cached_property
    def setting(self) -> tuple[str, int]:
        """See `Listed`."""
        return self.listed.setting

    @property
    def value(self) -> float | None:
        """The number papers quote, if it can be had without a server."""
        return self.result.metrics.get(self.result.headline)


@dataclass(frozen=True)
class Found:
    """Runs to be looked at, and what is not among them."""

    runs: list[Run] = field(default_factory=list)
    missing: dict[tuple[str, Key], str] = field(default_factory=dict)
    """(benchmark, key) of runs that were asked for or begun and have no score -> why."""
    notes: list[str] = field(default_factory=list)
    """What was left out."""


def collect(root: Path, data: Path, model: str | None = None, cells: Path | None = None) -> Found:
    """Score the runs a grid lists, or, of every benchmark, those under `root` that can be compared with each other.

    Without a list, runs of one benchmark that differ in more than the method are different settings; the one with an
    upper bound and the most answers is taken.

    Args:
        root: where runs were written.
        data: the folder of the benchmarks' folders.
        model: without a list, runs of this `--model-path` only; None: all.
        cells: a grid's list, see `read_cells`; None: look for runs under `root`.

    Raises:
        InputError: no run has a score, or there are runs of several models.
    """
    found = Found()
    listed = _asked_for(cells, found) if cells is not None else _choose(_all_under(root, model, found), found)
    first: dict[tuple[str, Key], Path] = {}
    for one in listed:
        name = one.benchmark, one.key
        if name in first:
            found.notes.append(f"left out: {one.answers} is {said(*name)} like {first[name]}")
            continue
        try:
            found.runs.append(_scored(one, data))
            first[name] = one.answers
        except InputError as error:
            found.missing[name] = str(error)
    if not found.runs:
        why = next(iter([*found.missing.values(), *found.notes]), "run scripts/v1_5/eval/run_grid.sh first")
        raise InputError(f"no finished answers {f'of {cells}' if cells else f'under {root}'}: {why}")
    return found


def said(benchmark: str, key: Key) -> str:
    """Name a run."""
    return f"{benchmark} with {key[0]}" + (f" at {key[1]:g}" if key[1] != OWN else "")


def beside(cells: Path) -> list[str]:
    """Return a note about the answers files beside those of a grid's list, if there are any."""
    listed = {cell.answers for cell in read_cells(cells)}
    records = {record for folder in {file.parent for file in listed} for record in folder.glob(f"*{RECORD}")}
    others = sorted({_answers_of(record) for record in records} - listed)
    return [f"not of this grid: {some(others, NAMED)}"] if others else []


def upper_bound(run: Run, runs: Iterable[Run]) -> Run | None:
    """Return the uncompressed run that a run may be compared with: of the same questions, answered in the same way."""
    same = (other for other in runs if other.benchmark == run.benchmark and other.key == UPPER)
    return next((other for other in same if other.setting == run.setting), None)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which runs are looked at."""
    parser.add_argument("--root", type=Path, default=Path("playground/data/eval"), help="where runs were written")
    parser.add_argument("--data", type=Path, help="the benchmarks' data; default: the root")
    parser.add_argument("--model-path", help="runs of this checkpoint only")
    parser.add_argument("--cells", type=Path, help="a grid's list of its runs: these instead of all under the root")


def _place(path: Any) -> str:
    return str(Path(str(path)).resolve())


def _answers_of(record: Path) -> Path:
    return record.with_name(record.name.removesuffix(RECORD))


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn whatever is wrong with one run's files into an `InputError`, as other runs do not depend on them."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{str(file)!r} cannot be read ({type(error).__name__}: {error})") from error


def _look(answers: Path) -> Listed | None:
    """Read how an answers file was made; None: it has no answers yet.

    Raises:
        InputError: its record cannot be read.
    """
    if not answers.is_file():
        return None
    record = answers.with_name(answers.name + RECORD)
    with _readable(record):
        config = dict(json.loads(record.read_text(encoding="utf-8")))
        benchmark, key = benchmarks.get(config["benchmark"]).name, method_key(config.pop("method"))
        config["model_path"] = str(config["model_path"])
    with _readable(answers), answers.open("rb") as lines:
        given = sum(not line.isspace() for line in lines)
    return Listed(answers, benchmark, key, config, given) if given else None


def _asked_for(cells: Path, found: Found) -> list[Listed]:
    """Return the cells of a grid's list that have answers; the others are missing."""
    listed = []
    for cell in read_cells(cells):
        try:
            one = None if cell.failed else _look(cell.answers)
            why = cell.failed or "no finished answers"
        except InputError as error:
            one, why = None, str(error)
        if one is None:
            found.missing[cell.benchmark, cell.key] = why
        else:
            listed.append(one)
    return listed


def _all_under(root: Path, model: str | None, found: Found) -> list[Listed]:
    """Return the runs under a folder, of one model.

    Raises:
        InputError: they are of several.
    """
    listed: list[Listed] = []
    for record in sorted(root.rglob(f"*{RECORD}")):
        try:
            one = _look(_answers_of(record))
        except InputError as error:
            found.notes.append(f"left out: {error}")
            continue
        if one is not None and (model is None or _place(one.config["model_path"]) == _place(model)):
            listed.append(one)
    models = {_place(one.config["model_path"]): one.config["model_path"] for one in listed}
    if len(models) > 1:
        names = ", ".join(sorted(models.values()))
        raise InputError(f"answers of several models under {str(root)!r} ({names}); choose with --model-path")
    return listed


def _choose(listed: Sequence[Listed], found: Found) -> list[Listed]:
    """Keep one setting of every benchmark."""
    settings: dict[str, dict[tuple[str, int], list[Listed]]] = {}
    for one in listed:
        settings.setdefault(one.benchmark, {}).setdefault(one.setting, []).append(one)
    chosen: list[Listed] = []
    for name, groups in settings.items():
        best = max(groups.values(), key=lambda runs: (any(r.key == UPPER for r in runs), runs[0].given, len(runs)))
        others = [one.answers for runs in groups.values() if runs is not best for one in runs]
        if others:
            taken = f"runs of one configuration with {best[0].given} answers"
            found.notes.append(f"left out of {name}, which is over {taken}: {some(others, NAMED)}")
        chosen += best
    return chosen


def _scored(one: Listed, data: Path) -> Run:
    """Score a run.

    Raises:
        InputError: it cannot be.
    """
    benchmark = benchmarks.get(one.benchmark)
    with _readable(one.answers):
        rows = read_jsonl(one.answers)
        result = benchmark.score(rows, data / benchmark.folder)
        return Run(listed=one, result=result, pictures=pictures(rows), seconds=_seconds(one.answers))


def _seconds(answers: Path) -> float | None:
    """Wall time of an answers file's run, if one run answered all of it."""
    file = answers.with_name(answers.name + SUMMARY)
    if not file.is_file():
        return None
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        return float(summary["seconds"]) if summary["answered_now"] == summary["questions"] else None
    except (OSError, ValueError, LookupError, TypeError):  # times are by the way: scores do not depend on them
        return None
