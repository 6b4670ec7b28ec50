"""ScienceQA: prompts, the rules that read a letter, and both accuracies."""

from pathlib import Path
from typing import Any

import pytest

from llava.constants import InputError
from llava.eval.benchmarks import get
from llava.eval.benchmarks.scienceqa import judge, parse
from tests.eval.benchmarks.rows import failed, row, write

LETTER = "\nAnswer with the option's letter from the given choices directly."
BODY = "Which animal?\nA. dog\nB. cat"


def said(value: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": value}, {"from": "gpt", "value": "B"}]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    entries = [
        {"id": "5", "image": "5/image.png", "conversations": said(f"<image>\nContext: A photo.\n{BODY}")},
        {"id": "11", "conversations": said(BODY)},
        {"id": "12", "image": "12/image.png", "conversations": said(f"{BODY}\n<image>")},
    ]
    return write(tmp_path / "llava_test_CQM-A.json", entries)


def test_prompts(questions: Path) -> None:
    first, second, third = get("scienceqa").questions(questions)
    assert (first.id, first.image) == ("5", "5/image.png")
    assert first.text == "Context: A photo.\nWhich animal?\nA. dog\nB. cat"
    assert first.prompt == "<image>\nContext: A photo.\nWhich animal?\nA. dog\nB. cat"
    assert (second.image, second.text, second.prompt) == (None, BODY, BODY)
    assert (third.text, third.prompt) == (BODY, "<image>\n" + BODY)


def test_single_pred_prompt_is_asked_but_not_recorded(questions: Path) -> None:
    first, second, _ = get("scienceqa").questions(questions, single_pred_prompt=True)
    assert first.text == "Context: A photo.\nWhich animal?\nA. dog\nB. cat" + LETTER
    assert first.prompt == "<image>\nContext: A photo.\nWhich animal?\nA. dog\nB. cat"
    assert (second.text, second.prompt) == (BODY + LETTER, BODY)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("E", "E"),
        ("F", "FAILED"),
        ("b", "FAILED"),
        ("B.", "FAILED"),
        ("B. ", "B"),
        ("B. cat", "B"),
        ("B.cat", "FAILED"),
        ("F. fish", "FAILED"),
        ("The answer is B.", "B"),
        ("The answer is B", "FAILED"),
        ("The answer is B!", "B"),
        ("So: The answer is Z.", "Z"),
        ("The answer is A. The answer is B.", "FAILED"),
        ("The answer is A. The answer is A.", "FAILED"),
        ("the answer is B.", "FAILED"),
        ("C. The answer is B.", "C"),
        (" B", "FAILED"),
        ("", "FAILED"),
    ],
)
def test_reading_a_letter(text: str, letter: str) -> None:
    assert parse(text) == letter


def problem(answer: int, choices: int = 2) -> dict[str, Any]:
    return {"answer": answer, "choices": ["dog", "cat", "cow"][:choices]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "pid_splits.json", {"test": ["1", "2", "3", "4"], "val": ["9"]})
    problems = {"1": problem(0), "2": problem(1), "3": problem(1), "4": problem(2, 3), "9": problem(0)}
    write(tmp_path / "problems.json", problems)
    return tmp_path


def test_both_accuracies(data: Path) -> None:
    rows = [row("1", "A", "<image>\nQ"), row("2", "A", "<image>\nQ"), row("3", "B. cat", "Q"), row("4", "C", "Q")]
    result = get("scienceqa").score(rows, data)
    assert result.metrics == {"img_accuracy": 50, "accuracy": 75}
    assert (result.headline, result.n) == ("img_accuracy", 2)
    assert result.per_question == {"1": 100, "2": 0}
    assert result.notes == ("papers quote img_accuracy, over the questions with a picture",)


def test_a_letter_beyond_the_choices_and_a_failure_are_wrong(data: Path) -> None:
    rows = [row("1", "C", "<image>\nQ"), row("2", "neither", "<image>\nQ"), row("3", "B", "Q"), row("4", "C", "Q")]
    verdicts = {v.question_id: v for v in judge({r["question_id"]: r for r in rows}, data)}
    assert [verdicts[key].predicted for key in "1234"] == [-1, -1, 1, 2]
    assert verdicts["2"].parsed == "FAILED"
    result = get("scienceqa").score(rows, data)
    assert result.metrics == {"img_accuracy": 0, "accuracy": 50}
    assert "1 answers name no choice" in result.notes[0]


def test_a_missing_answer_is_left_out_and_counted_once(data: Path) -> None:
    result = get("scienceqa").score([row("1", "A", "<image>\nQ"), failed("2", "<image>\nQ")], data)
    assert result.metrics == {"img_accuracy": 100, "accuracy": 100}
    assert result.n == 1
    assert sum("1 of 4 questions have an answer" in note for note in result.notes) == 1


def test_no_picture_at_all(data: Path) -> None:
    result = get("scienceqa").score([row("3", "B", "Q")], data)
    assert (result.n, result.metrics) == (0, {"accuracy": 100})
    assert any("there is no img_accuracy" in note for note in result.notes)


def test_numbers_as_ids(data: Path) -> None:
    assert get("scienceqa").score([row(1, "A", "<image>\nQ")], data).metrics["img_accuracy"] == 100


def test_a_split_that_is_not_there(data: Path) -> None:
    with pytest.raises(InputError, match="pid_splits"):
        judge({}, data, "minitest")
