"""POPE: the verdict rules, labels found by pair, F1 by category and its mean."""

from pathlib import Path
from typing import Any

import pytest

from llava.constants import InputError
from llava.eval.benchmarks import get
from llava.eval.benchmarks.pope import verdict
from tests.eval.benchmarks.rows import row, write_lines

SHORT = "\nAnswer the question using a single word or phrase."


def test_prompt(tmp_path: Path) -> None:
    text = "Is there a snowboard in the image?" + SHORT
    entry = {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": text, "category": "adversarial"}
    (question,) = get("pope").questions(write_lines(tmp_path / "q.jsonl", [entry]))
    assert (question.id, question.image, question.text) == (1, entry["image"], text)


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no", False),
        ("No.", False),
        ("No, there is a dog", False),
        ("There is not", False),
        ("There is,no dog", True),
        ("NO", True),
        ("No\nx", True),
        ("Yes. No", True),
        ("nothing", True),
        ("None", True),
        ("", True),
        (".No", True),
    ],
)
def test_verdict(text: str, yes: bool) -> None:
    assert verdict(text) is yes


def pair(number: int, things: str, category: str) -> tuple[dict[str, Any], str]:
    return {"image": f"{number}.jpg", "text": f"Is there a {things} in the image?"}, category


PAIRS = {
    1: pair(1, "dog", "random"),
    2: pair(1, "cat", "random"),
    3: pair(2, "dog", "random"),
    4: pair(2, "cat", "random"),
    5: pair(1, "cup", "popular"),
    6: pair(2, "cup", "popular"),
}
TRUTH = {1: "yes", 2: "no", 3: "yes", 4: "No", 5: "yes", 6: "no"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    asked = [
        {"question_id": n, "category": category, **entry, "text": entry["text"] + SHORT}
        for n, (entry, category) in PAIRS.items()
    ]
    write_lines(tmp_path / "llava_pope_test.jsonl", asked)
    write_labels(tmp_path, PAIRS)
    return tmp_path


def write_labels(data: Path, pairs: dict[int, tuple[dict[str, Any], str]]) -> None:
    for name in ("random", "popular", "adversarial"):
        # In reverse order and with other ids: neither may matter.
        found = [
            {"question_id": 900 - n, **entry, "label": TRUTH.get(n, "no")}
            for n, (entry, category) in pairs.items()
            if category == name
        ]
        write_lines(data / "coco" / f"coco_pope_{name}.json", found[::-1])


def test_score(data: Path) -> None:
    # random: label 4 is "No", which is not "no", hence yes. TP 1, 3 · FP 2 · FN 4 -> F1 = 4/6
    # popular: TP 5 · TN 6 -> F1 = 1
    rows = [row(n, text) for n, text in {1: "Yes", 2: "Yes", 3: "Yes", 4: "No", 5: "Yes", 6: "No"}.items()]
    result = get("pope").score(rows, data)
    assert result.metrics["f1_random"] == pytest.approx(100 * 4 / 6)
    assert result.metrics["accuracy_random"] == pytest.approx(50)
    assert result.metrics["precision_random"] == pytest.approx(100 * 2 / 3)
    assert result.metrics["recall_random"] == pytest.approx(100 * 2 / 3)
    assert result.metrics["yes_random"] == pytest.approx(75)
    assert result.metrics["f1_popular"] == 100
    assert result.metrics["f1"] == pytest.approx((100 * 4 / 6 + 100) / 2)
    assert (result.headline, result.n) == ("f1", 6)
    assert result.notes == ("mean F1 is over popular, random alone",)


def test_contributions_average_to_the_headline(data: Path) -> None:
    rows = [row(n, text) for n, text in {1: "Yes", 2: "Yes", 3: "No", 4: "Yes", 5: "No", 6: "Yes"}.items()]
    result = get("pope").score(rows, data)
    values = list(result.per_question.values())
    assert len(values) == 6
    assert sum(values) / 6 == pytest.approx(result.metrics["f1"])


def test_no_positives_divide_by_nothing(data: Path) -> None:
    result = get("pope").score([row(2, "No")], data)
    assert [result.metrics[f"{m}_random"] for m in ("f1", "precision", "recall", "yes")] == [0, 0, 0, 0]
    assert result.metrics["accuracy_random"] == 100
    assert any("1 of 6 questions have an answer" in note for note in result.notes)


def test_labels_of_another_revision_are_told_and_do_no_harm(data: Path) -> None:
    revised = {n: entry for n, entry in PAIRS.items() if n != 1} | {n: pair(9, "bus", "random") for n in (70,)}
    write_labels(data, revised | {71: pair(9, "car", "random")})
    rows = [row(n, "Yes" if TRUTH[n] != "no" else "No") for n in PAIRS]
    result = get("pope").score(rows, data)
    assert result.metrics["f1"] == 100
    assert result.n == 5
    (note,) = [note for note in result.notes if "revision" in note]
    assert note.startswith("random: labels are of another revision")
    assert "1 of 4 questions have no label" in note
    assert "2 of 5 labels no question" in note
    assert "e3e3926" in note


def test_a_missing_label_file(data: Path) -> None:
    (data / "coco" / "coco_pope_popular.json").unlink()
    assert get("pope").score([row(1, "Yes")], data).n == 1  # not needed
    with pytest.raises(InputError, match=r"coco_pope_popular\.json' is missing"):
        get("pope").score([row(5, "Yes")], data)


def test_stray_files_among_the_labels(data: Path) -> None:
    (data / "coco" / ".DS_Store").write_text("x")
    assert get("pope").score([row(1, "Yes")], data).n == 1


def test_answers_of_no_question(data: Path) -> None:
    result = get("pope").score([row(1, "Yes"), row(99, "No")], data)
    assert any("1 answers belong to no labelled question" in note for note in result.notes)
