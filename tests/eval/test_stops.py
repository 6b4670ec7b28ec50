"""Runs that are killed, interrupted or out of disk at random moments: no answer is lost or doubled, one line each."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.eval.test_answer import ONE_THREAD, ids, rows, write_set

pytestmark = pytest.mark.slow

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LAUNCH = ["-m", "llava.eval.launch", "--standalone", "--nproc_per_node"]
# Before the answers on disk are looked at, nothing is said of them.
KEPT = re.compile(
    r"interrupted(?:: (\d+) of (\d+) answers kept; the same command continues|: nothing had begun|"
    r"; the same command starts again)"
)
Started = subprocess.Popen[str]
Start = Callable[..., Started]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("stops") / "set", n_images=30, per_image=4)


@pytest.fixture(scope="module")
def start(checkpoint: Callable[..., Path], data: Path) -> Start:
    """Start a run on an answers file, alone or of several processes."""

    def begin(file: Path, processes: int = 1, limits: Callable[[], Any] = lambda: None, workers: int = 0) -> Started:
        words = ["--benchmark", "vqav2", "--model-path", checkpoint(), "--question-file", data / "questions.jsonl"]
        words += ["--image-folder", data / "images", "--max-new-tokens", 3, "--batch-size", 2]
        words += ["--answers-file", file, "--num-workers", workers]
        launch = [sys.executable, *([*LAUNCH, processes] if processes > 1 else []), "-m", "llava.eval.answer"]

        def prepare() -> None:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may ignore them
            limits()

        return subprocess.Popen(
            [str(word) for word in (*launch, *words)],
            env=ONE_THREAD,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=prepare,
        )

    return begin


@pytest.fixture(scope="module")
def wanted(start: Start, data: Path) -> list[dict[str, Any]]:
    """The answers of a run that nothing stops."""
    assert end(start(data / "whole"))[0] == 3
    return rows(data / "whole")


def end(run: Started) -> tuple[int, list[str]]:
    """Wait for a run; returns its exit code and what it said besides its bar and what it began with."""
    _, err = run.communicate(timeout=120)
    # A process that is killed leaves its bar as it stands, with what is said next behind it.
    lines = [line.strip() for line in re.split(r"[\r\n]|(?=error: )", err)]
    dull = ("running on", "note: ", "could not ask: ")
    return run.returncode, [
        line for line in lines if line and "question" not in line[-70:] and not line.startswith(dull)
    ]


def written(file: Path) -> set[int]:
    """Questions that have a whole line on disk, in the answers file or in a part."""
    parts = sorted(Path(f"{file}.parts").glob("*.jsonl"))
    lines = [line for part in parts for line in part.read_bytes().splitlines(keepends=True)]
    merged = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    found = [json.loads(line)[1] for line in lines if line.endswith(b"\n")] + list(map(json.loads, merged))
    assert len({row["question_id"] for row in found}) == len(found), "no question is answered twice"
    return {row["question_id"] for row in found}


def processes_of(run: Started) -> list[int]:
    """A launcher and the processes it started so far."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    started = [number for number in children if "llava.eval.answer" in Path(f"/proc/{number}/cmdline").read_text()]
    return [run.pid, *map(int, started)]


def stop_and_go(start: Start, file: Path, processes: int, moments: int, seed: int, questions: int) -> None:
    """Stop a run at random moments of its start and of its work, and start it again each time."""
    generator = random.Random(seed)
    before: set[int] = set()
    for moment in range(moments):
        number = SIGNALS[moment % len(SIGNALS)]
        run = start(file, processes, workers=generator.choice([0, 0, 1]))
        until = time.monotonic() + (generator.uniform(0, 12) if generator.random() < 0.4 else 100)
        more = generator.randint(1, max(1, questions // (moments + 2)))
        while run.poll() is None and time.monotonic() < until and len(written(file)) < len(before) + more:
            time.sleep(generator.uniform(0.001, 0.05))
        assert run.poll() is None, end(run)
        whom = run.pid
        if processes > 1 and number == signal.SIGKILL:
            whom = generator.choice(processes_of(run))
        os.kill(whom, number)
        code, said = end(run)
        now = written(file)
        told = f"{signal.Signals(number).name} after {len(now)}: exit code {code}, {said}"
        assert before <= now, told
        if number == signal.SIGKILL and whom == run.pid:
            assert (code, said) == (-9, []), told
        elif number == signal.SIGKILL:
            assert code == 137, told
            assert len(said) == 1, told
            assert "was ended by SIGKILL" in said[0], told
        elif now == before and code == -number:
            assert said == [], told  # Python itself was starting
        else:
            assert code == 128 + number, told
            assert len(said) == 1, told
            found = KEPT.fullmatch(said[0])
            assert found, told
            kept = int(found[1] or 0)
            assert kept <= len(now) if processes > 1 or not found[1] else kept == len(now), told
        before = now
    assert len(before) < questions


@pytest.mark.parametrize(("processes", "seed"), [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_stopped_at_random_moments(start, tmp_path, data, wanted, processes, seed):
    stop_and_go(start, tmp_path / "a", processes, 3, seed, len(wanted))
    code, said = end(start(tmp_path / "a", processes))
    assert code in (0, 3), said  # a launcher's processes end well, see `report`
    assert rows(tmp_path / "a") == wanted
    assert [row["question_id"] for row in wanted] == ids(data)
    left = {"a", "a.config.json", "a.summary.json"}
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("a")} == left


@pytest.mark.parametrize("processes", [1, 2])
def test_a_file_that_may_not_grow(start, tmp_path, wanted, processes):
    """Every start writes up to the limit and says so; what it wrote stays, and nothing comes twice."""
    before, limits = 0, (24_000, 24_000)
    while before < len(wanted):
        run = start(tmp_path / "a", processes, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
        code, said = end(run)
        kept = len(written(tmp_path / "a"))
        assert code == 2, said
        assert len(said) == 1, said
        assert "File too large" in said[0]
        assert f"of {len(wanted)} answers kept; the same command continues" in said[0]
        assert before < kept
        before = kept
    # All are there, and the answers file would have been larger than allowed.
    assert not (tmp_path / "a").exists()
    assert end(start(tmp_path / "a", processes))[0] in (0, 3)
    assert rows(tmp_path / "a") == wanted


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "none", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_that_fills_up(start, small_disk, wanted, processes):
    file = small_disk / "deep" / "a"
    code, said = end(start(file, processes))
    assert (code, len(said)) == (2, 1), said
    assert re.search(r"No space left on device.*\d+ of \d+ answers kept; the same command continues", said[0])
    before = written(file)
    assert 0 < len(before) < len(wanted)
    code, said = end(start(file, processes))
    assert (code, len(said)) == (2, 1), said
    assert "No space left on device" in said[0]
    assert written(file) >= before
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    assert end(start(file, processes))[0] in (0, 3)
    assert rows(file) == wanted
