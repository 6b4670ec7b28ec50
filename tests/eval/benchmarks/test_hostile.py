"""Damaged question, answer and label files: an error row, a refusal in one line, or a sound result; nothing else."""

import json
import math
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from llava.constants import InputError
from llava.eval import eval_pope, eval_science_qa, eval_textvqa
from llava.eval.benchmarks import get
from llava.eval.benchmarks.base import Result, read_jsonl
from llava.eval.intervals import pictures
from tests.eval.benchmarks.rows import write, write_lines
from tests.eval.benchmarks.test_contract import TEN, with_rotations
from tests.eval.data import right_answers, write_benchmark
from tests.eval.hostile import damage_file, restore

ROOT = Path(__file__).parents[3]
# Label files that `Benchmark.labels` does not name, or names a folder of.
MORE_LABELS = {
    "mme": ["MME_Benchmark_release_version/artwork/questions_answers_YN/0000.txt"],
    "mmvet": ["mentions.json"],
    "vqav2": ["llava_vqav2_mscoco_test2015.jsonl"],
}


def sqa_to_llava(data: Path, answers: Path) -> None:
    runpy.run_path(str(ROOT / "scripts" / "convert_sqa_to_llava.py"))["convert_to_llava"](data, "test", "QCM-LEA")


def science_qa(data: Path, answers: Path) -> None:
    flags = ["--base-dir", data, "--result-file", answers, "--output-file", answers.parent / "upload" / "o.json"]
    eval_science_qa.main([str(value) for value in (*flags, "--output-result", answers.parent / "upload" / "r.json")])


def pope(data: Path, answers: Path) -> None:
    flags = ["--annotation-dir", data / "coco", "--question-file", data / "llava_pope_test.jsonl"]
    eval_pope.main([str(value) for value in (*flags, "--result-file", answers)])


def textvqa(data: Path, answers: Path) -> None:
    eval_textvqa.main(["--annotation-file", str(data / "TextVQA_0.5.1_val.json"), "--result-dir", str(answers.parent)])


DOORS: dict[str, list[Callable[[Path, Path], None]]] = {
    "scienceqa": [sqa_to_llava, science_qa],
    "pope": [pope],
    "textvqa": [textvqa],
}


def ask(name: str, file: Path) -> None:
    """Read questions; every one can be asked, or says why not, and can be recorded."""
    for question in get(name).questions(file, single_pred_prompt=True, all_rounds=True):
        assert isinstance(question.id, int | str)
        assert not isinstance(question.id, bool)
        question.text.encode()
        assert question.image is None or question.image
        json.dumps([question.id, question.prompt, question.extra], allow_nan=False).encode()
        assert question.error is None or (question.image is None and question.data is None)


def sound(result: Result) -> None:
    """A score's numbers are such, and belong together."""
    assert all(math.isfinite(value) for value in (*result.metrics.values(), *result.per_question.values()))
    assert len(result.per_question) >= 0
    json.dumps([result.metrics, result.notes])
    if result.per_question:
        mean = sum(result.per_question.values()) / len(result.per_question)
        assert mean == pytest.approx(result.metrics[result.headline], abs=1e-6)
    elif result.scored == "local":
        assert result.headline not in result.metrics


def steps(name: str, data: Path, answers: Path) -> Iterator[Callable[[], Any]]:
    """What is done with the files of a benchmark."""
    benchmark = get(name)
    yield lambda: ask(name, data / benchmark.question_file)
    yield lambda: sound(benchmark.score(read_jsonl(answers), data))
    yield lambda: pictures(read_jsonl(answers)) if benchmark.score(read_jsonl(answers), data) else None
    yield lambda: benchmark.export(read_jsonl(answers), data, answers.parent / "upload")
    for door in DOORS.get(name, []):
        yield lambda door=door: door(data, answers)


def refuses(step: Callable[[], Any]) -> str | None:
    try:
        step()
    except InputError as error:
        return str(error)
    return None


def fuzz(name: str, root: Path, times: int) -> dict[str, int]:
    """Damage one file at a time and use all; returns how many uses were refused and how many were not."""
    data = write_benchmark(name, root, n_images=2, per_image=2)
    if name.startswith("mmbench"):
        with_rotations(data / get(name).question_file)
    if name == "mmvet":
        write(data / "mentions.json", {str(number): [["a"]] for number in range(4)})
    answers = write_lines(root / "answers" / "a.jsonl", right_answers(name, data))
    labels = [*get(name).labels, *MORE_LABELS.get(name, [])]
    files = [path for path in {data / get(name).question_file, *(data / label for label in labels)} if path.is_file()]
    outcomes = {"refused": 0, "used": 0}
    for number in range(times):
        random = Random(f"{name} {number}")
        file = random.choice([*sorted(files), answers, answers])
        whole = file.read_bytes()
        damage_file(file, random)
        for step in steps(name, data, answers):
            try:
                said = refuses(step)
                assert said is None or len(said) < 1500
                outcomes["used" if said is None else "refused"] += 1
            except BaseException as error:
                error.add_note(f"{name}, damage {number}, to {file.name}")
                raise
        restore(file, whole)
    return outcomes


@pytest.mark.parametrize("name", TEN)
def test_damaged_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = fuzz(name, tmp_path, 24)
    assert min(outcomes.values()) > 5, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("name", TEN)
def test_many_damaged_files(name: str, tmp_path: Path) -> None:
    fuzz(name, tmp_path, 600)
