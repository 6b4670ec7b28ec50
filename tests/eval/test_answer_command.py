"""The answerer's rows, refusals and errors, on the official layouts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava.eval import answer, benchmarks
from llava.utils import run_command
from tests.conftest import picture
from tests.eval.data import write_benchmark


@pytest.fixture(scope="session")
def pope(tmp_path_factory):
    """POPE in the official layout: pictures of several grids, several questions each."""
    return write_benchmark("pope", tmp_path_factory.mktemp("data"), n_images=5, per_image=4)


@pytest.fixture
def command(monkeypatch, capsys, checkpoint, pope, tmp_path):
    """Run the answerer in this process on POPE; returns (exit code, rows, stderr)."""

    def run(*arguments, name="answers", bench="pope", questions=None, images=None, version="v1.6-vicuna"):
        given = benchmarks.get(bench)
        file = tmp_path / f"{name}.jsonl"
        argv = ["answer", "--benchmark", bench, "--model-path", checkpoint(version), "--answers-file", file]
        argv += ["--question-file", questions or pope / given.question_file]
        argv += ["--image-folder", images or pope / given.image_folder, "--max-new-tokens", "6", "--num-workers", "0"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in (*argv, *arguments)])
        code = 0
        try:
            run_command(answer.main)
        except SystemExit as stop:
            code = stop.code
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else None
        return code, rows, capsys.readouterr().err

    return run


def comparable(rows):
    """Rows without what differs from run to run."""
    return [{key: value for key, value in row.items() if key != "answer_id"} for row in rows]


def write_questions(file: Path, rows) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_rows_are_upstreams(command):
    row = command("--retention-ratio", "0.5")[1][0]
    assert list(row) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert row["model_id"] == "llava-next-7b"
    assert row["metadata"]["retention_ratio"] == 0.5
    assert row["metadata"]["visual_tokens"] == row["metadata"]["total_visual_tokens"] // 2
    assert "<image>" not in row["prompt"]


def test_text_only_questions_among_others(command, tmp_path):
    """ScienceQA asks half of its questions without a picture."""
    folder = write_benchmark("scienceqa", tmp_path / "sqa", n_images=3, per_image=2)
    given = benchmarks.get("scienceqa")
    where = {"bench": "scienceqa", "questions": folder / given.question_file, "images": folder / given.image_folder}
    plain = command("--one-by-one", name="plain", **where)[1]
    shared = command("--batch-size", "4", name="shared", **where)[1]
    assert comparable(shared) == comparable(plain)
    assert {row["metadata"]["total_visual_tokens"] > 0 for row in shared} == {True, False}


def test_chunks_make_the_whole(command):
    whole = command(name="whole")[1]
    parts = [command("--num_chunks", "3", "--chunk_idx", str(i), name=f"part{i}")[1] for i in range(3)]
    assert comparable([row for part in parts for row in part]) == comparable(whole)
    assert command("--num-chunks", "3", "--chunk-idx", "3", name="past")[0] == 2


def test_a_limit_then_the_rest(command):
    assert len(command("--limit", "7")[1]) == 7
    rows = command()[1]
    assert comparable(rows) == comparable(command(name="whole")[1])


def test_nothing_is_asked_twice(command, monkeypatch):
    rows = command()[1]
    monkeypatch.setattr(answer, "load_engine", lambda *_: pytest.fail("everything was answered"))
    assert command()[1] == rows


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--retention-ratio", "0.5"], "retention_ratio=0.5"),
        (["--method", "uniform"], "uniform"),
        (["--max-new-tokens", "7"], "max_new_tokens 6, now 7"),
        (["--conv-mode", "llava_v1"], "conv_mode"),
    ],
)
def test_another_configuration_does_not_mix_in(command, tmp_path, changed, said):
    before = command()[1]
    code, rows, err = command(*changed)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert rows == before
    code, rows, _ = command(*changed, "--overwrite")
    assert code == 0
    assert comparable(rows) != comparable(before)


def test_an_answers_file_of_unknown_origin_is_left_alone(command, tmp_path):
    (tmp_path / "answers.jsonl").write_text("{}\n")
    assert command()[0] == 2
    assert (tmp_path / "answers.jsonl").read_text() == "{}\n"


def test_what_cannot_be_asked_is_named_and_the_rest_answered(command, pope, tmp_path, loaded):
    images = tmp_path / "images"
    images.mkdir()
    picture(200, 100).save(images / "good.png")
    (images / "broken.png").write_bytes(b"no picture")
    long = "word " * 5000
    rows = [
        {"question_id": 1, "image": "good.png", "text": "What?"},
        {"question_id": 2, "image": "broken.png", "text": "What?"},
        {"question_id": 3, "image": "missing.png", "text": "What?"},
        {"question_id": 4, "image": "good.png", "text": "Is <image> a word?"},
        {"question_id": 5, "image": "good.png", "text": long},
        {"question_id": 6, "image": "good.png", "text": "And?"},
    ]
    questions = write_questions(tmp_path / "questions.jsonl", rows)
    for extra, name in (([], "shared"), (["--one-by-one"], "plain")):
        code, found, err = command(*extra, questions=questions, images=images, name=name)
        assert code == 3
        assert [row["question_id"] for row in found] == [1, 2, 3, 4, 5, 6]
        failed = {row["question_id"]: row["metadata"]["error"] for row in found if "error" in row["metadata"]}
        assert set(failed) == {2, 3, 4, 5}
        assert "broken.png" in failed[2]
        assert "missing.png" in failed[3]
        assert "4096" in failed[5]
        assert err.count("could not ask") == 4


@pytest.mark.parametrize(
    "broken", [{"questions": "nosuch.jsonl"}, {"images": "nosuch"}, {"model": "./nosuch"}], ids=lambda b: next(iter(b))
)
def test_what_is_missing_is_said_before_anything_is_written(command, tmp_path, broken):
    extra = ["--model-path", broken["model"]] if "model" in broken else []
    code, rows, err = command(*extra, **{key: tmp_path / name for key, name in broken.items() if key != "model"})
    assert (code, rows) == (2, None)
    assert "nosuch" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ten_thousand_questions_with_unreadable_pictures(checkpoint, tmp_path):
    """It finishes, names the failures, and memory does not grow with the number of questions."""
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (20, 20), "red").save(images / "good.png")
    rows = [
        {"question_id": i, "image": f"broken{i}.png" if i % 100 == 7 else f"good{i // 50}.png", "text": f"What {i}?"}
        for i in range(10_000)
    ]
    for i in range(200):
        (images / f"good{i}.png").hardlink_to(images / "good.png")
    for i in range(7, 10_000, 100):
        (images / f"broken{i}.png").write_bytes(b"no picture")
    questions = write_questions(tmp_path / "questions.jsonl", rows)
    script = (
        "import resource, sys\n"
        "from llava.eval import answer\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "real, seen = answer.Journal.write, []\n"
        "def write(self, index, row):\n"
        "    real(self, index, row)\n"
        "    seen.append(peak() if len(seen) in (2000, 9999) else 0)\n"
        "answer.Journal.write = write\n"
        "try:\n    answer.main()\nexcept SystemExit as stop:\n    code = stop.code\n"
        "sys.stderr.write(f'\\ncode {code} grew {seen[9999] - seen[2000]}\\n')\n"
    )
    arguments = ["--benchmark", "pope", "--model-path", checkpoint(), "--question-file", questions]
    arguments += ["--image-folder", images, "--answers-file", tmp_path / "a.jsonl", "--max-new-tokens", "1"]
    arguments += ["--batch-size", "50", "--num-workers", "0"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    assert done.stderr.count("could not ask: broken") == 100
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("code 3 grew ")
    assert int(last.split()[-1]) < 20_000  # kilobytes
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 10_000
