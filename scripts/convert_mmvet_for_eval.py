"""Turn answers into the file of MM-Vet's grader: `--src answers.jsonl --dst results.json`."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.eval.benchmarks.base import read_jsonl
from llava.eval.benchmarks.mmvet import export_answers
from llava.utils import OneLineParser, run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = OneLineParser(prog="convert_mmvet_for_eval.py", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--src", type=Path, required=True, help="answers")
    parser.add_argument("--dst", type=Path, required=True, help="results, written")
    args = parser.parse_args(argv)
    export_answers(read_jsonl(args.src), args.dst)


if __name__ == "__main__":
    run_command(main)
