"""Files that a command writes: there whole or not at all, and refused in one line where the machine refuses them.

Standard library only: a command looks at what it is going to write before it loads torch.
"""

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llava.constants import InputError

# How a machine says no to a file. Other errors of the operating system are defects of the program.
REFUSALS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR),
        *(errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ENXIO, errno.ENODEV, errno.EBUSY, errno.ETXTBSY),
        *(errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EEXIST, errno.ENOTEMPTY),
    }
)
DRAFT = ".draft"
FULL = os.makedev(1, 7)
"""Linux' /dev/full, which takes nothing."""
REMEDY = {
    errno.ENOSPC: "make room there or give another place",
    errno.EDQUOT: "make room there or give another place",
    errno.EFBIG: "raise the limit (ulimit -f) or give another place",
    errno.EMFILE: "raise the limit (ulimit -n)",
    errno.ENFILE: "close other programs",
}


def refusal(error: OSError, path: Path | str | None = None) -> str:
    """Say in one line what the machine refused, and what to do.

    Args:
        error: what was raised.
        path: what it was about; None: what the error names, if it does.
    """
    name = path if path is not None else error.filename
    what = "" if name is None else f" {os.fsdecode(name)!r}"
    remedy = REMEDY.get(error.errno or 0, "give another place")
    return f"cannot write{what} ({error.strerror or error}); {remedy}"


def check_output(path: Path) -> None:
    """Make sure that a file can be written, before work is spent on what goes into it. Nothing stays behind.

    Args:
        path: the file; its folders need not exist.

    Raises:
        InputError: it is a folder, read-only, or takes nothing, or its folder is no folder, cannot be made, is
            read-only, or has no room.
    """
    with refusing(path), _named(path):
        found = _status(path)
        if found is None or stat.S_ISREG(found.st_mode):
            _status(path.with_name(path.name + DRAFT))  # its name may be too long
            _probe(next(folder for folder in Path(os.path.realpath(path)).parents if folder.exists()))
        if found is not None and not stat.S_ISFIFO(found.st_mode):  # opening one would wait for its reader
            path.open("ab").close()
        if found is not None and found.st_rdev == FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _status(path: Path) -> os.stat_result | None:
    """Return what is known of a file; None: there is none yet."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _probe(folder: Path) -> None:
    """Write and remove a page in a folder.

    Raises:
        OSError: that is not possible.
    """
    with tempfile.TemporaryFile(dir=folder) as page:
        page.write(bytes(4096))
        page.flush()


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Say in one line what the machine refuses a block that writes a file.

    Raises:
        InputError: it does.
    """
    try:
        yield
    except OSError as error:
        if error.errno in REFUSALS or error.errno in (errno.EINVAL, errno.ENOENT):
            raise InputError(refusal(error, path)) from error
        raise


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn a name that no file can have into an error of the operating system."""
    try:
        yield
    except ValueError as error:  # a NUL in it, or a lone surrogate
        raise OSError(errno.EINVAL, str(error)) from error


def make_folder(folder: Path) -> None:
    """Make a folder with those above it.

    Raises:
        InputError: the machine refuses it.
    """
    with refusing(folder), _named(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Yield the name to write a file under; at the end it is moved to its place, after an error it is removed.

    Folders are made. What is no regular file, such as /dev/stdout, is written in place. A link stays one.

    Raises:
        InputError: the machine refuses the file, whatever the block was doing to it.
    """
    with refusing(path), _named(path):
        found = _status(path)
        if found is not None and not stat.S_ISREG(found.st_mode):
            yield path
            return
        target = Path(os.path.realpath(path))
        if found is not None:
            path.open("ab").close()  # moving a draft there would not ask whether the file is locked
        make_folder(target.parent)
        draft = target.with_name(target.name + DRAFT)
        try:
            yield draft
            with draft.open("rb") as written:
                os.fsync(written.fileno())
            draft.replace(target)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever happens; text in UTF-8, its folders are made.

    Raises:
        InputError: the machine refuses it; what was there before still is.
    """
    with draft_of(path) as draft:
        draft.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
