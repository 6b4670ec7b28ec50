"""The lock: one run at a time, whatever became of the one before."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llava.constants import InputError
from llava.eval.lock import Lock

HOLD = """
import sys, time
from pathlib import Path
from llava.eval.lock import Lock
lock = Lock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "er" / "a.lock"


@pytest.fixture
def holder(file: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_who_holds_it_is_said_and_nothing_is_touched(file, holder):
    before = file.read_bytes()
    with pytest.raises(InputError, match=rf"another run holds .*\(process {holder.pid} on .*, since 2.*another --ans"):
        Lock(file).take()
    assert file.read_bytes() == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = Lock(file)
    lock.take()  # it died with its process, its file did not
    assert f"process {os.getpid()} on" in file.read_text()
    lock.release()
    assert not file.exists()


def test_what_was_made_goes_and_what_was_there_stays(file, tmp_path):
    lock = Lock(file)
    lock.take()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    lock.take()
    (file.parent / "answers").touch()
    lock.release()
    assert [path.name for path in file.parent.iterdir()] == ["answers"]
    lock.release()  # again: nothing to do


class Companions:
    """Processes of a run as threads: what the first one did, the others wait for."""

    def __init__(self, rank: int, done: threading.Event) -> None:
        self.rank, self.done = rank, done

    def first(self, work: Callable[[], None]) -> None:
        if self.rank == 0:
            work()
            self.done.set()
        assert self.done.wait(20)


def test_the_processes_of_a_run_hold_it_together_and_the_last_removes_it(file):
    locks, done = [Lock(file) for _ in range(3)], threading.Event()
    locks[0].take()
    with ThreadPoolExecutor() as threads:
        # The first comes last: who is faster must not matter.
        sharing = [threads.submit(locks[rank].share, Companions(rank, done)) for rank in (2, 1, 0)]
    assert [shared.result() for shared in sharing] == [None] * 3
    for lock in locks:
        with pytest.raises(InputError, match="another run holds"):
            Lock(file).take()
        assert file.exists()
        lock.release()
    assert not file.exists()


def test_a_file_removed_between_is_taken_anew(file, monkeypatch):
    """Who had the lock removes its file just as another has opened it: that one would hold a file nobody sees."""
    real, removed = fcntl.flock, []

    def flock(held: int, kind: int) -> None:
        if not removed:
            removed.append(file.unlink())
        real(held, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = Lock(file)
    lock.take()
    assert removed
    with pytest.raises(InputError):
        Lock(file).take()
    lock.release()


def test_a_file_system_without_locks_is_said(file, monkeypatch, capsys):
    def flock(held: int, kind: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = Lock(file)
    lock.take()
    lock.release()
    assert "cannot be locked; start no second run" in capsys.readouterr().err
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        lock.take()
