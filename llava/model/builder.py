"""Load any published LLaVA-1.5 / LLaVA-NeXT checkpoint: what it is, is read from its config, never from its name."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from logging import getLogger
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from llava.compress import get
from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    InputError,
)
from llava.model.multimodal_encoder.builder import locate_tower, vision_config

logger = getLogger(__name__)

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
TOWER = "model.vision_tower."
COMPRESSION = ("method", "retention_ratio", "profile")
# What a checkpoint may hold that the model has no place for: rotary tables were once saved with the weights.
IGNORED = ("rotary_emb.inv_freq", "position_ids")


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str = "cuda",
    use_flash_attn: bool = False,
    **kwargs: Any,
) -> tuple[Any, Any, Any, int]:
    """Load a checkpoint with its tokenizer and image processor.

    Args:
        model_path: a folder or hub id; with `model_base` it may hold only a LoRA or a projector.
        model_base: the language model that a LoRA or projector belongs to.
        model_name: accepted for compatibility; nothing is read from a name.
        load_8bit: quantise the language model to 8 bits (needs bitsandbytes and CUDA).
        load_4bit: quantise it to 4 bits (nf4, double quantisation).
        device_map: as in transformers; `"auto"` without CUDA means the CPU.
        device: `"cuda"`, or another device for the whole model.
        use_flash_attn: run language model and tower on FlashAttention-2.
        **kwargs: `dtype` (default: float16 on CUDA, else float32), `attn_implementation`, `vision_tower` (folder of
            the CLIP model, instead of the config's), `method`, `retention_ratio` and `profile` (see
            `llava.compress.get`; also read from the config), `customized_config` (a JSON file or folder whose keys
            override the config's), `multimodal` (ignored); anything else goes to transformers' `from_pretrained`.

    Returns:
        `(tokenizer, model, image_processor, context_len)`; for a plain language model the processor is None.
        `context_len` is upstream's (2048 where the config has no `max_sequence_length`), the model's limit is
        `config.max_position_embeddings`.

    Raises:
        InputError: the checkpoint is unreadable or incomplete, or an optional package is missing.
    """
    kwargs.pop("multimodal", None)
    raw = read_config(model_path, kwargs.pop("customized_config", None))
    given = {key: raw.pop(key, None) for key in COMPRESSION} | {k: kwargs.pop(k) for k in COMPRESSION if k in kwargs}
    method = get(given["method"] or "globalcom2", retention_ratio=given["retention_ratio"], profile=given["profile"])
    kwargs = _placement(kwargs, load_8bit, load_4bit, device_map, device, use_flash_attn)
    tokenizer = load_tokenizer(model_base or model_path)
    if "mm_vision_tower" not in raw:
        return tokenizer, _load_language_model(model_path, kwargs), None, raw.get("max_sequence_length", 2048)
    tower = locate_tower(kwargs.pop("vision_tower", None) or raw["mm_vision_tower"], model_path)
    cls, config = _classify(raw, tower)
    lora = _find(model_path, "adapter_config.json") is not None
    if lora and not model_base:
        raise InputError(f"{model_path!r} is a LoRA; give the model it belongs to as model_base")
    model, missing, unexpected = _from_pretrained(cls, model_base or model_path, config=config, **kwargs)
    if model_base:
        missing -= _load_additions(model, model_path)
    missing -= _load_tower(model, missing, raw.get("unfreeze_mm_vision_tower", False))
    _refuse_incomplete(missing, unexpected, model_path)
    if lora:
        model = _merge_lora(model, model_path)
    model.get_vision_tower().is_loaded = True
    _add_image_tokens(tokenizer, model, raw)
    _tidy_generation_config(model, tokenizer)
    model.method = method
    return tokenizer, model.eval(), model.get_vision_tower().image_processor, raw.get("max_sequence_length", 2048)


def read_config(model_path: str, override: str | None = None) -> dict[str, Any]:
    """Return a checkpoint's config.json as plain data, with the keys of `override` (a JSON file or folder) on top.

    Raises:
        InputError: there is no readable config.
    """
    remedy = "give the folder of a LLaVA checkpoint, or its hub id"
    if not Path(model_path).is_dir() and not HUB_ID.fullmatch(model_path):
        raise InputError(f"there is no folder {model_path!r}; {remedy}")
    try:
        file = _find(model_path, "config.json")
    except OSError as error:
        raise InputError(f"cannot fetch {model_path!r} from the hub; {remedy} ({error})") from error
    if file is None:
        raise InputError(f"no config.json at {model_path!r}; {remedy}")
    config = _read_object(file)
    if override:
        file = Path(override)
        config |= _read_object(file / "config.json" if file.is_dir() else file)
    return config


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{str(file)!r} is no readable JSON ({error})") from error
    if not isinstance(found, dict) or not found:
        raise InputError(f"{str(file)!r} must hold a JSON object with a checkpoint's config")
    return found


def load_tokenizer(path: str) -> Any:
    """Load a checkpoint's tokenizer.

    LLaVA's is Llama's; `AutoTokenizer` would, by the config's `model_type: llava`, choose a class that leaves out the
    leading word mark and so produces other ids than the model was trained on.
    """
    from transformers import AutoTokenizer, LlamaTokenizer

    settings = _find(path, "tokenizer_config.json")
    try:
        named = _read_object(settings).get("tokenizer_class") if settings else None
        cls = LlamaTokenizer if (named or "Llama").startswith("Llama") else AutoTokenizer
        tokenizer = cls.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"no readable tokenizer at {path!r} ({error})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _find(path: str, name: str) -> Path | None:
    """Return a file of a folder or hub repository, or None if it has none of that name."""
    if Path(path).is_dir():
        return file if (file := Path(path) / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(path, name))
    except EntryNotFoundError:
        return None


def _placement(
    kwargs: dict[str, Any], load_8bit: bool, load_4bit: bool, device_map: Any, device: str, use_flash_attn: bool
) -> dict[str, Any]:
    """Settle dtype, device, attention and quantisation; what is left of `kwargs` goes to transformers as it is."""
    kwargs = dict(kwargs)
    gpu = torch.cuda.is_available() and device.startswith("cuda") and device_map != "cpu"
    dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or (torch.float16 if gpu else torch.float32)
    kwargs["dtype"] = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if device != "cuda":
        device_map = {"": device}
    elif device_map == "auto" and not gpu:
        device_map = {"": "cpu"}
    if use_flash_attn:
        _need("flash_attn", "use_flash_attn", "pip install flash-attn")
        kwargs["attn_implementation"] = "flash_attention_2"
    if load_8bit or load_4bit:
        _need("bitsandbytes", "load_8bit and load_4bit", "pip install 'globalcom2[quant]'")
        from transformers import BitsAndBytesConfig

        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=load_8bit,
            load_in_4bit=load_4bit and not load_8bit,
            bnb_4bit_compute_dtype=kwargs["dtype"],
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=["vision_tower", "mm_projector", "lm_head"],
        )
    return {"attn_implementation": "sdpa", "device_map": device_map, **kwargs}


def _need(package: str, what: str, remedy: str) -> None:
    if find_spec(package) is None:
        raise InputError(f"{what} needs the package {package}, which is not installed; {remedy}")


def _classify(raw: dict[str, Any], tower: str) -> tuple[type, Any]:
    """Return the model class of a config and the config as that class wants it."""
    from llava.model import LlavaConfig, LlavaLlamaForCausalLM, LlavaMistralConfig, LlavaMistralForCausalLM

    kind = f"{raw.get('model_type', '')} {' '.join(raw.get('architectures') or ())}".lower()
    if "mpt" in kind or "qwen" in kind:
        raise InputError(f"config.json describes {kind.strip()!r}; supported are LLaVA on Llama, Vicuna and Mistral")
    mistral = "mistral" in kind
    config_class = LlavaMistralConfig if mistral else LlavaConfig
    left_out = ("model_type", "architectures", "torch_dtype", "dtype", "max_length", "transformers_version")
    known = {key: value for key, value in raw.items() if key not in left_out and value is not None}
    known |= {"mm_vision_tower": tower, "mm_vision_config": raw.get("mm_vision_config") or vision_config(tower)}
    try:
        config = config_class(**known)
    except (TypeError, ValueError) as error:
        raise InputError(f"config.json cannot be used: {error}") from error
    return (LlavaMistralForCausalLM if mistral else LlavaLlamaForCausalLM), config


def _from_pretrained(cls: Any, path: str, **kwargs: Any) -> tuple[Any, set[str], set[str]]:
    """Load weights; returns the model and the names of missing and of unexpected tensors."""
    try:
        with _quiet():
            model, info = cls.from_pretrained(path, output_loading_info=True, **kwargs)
    except (UnpicklingError, OSError, RuntimeError) as error:
        raise InputError(f"cannot load the weights at {path!r}: {error}") from error
    unexpected = {name for name in info["unexpected_keys"] if not name.endswith(IGNORED)}
    return model, set(info["missing_keys"]), unexpected


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting what `_refuse_incomplete` decides, and its bars out of log files."""
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


def _load_language_model(path: str, kwargs: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    model, missing, unexpected = _from_pretrained(AutoModelForCausalLM, path, **kwargs)
    _refuse_incomplete(missing, unexpected, path)
    return model.eval()


def _load_additions(model: nn.Module, path: str) -> set[str]:
    """Load what a LoRA or projector folder adds to its base; returns the names of the tensors it filled."""
    file = _find(path, "non_lora_trainables.bin") or _find(path, "mm_projector.bin")
    if file is None:
        raise InputError(
            f"{path!r} has neither non_lora_trainables.bin nor mm_projector.bin, so model_base is of no use"
        )
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError) as error:
        raise InputError(f"cannot load {str(file)!r}: {error}") from error
    # PEFT puts "base_model.model." before the names, and the trainer's own wrapper once doubled "model.".
    renamed = {name.removeprefix("base_model.").replace("model.model.", "model.", 1): t for name, t in found.items()}
    own = model.state_dict()
    fitting = {name: _tower_name(name) for name in renamed}
    unknown = [name for name, target in fitting.items() if target not in own]
    if unknown:
        raise InputError(f"{str(file)!r} has tensors the model has no place for: {_some(unknown)}")
    model.load_state_dict({fitting[name]: tensor for name, tensor in renamed.items()}, strict=False)
    return set(fitting.values())


def _tower_name(name: str) -> str:
    """Translate a CLIP tensor's name from checkpoints to transformers' current module names."""
    return name.replace("vision_tower.vision_tower.vision_model.", "vision_tower.vision_tower.")


def _load_tower(model: Any, missing: set[str], tuned: bool) -> set[str]:
    """Fill a tower the checkpoint does not carry from its CLIP model; returns the names filled.

    A tower that was tuned must come with the checkpoint: the original weights in its place are silently wrong.
    """
    tower = {name for name in model.state_dict() if name.startswith(TOWER)}
    if tuned or not tower <= missing:
        return set()
    model.get_vision_tower().load_model()
    return tower


def _refuse_incomplete(missing: set[str], unexpected: set[str], path: str) -> None:
    """Refuse a model any part of which would stay random or unread."""
    complaints = [
        f"{what} {_some(sorted(names))}" for what, names in (("missing", missing), ("unexpected", unexpected)) if names
    ]
    if complaints:
        raise InputError(f"the weights at {path!r} do not fit the model: {'; '.join(complaints)}")


def _some(names: list[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _merge_lora(model: Any, path: str) -> Any:
    """Merge a LoRA into the weights."""
    _need("peft", "a LoRA checkpoint", "pip install 'globalcom2[lora]'")
    from peft import PeftModel

    return PeftModel.from_pretrained(model, path).merge_and_unload()


def _add_image_tokens(tokenizer: Any, model: Any, raw: dict[str, Any]) -> None:
    """Add the special tokens of early checkpoints; the vocabulary only ever grows."""
    if raw.get("mm_use_im_patch_token", True):
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if raw.get("mm_use_im_start_end", False):
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))


def _tidy_generation_config(model: Any, tokenizer: Any) -> None:
    """Drop what hub configs carry over from pre-training: it warns at every call and breaks saving."""
    settings = model.generation_config
    settings.max_length = None
    if not settings.do_sample:
        settings.temperature = settings.top_p = settings.top_k = None
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
