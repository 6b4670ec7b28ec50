"""The scoring command: what it prints, in text and JSON, and how it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llava.constants import InputError
from llava.eval import score
from llava.eval.benchmarks import get
from tests.eval.benchmarks.rows import row, write_lines
from tests.eval.data import WORDS, write_benchmark

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_benchmark("gqa", tmp_path / "playground" / "data" / "eval")


def answers(data: Path, name: str, text: str | None = None) -> Path:
    """Answers to generated GQA questions: the label, or `text`."""
    labels = json.loads((data / "data" / "testdev_balanced_questions.json").read_text())
    rows = [row(key, text or label["answer"]) for key, label in labels.items()]
    return write_lines(data / f"{name}.jsonl", rows)


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    score.main([str(value) for value in argv])
    return capsys.readouterr().out


def test_text(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "--benchmark", "gqa", "--answers-file", answers(data, "right"), "--data", data).splitlines()
    assert out[0] == "gqa: local score, n = 12"
    assert out[1].split() == ["accuracy", "100.00", "95%", "interval", "[100.00,", "100.00]"]
    assert out[2].split() == ["binary", "100.00"]


def test_json_and_the_default_folder(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parents[3])
    file = answers(data, "same", WORDS[0])
    file.write_text("\n".join(file.read_text().split("\n")[:8]))
    summary = json.loads(run(capsys, "--benchmark", "gqa", "--answers_file", file, "--json"))
    assert summary["benchmark"] == "gqa"
    assert (summary["scored"], summary["headline"], summary["n"]) == ("local", "accuracy", 8)
    assert summary["value"] == summary["metrics"]["accuracy"] == summary["interval"]["value"]
    assert summary["interval"]["low"] <= summary["value"] <= summary["interval"]["high"]
    assert summary["notes"] == ["8 of 12 questions have an answer; the score is over these"]


def test_against(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right, wrong = answers(data, "right"), answers(data, "wrong", "nothing")
    command = ["--benchmark", "gqa", "--answers-file", wrong, "--data", data, "--against", right]
    difference = json.loads(run(capsys, *command, "--json"))["difference"]
    assert (difference["value"], difference["low"], difference["high"], difference["n"]) == (-100, -100, -100, 12)
    assert (difference["against"], difference["unshared"]) == (str(right), 0)
    right.write_text(right.read_text().split("\n")[0])
    text = run(capsys, *command)
    assert "accuracy, difference          -100.00  95% interval [-100.00, -100.00]" in text
    assert "note: 11 questions are answered in one file only" in text
    wrong.write_text(wrong.read_text().split("\n")[0])
    assert run(capsys, *command).count("1 of 12 questions have an answer") == 1, "once, where both files say so"


def test_export(data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["--benchmark", "gqa", "--answers-file", answers(data, "right"), "--data", data]
    out = run(capsys, *command, "--export", tmp_path / "upload")
    file = tmp_path / "upload" / "testdev_balanced_predictions.json"
    assert out.splitlines()[-1] == f"wrote {file}"
    assert len(json.loads(file.read_text())) == 12


def test_a_server_score_has_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_lines(tmp_path / "a.jsonl", [row(1, "x")])
    command = ["--benchmark", "mmvet", "--answers-file", file, "--data", tmp_path]
    assert run(capsys, *command).startswith("mmvet: server score, n = 1\nnote: labels are not public")
    summary = json.loads(run(capsys, *command, "--json"))
    assert (summary["value"], summary["interval"], summary["scored"]) == (None, None, "server")
    with pytest.raises(InputError, match="share no locally scored question"):
        score.main([str(value) for value in (*command, "--against", file)])


def test_runs_of_unlike_headlines(tmp_path: Path) -> None:
    data = write_benchmark("mme", tmp_path, n_images=4)
    questions = list(get("mme").questions(data / "llava_mme.jsonl"))
    rows = [row(q.id, "Yes", q.text) for q in questions]
    one = write_lines(tmp_path / "1.jsonl", [r for r in rows if r["question_id"].startswith("code")])
    two = write_lines(tmp_path / "2.jsonl", rows)
    with pytest.raises(InputError, match="yields perception, this run cognition"):
        score.report(get("mme"), one, data, two)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--benchmark", "vqa", "--answers-file", "x"], "argument --benchmark: invalid choice: 'vqa'"),
        (["--benchmark", "gqa"], "--answers-file"),
        (["--benchmark", "gqa", "--answers-file", "nowhere.jsonl"], "cannot read 'nowhere.jsonl'"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], complaint: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llava.eval.score", *argv]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert complaint in done.stderr


def test_scoring_loads_no_torch() -> None:
    code = (
        "import sys, llava.eval.score; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'PIL')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}).returncode == 0
