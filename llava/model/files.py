"""Files of a checkpoint, in a folder or on the hub."""

import os
import re
from collections.abc import Mapping
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

from llava.constants import InputError
from llava.reading import parse_json, read_text
from llava.schema import check_settings

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
REMEDY = "give the folder of a checkpoint, or its hub id"
LARGEST = 64 << 20
"""Bytes of a settings file; the largest in use, an index of all tensors, has a hundredth."""


def find_file(path: str, name: str, remedy: str = REMEDY) -> Path | None:
    """Return a file of a folder or hub repository, or None if it has none of that name.

    Args:
        path: the folder, or the hub's id of the repository.
        name: of the file.
        remedy: what a refusal advises.

    Raises:
        InputError: there is no such folder, and the hub cannot be asked; or what has the name is no file.
    """
    if is_folder(path):
        file = Path(path) / name
        if file.is_file():
            return file
        if os.path.lexists(file):  # a pipe would be waited for, a folder or a broken link passed over
            raise InputError(f"{str(file)!r} is no file; put the checkpoint's own there")
        return None
    if not HUB_ID.fullmatch(path):
        raise InputError(f"there is no folder {path!r}; {remedy}")
    return _fetch(path, name, remedy)


def _fetch(path: str, name: str, remedy: str) -> Path | None:
    """Return a file of a hub repository, downloaded or from the cache, or None if it has none of that name."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    logger = getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(ERROR)  # that every attempt failed is said below, once
    try:
        return Path(hf_hub_download(path, name))
    except LocalEntryNotFoundError as error:  # which is an EntryNotFoundError too
        if _is_cached(path):  # what is not there, the repository may not have
            return None
        raise InputError(f"the hub cannot be reached, and {path!r} is not in its cache; {remedy}") from error
    except EntryNotFoundError:
        return None
    except RepositoryNotFoundError as error:
        raise InputError(f"the hub shows no repository {path!r}; {remedy}, and log in if it is private") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot fetch {name} of {path!r} from the hub; {remedy} ({error})") from error
    finally:
        logger.setLevel(before)


def _is_cached(path: str) -> bool:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot_download(path, local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    return True


def is_folder(path: str | Path) -> bool:
    """Tell whether there is such a folder; of a name that no system takes, there is none."""
    try:
        return Path(path).is_dir()
    except OSError:  # too long, a loop of links
        return False


def read_object(file: Path, layouts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a JSON file's object.

    Args:
        file: is read as UTF-8.
        layouts: of its fields, see `llava.schema.check_settings`.

    Raises:
        InputError: the file is unreadable, far too large, or holds something else.
    """
    try:
        found = parse_json(read_text(file, LARGEST), strict=False)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{str(file)!r} is no readable JSON ({brief(error)})") from error
    if not isinstance(found, dict) or not found:
        raise InputError(f"{str(file)!r} must hold a JSON object with settings")
    check_settings(found, layouts or {}, str(file))
    return found


def brief(error: BaseException, longest: int = 200) -> str:
    """Return what another library's exception says, as much of it as belongs on one line."""
    said = " ".join(str(error).split())
    return said if len(said) <= longest else f"{said[:longest]}…"
