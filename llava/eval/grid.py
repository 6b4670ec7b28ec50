"""Answer benchmarks with several methods at several ratios in one process: `python -m llava.eval.grid …`.

For a model so small that starting Python for every cell would cost more than answering; `run_grid.sh` is for others.
`llava.eval.table` makes a table of the answers.
"""

import argparse
import sys
import traceback
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from llava.compress import get
from llava.constants import InputError, OutOfReach
from llava.eval import answer, benchmarks
from llava.eval.cells import Cell, add_grid_arguments, append_cell, cells
from llava.eval.published import COLUMNS, columns
from llava.interrupts import kept
from llava.model.builder import read_config
from llava.utils import OneLineParser, at_least, run_command

# What the benchmarks' scripts give besides.
OPTIONS: dict[str, tuple[str, ...]] = {
    "scienceqa": ("--single-pred-prompt",),
    "mmbench": ("--single-pred-prompt",),
    "mmbench_cn": ("--single-pred-prompt", "--lang", "cn"),
}


def answers_file(args: argparse.Namespace, name: str, method: str, ratio: float) -> Path:
    """Return where the answers of one cell are, under a name that no other cell has."""
    label = "".join(c if c.isalnum() or c in ".=-" else "_" for c in f"{method}-{ratio:g}")
    label += f"-first{args.limit}" if args.limit else f"-sample{args.sample}" if args.sample else ""
    return Path(args.out / benchmarks.get(name).folder / f"{label}.jsonl")


def words(args: argparse.Namespace, name: str, method: str, ratio: float) -> Iterator[str]:
    """Yield the answerer's words for one cell."""
    benchmark = benchmarks.get(name)
    data = args.data / benchmark.folder
    yield from ("--benchmark", name, "--model-path", args.model_path, "--method", method)
    yield from ("--question-file", str(data / benchmark.question_file))
    yield from ("--image-folder", str(data / benchmark.image_folder))
    yield from ("--answers-file", str(answers_file(args, name, method, ratio)))
    yield from ("--batch-size", str(args.batch_size), "--num-workers", "0")
    yield from ("--max-new-tokens", str(args.max_new_tokens), *OPTIONS.get(name, ()))
    if not get(method).fixed:
        yield from ("--retention-ratio", str(ratio))
    if args.device:
        yield from ("--device", args.device)
    if args.limit:
        yield from ("--limit", str(args.limit))
    if args.sample:
        yield from ("--sample", str(args.sample))


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = OneLineParser(prog="llava.eval.grid", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of the benchmarks' folders")
    parser.add_argument("--out", type=Path, required=True, help="answers are written here")
    parser.add_argument("--benchmarks", nargs="+", default=COLUMNS, choices=columns(), metavar="NAME")
    add_grid_arguments(parser)
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--limit", type=at_least(1), help="the first N questions of each benchmark only")
    part.add_argument("--sample", type=at_least(1), help="N questions from all categories of each benchmark")
    parser.add_argument("--cells", type=Path, help="add the cells to this list, which llava.eval.table reads")
    parser.add_argument("--batch-size", type=at_least(1), default=16)
    parser.add_argument("--max-new-tokens", type=at_least(1), default=64)
    parser.add_argument("--device")
    return parser


def run(args: argparse.Namespace) -> int:
    """Answer every cell within its method's reach, saying on stderr what it took; a cell that fails stops no other.

    Returns:
        The number of questions that could not be asked.

    Raises:
        InputError: there is no such model or method, or no data; nothing was answered then. Or cells failed: all
            others were answered.
    """
    read_config(args.model_path)
    if not args.data.is_dir():
        raise InputError(f"there is no folder {str(args.data)!r}; give the folder of the benchmarks' folders")
    wanted = list(product(args.benchmarks, cells(args.methods, args.ratios)))
    failed = unasked = 0
    for name, (method, ratio) in wanted:
        line, why = f"{name:12} {method:40} {ratio:5.2f}", ""
        try:
            done = answer.run(answer.parse(list(words(args, name, method, ratio))))
            errors = len(done.get("errors", ()))
            more = f", {errors} could not be asked" if errors else ""
            print(f"{line} {done['questions']:6d} answers, {done['seconds']:.1f} s{more}", file=sys.stderr)
            unasked += errors
        except OutOfReach as error:
            print(f"{line} left out: {error}", file=sys.stderr)
            continue
        except InputError as error:
            why = str(error)
        except Exception as error:  # hours of other cells are worth more than an early end
            traceback.print_exc()
            why = f"{type(error).__name__}: {error}"
        if why:
            failed += 1
            print(f"{line} failed: {why}", file=sys.stderr)
        if args.cells:
            share = "" if get(method).fixed else f"{ratio}"
            append_cell(args.cells, Cell(name, method, share, "", answers_file(args, name, method, ratio), why))
    if failed:
        raise InputError(f"{failed} of {len(wanted)} cells failed, for the reasons above; the others are answered")
    return unasked


def main() -> None:
    """Run the command; exit code 3 if some questions could not be asked."""
    args = build_parser().parse_args()
    with kept(f"the answers in {str(args.out)!r} are kept; the same command continues"):
        unasked = run(args)
    if unasked:
        raise SystemExit(3)


if __name__ == "__main__":
    run_command(main)
