"""Ctrl-C and SIGTERM: a command that is told to stop says so in one line and ends with exit code 130 or 143.

Standard library only, so that a command hears of them while torch is still being imported.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# The environment variable by which `llava.eval.launch` names a file for what its processes have to say at their end.
LAST_WORDS = "LLAVA_LAST_WORDS"

_first: int | None = None  # the signal that was heard first


class Interrupted(KeyboardInterrupt):
    """The command was told to stop. Notes that are added on the way up say what is kept and how to go on."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        """Take the signal's number."""
        super().__init__()
        self.number = int(number)


def exit_code(stop: BaseException) -> int:
    """Return the exit code that shells give a command ended by this signal: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + getattr(stop, "number", signal.SIGINT)


def last_line(stop: BaseException) -> str:
    """Return the line that ends an interrupted command: its notes, each one once."""
    notes = dict.fromkeys(" ".join(note.split()) for note in getattr(stop, "__notes__", ()))
    return f"interrupted: {'; '.join(notes)}" if notes else "interrupted; the same command starts again"


@contextmanager
def kept(what: str) -> Iterator[None]:
    """Add to an interrupt of the block what is kept and how to go on, unless it says so already."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not getattr(stop, "__notes__", ()):
            stop.add_note(what)
        raise


def say(stop: BaseException) -> None:
    """Print the last line on stderr; below `llava.eval.launch` leave the notes to it, so that one process speaks."""
    with suppress(OSError):
        if file := os.environ.get(LAST_WORDS):
            with Path(file).open("a", encoding="utf-8") as words:
                words.writelines(f"{' '.join(note.split())}\n" for note in getattr(stop, "__notes__", ()))
        else:
            sys.stderr.write(last_line(stop) + "\n")
            sys.stderr.flush()


def end_while_importing() -> None:
    """Until `heard` is entered, end at once on a signal: nothing has begun, and imports make other errors of it."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end_at_once)
    if LAST_WORDS in os.environ and sys.platform == "linux":
        _end_with(int(Path(os.environ[LAST_WORDS]).name))


def _end_with(launcher: int) -> None:
    """Be killed when the launcher dies, by whatever: alone, a process would wait for the others for days."""
    _die_with_parent()
    if os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_parent(worker: int = 0) -> None:
    """Be killed when the process dies that started this one by multiprocessing; for a DataLoader's `worker_init_fn`.

    A worker of torch looks for its parent too, but takes for it whoever adopted the worker while torch was imported.
    Of a parent that breaks off while it fetches a tensor, the thread that hands tensors over says nothing.

    Args:
        worker: its number, of no use here.
    """
    sys.excepthook = _unless_broken_off
    if sys.platform == "linux":
        _die_with_parent()
    from multiprocessing import parent_process

    parent = parent_process()
    if parent is None or not parent.is_alive():
        os._exit(1)


def _unless_broken_off(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _die_with_parent() -> None:
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    if LAST_WORDS not in os.environ:  # below a launcher another process may have something to say
        stop = Interrupted(number)
        stop.add_note("nothing had begun")
        say(stop)
    os._exit(128 + number)


def _raise(number: int, frame: FrameType | None) -> None:
    global _first
    if _first is not None and number == signal.SIGTERM:
        return  # a launcher ends with SIGTERM what Ctrl-C has reached already
    _first = _first or number
    raise Interrupted(_first)


def _raise_later(unraisable: Any) -> None:
    """Deliver an interrupt again that came while Python could not raise, as in a destructor."""
    if isinstance(unraisable.exc_value, Interrupted):
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


@contextmanager
def heard() -> Iterator[None]:
    """Raise `Interrupted` on SIGINT and SIGTERM; whatever else the block raises after one is turned into it.

    A signal that the command was started to ignore stays ignored, and outside the main thread nothing is changed.
    """
    global _first
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _first = None
    ignored = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    before = {number: signal.signal(number, _raise) for number in SIGNALS if number not in ignored}
    hook, sys.unraisablehook = sys.unraisablehook, _raise_later
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if _first is None:
            raise
        # Such as torch's complaint that a worker process was ended by the same signal.
        stop = Interrupted(_first)
        for note in getattr(error, "__notes__", ()):
            stop.add_note(note)
        raise stop from None
    finally:
        ours = _end_at_once in before.values()  # this is the process's one command, and Python ends with it
        sys.unraisablehook = _ignore if ours and _first else hook
        for number, handler in before.items():
            signal.signal(number, _leave if handler is _end_at_once else handler)


def _leave(number: int, frame: FrameType | None) -> None:
    """End while Python is shutting down: the command has said what it had to."""
    os._exit(128 + _first if _first else 0)


def _ignore(unraisable: Any) -> None:
    """Say nothing of what destructors trip over after an interrupt, such as torch's over its ended workers."""


@contextmanager
def deaf_children() -> Iterator[None]:
    """Start processes in here that are deaf to Ctrl-C: a terminal sends it to all, and who starts them answers it."""
    from multiprocessing import resource_tracker  # only where processes are started

    resource_tracker.ensure_running()  # when it starts it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def last_words(folder: Path) -> Iterator[Path]:
    """Let the processes that are started in here leave their last words in a folder; yields the file, see `heard_from`.

    They end when this process does, however it ends.
    """
    file = folder / str(os.getpid())
    os.environ[LAST_WORDS] = str(file)
    try:
        yield file
    finally:
        del os.environ[LAST_WORDS]


def heard_from(file: Path) -> list[str]:
    """Return what interrupted processes had to say."""
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []
