"""Turn VizWiz answers into EvalAI's submission: `--annotation-file Q --result-file R --result-upload-file U`."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.eval.benchmarks.base import read_jsonl
from llava.eval.benchmarks.vizwiz import export_test
from llava.utils import OneLineParser, run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = OneLineParser(prog="convert_vizwiz_for_submission.py", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--annotation-file", type=Path, required=True, help="the question file, llava_test.jsonl")
    parser.add_argument("--result-file", type=Path, required=True, help="answers")
    parser.add_argument("--result-upload-file", type=Path, required=True, help="submission, written")
    args = parser.parse_args(argv)
    export_test(read_jsonl(args.result_file), args.annotation_file, args.result_upload_file)


if __name__ == "__main__":
    run_command(main)
