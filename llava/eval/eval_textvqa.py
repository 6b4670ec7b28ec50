"""Upstream's TextVQA scorer: `python -m llava.eval.eval_textvqa --annotation-file A --result-file R`."""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llava.constants import InputError
from llava.eval.benchmarks.base import read_jsonl
from llava.eval.benchmarks.textvqa import score_against
from llava.utils import OneLineParser, run_command


def report(annotations: Path, answers: Path) -> None:
    """Print one answers file's name, number of answers and accuracy; what else matters goes to stderr."""
    result = score_against(read_jsonl(answers), annotations)
    print(f"{answers.stem}\nSamples: {result.n}\nAccuracy: {result.metrics['accuracy']:.2f}%\n")
    sys.stderr.write("".join(f"note: {note}\n" for note in result.notes))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = OneLineParser(prog="eval_textvqa.py", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--annotation-file", type=Path, required=True, help="TextVQA_0.5.1_val.json")
    parser.add_argument("--result-file", type=Path, help="answers")
    parser.add_argument("--result-dir", type=Path, help="folder of answers, every .jsonl of which is scored")
    args = parser.parse_args(argv)
    if args.result_file is None and args.result_dir is None:
        raise InputError("there is nothing to score; give --result-file or --result-dir")
    files = [args.result_file] if args.result_file else []
    files += sorted(args.result_dir.glob("*.jsonl")) if args.result_dir else []
    for file in files:
        report(args.annotation_file, file)


if __name__ == "__main__":
    run_command(main)
