"""Compare lmms-eval's own `llava` model with `llava.eval`; by hand, not by pytest, as lmms-eval is no dependency.

In an environment where this package is installed, `pip install "lmms-eval==0.7.3" "filelock<3.30"`; then

`PYTHONPATH=. python tests/compare_lmms_eval.py [--data DIR] [--questions 8] [--batch-sizes 1 4]` asks the first
questions of every pocket benchmark through the engine of `llava.eval.answer` and through lmms-eval's wrapper, as it
is installed, and prints one line per batch size. Exit code 1: some answers differ; they are printed.
lmms-eval casts pixels to float16 before it hands them over, which `llava.eval` does not.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval import benchmarks
from llava.eval.benchmarks.base import Question
from llava.eval.engine import Engine
from llava.eval.pictures import Pictures, Source
from llava.mm_utils import load_image, load_image_from_base64

TEMPLATE = "vicuna_v1"
Asked = tuple[str, Question, Path]


def first_questions(data: Path, number: int) -> list[Asked]:
    """Return benchmark, question and image folder of the first questions of every benchmark."""
    asked: list[Asked] = []
    for name in benchmarks.available():
        benchmark = benchmarks.get(name)
        folder = data / benchmark.folder
        questions = list(benchmark.questions(folder / benchmark.question_file))[:number]
        asked += [(name, question, folder / benchmark.image_folder) for question in questions]
    return asked


def our_answers(model_path: str, asked: Sequence[Asked], max_new_tokens: int) -> list[str]:
    """Answer with the engine of `llava.eval.answer`."""
    from llava.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model(model_path, device="cpu")
    engine = Engine(tokenizer, model, conv_mode=TEMPLATE, max_new_tokens=max_new_tokens)
    stream = []
    for index, (_, question, folder) in enumerate(asked):
        picture = Pictures(folder, processor, model.config)[Source(index, question.image, question.data)]
        stream.append((picture, [engine.ask(index, question)]))
    return [answer.text for answer in sorted(engine.answer(stream), key=lambda answer: answer.index)]


def their_answers(model_path: str, asked: Sequence[Asked], max_new_tokens: int, batch_size: int) -> list[str]:
    """Answer with lmms-eval's wrapper."""
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.simple.llava import Llava

    wrapper = Llava(model_path, device="cpu", device_map="auto", conv_template=TEMPLATE, batch_size=batch_size)
    wrapper.task_dict = {"pocket": {"test": dict(enumerate(asked))}}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=(question.text, {"max_new_tokens": max_new_tokens}, visuals, index, "pocket", "test"),
            idx=0,
            metadata={"task": "pocket", "doc_id": index, "repeats": 1},
        )
        for index, (_, question, _) in enumerate(asked)
    ]
    return [text.strip() for text in wrapper.generate_until(requests)]


def visuals(asked: Asked) -> list[Any]:
    """Return the pictures of a question, as a task of lmms-eval does."""
    _, question, folder = asked
    if question.data is not None:
        return [load_image_from_base64(question.data).convert("RGB")]
    return [] if question.image is None else [load_image(folder / question.image)]


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model-path", default="playground/pocket")
    parser.add_argument("--data", type=Path, default=Path("playground/data/pocket"))
    parser.add_argument("--questions", type=int, default=8, help="of every benchmark")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--max-new-tokens", type=int, default=16)
    args = parser.parse_args()
    asked = first_questions(args.data, args.questions)
    ours = our_answers(args.model_path, asked, args.max_new_tokens)
    differ = 0
    for batch_size in args.batch_sizes:
        theirs = their_answers(args.model_path, asked, args.max_new_tokens, batch_size)
        unlike = [(*item[:2], a, b) for item, a, b in zip(asked, ours, theirs, strict=True) if a != b]
        print(f"batch size {batch_size}: {len(asked) - len(unlike)} of {len(asked)} answers are equal")
        for name, question, a, b in unlike:
            print(f"  {name} {question.id!r}: llava.eval {a!r}, lmms-eval {b!r}")
        differ += len(unlike)
    sys.exit(differ > 0)


if __name__ == "__main__":
    main()
