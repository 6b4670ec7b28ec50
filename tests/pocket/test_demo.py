"""The demo asks one question of every task at every ratio, with the truth beside the answers."""

import json
import sys
from pathlib import Path

import pytest

from llava.pocket import demo
from llava.pocket.questions import TASKS
from llava.utils import run_command
from tests.pocket.tiny import checkpoint


def test_ten_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model-path", checkpoint(tmp_path / "model"), "--device", "cpu", "--ratios", "1", "0.25"]
    for more in (["--json"], ["--pictures", tmp_path / "pictures"]):
        monkeypatch.setattr(sys, "argv", ["demo", *map(str, words), *map(str, more)])
        run_command(demo.main)
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [row["task"] for row in rows] == list(TASKS)
    assert all(row["truth"] and list(row["answers"]) == ["1.0", "0.25"] for row in rows)
    assert "written" in rows[4]["question"] or "printed" in rows[4]["question"]
    assert out.count("  truth ") == len(TASKS)
    assert {file.stem for file in (tmp_path / "pictures").iterdir()} == set(TASKS)
