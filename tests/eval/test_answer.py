"""The answerer on mixed data: alone, in chunks, on several processes, killed and continued, it ends with one file."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.eval import answer
from tests.conftest import picture

SIZES = [(300, 200), (90, 60), (60, 200), (84, 84), (500, 100)]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def write_set(folder: Path, n_images: int, per_image: int) -> Path:
    """Question file and pictures: an image's questions far apart, some without a picture, some that cannot be asked."""
    (folder / "images").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for turn in range(per_image):
        for image in range(n_images):
            rows.append({"image": f"{image}.png", "text": f"what {'color ' * (image * turn % 5)}is {turn}?"})
        rows.append({"text": f"yes or no, number {turn}?"})
    for image in range(n_images):
        picture(*SIZES[image % len(SIZES)], seed=image).save(folder / "images" / f"{image}.png")
    (folder / "images" / "damaged.png").write_bytes(b"\x89PNG")
    rows.insert(2, {"image": "damaged.png", "text": "what?"})
    rows.insert(5, {"image": "0.png", "text": "is <image> a dog?"})
    rows.insert(7, {"image": "1.png", "text": "cat " * 5000})
    rows.append({"image": "missing.png", "text": "what?"})
    lines = (json.dumps({"question_id": 1000 - number, **row}) for number, row in enumerate(rows))
    (folder / "questions.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


N_ERRORS = 4


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("mixed") / "set", n_images=5, per_image=3)


@pytest.fixture
def words(checkpoint: Callable[..., Path], mixed: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Options of a run; `name` is the answers file's."""

    def make(name: str, *more: object, data: Path = mixed, version: str = "v1.6-vicuna") -> list[str]:
        given = ["--benchmark", "vqav2", "--model-path", checkpoint(version), "--question-file"]
        given += [data / "questions.jsonl", "--image-folder", data / "images", "--max-new-tokens", "5"]
        return [str(word) for word in (*given, "--answers-file", tmp_path / name, *more)]

    return make


@pytest.fixture
def command(words: Callable[..., list[str]], command, monkeypatch, tmp_path, loaded) -> Callable[..., Any]:
    """Run in this process, on the session's model; returns (exit code, rows, stdout, stderr)."""

    def run(name: str, *more: object, version: str = "v1.6-vicuna", **options: Any) -> Any:
        monkeypatch.setattr(answer, "load_pretrained_model", lambda *_, **__: loaded(version))
        before = loaded(version).model.method
        code, out, err = command(answer.main, *words(name, *more, version=version, **options))
        loaded(version).model.method = before
        file = tmp_path / name
        return code, rows(file) if file.exists() else None, out, err

    return run


def rows(file: Path) -> list[dict[str, Any]]:
    """What an answers file says, but for answer_id."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({row.pop("answer_id") for row in found}) == len(found)
    return found


def ids(data: Path) -> list[int]:
    return [json.loads(line)["question_id"] for line in (data / "questions.jsonl").read_text().splitlines()]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=ONE_THREAD, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("version", ["v1.6-vicuna", "v1.6-mistral", "v1.5"])
@pytest.mark.parametrize("method", ["none", "globalcom2", "uniform"])
def test_every_way_of_running_gives_one_file(command, mixed, method, version):
    given = {"version": version}
    code, wanted, _, err = command("plain", "--method", method, "--one-by-one", **given)
    assert code == 3
    assert [row["question_id"] for row in wanted] == ids(mixed)
    assert err.count("could not ask: ") == N_ERRORS
    for said in ("damaged.png", "missing.png", "contains <image>", "(question 995)", "4096"):
        assert said in err
    for batch in (1, 3, 8, 50):
        code, found, *_ = command(f"batch{batch}", "--method", method, "--batch-size", batch, **given)
        assert (code, found) == (3, wanted)
    parts = [command(f"part{i}", "--method", method, "--num-chunks", 3, "--chunk-idx", i, **given) for i in range(3)]
    assert [row for part in parts for row in part[1]] == wanted


@pytest.mark.parametrize(
    ("method", "workers"),
    [("globalcom2", 0), *(pytest.param(method, 1, marks=pytest.mark.slow) for method in ("none", "uniform"))],
)
def test_two_processes_give_the_same(command, words, tmp_path, method, workers):
    wanted = command("plain", "--method", method, "--one-by-one")[1]
    more = ["--method", method, "--num-processes", 2, "--num-workers", workers, "--json"]
    done = python(*TORCHRUN, "2", "-m", "llava.eval.answer", *words("two", *more))
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "two") == wanted, done.stderr
    summary = json.loads(done.stdout)
    # Of both processes together.
    assert summary["answered_now"] == summary["questions"] == len(wanted)
    assert summary["images"] == 5
    kept, total = (sum(row["metadata"][key] for row in wanted) for key in ("visual_tokens", "total_visual_tokens"))
    assert summary["retention"] == round(kept / total, 4)
    assert len(summary["errors"]) == N_ERRORS


def scatter(tmp_path: Path, name: str, wanted: list[dict[str, Any]], whole: str) -> set[int]:
    """Leave what three killed processes left: a part of the answers each, the last line torn; returns what is there."""
    left = random.Random(1).sample(range(len(wanted)), len(wanted) // 2)
    parts = tmp_path / f"{name}.parts"
    parts.mkdir()
    for process in range(3):
        lines = [json.dumps([i, wanted[i] | {"answer_id": f"a{i}"}]) + "\n" for i in left[process::3]]
        (parts / f"{process}.jsonl").write_text("".join(lines) + json.dumps([0, wanted[0]])[: 20 * process])
    (tmp_path / f"{name}.config.json").write_text((tmp_path / f"{whole}.config.json").read_text())
    return set(left)


@pytest.mark.slow
def test_a_run_of_three_is_continued_by_two_or_one(command, words, tmp_path):
    wanted = command("whole")[1]
    for name, launch in (("two", [*TORCHRUN, "2", "-m"]), ("one", ["-m"])):
        left = scatter(tmp_path, name, wanted, "whole")
        done = python(*launch, "llava.eval.answer", *words(name, "--json", "--num-workers", 0))
        assert rows(tmp_path / name) == wanted, done.stderr
        assert json.loads(done.stdout)["answered_now"] == len(wanted) - len(left)
        assert not (tmp_path / f"{name}.parts").exists()


def test_a_limit_in_the_middle_of_a_scattered_run(command, tmp_path):
    wanted = command("whole")[1]
    left = scatter(tmp_path, "cut", wanted, "whole")
    assert command("cut", "--limit", 4)[1][:4] == wanted[:4]
    _, found, out, _ = command("cut", "--json")
    assert found == wanted
    assert json.loads(out)["answered_now"] == len(wanted) - len(left | set(range(4)))
    assert command("cut", "--limit", 2)[1] == wanted, "a smaller limit takes nothing away"


def test_overwrite_starts_over(command, monkeypatch):
    wanted = command("a")[1]
    out = command("a", "--overwrite", "--json")[2]
    assert json.loads(out)["answered_now"] == len(wanted)
    out = command("a", "--json")[2]
    assert json.loads(out)["answered_now"] == 0


def test_a_changed_question_file_is_another_configuration(command, mixed, tmp_path):
    command("a")
    changed = tmp_path / "changed"
    write_set(changed, 2, 1)
    code, _, _, err = command("a", data=changed)
    assert code == 2
    assert "questions" in err
    assert err.count("\n") == 1


def test_refused_paths_stop_before_the_model(command, monkeypatch, tmp_path):
    data = write_set(tmp_path / "set", 1, 1)
    (tmp_path / "x").write_bytes((data / "images" / "0.png").read_bytes())
    (data / "images" / "link.png").symlink_to(tmp_path / "x")
    monkeypatch.setattr(answer, "load_engine", lambda *_: pytest.fail("the model was loaded"))
    for name in ("../../x", str(tmp_path / "x"), "link.png"):
        (data / "questions.jsonl").write_text(json.dumps({"question_id": 1, "image": name, "text": "what?"}) + "\n")
        code, found, _, err = command("a", data=data)
        assert (code, found, err.count("\n")) == (2, None, 1)
    monkeypatch.undo()


def test_allow_outside(command, tmp_path):
    data = write_set(tmp_path / "set", 1, 1)
    picture(90, 60).save(tmp_path / "x.png")
    line = json.dumps({"question_id": 1, "image": "../../x.png", "text": "what?"})
    (data / "questions.jsonl").write_text(line + "\n")
    code, found, *_ = command("a", "--allow-outside", data=data)
    assert code == 0
    assert found[0]["metadata"]["total_visual_tokens"] > 0


@pytest.mark.parametrize(
    "bad",
    [
        ["--batch-size", "0"], ["--num-chunks", "0"], ["--chunk-idx", "-1"], ["--chunk-idx", "1"], ["--limit", "0"],
        ["--num-workers", "-1"], ["--num-beams", "0"], ["--max-new-tokens", "none"], ["--num-processes", "2"],
        ["--conv-mode", "nosuch"],
    ],
)  # fmt: skip
def test_bad_options_are_one_line(command, bad):
    code, found, _, err = command("a", *bad)
    assert (code, found) == (2, None)
    assert bad[1] in err
    assert err.count("\n") == 1


def test_a_mistyped_checkpoint_leaves_nothing_to_overwrite(command, words):
    done = python("-m", "llava.eval.answer", *words("a"), "--model-path", "./nosuch")
    assert done.returncode == 2
    assert "nosuch" in done.stderr
    assert command("a")[0] == 3


def test_rows_are_upstreams(command, tmp_path):
    first = command("a", "--retention-ratio", "0.5")[1][0]
    assert list(json.loads((tmp_path / "a").read_text().split("\n")[0])) == [
        *("question_id", "prompt", "text", "answer_id", "model_id", "metadata"),
    ]
    assert first["model_id"] == "llava-next-7b"
    assert first["metadata"]["retention_ratio"] == 0.5
    assert first["metadata"]["visual_tokens"] == first["metadata"]["total_visual_tokens"] // 2
    assert "<image>" not in first["prompt"]


def test_what_is_dropped_inside_the_language_model_counts_as_kept_so_long(command):
    """The mean over layers meets the ratio; what entered the first layer would look uncompressed."""
    rows = command("a", "--method", "fastv(layer=1)", "--retention-ratio", "0.75")[1]
    counts = [[row["metadata"][key] for key in ("visual_tokens", "total_visual_tokens")] for row in rows]
    shares = [kept / total for kept, total in counts if total]
    assert len(shares) > 1
    assert shares == pytest.approx([0.75] * len(shares), abs=0.02)


def test_tokens_per_layer_instead_of_a_ratio(command):
    """The switch of FiCoCo's authors: no ratio is in force then, whatever line 101 says."""
    found = command("a", "--method", "ficoco_v(r=3)")[1]
    assert found[0]["metadata"]["method"] == "ficoco_v(r=3)"
    assert found[0]["metadata"]["retention_ratio"] is None
    assert 0 < found[0]["metadata"]["visual_tokens"] < found[0]["metadata"]["total_visual_tokens"]
    code, _, _, err = command("b", "--method", "ficoco_v(r=3)", "--retention-ratio", "0.5")
    assert (code, err) == (2, "error: give ficoco_v either r or retention_ratio, got 3 and 0.5\n")


def test_what_cannot_be_reached_leaves_nothing_behind(command, tmp_path):
    code, _, _, err = command("a", "--method", "fastv(layer=1)", "--retention-ratio", "0.1")
    assert code == 2
    assert err.startswith("error: fastv with layer=1 of 3 keeps 33.33%")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_asked_twice(command, monkeypatch):
    rows = command("a")[1]
    monkeypatch.setattr(answer, "load_engine", lambda *_: pytest.fail("everything was answered"))
    assert command("a")[1] == rows


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--retention-ratio", "0.5"], "retention_ratio=0.5"),
        (["--method", "uniform"], "uniform"),
        (["--max-new-tokens", "7"], "max_new_tokens 5, now 7"),
        (["--conv-mode", "llava_v1"], "conv_mode"),
    ],
)
def test_another_configuration_does_not_mix_in(command, changed, said):
    before = command("a")[1]
    code, found, _, err = command("a", *changed)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert found == before
    code, found, *_ = command("a", *changed, "--overwrite")
    assert code == 3
    assert found != before


def test_an_answers_file_of_unknown_origin_is_left_alone(command, tmp_path):
    (tmp_path / "a").write_text('{"answer_id": 1}\n')
    assert command("a")[0] == 2
    assert (tmp_path / "a").read_text() == '{"answer_id": 1}\n'


@pytest.mark.parametrize("broken", ["--question-file", "--image-folder", "--model-path"])
def test_what_is_missing_is_said_before_anything_is_written(command, tmp_path, broken):
    code, _, _, err = command("a", broken, "./nosuch")
    assert code == 2
    assert "nosuch" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_killed_at_ten_random_moments(words, tmp_path):
    """A real process, killed with -9 at its start, while it answers, and near its end."""
    data = write_set(tmp_path / "set", n_images=40, per_image=4)
    n = len(ids(data))
    command = [sys.executable, "-m", "llava.eval.answer"]
    more = ["--batch-size", "2", "--num-workers", "1"]
    assert python(*command[1:], *words("whole", *more, data=data)).returncode == 3
    generator = random.Random(7)
    parts = tmp_path / "killed.parts"

    def written() -> int:
        return sum(file.read_bytes().count(b"\n") for file in parts.glob("*.jsonl")) if parts.exists() else 0

    before = 0
    for kill in range(10):
        quiet = subprocess.DEVNULL
        arguments = words("killed", *more, data=data)
        process = subprocess.Popen([*command, *arguments], stdout=quiet, stderr=quiet, env=ONE_THREAD)
        until = time.monotonic() + (generator.uniform(0.1, 5) if kill % 3 == 0 else 120)
        more_answers = generator.randint(1, n // 9)
        while process.poll() is None and time.monotonic() < until and written() < before + more_answers:
            time.sleep(generator.uniform(0.001, 0.05))
        assert process.poll() is None, "it was killed before its end"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert written() >= before, "nothing is lost"
        before = written()
    assert 0 < before < n
    assert python(*command[1:], *words("killed", *more, data=data)).returncode == 3
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert [row["question_id"] for row in rows(tmp_path / "killed")] == ids(data)


@pytest.mark.slow
def test_ten_thousand_questions_with_unreadable_pictures(words, tmp_path):
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
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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
    more = ["--max-new-tokens", 1, "--batch-size", 50, "--num-workers", 0]
    done = python("-c", script, *words("a", *more, data=tmp_path))
    assert done.returncode == 0
    assert done.stderr.count("could not ask: broken") == 100
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("code 3 grew ")
    assert int(last.split()[-1]) < 20_000  # kilobytes
    assert len((tmp_path / "a").read_text().splitlines()) == 10_000


@pytest.mark.slow
def test_memory_is_flat_with_workers(words, tmp_path):
    """5 000 questions on 1 000 pictures through worker processes: nothing piles up, in memory or as open files."""
    data = tmp_path / "set"
    (data / "images").mkdir(parents=True)
    picture(30, 30).save(data / "images" / "good.png")
    for image in range(1000):
        (data / "images" / f"{image}.png").hardlink_to(data / "images" / "good.png")
    lines = (json.dumps({"question_id": n, "image": f"{n // 5}.png", "text": f"what {n}?"}) for n in range(5000))
    (data / "questions.jsonl").write_text("\n".join(lines))
    arguments = words("a", "--num-workers", 2, "--max-new-tokens", 1, "--batch-size", 20, data=data, version="v1.5")
    process = subprocess.Popen(
        [sys.executable, "-m", "llava.eval.answer", *arguments], env=ONE_THREAD, stderr=subprocess.DEVNULL
    )
    samples: dict[int, tuple[int, int]] = {}
    while process.poll() is None:
        time.sleep(0.2)
        lines_so_far = sum(f.read_bytes().count(b"\n") for f in (tmp_path / "a.parts").glob("*.jsonl"))
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            break
        if lines_so_far >= 1000 and "VmRSS" in status:
            samples[lines_so_far] = int(status.split("VmRSS:")[1].split()[0]), files
    assert process.wait() == 0
    early, late = samples[min(samples)], samples[max(samples)]
    assert max(samples) > 4000
    assert late[0] - early[0] < 30_000, "kilobytes"
    assert late[1] - early[1] < 20


def test_questions_of_a_wrong_type_are_error_rows_and_stop_no_other(command, tmp_path):
    data = write_set(tmp_path / "set", n_images=1, per_image=1)
    file = data / "questions.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0] |= {"text": None}
    lines[1] |= {"text": "what \ud800?"}
    lines[2] |= {"image": ["0.png"]}
    lines += [{"question_id": 1, "text": "what?", "image": "0.png"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, found, _, err = command("a.jsonl", data=data)
    assert code == 3
    assert [row["question_id"] for row in found] == [line["question_id"] for line in lines]
    errors = [row["metadata"].get("error") for row in found]
    fields = (".text is null", ".text is 'what \\ud800?'", ".image is ['0.png'], not")
    for error, field in zip(errors, fields, strict=False):
        assert f"{file.name}', question" in error
        assert field in error
        assert error in err
    assert errors[-1] is None
    assert found[-1]["text"]
    assert command("a.jsonl", data=data)[1] == found, "what is recorded can be gone on from"
