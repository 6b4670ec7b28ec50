"""The paper's Table I from what was measured: `python -m llava.eval.table --root playground/data/eval`.

Every finished answers file under the root is scored; methods are compared with the uncompressed run of the same
configuration (same questions, model, prompts, generation), question by question, with 95 % intervals, beside the
published figures where the model is one of the paper's.
"""

import argparse
import ast
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.compress import get
from llava.constants import InputError
from llava.eval import benchmarks
from llava.eval.benchmarks.base import Result, read_jsonl
from llava.eval.intervals import Interval, paired_difference, pictures
from llava.eval.journal import RECORD, SUMMARY
from llava.eval.published import COLUMNS, TABLES, TIMES, TITLES, UPPER
from llava.utils import OneLineParser, run_command

Key = tuple[str, float]
"""Method with its fields, and retention ratio."""
OWN = 0.0
"""Stands for the ratio of methods that do not follow one."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished and scored answers file."""

    benchmark: str
    key: Key
    config: Mapping[str, Any]
    """Everything answers depend on, the method left out: what two runs must share to be compared."""
    answers: Path
    """The file."""
    given: int
    """Answers in it."""
    result: Result
    pictures: Mapping[str, str]
    """Question id -> what it is about."""
    seconds: float | None
    """Wall time from the first picture to the last answer, if it was one uninterrupted run."""

    @property
    def value(self) -> float | None:
        """The number papers quote, if it can be had without a server."""
        return self.result.metrics.get(self.result.headline)


def method_key(spec: str) -> Key:
    """Split a recorded method, as `globalcom2(retention_ratio=0.25)`, into its name with other fields and its ratio."""
    call = ast.parse(spec, mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise InputError(f"cannot read the recorded method {spec!r}")
    fields = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    ratio = float(fields.pop("retention_ratio", 1.0))
    rest = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    if not get(f"{call.func.id}({rest})").follows_ratio:
        ratio = 1.0 if call.func.id == UPPER[0] else OWN
    return (f"{call.func.id}({rest})" if rest else call.func.id), ratio


def collect(root: Path, data: Path, model: str | None = None) -> list[Run]:
    """Score every finished answers file under `root`.

    Args:
        root: where runs were written.
        data: the folder of the benchmarks' folders.
        model: keep runs of this `--model-path` only; None: all.

    Raises:
        InputError: there is none, they are of several models, or two answer the same questions in the same way.
    """
    runs: list[Run] = []
    for record in sorted(root.rglob(f"*{RECORD}")):
        answers = record.with_name(record.name.removesuffix(RECORD))
        config = json.loads(record.read_text())
        # A run that was stopped before its first answer leaves an empty file.
        if not answers.is_file() or not answers.stat().st_size or (model is not None and config["model_path"] != model):
            continue
        benchmark = benchmarks.get(config["benchmark"])
        rows, key = read_jsonl(answers), method_key(config.pop("method"))
        runs.append(
            Run(
                benchmark=benchmark.name,
                key=key,
                config=config,
                answers=answers,
                given=len(rows),
                result=benchmark.score(rows, data / benchmark.folder),
                pictures=pictures(rows),
                seconds=_seconds(answers),
            )
        )
    models = sorted({str(run.config["model_path"]) for run in runs})
    if not runs:
        raise InputError(f"no finished answers under {str(root)!r}; run scripts/v1_5/eval/run_grid.sh first")
    if len(models) > 1:
        raise InputError(
            f"answers of several models under {str(root)!r} ({', '.join(models)}); choose with --model-path"
        )
    first: dict[tuple[str, Key], Run] = {}
    for run in runs:
        other = first.setdefault((run.benchmark, run.key), run)
        if other is not run:
            raise InputError(
                f"{str(other.answers)!r} ({other.given} answers) and {str(run.answers)!r} ({run.given}) are both "
                f"{run.benchmark} with {run.key[0]} at {run.key[1]:g}; move one elsewhere"
            )
    return runs


def _seconds(answers: Path) -> float | None:
    """Wall time of an answers file's run, if one run answered all of it."""
    file = answers.with_name(answers.name + SUMMARY)
    if not file.is_file():
        return None
    summary = json.loads(file.read_text())
    return float(summary["seconds"]) if summary["answered_now"] == summary["questions"] else None


def upper_bound(run: Run, runs: Sequence[Run]) -> Run:
    """Return the uncompressed run that a run may be compared with.

    Raises:
        InputError: the same configuration has none.
    """
    for other in runs:
        same = other.benchmark == run.benchmark and other.config == run.config and other.given == run.given
        if other.key == UPPER and same:
            return other
    raise InputError(
        f"{run.benchmark} with {run.key[0]} at {run.key[1]:g} has no upper bound with {run.given} answers of the same "
        "configuration; "
        "run it with METHOD=none and otherwise the same variables"
    )


def published_table(model_path: str) -> dict[Key, tuple[float, ...]]:
    """Return the paper's table for a model, known by its size in the path; empty for others."""
    size = re.search(r"(?:next|v1\.6).*?(7b|13b)", model_path.lower())
    return TABLES[size[1]] if size else {}


def compare(runs: Sequence[Run]) -> dict[Key, dict[str, Any]]:
    """Put the runs of every method and ratio together.

    Returns:
        key -> `scores`, `differences` (95 % interval against the upper bound), `n`, `seconds` by benchmark, and
        `average`: the mean over the benchmarks scored of score ÷ upper bound, in percent, as in the paper.

    Raises:
        InputError: a run has no upper bound to be compared with.
    """
    rows: dict[Key, dict[str, Any]] = defaultdict(lambda: {"scores": {}, "differences": {}, "n": {}, "seconds": {}})
    shares: dict[Key, list[float]] = defaultdict(list)
    for run in runs:
        row, bound = rows[run.key], upper_bound(run, runs)
        row["n"][run.benchmark], row["seconds"][run.benchmark] = run.result.n, run.seconds
        if run.value is None or bound.value is None:
            continue
        row["scores"][run.benchmark] = run.value
        if run is not bound:
            ours, theirs = run.result.per_question, bound.result.per_question
            row["differences"][run.benchmark] = paired_difference(ours, theirs, run.pictures)
        if bound.value:
            shares[run.key].append(100 * run.value / bound.value)
    for key, row in rows.items():
        row["average"] = sum(shares[key]) / len(shares[key]) if shares[key] else None
    return dict(sorted(rows.items(), key=lambda item: (-item[0][1], item[0] != UPPER, item[0][0])))


def as_text(rows: Mapping[Key, Mapping[str, Any]], model_path: str) -> str:
    """Lay the table out: per method what was measured, its difference to the upper bound, and what the paper prints."""
    published = published_table(model_path)
    lines = [f"{model_path}: measured; difference to the upper bound with its 95 % interval; published"]
    head = f"{'':30}" + "".join(f"{title:>18}" for title in (*TITLES, "Average", "MME time"))
    ratio = None
    for key, row in rows.items():
        if key[1] != ratio:
            ratio = key[1]
            lines += ["", "No ratio of their own" if ratio == OWN else f"Retention ratio {ratio:.0%}", head]
        scores = [_number(row["scores"].get(name), "server" if name in row["n"] else "-") for name in COLUMNS]
        average = "-" if row["average"] is None else f"{row['average']:.1f}% of {len(row['scores'])}"
        lines.append(_line(key[0], [*scores, average, _clock(row["seconds"].get("mme"))]))
        if row["differences"]:
            lines.append(_line("  difference", [_spread(row["differences"].get(name)) for name in COLUMNS]))
        if key in published:
            *printed, mean = published[key]
            time = TIMES.get((key, "13b" if "13b" in model_path.lower() else "7b"))
            lines.append(_line("  published", [*(f"{v:.1f}" for v in printed), f"{mean:.1f}% of 10", _clock(time)]))
    return "\n".join(lines)


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:30}" + "".join(f"{cell:>18}" for cell in cells)


def _number(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:.1f}"


def _spread(found: Interval | None) -> str:
    return "" if found is None else f"{found.value:+.1f} [{found.low:+.1f},{found.high:+.1f}]"


def _clock(seconds: float | None) -> str:
    return "-" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which runs are looked at."""
    parser.add_argument("--root", type=Path, default=Path("playground/data/eval"), help="where runs were written")
    parser.add_argument("--data", type=Path, help="the benchmarks' data; default: the root")
    parser.add_argument("--model-path", help="runs of this checkpoint only")


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = OneLineParser(prog="llava.eval.table", description=(__doc__ or "").split("\n")[0])
    add_run_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main() -> None:
    """Run the command."""
    args = build_parser().parse_args()
    runs = collect(args.root, args.data or args.root, args.model_path)
    rows = compare(runs)
    model_path = str(runs[0].config["model_path"])
    if not args.json:
        print(as_text(rows, model_path))
        return
    table = published_table(model_path)
    listed = [
        {"method": key[0], "retention_ratio": key[1], "published": table.get(key), **row}
        | {"differences": {name: found._asdict() for name, found in row["differences"].items()}}
        for key, row in rows.items()
    ]
    print(json.dumps({"model_path": model_path, "columns": COLUMNS, "rows": listed}))


if __name__ == "__main__":
    run_command(main)
