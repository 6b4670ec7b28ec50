"""Files are there whole or not at all; what the machine refuses is said in one line, before work is spent on it."""

import errno
import os
import stat
import tempfile
from pathlib import Path

import pytest

from llava.constants import InputError
from llava.output import check_output, draft_of, make_folder, write_whole
from tests.conftest import file_limit

ROOT = os.geteuid() == 0


def listed(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


@pytest.mark.parametrize("content", ["zwölf\n", b"\x00\xff"])
def test_a_file_is_written_with_its_folders(content, tmp_path):
    file = tmp_path / "a" / "b" / "c.txt"
    check_output(file)
    assert listed(tmp_path) == []
    write_whole(file, content)
    assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert listed(tmp_path) == ["a", "a/b", "a/b/c.txt"]


def test_a_file_is_replaced_and_a_link_stays_one(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    check_output(tmp_path / "link.txt")
    assert (tmp_path / "real.txt").read_text() == "old"
    write_whole(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"
    assert listed(tmp_path) == ["link.txt", "real.txt"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_what_was_there_survives_whatever_stops_the_writer(error, tmp_path):
    file = tmp_path / "table.txt"
    file.write_text("old")
    with pytest.raises(type(error)), draft_of(file) as draft:  # noqa: PT012
        draft.write_text("half")
        raise error
    assert file.read_text() == "old"
    assert listed(tmp_path) == ["table.txt"]


def test_no_room_leaves_what_was_there(tmp_path):
    file = tmp_path / "table.txt"
    file.write_text("old")
    with file_limit(1024), pytest.raises(InputError, match=r"table\.txt.*File too large.*another place"):
        write_whole(file, "x" * 4096)
    assert file.read_text() == "old"
    assert listed(tmp_path) == ["table.txt"]
    with file_limit(1024), pytest.raises(InputError, match=r"table\.txt.*File too large"):
        check_output(file)
    check_output(file)


def impossible(folder):
    """Names that cannot be written, and what is said of each."""
    (folder / "file").write_text("kept")
    (folder / "loop").symlink_to("loop")
    return {
        "a folder": (folder, "Is a directory"),
        "below a file": (folder / "file" / "out.txt", "Not a directory"),
        "deep below a file": (folder / "file" / "no" / "out.txt", "Not a directory"),
        "a loop of links": (folder / "loop", "symbolic links"),
        "too long": (folder / ("x" * 300), "File name too long"),
        "too long with its draft": (folder / ("x" * 252), "File name too long"),
        "a NUL": (folder / "a\0b", "null"),
        "a lone surrogate": (folder / "a\ud800b", "surrogates"),
        "takes nothing": (Path("/dev/full"), "No space left"),
    }


@pytest.mark.parametrize("case", [
    "a folder", "below a file", "deep below a file", "a loop of links", "too long", "too long with its draft", "a NUL",
    "a lone surrogate", "takes nothing",
])  # fmt: skip
def test_what_cannot_be_written_is_found_before_and_refused_after(case, tmp_path):
    path, reason = impossible(tmp_path)[case]
    before = listed(tmp_path)
    for attempt in (check_output, lambda path: write_whole(path, "x")):
        with pytest.raises(InputError) as raised:
            attempt(path)
        said = str(raised.value)
        assert reason in said
        assert repr(str(path)) in said
        assert "give another place" in said
    assert listed(tmp_path) == before
    assert (tmp_path / "file").read_text() == "kept"


@pytest.fixture
def nobody():
    """A folder of somebody who is not root, whom this process is for the time being."""
    with tempfile.TemporaryDirectory() as folder:
        if ROOT:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if ROOT:
                os.seteuid(0)


def test_permissions_are_respected(nobody):
    locked = nobody / "locked"
    locked.mkdir()
    (locked / "file").write_text("kept")
    (locked / "file").chmod(stat.S_IREAD)
    locked.chmod(stat.S_IREAD | stat.S_IEXEC)
    for path in (locked / "file", locked / "new", locked / "deep" / "new"):
        with pytest.raises(InputError, match="Permission denied"):
            check_output(path)
        with pytest.raises(InputError, match="Permission denied"):
            write_whole(path, "x")
    locked.chmod(stat.S_IRWXU)
    with pytest.raises(InputError, match="Permission denied"):
        check_output(locked / "file")  # it could be replaced, but somebody locked it
    assert (locked / "file").read_text() == "kept"
    assert listed(nobody) == ["locked", "locked/file"]


def test_a_read_only_file_system_is_found_before(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"out\.txt' \(Read-only file system\)"):
        check_output(tmp_path / "new" / "out.txt")
    assert listed(tmp_path) == []


def test_devices_are_written_in_place():
    check_output(Path(os.devnull))
    write_whole(Path(os.devnull), "x")
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


def test_a_folder_is_made_or_refused(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert listed(tmp_path) == ["a", "a/b"]
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "b"):
        with pytest.raises(InputError, match="Not a directory"):
            make_folder(path)


def test_other_errors_of_the_block_stay_what_they_are(tmp_path):
    with pytest.raises(ValueError, match="ours"), draft_of(tmp_path / "a"):
        raise ValueError("ours")
    assert listed(tmp_path) == []
