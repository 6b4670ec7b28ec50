"""MM-Vet: asked as written, graded elsewhere; with data of one's own, by what an answer mentions."""

import json
from pathlib import Path

import pytest

from llava.constants import InputError
from llava.eval.benchmarks import get
from llava.eval.benchmarks.mmvet import mentioned
from tests.eval.benchmarks.rows import failed, row, write, write_lines


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


SIGN, RING, NOTE = ["red sign", "CAT"], ["blue ring"], ["red note", "47"]


@pytest.mark.parametrize(
    ("text", "things", "found"),
    [
        ("a red sign saying CAT, a blue ring", [SIGN, RING], [1, 1]),
        ("a blue ring, a red sign saying CAT", [SIGN, RING], [1, 1]),
        ("A Blue RING.", [RING], [1]),
        ("a red sign saying cat", [SIGN], [1]),
        ("saying CAT on a red sign", [SIGN], [1]),
        ("a red sign, saying CAT", [SIGN], [0]),
        ("a red, sign saying CAT", [SIGN], [0]),
        ("a red sign saying CATS", [SIGN], [0]),
        ("an infrared sign saying CAT", [SIGN], [0]),
        ("a red note saying 147", [NOTE], [0]),
        ("a red note saying 47!", [NOTE], [1]),
        ("a blue ring", [RING, RING], [1, 0]),
        ("a blue ring, a blue ring", [RING, RING], [1, 1]),
        ("a blue ring and a red sign saying CAT", [SIGN, RING], [1, 0]),
        ("a blue  ring", [RING], [0]),
        ("", [SIGN, RING], [0, 0]),
        (",,,", [RING], [0]),
        ("a blue ring", [], []),
        ("it costs 5.5 (a+b)", [["5.5", "a+b"]], [1]),
        ("it costs 545 (aab)", [["5.5", "a+b"]], [0]),
    ],
)
def test_a_part_between_commas_mentions_one_thing_with_all_its_words(
    text: str, things: list[list[str]], found: list[int]
) -> None:
    """Whole words, in any case and order."""
    assert mentioned(text, things) == [bool(value) for value in found]


def test_score_is_the_share_mentioned(tmp_path: Path) -> None:
    """By hand: of two things one, of one one, of three two; ids are numbers there and texts in JSON."""
    wanted = {"0": [SIGN, RING], "1": [RING], "2": [SIGN, RING, NOTE]}
    write(tmp_path / "mentions.json", wanted)
    said = ["a red sign saying CAT, a green ring", "a blue ring", "a red note saying 47, a blue ring, a dog"]
    result = get("mmvet").score([row(number, text) for number, text in enumerate(said)], tmp_path)
    assert (result.scored, result.headline, result.n, result.notes) == ("local", "mentioned", 3, ())
    assert dict(result.per_question) == pytest.approx({0: 50, 1: 100, 2: 200 / 3})
    assert result.metrics["mentioned"] == pytest.approx((50 + 100 + 200 / 3) / 3)


def test_missing_and_foreign_answers_are_left_out_and_said(tmp_path: Path) -> None:
    write(tmp_path / "mentions.json", {str(number): [RING] for number in range(4)})
    rows = [row(0, "a blue ring"), row(1, "nothing"), row(1, "a blue ring"), failed(2), row(77, "a blue ring")]
    result = get("mmvet").score(rows, tmp_path)
    assert (result.metrics["mentioned"], result.n) == (100, 2)
    notes = " ".join(result.notes)
    assert "1 of 5 rows repeat a question" in notes
    assert "1 rows report an error" in notes
    assert "2 of 4 questions have an answer" in notes
    assert "1 answers belong to no labelled question" in notes


def test_mentions_of_another_set_or_layout_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "mentions.json", {"9": [RING]})
    with pytest.raises(InputError, match="no answer belongs to a labelled question"):
        get("mmvet").score([row(0, "a blue ring")], tmp_path)
    write(tmp_path / "mentions.json", [1])
    with pytest.raises(InputError, match=r"mentions\.json.* not in the official layout"):
        get("mmvet").score([row(0, "a blue ring")], tmp_path)
    (tmp_path / "mentions.json").write_text("{")
    with pytest.raises(InputError, match="get it from whoever made these data"):
        get("mmvet").score([row(0, "a blue ring")], tmp_path)


def test_export_does_not_need_mentions(tmp_path: Path) -> None:
    write(tmp_path / "mentions.json", {"0": [RING]})
    (file,) = get("mmvet").export([row(0, "a ring")], tmp_path, tmp_path / "run")
    assert json.loads(file.read_text()) == {"v1_0": "a ring"}
