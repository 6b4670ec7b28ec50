"""Score an answers file: `python -m llava.eval.score --benchmark NAME --answers-file F`.

Prints the number papers quote with its 95 % interval, all others, and what a reader must know about them; `--against`
compares with a second answers file question by question; `--export` writes what an official scorer or server takes.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.constants import InputError
from llava.eval.benchmarks import available, get
from llava.eval.benchmarks.base import Benchmark, Result, read_jsonl
from llava.eval.intervals import LEVEL, RESAMPLES, Interval, interval, paired_difference, pictures
from llava.utils import OneLineParser, run_command

DATA = Path("playground/data/eval")


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = OneLineParser(prog="python -m llava.eval.score", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--benchmark", required=True, choices=available(), metavar="NAME", help=", ".join(available()))
    parser.add_argument("--answers-file", required=True, type=Path, help="answers, one object a line")
    parser.add_argument("--data", type=Path, help=f"the benchmark's folder; default: ./{DATA}/<its folder>")
    parser.add_argument("--against", type=Path, help="answers of another run, to compare with")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write here what the official scorer takes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def report(benchmark: Benchmark, answers: Path, data: Path, against: Path | None = None) -> dict[str, Any]:
    """Score one answers file, and compare it with another if given.

    Args:
        benchmark: whose answers they are.
        answers: file of answers.
        data: the benchmark's folder.
        against: answers of another run.

    Returns:
        JSON-able: the fields of `Result` but `per_question`, `value` (the headline's), `interval`, `answers_file` and,
        with `against`, `difference`: ours minus theirs over the questions in both.

    Raises:
        InputError: answers or labels cannot be read, or there is nothing to compare.
    """
    rows = read_jsonl(answers)
    result, about = benchmark.score(rows, data), pictures(rows)
    fields = {key: getattr(result, key) for key in ("benchmark", "scored", "headline", "n", "metrics", "notes")}
    summary = {**fields, "notes": list(result.notes), "answers_file": str(answers)}
    summary["value"] = result.metrics.get(result.headline)
    summary["interval"] = _as_json(interval(result.per_question, about)) if result.per_question else None
    if against is not None:
        summary["difference"] = _compare(result, benchmark.score(read_jsonl(against), data), about, against)
    return summary


def _compare(ours: Result, theirs: Result, about: Mapping[str, str], file: Path) -> dict[str, Any]:
    if ours.headline != theirs.headline:
        raise InputError(f"{str(file)!r} yields {theirs.headline}, this run {ours.headline}; compare like runs")
    found = _as_json(paired_difference(ours.per_question, theirs.per_question, about))
    total = max(len(ours.per_question), len(theirs.per_question))
    return {**found, "against": str(file), "unshared": total - found["n"], "notes": list(theirs.notes)}


def _as_json(found: Interval) -> dict[str, Any]:
    return {**found._asdict(), "level": LEVEL, "resamples": RESAMPLES}


def _range(found: dict[str, Any]) -> str:
    return f"[{found['low']:.2f}, {found['high']:.2f}]"


def as_text(summary: dict[str, Any]) -> str:
    """Lay a report out for people: the headline first, then the other numbers, then the notes."""
    head = summary["headline"]
    lines = [f"{summary['benchmark']}: {summary['scored']} score, n = {summary['n']}"]
    if summary["value"] is not None:
        spread = f"  {LEVEL:.0%} interval {_range(summary['interval'])}" if summary["interval"] else ""
        lines.append(f"{head:28} {summary['value']:8.2f}{spread}")
    lines += [f"{name:28} {value:8.2f}" for name, value in summary["metrics"].items() if name != head]
    if difference := summary.get("difference"):
        spread = f"  {LEVEL:.0%} interval {_range(difference)}"
        lines.append(f"{head + ', difference':28} {difference['value']:+8.2f}{spread}")
        lines.append(f"  paired over {difference['n']} questions, against {difference['against']}")
        if difference["unshared"]:
            lines.append(f"note: {difference['unshared']} questions are answered in one file only and not compared")
        other = [note for note in difference["notes"] if note not in summary["notes"]]
        lines += [f"note: {difference['against']}: {note}" for note in other]
    return "\n".join([*lines, *(f"note: {note}" for note in summary["notes"])])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = build_parser().parse_args(argv)
    benchmark = get(args.benchmark)
    data = args.data or DATA / benchmark.folder
    summary = report(benchmark, args.answers_file, data, args.against)
    if not args.json:
        print(as_text(summary), flush=True)  # the score stands, whatever becomes of the export
    if args.export is not None:
        files = benchmark.export(read_jsonl(args.answers_file), data, args.export)
        summary["exported"] = [str(file) for file in files]
    if args.json:
        print(json.dumps(summary, ensure_ascii=False))
    else:
        sys.stdout.write("".join(f"wrote {file}\n" for file in summary.get("exported", [])))


if __name__ == "__main__":
    run_command(main)
