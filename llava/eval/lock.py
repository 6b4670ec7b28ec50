"""One run at a time: a lock on a file, which the operating system takes back when the processes that hold it end."""

import errno
import fcntl
import os
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from platform import node
from typing import BinaryIO

from llava.constants import InputError
from llava.eval.ranks import Ranks

# What file systems say that know no locks.
UNKNOWN = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class Lock:
    """The right of one run to write. Its first process takes it, the others join; the last to leave removes the file.

    A killed process leaves the file, which then locks nobody out: the lock is on it, not its being there.
    """

    def __init__(self, file: Path) -> None:
        """Name the file; nothing is touched yet."""
        self.file = file
        self._held: BinaryIO | None = None
        self._made: list[Path] = []

    def take(self) -> None:
        """Take the lock, as the first process of a run; its folders are made and removed again if they stay empty.

        Raises:
            InputError: another run holds it; the message says which.
            OSError: the machine refuses the file.
        """
        self._made += [folder for folder in self.file.parents if not folder.exists()]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._lock(fcntl.LOCK_EX)
        if self._held is not None:
            self._held.truncate(0)
            since = datetime.now().astimezone().isoformat(timespec="seconds")
            self._held.write(f"process {os.getpid()} on {node()}, since {since}".encode())

    def share(self, ranks: Ranks) -> None:
        """Hold the lock together with the other processes of the run, after the first took it.

        Raises:
            InputError: another run came between.
        """
        ranks.first(self._join)  # the others cannot come in before it is no longer the first one's own
        if ranks.rank > 0:
            self._join()

    def _join(self) -> None:
        self.close()
        self._lock(fcntl.LOCK_SH)

    def _lock(self, kind: int) -> None:
        while self._held is None:
            held = self.file.open("ab+", buffering=0)
            try:
                fcntl.flock(held, kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                held.seek(0)
                holder = held.read(200).decode(errors="replace") or "another process"
                held.close()
                raise InputError(
                    f"another run holds {str(self.file)!r} ({holder}); wait for its end, or give another --answers-file"
                ) from error
            except OSError as error:
                held.close()
                if error.errno not in UNKNOWN:
                    raise
                sys.stderr.write(f"note: {str(self.file)!r} cannot be locked; start no second run on it meanwhile\n")
                return
            if self._is_file_of(held):  # who had it before may have removed it between
                self._held = held
            else:
                held.close()

    def _is_file_of(self, held: BinaryIO) -> bool:
        try:
            return os.path.samestat(os.fstat(held.fileno()), self.file.stat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Let go of the lock, keeping the file."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def release(self) -> None:
        """Let go of the lock; the last process of a run removes the file."""
        if self._held is not None:
            # Refused where others hold it still, or where the folder has become read-only.
            with suppress(OSError):
                fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_file_of(self._held):
                    self.file.unlink()
            self.close()
        with suppress(OSError):  # not empty
            for folder in self._made:
                folder.rmdir()
        self._made = []
