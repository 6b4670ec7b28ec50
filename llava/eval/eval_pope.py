"""Upstream's POPE scorer: `python llava/eval/eval_pope.py --annotation-dir D --question-file Q --result-file R`."""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llava.eval.benchmarks.base import read_jsonl
from llava.eval.benchmarks.pope import Category, judge
from llava.utils import OneLineParser, run_command


def lines(name: str, category: Category) -> list[str]:
    """Return upstream's report on a category."""
    counts = category.counts
    measures = counts.f1, counts.accuracy, counts.precision, counts.recall, counts.yes
    return [
        f"Category: {name}, # samples: {len(category.outcomes)}",
        "TP\tFP\tTN\tFN\t",
        "\t".join(map(str, counts)),
        f"Accuracy: {counts.accuracy}",
        f"Precision: {counts.precision}",
        f"Recall: {counts.recall}",
        f"F1 score: {counts.f1}",
        f"Yes ratio: {counts.yes}",
        ", ".join(f"{measure:.3f}" for measure in measures),
        "=" * 36,
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = OneLineParser(prog="eval_pope.py", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--annotation-dir", type=Path, required=True, help="folder of coco_pope_<category>.json")
    parser.add_argument("--question-file", type=Path, required=True)
    parser.add_argument("--result-file", type=Path, required=True, help="answers")
    args = parser.parse_args(argv)
    judged, notes = judge(read_jsonl(args.result_file), args.question_file, args.annotation_dir)
    for name, category in judged.items():
        print("\n".join(lines(name, category)))
    sys.stderr.write("".join(f"note: {note}\n" for note in notes))


if __name__ == "__main__":
    run_command(main)
