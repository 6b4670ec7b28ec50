"""A run that goes on where another stopped, that is refused, or that finds bad questions and bad folders."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.eval import answer, resume
from llava.eval.engine import Engine
from llava.eval.journal import Journal
from llava.eval.lock import Lock
from tests.conftest import picture

Run = Callable[..., tuple[int, list[dict[str, Any]], str]]


def write(folder: Path, questions: list[dict[str, Any]], pictures: int = 3) -> Path:
    """A question file, ids from 0, and pictures 0.png, 1.png, …"""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(pictures):
        picture(90, 60, seed=number).save(folder / "images" / f"{number}.png")
    lines = (json.dumps({"question_id": number, **question}) for number, question in enumerate(questions))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Seven questions about three pictures and one that is not there yet, and one about none."""
    about = [{"image": f"{n % 4}.png", "text": f"what is {n}?"} for n in range(7)]
    return write(tmp_path / "set", [*about, {"text": "yes or no?"}])


@pytest.fixture
def run(checkpoint, data, tmp_path, command, monkeypatch, loaded) -> Run:
    """Run the command in this process; returns exit code, rows and stderr. `summary.json` holds what --json printed."""
    monkeypatch.setattr(answer, "load_pretrained_model", lambda *_, **__: loaded())

    def run(*more: object, name: str = "out/a", data: Path = data) -> tuple[int, list[dict[str, Any]], str]:
        words = ["--benchmark", "vqav2", "--model-path", checkpoint(), "--question-file", data / "questions.jsonl"]
        words += ["--image-folder", data / "images", "--max-new-tokens", 3, "--answers-file", tmp_path / name]
        method = loaded().model.method
        code, out, err = command(answer.main, *words, "--json", *more)
        loaded().model.method = method
        (tmp_path / "summary.json").write_text(out)
        return code, read(tmp_path / name), "\n".join(line for line in err.split("\n") if "question/s" not in line)

    return run


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def texts(rows: list[dict[str, Any]]) -> list[tuple[Any, str]]:
    return [(row["question_id"], row["text"]) for row in rows]


def summary(tmp_path: Path) -> dict[str, Any]:
    return dict(json.loads((tmp_path / "summary.json").read_text()))


def ids(rows: list[dict[str, Any]]) -> list[Any]:
    return [row["question_id"] for row in rows]


# --- resuming --------------------------------------------------------------------------------------------------------


def test_deleted_and_moved_lines_are_asked_again_and_put_in_order(run, tmp_path):
    code, rows, _ = run()
    assert (code, ids(rows)) == (3, list(range(8)))
    file = tmp_path / "out" / "a"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[6], lines[1], lines[1], lines[4], lines[7]]))
    code, again, err = run()
    assert texts(again) == texts(rows)
    assert summary(tmp_path)["answered_now"] == 4
    assert "note: 4 of 8 questions have their answer; 4 are asked" in err
    assert "were not in question order" in err
    assert "lines that repeat a question (1)" in err
    answer_ids = [row["answer_id"] for row in again]
    assert len(set(answer_ids)) == 8
    assert answer_ids[1] == rows[1]["answer_id"]


def test_errors_are_tried_again_where_the_picture_is_there_now(run, data, tmp_path, monkeypatch):
    _, rows, err = run()
    assert [row["question_id"] for row in rows if "error" in row["metadata"]] == [3]
    assert err.count("could not ask") == 0  # with --json the summary has it
    assert "(question 3)" in summary(tmp_path)["errors"][0]
    with monkeypatch.context() as patch:
        patch.setattr(answer, "load_engine", lambda *_: pytest.fail("nothing can be asked now"))
        assert run()[1] == rows
    picture(60, 60).save(data / "images" / "3.png")
    with monkeypatch.context() as patch:
        patch.setattr(answer, "load_engine", lambda *_: pytest.fail("the user said no"))
        assert run("--no-retry-errors")[1] == rows
    code, again, err = run()
    assert code == 0
    assert "1 questions that could not be asked are tried again" in err
    assert again[:3] + again[4:] == rows[:3] + rows[4:]
    assert again[3]["text"]
    assert "error" not in again[3]["metadata"]
    with monkeypatch.context() as patch:
        patch.setattr(answer, "load_engine", lambda *_: pytest.fail("all are answered"))
        assert run("--retry-errors")[1] == again


def test_all_errors_are_tried_again_if_the_user_says_so(run, tmp_path):
    _, rows, _ = run()
    _, again, _ = run("--retry-errors")
    assert summary(tmp_path)["answered_now"] == 1
    assert texts(again) == texts(rows)
    assert "error" in again[3]["metadata"]


def test_a_finished_run_prints_what_it_recorded(run, tmp_path):
    run()
    before = summary(tmp_path)
    assert before["retention"] == 0.25
    assert before["seconds"] > 0
    run()
    assert summary(tmp_path) == before | {"answered_now": 0}
    (tmp_path / "out" / "a.summary.json").write_text("garbage")
    run()
    assert summary(tmp_path) == before | {"answered_now": 0, "images": 0, "seconds": 0}


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("unshare"), reason="root may write everywhere")
def test_a_finished_run_needs_nothing_written(run, tmp_path, monkeypatch):
    _, rows, _ = run()
    (tmp_path / "out").chmod(0o500)
    monkeypatch.setattr(resume, "check_output", lambda path: pytest.fail("nothing is written"))
    monkeypatch.setattr(Lock, "take", lambda self: pytest.fail("nothing is written"))
    assert run()[1] == rows
    (tmp_path / "out").chmod(0o700)


def test_another_spelling_and_another_device_continue(run, checkpoint, data, tmp_path, monkeypatch):
    run("--limit", 3)
    monkeypatch.chdir(checkpoint().parent)
    shutil.copytree(data / "images", tmp_path / "moved")
    code, rows, err = run(
        *("--model-path", f"./{checkpoint().name}/", "--image-folder", tmp_path / "moved", "--device", "cpu"),
        *("--dtype", "float32", "--conv-mode", "vicuna_v1"),
    )
    assert code == 3, err
    assert "3 of 8 questions have their answer" in err
    assert ids(rows) == list(range(8))


def test_the_dtype_is_that_of_the_answers_unless_another_is_asked_for(run, tmp_path, monkeypatch):
    run("--limit", 3)
    record = tmp_path / "out" / "a.config.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"dtype": "bfloat16"}))
    asked = []
    real = answer.load_engine
    monkeypatch.setattr(answer, "load_engine", lambda args, *rest: (asked.append(args.dtype), real(args, *rest))[1])
    code, _, err = run("--dtype", "float32")
    assert code == 2
    assert "dtype 'bfloat16', now 'float32'" in err
    assert run()[0] == 3
    assert asked == ["bfloat16"]
    assert json.loads(record.read_text())["dtype"] == "bfloat16"


def test_an_early_record_is_understood(run, tmp_path, checkpoint, data):
    _, rows, _ = run("--limit", 3)
    file = tmp_path / "out" / "a.config.json"
    found = json.loads(file.read_text())
    for key in ("model", "base", "tower", "pictures", "sample"):
        del found[key]
    found |= {"dtype": None, "conv_mode": None, "image_folder": "where it once was"}
    file.write_text(json.dumps(found))
    code, again, _ = run()
    assert code == 3
    assert again[:3] == rows
    assert "model" in json.loads(file.read_text())
    file.write_text(json.dumps(found | {"model_path": "another"}))
    code, kept, err = run()
    assert (code, kept) == (2, again)
    assert f"model_path 'another', now {str(checkpoint())!r}" in err


# --- two runs at once ------------------------------------------------------------------------------------------------


def test_a_second_run_is_told_who_holds_the_file(run, tmp_path, monkeypatch):
    run("--limit", 3)
    (tmp_path / "out" / "a.parts").mkdir()
    (tmp_path / "out" / "a.parts" / "other.jsonl").write_text("of the other run")
    other = Lock(tmp_path / "out" / "a.lock")
    other.take()
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    monkeypatch.setattr(answer, "load_engine", lambda *_: pytest.fail("the model was loaded"))
    for more in ([], ["--limit", 5], ["--overwrite"]):
        code, _, err = run(*more)
        assert (code, err.count("\n")) == (2, 1)
        assert f"(process {os.getpid()} on " in err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    other.release()


def test_the_lock_goes_with_the_run_however_it_ends(run, tmp_path, monkeypatch):
    def out() -> set[str]:
        return {path.name for path in (tmp_path / "out").iterdir()}

    run("--limit", 3)
    assert out() == {"a", "a.config.json", "a.summary.json"}
    monkeypatch.setattr(Engine, "answer", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run()[0] == 130
    assert out() == {"a", "a.config.json", "a.summary.json", "a.parts"}
    monkeypatch.setattr(Engine, "answer", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()
    assert "a.lock" not in out()


# --- stops -----------------------------------------------------------------------------------------------------------


class Stop:
    """Raises once so many answers are written."""

    def __init__(self, error: BaseException, after: int) -> None:
        self.error, self.left, self.real = error, after, Journal.write

    def step(self) -> None:
        if not self.left:
            raise self.error
        self.left -= 1

    def __call__(self, journal: Journal, place: int, row: Any) -> None:
        self.step()
        self.real(journal, place, row)


STOPS = {
    "interrupt": (KeyboardInterrupt(), 130, "interrupted: "),
    "no space": (
        OSError(errno.ENOSPC, "No space left on device", "a.parts/x"),
        2,
        "cannot write 'a.parts/x' (No space",
    ),
    "memory": (MemoryError(), 2, "memory ran out (MemoryError)"),
    "GPU memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to"), 2, "memory ran out (CUDA out of memory)"),
    "host memory": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), 2, "DefaultCPUAllocator"),
}


@pytest.mark.parametrize("after", [2, pytest.param(0, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("error", "code", "said"), STOPS.values(), ids=STOPS)
def test_whatever_stops_a_run_says_what_is_kept(run, tmp_path, monkeypatch, error, code, said, after):
    with monkeypatch.context() as patch:
        stop = Stop(error, after)
        patch.setattr(Journal, "write", lambda *args: stop(*args))
        found, _, err = run("--batch-size", 1, "--one-by-one")
    *_, last = err.strip().split("\n")
    assert found == code
    assert said in last
    assert f"{after} of 8 answers kept; the same command continues" in last
    assert "Traceback" not in err
    assert ids(run()[1]) == list(range(8))
    assert summary(tmp_path)["answered_now"] == 8 - after


def test_no_room_for_the_answers_file_leaves_all_answers_in_the_parts(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop = Stop(OSError(errno.ENOSPC, "No space left on device"), 1)  # the record has room
        patch.setattr(os, "fsync", lambda _: stop.step())
        code, rows, err = run()
    assert (code, rows) == (2, [])
    assert "No space left on device" in err
    assert err.endswith("8 of 8 answers kept; the same command continues\n")
    monkeypatch.setattr(answer, "load_engine", lambda *_: pytest.fail("all are answered"))
    assert ids(run()[1]) == list(range(8))


def test_after_an_overwrite_the_run_goes_on_without(run, monkeypatch):
    run("--limit", 3)
    stop = Stop(KeyboardInterrupt(), 2)
    monkeypatch.setattr(Journal, "write", lambda *args: stop(*args))
    _, _, err = run("--overwrite", "--batch-size", 1, "--one-by-one")
    assert err.endswith("2 of 8 answers kept; without --overwrite the same command continues\n")


def test_a_defect_keeps_its_traceback_and_says_what_is_kept(run, monkeypatch):
    stop = Stop(ZeroDivisionError("ours"), 2)
    monkeypatch.setattr(Journal, "write", lambda *args: stop(*args))
    with pytest.raises(ZeroDivisionError) as caught:
        run("--batch-size", 1, "--one-by-one")
    assert caught.value.__notes__ == ["2 of 8 answers kept; the same command continues"]


OUTPUTS = {
    "folder": lambda root: (root / "out").mkdir(),
    "file above": lambda root: (root / "out").write_text(""),
    "pipe": lambda root: os.mkfifo(root / "out"),
    "device": lambda root: (root / "out").symlink_to("/dev/full"),
}


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
@pytest.mark.parametrize("make", OUTPUTS.values(), ids=OUTPUTS)
def test_an_answers_file_that_cannot_be_written_is_said_before_the_model_loads(run, tmp_path, monkeypatch, make, more):
    monkeypatch.setattr(answer, "load_engine", lambda *_: pytest.fail("the model was loaded"))
    make(tmp_path)
    before = sorted(tmp_path.iterdir())
    name = "out/a" if make is OUTPUTS["file above"] else "out"
    code, _, err = run(*more, name=name)
    assert (code, err.count("\n")) == (2, 1), err
    assert str(tmp_path / "out") in err
    assert "--overwrite" not in err
    assert sorted({*tmp_path.iterdir()} - {tmp_path / "summary.json"}) == before


# --- bad questions, pictures and folders -----------------------------------------------------------------------------


def test_half_of_a_surrogate_pair_is_an_error_of_its_question(run, tmp_path):
    data = write(tmp_path / "odd", [{"image": "0.png", "text": "a \ud83d dog?"}, {"image": "0.png", "text": "a dog?"}])
    code, rows, _ = run(data=data)
    assert code == 3
    assert ids(rows) == [0, 1]
    assert "question 1.text is 'a \\ud83d dog?', not a string of whole characters" in rows[0]["metadata"]["error"]
    assert (rows[0]["question_id"], rows[0]["prompt"]) == (0, "")
    assert rows[1]["text"]
    assert run(data=data)[1] == rows


def test_whatever_a_tokenizer_raises_is_an_error_of_its_question(run, tmp_path, monkeypatch):
    real = answer.Engine.ask.__globals__["tokenizer_image_token"]

    def tokenise(prompt: str, *args: Any, **options: Any) -> Any:
        if "is 4" in prompt:
            raise RecursionError("no\nend")
        return real(prompt, *args, **options)

    monkeypatch.setattr("llava.eval.engine.tokenizer_image_token", tokenise)
    code, rows, _ = run()
    assert (code, ids(rows)) == (3, list(range(8)))
    assert rows[4]["metadata"]["error"] == "the question cannot be tokenised: no end"
    assert [number for number, text in texts(rows) if not text] == [3, 4]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_what_is_no_file_in_the_image_folder_is_an_error(run, tmp_path, workers):
    data = write(tmp_path / "odd", [{"image": name, "text": "what?"} for name in ("pipe", "0.png", "folder", "null")])
    os.mkfifo(data / "images" / "pipe")
    (data / "images" / "folder").mkdir()
    (data / "images" / "null").symlink_to("/dev/zero")
    code, rows, err = run("--allow-outside", "--num-workers", workers, data=data)
    assert (code, ids(rows)) == (3, [0, 1, 2, 3]), err
    assert ["no regular file" in row["metadata"].get("error", "") for row in rows] == [True, False, True, True]


@pytest.mark.parametrize(
    ("pictures", "there"),
    [(5, False), (20, False), (40, False), (5, True), pytest.param(40, True, marks=pytest.mark.slow)],
)
def test_a_wrong_image_folder_is_said_at_once_and_missing_pictures_one_by_one(
    run, tmp_path, monkeypatch, pictures, there
):
    questions = [{"image": f"{n % pictures + 90}.png", "text": f"what {n // pictures}?"} for n in range(2 * pictures)]
    data = write(tmp_path / "odd", questions, pictures=1)
    if not there:
        monkeypatch.setattr(answer, "load_engine", lambda *_: pytest.fail("the model was loaded"))
        code, rows, err = run(data=data)
        assert (code, rows, err.count("\n")) == (2, [], 1)
        first = min(pictures, 20)
        assert f"none of the {'first ' * (pictures > 20)}{first} pictures is in the image folder" in err
        assert "'90.png'" in err
        assert not (tmp_path / "out").exists()
        return
    (data / "images" / "0.png").rename(data / "images" / "93.png")
    assert run(data=data)[0] == 3
    found = summary(tmp_path)
    assert found["failed"] == 2 * pictures - 2
    assert len(found["errors"]) == pictures - 1
    assert found["errors"][0].endswith(f"(2 questions: 0, {pictures})")


# --- what runs is said -----------------------------------------------------------------------------------------------


def test_one_line_says_what_runs(run):
    _, _, err = run("--retention-ratio", "0.5")
    assert err.split("\n")[0] == (
        "running on cpu in float32 with sdpa attention: globalcom2(retention_ratio=0.5), ratio from --retention-ratio"
    )


def test_workers_are_no_more_than_the_cpus(run, monkeypatch):
    asked = []
    real = answer.stream
    monkeypatch.setattr(
        answer, "stream", lambda pictures, sources, workers: (asked.append(workers), real(pictures, sources, 0))[1]
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    _, _, err = run("--num-workers", 64)
    assert asked == [3]
    assert "note: the CPUs are enough for 3 of --num-workers 64" in err
    _, _, err = run("--overwrite", "--num-workers", 2)
    assert asked == [3, 2]
    assert "note" not in err
