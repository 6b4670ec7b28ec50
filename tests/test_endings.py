"""How commands end: interrupted, refused by the machine, or without a reader; in this process and in real ones."""

import errno
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing import resource_sharer
from multiprocessing.connection import Client
from pathlib import Path

import pytest

from llava.constants import InputError
from llava.interrupts import LAST_WORDS, Interrupted, deaf_children, end_with_parent, exit_code, heard_from, last_words
from llava.utils import run_command

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _as_in_a_terminal():
    """Signals as a terminal leaves them, wherever the tests are run."""
    before = [signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_DFL)]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def ended(command, capsys):
    """Exit code and standard error of a command; nothing is on standard output."""
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(SystemExit) as stop:
        run_command(command)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    out, err = capsys.readouterr()
    assert out == ""
    return stop.value.code, err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_with_what_is_kept(number, code, capsys):
    def command():
        try:
            os.kill(os.getpid(), number)
            time.sleep(30)
        except KeyboardInterrupt as stop:
            stop.add_note("120 of 397 answers kept;\nthe same command continues")
            raise

    said = "interrupted: 120 of 397 answers kept; the same command continues\n"
    assert ended(command, capsys) == (code, said)


def test_an_interrupt_without_notes_is_one_line_too(capsys):
    def command():
        raise KeyboardInterrupt

    assert ended(command, capsys) == (130, "interrupted; the same command starts again\n")


def test_what_an_interrupt_breaks_is_an_interrupt(capsys):
    """A library may turn it into an error of its own, as torch does when the same signal ends its workers."""

    def command():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("a worker was killed") from None

    assert ended(command, capsys) == (143, "interrupted; the same command starts again\n")


def test_ctrl_c_counts_where_a_launcher_adds_sigterm(capsys):
    def command():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGTERM)

    assert ended(command, capsys) == (130, "interrupted; the same command starts again\n")


def test_an_interrupt_within_a_destructor_is_not_lost(capsys):
    class Slow:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def command():
        Slow()
        time.sleep(30)

    assert ended(command, capsys) == (143, "interrupted; the same command starts again\n")


def test_other_threads_run_commands_too():
    """Signals belong to the main thread; elsewhere a command ends as ever."""
    codes = []

    def run():
        try:
            run_command(lambda: (_ for _ in ()).throw(InputError("x")))
        except SystemExit as stop:
            codes.append(stop.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [2]


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run_command(lambda: signal.raise_signal(signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/a.jsonl"),
            "cannot write '/data/a.jsonl' (No space left on device); make room there or give another place",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "cannot write (No space left on device); make room there or give another place",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "a"),
            "cannot write 'a' (Permission denied); give another place",
        ),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", b"a"),
            "cannot write 'a' (Is a directory); give another place",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "a"),
            "cannot write 'a' (Read-only file system); give another place",
        ),
    ],
)
def test_the_machines_refusals_are_one_line(error, said, capsys):
    def command():
        raise error

    assert ended(command, capsys) == (2, f"error: {said}\n")


def test_last_words_go_to_whoever_asked_for_them(tmp_path, capsys):
    def command():
        stop = Interrupted(signal.SIGTERM)
        stop.add_note("3 answers kept")
        raise stop

    with last_words(tmp_path) as file:
        assert ended(command, capsys) == (143, "")
    assert LAST_WORDS not in os.environ
    assert heard_from(file) == ["3 answers kept"]
    assert heard_from(tmp_path / "none") == []
    assert exit_code(KeyboardInterrupt()) == 130


# --- real processes ---------------------------------------------------------------------------------------------------

PREAMBLE = "import os, signal, sys, time\nfrom llava.utils import run_command\n"


def python(code, *, stdout=subprocess.PIPE):
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + code],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("ending", ["pass", "sys.exit(3)", "sys.exit()"])
def test_output_that_cannot_be_written_is_one_line(ending):
    """Also at the very end, when the buffer is emptied."""
    code = f"def main():\n    print('x' * 20)\n    {ending}\nrun_command(main)"
    with Path("/dev/full").open("w") as full:
        done = python(code, stdout=full)
    assert (done.returncode, done.stderr) == (
        2,
        "error: cannot write (No space left on device); make room there or give another place\n",
    )


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_goes_away_is_one_line(lines):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = python(f"run_command(lambda: print('x\\n' * {lines}))", stdout=writer)
    finally:
        os.close(writer)
    assert done.returncode == 2
    assert done.stderr.startswith("error: whoever reads the output closed it before its end; ")
    assert done.stderr.count("\n") == 1


def test_a_closed_output_is_no_error():
    done = python("sys.stdout = None\nrun_command(lambda: print('x'))")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_signal_after_the_end_says_nothing():
    code = "import llava.interrupts as i\ni.end_while_importing()\nrun_command(lambda: print('done'))\n"
    done = python(code + "signal.raise_signal(signal.SIGINT)\nprint('not reached')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def spawn(*words):
    """Start a module of ours as a terminal would, signals as a terminal leaves them."""
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in SIGNALS],
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_importing_is_one_line(number, code):
    process = spawn("llava.eval.run_llava", "--model-path", "x", "--image-file", "x", "--query", "x")
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch_cpu" not in maps.read_text():  # torch is being imported
        assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", "interrupted: nothing had begun\n")


def test_children_do_not_hear_ctrl_c():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
    with deaf_children():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_an_interrupt_while_children_start_is_answered_afterwards(capsys):
    def command():
        with deaf_children():
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)

    assert ended(command, capsys) == (130, "interrupted; the same command starts again\n")


def watch(file, orphaned):
    """A worker that is told to end with its parent, before or after that is gone; a file says that it goes on."""
    while orphaned and os.getppid() == multiprocessing.parent_process().pid:
        time.sleep(0.01)
    print("ready", flush=True)
    end_with_parent()
    time.sleep(0 if orphaned else 60)
    Path(file).touch()


PARENT = """
import multiprocessing, sys, time
from tests.test_endings import watch
if __name__ == "__main__":
    file, orphaned = sys.argv[1], sys.argv[2] == "True"
    multiprocessing.get_context("spawn").Process(target=watch, args=(file, orphaned), daemon=True).start()
    time.sleep(0 if orphaned else 60)
    if orphaned:
        import os
        os.kill(os.getpid(), 9)
"""


def hand_over(ready):
    """A worker whose parent breaks off in the middle of fetching a tensor."""
    end_with_parent()
    resource_sharer.DupFd(0)  # starts the thread that hands descriptors over
    address = resource_sharer._resource_sharer._address
    ready.send(address)
    ready.recv()


def test_a_worker_says_nothing_of_a_parent_that_breaks_off(capfd):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=hand_over, args=(theirs,))
    worker.start()
    address = ours.recv()
    with socket.socket(socket.AF_UNIX) as fetching:
        fetching.connect(address)  # and breaks off before it has said who it is
    # Behind it in the line, so that it was served.
    Client(address, authkey=multiprocessing.current_process().authkey).close()
    ours.send(None)
    worker.join()
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell processes of their parent's end")
@pytest.mark.parametrize("orphaned", [False, True])
def test_workers_do_not_outlive_who_started_them(tmp_path, orphaned):
    program, file = tmp_path / "parent.py", tmp_path / "survived"
    program.write_text(PARENT)
    words = [sys.executable, str(program), str(file), str(orphaned)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, env=env)
    assert parent.stdout.readline() == b"ready\n"
    parent.kill()
    assert parent.stdout.read() == b""  # until the worker has ended too
    parent.wait()
    assert not file.exists()
