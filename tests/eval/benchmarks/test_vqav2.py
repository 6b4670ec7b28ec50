"""VQAv2: prompts as in the file, val2014 scored here, the test set exported for EvalAI."""

import json
from pathlib import Path

import pytest

from llava.constants import InputError
from llava.eval.benchmarks import get
from tests.eval.benchmarks.rows import row, write, write_lines

ASKED = "Where is he looking?\nAnswer the question using a single word or phrase."


def annotation(number: int, answers: list[str], kind: str = "other") -> dict[str, object]:
    return {"question_id": number, "answers": [{"answer": a} for a in answers], "answer_type": kind}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    labels = [
        annotation(1, ["down"] * 3 + ["up"] * 7),
        annotation(2, ["2"] * 9 + ["two dogs"], "number"),
        annotation(3, ["yes"] * 10, "yes/no"),
    ]
    write(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": labels})
    return tmp_path


def test_prompt(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "q.jsonl", [{"question_id": 262144000, "image": "a.jpg", "text": ASKED}])
    (question,) = get("vqav2").questions(file)
    assert (question.id, question.image, question.text, question.prompt) == (262144000, "a.jpg", ASKED, None)


def test_val_is_scored_by_ten_people(data: Path) -> None:
    result = get("vqav2").score([row(1, "Down."), row(2, "two"), row(3, "no")], data)
    # "down" by 3 of 10: seven sets have 3 others, three have 2: (7 · 1 + 3 · 2/3) / 10
    assert result.per_question == pytest.approx({1: 90, 2: 100, 3: 0})
    assert result.metrics == pytest.approx({"accuracy": 190 / 3, "number": 100, "other": 90, "yes/no": 0})
    assert (result.headline, result.n, result.scored, result.notes) == ("accuracy", 3, "local", ())


def test_missing_and_foreign_answers_are_noted(data: Path) -> None:
    result = get("vqav2").score([row(3, "yes"), row(77, "yes")], data)
    assert (result.n, result.metrics["accuracy"]) == (1, 100)
    assert "1 of 3 questions have an answer" in result.notes[0]
    assert "1 answers belong to no labelled question" in result.notes[1]


def test_the_test_set_is_the_servers(data: Path) -> None:
    for folder in (data, data / "without_labels"):
        result = get("vqav2").score([row(77, "yes")], folder)
        assert (result.scored, result.n, dict(result.metrics)) == ("server", 1, {})
        assert "EvalAI" in result.notes[-1]


def test_nine_people_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": [annotation(1, ["a"] * 9)]})
    with pytest.raises(InputError, match="9 human answers instead of 10"):
        get("vqav2").score([row(1, "a")], tmp_path)


def test_export_covers_the_full_test_set(tmp_path: Path) -> None:
    write_lines(tmp_path / "llava_vqav2_mscoco_test2015.jsonl", [{"question_id": n} for n in (3, 1, 2)])
    (file,) = get("vqav2").export([row(1, "The Two, dogs."), row(2, "no")], tmp_path, tmp_path / "out.json")
    assert file == tmp_path / "out.json"
    assert json.loads(file.read_text()) == [
        {"question_id": 3, "answer": ""},
        {"question_id": 1, "answer": "2 dogs"},
        {"question_id": 2, "answer": "no"},
    ]


def test_export_into_a_folder_and_without_questions(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="test2015"):
        get("vqav2").export([row(1, "x")], tmp_path, tmp_path)
    write_lines(tmp_path / "llava_vqav2_mscoco_test2015.jsonl", [{"question_id": 1}])
    (file,) = get("vqav2").export([row(1, "x")], tmp_path, tmp_path / "llava-v1.5-7b")
    assert file == tmp_path / "llava-v1.5-7b" / "vqav2_test2015.json"
