"""Files of a checkpoint, in a folder or on the hub."""

import json
import re
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

from llava.constants import InputError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
REMEDY = "give the folder of a checkpoint, or its hub id"


def find_file(path: str, name: str) -> Path | None:
    """Return a file of a folder or hub repository, or None if it has none of that name.

    Raises:
        InputError: there is no such folder, and the hub cannot be asked.
    """
    if Path(path).is_dir():
        return file if (file := Path(path) / name).is_file() else None
    if not HUB_ID.fullmatch(path):
        raise InputError(f"there is no folder {path!r}; {REMEDY}")
    return _fetch(path, name)


def _fetch(path: str, name: str) -> Path | None:
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
        raise InputError(f"the hub cannot be reached, and {path!r} is not in its cache; {REMEDY}") from error
    except EntryNotFoundError:
        return None
    except RepositoryNotFoundError as error:
        raise InputError(f"the hub shows no repository {path!r}; {REMEDY}, and log in if it is private") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot fetch {name} of {path!r} from the hub; {REMEDY} ({error})") from error
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


def read_object(file: Path) -> dict[str, Any]:
    """Return a JSON file's object.

    Raises:
        InputError: the file is unreadable or holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(file)!r} is no readable JSON ({error})") from error
    if not isinstance(found, dict) or not found:
        raise InputError(f"{str(file)!r} must hold a JSON object with settings")
    return found
