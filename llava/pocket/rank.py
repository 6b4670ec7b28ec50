"""Rank methods on the pocket benchmark: `python -m llava.pocket.rank --root OUT`, a table in Markdown.

A method's score at a ratio is its mean over the ten tasks, on the gates' scale. Tasks share scenes, so scenes are drawn
with replacement, each with all questions of all tasks about it; two methods are compared draw by draw.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava.constants import InputError
from llava.eval.benchmarks._mmbench import ROTATION
from llava.eval.benchmarks.base import read_jsonl
from llava.eval.benchmarks.pope import judge
from llava.eval.cells import OWN, Key
from llava.eval.intervals import LEVEL, RESAMPLES, Interval
from llava.eval.published import COLUMNS, UPPER
from llava.eval.runs import Run, add_run_arguments, collect
from llava.pocket.gates import percent
from llava.utils import OneLineParser, run_command

Sums = NDArray[np.float64]
"""`[10, S, 2]`: of every task and scene, the sum of its questions' scores in percent, and their number."""


def per_question(run: Run, data: Path) -> Mapping[Any, float]:
    """Return what every question adds to `gates.percent`, whose value is the mean."""
    if run.benchmark == "pope":
        folder = data / "pope"
        judged, _ = judge(read_jsonl(run.answers), folder / "llava_pope_test.jsonl", folder / "coco")
        outcomes = ((key, name, one) for name, category in judged.items() for key, one in category.outcomes.items())
        return {(key, name): 100.0 * (not (one.fp or one.fn)) for key, name, one in outcomes}
    scale = percent(run.result) / run.value if run.value else 1.0
    return {key: scale * value for key, value in run.result.per_question.items()}


def scene_of(task: str, key: Any, truth: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the number of the scene a question is about.

    Args:
        task: name of the benchmark.
        key: of the question, as in `Result.per_question`.
        truth: the task's part of `truth.json`.
    """
    if task == "mme":  # category and picture
        return int(key[1])
    name = key[0] if isinstance(key, tuple) else key
    if task == "textvqa":  # the questions about a picture share its name
        return int(str(name), 16)
    return int(truth[str(int(name) % ROTATION) if task.startswith("mmbench") else str(name)]["scene"])


def add_up(runs: Sequence[Run], data: Path) -> dict[Key, Sums]:
    """Sum the scores of every method and ratio that has answered all ten tasks, by task and scene.

    Raises:
        InputError: there is no such method.
    """
    truth = json.loads((data / "truth.json").read_text())
    scenes = 1 + max(one["scene"] for task in truth.values() for one in task.values())
    found: dict[Key, Sums] = {}
    complete: dict[Key, set[str]] = {}
    for run in (run for run in runs if run.benchmark in COLUMNS):  # there may be more benchmarks than tasks
        sums = found.setdefault(run.key, np.zeros((len(COLUMNS), scenes, 2)))
        complete.setdefault(run.key, set()).add(run.benchmark)
        for key, value in per_question(run, data).items():
            sums[COLUMNS.index(run.benchmark), scene_of(run.benchmark, key, truth[run.benchmark])] += value, 1
    whole = {key: sums for key, sums in found.items() if len(complete[key]) == len(COLUMNS)}
    if not whole:
        raise InputError("no method has answered all ten tasks; run scripts/v1_5/eval/pocket.sh first")
    return whole


def mean_of_tasks(sums: Sums, times: NDArray[Any]) -> NDArray[np.float64]:
    """Return the mean over tasks `[D]` of D draws of scenes, `times [D, S]` saying how often each came up.

    A draw without a single question of some task has none: NaN.
    """
    drawn = times @ sums  # [10, D, 2]
    with np.errstate(invalid="ignore"):
        means: NDArray[np.float64] = (drawn[..., 0] / drawn[..., 1]).mean(0)
    return means


def compare(ours: Sums, theirs: Sums | None = None, seed: int = 0) -> Interval:
    """Return the mean over tasks, or how far it lies above another's, with its 95 % interval over scenes.

    Args:
        ours: of one method.
        theirs: of another that answered the same questions.
        seed: of the draws; the same seed gives the same interval.
    """
    scenes = ours.shape[1]
    times = np.random.default_rng(seed).multinomial(scenes, np.full(scenes, 1 / scenes), size=RESAMPLES)
    times = np.vstack((np.ones(scenes), times))  # first what was measured, then the draws
    means = mean_of_tasks(ours, times) - (0 if theirs is None else mean_of_tasks(theirs, times))
    drawn = means[1:][np.isfinite(means[1:])]
    drawn = drawn if len(drawn) else np.array([np.nan])
    low, high = np.percentile(drawn, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(float(means[0]), float(low), float(high), int(ours[..., 1].sum()))


def as_markdown(found: Mapping[Key, Sums], against: str) -> str:
    """Lay out means, the best first at the smallest ratio, and differences to one method, ratio by ratio.

    Raises:
        InputError: that method was not run.
    """
    ratios = sorted({ratio for _, ratio in found if OWN < ratio < 1}, reverse=True)
    if not any((against, ratio) in found for ratio in ratios):
        raise InputError(f"{against} has not answered all ten tasks; give another method with --against")
    scores = {key: compare(sums) for key, sums in found.items()}
    methods = {method for method, ratio in found if ratio in ratios}
    # Methods that cannot come down to the smallest ratio are ranked among themselves, at the next, behind the others.
    order = sorted(methods, key=lambda m: [-scores[m, r].value if (m, r) in scores else 0 for r in ratios[::-1]])
    lines = ["| | " + " | ".join(f"R = {ratio:g} | − {against}" for ratio in ratios) + " |"]
    lines.append("|---|" + "---:|---:|" * len(ratios))
    if UPPER in found:
        lines.append(f"| {UPPER[0]}, R = 1 | {_said(scores[UPPER])} |" + " |" * (2 * len(ratios) - 1))
    for method in (method for method, ratio in found if ratio == OWN):
        cells = [_said(scores[method, OWN])]
        for ratio in ratios:
            here = (against, ratio) in found
            cells += [_said(compare(found[method, OWN], found[against, ratio]), "+") if here else "", ""]
        lines.append(f"| {method}, its own R | " + " | ".join(cells[:-1]) + " |")
    for method in order:
        cells = []
        for ratio in ratios:
            own, other = (method, ratio), (against, ratio)
            cells.append(_said(scores[own]) if own in found else "–")
            both = own in found and other in found and own != other
            cells.append(_said(compare(found[own], found[other]), "+") if both else "")
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _said(found: Interval, sign: str = "") -> str:
    return f"{found.value:{sign}.1f} [{found.low:{sign}.1f}, {found.high:{sign}.1f}]"


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = OneLineParser(prog="llava.pocket.rank", description=(__doc__ or "").split(":")[0])
    add_run_arguments(parser)
    parser.add_argument("--against", default="globalcom2", help="method the others are compared with")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main() -> None:
    """Run the command."""
    args = build_parser().parse_args()
    data = args.data or args.root
    collected = collect(args.root, data, args.model_path, args.cells)
    sys.stderr.write("".join(f"note: {note}\n" for note in collected.notes))
    found = add_up(collected.runs, data)
    if not args.json:
        print(as_markdown(found, args.against))
        return
    rows = [{"method": m, "retention_ratio": ratio, **compare(s)._asdict()} for (m, ratio), s in found.items()]
    print(json.dumps(rows))


if __name__ == "__main__":
    run_command(main)
