"""VizWiz: val scored here through its pictures, test exported for EvalAI, complete or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava.constants import InputError
from llava.eval.benchmarks import get
from tests.eval.benchmarks.rows import failed, row, write, write_lines

SUFFIX = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    "\nAnswer the question using a single word or phrase."
)
ASKED = "What is this?" + SUFFIX


def label(image: str, question: str, answers: list[str]) -> dict[str, Any]:
    return {
        "image": image, "question": question, "answers": [{"answer": a} for a in answers], "answer_type": "other",
    }  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    labels = [label("VizWiz_val_0.jpg", "What is this? ", ["basil"] * 5 + ["herb"] * 5)]
    labels += [label("VizWiz_val_1.jpg", "What's it?", ["unanswerable"] * 10)]
    write(tmp_path / "val.json", labels)
    asked = [{"question_id": 0, "image": "VizWiz_val_0.jpg", "text": ASKED}]
    asked += [{"question_id": 1, "image": "VizWiz_val_1.jpg", "text": "What's it?" + SUFFIX}]
    write_lines(tmp_path / "llava_val.jsonl", asked)
    tested = [{"question_id": n, "image": f"VizWiz_test_{n}.jpg", "text": f"Colour {n}?" + SUFFIX} for n in (0, 1)]
    write_lines(tmp_path / "llava_test.jsonl", tested)
    return tmp_path


def test_prompt(data: Path) -> None:
    question = next(iter(get("vizwiz").questions(data / "llava_val.jsonl")))
    assert (question.id, question.image, question.text) == (0, "VizWiz_val_0.jpg", ASKED)


def test_val_is_scored(data: Path) -> None:
    result = get("vizwiz").score([row(0, "Basil", ASKED), row(1, "Unanswerable", "What's it?" + SUFFIX)], data)
    assert result.per_question == {0: 100, 1: 100}
    assert (result.scored, result.n, result.notes) == ("local", 2, ())


def test_missing_answers_are_counted(data: Path) -> None:
    result = get("vizwiz").score([row(0, "oregano", ASKED)], data)
    assert result.metrics["accuracy"] == 0
    assert "1 of 2 questions have an answer" in result.notes[0]


def test_answers_to_the_test_set_are_the_servers_even_beside_val_labels(data: Path) -> None:
    """Ids of both sets begin at 0: the prompt tells which was asked."""
    result = get("vizwiz").score([row(0, "basil", "Colour 0?" + SUFFIX)], data)
    assert (result.scored, result.n) == ("server", 1)
    assert get("vizwiz").score([row(0, "basil", "Colour 0?" + SUFFIX)], data / "elsewhere").scored == "server"


def test_several_questions_of_a_picture_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path / "val.json", [label("a.jpg", "Who?", ["me"] * 10), label("a.jpg", "Where?", ["here"] * 10)])
    asked = [{"question_id": n, "image": "a.jpg", "text": text + SUFFIX} for n, text in enumerate(("Who?", "Where?"))]
    write_lines(tmp_path / "llava_test.jsonl", asked)
    result = get("vizwiz").score([row(0, "here", "Who?" + SUFFIX), row(1, "here", "Where?" + SUFFIX)], tmp_path)
    assert result.per_question == {0: 0, 1: 100}


def test_export(data: Path) -> None:
    (file,) = get("vizwiz").export([row(1, "It's a Can."), row(0, "no")], data, data / "upload")
    assert json.loads(file.read_text()) == [
        {"image": "VizWiz_test_0.jpg", "answer": "no"},
        {"image": "VizWiz_test_1.jpg", "answer": "it 's can"},
    ]


def test_export_is_complete_or_refused(data: Path) -> None:
    for rows in ([row(0, "x")], [row(0, "x"), failed(1)]):
        with pytest.raises(InputError, match="1 of 2 questions have no answer"):
            get("vizwiz").export(rows, data, data)
