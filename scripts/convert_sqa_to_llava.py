"""Turn ScienceQA into LLaVA's question format: `convert_to_llava --base-dir D --split test --prompt-format CQM-A`.

A format is what is asked, a dash, and what is answered. Asked: C context, Q question, M choices. Answered: L lecture, E
explanation, A the answer; alone, A is the bare letter, as in the published llava_test_CQM-A.json.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.constants import InputError
from llava.eval.benchmarks._common import official, write_json
from llava.eval.benchmarks.scienceqa import IMAGE, LETTERS, PROBLEM, ScienceQA, read_problems, read_split
from llava.schema import NAME_OR_NONE, TEXT
from llava.utils import OneLineParser, run_command

Problem = dict[str, Any]
LAYOUT = {**PROBLEM, "question": TEXT, "hint?": TEXT, "image?": NAME_OR_NONE, "lecture?": TEXT, "solution?": TEXT}


def asked(problem: Problem, order: str) -> str:
    """Return the question's parts in the order of `order`; an empty context has no line."""
    choices = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, problem["choices"], strict=False)]
    context = [f"Context: {problem['hint']}"] if problem.get("hint") else []
    parts = {"C": context, "Q": [problem["question"]], "M": choices}
    return "\n".join(line for part in order for line in parts[part])


def answered(problem: Problem, order: str) -> str:
    """Return the answer's parts in the order of `order`, empty ones left out."""
    letter = LETTERS[problem["answer"]]
    if order == "A":
        return letter
    parts = {"L": problem.get("lecture"), "E": problem.get("solution"), "A": f"The answer is {letter}."}
    return " ".join(said.strip() for part in order if (said := parts[part]))


def convert(key: str, problem: Problem, prompt_format: str) -> Problem:
    """Return one entry of LLaVA's list."""
    question, _, answer = prompt_format.partition("-")
    text = asked(problem, question)
    entry: Problem = {"id": key}
    if problem.get("image"):
        entry["image"] = f"{key}/{problem['image']}"
        text = f"{IMAGE}\n{text}"
    said = {"from": "human", "value": text}, {"from": "gpt", "value": answered(problem, answer)}
    return {**entry, "conversations": list(said)}


def convert_to_llava(base_dir: str | Path, split: str, prompt_format: str = "QCM-LEA") -> Path:
    """Write `llava_<split>_<format>.json` beside ScienceQA's files and return its path.

    Args:
        base_dir: folder of `problems.json` and `pid_splits.json`.
        split: key of the latter, such as `test`.
        prompt_format: such as `CQM-A`.

    Raises:
        InputError: a file or the split is missing, or there is no such format.
    """
    question, _, answer = prompt_format.partition("-")
    if not question or not answer or set(question) - set("CQM") or set(answer) - set("LEA"):
        raise InputError(f"unknown prompt format {prompt_format!r}; put letters of QCM, a dash, letters of LEA")
    base = Path(base_dir)
    with official(base / "pid_splits.json", ScienceQA.source):
        wanted = read_split(base / "pid_splits.json", split)
    with official(base / "problems.json", ScienceQA.source):
        problems = read_problems(base / "problems.json", wanted, layout=LAYOUT)
    entries = [convert(key, problems[key], prompt_format) for key in wanted]
    print(f"Number of samples: {len(entries)}")
    return write_json(base / f"llava_{split}_{prompt_format}.json", entries, 2)[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = OneLineParser(prog="convert_sqa_to_llava.py", description=(__doc__ or "").split(":")[0])
    parser.add_argument("task", nargs="?", choices=["convert_to_llava"], default="convert_to_llava")
    parser.add_argument("--base-dir", type=Path, required=True, help="ScienceQA's folder")
    parser.add_argument("--split", required=True, help="train, val, minival, test or minitest")
    parser.add_argument("--prompt-format", default="QCM-LEA")
    args = parser.parse_args(argv)
    convert_to_llava(args.base_dir, args.split, args.prompt_format)


if __name__ == "__main__":
    run_command(main)
