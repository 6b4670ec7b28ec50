"""The benchmark that CONTRIBUTING shows: in a file it is answered, scored, sampled, checked and tabled."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llava.eval import answer, benchmarks, check_data, published, score, table
from llava.eval.benchmarks.base import read_jsonl
from llava.eval.sample import sample
from tests.conftest import Command
from tests.eval.benchmarks.rows import row, write, write_lines
from tests.eval.data import random_picture

ROOT = Path(__file__).parents[3]
WORDS = ("red", "blue", "Dog", "cat", "2", "north")


def code() -> str:
    section = (
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Adding a benchmark\n")[1].split("\n## ")[0]
    )
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return str(block)


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Paste the example into a file of the registry, and write its data; returns the root of all data."""
    pasted = tmp_path / "pasted"
    pasted.mkdir()
    (pasted / "mybench.py").write_text(code(), encoding="utf-8")
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(pasted)])
    monkeypatch.delitem(sys.modules, "llava.eval.benchmarks.mybench", raising=False)
    root = tmp_path / "data"
    images = root / "mybench" / "images"
    images.mkdir(parents=True)
    for number in range(2):
        random_picture(number).save(images / f"{number}.png")
    lines = [
        {"question_id": n, "image": f"{n % 2}.png", "text": f"What is {n}?", "category": "ab"[n // 3]} for n in range(6)
    ]
    write_lines(root / "mybench" / "questions.jsonl", lines)
    write(root / "mybench" / "labels.json", {str(number): word for number, word in enumerate(WORDS)})
    yield root
    sys.modules.pop("llava.eval.benchmarks.mybench", None)
    vars(benchmarks).pop("mybench", None)


def test_it_is_in_the_registry_and_has_a_column(registered: Path) -> None:
    assert benchmarks.available().count("mybench") == 1
    assert published.columns() == [*published.COLUMNS, "mybench"]


def test_scores_by_hand(registered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of three answers are right; three questions have none."""
    rows = [row(0, "Red"), row(1, "green"), row(2, " dog ")]
    result = benchmarks.get("mybench").score(rows, registered / "mybench")
    assert result.metrics == {"accuracy": pytest.approx(200 / 3)}
    assert (result.n, result.notes) == (3, ("3 of 6 questions have an answer; the score is over these",))
    file = write_lines(registered / "a.jsonl", rows)
    words = ["--benchmark", "mybench", "--answers-file", str(file), "--data", str(registered / "mybench")]
    score.main(words)
    assert capsys.readouterr().out.splitlines()[0] == "mybench: local score, n = 3"


def test_samples_are_of_both_categories(registered: Path) -> None:
    mybench = benchmarks.get("mybench")
    drawn = sample(list(mybench.questions(registered / "mybench" / "questions.jsonl")), mybench, 2)
    assert sorted(question.category for question in drawn) == ["a", "b"]


def test_its_data_are_checked(registered: Path) -> None:
    folder = registered / "mybench"
    lines = check_data.account(benchmarks.get("mybench"), folder)
    assert [line.split()[0] for line in lines[1:]] == ["ok", "ok", "ok", "from"]
    write(folder / "labels.json", {"0": "red"})
    assert "  SHORT      labels.json: 6 answers by question id; 1 found" in check_data.account(
        benchmarks.get("mybench"), folder
    )


def test_from_answers_to_the_table(
    registered: Path, loaded: Callable[..., Any], command: Command, monkeypatch: pytest.MonkeyPatch, checkpoint: Any
) -> None:
    monkeypatch.setattr(answer, "load_pretrained_model", lambda *_, **__: loaded())
    monkeypatch.setattr(loaded().model, "method", loaded().model.method)
    folder = registered / "mybench"
    for method in ("none", "uniform"):
        words = ["--benchmark", "mybench", "--model-path", checkpoint(), "--question-file", folder / "questions.jsonl"]
        words += ["--image-folder", folder / "images", "--answers-file", registered / "out" / f"{method}.jsonl"]
        words += ["--max-new-tokens", 2, "--method", method, "--retention-ratio", 0.5, "--num-workers", 0]
        answer.run(answer.parse([str(word) for word in words]))
        assert len(read_jsonl(registered / "out" / f"{method}.jsonl")) == 6
    code, out, _ = command(table.main, "--root", registered / "out", "--data", registered, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["columns"] == ["mybench"]
    assert [(r["method"], r["n"], list(r["scores"])) for r in found["rows"]] == [
        (method, {"mybench": 6}, ["mybench"]) for method in ("none", "uniform")
    ]
    assert [r["published"] for r in found["rows"]][1] == {}


def test_it_passes_the_linter() -> None:
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "llava/eval/benchmarks/mybench.py", "-"]
    done = subprocess.run(command, cwd=ROOT, input=code(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    command[3:4] = ["format", "--diff"]
    done = subprocess.run(command, cwd=ROOT, input=code(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
