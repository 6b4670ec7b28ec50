"""Answer a question file: `python -m llava.eval.answer --benchmark NAME --question-file F --image-folder D …`.

Resumable, batched image by image, on one process or many (torchrun, accelerate). Upstream's `model_vqa*` modules are
thin doors to it. Exit code 3: the run finished, but some questions could not be asked; their rows say why.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import shortuuid
import torch.distributed as dist
from tqdm import tqdm

from llava.compress.base import Compressor
from llava.constants import InputError
from llava.conversation import check_template, conv_templates
from llava.efficiency.methods import check_reach
from llava.efficiency.shapes import from_config
from llava.eval import benchmarks
from llava.eval.benchmarks.base import Question, Row
from llava.eval.engine import Answer, Asked, Engine
from llava.eval.journal import Journal
from llava.eval.pictures import WORKERS, WORTHWHILE, Picture, Pictures, Source, check_paths, stream
from llava.eval.ranks import Ranks
from llava.eval.sample import sample
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import choose_method, load_pretrained_model, read_config
from llava.utils import (
    OneLineParser,
    add_generation_arguments,
    add_method_arguments,
    add_model_arguments,
    at_least,
    load_options,
    run_command,
)

# Images a process draws at once from the queue it shares with the others.
CHUNK = 8
# Options that answers depend on; the others may change between a run and its continuation.
DECISIVE = (
    *("model_path", "model_base", "vision_tower", "dtype", "load_8bit", "load_4bit", "conv_mode", "benchmark"),
    *("temperature", "top_p", "num_beams", "max_new_tokens", "num_chunks", "chunk_idx", "image_folder"),
    *("single_pred_prompt", "all_rounds", "lang", "no_ocr", "sample"),
)


class Tally:
    """What the processes of a run did so far, all together, for the bar and the summary."""

    def __init__(self, ranks: Ranks) -> None:
        """Start the clock."""
        self.ranks, self.start = ranks, time.monotonic()
        self.update()

    def update(self, answers: int = 0, images: int = 0, kept: int = 0, total: int = 0) -> None:
        """Add what this process did, and learn what the others did."""
        self.answers = self.ranks.count("answers", answers)
        self.images = self.ranks.count("images", images)
        self.kept = self.ranks.count("kept", kept)
        self.total = self.ranks.count("total", total)

    @property
    def seconds(self) -> float:
        """Time since the model was there."""
        return time.monotonic() - self.start

    @property
    def retention(self) -> float | None:
        """Share of the visual tokens that the language model saw so far."""
        return round(self.kept / self.total, 4) if self.total else None

    @property
    def images_per_second(self) -> float:
        """Pictures taken in per second."""
        return self.images / max(self.seconds, 1e-9)


def select_questions(args: argparse.Namespace) -> list[Question]:
    """Read the questions this run answers: of all or a sample the chunk, cut at the limit.

    Raises:
        InputError: the file is unreadable, the chunk does not exist, or a picture lies outside the image folder.
    """
    options = {"single_pred_prompt": args.single_pred_prompt, "all_rounds": args.all_rounds, "ocr": not args.no_ocr}
    if args.lang:
        options["lang"] = args.lang
    file = Path(args.question_file)
    if not file.is_file():
        raise InputError(f"there is no question file {str(file)!r}; see scripts/v1_5/eval/check_data.sh")
    questions = list(benchmarks.get(args.benchmark).questions(file, **options))
    questions = sample(questions, benchmarks.get(args.benchmark), args.sample)
    size = -(-len(questions) // args.num_chunks)
    if not 0 <= args.chunk_idx < max(1, -(-len(questions) // max(1, size))):
        raise InputError(f"--chunk-idx {args.chunk_idx} is past the last of {args.num_chunks} chunks")
    questions = questions[args.chunk_idx * size : (args.chunk_idx + 1) * size]
    questions = list(islice(questions, args.limit))
    if not questions:
        raise InputError(f"{str(file)!r} has no questions")
    folder = Path(args.image_folder)
    if not folder.is_dir() and any(q.image is not None and q.data is None for q in questions):
        raise InputError(f"there is no image folder {str(folder)!r}; see scripts/v1_5/eval/check_data.sh")
    if not args.allow_outside:
        check_paths(questions, folder)
    return questions


def group_by_image(questions: Sequence[Question]) -> list[list[int]]:
    """Put the indices of questions about one picture together, in order of first appearance."""
    groups: dict[Any, list[int]] = {}
    for index, question in enumerate(questions):
        alone = question.image is None and question.data is None
        groups.setdefault((index,) if alone else question.image or question.data, []).append(index)
    return list(groups.values())


def source(group: int, question: Question) -> Source:
    """Say where the picture of a group of questions comes from, given one of them."""
    return Source(group, question.image, question.data)


def answer_row(answer: Answer, model_id: str, method: Compressor) -> Row:
    """Return an answer as a line of the answers file."""
    question = answer.question
    metadata: Row = {"method": str(method), "retention_ratio": method.retention_ratio}
    metadata |= {"visual_tokens": answer.kept, "total_visual_tokens": answer.total}
    if question.image:
        metadata["image"] = question.image
    if answer.error:
        metadata["error"] = answer.error
    return {
        "question_id": question.id,
        **question.extra,
        "prompt": question.text if question.prompt is None else question.prompt,
        "text": answer.text,
        "answer_id": shortuuid.uuid(),
        "model_id": model_id,
        "metadata": metadata,
    }


def configuration(args: argparse.Namespace, method: str) -> Row:
    """Return everything answers depend on, as the record beside the answers file keeps it."""
    digest = hashlib.sha256(Path(args.question_file).read_bytes()).hexdigest()
    return {"method": method, "questions": digest, **{name: getattr(args, name) for name in DECISIVE}}


def load_engine(args: argparse.Namespace, method: Any, device: str) -> tuple[Engine, Any]:
    """Load the model; returns its engine and its image processor.

    Raises:
        InputError: there is no such model, or the method cannot work in it.
    """
    options = {**load_options(args), "device": args.device if args.device not in (None, "cuda") else device}
    tokenizer, model, processor, _ = load_pretrained_model(args.model_path, args.model_base, **options)
    if processor is None:
        raise InputError(f"{args.model_path!r} is a language model without vision; give a LLaVA checkpoint")
    model.method = method
    check_reach(from_config(model.config.to_dict(), args.model_path), method)
    generation = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams}
    if args.temperature > 0:
        generation |= {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    engine = Engine(tokenizer, model, batch=args.batch_size, conv_mode=args.conv_mode, **generation)
    return engine, processor


def run(args: argparse.Namespace) -> Row:
    """Answer a question file; returns the summary.

    Raises:
        InputError: something the run needs is missing or does not fit. Nothing was answered then, unless it is a
            picture for which the method cannot do what it is asked to: what was answered before is kept.
    """
    with Ranks(args.num_processes) as ranks:
        # A missing checkpoint is said before anything is written.
        method = choose_method(read_config(args.model_path), args.method, args.retention_ratio, args.profile)
        if not method.fixed:
            method = replace(method, retention_ratio=method.ratio)
        if args.conv_mode not in (None, *conv_templates):
            raise InputError(
                f"unknown conversation template {args.conv_mode!r}; choose from {', '.join(conv_templates)}"
            )
        check_template(args.conv_mode)
        questions = select_questions(args)
        journal = Journal(Path(args.answers_file), configuration(args, str(method)))
        if not args.overwrite:
            journal.check()
        answered = journal.answered() if ranks.rank == 0 and not args.overwrite else set()
        done = ranks.share({i for i in answered if i < len(questions)})
        # Whether the method can work in this model is said before anything is written, too.
        loaded = load_engine(args, method, ranks.device) if len(done) < len(questions) else None
        ranks.wait()  # every process looks before one writes
        if ranks.rank == 0:
            journal.prepare(args.overwrite)
        ranks.wait()
        tally = Tally(ranks)
        if loaded:
            engine, processor = loaded
            model_id = args.model_name or get_model_name_from_path(args.model_path)
            feed = _feed(args, questions, done, engine, processor, ranks, tally)
            with tqdm(total=len(questions), initial=len(done), unit="question", disable=ranks.rank > 0) as bar:
                for answer in engine.answer(feed, one_by_one=args.one_by_one):
                    journal.write(answer.index, answer_row(answer, model_id, method))
                    tally.update(answers=1, kept=answer.kept, total=answer.total)
                    said = f"{tally.images_per_second:.2f} images/s, kept {tally.retention}"
                    bar.set_postfix_str(said, refresh=False)
                    bar.update(len(done) + tally.answers - bar.n)
                ranks.wait()
                tally.update()
                bar.update(len(done) + tally.answers - bar.n)
        journal.close()
        ranks.wait()
        return _conclude(args, journal, len(questions), tally) if ranks.rank == 0 else {}


def _feed(
    args: argparse.Namespace,
    questions: Sequence[Question],
    done: set[int],
    engine: Engine,
    processor: Any,
    ranks: Ranks,
    tally: Tally,
) -> Iterator[tuple[Picture, list[Asked]]]:
    """Yield this process's share of the groups, without what is answered already."""
    groups = [[i] for i in range(len(questions))] if args.one_by_one else group_by_image(questions)
    todo = [number for number, group in enumerate(groups) if not done.issuperset(group)]
    workers = args.num_workers
    if workers is None:
        workers = WORKERS if len(todo) >= WORTHWHILE * ranks.world else 0
    pictures = Pictures(Path(args.image_folder), processor, engine.model.config)
    mine = (source(todo[turn], questions[groups[todo[turn]][0]]) for turn in ranks.claim(len(todo), CHUNK))
    for picture in stream(pictures, mine, workers):
        tally.update(images=int(picture.views is not None))
        yield picture, [engine.ask(i, questions[i]) for i in groups[picture.group] if i not in done]


def _conclude(args: argparse.Namespace, journal: Journal, wanted: int, tally: Tally) -> Row:
    """Merge the answers and sum the run up."""
    merged = journal.merge()
    if merged < wanted:
        raise RuntimeError(f"{merged} of {wanted} questions have an answer; start the same command again")
    summary = {
        "answers_file": str(journal.file),
        "questions": merged,
        "answered_now": tally.answers,
        "images": tally.images,
        "seconds": round(tally.seconds, 2),
        "method": journal.config["method"],
        "retention": tally.retention,
        "errors": _errors(journal.file),
    }
    if tally.answers:  # a run that found everything done leaves the account of the one that did it
        journal.summarise(summary)
    return summary


def _errors(file: Path) -> list[str]:
    """Return what is recorded as wrong with the questions of an answers file."""
    with file.open(encoding="utf-8") as lines:
        rows = (json.loads(line) for line in lines if '"error"' in line)
        failed = [(row["metadata"].get("error"), row["question_id"]) for row in rows]
    return [f"{error} (question {number!r})" for error, number in failed if error]


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run; both spellings of upstream's flags."""
    add_model_arguments(parser)
    parser.add_argument("--model-name", help="what the answers' model_id says (default: from the path)")
    parser.add_argument("--image-folder", default="", help="folder of the pictures")
    parser.add_argument("--question-file", required=True)
    parser.add_argument("--answers-file", required=True)
    parser.add_argument("--conv-mode", help="conversation template (default: the checkpoint's)")
    parser.add_argument("--num-chunks", type=at_least(1), default=1)
    parser.add_argument("--chunk-idx", type=at_least(0), default=0)
    add_generation_arguments(parser, 128)
    parser.add_argument("--single-pred-prompt", action="store_true")
    parser.add_argument("--all-rounds", action="store_true", help="MMBench: rotate the options")
    parser.add_argument("--lang", help="MMBench: en or cn")
    parser.add_argument("--no-ocr", action="store_true", help="TextVQA: ask without the OCR tokens")
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="questions answered at once")
    parser.add_argument(
        "--num-workers",
        type=at_least(0),
        help=f"processes that load pictures (default: {WORKERS} from {WORTHWHILE} pictures on, else none)",
    )
    parser.add_argument("--num-processes", type=int, help="refuse to run with another number")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--limit", type=at_least(1), help="answer the first N questions only")
    part.add_argument("--sample", type=at_least(1), help="N questions from all categories, always the same ones")
    parser.add_argument("--one-by-one", action="store_true", help="question by question, as LLaVA's own scripts do")
    parser.add_argument("--overwrite", action="store_true", help="discard the answers there are and start over")
    parser.add_argument("--allow-outside", action="store_true", help="allow pictures outside the image folder")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    add_method_arguments(parser)


def report(summary: Row, as_json: bool) -> None:
    """Print the summary of a run; exit with code 3 if questions could not be asked."""
    if not summary:  # another process reports
        return
    if as_json:
        print(json.dumps(summary))
    else:
        for key, value in summary.items():
            print(f"{key:14} {len(value) if key == 'errors' else value}")
        for error in summary["errors"]:
            sys.stderr.write(f"could not ask: {error}\n")
    if summary["errors"] and not dist.is_torchelastic_launched():  # a launcher would report a crash
        raise SystemExit(3)


def _benchmark_of(file: Path) -> str | None:
    """Return the benchmark whose question file has this name."""
    names = {Path(benchmarks.get(name).question_file).name: name for name in benchmarks.available()}
    return names.get(file.name)


def parse(argv: Sequence[str] | None = None, **defaults: Any) -> argparse.Namespace:
    """Parse the command's words; doors set defaults.

    Args:
        argv: words; None: the command line's.
        **defaults: of options, and the `benchmark` a file of unknown name is read as.
    """
    fallback = defaults.pop("benchmark", None)
    parser = OneLineParser(prog="llava.eval.answer", description="Answer a question file, resumably.")
    add_run_arguments(parser)
    known = ", ".join(benchmarks.available()) + (" (default: by the question file's name)" if fallback else "")
    parser.add_argument("--benchmark", required=fallback is None, help=known)
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    args.benchmark = args.benchmark or _benchmark_of(Path(args.question_file)) or fallback
    return args


def main(**defaults: Any) -> None:
    """Run the command; see `parse`."""
    args = parse(**defaults)
    report(run(args), args.json)


if __name__ == "__main__":
    run_command(main)
