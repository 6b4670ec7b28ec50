"""What a grid consists of: methods at ratios after the upper bound, and the list of its cells that the table reads.

`python -m llava.eval.cells --methods … --ratios …` prints one method and ratio a line, separated by a tab, for
`run_grid.sh`; the ratio is empty where a field of the method stands in for it.
"""

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llava.compress import get
from llava.constants import InputError
from llava.eval.published import UPPER
from llava.output import make_folder, refusing
from llava.utils import OneLineParser, ratio_argument, run_command

Key = tuple[str, float]
"""Method with its fields, and retention ratio."""
OWN = 0.0
"""Stands for the ratio of methods that do not follow one."""
RATIOS = (0.75, 0.5, 0.25, 0.1)


def cells(methods: Sequence[str], ratios: Sequence[float], whole: bool = False) -> list[Key]:
    """Return methods at ratios, after the upper bound all are compared with; where a ratio has no effect, once.

    Args:
        methods: names, or calls with fields.
        ratios: in (0, 1].
        whole: methods at ratio 1 are runs of their own.
    """
    found = [UPPER]
    for method in methods:
        follows = get(method).follows_ratio
        found += [(method, ratio) for ratio in ratios if whole or ratio < 1] if follows else [(method, 1.0)]
    return list(dict.fromkeys(found))


def method_key(spec: str) -> Key:
    """Split a recorded method, as `globalcom2(retention_ratio=0.25)`, into its name with other fields and its ratio.

    Raises:
        InputError: it is no method.
    """
    try:
        call = ast.parse(spec, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("no call")
        fields = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        ratio = float(fields.pop("retention_ratio", 1.0))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise InputError(f"cannot read the recorded method {spec!r}") from error
    rest = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    if not get(f"{call.func.id}({rest})").follows_ratio:
        ratio = 1.0 if call.func.id == UPPER[0] else OWN
    return (f"{call.func.id}({rest})" if rest else call.func.id), ratio


class Cell(NamedTuple):
    """One run that a grid was asked for, as it was asked for."""

    benchmark: str
    method: str
    ratio: str
    profile: str
    answers: Path
    failed: str = ""
    """Why there are no answers; empty: nothing is known of that."""

    @property
    def key(self) -> Key:
        """What the run is called in the table."""
        try:
            ratio = None if get(self.method).fixed else self.ratio or None
            return method_key(str(get(self.method, retention_ratio=ratio, profile=self.profile or None)))
        except InputError:  # it could not run either
            return self.method, OWN


def read_cells(file: Path) -> list[Cell]:
    """Read a list of cells: six fields a line, separated by tabs; of several lines about one file the last counts.

    Raises:
        InputError: the file cannot be read, or a line is no cell.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the list of cells {str(file)!r} ({error}); a grid writes it") from error
    found: dict[str, Cell] = {}
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        if len(fields) != len(Cell._fields):
            raise InputError(f"{str(file)!r}, line {number} is no cell; give a list that a grid wrote")
        name, method, ratio, profile, answers, failed = fields
        found[answers] = Cell(name, method, ratio, profile, Path(answers), failed)
    return list(found.values())


def append_cell(file: Path, cell: Cell) -> None:
    """Add a cell to a list, with all its fields on one line.

    Raises:
        InputError: the machine refuses it.
    """
    make_folder(file.parent)
    with refusing(file), file.open("a", encoding="utf-8") as out:
        out.write("\t".join(" ".join(str(field).split()) for field in cell) + "\n")


def add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which methods run, and at which ratios."""
    parser.add_argument("--methods", nargs="+", default=["globalcom2"], help="names, or calls with fields")
    parser.add_argument("--ratios", nargs="+", type=ratio_argument, default=list(RATIOS))


def main() -> None:
    """Run the command."""
    parser = OneLineParser(prog="llava.eval.cells", description=(__doc__ or "").split("\n")[0])
    add_grid_arguments(parser)
    parser.add_argument("--profile", help="of all methods")
    args = parser.parse_args()
    for method, ratio in cells(args.methods, args.ratios, whole=True):
        # A profile that a method has not got is said before anything runs.
        chosen = get(method, profile=None if (method, ratio) == UPPER else args.profile)
        print(f"{method}\t{'' if chosen.fixed else ratio}")


if __name__ == "__main__":
    run_command(main)
