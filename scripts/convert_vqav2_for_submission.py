"""Turn merged VQAv2 answers into EvalAI's submission: `--dir D --split S --ckpt C`.

Reads D/answers/S/C/merge.jsonl and D/llava_vqav2_mscoco_test2015.jsonl, writes D/answers_upload/S/C.json.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.eval.benchmarks.base import read_jsonl
from llava.eval.benchmarks.vqav2 import FULL_TEST, export_test
from llava.utils import OneLineParser, run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = OneLineParser(prog="convert_vqav2_for_submission.py", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--dir", type=Path, default=Path("playground/data/eval/vqav2"), help="the benchmark's folder")
    parser.add_argument("--ckpt", required=True, help="name of the run")
    parser.add_argument("--split", required=True, help="name of the split, such as llava_vqav2_mscoco_test-dev2015")
    args = parser.parse_args(argv)
    rows = read_jsonl(args.dir / "answers" / args.split / args.ckpt / "merge.jsonl")
    questions = args.dir / FULL_TEST
    export_test(rows, questions, args.dir / "answers_upload" / args.split / f"{args.ckpt}.json")
    print(f"total results: {len(rows)}, total split: {len(read_jsonl(questions))}")


if __name__ == "__main__":
    run_command(main)
