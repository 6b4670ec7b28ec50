"""The grids' scripts: what fails is noted, the others go on, and the table is told exactly what was asked for."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.eval.cells import cells, main, read_cells
from tests.conftest import Command
from tests.eval.data import write_benchmark
from tests.eval.test_scripts import bash

# Stands for Python: takes down its words; every program does nothing, but for those a test names.
STUB = """#!/usr/bin/env bash
all=$*
printf '%s\\n' "$all" >> {log}
case "$*" in
    *llava.eval.cells*) printf '%b' {listed} ;;
    *llava.eval.answer*) while [[ $1 != --answers-file ]]; do shift; done; mkdir -p "${{2%/*}}"; : > "$2" ;;
    *llava.eval.grid*) while [[ $1 != --cells ]]; do shift; done; mkdir -p "${{2%/*}}"; printf 'x\\n' >> "$2" ;;
    *llava.eval.table*) printf 'the table\\n' ;;
esac
case "$all" in {cases} esac
"""


@pytest.fixture
def stub(tmp_path: Path, checkpoint: Callable[..., Path]) -> Callable[..., Any]:
    """Run a script with the stub; `fails`: pattern of words -> exit code. Returns what was done and the commands."""

    def run(script: str, fails: dict[str, int], *words: str, **variables: Any) -> tuple[Any, list[str], Path]:
        out, log, python = tmp_path / "out", tmp_path / "log", tmp_path / "python"
        methods, ratios = variables.get("METHODS", "globalcom2").split(), variables.get("RATIOS", "0.5 0.25").split()
        listed = "".join(f"{m}\\t{r}\\n" for m, r in cells(methods, list(map(float, ratios))))
        cases = " ".join(f"{pattern}) exit {code} ;;" for pattern, code in fails.items())
        text = STUB.format(log=shlex.quote(str(log)), listed=shlex.quote(listed), cases=cases)
        python.write_text(text)
        python.chmod(0o755)
        settings = {"PYTHON": python, "OUT": out, "DATA": tmp_path / "data", "CKPT": checkpoint()} | variables
        done = bash(script, *words, **{"RATIOS": "0.5 0.25", **settings})
        return done, log.read_text().splitlines() if log.exists() else [], out

    return run


def ran(commands: list[str], program: str) -> list[str]:
    return [command for command in commands if f"-m llava.eval.{program} " in command]


def test_a_failed_cell_does_not_end_the_grid(stub: Callable[..., Any]) -> None:
    fails = {"*llava.eval.answer*vqav2*--retention-ratio\\ 0.5*": 1}
    done, commands, out = stub("run_grid", fails, "--markdown", BENCHES="vqav2 mmvet", SAMPLE=9)
    assert done.returncode == 2
    assert done.stderr == "note: vqav2 with globalcom2 at 0.5 failed (exit code 1); the others go on\n"
    assert len(ran(commands, "answer")) == 6
    assert all("--sample 9" in command for command in ran(commands, "answer"))
    assert done.stdout.endswith("the table\n")
    (table,) = ran(commands, "table")
    assert table.endswith(" --markdown")
    listed = read_cells(Path(shlex.split(table)[shlex.split(table).index("--cells") + 1]))
    assert [(c.benchmark, *c.key, c.failed) for c in listed] == [
        (name, method, ratio, "exit code 1" if (name, ratio) == ("vqav2", 0.5) else "")
        for name in ("vqav2", "mmvet")
        for method, ratio in (("none", 1), ("globalcom2", 0.5), ("globalcom2", 0.25))
    ]
    asked = [shlex.split(command) for command in ran(commands, "answer")]
    assert [str(c.answers) for c in listed] == [words[words.index("--answers-file") + 1] for words in asked]
    assert all(c.answers.name.endswith("-sample9.jsonl") and c.answers.is_relative_to(out) for c in listed)


def test_questions_that_cannot_be_asked_end_in_exit_code_3_and_failures_come_first(stub: Callable[..., Any]) -> None:
    some = {"*llava.eval.answer*mmvet*--method\\ none*": 3}
    done, commands, _ = stub("run_grid", some, BENCHES="mmvet vqav2")
    assert (done.returncode, len(ran(commands, "answer")), len(ran(commands, "table"))) == (3, 6, 1)
    assert done.stderr == ""
    done, *_ = stub("run_grid", some | {"*llava.eval.table*": 2}, BENCHES="mmvet", METHODS="none")
    assert done.returncode == 2


def test_missing_data_are_said_once_and_cost_their_benchmark(stub: Callable[..., Any]) -> None:
    done, commands, _ = stub("run_grid", {"*check_data*vqav2*": 2}, BENCHES="vqav2 mmvet")
    assert done.returncode == 2
    assert done.stderr == "note: vqav2 is left out (exit code 2); the others go on\n"
    assert sum("vqav2" in command for command in ran(commands, "check_data")) == 1
    assert [command.split()[3] for command in ran(commands, "answer")] == ["mmvet"] * 3
    (table,) = ran(commands, "table")
    listed = read_cells(Path(shlex.split(table)[-1]))
    assert [(c.benchmark, c.failed) for c in listed] == [("vqav2", "no data")] * 3 + [("mmvet", "")] * 3


@pytest.mark.parametrize("code", [130, 143])
def test_an_interrupt_ends_the_grid(code: int, stub: Callable[..., Any]) -> None:
    done, commands, _ = stub("run_grid", {"*llava.eval.answer*0.5*": code}, BENCHES="vqav2 mmvet")
    assert (done.returncode, len(ran(commands, "answer")), ran(commands, "table")) == (code, 2, [])


def test_grids_that_differ_have_lists_that_differ(stub: Callable[..., Any]) -> None:
    settings: list[dict[str, Any]] = [{}, {"LIMIT": 3}, {"SAMPLE": 3}, {"PROFILE": "paper"}, {"RATIOS": "0.5"}]
    names = set()
    for setting in settings:
        done, commands, _ = stub("run_grid", {}, **{"BENCHES": "mmvet", "METHODS": "none", **setting})
        assert done.returncode == 0
        names.add(shlex.split(ran(commands, "table")[-1])[-1])
    assert len(names) == len(settings)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"LIMIT": 3, "SAMPLE": 3}, "got '3' and '3'"),
        ({"LIMIT": "many"}, "got 'many' and ''"),
        ({"SAMPLE": 0}, "got '' and '0'"),
        ({"BENCHES": "vqav2 imagenet"}, "no benchmark imagenet"),
        ({"BENCHES": "run_grid"}, "no benchmark run_grid"),
        ({"CKPT": "./no/such"}, "no checkpoint at ./no/such"),
    ],
)
def test_what_no_cell_could_run_with_is_one_line_before_anything_is(
    variables: dict[str, Any], said: str, stub: Callable[..., Any]
) -> None:
    done, commands, out = stub("run_grid", {}, **variables)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr
    assert ran(commands, "answer") == []
    assert not out.exists()


def test_methods_and_ratios_are_listed_once_and_checked(command: Command) -> None:
    """A method whose field stands in for the ratio runs once, as does one that has no use for it."""
    methods = ("--methods", "tome(r=5)", "uniform", "thumbnail_only")
    assert command(main, *methods, "--ratios", 1, 0.25)[1].splitlines() == [
        "none\t1.0", "tome(r=5)\t", "uniform\t1.0", "uniform\t0.25", "thumbnail_only\t1.0",
    ]  # fmt: skip
    for wrong in (("--ratios", 2), ("--methods", "globalcom9"), ("--methods", "uniform", "--profile", "paper")):
        code, _, err = command(main, *wrong)
        assert (code, err.count("\n")) == (2, 1)


def test_the_pockets_parts_do_not_wait_for_each_other(stub: Callable[..., Any]) -> None:
    """The grid's failed cells, a ranking without all ten tasks: table and curve are there all the same."""
    done, commands, _ = stub("pocket", {"*llava.eval.grid*": 2, "*llava.pocket.rank*": 2}, SAMPLE=9)
    assert done.returncode == 2
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert [note.split(" failed")[0] for note in notes] == ["note: the grid", "note: the ranking"]
    lists = {shlex.split(c)[shlex.split(c).index("--cells") + 1] for c in commands if "--cells" in c}
    assert len(lists) == 1
    assert [len(ran(commands, program)) for program in ("grid", "table", "plots")] == [1, 1, 1]
    assert "--sample 9" in ran(commands, "grid")[0]
    assert sum("-m llava.visualize" in command for command in commands) == 4


def test_a_grid_that_cannot_begin_ends_the_pockets_script(tmp_path: Path) -> None:
    done = bash("pocket", METHODS="globalcom9", OUT=tmp_path / "out", DATA=made(tmp_path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "globalcom9" in done.stderr


def made(folder: Path) -> Path:
    """A folder that looks like the pocket's data."""
    (folder / "truth.json").touch()
    return folder


def test_an_interrupt_ends_the_pockets_script(stub: Callable[..., Any]) -> None:
    done, commands, _ = stub("pocket", {"*llava.eval.grid*": 130})
    assert (done.returncode, ran(commands, "table")) == (130, [])


@pytest.mark.slow
def test_from_grid_to_table(tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    """Two benchmarks, of which one has no data, beside a run with a limit and a damaged one: the table is there."""
    write_benchmark("pope", tmp_path)
    settings = {"DATA": tmp_path, "OUT": tmp_path, "CKPT": checkpoint(), "METHODS": "uniform", "RATIOS": "0.5"}
    folder = tmp_path / "pope" / "answers" / "llava-next-7b"
    folder.mkdir(parents=True)
    (folder / "uniform-0.5-first4.jsonl.config.json").write_text("{}")
    (folder / "old.jsonl.config.json").write_text("{")
    done = bash("run_grid", **settings, BENCHES="vizwiz pope", SAMPLE=6)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    table = done.stdout[done.stdout.index("measured; difference") :]
    assert re.search(r"^uniform +missing +\d+\.\d", table, re.MULTILINE)
    assert "note: pope: 6 of 12 questions have an answer; the score is over these\n" in table
    assert "note: missing: vizwiz with none at 1 and 1 more (no data)\n" in table
    (beside,) = [line for line in table.splitlines() if line.startswith("note: not of this grid: ")]
    assert "uniform-0.5-first4.jsonl" in beside
    assert "old.jsonl" in beside
