"""GQA: letter-by-letter comparison after `rstrip(".").lower()`, by type, exported for its own script."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava.constants import InputError
from llava.eval.benchmarks import get
from tests.eval.benchmarks.rows import row, write, write_lines

ASKED = "Is it overcast?\nAnswer the question using a single word or phrase."


def label(answer: str, structure: str, **extra: Any) -> dict[str, Any]:
    return {"answer": answer, "types": {"structural": structure}, "isBalanced": True, **extra}


LABELS = {
    "201": label("no", "verify"),
    "202": label("dining table", "query"),
    "203": label("left", "choose"),
    "204": label("cup", "query"),
    "205": label("yes", "logical", isBalanced=False),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "data" / "testdev_balanced_questions.json", LABELS)
    return tmp_path


def test_prompt(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "q.jsonl", [{"question_id": "201307251", "image": "n161313.jpg", "text": ASKED}])
    (question,) = get("gqa").questions(file)
    assert (question.id, question.image, question.text) == ("201307251", "n161313.jpg", ASKED)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("dining table", True),
        ("Dining Table.", True),
        ("Dining table...", True),
        ("dining  table", False),
        (" dining table", False),
        ("dining table. ", False),
        ("a dining table", False),
        ("table", False),
        ("", False),
    ],
)
def test_equality(data: Path, text: str, right: bool) -> None:
    result = get("gqa").score([row("202", text)], data)
    assert result.metrics["accuracy"] == 100 * right
    assert result.n == 1


def test_types(data: Path) -> None:
    result = get("gqa").score([row("201", "No."), row("202", "sofa"), row("203", "right"), row("204", "cup")], data)
    assert result.metrics == {
        "accuracy": 50, "binary": 50, "open": 50,
        "structural_choose": 0, "structural_query": 50, "structural_verify": 100,
    }  # fmt: skip
    assert result.per_question == {"201": 100, "202": 0, "203": 0, "204": 100}
    assert result.notes == ()


def test_unbalanced_and_missing(data: Path) -> None:
    result = get("gqa").score([row("201", "no"), row("205", "yes")], data)
    assert result.n == 1
    assert "1 of 4 questions have an answer" in result.notes[0]
    assert "1 answers belong to no labelled question" in result.notes[1]


def test_ids_as_numbers_and_labels_in_the_archives_folder(tmp_path: Path) -> None:
    write(tmp_path / "data" / "questions1.2" / "testdev_balanced_questions.json", LABELS)
    assert get("gqa").score([row(201, "no")], tmp_path).metrics["accuracy"] == 100


def test_no_balanced_questions(tmp_path: Path) -> None:
    write(tmp_path / "data" / "testdev_balanced_questions.json", {})
    with pytest.raises(InputError, match="no balanced questions"):
        get("gqa").score([row("201", "no")], tmp_path)


def test_export(tmp_path: Path) -> None:
    (file,) = get("gqa").export([row("201", "No."), row("202", "Dining Table")], tmp_path, tmp_path)
    assert file.name == "testdev_balanced_predictions.json"
    assert json.loads(file.read_text()) == [
        {"questionId": "201", "prediction": "no"},
        {"questionId": "202", "prediction": "dining table"},
    ]
