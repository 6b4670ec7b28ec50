"""What holds for every benchmark: questions of generated data, missing files, empty and foreign answers."""

import csv
from pathlib import Path
from typing import Any

import pytest

from llava.constants import InputError
from llava.eval.benchmarks import available, get
from tests.eval.benchmarks.rows import failed, row, write
from tests.eval.data import right_answers, write_benchmark

TEN = ["gqa", "mmbench", "mmbench_cn", "mme", "mmvet", "pope", "scienceqa", "textvqa", "vizwiz", "vqav2"]
FOLDERS = {
    "vqav2": "vqav2", "gqa": "gqa", "vizwiz": "vizwiz", "scienceqa": "scienceqa", "textvqa": "textvqa", "pope": "pope",
    "mme": "MME", "mmbench": "mmbench", "mmbench_cn": "mmbench_cn", "mmvet": "mm-vet",
}  # fmt: skip


def test_the_ten_are_found() -> None:
    assert set(TEN) <= set(available())
    assert {name: get(name).folder for name in TEN} == FOLDERS


@pytest.mark.parametrize("name", TEN)
def test_generated_questions_are_read(name: str, tmp_path: Path) -> None:
    benchmark, data = get(name), write_benchmark(name, tmp_path, n_images=3, per_image=2)
    assert data == tmp_path / benchmark.folder
    assert not benchmark.missing(data)
    assert all((data / label).exists() for label in benchmark.labels)
    questions = list(benchmark.questions(data / benchmark.question_file))
    assert len(questions) == (9 if name == "scienceqa" else 6)
    for question in questions:
        assert question.text
        if question.data is None and question.image is not None:
            assert (data / benchmark.image_folder / question.image).exists()


@pytest.mark.parametrize("name", TEN)
def test_missing_names_what_a_run_needs(name: str, tmp_path: Path) -> None:
    benchmark = get(name)
    missing = benchmark.missing(tmp_path)
    assert tmp_path / benchmark.question_file in missing
    assert len(missing) == (1 if name.startswith("mmbench") else 2)
    assert benchmark.source


@pytest.mark.parametrize("name", TEN)
def test_answers_of_generated_data_get_a_score(name: str, tmp_path: Path) -> None:
    """The right word, the right letter or "Yes" for every question; a third of the latter are right."""
    benchmark, data = get(name), write_benchmark(name, tmp_path)
    questions = list(benchmark.questions(data / benchmark.question_file))
    rows = [row(q.id, "Yes", q.prompt or q.text, **q.extra) for q in questions]
    result = benchmark.score(rows, data)
    assert result.benchmark == name
    if name == "mmvet":
        assert result.scored == "server"
        assert result.n == len(questions)
        return
    assert result.scored == "local"
    assert result.headline in result.metrics
    mean = sum(result.per_question.values()) / len(result.per_question)
    assert mean == pytest.approx(result.metrics[result.headline])
    again = benchmark.score(rows[:8], data)
    assert again.n <= 8
    assert sum(" questions have an answer; the score is over these" in note for note in again.notes) == 1


@pytest.mark.parametrize("name", TEN)
def test_no_answers_at_all(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no answers"):
        get(name).score([], write_benchmark(name, tmp_path))


@pytest.mark.parametrize("name", TEN)
def test_rows_that_are_no_answers(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="answer 1 has no question_id or no text"):
        get(name).score([{"question_id": 1}], write_benchmark(name, tmp_path))


@pytest.mark.parametrize("name", ["gqa", "mme", "pope", "textvqa", "mmbench", "scienceqa"])
def test_answers_of_another_set(name: str, tmp_path: Path) -> None:
    data = write_benchmark(name, tmp_path)
    with pytest.raises(InputError, match="no answer belongs to a labelled question"):
        get(name).score([row(987654, "x", "What?\nAnswer.")], data)


@pytest.mark.parametrize("name", ["gqa", "mme", "pope", "textvqa", "mmbench", "scienceqa"])
def test_rows_that_all_report_an_error_are_named_as_the_cause(name: str, tmp_path: Path) -> None:
    data = write_benchmark(name, tmp_path)
    rows = [failed(1, "What?\nAnswer."), failed(2, "Where?\nAnswer.")]
    with pytest.raises(InputError, match=r"\(2 rows report an error instead of an answer"):
        get(name).score(rows, data)


@pytest.mark.parametrize("name", ["gqa", "mme", "pope", "textvqa", "scienceqa", "mmbench"])
def test_missing_labels_name_file_and_source(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        get(name).score([row(1, "x", "What?\nAnswer.")], tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "get it from" in str(caught.value)


@pytest.mark.parametrize("name", ["gqa", "textvqa", "scienceqa", "vqav2", "vizwiz"])
def test_labels_in_another_layout(name: str, tmp_path: Path) -> None:
    benchmark, data = get(name), write_benchmark(name, tmp_path)
    for label in benchmark.labels:
        (data / label).write_text('{"unexpected": [1]}')
    with pytest.raises(InputError, match="not in the official layout"):
        benchmark.score([row(1, "x", "What?\nAnswer.")], data)


@pytest.mark.parametrize("name", ["gqa", "vqav2", "pope", "mmvet"])
def test_errors_and_repeats_are_noted(name: str, tmp_path: Path) -> None:
    benchmark, data = get(name), write_benchmark(name, tmp_path)
    first, second = list(benchmark.questions(data / benchmark.question_file))[:2]
    result = benchmark.score([row(first.id, "a"), row(first.id, "b"), failed(second.id)], data)
    assert result.n == 1
    assert any("1 of 3 rows repeat a question" in note for note in result.notes)
    assert any("1 rows report an error" in note for note in result.notes)


def test_a_question_file_with_a_hole(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question_id": 1, "text": "What?"}\n{"question_id": 2}\n')
    with pytest.raises(InputError, match=r"questions\.jsonl', question 2"):
        list(get("gqa").questions(file))


def with_rotations(file: Path) -> None:
    """Add to a table of MMBench two rotations of every question, which name the row that carries the picture."""
    with file.open(newline="", encoding="utf-8") as stream:
        table = csv.DictReader(stream, delimiter="\t")
        rows, columns = list(table), list(table.fieldnames or ())
    for entry in rows[:]:
        options = [entry[letter] for letter in "ABC"]
        for turn in (1, 2):
            moved = dict(zip("ABC", options[turn:] + options[:turn], strict=True))
            index, named = int(entry["index"]) + turn * 1_000_000, int(entry["index"]) + (turn - 1) * 1_000_000
            rows.append({**entry, **moved, "index": index, "answer": "ABC"[-turn], "image": named})
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def answered(name: str, root: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Data with groups as in the published files, and the right answer to every question."""
    data = write_benchmark(name, root, n_images=28 if name == "mme" else 4, per_image=2)
    if name.startswith("mmbench"):
        with_rotations(data / get(name).question_file)
    if name == "mmvet":
        write(data / "mentions.json", {str(number): [["a"]] for number in range(8)})
    rows = right_answers(name, data)
    for entry in rows if name.startswith("mmbench") else ():
        entry["text"] = "ABC"[-(entry["question_id"] // 1_000_000) % 3]
    return data, rows


@pytest.mark.parametrize("name", TEN)
def test_right_answers_are_all_right(name: str, tmp_path: Path) -> None:
    data, rows = answered(name, tmp_path)
    result = get(name).score(rows, data)
    full = 2000 if name == "mme" else 100
    assert result.metrics[result.headline] == pytest.approx(full)
    assert not any("have an answer" in note or "left out" in note for note in result.notes)


@pytest.mark.parametrize(
    ("name", "member"), [*((name, 0) for name in TEN), ("mme", 1), ("mmbench", -1), ("mmbench_cn", -1)]
)
def test_what_is_scored_in_groups_counts_only_with_all_its_answers(name: str, member: int, tmp_path: Path) -> None:
    """A question's rotations, a picture's pair, or a question alone: left out and counted, never right.

    The others keep their worth, in ScienceQA's accuracy over all too.
    """
    data, rows = answered(name, tmp_path)
    before, gone = get(name).score(rows, data), rows[member]
    others = [entry for entry in rows if entry is not gone]
    error = {**gone, "text": "", "metadata": {"error": "unreadable"}}
    for given in (others, [*others, error], [*rows, error]):  # no answer, an error, an error after an answer
        result = get(name).score(given, data)
        assert result.metrics[result.headline] == pytest.approx(before.metrics[before.headline])
        assert len(set(before.per_question) - set(result.per_question)) == 1
        assert before.n - result.n == (2 if name == "mme" else 1)
        assert any("questions have an answer" in note for note in result.notes)
        assert any("report an error" in note for note in result.notes) == (error in given)
        if name == "scienceqa":
            assert result.metrics["accuracy"] == 100
        if name.startswith("mm") and name != "mmvet":
            assert any("left out" in note for note in result.notes)


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn", "mme"])
def test_a_group_does_not_become_right_by_losing_its_wrong_member(name: str, tmp_path: Path) -> None:
    data, rows = answered(name, tmp_path)
    rows[1]["text"] = "Yes" if name == "mme" else "D"
    worth = get(name).score(rows, data).per_question
    wrong = min(worth, key=lambda key: worth[key])
    assert wrong not in get(name).score([rows[0], *rows[2:]], data).per_question


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_always_the_same_letter_is_never_right_in_a_circle(name: str, tmp_path: Path) -> None:
    """Rotated rows name the row that carries their picture: they are asked like all others."""
    data, rows = answered(name, tmp_path)
    assert not any(q.error for q in get(name).questions(data / get(name).question_file))
    result = get(name).score([{**entry, "text": "A"} for entry in rows], data)
    assert (result.metrics["circular"], result.metrics["vanilla"], result.n) == (0, 100, 8)
