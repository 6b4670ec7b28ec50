"""Answer a question file: `python -m llava.eval.answer --benchmark NAME --question-file F --image-folder D …`.

Resumable, batched image by image, on one process or many (torchrun, accelerate). Upstream's `model_vqa*` modules are
thin doors to it. Exit code 3: the run finished, but some questions could not be asked; their rows say why.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import shortuuid
import torch.distributed as dist
from tqdm import tqdm

from llava.compress.base import Compressor
from llava.constants import InputError
from llava.conversation import check_template
from llava.efficiency.methods import check_reach
from llava.efficiency.shapes import from_config
from llava.eval import benchmarks
from llava.eval.account import Tally, summary
from llava.eval.benchmarks.base import Question, Row
from llava.eval.engine import Answer, Asked, Engine
from llava.eval.journal import Journal, prompt_of
from llava.eval.pictures import (
    WORKERS,
    WORTHWHILE,
    Picture,
    Pictures,
    Source,
    check_paths,
    stream,
    worker_count,
)
from llava.eval.ranks import Ranks
from llava.eval.record import configuration
from llava.eval.resume import kept_said, make_plan
from llava.eval.sample import sample
from llava.eval.start import start_line
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


def select_questions(args: argparse.Namespace) -> tuple[list[Question], list[int]]:
    """Read the questions of the run's chunk, and say which of them it answers: the first up to the limit.

    Returns:
        The questions, and places among them.

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
    asked = questions[: args.limit]
    if not asked:
        raise InputError(f"{str(file)!r} has no questions")
    folder = Path(args.image_folder)
    if not folder.is_dir() and any(question.file is not None for question in asked):
        raise InputError(f"there is no image folder {str(folder)!r}; see scripts/v1_5/eval/check_data.sh")
    if not args.allow_outside:
        check_paths(asked, folder)
    return questions, list(range(len(asked)))


def group_by_image(questions: Sequence[Question], places: Iterable[int]) -> list[list[int]]:
    """Put the places of questions about one picture together, in order of first appearance."""
    groups: dict[Any, list[int]] = {}
    for index in places:
        question = questions[index]
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
        "prompt": prompt_of(question),
        "text": answer.text,
        "answer_id": shortuuid.uuid(),
        "model_id": model_id,
        "metadata": metadata,
    }


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

    A picture or a question that cannot be used is an error in its own row. What goes wrong inside the model is not: a
    defect keeps its traceback, and memory that runs out stops the run, as it would leave every later question out.

    Raises:
        InputError: something the run needs is missing, does not fit or ran out. Nothing was answered then, or what was
            answered before is kept.
    """
    with Ranks(args.num_processes) as ranks:
        # A missing checkpoint is said before anything is written.
        config = read_config(args.model_path)
        method = choose_method(dict(config), args.method, args.retention_ratio, args.profile)
        if not method.fixed:
            method = replace(method, retention_ratio=method.ratio)
        check_template(args.conv_mode)
        questions, wanted = select_questions(args)
        journal = Journal(Path(args.answers_file), configuration(args, config, str(method), questions), questions)
        with kept_said(args, journal, wanted):
            return _run(args, method, journal, wanted, ranks)


def _run(args: argparse.Namespace, method: Compressor, journal: Journal, wanted: list[int], ranks: Ranks) -> Row:
    plan = ranks.first(lambda: make_plan(args, journal, wanted))
    if plan.finished:
        return summary(journal, journal.read().rows) if ranks.rank == 0 else {}
    todo = [place for place in wanted if place not in plan.done]
    groups = [[place] for place in todo] if args.one_by_one else group_by_image(journal.questions, todo)
    workers = worker_count(args.num_workers, len(groups), ranks.world)
    if ranks.world > 1:
        journal.lock.share(ranks)
    # Whether the method can work in this model is said before anything is written, too.
    args = argparse.Namespace(**vars(args) | {"dtype": plan.dtype})
    loaded = load_engine(args, method, ranks.device) if todo else None
    journal.config["dtype"] = plan.dtype
    ranks.wait()  # every process looks before one writes
    ranks.first(lambda: journal.prepare(args.overwrite))
    if ranks.rank == 0:
        started = [start_line(args, loaded[0].model, ranks.world)] if loaded else []
        notes = [*plan.notes, *journal.notes]
        if workers < (args.num_workers or 0):
            notes.append(f"the CPUs are enough for {workers} of --num-workers {args.num_workers}")
        sys.stderr.write("".join([*started, *(f"note: {note}\n" for note in notes)]))
    tally = Tally(ranks)
    if loaded:
        engine, processor = loaded
        model_id = args.model_name or get_model_name_from_path(args.model_path)
        pictures = Pictures(Path(args.image_folder), processor, engine.model.config)
        feed = _feed(engine, pictures, journal.questions, groups, workers, tally)
        before = len(wanted) - len(todo)
        with tqdm(total=len(wanted), initial=before, unit="question", disable=ranks.rank > 0) as bar:
            for answer in engine.answer(feed, one_by_one=args.one_by_one):
                journal.write(answer.index, answer_row(answer, model_id, method))
                tally.update(answers=1, kept=answer.kept, total=answer.total)
                said = f"{tally.images_per_second:.2f} images/s, kept {tally.retention}"
                bar.set_postfix_str(said, refresh=False)
                bar.update(before + tally.answers - bar.n)
            ranks.wait()
            tally.update()
            bar.update(before + tally.answers - bar.n)
    journal.close()
    ranks.wait()
    return _conclude(journal, wanted, tally) if ranks.rank == 0 else {}


def _feed(
    engine: Engine,
    pictures: Pictures,
    questions: Sequence[Question],
    groups: Sequence[Sequence[int]],
    workers: int,
    tally: Tally,
) -> Iterator[tuple[Picture, list[Asked]]]:
    """Yield this process's share of the groups of questions that are to be asked."""
    mine = (source(turn, questions[groups[turn][0]]) for turn in tally.ranks.claim(len(groups), CHUNK))
    for picture in stream(pictures, mine, workers):
        tally.update(images=int(picture.views is not None))
        yield picture, [engine.ask(place, questions[place]) for place in groups[picture.group]]


def _conclude(journal: Journal, wanted: list[int], tally: Tally) -> Row:
    """Merge the answers and sum the run up."""
    rows = journal.merge(wanted)
    if lost := set(wanted) - rows.keys():
        raise InputError(f"{len(lost)} of {len(wanted)} answers are gone from the disk; start the same command again")
    if not tally.answers:  # the account of the run that answered stands
        return summary(journal, rows)
    journal.summarise(done := summary(journal, rows, tally))
    return done


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
    parser.add_argument(
        "--retry-errors",
        action=argparse.BooleanOptionalAction,
        help="ask again what could not be asked (default: where the picture can be read now)",
    )
    parser.add_argument("--overwrite", action="store_true", help="discard the answers there are and start over")
    parser.add_argument("--allow-outside", action="store_true", help="allow pictures outside the image folder")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    add_method_arguments(parser)


def report(found: Row, as_json: bool) -> None:
    """Print the summary of a run; exit with code 3 if questions could not be asked."""
    if not found:  # another process reports
        return
    if as_json:
        print(json.dumps(found))
    else:
        for key, value in found.items():
            print(f"{key:14} {len(value) if key == 'errors' else value}")
        for error in found["errors"]:
            sys.stderr.write(f"could not ask: {error}\n")
    if found["errors"] and not dist.is_torchelastic_launched():  # a launcher would report a crash
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
