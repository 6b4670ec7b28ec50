"""POPE: the verdict rules, labels found by pair, F1 by category and its mean."""

import json
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


def write_authors(data: Path, shared: bool = True) -> None:
    """Files of POPE's authors: ids begin anew in each category, which have their positive questions in common."""
    asked = []
    for category in ("adversarial", "popular", "random"):
        entries = []
        for number in range(1, 5):
            thing = f"thing {number}" if number % 2 and shared else f"{category} {number}"
            entry, _ = pair(number // 3, thing, category)
            entries.append({"question_id": number, **entry, "label": ("no", "yes")[number % 2]})
        write_lines(data / "coco" / f"coco_pope_{category}.json", entries)
        asked += [{**entry, "text": entry["text"] + SHORT, "category": category} for entry in entries]
    write_lines(data / "llava_pope_test.jsonl", asked)


def said(data: Path, right: str, *fields: str) -> list[dict[str, Any]]:
    """Answers that are right in the categories named, and wrong elsewhere; rows carry what `fields` names."""
    rows = []
    for question in get("pope").questions(data / "llava_pope_test.jsonl"):
        yes = bool(int(question.id) % 2) == (question.extra["category"] in right)
        rows.append(row(question.id, "Yes" if yes else "No", question.text if "prompt" in fields else ""))
        rows[-1] |= dict(question.extra) if "category" in fields else {}
        rows[-1]["metadata"] = {"image": question.image} if "image" in fields else {}
    return rows


@pytest.mark.parametrize("fields", [("category",), ("category", "prompt", "image")])
@pytest.mark.parametrize("turn", [1, -1])
def test_ids_that_begin_anew_in_each_category(tmp_path: Path, fields: tuple[str, ...], turn: int) -> None:
    write_authors(tmp_path)
    result = get("pope").score(said(tmp_path, "adversarial", *fields)[::turn], tmp_path)
    assert [result.metrics[f"f1_{name}"] for name in ("adversarial", "popular", "random")] == [100, 0, 0]
    assert result.metrics["f1"] == pytest.approx(100 / 3)
    assert (result.n, result.notes) == (12, ())
    assert sum(result.per_question.values()) / 12 == pytest.approx(result.metrics["f1"])


def test_the_category_is_recorded_only_where_ids_do_not_tell(data: Path, tmp_path: Path) -> None:
    assert [dict(q.extra) for q in get("pope").questions(data / "llava_pope_test.jsonl")] == [{}] * 6
    write_authors(tmp_path)
    asked = get("pope").questions(tmp_path / "llava_pope_test.jsonl")
    assert [q.extra["category"] for q in asked] == ["adversarial"] * 4 + ["popular"] * 4 + ["random"] * 4


def test_prompts_tell_questions_of_one_id_apart(tmp_path: Path) -> None:
    write_authors(tmp_path, shared=False)
    result = get("pope").score(said(tmp_path, "adversarial", "prompt"), tmp_path)
    assert [result.metrics[f"f1_{name}"] for name in ("adversarial", "popular", "random")] == [100, 0, 0]


def test_answers_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    write_authors(tmp_path)
    refusal = "question 1 is in adversarial, popular, random, and the answers to it do not say which"
    for fields in ((), ("prompt",), ("prompt", "image")):
        with pytest.raises(InputError, match=refusal):
            get("pope").score(said(tmp_path, "adversarial", *fields), tmp_path)
    alike = said(tmp_path, "adversarial, popular, random", "prompt")
    assert get("pope").score(alike, tmp_path).metrics["f1"] == 100
    for rows in (alike[1:], [*alike, alike[0]], [*alike, {**alike[0], "category": "popular"}]):
        with pytest.raises(InputError, match=refusal):
            get("pope").score(rows, tmp_path)


def test_an_answer_to_another_question_of_the_same_id_is_no_answer(data: Path) -> None:
    rows = [row(1, "Yes", PAIRS[1][0]["text"]), row(2, "No", PAIRS[1][0]["text"] + SHORT)]
    rows += [row(3, "Yes", metadata={"image": "1.jpg"}), row(5, "Yes", category="random"), row(6, "No", metadata=None)]
    result = get("pope").score(rows, data)
    assert result.n == 2
    assert any("3 answers belong to no labelled question" in note for note in result.notes)


def test_the_last_answer_to_a_question_counts(tmp_path: Path) -> None:
    write_authors(tmp_path)
    rows = [*said(tmp_path, "", "category"), *said(tmp_path, "adversarial, popular, random", "category")]
    result = get("pope").score(rows, tmp_path)
    assert result.metrics["f1"] == 100
    assert "12 of 24 rows repeat a question" in result.notes[0]


@pytest.mark.parametrize("gone", ["unanswered", "error"])
def test_a_question_without_an_answer_is_left_out_of_its_category(tmp_path: Path, gone: str) -> None:
    write_authors(tmp_path)
    rows = said(tmp_path, "adversarial, popular, random", "category")
    for number in (1, 4):
        rows[number - 1]["text"] = "x" if gone == "error" else "gone"
        rows[number - 1]["metadata"] = {"error": "unreadable"} if gone == "error" else {}
    result = get("pope").score([entry for entry in rows if entry["text"] != "gone"], tmp_path)
    assert (result.n, result.metrics["f1_adversarial"]) == (10, 100)
    assert "10 of 12 questions have an answer; the score is over these" in result.notes


def test_a_question_that_could_not_be_asked_costs_no_other(tmp_path: Path) -> None:
    write_authors(tmp_path)
    file = tmp_path / "llava_pope_test.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0] |= {"image": 5}
    lines[1] |= {"text": None}
    write_lines(file, lines)
    asked = list(get("pope").questions(file))
    assert [bool(question.error) for question in asked] == [True, True] + [False] * 10
    rows = said(tmp_path, "adversarial, popular, random", "category", "prompt", "image")
    for entry, question in zip(rows, asked, strict=True):
        entry["metadata"] |= {"error": question.error} if question.error else {}
    result = get("pope").score(rows, tmp_path)
    assert (result.metrics["f1"], result.n) == (100, 10)
    assert "10 of 12 questions have an answer; the score is over these" in result.notes


def test_files_in_which_questions_cannot_be_told_apart(data: Path) -> None:
    asked = [{"question_id": 1, "image": "1.jpg", "text": text, "category": "random"} for text in ("a?", "b?")]
    write_lines(data / "llava_pope_test.jsonl", asked)
    with pytest.raises(InputError, match="question 2: random has a question 1 already"):
        get("pope").score([row(1, "Yes")], data)
    write_lines(data / "llava_pope_test.jsonl", [asked[0] | {"category": "../random"}])
    with pytest.raises(InputError, match=r"category '\.\./random' is no name"):
        get("pope").score([row(1, "Yes")], data)
    write_lines(data / "llava_pope_test.jsonl", asked[:1])
    write_lines(data / "coco" / "coco_pope_random.json", [asked[0] | {"label": label} for label in ("yes", "no")])
    with pytest.raises(InputError, match="label 2 contradicts an earlier one"):
        get("pope").score([row(1, "Yes")], data)
