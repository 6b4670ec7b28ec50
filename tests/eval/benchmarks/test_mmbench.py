"""MMBench in both languages: prompts, rotations, reading a letter, circular accuracy, the server's table."""

import csv
import sys
from pathlib import Path
from typing import Any

import pytest

from llava.constants import InputError
from llava.eval.benchmarks import get
from llava.eval.benchmarks._mmbench import choice
from tests.eval.benchmarks.rows import failed, row

COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
           "comment", "split"]  # fmt: skip
LETTER = "\nAnswer with the option's letter from the given choices directly."
BIG = "QUJD" * 60_000


def table(data: Path, *rows: dict[str, Any], name: str = "mmbench_dev_20230712.tsv", without: str = "") -> Path:
    data.mkdir(parents=True, exist_ok=True)
    columns = [column for column in COLUMNS if column != without]
    with (data / name).open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, delimiter="\t", lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({"image": "QUJD", "category": "x", "split": "dev", **entry} for entry in rows)
    return data / name


THREE = {"index": 241, "question": "Which?", "hint": "Look.", "A": "ant", "B": "bee", "C": "cow", "answer": "B"}
TWO = {"index": 252, "question": 'Is it\t"x"?\nSay.', "hint": "nan", "A": "yes", "B": "no", "answer": "A", "image": BIG}


def test_prompts(tmp_path: Path) -> None:
    first, second = get("mmbench").questions(table(tmp_path, THREE, TWO))
    assert (first.id, first.text, first.prompt) == (241, first.prompt, "Look.\nWhich?\nA. ant\nB. bee\nC. cow")
    assert first.extra == {"round_id": 0, "options": ["ant", "bee", "cow"], "option_char": ["A", "B", "C"]}
    assert second.text == 'Is it\t"x"?\nSay.\nA. yes\nB. no'
    assert second.data == BIG
    assert first.image != second.image


def test_single_pred_prompt_is_asked_but_not_recorded(tmp_path: Path) -> None:
    file = table(tmp_path, TWO | {"question": "Is it?"})
    for name, lang, suffix in (
        ("mmbench", None, LETTER),
        ("mmbench", "cn", "\n请直接回答选项字母。"),
        ("mmbench_cn", None, "\n请直接回答选项字母。"),
        ("mmbench_cn", "en", LETTER),
    ):
        options = {"lang": lang} if lang else {}
        (question,) = get(name).questions(file, single_pred_prompt=True, **options)
        assert question.text == "Is it?\nA. yes\nB. no" + suffix
        assert question.prompt == "Is it?\nA. yes\nB. no"


def test_all_rounds_rotate_the_options(tmp_path: Path) -> None:
    rounds = list(get("mmbench").questions(table(tmp_path, THREE), all_rounds=True))
    assert [r.id for r in rounds] == [241] * 3
    assert [r.extra["round_id"] for r in rounds] == [0, 1, 2]
    assert rounds[1].text == "Look.\nWhich?\nA. bee\nB. cow\nC. ant"
    assert rounds[1].extra == {"round_id": 1, "options": ["bee", "cow", "ant"], "option_char": ["B", "C", "A"]}
    assert len({r.image for r in rounds}) == 1


@pytest.mark.parametrize(
    ("cells", "count"),
    [
        ({"C": "", "D": "d"}, 2),
        ({"C": "nan"}, 2),
        ({"C": "None"}, 2),
        ({"C": "NONE"}, 2),
        ({"C": "N/A", "D": "d"}, 2),
        ({"C": "na", "D": "0"}, 4),
        ({"C": "nano", "D": ""}, 3),
    ],
)
def test_options_end_at_the_first_empty_one(tmp_path: Path, cells: dict[str, str], count: int) -> None:
    (question,) = get("mmbench").questions(table(tmp_path, THREE | cells))
    assert len(question.extra["options"]) == count


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("B.", "B"), (" (B)", "B"), ("B. bee", "B"), ("B: bee or A", "B"), ("The answer is B", "B"),
        ("The answer is B.", "B"), ("Option C is right", "C"), ("A", "A"), ("A cow", "C"), ("I see A", "A"),
        ("A or B", None), ("D", None), ("b", None), ("a BEE", "B"), ("an ant and a bee", None), ("答案是B", "B"),
        ("", None), ("Because", None), ("DNA", None),
    ],
)  # fmt: skip
def test_reading_a_letter(text: str, letter: str | None) -> None:
    assert choice(text, {"A": "ant", "B": "bee", "C": "cow"}) == letter


def test_vanilla_score(tmp_path: Path) -> None:
    table(tmp_path, THREE, TWO, {**TWO, "index": 253, "category": "y"}, {**TWO, "index": 254})
    result = get("mmbench").score([row(241, "B"), row(252, "maybe"), row(253, "(A) yes")], tmp_path)
    assert result.metrics == pytest.approx({"circular": 200 / 3, "vanilla": 200 / 3, "x": 50, "y": 100})
    assert (result.headline, result.n, result.scored) == ("circular", 3, "local")
    assert result.per_question == {241: 100, 252: 0, 253: 100}
    assert "3 of 4 questions have an answer" in result.notes[0]
    assert "every question was asked once" in result.notes[1]
    assert "1 answers name no option" in result.notes[2]


def test_all_rounds_must_be_right(tmp_path: Path) -> None:
    """Bee is B, then A, then C; `option_char` is not needed to undo the rotation."""
    table(tmp_path, THREE, TWO)
    rows = [row(241, text, round_id=r) for r, text in enumerate(("B", "A. bee", "C"))]
    rows += [row(252, "A", round_id=0), row(252, "A", round_id=1)]
    result = get("mmbench").score(rows, tmp_path)
    assert result.metrics == {"circular": 50, "vanilla": 100, "x": 50}
    assert result.per_question == {241: 100, 252: 0}


def test_rotations_within_the_official_table(tmp_path: Path) -> None:
    copy = THREE | {"index": 1_000_241, "A": "bee", "B": "cow", "C": "ant", "answer": "A"}
    table(tmp_path, THREE, copy, TWO)
    result = get("mmbench").score([row(241, "B"), row(1_000_241, "B"), row(252, "yes")], tmp_path)
    assert (result.metrics["circular"], result.metrics["vanilla"], result.n) == (50, 100, 2)


def circle(index: int, image: str, *others: str) -> list[dict[str, Any]]:
    """A question with its three rotations; the right option is bee, the picture is in the first row."""
    turns = (("ant", "bee", "cow", "B"), ("bee", "cow", "ant", "A"), ("cow", "ant", "bee", "C"))
    cells = (image, *(others or [str(index)] * 2))
    return [
        THREE | {"index": index + n * 1_000_000, "A": a, "B": b, "C": c, "answer": letter, "image": cells[n]}
        for n, (a, b, c, letter) in enumerate(turns)
    ]


def answers(file: Path, text: str) -> list[dict[str, Any]]:
    return [row(q.id, text, q.prompt or "", **q.extra) for q in get("mmbench").questions(file) if q.error is None]


def test_rotated_rows_may_name_the_row_that_carries_their_picture(tmp_path: Path) -> None:
    file = table(tmp_path, *circle(241, BIG), *circle(7, "2000007", "7", "QUJD"))
    asked = list(get("mmbench").questions(file))
    assert [q.data for q in asked] == [BIG] * 3 + ["QUJD"] * 3
    assert len({q.image for q in asked}) == 2
    assert not any(q.error for q in asked)
    always = get("mmbench").score(answers(file, "A"), tmp_path)
    assert (always.metrics["circular"], always.metrics["vanilla"], always.n) == (0, 0, 2)
    bee = get("mmbench").score(answers(file, "it is a bee"), tmp_path)
    assert (bee.metrics["circular"], bee.n, bee.notes) == (100, 2, ())


@pytest.mark.parametrize(
    ("cells", "error"),
    [
        ({0: "QUJD", 1_000_000: "9"}, "the image cell of row 1000000 names row 9, which is not in the table"),
        ({0: "QUJD", 1_000_000: "1" * 64}, f"names row {'1' * 64}, which is not in the table"),
        ({1: "9", 1_000_001: "1"}, "the image cell of row 1 names row 9, which is not in the table"),
        ({1: "2", 2: "3", 3: "2"}, "names row 2, which leads back to it"),
        ({5: "5"}, "the image cell of row 5 names row 5, which leads back to it"),
        ({5: " 6 ", 6: ""}, "row 6 has no picture"),
    ],
)
def test_a_picture_that_is_nowhere_is_an_error_row(tmp_path: Path, cells: dict[int, str], error: str) -> None:
    file = table(tmp_path, *({**THREE, "index": index, "image": image} for index, image in cells.items()))
    asked = list(get("mmbench").questions(file, all_rounds=True))
    assert len(asked) == 3 * len(cells)
    bad = [q for q in asked if q.error]
    assert error in str(bad[0].error)
    assert all((q.image, q.data) == (None, None) for q in bad)
    assert all(q.prompt == q.text for q in bad if q.extra["round_id"] == 0)


def test_many_digits_are_a_picture_that_cannot_be_read(tmp_path: Path) -> None:
    (question,) = get("mmbench").questions(table(tmp_path, THREE | {"image": "1" * 65}))
    assert (question.data, question.error) == ("1" * 65, None)


def test_a_chain_as_long_as_the_table(tmp_path: Path) -> None:
    rows = [THREE | {"index": n, "image": str(n + 1)} for n in range(600)] + [THREE | {"index": 600}]
    assert {q.data for q in get("mmbench").questions(table(tmp_path, *rows))} == {"QUJD"}


@pytest.mark.parametrize("missing", ["unanswered", "error"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_question_without_all_its_rotations_is_left_out_never_right(tmp_path: Path, which: int, missing: str) -> None:
    file = table(tmp_path, *circle(241, BIG), *circle(7, BIG))
    rows = answers(file, "a bee")
    rows[which : which + 1] = [] if missing == "unanswered" else [failed(rows[which]["question_id"])]
    result = get("mmbench").score(rows, tmp_path)
    assert (dict(result.per_question), result.n, result.metrics["x"]) == ({7: 100}, 1, 100)
    assert "5 of 6 questions have an answer; the score is over these" in result.notes
    (note,) = [note for note in result.notes if "circular" in note]
    assert note == "1 questions are left out of circular accuracy because a rotation of theirs has no answer"


def test_first_rotations_alone_have_no_circular_accuracy(tmp_path: Path) -> None:
    file = table(tmp_path, *circle(241, BIG), *circle(7, BIG))
    result = get("mmbench").score(answers(file, "B")[::3], tmp_path)
    assert (dict(result.metrics), result.headline, result.n) == ({"vanilla": 100}, "circular", 0)
    assert "2 questions are left out" in result.notes[1]


def test_a_round_without_an_answer_leaves_its_question_out(tmp_path: Path) -> None:
    table(tmp_path, THREE, TWO)
    rows = [row(241, text, round_id=r) for r, text in enumerate(("B", "A"))]
    rows += [
        row(252, "A", round_id=0),
        row(252, "B", round_id=1),
        row(252, "B", round_id=2),
        row(252, "B", round_id=-1),
    ]
    result = get("mmbench").score(rows, tmp_path)
    assert dict(result.per_question) == {252: 100}
    assert "1 questions are left out" in result.notes[2]
    assert "2 answers belong to no labelled question" in result.notes[1]


def test_a_question_without_options_has_no_rounds(tmp_path: Path) -> None:
    table(tmp_path, THREE | {"index": 5, "A": ""}, TWO)
    rows = [row(252, letter, round_id=r) for r, letter in enumerate("AB")]
    assert dict(get("mmbench").score(rows, tmp_path).per_question) == {252: 100}


def test_a_rotation_without_a_label_leaves_its_question_out(tmp_path: Path) -> None:
    first, second, third = circle(241, BIG)
    file = table(tmp_path, first, second | {"answer": "AB"}, third | {"answer": ""}, TWO)
    result = get("mmbench").score(answers(file, "a bee"), tmp_path)
    assert set(result.per_question) == {252}


def test_categories_do_not_replace_the_numbers_they_share_a_name_with(tmp_path: Path) -> None:
    table(tmp_path, THREE | {"category": "circular"}, TWO)
    assert get("mmbench").score([row(241, "B"), row(252, "B")], tmp_path).metrics["circular"] == 50


def test_an_index_that_stands_there_twice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 3: index 0241 stands there twice"):
        list(get("mmbench").questions(table(tmp_path, THREE, THREE | {"index": "0241"})))


def test_a_table_without_answers_is_the_servers(tmp_path: Path) -> None:
    table(tmp_path, THREE, without="answer")
    assert get("mmbench").score([row(241, "B")], tmp_path).scored == "server"


def test_errors_and_foreign_questions(tmp_path: Path) -> None:
    table(tmp_path, THREE, TWO)
    result = get("mmbench").score([row(241, "B"), failed(252), row(9, "A")], tmp_path)
    assert result.n == 1
    assert len(result.notes) == 4
    with pytest.raises(InputError, match="is no MMBench question"):
        get("mmbench").score([row("n1", "B")], tmp_path)


@pytest.mark.parametrize("without", ["image", "question", "index"])
def test_a_table_that_lacks_a_column(tmp_path: Path, without: str) -> None:
    with pytest.raises(InputError, match=f"no column {without}"):
        list(get("mmbench").questions(table(tmp_path, THREE, without=without)))


def test_tables_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 2: index 'x' is no number"):
        list(get("mmbench").questions(table(tmp_path, THREE | {"index": "x"})))
    (tmp_path / "binary.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary\.tsv"):
        list(get("mmbench").questions(tmp_path / "binary.tsv"))
    with pytest.raises(InputError, match=r"nowhere\.tsv"):
        list(get("mmbench").questions(tmp_path / "nowhere.tsv"))


def test_export(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    table(tmp_path, THREE, TWO, name="mmbench_dev_cn_20231003.tsv")
    rows = [row(241, "=B", round_id=0), row(241, "C", round_id=1)]
    (file,) = get("mmbench_cn").export(rows, tmp_path, tmp_path / "upload")
    assert file == tmp_path / "upload" / "mmbench_cn.xlsx"
    head, first, second = openpyxl.load_workbook(file).active.values
    assert head == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert first == (241, "Which?", "ant", "bee", "cow", None, "=B", "B", "dev")
    assert second == (252, 'Is it\t"x"?\nSay.', "yes", "no", None, None, None, "A", "dev")


def test_export_without_openpyxl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    table(tmp_path, THREE)
    with pytest.raises(InputError, match=r"pip install 'globalcom2\[eval\]'"):
        get("mmbench").export([row(241, "B")], tmp_path, tmp_path)
