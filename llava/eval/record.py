"""What answers depend on, by what it is and not by how it was typed: the record that stands beside an answers file.

A checkpoint or tower is known by its files, pictures by some of them, dtype and template by what is in force. Another
spelling of a path, a moved folder and another device continue a run; what makes other answers is another configuration.
"""

import argparse
import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

from llava.conversation import template_name
from llava.eval.benchmarks.base import Question, Row
from llava.model.builder import COMPRESSION
from llava.model.files import find_file
from llava.model.multimodal_encoder.builder import locate_tower

# Options that answers depend on as they are typed; the others may change between a run and its continuation.
DECISIVE = (
    *("load_8bit", "load_4bit", "benchmark", "temperature", "top_p", "num_beams", "max_new_tokens"),
    *("num_chunks", "chunk_idx", "single_pred_prompt", "all_rounds", "lang", "no_ocr", "sample"),
)
# Paths as typed, for people -> what they lead to. Records of earlier versions have the paths alone.
MEANT = {"model_path": "model", "model_base": "base", "vision_tower": "tower", "image_folder": "pictures"}
# Files beside the weights that answers depend on.
SETTINGS = (
    *("generation_config.json", "preprocessor_config.json", "adapter_config.json"),
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"),
)
# Of these kinds of weights the first that is there is loaded.
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
ADDITIONS = ("adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin", "mm_projector.bin")
# Keys of config.json that say where something lies, or that the record of the method has.
LEFT_OUT = (*COMPRESSION, "_name_or_path", "mm_vision_tower", "transformers_version")
# Pictures that stand for their folder, and the bytes of a file that are read whole.
SAMPLE, WHOLE = 8, 2**24


def configuration(
    args: argparse.Namespace, config: Mapping[str, Any], method: str, questions: Sequence[Question]
) -> Row:
    """Return everything answers depend on.

    Args:
        args: options of a run.
        config: the checkpoint's, as `read_config` returns it.
        method: the compression method with its fields.
        questions: all that the run could be asked for, no limit applied.
    """
    tower = args.vision_tower or config.get("mm_vision_tower")
    greedy = {"top_p": None} if not args.temperature else {}
    return {
        "method": method,
        "questions": hashlib.sha256(Path(args.question_file).read_bytes()).hexdigest(),
        **{name: getattr(args, name) for name in MEANT},
        **{name: getattr(args, name) for name in DECISIVE},
        **greedy,
        "dtype": _dtype(args),
        "conv_mode": args.conv_mode or _template(config),
        "model": fingerprint(args.model_path),
        "base": fingerprint(args.model_base) if args.model_base else None,
        "tower": fingerprint(locate_tower(tower, args.model_path), known=True) if isinstance(tower, str) else None,
        "pictures": _pictures(questions, Path(args.image_folder)),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say in what two records differ, so that answers made by one are not the other's; nothing where they agree.

    A record of an earlier version is compared by resolved paths; what it does not say is not held against it.
    """
    if "model_path" in before and "model" not in before:
        before = _translate(before, now)
    typed = {meant: name for name, meant in MEANT.items()}
    found = []
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if key == "pictures" and isinstance(old, dict) and isinstance(new, dict):
            changed = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
            found += [f"picture {name!r} is another" for name in changed[:1]]
        elif key in MEANT or old == new:
            continue  # of paths, what they lead to is compared
        elif key in typed:
            found.append(f"{typed[key]} {before.get(typed[key])!r}, now {now.get(typed[key])!r} with other files")
        else:
            found.append(f"{key} {old!r}, now {new!r}")
    return found


def _translate(early: Mapping[str, Any], now: Mapping[str, Any]) -> Row:
    """Return a record of an earlier version as one of this: what may be the same as now is taken to be."""
    known = {
        meant: now.get(meant)
        for name, meant in MEANT.items()
        if name == "image_folder" or _place(early.get(name)) == _place(now.get(name))
    }
    # The defaults of the device and of the checkpoint, and what has no effect.
    known |= {name: now.get(name) for name in ("dtype", "conv_mode") if early.get(name) is None}
    known |= {} if now.get("temperature") else {"top_p": now.get("top_p")}
    return {**early, **known}


def fingerprint(path: str, known: bool = False) -> str:
    """Return what tells the checkpoint or tower at a path from others, wherever it lies.

    Of config.json, the files beside it and small weights all is read; of large weights some bytes of every tensor, or
    the checksums that the archive has. A hub repository is known by its id and commit.

    Args:
        path: a folder or hub id.
        known: a hub id need not be there, as the shape of a known tower needs neither disk nor network.

    Raises:
        InputError: there is no such folder, and the hub cannot be asked.
    """
    folder = Path(path)
    if not folder.is_dir():
        config = None if known else find_file(path, "config.json")
        return path if config is None else f"{path}@{config.parent.name}"
    digest = hashlib.sha256()
    with suppress(OSError, ValueError):  # an unreadable config is said by whoever loads it
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in LEFT_OUT}
        digest.update(json.dumps(kept, sort_keys=True).encode())
    weights: Iterable[Path] = next((found for kind in WEIGHTS if (found := sorted(folder.glob(kind)))), [])
    for file in [*(folder / name for name in (*SETTINGS, *ADDITIONS)), *weights]:
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            _sample(file, digest)
    return digest.hexdigest()


def _sample(file: Path, digest: Any) -> None:
    """Take in a file: whole where it is small, else by its head, 64 places and some bytes of every tensor."""
    size = file.stat().st_size
    with file.open("rb") as data:
        if size <= WHOLE:
            digest.update(data.read())
            return
        with suppress(zipfile.BadZipFile):
            entries = zipfile.ZipFile(data).infolist()
            digest.update(repr([(entry.filename, entry.file_size, entry.CRC) for entry in entries]).encode())
        for place in sorted({*range(0, size, size // 64), *_tensors(data, size)}):
            data.seek(place)
            digest.update(data.read(64))


def _tensors(data: BinaryIO, size: int) -> list[int]:
    """Return where the middles of a safetensors file's tensors lie; nothing of another file."""
    data.seek(0)
    length = int.from_bytes(data.read(8), "little")
    if length > min(size, 2**27):
        return []
    try:
        header = json.loads(data.read(length))
        spans = [value["data_offsets"] for name, value in header.items() if name != "__metadata__"]
        return [8 + length + (start + end) // 2 for start, end in spans]
    except (ValueError, LookupError, TypeError, AttributeError):
        return []


def _dtype(args: argparse.Namespace) -> str:
    """Name the dtype in force, as `load_pretrained_model` settles it."""
    gpu = torch.cuda.is_available() and args.device != "cpu"
    named = getattr(torch, args.dtype or ("float16" if gpu else "float32"), args.dtype)
    return str(named).removeprefix("torch.")


def _template(config: Mapping[str, Any]) -> str:
    """Name the checkpoint's own conversation template."""
    kind = f"{config.get('model_type')} {config.get('architectures')}".lower()
    return template_name(SimpleNamespace(model_type=kind, hidden_size=config.get("hidden_size")))


def _pictures(questions: Sequence[Question], folder: Path) -> dict[str, str]:
    """Return digests of the first pictures that questions name and that are there, by name."""
    named = dict.fromkeys(question.file for question in questions if question.file is not None)
    found = {}
    for name in list(named)[:SAMPLE]:
        with suppress(OSError, ValueError):  # unreadable ones are said question by question
            if (folder / name).is_file():
                with (folder / name).open("rb") as data:
                    found[name] = hashlib.sha256(data.read(WHOLE)).hexdigest()[:16]
    return found


def _place(path: Any) -> Any:
    """Return where a folder is; anything else, such as a hub id, as it stands."""
    return Path(path).resolve() if isinstance(path, str) and Path(path).is_dir() else path
