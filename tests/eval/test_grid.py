"""The grid: every cell answered once, as the benchmarks' scripts would, into files the table reads."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.eval import answer, benchmarks, grid, table
from llava.eval.cells import OWN, cells, read_cells
from llava.eval.published import COLUMNS
from llava.eval.runs import collect
from llava.pocket.write import write_benchmarks
from tests.conftest import Command
from tests.pocket import tiny

SCRIPTS = Path(__file__).parents[2] / "scripts" / "v1_5" / "eval"
LIMIT = 4
NAMES = ("textvqa", "scienceqa", "mmbench_cn", "mmvet")
CELLS = ("none-1", "globalcom2-0.5", "uniform-0.5", "thumbnail_only-1")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("grid") / "pocket")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("grid") / "data", scenes=6)


@pytest.fixture
def run(checkpoint: Path, data: Path, command: Command) -> Run:
    """Run the command; returns exit code, stdout and stderr."""

    def answered(out: Path, *more: object, program: Any = grid) -> tuple[int, str, str]:
        given = ["--model-path", checkpoint, "--data", data, "--out", out, "--max-new-tokens", 3, "--device", "cpu"]
        return command(program.main, *given, *more)

    return answered


@pytest.fixture(scope="module")
def made(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four benchmarks, their first questions, at one ratio; read-only for tests."""
    out = tmp_path_factory.mktemp("grid") / "out"
    words = ["--model-path", checkpoint, "--data", data, "--out", out, "--max-new-tokens", 3, "--device", "cpu"]
    words += ["--benchmarks", *NAMES, "--methods", "globalcom2", "uniform", "thumbnail_only", "--ratios", 0.5]
    grid.run(grid.build_parser().parse_args([str(word) for word in (*words, "--limit", LIMIT)]))
    return out


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def folder(name: str) -> str:
    return benchmarks.get(name).folder


def files(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def test_every_cell_is_a_file_of_its_first_questions(made: Path, data: Path) -> None:
    wanted = {f"{folder(name)}/{cell}-first{LIMIT}.jsonl" for name in NAMES for cell in CELLS}
    assert {str(file.relative_to(made)) for file in made.rglob("*.jsonl")} == wanted
    for name in NAMES:
        benchmark = benchmarks.get(name)
        asked = list(benchmark.questions(data / benchmark.folder / benchmark.question_file))[:LIMIT]
        for cell in CELLS:
            found = rows(made / benchmark.folder / f"{cell}-first{LIMIT}.jsonl")
            assert [row["question_id"] for row in found] == [question.id for question in asked]
            assert not any("error" in row["metadata"] for row in found)


def test_every_cell_is_compressed_as_it_says(made: Path) -> None:
    for name in NAMES:
        for cell, share in zip(CELLS, (1, 0.5, 0.5, None), strict=True):
            for row in rows(made / folder(name) / f"{cell}-first{LIMIT}.jsonl"):
                kept, total = row["metadata"]["visual_tokens"], row["metadata"]["total_visual_tokens"]
                assert kept == (144 if share is None else int(share * total))
                assert total in (3 * 144, 4 * 144, 5 * 144)


def test_benchmarks_are_asked_as_their_scripts_do(made: Path) -> None:
    """The flags in each benchmark's script and in the grid are the same, and they have reached the answerer."""
    flags = {}
    for script in SCRIPTS.glob("*.sh"):
        if called := re.search(r"^benchmark (\w+)(.*)", script.read_text().replace("\\\n", " "), re.MULTILINE):
            found = re.findall(r"--single-pred-prompt|--all-rounds|--lang \w+", called[2])
            flags[called[1]] = tuple(" ".join(found).split())
    assert set(COLUMNS) <= flags.keys()
    assert flags == {name: grid.OPTIONS.get(name, ()) for name in flags}
    for name in NAMES:
        record = json.loads((made / folder(name) / f"none-1-first{LIMIT}.jsonl.config.json").read_text())
        assert record["benchmark"] == name
        assert record["single_pred_prompt"] == (name in ("scienceqa", "mmbench_cn"))
        assert record["lang"] == ("cn" if name == "mmbench_cn" else None)
        assert record["max_new_tokens"] == 3


def test_a_second_call_answers_nothing_anew(made: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(made)
    monkeypatch.setattr(answer, "load_pretrained_model", lambda *_, **__: pytest.fail("the model was loaded"))
    given = ["--benchmarks", *NAMES, "--methods", "globalcom2", "uniform", "thumbnail_only", "--ratios", 0.5]
    code, out, err = run(made, *given, "--limit", LIMIT)
    assert (code, out) == (0, "")
    said = [line.split() for line in err.splitlines() if "answers" in line]
    assert [(line[0], line[1], line[3]) for line in said] == [
        (name, cell.rsplit("-", 1)[0], str(LIMIT)) for name in NAMES for cell in CELLS
    ]
    assert files(made) == before, "answers carry an id of their own: other answers would be other bytes"


def test_another_ratio_adds_its_cells_only(made: Path, data: Path, run: Run, tmp_path: Path) -> None:
    for file, content in files(made / "textvqa").items():
        target = tmp_path / "textvqa" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    before = files(tmp_path)
    code, *_ = run(tmp_path, "--benchmarks", "textvqa", "--ratios", 0.5, 0.25, "--limit", LIMIT)
    assert code == 0
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    added = {name for name in after.keys() - before.keys() if name.endswith(".jsonl")}
    assert added == {f"textvqa/globalcom2-0.25-first{LIMIT}.jsonl"}


def test_the_table_takes_the_answers(made: Path, checkpoint: Path, data: Path) -> None:
    found = table.compare(collect(made, data, str(checkpoint)))
    assert list(found) == [("none", 1.0), ("globalcom2", 0.5), ("uniform", 0.5), ("thumbnail_only", OWN)]
    for row in found.values():
        assert set(row["scores"]) == set(NAMES)
        assert row["n"] == {name: 1 if name == "mmbench_cn" else LIMIT for name in NAMES}, "MMBench asks four times"
    assert set(found["globalcom2", 0.5]["differences"]) == set(NAMES)
    assert "globalcom2" in table.as_text(found, str(checkpoint))


def test_what_cannot_be_reached_is_left_out_and_said(run: Run, tmp_path: Path, data: Path, checkpoint: Path) -> None:
    """With one of two layers before it FastV keeps more than a tenth; which is no failure."""
    given = ["--benchmarks", "textvqa", "gqa", "--limit", 2, "--methods", "fastv(layer=1)", "uniform"]
    code, out, err = run(tmp_path, *given, "--ratios", 0.75, 0.1)
    assert (code, out) == (0, "")
    left = [line for line in err.splitlines() if "left out" in line]
    assert [line.split()[:3] for line in left] == [[name, "fastv(layer=1)", "0.10"] for name in ("textvqa", "gqa")]
    assert all("ask for at least 50.00%" in line for line in left)
    found = table.compare(collect(tmp_path, data, str(checkpoint)))
    assert list(found) == [("none", 1.0), ("fastv(layer=1)", 0.75), ("uniform", 0.75), ("uniform", 0.1)]


def test_a_cell_that_fails_stops_no_other_and_is_missing_in_the_table(
    run: Run, tmp_path: Path, data: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for a reason that is said, one for a bug; the question file of another benchmark is not there."""
    own = tmp_path / "data"
    own.mkdir()
    (own / "textvqa").symlink_to(data / "textvqa")
    answered = answer.run

    def broken(args: Any) -> Any:
        if args.method == "random":
            raise ZeroDivisionError("a bug")
        return answered(args)

    monkeypatch.setattr(answer, "run", broken)
    cells = tmp_path / "cells.tsv"
    given = ["--benchmarks", "textvqa", "gqa", "--limit", 2, "--data", own, "--cells", cells]
    code, out, err = run(tmp_path / "out", *given, "--methods", "fastv(layer=9)", "random", "uniform", "--ratios", 0.75)
    assert (code, out) == (2, "")
    failed = [(line.split()[0], line.split()[1]) for line in err.splitlines() if " failed: " in line]
    methods = ("none", "fastv(layer=9)", "random", "uniform")
    assert failed == [*(("textvqa", method) for method in methods[1:3]), *(("gqa", method) for method in methods)]
    assert "ZeroDivisionError: a bug" in err
    assert err.splitlines()[-1] == "error: 6 of 8 cells failed, for the reasons above; the others are answered"
    assert len(read_cells(cells)) == 8
    code, out, _ = command(table.main, "--root", tmp_path / "out", "--data", own, "--cells", cells)
    assert code == 0
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.split()[:1] and "note" not in line}
    assert rows["fastv(layer=9)"][:3] == ["missing"] * 2
    assert rows["uniform"][0] == "missing"
    assert "missing" not in rows["uniform"][1:]
    missing = [line for line in out.splitlines() if line.startswith("note: missing: ")]
    assert len(missing) == 3, "one for each reason: a method without a layer, a bug, no questions"
    assert any(
        line.endswith("(ZeroDivisionError: a bug)") and "textvqa with random at 0.75 and 1 more" in line
        for line in missing
    )


def test_questions_that_cannot_be_asked_end_in_exit_code_3(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = {"questions": 5, "seconds": 0.0, "errors": ["x.jpg: unreadable"]}
    monkeypatch.setattr(answer, "run", lambda args: done)
    code, _, err = run(tmp_path, "--benchmarks", "gqa", "--methods", "none")
    assert (code, err.count("1 could not be asked")) == (3, 1)


def test_a_sample_is_part_of_the_words_and_of_the_name(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    given = ["--model-path", str(checkpoint), "--data", str(data), "--out", str(tmp_path), "--sample", "7"]
    args = grid.build_parser().parse_args(given)
    cell = answer.parse(list(grid.words(args, "gqa", "uniform", 0.5)))
    assert (cell.sample, cell.limit) == (7, None)
    assert Path(cell.answers_file).name == "uniform-0.5-sample7.jsonl"


def test_all_ten_by_default(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(answer, "run", lambda args: asked.append(args) or {"questions": 0, "seconds": 0.0})
    assert run(tmp_path)[0] == 0
    assert {args.benchmark for args in asked} == set(COLUMNS), "further benchmarks when they are named"
    cells = {(args.method, args.retention_ratio) for args in asked}
    assert cells == {("none", "1.0"), *(("globalcom2", ratio) for ratio in ("0.75", "0.5", "0.25", "0.1"))}
    assert len(asked) == 10 * len(cells) == len({args.answers_file for args in asked})


@pytest.mark.parametrize(
    ("methods", "ratios", "wanted"),
    [
        (["globalcom2"], [0.5, 0.1], [("none", 1), ("globalcom2", 0.5), ("globalcom2", 0.1)]),
        (["none"], [0.5, 0.1], [("none", 1)]),
        (["uniform", "random"], [1.0, 0.5], [("none", 1), ("uniform", 0.5), ("random", 0.5)]),
        (["thumbnail_only"], [0.5, 0.1], [("none", 1), ("thumbnail_only", 1)]),
        (["tome(r=5)", "tome"], [0.5], [("none", 1), ("tome(r=5)", 1), ("tome", 0.5)]),
        (["uniform", "uniform"], [0.5, 0.5], [("none", 1), ("uniform", 0.5)]),
        (["globalcom2(alpha=0.0)"], [0.5], [("none", 1), ("globalcom2(alpha=0.0)", 0.5)]),
    ],
)
def test_cells_come_once_after_the_upper_bound(methods: Any, ratios: Any, wanted: Any) -> None:
    assert cells(methods, ratios) == wanted


def test_methods_with_other_fields_have_files_of_their_own(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    given = ["--model-path", str(checkpoint), "--data", str(data), "--out", str(tmp_path)]
    args = grid.build_parser().parse_args(given)
    specs = ["globalcom2", "globalcom2(alpha=0.0)", "globalcom2(alpha=0.25)", "globalcom2(profile='paper')"]
    words = [list(grid.words(args, "gqa", spec, ratio)) for spec in specs for ratio in (0.5, 0.25)]
    names = {line[line.index("--answers-file") + 1] for line in words}
    assert len(names) == 8
    assert all(re.fullmatch(r"[\w.=-]+\.jsonl", Path(name).name) for name in names)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--benchmarks", "gqa", "imagenet"], "imagenet"),
        (["--methods", "globalcom3"], "globalcom3"),
        (["--methods", "globalcom2(gamma=1)"], "gamma"),
        (["--ratios", "0"], "0"),
        (["--ratios", "0.5", "1.5"], "1.5"),
        (["--ratios", "-0.1"], "-0.1"),
        (["--ratios", "nan"], "nan"),
        (["--ratios", "half"], "half"),
        (["--limit", "0"], "0"),
        (["--sample", "0"], "0"),
        (["--sample", "3"], "not allowed with"),
        (["--model-path", "/nonexistent/model"], "/nonexistent/model"),
        (["--data", "/nonexistent/data"], "/nonexistent/data"),
    ],
)
def test_what_makes_no_sense_is_one_line_before_anything_is_answered(
    more: list[str], said: str, run: Run, tmp_path: Path
) -> None:
    code, out, err = run(tmp_path / "out", "--limit", 1, "--benchmarks", "textvqa", *more)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert said in err
    assert not (tmp_path / "out").exists()
