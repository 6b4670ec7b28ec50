"""How a command ends: in one line on stderr and with an exit code that says what happened.

| ended by | exit code | stderr |
|---|---|---|
| itself | its own | |
| `InputError`: what the user gave | 2 | `error: …` |
| the machine: no room, no permission, a folder in the place of a file | 2 | `error: …` |
| Ctrl-C | 130 | `interrupted: …`, what is kept and how to go on |
| SIGTERM | 143 | likewise |
| a reader that closed the pipe, such as `head` | 2 | `error: …` |
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress

from llava.constants import InputError
from llava.interrupts import exit_code, heard, say
from llava.output import REFUSALS, refusal


def run_command(command: Callable[[], None]) -> None:
    """Run a command line's body and end as the table above says.

    A command that is interrupted adds what is kept and how to go on to the exception on its way:
    `except KeyboardInterrupt as stop: stop.add_note("120 of 397 answers kept; the same command continues"); raise`.
    Any other exception is a defect of ours and keeps its traceback.

    Raises:
        SystemExit: the command did not end by itself, or chose its exit code.
    """
    try:
        with heard():
            try:
                command()
            except SystemExit:
                _flush()
                raise
            _flush()
    except KeyboardInterrupt as stop:
        say(stop)
        code = exit_code(stop)
    except InputError as error:
        _complain(str(error))
        code = 2
    except BrokenPipeError:
        _complain("whoever reads the output closed it before its end; let it be read to the end, or written to a file")
        code = 2
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        _complain(refusal(error))
        code = 2
    else:
        return
    _abandon_output()
    raise SystemExit(code) from None


def _flush() -> None:
    if sys.stdout is not None:  # closed by whoever started us
        sys.stdout.flush()


def _complain(line: str) -> None:
    with suppress(OSError):
        sys.stderr.write(f"error: {line}\n")
        sys.stderr.flush()


def _abandon_output() -> None:
    """Write what is left in the buffer, or drop it where that fails: Python would complain of it at its very end."""
    try:
        _flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
