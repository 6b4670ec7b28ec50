"""Answer benchmarks with several methods at several ratios in one process: `python -m llava.eval.grid …`.

For a model so small that starting Python for every cell would cost more than answering; `run_grid.sh` is for others.
`llava.eval.table` makes a table of the answers.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from llava.compress import get
from llava.constants import OutOfReach
from llava.eval import answer, benchmarks
from llava.eval.published import COLUMNS, UPPER
from llava.interrupts import kept
from llava.utils import OneLineParser, at_least, ratio_argument, run_command

# What the benchmarks' scripts give besides.
OPTIONS: dict[str, tuple[str, ...]] = {
    "scienceqa": ("--single-pred-prompt",),
    "mmbench": ("--single-pred-prompt",),
    "mmbench_cn": ("--single-pred-prompt", "--lang", "cn"),
}


def cells(methods: Sequence[str], ratios: Sequence[float]) -> list[tuple[str, float]]:
    """Return methods at ratios, after the upper bound all are compared with; where a ratio has no effect, once."""
    found = [UPPER]
    for method in methods:
        follows = get(method).follows_ratio
        found += [(method, ratio) for ratio in ratios if ratio < 1] if follows else [(method, 1.0)]
    return list(dict.fromkeys(found))


def words(args: argparse.Namespace, name: str, method: str, ratio: float) -> Iterator[str]:
    """Yield the answerer's words for one cell."""
    benchmark = benchmarks.get(name)
    data = args.data / benchmark.folder
    label = "".join(c if c.isalnum() or c in ".=-" else "_" for c in f"{method}-{ratio:g}")
    label += f"-first{args.limit}" if args.limit else ""
    yield from ("--benchmark", name, "--model-path", args.model_path, "--method", method)
    yield from ("--question-file", str(data / benchmark.question_file))
    yield from ("--image-folder", str(data / benchmark.image_folder))
    yield from ("--answers-file", str(args.out / benchmark.folder / f"{label}.jsonl"))
    yield from ("--batch-size", str(args.batch_size), "--num-workers", "0")
    yield from ("--max-new-tokens", str(args.max_new_tokens), *OPTIONS.get(name, ()))
    if not get(method).fixed:
        yield from ("--retention-ratio", str(ratio))
    if args.device:
        yield from ("--device", args.device)
    if args.limit:
        yield from ("--limit", str(args.limit))


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = OneLineParser(prog="llava.eval.grid", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of the benchmarks' folders")
    parser.add_argument("--out", type=Path, required=True, help="answers are written here")
    parser.add_argument("--benchmarks", nargs="+", default=COLUMNS, choices=COLUMNS, metavar="NAME")
    parser.add_argument("--methods", nargs="+", default=["globalcom2"], help="names, or calls with fields")
    parser.add_argument("--ratios", nargs="+", type=ratio_argument, default=[0.75, 0.5, 0.25, 0.1])
    parser.add_argument("--limit", type=at_least(1), help="the first N questions of each benchmark only")
    parser.add_argument("--batch-size", type=at_least(1), default=16)
    parser.add_argument("--max-new-tokens", type=at_least(1), default=64)
    parser.add_argument("--device")
    return parser


def run(args: argparse.Namespace) -> None:
    """Answer every cell within its method's reach, saying on stderr what it took."""
    for name, (method, ratio) in product(args.benchmarks, cells(args.methods, args.ratios)):
        cell = f"{name:12} {method:40} {ratio:5.2f}"
        try:
            done = answer.run(answer.parse(list(words(args, name, method, ratio))))
        except OutOfReach as error:
            print(f"{cell} left out: {error}", file=sys.stderr)
            continue
        print(f"{cell} {done['questions']:6d} answers, {done['seconds']:.1f} s", file=sys.stderr)


def main() -> None:
    """Run the command."""
    args = build_parser().parse_args()
    with kept(f"the answers in {str(args.out)!r} are kept; the same command continues"):
        run(args)


if __name__ == "__main__":
    run_command(main)
