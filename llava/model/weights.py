"""Weights from files into models: whole, or refused with the names of what is wrong."""

import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava.constants import InputError
from llava.model.files import find_file, read_object
from llava.model.settings import ADAPTER
from llava.model.stored import DAMAGED, ELSEWHERE, IGNORED, check_size, read_tensors, refuse_integers, why
from llava.schema import some

TOWER = "model.vision_tower."
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def need(package: str, what: str, remedy: str) -> None:
    """Make sure that an optional package is there.

    Raises:
        InputError: it is not.
    """
    if find_spec(package) is None:
        raise InputError(f"{what} needs the package {package}, which is not installed; {remedy}")


def load_model(cls: Any, path: str, asked: int = 0, **kwargs: Any) -> tuple[Any, set[str], set[str]]:
    """Load weights through transformers.

    Args:
        cls: a model class.
        path: a folder or hub id.
        asked: numbers that the config asks for at least, see `check_size`.
        **kwargs: for `from_pretrained`.

    Returns:
        The model, and the names of missing and of unexpected tensors.

    Raises:
        InputError: the files are missing, damaged, or hold code or tensors of other shapes.
    """
    if not kwargs.keys() & ELSEWHERE:
        check_size(asked, path, getattr(kwargs.get("config"), "quantization_config", None) is not None)
    try:
        with quiet():
            model, info = cls.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, weights_only=True, **kwargs
            )
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(f"cannot load the weights at {path!r}: {why(error)}") from error
    refuse({"misshapen": [f"{name} {list(held)} for {list(own)}" for name, held, own in info["mismatched_keys"]]}, path)
    unexpected = {name for name in info["unexpected_keys"] if not name.endswith(IGNORED)}
    return model, set(info["missing_keys"]), unexpected


@contextmanager
def quiet() -> Iterator[None]:
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
    said = [f"{what} {some(sorted(names))}" for what, names in complaints.items() if names]
    if said:
        raise InputError(f"the weights at {path!r} do not fit the model: {'; '.join(said)}")


def load_tower(model: Any, missing: set[str], tuned: bool) -> set[str]:
    """Fill a tower the checkpoint does not carry from its CLIP model; returns the names filled.

    A tower that was tuned must come with the checkpoint: the original weights in its place are silently wrong.
    """
    tower = {name for name in model.state_dict() if name.startswith(TOWER)}
    if tuned or not tower <= missing:
        return set()
    model.get_vision_tower().load_model()
    return tower


def load_additions(model: nn.Module, path: str, missing: set[str]) -> set[str]:
    """Load what a LoRA or projector folder adds to its base; returns the names of the tensors filled.

    Args:
        model: the base.
        path: the LoRA or projector folder.
        missing: names of tensors that the base's own files left empty. Where nothing but a tower is, the base is whole
            and an adapter alone is enough.

    Raises:
        InputError: there is nothing, or it is damaged or does not fit.
    """
    file = additions_file(path)
    if file is None:
        if find_file(path, "adapter_config.json") and all(name.startswith(TOWER) for name in missing):
            return set()
        raise InputError(f"{path!r} has neither non_lora_trainables.bin nor mm_projector.bin, so model_base is no use")
    own = model.state_dict()
    found = {_own_name(name): tensor for name, tensor in read_tensors(file).items()}
    misshapen = [name for name, tensor in found.items() if name in own and own[name].shape != tensor.shape]
    refuse({"unexpected": found.keys() - own.keys(), "misshapen": misshapen}, str(file))
    refuse_integers([name for name, tensor in found.items() if not tensor.is_floating_point()], str(file))
    model.load_state_dict(found, strict=False)
    return set(found)


def additions_file(path: str) -> Path | None:
    """Return the file of what a LoRA or projector folder adds to its base, if it has one."""
    return find_file(path, "non_lora_trainables.bin") or find_file(path, "mm_projector.bin")


def _own_name(name: str) -> str:
    """Translate a name from training: PEFT puts `base_model.model.` before it, the trainer once doubled `model.`."""
    name = name.removeprefix("base_model.")
    if name.startswith("model.model."):
        name = name.removeprefix("model.")
    return name.replace("vision_tower.vision_tower.vision_model.", "vision_tower.vision_tower.")


def merge_lora(model: Any, path: str) -> Any:
    """Merge a LoRA into the weights: of the language model, and of tower and projector where it has factors for them.

    LLaVA trains adapters in the language model alone, but names their places by the ends of module names, which CLIP's
    layers have as well. Where training saw the tower, the adapter holds factors for it, and peft merges them.

    Raises:
        InputError: peft is missing, or the adapter is damaged or does not fit.
    """
    need("peft", "a LoRA checkpoint", "pip install 'globalcom2[lora]'")
    from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

    read_object(find_file(path, "adapter_config.json") or Path(path), ADAPTER)
    try:
        config = PeftConfig.from_pretrained(path)
        # In float32, as peft would keep the factors of an adapter that is trained.
        found = load_peft_weights(path, device="cpu")
        refuse_integers([name for name, factor in found.items() if not factor.is_floating_point()], path)
        weights = {_own_factor(name): factor.float() for name, factor in found.items()}
        adapted = {name.partition(".lora_")[0] for name in weights}
        parts = (name for name, _ in model.named_modules() if "vision_tower" in name or "mm_projector" in name)
        config.exclude_modules = [name for name in parts if f"base_model.model.{name}" not in adapted]
        with warnings.catch_warnings(action="ignore"):  # what does not fit is refused below, in fewer words
            # Empty until filled: a rank that no file has costs no memory.
            wrapped = PeftModel(model, config, low_cpu_mem_usage=True)
            result = set_peft_model_state_dict(wrapped, weights, ignore_mismatched_sizes=True, low_cpu_mem_usage=True)
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(f"cannot load the adapter at {path!r}: {why(error)}") from error
    missing = {name for name in result.missing_keys if "lora_" in name}
    refuse({"missing": missing, "unexpected": result.unexpected_keys}, path)
    return wrapped.merge_and_unload()


def _own_factor(name: str) -> str:
    """Translate the name of an adapter's factor to where its module is here."""
    return name.replace("vision_tower.vision_tower.vision_model.", "vision_tower.vision_tower.")


def refuse_infinite(model: Any, path: str) -> None:
    """Refuse weights that are NaN or infinite: no answer would come of them, or an empty one.

    All are looked at, as a single one spoils every answer or only some. `aminmax` reads each once, in its own dtype,
    and makes nothing: 0.1 s for a gigabyte on one CPU core, 1 ms on a GPU, where one read at the end waits for all.
    Of weights that are still mapped to their file, it does the reading that the first answer would.

    Args:
        model: filled; what is quantised or offloaded is passed over.
        path: of the checkpoint, for the message.

    Raises:
        InputError: there are some; the message names the tensors.
    """
    ranges: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.dtype in FLOATS and tensor.numel() and not tensor.is_meta:
            ranges.setdefault(tensor.device, {})[name] = torch.stack(tensor.detach().aminmax()).float()
    bad = []
    for found in ranges.values():
        finite = torch.stack([*found.values()]).isfinite().all(1).tolist()
        bad += [name for name, good in zip(found, finite, strict=True) if not good]
    if bad:
        kind = str(model.dtype).removeprefix("torch.")
        raise InputError(f"the weights at {path!r} are NaN or infinite, in {kind}, in {some(bad)}; get them again")
