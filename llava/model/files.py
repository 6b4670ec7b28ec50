"""Files of a checkpoint, in a folder or on the hub."""

import json
import re
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
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(path, name))
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot fetch {name} of {path!r} from the hub; {REMEDY} ({error})") from error


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
