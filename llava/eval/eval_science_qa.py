"""Upstream's ScienceQA scorer: `python llava/eval/eval_science_qa.py --base-dir D --result-file R …`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run by path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llava.eval.benchmarks._common import latest, mean, write_json
from llava.eval.benchmarks.base import read_jsonl
from llava.eval.benchmarks.scienceqa import LETTERS, Verdict, coverage, judge
from llava.output import check_output
from llava.utils import OneLineParser, run_command


def analysis(verdict: Verdict, letters: Sequence[str]) -> dict[str, Any]:
    """Return upstream's record of one question."""
    return {
        "question_id": verdict.question_id,
        "parsed_ans": verdict.parsed,
        "ground_truth": letters[verdict.answer],
        "question": verdict.prompt,
        "pred": verdict.text,
        "is_multimodal": verdict.multimodal,
    }


def results(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return upstream's summary: choices by number, -1 for none, and the answers as given."""
    return {
        "acc": 100 * mean(verdict.right for verdict in verdicts),
        "correct": sum(verdict.right for verdict in verdicts),
        "count": len(verdicts),
        "results": {verdict.question_id: verdict.predicted for verdict in verdicts},
        "outputs": {verdict.question_id: verdict.text for verdict in verdicts},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = OneLineParser(prog="eval_science_qa.py", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--base-dir", type=Path, required=True, help="folder of problems.json and pid_splits.json")
    parser.add_argument("--result-file", type=Path, required=True, help="answers")
    parser.add_argument("--output-file", type=Path, required=True, help="right and wrong answers are written here")
    parser.add_argument("--output-result", type=Path, required=True, help="the summary is written here")
    parser.add_argument("--split", default="test")
    parser.add_argument("--options", type=list, default=list(LETTERS), help="letters of the choices, such as ABCDE")
    args = parser.parse_args(argv)
    for output in (args.output_file, args.output_result):
        check_output(output)
    answers, notes = latest(read_jsonl(args.result_file))
    verdicts = judge(answers, args.base_dir, args.split, args.options)
    sides = {side: [v for v in verdicts if v.right == (side == "correct")] for side in ("correct", "incorrect")}
    write_json(args.output_file, {side: [analysis(v, args.options) for v in found] for side, found in sides.items()}, 2)
    summary = results(verdicts)
    write_json(args.output_result, summary, 2)
    image = 100 * mean(verdict.right for verdict in verdicts if verdict.multimodal)
    counted = f"Total: {len(verdicts)}, Correct: {summary['correct']}"
    print(f"{counted}, Accuracy: {summary['acc']:.2f}%, IMG-Accuracy: {image:.2f}%")
    sys.stderr.write("".join(f"note: {note}\n" for note in (*notes, *coverage(verdicts))))


if __name__ == "__main__":
    run_command(main)
