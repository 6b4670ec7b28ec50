"""Which benchmarks' data are there: `python -m llava.eval.check_data --data playground/data/eval`.

Says of every file what it must contain and where it officially comes from, counts what is in it, and looks for every
picture that a question is about. With `--benchmark` it only looks whether one benchmark's files are there and is silent
if they are, as scripts want it, which run on parts of a benchmark too. Exit code 2 if anything is missing or short.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from json import JSONDecodeError
from pathlib import Path

from llava.constants import InputError
from llava.eval import benchmarks
from llava.eval.benchmarks._common import official
from llava.eval.benchmarks.base import Benchmark, Question, filled
from llava.reading import parse_json, read_text
from llava.utils import OneLineParser, run_command

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
AMISS = ("MISSING", "SHORT", "DAMAGED")
# Keys under which annotation files have their list.
LISTS = ("annotations", "data", "questions")


def promised(content: str) -> int | None:
    """Return the number with which the description of a file's content begins; None: it says no number."""
    found = re.match(r"\d+\b", content)
    return int(found[0]) if found else None


def account(benchmark: Benchmark, data: Path) -> list[str]:
    """Return a line for each of a benchmark's files, and one for pictures that questions name and that are not there.

    Args:
        benchmark: whose files.
        data: its folder.
    """
    lacking, questions = benchmark.lacking(data), list[Question]()
    lines = [f"{benchmark.name}: {data}"]
    for name, content in benchmark.contents.items():
        try:
            if name == benchmark.question_file and name not in lacking:
                questions = list(benchmark.questions(data / name))
            lines.append(_state(benchmark, data, name, content, lacking, len(questions)))
        except InputError as error:
            lines.append(_line("DAMAGED", f"{name}: {error}"))
    for name, content in benchmark.optional.items():
        lines.append(_line("ok" if filled(data / name) else "not there", f"{name}: {content}"))
    if benchmark.image_folder not in lacking:
        images = {question.file for question in questions if question.file}
        gone = absent(images, data / benchmark.image_folder)
        if gone:
            lines.append(_line("MISSING", f"{len(gone)} of {len(images)} pictures, such as {gone[0]}"))
    return [*lines, _line("from", benchmark.source)]


def _line(state: str, said: str) -> str:
    return f"  {state:9}  {said}"


def _state(benchmark: Benchmark, data: Path, name: str, content: str, lacking: Sequence[str], questions: int) -> str:
    """Return the line of one file or folder that a run needs."""
    if name in lacking:
        return _line("MISSING", f"{name}: {content}")
    wanted, path = promised(content), data / name
    if wanted is None or not path.exists():  # it may be in the folder of its archive
        return _line("ok", f"{name}: {content}")
    number = questions if name == benchmark.question_file else _entries(path, benchmark.source)
    return _line("ok" if number >= wanted else "SHORT", f"{name}: {content}; {number} found")


def _entries(path: Path, source: str) -> int:
    """Count the pictures in a folder, or the entries of a label file: of JSON, or of one JSON object a line.

    Raises:
        InputError: it cannot be read.
    """
    if path.is_dir():
        return sum(1 for _ in _pictures(path))
    with official(path, source):
        text = read_text(path)
        try:
            value = parse_json(text, strict=False)
        except JSONDecodeError:
            return sum(1 for line in text.splitlines() if line.strip() and parse_json(line, strict=False) is not None)
        if isinstance(value, dict):
            value = next((value[name] for name in LISTS if isinstance(value.get(name), list)), value)
        alone = isinstance(value, dict) and "question_id" in value  # the only line of a file with one object a line
        return 1 if alone else len(value)


def _pictures(folder: str | Path) -> Iterator[str]:
    """Yield the pictures in a folder and those inside it. A listing says what is a file: nothing else is looked at."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _pictures(entry.path)
            elif entry.name.lower().endswith(PICTURES):
                yield entry.name


def absent(images: Iterable[str], folder: Path) -> list[str]:
    """Return the pictures that are not in a folder, in alphabetical order; every folder is listed once.

    Args:
        images: relative to the folder.
        folder: of all pictures.
    """
    there: dict[str, set[str]] = {}
    gone = []
    for image in images:
        parent, name = os.path.split(image)
        if parent not in there:
            there[parent] = _files(folder / parent)
        # Some file systems know a file by other names than the one that is listed.
        if name not in there[parent] and not (folder / image).is_file():
            gone.append(image)
    return sorted(gone)


def _files(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):
        return set()


def check(name: str, root: Path) -> None:
    """Make sure that a benchmark's data are there.

    Raises:
        InputError: they are not; the message names the first missing file and where to get it.
    """
    benchmark = benchmarks.get(name)
    data = root / benchmark.folder
    if lacking := benchmark.lacking(data):
        more = f" and {len(lacking) - 1} more" if lacking[1:] else ""
        raise InputError(f"{name} lacks {data / lacking[0]}{more}; get it from {benchmark.source}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = OneLineParser(prog="llava.eval.check_data", description="Which benchmarks' data are there.")
    parser.add_argument("--data", type=Path, default=Path("playground/data/eval"), help="folder of the benchmarks")
    parser.add_argument("--benchmark", help="look for this one's files alone, and say nothing if all are there")
    args = parser.parse_args(argv)
    if args.benchmark:
        check(args.benchmark, args.data)
        return
    accounts = [account(b, args.data / b.folder) for b in map(benchmarks.get, benchmarks.available())]
    print("\n\n".join("\n".join(lines) for lines in accounts))
    amiss = tuple(f"  {word}" for word in AMISS)
    complete = sum(not any(line.startswith(amiss) for line in lines) for lines in accounts)
    print(f"\n{complete} of {len(accounts)} complete")
    if complete < len(accounts):
        raise SystemExit(2)


if __name__ == "__main__":
    run_command(main)
