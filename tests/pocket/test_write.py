"""The written benchmark: the same bytes every time, asked as trained, and scored by the benchmarks' own scorers."""

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from llava.eval import benchmarks
from llava.eval.benchmarks._vqa import normalise
from llava.eval.benchmarks.base import Question, Result
from llava.eval.benchmarks.mme import COGNITION, PERCEPTION
from llava.pocket import write
from llava.pocket.gates import percent, unanswerable
from llava.pocket.questions import TASKS, Asked
from llava.pocket.scenes import COLOURS, KINDS, WORDS, Scene, make_scene
from llava.pocket.write import WRITERS, ask_about, write_benchmarks
from tests.conftest import Command
from tests.eval.benchmarks.rows import row

SCENES = 24
# What a benchmark's script gives its program.
OPTIONS: dict[str, dict[str, Any]] = {
    "scienceqa": {"single_pred_prompt": True},
    "mmbench": {"single_pred_prompt": True},
    "mmbench_cn": {"single_pred_prompt": True, "lang": "cn"},
}
ROTATION = 1_000_000
Said = Callable[[Question, dict[str, Any]], str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("pocket") / "data", scenes=SCENES)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene("test", index) for index in range(SCENES)]


def digests(root: Path) -> dict[str, str]:
    files = sorted(file for file in root.rglob("*") if file.is_file())
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def questions(task: str, data: Path, **options: Any) -> list[Question]:
    benchmark = benchmarks.get(task)
    return list(benchmark.questions(data / benchmark.folder / benchmark.question_file, **options))


def truth_of(task: str, data: Path) -> list[tuple[Question, dict[str, Any]]]:
    """Every question with its entry in truth.json."""
    truth = json.loads((data / "truth.json").read_text())[task]
    found = []
    for number, question in enumerate(questions(task, data)):
        key = str(question.id)
        if task == "textvqa":  # the questions of a picture share its id
            key = str(number)
        elif task.startswith("mmbench"):
            key = str(int(question.id) % ROTATION)
        found.append((question, truth[key]))
    return found


def score(task: str, data: Path, say: Said) -> Result:
    benchmark = benchmarks.get(task)
    rows = [row(q.id, say(q, known), q.prompt or q.text, **q.extra) for q, known in truth_of(task, data)]
    return benchmark.score(rows, data / benchmark.folder)


def picture(task: str, data: Path, question: Question) -> NDArray[np.uint8]:
    benchmark = benchmarks.get(task)
    if question.data is not None:
        source: Any = io.BytesIO(base64.b64decode(question.data))
    else:
        source = data / benchmark.folder / benchmark.image_folder / str(question.image)
    with Image.open(source) as image:
        return np.asarray(image.convert("RGB"))


def test_the_command_writes_the_same_bytes_again(data: Path, tmp_path: Path) -> None:
    """In another process, in another order of sets."""
    words = [sys.executable, "-m", "llava.pocket.write", str(tmp_path / "again"), "--scenes", str(SCENES)]
    kept = os.environ | {"PYTHONHASHSEED": "12345"}
    done = subprocess.run(words, env=kept, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'again'}\n"), done.stderr
    wanted = digests(data)
    assert len(wanted) > 100
    assert digests(tmp_path / "again") == wanted
    write_benchmarks(tmp_path / "again", scenes=SCENES)
    assert digests(tmp_path / "again") == wanted, "writing over what is there changes nothing"


def test_without_links_pictures_are_copied(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(write.os, "link", refuse)
    write_benchmarks(tmp_path / "copied", scenes=SCENES)
    assert digests(tmp_path / "copied") == digests(data)


def test_an_unknown_split_is_one_line(tmp_path: Path, command: Command) -> None:
    code, _, err = command(write.main, tmp_path / "x", "--split", "exam")
    assert (code, err) == (2, "error: unknown split 'exam'; choose from train, val, test\n")


def test_it_is_complete(data: Path) -> None:
    assert list(WRITERS) == list(TASKS)
    for task in TASKS:
        benchmark = benchmarks.get(task)
        assert WRITERS[task][0] == benchmark.folder
        assert benchmark.missing(data / benchmark.folder) == []
        assert benchmark.lacking(data / benchmark.folder) == []
        assert all((data / benchmark.folder / label).exists() for label in benchmark.labels)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_those_of_training(task: str, data: Path, scenes: list[Scene]) -> None:
    """What the model is asked, with the script's options, is what `Asked.prompt` says, in the same order."""
    wanted = [asked for _, asked in ask_about(scenes, task)]
    found = questions(task, data, **OPTIONS.get(task, {}))
    if task.startswith("mmbench"):
        unrotated = len(wanted)
        assert len(found) == 4 * unrotated
        by_id = {int(question.id): question.text for question in found}
        assert [by_id[number] for number in range(unrotated)] == [asked.prompt for asked in wanted]
        for number, turn in ((number, turn) for number in range(unrotated) for turn in range(1, 4)):
            assert by_id[number + ROTATION * turn] == turned(wanted[number], turn).prompt
        return
    assert [question.text for question in found] == [asked.prompt for asked in wanted]


def turned(asked: Asked, turn: int) -> Asked:
    options = asked.options[turn:] + asked.options[:turn]
    given = {"task": asked.task, "template": asked.template, "text": asked.text, "answer": asked.answer}
    return Asked(options=options, **given)


@pytest.mark.parametrize("task", TASKS)
def test_truth_knows_scene_template_and_answer_of_every_question(task: str, data: Path, scenes: list[Scene]) -> None:
    asked = ask_about(scenes, task)
    by_prompt = {(shown.index, one.prompt.split("\n")[task == "scienceqa"]): one for shown, one in asked}
    known = truth_of(task, data)
    assert len(known) == len(asked) * (4 if task.startswith("mmbench") else 1)
    for question, truth in known:
        assert np.array_equal(picture(task, data, question), scenes[truth["scene"]].pixels)
        line = question.text.split("\n")[task == "scienceqa"]
        one = by_prompt[truth["scene"], line]
        assert truth["template"] == one.template
        assert task == "mme" or task.startswith("mmbench") or truth["answer"] == one.answer


def right(task: str, data: Path) -> Said:
    """Say what is right: of MME's pair the first is to be affirmed, MMBench's letters rotate with the options."""
    if task == "mme":
        return lambda question, known: "Yes" if question.text.startswith(affirmed(data, question)) else "No"
    if task.startswith("mmbench"):
        first = {int(q.id): q.extra["options"]["ABCD".index(known["answer"])] for q, known in unrotated(task, data)}
        return lambda question, known: "ABCD"[question.extra["options"].index(first[int(question.id) % ROTATION])]
    return lambda question, known: str(known["answer"])


def affirmed(data: Path, question: Question) -> str:
    """The question to affirm about a picture, out of MME's file of labels."""
    file = (data / "MME" / "MME_Benchmark_release_version" / str(question.id)).with_suffix(".txt")
    lines = [line.split("\t") for line in file.read_text().splitlines()]
    assert [answer for _, answer in lines] == ["Yes", "No"]
    return lines[0][0].removesuffix(" Please answer yes or no.")


def unrotated(task: str, data: Path) -> list[tuple[Question, dict[str, Any]]]:
    return [(question, known) for question, known in truth_of(task, data) if int(question.id) < ROTATION]


def wrong(task: str, data: Path) -> Said:
    """Say something of the right kind that is wrong."""
    say = right(task, data)
    other = {"yes": "no", "no": "yes", "Yes": "No", "No": "Yes", "A": "B", "B": "C", "C": "A", "D": "A"}

    def err(question: Question, known: dict[str, Any]) -> str:
        return other.get(say(question, known), "nothing")

    return err


@pytest.mark.parametrize("task", TASKS)
def test_right_answers_score_full(task: str, data: Path) -> None:
    result = score(task, data, right(task, data))
    assert result.scored == "local"
    if task == "mme":
        categories = {name for name in (*PERCEPTION, *COGNITION) if name in result.metrics}
        assert categories == {"existence", "count", "color", "position", "OCR"}
        assert all(result.metrics[name] == 200 for name in categories)
        assert result.metrics["perception"] == result.metrics["total"] == 1000
    else:
        assert result.metrics[result.headline] == pytest.approx(100)
        assert set(result.per_question.values()) == {100.0}
    headline = {"scienceqa": "img_accuracy", "pope": "f1", "mme": "perception", "mmvet": "mentioned"}
    assert result.headline == headline.get(task, "circular" if task.startswith("mmbench") else "accuracy")


@pytest.mark.parametrize("task", TASKS)
def test_the_gates_scale_runs_from_nothing_to_a_hundred(task: str, data: Path) -> None:
    """MME's five categories of 200 too; on POPE silence is worth what guessing is."""
    assert percent(score(task, data, right(task, data))) == pytest.approx(100)
    assert percent(score(task, data, wrong(task, data))) == 0
    assert percent(score(task, data, lambda *_: "")) == pytest.approx(50 if task == "pope" else 0, abs=2)


def test_what_is_seen_to_be_unanswerable(data: Path) -> None:
    """Of the unanswerable alone, whatever is said of the others."""
    known = truth_of("vizwiz", data)
    none = [number for number, (_, truth) in enumerate(known) if truth["answer"] == "unanswerable"]
    assert unanswerable([row(q.id, "Unanswerable") for q, _ in known], data) == 100
    assert unanswerable([row(q.id, truth["answer"]) for q, truth in known], data) == 100
    assert unanswerable([row(q.id, "red") for q, _ in known], data) == 0
    half = [row(q.id, "unanswerable " if number in none[::2] else "red") for number, (q, _) in enumerate(known)]
    assert unanswerable(half, data) == pytest.approx(100 * len(none[::2]) / len(none))


@pytest.mark.parametrize("task", TASKS)
def test_all_that_can_be_scored_is(task: str, data: Path, scenes: list[Scene]) -> None:
    """Every question counts, but VizWiz's unanswerable ones."""
    wanted = [asked for _, asked in ask_about(scenes, task) if asked.answer != "unanswerable"]
    result = score(task, data, right(task, data))
    assert result.n == len(wanted)
    assert not any("no answer" in note or "revision" in note or "mean F1" in note for note in result.notes)


@pytest.mark.parametrize("task", TASKS)
def test_wrong_answers_score_nothing(task: str, data: Path) -> None:
    result = score(task, data, wrong(task, data))
    assert result.metrics[result.headline] == 0


@pytest.mark.parametrize("task", TASKS)
def test_silence_scores_nothing_or_the_prior(task: str, data: Path) -> None:
    """POPE takes whatever is not "no" for "yes", which half of its answers are: F1 is 2/3."""
    result = score(task, data, lambda *_: "")
    if task == "pope":
        assert result.metrics["f1"] == pytest.approx(200 / 3, abs=2)
        assert result.metrics["recall_random"] == 100
    else:
        assert result.metrics[result.headline] == 0


def test_what_cannot_be_answered_stands_apart(data: Path, scenes: list[Scene]) -> None:
    folder = data / "vizwiz"
    answerable, not_answerable = (json.loads((folder / f"{name}.json").read_text()) for name in ("val", "unanswerable"))
    asked = [one for _, one in ask_about(scenes, "vizwiz")]
    assert len(answerable) == sum(one.answer != "unanswerable" for one in asked)
    assert len(answerable) + len(not_answerable) == len(asked) == len(questions("vizwiz", data))
    for labels, flag in ((answerable, 1), (not_answerable, 0)):
        assert labels
        assert all(label["answerable"] == flag for label in labels)
        assert all(len(label["answers"]) == 10 for label in labels)
        assert all((label["answers"][0]["answer"] == "unanswerable") != flag for label in labels)


def test_always_giving_up_scores_nothing(data: Path) -> None:
    """A model that sees nothing and says so must not be rewarded."""
    result = score("vizwiz", data, lambda *_: "Unanswerable")
    assert result.metrics["accuracy"] == 0


def test_grey_pictures_stand_under_the_same_questions(data: Path, tmp_path: Path) -> None:
    """What can be had without looking: every file is the same but for the pictures, which are all grey."""
    found, wanted = digests(write_benchmarks(tmp_path / "blank", scenes=SCENES, blank=True)), digests(data)
    assert found.keys() == wanted.keys()
    tables = {name for name in found if name.endswith(".tsv")}
    assert {name for name in found if found[name] != wanted[name]} - tables == {n for n in found if n.endswith(".png")}
    for task in TASKS:
        asked = zip(questions(task, tmp_path / "blank"), questions(task, data), strict=True)
        for question, plain in asked:
            assert (question.id, question.text, question.extra) == (plain.id, plain.text, plain.extra)
            shown = picture(task, tmp_path / "blank", question)
            assert (shown == 128).all()
            assert shown.shape == picture(task, data, plain).shape


def test_another_split_is_other_scenes(data: Path, tmp_path: Path) -> None:
    write_benchmarks(tmp_path, "val", scenes=4)
    ours = {hash_ for name, hash_ in digests(tmp_path).items() if name.startswith("scenes/")}
    assert ours.isdisjoint(digests(data / "scenes").values())
    with Image.open(tmp_path / "scenes" / "0003.png") as image:
        assert np.array_equal(np.asarray(image), make_scene("val", 3).pixels)


def test_answers_survive_the_scorers_normaliser() -> None:
    others = ("left", "right", "top", "bottom", "above", "below", "unanswerable", *map(str, range(100)))
    for word in (*WORDS, *COLOURS, *KINDS, *others):
        assert normalise(word) == word.lower()
