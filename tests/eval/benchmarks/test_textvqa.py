"""TextVQA: with and without OCR tokens, joined on (picture, question), scored by ten people."""

from pathlib import Path
from typing import Any

import pytest

from llava.constants import InputError
from llava.eval.benchmarks import get
from llava.eval.benchmarks.textvqa import original_question
from tests.eval.benchmarks.rows import failed, row, write, write_lines

SHORT = "\nAnswer the question using a single word or phrase."
WITH = "what is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL" + SHORT
WITHOUT = "what is the brand of this camera?" + SHORT


def label(image: str, question: str, answers: list[str]) -> dict[str, Any]:
    return {"image_id": image, "question": question, "question_id": 34602, "answers": answers}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    camera = label("003a", "What is the brand of this camera?", ["dakota"] * 2 + ["Dakota Digital"] * 8)
    labels = [camera, label("003a", "what year?", ["2012"] * 10), label("77", "what year?", ["1999"] * 10)]
    write(tmp_path / "TextVQA_0.5.1_val.json", {"data": labels})
    return tmp_path


def test_prompts(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "q.jsonl", [{"question_id": "003a", "image": "003a.jpg", "text": WITH}])
    (question,) = get("textvqa").questions(file)
    assert (question.id, question.image, question.text, question.prompt) == ("003a", "003a.jpg", WITH, None)
    (question,) = get("textvqa").questions(file, ocr=False)
    assert (question.text, question.prompt) == (WITHOUT, None)


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("What Year?" + SHORT, "what year?"),
        ("What Year?\nReference OCR token: A, B" + SHORT, "what year?"),
        ("Reference OCR token: A, B\nWhat Year?" + SHORT, "what year?"),
        ("OCR tokens: A B.\nQuestion: What Year?\nReally? Short answer:", "what year?\nreally?"),
    ],
)
def test_the_question_in_a_prompt(prompt: str, question: str) -> None:
    assert original_question(prompt) == question


@pytest.mark.parametrize(
    "prompt", ["", "What year?", "a\nb\nc", "Reference OCR token: A", "a\nReference OCR token: b\nc\nd"]
)
def test_prompts_without_a_question(prompt: str) -> None:
    with pytest.raises(InputError, match="no TextVQA question"):
        original_question(prompt)


def test_score(data: Path) -> None:
    result = get("textvqa").score([row("003a", "Dakota.", WITH), row("003a", "2013", "what year?" + SHORT)], data)
    # "dakota" by 2 of 10: eight sets hold both, two hold one: (8 · 2/3 + 2 · 1/3) / 10
    assert sorted(result.per_question.values()) == pytest.approx([0, 60])
    assert result.metrics["accuracy"] == pytest.approx(30)
    assert result.n == 2


@pytest.mark.parametrize(
    ("prompts", "note"),
    [
        ([WITH], "asked with the OCR tokens"),
        ([WITHOUT], "asked without OCR tokens"),
        ([WITH, "what year?" + SHORT], "1 of 2 questions were asked with OCR tokens"),
    ],
)
def test_the_variant_is_told(data: Path, prompts: list[str], note: str) -> None:
    result = get("textvqa").score([row("003a", "x", prompt) for prompt in prompts], data)
    assert result.notes[0].startswith(note)


def test_questions_of_a_picture_share_its_id(data: Path) -> None:
    rows = [row("003a", "Dakota Digital", WITHOUT), row("003a", "2012", "WHAT year?" + SHORT)]
    assert get("textvqa").score(rows, data).metrics["accuracy"] == 100


def test_missing_errors_and_foreign(data: Path) -> None:
    rows = [row("77", "1999", "what year?" + SHORT), failed("003a", WITHOUT), row("77", "1", "what day?" + SHORT)]
    result = get("textvqa").score(rows, data)
    assert (result.n, result.metrics["accuracy"]) == (1, 100)
    assert [note.split(" ", 1)[0] for note in result.notes] == ["1", "asked", "1", "1"]


def test_a_question_asked_by_two_people_counts_twice(tmp_path: Path) -> None:
    write(tmp_path / "TextVQA_0.5.1_val.json", {"data": [label("7", "what year?", ["1999"] * 10)] * 2})
    prompt = "what year?" + SHORT
    assert get("textvqa").score([row("7", "1999", prompt), row("7", "2", prompt)], tmp_path).metrics["accuracy"] == 50
    assert get("textvqa").score([row("7", "1999", prompt)] * 3, tmp_path).n == 2
    assert get("textvqa").score([row("7", "1999", prompt), row("7", "1999", prompt.upper())], tmp_path).n == 2


def test_of_several_answers_to_a_question_the_last_counts(data: Path) -> None:
    rows = [row("77", text, "what year?" + SHORT) for text in ("1", "1999")]
    result = get("textvqa").score(rows, data)
    assert (result.metrics["accuracy"], result.n) == (100, 1)
    assert "1 of 2 rows repeat a question" in result.notes[0]


def test_a_row_that_reports_an_error_needs_no_question(data: Path) -> None:
    result = get("textvqa").score([row("77", "1999", "what year?" + SHORT), failed("003a"), failed("x")], data)
    assert (result.metrics["accuracy"], result.n) == (100, 1)
    assert "2 rows report an error" in result.notes[0]


def test_a_prompt_that_is_none_of_textvqas(data: Path) -> None:
    with pytest.raises(InputError, match="no TextVQA question"):
        get("textvqa").score([row("003a", "x", "what year?")], data)
