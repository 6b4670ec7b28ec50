"""Weights from files into models: whole, or refused with the names of what is wrong."""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from llava.constants import InputError
from llava.model.files import find_file

TOWER = "model.vision_tower."
# What a checkpoint may hold that the model has no place for: tables once saved with the weights.
IGNORED = ("rotary_emb.inv_freq", "position_ids")
# What readers of damaged files raise.
DAMAGED = (EOFError, KeyError, OSError, RuntimeError, SafetensorError, UnpicklingError, ValueError)


def need(package: str, what: str, remedy: str) -> None:
    """Make sure that an optional package is there.

    Raises:
        InputError: it is not.
    """
    if find_spec(package) is None:
        raise InputError(f"{what} needs the package {package}, which is not installed; {remedy}")


def load_model(cls: Any, path: str, **kwargs: Any) -> tuple[Any, set[str], set[str]]:
    """Load weights through transformers.

    Args:
        cls: a model class.
        path: a folder or hub id.
        **kwargs: for `from_pretrained`.

    Returns:
        The model, and the names of missing and of unexpected tensors.

    Raises:
        InputError: the files are missing, damaged, or hold code or tensors of other shapes.
    """
    try:
        with _quiet():
            model, info = cls.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, weights_only=True, **kwargs
            )
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(f"cannot load the weights at {path!r}: {type(error).__name__} {error}") from error
    refuse({"misshapen": [name for name, *_ in info["mismatched_keys"]]}, path)
    unexpected = {name for name in info["unexpected_keys"] if not name.endswith(IGNORED)}
    return model, set(info["missing_keys"]), unexpected


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting what we decide, and its bars out of log files."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def refuse(complaints: dict[str, Collection[str]], path: str) -> None:
    """Refuse weights any part of which would stay random or unread.

    Raises:
        InputError: there is a complaint; the message names the tensors.
    """
    said = [f"{what} {_some(sorted(names))}" for what, names in complaints.items() if names]
    if said:
        raise InputError(f"the weights at {path!r} do not fit the model: {'; '.join(said)}")


def _some(names: list[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def load_tower(model: Any, missing: set[str], tuned: bool) -> set[str]:
    """Fill a tower the checkpoint does not carry from its CLIP model; returns the names filled.

    A tower that was tuned must come with the checkpoint: the original weights in its place are silently wrong.
    """
    tower = {name for name in model.state_dict() if name.startswith(TOWER)}
    if tuned or not tower <= missing:
        return set()
    model.get_vision_tower().load_model()
    return tower


def load_additions(model: nn.Module, path: str) -> set[str]:
    """Load what a LoRA or projector folder adds to its base; returns the names of the tensors filled.

    Raises:
        InputError: there is nothing, or it is damaged or does not fit.
    """
    file = additions_file(path)
    if file is None:
        raise InputError(f"{path!r} has neither non_lora_trainables.bin nor mm_projector.bin, so model_base is no use")
    own = model.state_dict()
    found = {_own_name(name): tensor for name, tensor in _read_tensors(file).items()}
    misshapen = [name for name, tensor in found.items() if name in own and own[name].shape != tensor.shape]
    refuse({"unexpected": found.keys() - own.keys(), "misshapen": misshapen}, str(file))
    model.load_state_dict(found, strict=False)
    return set(found)


def additions_file(path: str) -> Path | None:
    """Return the file of what a LoRA or projector folder adds to its base, if it has one."""
    return find_file(path, "non_lora_trainables.bin") or find_file(path, "mm_projector.bin")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise InputError(f"cannot load {str(file)!r}: {type(error).__name__} {error}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{str(file)!r} must hold a dictionary of tensors")
    return found


def _own_name(name: str) -> str:
    """Translate a name from training: PEFT puts `base_model.model.` before it, the trainer once doubled `model.`."""
    name = name.removeprefix("base_model.")
    if name.startswith("model.model."):
        name = name.removeprefix("model.")
    return name.replace("vision_tower.vision_tower.vision_model.", "vision_tower.vision_tower.")


def merge_lora(model: Any, path: str) -> Any:
    """Merge a LoRA of the language model into its weights.

    Raises:
        InputError: peft is missing, or the adapter is damaged or does not fit.
    """
    need("peft", "a LoRA checkpoint", "pip install 'globalcom2[lora]'")
    from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

    try:
        config = PeftConfig.from_pretrained(path)
        # LLaVA trains adapters in the language model alone, but CLIP has layers of the same names.
        config.exclude_modules = r".*(vision_tower|mm_projector).*"
        wrapped = PeftModel(model, config)
        weights = load_peft_weights(path, device="cpu")
        result = set_peft_model_state_dict(wrapped, weights, ignore_mismatched_sizes=True)
    except (*DAMAGED, TypeError) as error:
        raise InputError(f"cannot load the adapter at {path!r}: {type(error).__name__} {error}") from error
    missing = {name for name in result.missing_keys if "lora_" in name}
    refuse({"missing": missing, "unexpected": result.unexpected_keys}, path)
    return wrapped.merge_and_unload()
