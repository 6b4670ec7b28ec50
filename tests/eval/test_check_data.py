"""The check of data: it counts what is there, and what is missing or short is a line and exit code 2."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.eval import benchmarks, check_data
from llava.eval.benchmarks import get
from llava.eval.published import COLUMNS
from tests.eval.benchmarks.rows import row, write_lines
from tests.eval.data import write_benchmark

Check = Callable[[], tuple[int, list[str]]]


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Check:
    """Write all ten miniatures; the call returns exit code and lines."""
    monkeypatch.setattr(benchmarks, "available", lambda: list(COLUMNS))
    for name in COLUMNS:
        write_benchmark(name, tmp_path)

    def run() -> tuple[int, list[str]]:
        code = 0
        try:
            check_data.main(["--data", str(tmp_path)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def modest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything promises as much as a miniature holds."""
    sizes = {"questions": 12, "answers": 12, "labels": 4, "pictures": 4, "problems": 16}
    known = check_data.promised
    monkeypatch.setattr(check_data, "promised", lambda text: known(text) and sizes[text.split()[1].strip(",")])


def amiss(lines: list[str]) -> list[str]:
    return [line.strip() for line in lines if line.split()[:1] in (["MISSING"], ["SHORT"], ["DAMAGED"])]


@pytest.mark.parametrize(
    ("content", "number"), [("8910 questions", 8910), ("200", 200), ("the 14 categories", None), ("2nd part", None)]
)
def test_promises(content: str, number: int | None) -> None:
    assert check_data.promised(content) == number


def test_what_every_benchmark_promises_is_counted(check: Check) -> None:
    """A miniature is short of the official sizes, in questions, labels and pictures."""
    code, lines = check()
    assert code == 2
    assert "SHORT      llava_gqa_testdev_balanced.jsonl: 12578 questions; 12 found" in amiss(lines)
    assert "SHORT      data/testdev_balanced_questions.json: 12578 answers, out of questions1.2.zip; 12 found" in amiss(
        lines
    )
    promises = [c for name in COLUMNS for c in get(name).contents.values() if check_data.promised(c) is not None]
    assert len(amiss(lines)) == len(promises) > 12
    assert lines[-1] == "1 of 10 complete", "MMBench-CN promises no number"


@pytest.mark.usefixtures("modest")
def test_all_is_there(check: Check) -> None:
    code, lines = check()
    assert (code, amiss(lines), lines[-1]) == (0, [], "10 of 10 complete")
    assert "  ok         images: 200 pictures; 4 found" in lines


@pytest.mark.usefixtures("modest")
def test_each_kind_of_shortage_is_one_line(check: Check, tmp_path: Path) -> None:
    questions = tmp_path / "pope" / "llava_pope_test.jsonl"
    questions.write_text("".join(line + "\n" for line in questions.read_text().splitlines()[:11]))
    labels = tmp_path / "pope" / "coco" / "coco_pope_random.json"
    labels.write_text(labels.read_text().splitlines()[0] + "\n")
    annotations = tmp_path / "textvqa" / "TextVQA_0.5.1_val.json"
    value = json.loads(annotations.read_text())
    annotations.write_text(json.dumps(value | {"data": value["data"][:-1]}))
    next((tmp_path / "mm-vet" / "images").iterdir()).unlink()
    (tmp_path / "gqa" / "llava_gqa_testdev_balanced.jsonl").write_text("{")
    (tmp_path / "scienceqa" / "problems.json").write_text("[1, ")
    (tmp_path / "scienceqa" / "pid_splits.json").unlink()
    next((tmp_path / "scienceqa" / "images" / "test").iterdir()).rename(tmp_path / "elsewhere")
    code, lines = check()
    found = amiss(lines)
    assert (code, lines[-1]) == (2, "5 of 10 complete")
    for said in (
        "SHORT      llava_pope_test.jsonl: 8910 questions; 11 found",
        "SHORT      coco/coco_pope_random.json: 2910 labels, as of POPE commit e3e3926; 1 found",
        "SHORT      TextVQA_0.5.1_val.json: 5000 questions with ten answers each; 11 found",
        "SHORT      images: 200 pictures; 3 found",
        "SHORT      images/test: 2017 pictures, <question>/image.png; 3 found",
        "MISSING    pid_splits.json: which problems are in the test split",
    ):
        assert said in found
        found.remove(said)
    assert len(found) == 4
    assert sum(line.startswith("DAMAGED    llava_gqa_testdev_balanced.jsonl: ") for line in found) == 1
    assert sum(line.startswith("DAMAGED    problems.json: ") for line in found) == 1
    assert sum(line.startswith("MISSING    1 of 4 pictures, such as ") for line in found) == 2


@pytest.mark.usefixtures("modest")
def test_labels_that_are_nested_without_end_are_damaged(check: Check, tmp_path: Path) -> None:
    (tmp_path / "textvqa" / "TextVQA_0.5.1_val.json").write_text("[" * 100_000)
    (damaged,) = amiss(check()[1])
    assert damaged.startswith("DAMAGED    TextVQA_0.5.1_val.json: ")
    assert "nested too deeply" in damaged


def test_pictures_are_listed_and_not_looked_at_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of 200 000 pictures is read in a moment: only what the listing lacks is looked for."""
    for number in range(300):
        (tmp_path / f"{number}.jpg").touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "1.PNG").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere")
    looked: list[str] = []
    known = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: looked.append(path.name) or known(path))
    images = [*(f"{number}.jpg" for number in range(300)), "sub/1.PNG", "sub/../7.jpg", "link.jpg", "sub", "no/1.jpg"]
    assert check_data.absent(images, tmp_path) == ["link.jpg", "no/1.jpg", "sub"]
    assert sorted(looked) == ["1.jpg", "link.jpg", "sub"]


def test_scripts_run_on_parts_of_a_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_benchmark("mmvet", tmp_path)
    check_data.main(["--data", str(tmp_path), "--benchmark", "mmvet"])
    write_lines(data / "llava-mm-vet.jsonl", [row(1, "x")])
    check_data.main(["--data", str(tmp_path), "--benchmark", "mmvet"])
    assert capsys.readouterr().out == ""
