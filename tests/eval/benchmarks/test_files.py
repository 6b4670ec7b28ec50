"""Files of questions, answers and labels that others made: what is wrong with them is said and stops no other."""

import os
from pathlib import Path
from typing import Any

import pytest

from llava.constants import InputError
from llava.eval.benchmarks import get
from llava.eval.benchmarks.base import read_jsonl
from llava.eval.benchmarks.gqa import export_predictions
from llava.model.files import read_object
from tests.eval.benchmarks.rows import write_lines
from tests.test_reading import unreadable


def test_what_can_not_be_read_to_its_end_is_refused(tmp_path: Path) -> None:
    """A pipe would be waited for; a device might never end."""
    for file in unreadable(tmp_path):
        for read in (read_jsonl, read_object, lambda file: list(get("mmbench").questions(file))):
            with pytest.raises(InputError, match=r"cannot read|codec"):
                read(file)


@pytest.mark.parametrize("name", ["gqa", "mme", "mmvet", "pope", "scienceqa", "textvqa", "vizwiz", "vqav2"])
def test_labels_that_are_a_pipe_are_refused(name: str, tmp_path: Path) -> None:
    """As are labels that are missing; where labels are optional, a pipe is there and no labels."""
    benchmark = get(name)
    files = {"mmvet": ["mentions.json"], "mme": ["MME_Benchmark_release_version/count/1.txt"]}
    for label in (*files.get(name, benchmark.labels), benchmark.question_file):
        (tmp_path / label).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(tmp_path / label)
    with pytest.raises(InputError, match="a pipe"):
        benchmark.score([{"question_id": 1, "text": "x", "prompt": "What?\nAnswer."}], tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("text", value) for value in (None, 5, True, [], {}, "\ud800")),
        *(("image", value) for value in (5, False, [], {}, "a\0b", "x" * 300, "\ud800")),
    ],
)
def test_a_question_with_a_bad_field_is_an_error_and_stops_no_other(tmp_path: Path, field: str, value: Any) -> None:
    good = {"question_id": 1, "text": "What?", "image": "a.png"}
    file = write_lines(
        tmp_path / "q.jsonl", [good, {**good, "question_id": 2, field: value}, {**good, "question_id": 3}]
    )
    first, bad, last = get("gqa").questions(file)
    assert (first.error, last.error) == (None, None)
    assert (bad.id, bad.text, bad.image) == (2, "" if field == "text" else "What?", None)
    assert f"q.jsonl', question 2.{field} is" in str(bad.error)
    alone = write_lines(tmp_path / "alone.jsonl", [{**good, field: value}])
    with pytest.raises(InputError, match="has no question that can be asked"):
        list(get("gqa").questions(alone))


@pytest.mark.parametrize("value", [None, 1.5, True, [], {}, "\ud800"])
def test_a_question_without_a_usable_id_is_refused(tmp_path: Path, value: Any) -> None:
    """Its answer could not be recorded."""
    file = write_lines(tmp_path / "q.jsonl", [{"question_id": 1, "text": "?"}, {"question_id": value, "text": "?"}])
    with pytest.raises(InputError, match=r"question 2\.question_id is .*, not a string or a whole number"):
        list(get("gqa").questions(file))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("text", value) for value in (None, 5, [], {}, "\ud800")),
        *(("question_id", value) for value in (None, 1.5, True, [], {}, "\ud800")),
        *(("prompt", value) for value in (5, [], {})),
        *(("metadata", value) for value in (5, [], "x", {"error": 1}, {"image": []})),
        *(("category", value) for value in (5, [], {})),
        *(("round_id", value) for value in (1.5, "1", [], True)),
    ],
)
def test_answers_with_a_bad_field_are_refused_in_one_line(tmp_path: Path, field: str, value: Any) -> None:
    good = {"question_id": 1, "text": "x", "prompt": "What?\nAnswer."}
    rows = [good, {**good, field: value}]
    for use in (lambda: get("mmvet").score(rows, tmp_path), lambda: export_predictions(rows, tmp_path / "out.json")):
        with pytest.raises(InputError, match=rf"answer 2\.{field}.* is .*; give an answers file in LLaVA's format"):
            use()
    assert not list(tmp_path.iterdir())


def test_answers_to_different_questions_of_one_id_are_refused(tmp_path: Path) -> None:
    rows = [{"question_id": 1, "text": "x", "prompt": prompt} for prompt in ("What?", "What?", "Who?")]
    assert get("mmvet").score(rows[:2], tmp_path).n == 1
    with pytest.raises(InputError, match="question 1 is answered under two prompts"):
        get("mmvet").score(rows, tmp_path)
