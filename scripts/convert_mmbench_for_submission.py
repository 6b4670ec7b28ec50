"""Turn MMBench answers into the server's table: `--annotation-file T --result-dir R --upload-dir U --experiment E`.

Reads R/E.jsonl, writes U/E.xlsx.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.eval.benchmarks._mmbench_table import export_table
from llava.eval.benchmarks.base import read_jsonl
from llava.eval.benchmarks.mmbench import MMBench
from llava.utils import OneLineParser, run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = OneLineParser(prog="convert_mmbench_for_submission.py", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--annotation-file", type=Path, required=True, help="the table of questions")
    parser.add_argument("--result-dir", type=Path, required=True, help="folder of the answers")
    parser.add_argument("--upload-dir", type=Path, required=True, help="folder of the submission, written")
    parser.add_argument("--experiment", required=True, help="name of the run")
    args = parser.parse_args(argv)
    rows = read_jsonl(args.result_dir / f"{args.experiment}.jsonl")
    export_table(rows, args.annotation_file, args.upload_dir / f"{args.experiment}.xlsx", MMBench.source)


if __name__ == "__main__":
    run_command(main)
