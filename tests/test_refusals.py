"""Every command that writes: a place that cannot be written is one line, exit code 2, before any model is loaded.

On a full disk it is one line, too, and nothing is half-written.
"""

import runpy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import llava.efficiency.__main__ as efficiency
from llava import visualize
from llava.eval import eval_science_qa, plots, score
from llava.eval.benchmarks import get
from llava.model import miniature
from llava.pocket import demo, train, write
from tests.conftest import Command, file_limit, picture
from tests.eval.benchmarks.rows import row, write_lines
from tests.eval.data import write_benchmark

ROOT = Path(__file__).parents[1]


@cache
def script(name: str) -> Callable[[], None]:
    """The main function of a script."""
    main: Callable[[], None] = runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))["main"]
    return main


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark's data, with answers."""
    root = tmp_path_factory.mktemp("data")
    asked = get("gqa").questions(write_benchmark("gqa", root) / get("gqa").question_file)
    write_lines(root / "gqa.jsonl", [row(question.id, "x" * 4000) for question in asked])
    return root


NOTHING = ["--model-path", "nosuch"]
"""A checkpoint that is missed when it is looked for."""


def command_line(name: str, data: Path, output: Path) -> tuple[Callable[..., None], list[Any]]:
    """A command that writes, with its words."""
    answers = data / "gqa.jsonl"
    commands: dict[str, tuple[Callable[..., None], list[Any]]] = {
        "convert_gqa": (script("convert_gqa_for_eval"), ["--src", answers, "--dst", output]),
        "convert_mmvet": (script("convert_mmvet_for_eval"), ["--src", answers, "--dst", output]),
        "score": (
            score.main,
            ["--benchmark", "gqa", "--answers-file", answers, "--data", data / "gqa", "--json", "--export", output],
        ),
        "eval_science_qa": (
            eval_science_qa.main,
            ["--base-dir", "nosuch", "--result-file", "nosuch", "--output-file", "ok", "--output-result", output],
        ),
        "plots": (plots.main, ["--root", "nosuch", "--output", output]),
        "efficiency": (efficiency.main, ["--plot", output]),
        "visualize": (visualize.main, [*NOTHING, "--image-file", "nosuch.png", "--output", output]),
        "demo": (demo.main, [*NOTHING, "--pictures", output]),
        "train": (train.main, ["--work", output]),
        "write": (write.main, [output, "--scenes", 20]),
        "miniature": (miniature.main, [output]),
    }
    return commands[name]


COMMANDS = (
    *("convert_gqa", "convert_mmvet", "score", "eval_science_qa", "plots", "efficiency", "visualize", "demo", "train"),
    *("write", "miniature"),
)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_that_cannot_be_written_is_one_line(name: str, data: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").write_text("kept")
    output = tmp_path / "file" / "out.png"
    main, words = command_line(name, data, output)
    code, out, err = command(main, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: cannot write '{output}")
    assert "(Not a directory); give another place" in err
    assert (tmp_path / "file").read_text() == "kept"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["convert_gqa", "convert_mmvet", "score", "write", "miniature"])
def test_a_full_disk_leaves_whole_files_alone(name: str, data: Path, tmp_path: Path, command: Command) -> None:
    main, words = command_line(name, data, tmp_path / "out")
    with file_limit(8192):
        code, out, err = command(main, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: cannot write '{tmp_path / 'out'}")
    assert "(File too large)" in err
    assert not list(tmp_path.rglob("*.draft"))
    assert all(file.stat().st_size < 8192 for file in tmp_path.rglob("*") if file.is_file())


def test_a_picture_on_a_full_disk_leaves_the_one_before(tmp_path: Path, checkpoint: Any, command: Command) -> None:
    picture(300, 200).save(tmp_path / "photo.png")
    (tmp_path / "kept.png").write_text("before")
    words = ["--model-path", checkpoint(), "--image-file", tmp_path / "photo.png", "--output", tmp_path / "kept.png"]
    with file_limit(8192):
        code, out, err = command(visualize.main, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: cannot write '{tmp_path / 'kept.png'}' (File too large)")
    assert (tmp_path / "kept.png").read_text() == "before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kept.png", "photo.png"]


def test_a_table_for_a_server_on_a_full_disk(tmp_path: Path, command: Command) -> None:
    """Openpyxl, too, leaves nothing and says nothing of its own."""
    pytest.importorskip("openpyxl")
    data = write_benchmark("mmbench", tmp_path / "data")
    table = next(data.glob("*.tsv"))
    write_lines(tmp_path / "run.jsonl", [row(1, "A", round_id=0)])
    words = ["--annotation-file", table, "--result-dir", tmp_path, "--upload-dir", tmp_path / "up", "--experiment"]
    with file_limit(4096):
        code, out, err = command(script("convert_mmbench_for_submission"), *words, "run")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: cannot write (File too large)")  # it puts the sheet into a file of its own first
    assert not (tmp_path / "up").exists()
