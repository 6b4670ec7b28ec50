"""Turn answers into the predictions file of GQA's own eval.py: `--src answers.jsonl --dst predictions.json`."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.eval.benchmarks.base import read_jsonl
from llava.eval.benchmarks.gqa import export_predictions
from llava.utils import OneLineParser, run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = OneLineParser(prog="convert_gqa_for_eval.py", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--src", type=Path, required=True, help="answers")
    parser.add_argument("--dst", type=Path, required=True, help="predictions, written")
    args = parser.parse_args(argv)
    export_predictions(read_jsonl(args.src), args.dst)


if __name__ == "__main__":
    run_command(main)
