"""Which benchmarks' data are there: `python -m llava.eval.check_data --data playground/data/eval`.

Says of every file what it must contain and where it officially comes from. With `--benchmark` it looks at one alone and
is silent if nothing is missing, as scripts want it. Exit code 2 if anything is missing.
"""

from collections.abc import Sequence
from pathlib import Path

from llava.constants import InputError
from llava.eval import benchmarks
from llava.eval.benchmarks.base import Benchmark, filled
from llava.utils import OneLineParser, run_command


def account(benchmark: Benchmark, data: Path) -> list[str]:
    """Return a line for each of a benchmark's files, and what is wrong inside the question file.

    Args:
        benchmark: whose files.
        data: its folder.
    """
    lacking = benchmark.lacking(data)
    files = {**benchmark.contents, **benchmark.optional}
    states = {name: "ok" if filled(data / name) else "not there" for name in benchmark.optional}
    states |= {name: "MISSING" if name in lacking else "ok" for name in benchmark.contents}
    lines = [f"  {states[name]:9}  {name}: {content}" for name, content in files.items()]
    return [f"{benchmark.name}: {data}", *lines, *_inside(benchmark, data, lacking), f"  from       {benchmark.source}"]


def _inside(benchmark: Benchmark, data: Path, lacking: Sequence[str]) -> list[str]:
    """Count the questions and those whose picture is not there."""
    if benchmark.question_file in lacking:
        return []
    questions = list(benchmark.questions(data / benchmark.question_file))
    lines = [f"  found      {len(questions)} questions"]
    images = {question.image for question in questions if question.image and question.data is None}
    gone = sorted(image for image in images if not (data / benchmark.image_folder / image).is_file())
    if gone and benchmark.image_folder not in lacking:
        lines.append(f"  MISSING    {len(gone)} of {len(images)} pictures, such as {gone[0]}")
    return lines


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
    parser.add_argument("--benchmark", help="look at this one alone, and say nothing if all is there")
    args = parser.parse_args(argv)
    if args.benchmark:
        check(args.benchmark, args.data)
        return
    accounts = {}
    for benchmark in map(benchmarks.get, benchmarks.available()):
        data = args.data / benchmark.folder
        try:
            accounts[benchmark.name] = account(benchmark, data)
        except InputError as error:
            accounts[benchmark.name] = [f"{benchmark.name}: {data}", f"  MISSING    {error}"]
    print("\n\n".join("\n".join(lines) for lines in accounts.values()))
    incomplete = [name for name, lines in accounts.items() if any(line.startswith("  MISSING") for line in lines)]
    print(f"\n{len(accounts) - len(incomplete)} of {len(accounts)} complete")
    if incomplete:
        raise SystemExit(2)


if __name__ == "__main__":
    run_command(main)
