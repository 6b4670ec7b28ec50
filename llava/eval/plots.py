"""Curves as in the paper's figures 1 and 3: `python -m llava.eval.plots --root OUT --output FILE.png [--field alpha]`.

Without `--field`: the relative average (Table I's last column) of every method against the retention ratio. With it:
against a field of a method, such as τ (`temperature`) or α (`alpha`) of GlobalCom², a curve for every ratio.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.compress import get
from llava.constants import InputError
from llava.eval.cells import Key
from llava.eval.published import UPPER
from llava.eval.runs import add_run_arguments, collect
from llava.eval.table import compare
from llava.output import check_output
from llava.utils import OneLineParser, new_figure, run_command, save_figure

Curves = dict[str, list[tuple[float, float]]]
"""Legend -> (x, relative average in percent), x ascending."""


def against_ratio(rows: Mapping[Key, Mapping[str, Any]]) -> Curves:
    """Return a curve for every method; all end at the upper bound.

    Raises:
        InputError: there is no upper bound.
    """
    if UPPER not in rows or rows[UPPER]["average"] is None:
        raise InputError("no run has an upper bound to be drawn against; run METHOD=none as well")
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (method, ratio), row in rows.items():
        if row["average"] is not None and 0 < ratio < 1:
            curves[method].append((100 * ratio, row["average"]))
    top = rows[UPPER]["average"]
    return {method: sorted([*points, (100.0, top)]) for method, points in sorted(curves.items())}


def against_field(rows: Mapping[Key, Mapping[str, Any]], field: str) -> Curves:
    """Return a curve for every ratio, over runs of one method that differ in nothing but `field`.

    Raises:
        InputError: no method has such a field, or it was run with one value only.
    """
    curves: dict[tuple[str, float], list[tuple[float, float]]] = defaultdict(list)
    for (spec, ratio), row in rows.items():
        method = get(spec)
        if row["average"] is None or not isinstance(getattr(method, field, None), int | float):
            continue
        call = ast.parse(spec, mode="eval").body
        others = [ast.unparse(k) for k in call.keywords if k.arg != field] if isinstance(call, ast.Call) else []
        name = f"{method.name}({', '.join(others)})" if others else method.name
        curves[name, ratio].append((float(getattr(method, field)), row["average"]))
    found = {
        f"{name}, R = {ratio:g}": sorted(points) for (name, ratio), points in sorted(curves.items()) if len(points) > 1
    }
    if not found:
        raise InputError(f"no method was run with several values of {field!r}; see llava.eval.grid --methods")
    return found


def draw(curves: Curves, x_label: str, output: Path, logarithmic: bool = False) -> None:
    """Draw curves into a file.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(6, 4)
    axes = figure.add_subplot()
    for legend, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=legend)
    axes.set(xlabel=x_label, ylabel="relative average (%)")
    if logarithmic:
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, output)


def main() -> None:
    """Run the command."""
    parser = OneLineParser(prog="llava.eval.plots", description=(__doc__ or "").split(":")[0])
    add_run_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="PNG, PDF or SVG file")
    parser.add_argument("--field", help="draw against this field of a method instead of the ratio")
    parser.add_argument("--log", action="store_true", help="logarithmic x axis")
    args = parser.parse_args()
    check_output(args.output)
    found = collect(args.root, args.data or args.root, args.model_path, args.cells)
    sys.stderr.write("".join(f"note: {note}\n" for note in found.notes))
    rows = compare(found)
    curves = against_field(rows, args.field) if args.field else against_ratio(rows)
    draw(curves, args.field or "retention ratio (%)", args.output, args.log)
    print(args.output)


if __name__ == "__main__":
    run_command(main)
