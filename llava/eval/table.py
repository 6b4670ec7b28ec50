"""The paper's Table I from what was measured: `python -m llava.eval.table --root playground/data/eval`.

Runs are scored; methods are compared with the uncompressed run of the same configuration (same questions, model,
prompts, generation), question by question, with 95 % intervals, beside the published figures where the model is one of
the paper's. A grid says with `--cells` which runs it means. What is missing or left out is a note, and costs no more.
"""

import argparse
import csv
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava.eval.cells import OWN, Key
from llava.eval.intervals import Interval, paired_difference
from llava.eval.published import UPPER, columns, figures, title
from llava.eval.runs import Found, Run, add_run_arguments, beside, collect, said, upper_bound
from llava.utils import OneLineParser, run_command

Rows = dict[Key, dict[str, Any]]
FIELDS = (
    *("method", "retention_ratio", "benchmark", "n", "score", "difference", "low", "high", "published", "seconds"),
    "state",
)


def compare(found: Found) -> Rows:
    """Put the runs of every method and ratio together.

    Returns:
        key -> by benchmark `scores`, `differences` (95 % interval against the upper bound), `n`, `scored` (`local` or
        `server`), `seconds` and `missing` (why); and `average`, the mean over the `averaged` benchmarks with an upper
        bound of score ÷ upper bound, in percent, as in the paper; None without one.
    """
    parts = ("scores", "differences", "n", "scored", "seconds", "missing")
    rows: Rows = defaultdict(lambda: {part: {} for part in parts})
    shares: dict[Key, list[float]] = defaultdict(list)
    for run in found.runs:
        row, bound = rows[run.key], upper_bound(run, found.runs)
        row["n"][run.benchmark], row["scored"][run.benchmark] = run.result.n, run.result.scored
        row["seconds"][run.benchmark] = run.seconds
        if run.value is None:
            continue
        row["scores"][run.benchmark] = run.value
        if bound is None or bound.value is None:
            continue
        if run is not bound:
            ours, theirs = run.result.per_question, bound.result.per_question
            if ours.keys() & theirs.keys():
                row["differences"][run.benchmark] = paired_difference(ours, theirs, run.pictures)
        if bound.value:
            shares[run.key].append(100 * run.value / bound.value)
    for (benchmark, key), why in found.missing.items():
        rows[key]["missing"][benchmark] = why
    for key, row in rows.items():
        row["average"] = sum(shares[key]) / len(shares[key]) if shares[key] else None
        row["averaged"] = len(shares[key])
    return dict(sorted(rows.items(), key=lambda item: (-item[0][1], item[0] != UPPER, item[0][0])))


def remarks(found: Found) -> list[str]:
    """Say once what a reader must know: notes that a benchmark's runs share, what is not compared, what is missing."""
    lines = []
    for name in columns():
        runs = [run for run in found.runs if run.benchmark == name]
        shared = set.intersection(*(set(run.result.notes) for run in runs)) if runs else set()
        lines += [f"{name}: {note}" for note in runs[0].result.notes if note in shared] if runs else []
        lines += _uncompared(runs)
    why: dict[str, list[tuple[str, Key]]] = defaultdict(list)
    for cell, reason in found.missing.items():
        why[reason].append(cell)
    lines += [f"missing: {_several(cells)} ({reason})" for reason, cells in why.items()]
    return [*lines, *found.notes]


def _uncompared(runs: Sequence[Run]) -> Iterator[str]:
    """Say which runs of a benchmark are not, or not wholly, compared with their upper bound."""
    bounds = [(run, upper_bound(run, runs)) for run in runs]
    if alone := [(run.benchmark, run.key) for run, bound in bounds if bound is None]:
        yield (
            f"{_several(alone)}: no upper bound of the same configuration and number of answers; "
            "run it with METHOD=none and otherwise the same variables"
        )
    for run, bound in bounds:
        if bound is not None and bound.result.n != run.result.n:
            yield f"{said(run.benchmark, run.key)}: over {run.result.n} questions, its upper bound {bound.result.n}"


def _several(cells: Sequence[tuple[str, Key]]) -> str:
    return said(*cells[0]) + (f" and {len(cells) - 1} more" if cells[1:] else "")


def shown(rows: Rows) -> list[str]:
    """Return the benchmarks with a column: those that were answered, or asked for and are missing."""
    there = {name for row in rows.values() for name in (*row["n"], *row["missing"])}
    return [name for name in columns() if name in there]


def _state(row: Mapping[str, Any], name: str) -> str:
    """Say what is known of a cell: `ok`, `server` (scored elsewhere), `missing`, or nothing as there is no score."""
    if name in row["scores"]:
        return "ok"
    return "server" if row["scored"].get(name) == "server" else "missing" if name in row["missing"] else "-"


def layout(rows: Rows, model_path: str) -> tuple[list[str], list[tuple[Key, list[list[str]]]]]:
    """Lay the table out.

    Returns:
        The heads of the columns, the first one empty, and by method and ratio up to three lines of as many cells: what
        was measured, its difference to the upper bound, and what the paper prints. No column is without content.
    """
    names = shown(rows)
    averaged = any(row["average"] is not None for row in rows.values())
    timed = any(row["seconds"].get("mme") for row in rows.values())
    heads = ["", *map(title, names), *["Average"] * averaged, *["MME time"] * timed]
    listed = []
    for key, row in rows.items():
        scores = [f"{row['scores'][n]:.1f}" if n in row["scores"] else _state(row, n) for n in names]
        average = "-" if row["average"] is None else f"{row['average']:.1f}% of {row['averaged']}"
        lines = [[key[0], *scores, *[average] * averaged, *[_clock(row["seconds"].get("mme"))] * timed]]
        if row["differences"]:
            spreads = [_spread(row["differences"].get(name)) for name in names]
            lines.append(["  difference", *spreads, *[""] * (averaged + timed)])
        if printed := figures(model_path, key):
            scores = [f"{printed[name]:.1f}" if name in printed else "" for name in names]
            average, time = f"{printed['average']:.1f}% of 10", _clock(printed.get("seconds"))
            lines.append(["  published", *scores, *[average] * averaged, *[time] * timed])
        listed.append((key, lines))
    return heads, listed


def _ratio(key: Key) -> str:
    return "No ratio of their own" if key[1] == OWN else f"Retention ratio {key[1]:.0%}"


def as_text(rows: Rows, model_path: str) -> str:
    """Write the table in columns, ratio by ratio."""
    heads, listed = layout(rows, model_path)
    # Two spaces before what is longest in a column.
    table = [heads, *(line for _, lines in listed for line in lines)]
    widths = [2 + max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [f"{model_path}: measured; difference to the upper bound with its 95 % interval; published"]
    ratio = None
    for key, cells in listed:
        if key[1] != ratio:
            ratio = key[1]
            lines += ["", _ratio(key), _line(heads, widths)]
        lines += [_line(line, widths) for line in cells]
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return f"{cells[0]:{widths[0]}}" + "".join(f"{c:>{w}}" for c, w in zip(cells[1:], widths[1:], strict=True))


def as_markdown(rows: Rows, model_path: str) -> str:
    """Write the table in Markdown, the ratio in a column."""
    heads, listed = layout(rows, model_path)
    lines = [["R", *heads], ["---:", "---", *["---:"] * (len(heads) - 1)]]
    for key, (measured, *others) in listed:
        ratio = "" if key[1] == OWN else f"{key[1]:g}"
        lines += [[ratio, f"`{measured[0]}`", *measured[1:]], *(["", line[0].strip(), *line[1:]] for line in others)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def as_records(rows: Rows, model_path: str) -> Iterator[dict[str, Any]]:
    """Yield one record, with `FIELDS`, for every method, ratio and benchmark; `average` is like a benchmark."""
    for key, row in rows.items():
        printed = figures(model_path, key)
        same = {"method": key[0], "retention_ratio": "" if key[1] == OWN else key[1]}
        for name in shown(rows):
            spread = row["differences"].get(name)
            more = {"difference": spread.value, "low": spread.low, "high": spread.high} if spread else {}
            measured = {"n": row["n"].get(name), "score": row["scores"].get(name), "seconds": row["seconds"].get(name)}
            state = {"published": printed.get(name), "state": _state(row, name)}
            yield {**same, "benchmark": name, **measured, **more, **state}
        average = {"n": row["averaged"], "score": row["average"], "published": printed.get("average"), "state": "ok"}
        if row["average"] is not None:
            yield {**same, "benchmark": "average", **average}


def as_json(rows: Rows, model_path: str) -> dict[str, Any]:
    """Return the table as plain data."""
    listed = [
        {"method": key[0], "retention_ratio": key[1], "published": figures(model_path, key), **row}
        | {"differences": {name: found._asdict() for name, found in row["differences"].items()}}
        for key, row in rows.items()
    ]
    return {"model_path": model_path, "columns": shown(rows), "rows": listed}


def _spread(found: Interval | None) -> str:
    return "" if found is None else f"{found.value:+.1f} [{found.low:+.1f},{found.high:+.1f}]"


def _clock(seconds: float | None) -> str:
    return "-" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = OneLineParser(prog="llava.eval.table", description=(__doc__ or "").split("\n")[0])
    add_run_arguments(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--markdown", action="store_true", help="print a table in Markdown")
    form.add_argument("--csv", action="store_true", help="print one line for every method, ratio and benchmark")
    return parser


def main() -> None:
    """Run the command."""
    args = build_parser().parse_args()
    found = collect(args.root, args.data or args.root, args.model_path, args.cells)
    rows, model_path = compare(found), found.runs[0].model_path
    notes = [*remarks(found), *(beside(args.cells) if args.cells else [])]
    if args.json:
        print(json.dumps({**as_json(rows, model_path), "notes": notes}))
        return
    if args.csv:
        out = csv.DictWriter(sys.stdout, FIELDS, lineterminator="\n")
        out.writeheader()
        out.writerows(as_records(rows, model_path))
    else:
        print((as_markdown if args.markdown else as_text)(rows, model_path))
        print()
    # In a table for programs they would be in the way.
    for note in notes:
        print(f"note: {note}", file=sys.stderr if args.csv else sys.stdout)


if __name__ == "__main__":
    run_command(main)
