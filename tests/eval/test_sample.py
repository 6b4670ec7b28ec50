"""Samples: whole units from every category, always the same, and part of what answers depend on."""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llava.constants import InputError
from llava.eval import answer, benchmarks
from llava.eval.benchmarks._mmbench import ROTATION
from llava.eval.benchmarks.base import Benchmark, Question, read_jsonl
from llava.eval.benchmarks.mme import picture
from llava.eval.sample import sample
from tests.eval.data import write_benchmark


def questions_of(name: str, root: Path, **sizes: int) -> list[Question]:
    benchmark, data = benchmarks.get(name), write_benchmark(name, root, **sizes)
    return list(benchmark.questions(data / benchmark.question_file))


def test_mme_is_drawn_from_all_categories_by_pairs(tmp_path: Path) -> None:
    questions, mme = questions_of("mme", tmp_path, n_images=56, per_image=2), benchmarks.get("mme")
    drawn = sample(questions, mme, 28)
    assert Counter(picture(str(q.id)).category for q in drawn) == dict.fromkeys({q.category for q in questions}, 2)
    assert set(Counter(q.id for q in drawn).values()) == {2}, "acc+ wants both questions of a picture"
    assert [q for q in questions if q in drawn] == drawn, "in the order of the file"
    assert len({picture(str(q.id)).category for q in sample(questions, mme, 8)}) == 4, "four pairs, four categories"


@pytest.mark.parametrize("name", ["pope", "scienceqa", "gqa"])
def test_categories_keep_their_share(name: str, tmp_path: Path) -> None:
    questions = questions_of(name, tmp_path, n_images=60, per_image=2)
    whole = Counter(q.category for q in questions)
    drawn = Counter(q.category for q in sample(questions, benchmarks.get(name), 30))
    assert drawn.total() == 30
    assert len(whole) == {"pope": 3, "scienceqa": 2, "gqa": 1}[name]
    for category, number in whole.items():
        assert drawn[category] == pytest.approx(30 * number / len(questions), abs=1)


def test_mmbench_keeps_rotations_together(tmp_path: Path) -> None:
    """Rows of the circular table, and rounds of `--all-rounds`."""
    data, mmbench = write_benchmark("mmbench", tmp_path, n_images=10, per_image=2), benchmarks.get("mmbench")
    file = data / mmbench.question_file
    csv.field_size_limit(2**31 - 1)
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    with file.open("a", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, list(rows[0]), delimiter="\t", lineterminator="\n")
        table.writerows({**row, "index": int(row["index"]) + turn * ROTATION} for turn in (1, 2) for row in rows)
    for options, times in (({}, 3), ({"all_rounds": True}, 9)):
        drawn = sample(list(mmbench.questions(file, **options)), mmbench, 4 * times + 1)
        assert set(Counter(int(q.id) % ROTATION for q in drawn).values()) == {times}
        assert len(drawn) == 4 * times
        assert {q.category for q in drawn} == {"color", "object"}


class Alone(Benchmark):
    name = "alone"


def asked(*sizes: int) -> list[Question]:
    return [Question(id=f"{c}-{i}", text="", category=str(c)) for c, size in enumerate(sizes) for i in range(size)]


def test_every_category_comes_before_any_comes_twice() -> None:
    drawn = Counter(q.category for q in sample(asked(1, 2, 1000), Alone(), 3))
    assert drawn == {"0": 1, "1": 1, "2": 1}
    drawn = Counter(q.category for q in sample(asked(1, 2, 1000), Alone(), 100))
    assert drawn["0"] == 1
    assert drawn["2"] >= 97


def test_a_larger_sample_holds_every_smaller_one_and_none_is_a_beginning() -> None:
    questions = asked(40, 7, 13)
    before: list[Question] = []
    for number in range(1, 61):
        drawn = sample(questions, Alone(), number)
        assert len(drawn) == number
        assert all(question in drawn for question in before)
        before = drawn
    assert sample(questions, Alone(), 15) == sample(questions, Alone(), 15)
    assert {int(str(q.id).split("-")[1]) for q in sample(questions, Alone(), 15)} != set(range(15))
    assert sample(questions, Alone(), None) == sample(questions, Alone(), 999) == questions


def test_at_least_one_unit() -> None:
    class Together(Alone):
        def unit(self, question: Question) -> str:
            return question.category

    assert len(sample(asked(4, 4), Together(), 1)) == 4


def words(data: Path, model: Path, out: Path, *more: Any) -> list[str]:
    folder = data / "gqa"
    given = [
        "--benchmark",
        "gqa",
        "--model-path",
        model,
        "--question-file",
        folder / "llava_gqa_testdev_balanced.jsonl",
    ]
    given += ["--image-folder", folder / "data/images", "--answers-file", out, "--max-new-tokens", 2, "--device", "cpu"]
    return [str(word) for word in (*given, "--num-workers", 0, *more)]


def test_methods_answer_the_same_sample_and_another_one_does_not_continue_it(
    tmp_path: Path, checkpoint: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_benchmark("gqa", tmp_path)
    monkeypatch.setattr(answer, "load_pretrained_model", lambda *_, **__: loaded())
    monkeypatch.setattr(loaded().model, "method", loaded().model.method)
    files = {method: tmp_path / f"{method}.jsonl" for method in ("none", "uniform")}
    for method, file in files.items():
        answer.run(answer.parse(words(tmp_path, checkpoint(), file, "--method", method, "--sample", 5)))
    none, uniform = ([row["question_id"] for row in read_jsonl(file)] for file in files.values())
    assert none == uniform
    assert len(none) == 5
    with pytest.raises(InputError, match="sample"):
        answer.run(answer.parse(words(tmp_path, checkpoint(), files["none"], "--method", "none", "--sample", 6)))
    assert len(read_jsonl(files["none"])) == 5


def test_chunks_share_a_sample(tmp_path: Path, checkpoint: Any) -> None:
    write_benchmark("gqa", tmp_path)
    model = checkpoint()
    chunks = [("--num-chunks", 2, "--chunk-idx", number) for number in (0, 1)]

    def chosen(*more: Any) -> list[Question]:
        given = answer.parse(words(tmp_path, model, tmp_path / "a", "--sample", 5, *more))
        return answer.select_questions(given)[0]

    assert [question for chunk in chunks for question in chosen(*chunk)] == chosen()


@pytest.mark.parametrize("more", [("--sample", 0), ("--sample", "all"), ("--sample", 3, "--limit", 3)])
def test_what_is_no_sample_is_refused(more: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        answer.parse(words(tmp_path, tmp_path, tmp_path / "a", *more))
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
