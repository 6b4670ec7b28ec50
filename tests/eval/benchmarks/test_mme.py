"""MME: the four-character rule, acc and acc+, pairing by picture, and the export for its own script."""

from pathlib import Path
from typing import Any

import pytest

from llava.constants import InputError
from llava.eval.benchmarks import get
from llava.eval.benchmarks.mme import verdict
from tests.eval.benchmarks.rows import failed, row, write_lines

SHORT = "\nAnswer the question using a single word or phrase."
RELEASE = "MME_Benchmark_release_version"


def test_prompt(tmp_path: Path) -> None:
    text = "Is this artwork titled x?" + SHORT
    entry = {"question_id": "artwork/images/14777.jpg", "image": "artwork/images/14777.jpg", "text": text}
    (question,) = get("mme").questions(write_lines(tmp_path / "q.jsonl", [entry]))
    assert (question.id, question.image, question.text) == (entry["question_id"], entry["image"], text)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Yes", "yes"), ("no", "no"), ("YES, it is", "yes"), ("No.", "no"), ("Nope", "no"), ("  no", "no"),
        ("   no", "other"), ("It is no", "other"), ("none", "no"), ("know", "no"), ("noye", "no"), ("nyes", "yes"),
        ("Y", "other"), ("", "other"), ("\nyes", "yes"), ("Not", "no"), (". yes", "other"),
    ],
)  # fmt: skip
def test_verdict(text: str, word: str) -> None:
    assert verdict(text) == word


def truth(folder: Path, stem: str, *lines: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    nested = tmp_path / RELEASE / "artwork" / "questions_answers_YN"
    truth(nested, "1", "Is it old? Please answer yes or no.\tYes", "Is it new?  Please answer yes or no.\tNo")
    truth(nested, "2", "Is it old? Please answer yes or no.\tYes", "Is it new?  Please answer yes or no.\tNo", "")
    flat = tmp_path / RELEASE / "code_reasoning"
    truth(flat, "0020", "Is it 1? Please answer yes or no.\tYes", "Is it 2? Please answer yes or no.\tNo")
    return tmp_path


def said(image: str, question: str, text: str) -> dict[str, Any]:
    return row(image, text, question + SHORT)


OLD, NEW = "Is it old?", "Is it new?"
ONE, TWO, CODE = "artwork/images/1.jpg", "artwork/images/2.jpg", "code_reasoning/0020.png"
ALL = [
    said(ONE, OLD, "Yes"), said(ONE, NEW, "No"), said(TWO, OLD, "Yes"), said(TWO, NEW, "Yes"),
    said(CODE, "Is it 1?", "Yes"), said(CODE, "Is it 2?", "maybe"),
]  # fmt: skip


def test_score(data: Path) -> None:
    result = get("mme").score(ALL, data)
    assert result.metrics == {
        "perception": 125, "cognition": 50, "total": 175,
        "artwork_acc": 75, "artwork_acc+": 50, "artwork": 125,
        "code_reasoning_acc": 50, "code_reasoning_acc+": 0, "code_reasoning": 50,
    }  # fmt: skip
    assert (result.headline, result.n) == ("perception", 4)
    assert sorted(result.per_question.values()) == [50, 200]
    assert result.notes == ("only 2 of 14 categories have answers; sums are over these",)


def test_order_tabs_and_line_breaks_shift_nothing(data: Path) -> None:
    rows = [{**entry, "text": entry["text"] + "\tYes\nNo\tx"} for entry in reversed(ALL)]
    assert get("mme").score(rows, data).metrics == get("mme").score(ALL, data).metrics


def test_contributions_average_to_the_headline_over_categories(data: Path) -> None:
    counts = data / RELEASE / "count"
    for stem in ("a", "b", "c"):
        truth(counts, stem, "Is it 1?\tYes", "Is it 2?\tNo")
    more = [said(f"count/{s}.jpg", "Is it 1?", "Yes") for s in "abc"]
    more += [said(f"count/{s}.jpg", "Is it 2?", t) for s, t in zip("abc", ("No", "Yes", "Yes"), strict=True)]
    result = get("mme").score([*ALL, *more], data)
    assert result.metrics["count"] == pytest.approx(100 * 4 / 6 + 100 / 3)
    assert result.metrics["perception"] == pytest.approx(225)
    assert sum(result.per_question.values()) / 5 == pytest.approx(225)


def test_a_picture_needs_all_its_answers(data: Path) -> None:
    result = get("mme").score([*ALL[:3], failed(TWO, NEW + SHORT)], data)
    assert (result.metrics["artwork"], result.n) == (200, 2)
    assert any("1 answers are left out because another question of their picture" in note for note in result.notes)
    assert any("2 of 6 questions have an answer" in note for note in result.notes)


def test_half_of_a_picture_alone(data: Path) -> None:
    with pytest.raises(InputError, match="1 answers are left out because another question of their picture has none"):
        get("mme").score(ALL[:1], data)


def test_cognition_alone_becomes_the_headline(data: Path) -> None:
    result = get("mme").score(ALL[4:], data)
    assert (result.headline, result.n, result.metrics["perception"]) == ("cognition", 2, 0)


def test_questions_of_no_label(data: Path) -> None:
    result = get("mme").score([*ALL, said(ONE, "Is it red?", "Yes"), said("x/1.jpg", OLD, "Yes")], data)
    assert "2 answers belong to no labelled question" in result.notes[0]


def test_broken_ground_truth(data: Path) -> None:
    truth(data / RELEASE / "count", "a", "Is it 1?")
    with pytest.raises(InputError, match=r"a\.txt' is not in the official layout"):
        get("mme").score(ALL, data)


def test_export_restores_the_official_lines(data: Path) -> None:
    rows = [{**entry, "text": entry["text"] + "\tyes\nx"} for entry in reversed(ALL)]
    files = get("mme").export(rows, data, data / "answers" / "run.1")
    assert [file.name for file in files] == ["artwork.txt", "code_reasoning.txt"]
    assert files[0].read_text().split("\n") == [
        "1.txt\tIs it old? Please answer yes or no.\tYes\tYes yes x",
        "1.txt\tIs it new?  Please answer yes or no.\tNo\tNo yes x",
        "2.txt\tIs it old? Please answer yes or no.\tYes\tYes yes x",
        "2.txt\tIs it new?  Please answer yes or no.\tNo\tYes yes x",
        "",
    ]
