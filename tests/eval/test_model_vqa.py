"""Upstream's runners: their flags in both spellings, as modules and by path, over the one answerer."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.eval import answer
from llava.eval.benchmarks import get
from llava.eval.benchmarks.base import read_jsonl
from tests.eval.data import write_benchmark

ROOT = Path(__file__).parents[2]
DOORS = {"model_vqa_loader": 128, "model_vqa": 1024, "model_vqa_science": 1024, "model_vqa_mmbench": 1024}
FALLBACK = {"model_vqa_science": "scienceqa", "model_vqa_mmbench": "mmbench"}


def enter(door: str, monkeypatch: pytest.MonkeyPatch, *words: Any, by_path: bool = False) -> None:
    """Run a door in this process."""
    monkeypatch.setattr(sys, "argv", [door, *map(str, words)])
    monkeypatch.setattr(sys, "path", [str(ROOT / "llava" / "eval"), *sys.path])
    if by_path:
        runpy.run_path(str(ROOT / "llava" / "eval" / f"{door}.py"), run_name="__main__")
    else:
        runpy.run_module(f"llava.eval.{door}", run_name="__main__")


@pytest.fixture
def args(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What a door asks the answerer to do."""

    def ask(door: str, *words: Any, by_path: bool = False) -> Any:
        asked = []
        monkeypatch.setattr(answer, "run", lambda args: asked.append(args) or {})
        enter(door, monkeypatch, *words, by_path=by_path)
        return asked[0]

    return ask


NEEDED = ["--model-path", "m", "--question-file", "q", "--answers-file", "a"]


@pytest.mark.parametrize("by_path", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_defaults(door: str, by_path: bool, args: Callable[..., Any]) -> None:
    found = args(door, *NEEDED, by_path=by_path)
    assert found.max_new_tokens == DOORS[door]
    assert (found.temperature, found.num_beams, found.top_p, found.conv_mode) == (0, 1, None, None)
    assert (found.num_chunks, found.chunk_idx, found.model_base, found.image_folder) == (1, 0, None, "")
    assert (found.retention_ratio, found.profile) == (None, None)  # line 101 decides
    if door in FALLBACK:
        assert found.benchmark == FALLBACK[door]
    assert len((ROOT / "llava" / "eval" / f"{door}.py").read_text().splitlines()) <= 30


UPSTREAM = {
    "model_path": "m", "model_base": "b", "image_folder": "i", "question_file": "q", "answers_file": "a",
    "conv_mode": "vicuna_v1", "num_chunks": 2, "chunk_idx": 1, "temperature": 0.2, "top_p": 0.9, "num_beams": 3,
    "max_new_tokens": 7,
}  # fmt: skip


@pytest.mark.parametrize("mark", ["-", "_"])
@pytest.mark.parametrize("door", DOORS)
def test_upstreams_flags_in_both_spellings(door: str, mark: str, args: Callable[..., Any]) -> None:
    words = [word for name, value in UPSTREAM.items() for word in (f"--{name.replace('_', mark)}", value)]
    found = args(door, *words)
    assert {name: getattr(found, name) for name in UPSTREAM} == UPSTREAM


@pytest.mark.parametrize("door", ["model_vqa_science", "model_vqa_mmbench"])
def test_flags_of_multiple_choice(door: str, args: Callable[..., Any]) -> None:
    found = args(door, *NEEDED, "--single-pred-prompt", "--all-rounds", "--lang", "cn")
    assert (found.single_pred_prompt, found.all_rounds, found.lang) == (True, True, "cn")


@pytest.mark.parametrize("name", ["vqav2", "gqa", "vizwiz", "textvqa", "pope", "mme", "mmvet"])
def test_a_known_question_file_is_its_benchmarks(name: str, args: Callable[..., Any]) -> None:
    words = ["--model-path", "m", "--answers-file", "a", "--question-file", f"x/{get(name).question_file}"]
    assert args("model_vqa_loader", *words).benchmark == name
    assert args("model_vqa_loader", *words, "--benchmark", "gqa").benchmark == "gqa"


@pytest.mark.parametrize(
    "door", [door if door == "model_vqa_loader" else pytest.param(door, marks=pytest.mark.slow) for door in DOORS]
)
def test_by_path_from_elsewhere(door: str, tmp_path: Path) -> None:
    file = ROOT / "llava" / "eval" / f"{door}.py"
    done = subprocess.run([sys.executable, file], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--model-path" in done.stderr


@pytest.fixture
def ask(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """Answer a generated benchmark through a door; returns the rows."""

    def ask(door: str, name: str, *words: Any) -> list[dict[str, Any]]:
        data, file = write_benchmark(name, tmp_path, n_images=2, per_image=2), tmp_path / "answers.jsonl"
        given = ["--model-path", checkpoint(), "--question-file", data / get(name).question_file]
        given += ["--image-folder", data / get(name).image_folder, "--answers-file", file]
        enter(door, monkeypatch, *given, "--max_new_tokens", 3, "--conv-mode", "vicuna_v1", *words)
        return read_jsonl(file)

    return ask


@pytest.mark.parametrize(("door", "name"), [("model_vqa_loader", "pope"), ("model_vqa", "mmvet")])
def test_a_file_of_lines(door: str, name: str, ask: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    rows = ask(door, name)
    questions = read_jsonl(tmp_path / get(name).folder / get(name).question_file)
    assert [row["question_id"] for row in rows] == [question["question_id"] for question in questions]
    assert [row["prompt"] for row in rows] == [question["text"] for question in questions]
    assert list(rows[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert {row["model_id"] for row in rows} == {"llava-next-7b"}


def test_science(ask: Callable[..., list[dict[str, Any]]]) -> None:
    rows = ask("model_vqa_science", "scienceqa", "--single-pred-prompt")
    # Whether a question had a picture is read from here by the scorer.
    assert [row["prompt"].startswith("<image>\n") for row in rows] == [True] * 4 + [False] * 2
    assert not any("directly" in row["prompt"] for row in rows)


def test_mmbench(ask: Callable[..., list[dict[str, Any]]]) -> None:
    rows = ask("model_vqa_mmbench", "mmbench", "--single-pred-prompt", "--all-rounds")
    assert [(row["question_id"], row["round_id"]) for row in rows] == [(i, r) for i in (1, 2, 3, 4) for r in (0, 1, 2)]
    assert [row["option_char"] for row in rows[:2]] == [["A", "B", "C"], ["B", "C", "A"]]


def test_chunks_together_are_the_whole(ask: Callable[..., list[dict[str, Any]]]) -> None:
    parts = [ask("model_vqa_loader", "gqa", "--num-chunks", 2, "--chunk-idx", i, "--overwrite") for i in (0, 1)]
    whole = ask("model_vqa_loader", "gqa", "--overwrite")
    texts = [[(row["question_id"], row["text"]) for row in rows] for rows in (*parts, whole)]
    assert texts[0] + texts[1] == texts[2]
