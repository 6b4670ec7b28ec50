"""torchrun without its report on a process that failed: `python -m llava.eval.launch --nproc_per_node N -m MODULE …`.

A process says itself what is wrong; the exit code is its own, where torchrun's is always 1. What the processes have to
say when they are interrupted is said once.
"""

import logging
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from llava.interrupts import SIGNALS, Interrupted, heard_from, last_words
from llava.utils import run_command


def main(argv: list[str] | None = None) -> None:
    """Run the command; its options are torchrun's."""
    args = parse_args(argv)
    logging.disable(logging.CRITICAL)  # of this process, which only watches: its loggers have levels of their own
    with TemporaryDirectory() as folder, last_words(Path(folder)) as words:
        try:
            run(args)
        except SignalException as stop:
            raise _interrupted(stop.sigval, words) from None
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode - 128 in SIGNALS:  # one process was told to stop, not the launcher
                raise _interrupted(failure.exitcode - 128, words) from None
            if failure.exitcode < 0:  # a process ended by a signal could say nothing
                sys.stderr.write(f"error: process {rank} was ended by {failure.signal_name()}; see the kernel's log\n")
                raise SystemExit(128 - failure.exitcode) from None
            raise SystemExit(failure.exitcode) from None


def _interrupted(number: int, words: Path) -> Interrupted:
    stop = Interrupted(signal.Signals(number))
    for note in heard_from(words):
        stop.add_note(note)
    return stop


if __name__ == "__main__":
    run_command(main)
