"""MM-Vet: asked as written, graded elsewhere."""

import json
from pathlib import Path

from llava.eval.benchmarks import get
from tests.eval.benchmarks.rows import failed, row, write_lines


def test_prompt(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "q.jsonl", [{"question_id": 0, "image": "v1_0.png", "text": "What is x in the equation?"}]
    )
    (question,) = get("mmvet").questions(file)
    assert (question.id, question.image, question.text) == (0, "v1_0.png", "What is x in the equation?")
    assert get("mmvet").max_new_tokens == 1024


def test_score_is_the_servers(tmp_path: Path) -> None:
    result = get("mmvet").score([row(0, "x = 1"), row(1, ""), failed(2)], tmp_path)
    assert (result.scored, result.n, dict(result.metrics), dict(result.per_question)) == ("server", 2, {}, {})
    assert "GPT-4" in result.notes[-1]


def test_export(tmp_path: Path) -> None:
    (file,) = get("mmvet").export([row(0, "x = 1"), row(12, "Ünder")], tmp_path, tmp_path / "run")
    assert file == tmp_path / "run" / "mm-vet.json"
    assert json.loads(file.read_text()) == {"v1_0": "x = 1", "v1_12": "Ünder"}
