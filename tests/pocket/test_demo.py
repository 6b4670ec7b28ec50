"""The demo asks one question of every task at every ratio, with the truth beside the answers."""

import json
from pathlib import Path

from llava.pocket import demo
from llava.pocket.questions import TASKS
from tests.conftest import Command
from tests.pocket.tiny import checkpoint


def test_ten_questions(tmp_path: Path, command: Command) -> None:
    words = ["--model-path", checkpoint(tmp_path / "model"), "--device", "cpu", "--ratios", "1", "0.25"]
    code, lines, _ = command(demo.main, *words, "--json")
    assert code == 0
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [row["task"] for row in rows] == list(TASKS)
    assert all(row["truth"] and list(row["answers"]) == ["1.0", "0.25"] for row in rows)
    assert "written" in rows[4]["question"] or "printed" in rows[4]["question"]
    code, out, _ = command(demo.main, *words, "--pictures", tmp_path / "pictures")
    assert code == 0
    assert out.count("  truth ") == len(TASKS)
    assert {file.stem for file in (tmp_path / "pictures").iterdir()} == set(TASKS)
