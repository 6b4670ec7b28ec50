"""Load any published LLaVA-1.5 / LLaVA-NeXT checkpoint: what it is, is read from its config, never from its name."""

from pathlib import Path
from typing import Any

import torch

from llava.anyres import parse_pinpoints
from llava.compress import get
from llava.compress.base import Compressor
from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    InputError,
)
from llava.model.files import REMEDY, find_file, read_object
from llava.model.multimodal_encoder.builder import locate_tower, vision_config
from llava.model.views import LAYOUTS
from llava.model.weights import additions_file, load_additions, load_model, load_tower, merge_lora, need, refuse

VERY_LONG = 10**9
COMPRESSION = ("method", "retention_ratio", "profile")
LLAMA, MISTRAL = "LlavaLlamaForCausalLM", "LlavaMistralForCausalLM"
SUPPORTED = {"llava": LLAMA, "llava_llama": LLAMA, "llava_mistral": MISTRAL}


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
    method = choose_method(raw, *(kwargs.pop(key, None) for key in COMPRESSION))
    kwargs = _placement(kwargs, load_8bit, load_4bit, device_map, device, use_flash_attn)
    context_len = raw.get("max_sequence_length", 2048)
    if not model_base and _is_addition(model_path):
        raise InputError(f"{model_path!r} is a LoRA or projector; give the model it belongs to as model_base")
    tokenizer = load_tokenizer(model_base or model_path)
    if not raw.get("mm_vision_tower"):
        return tokenizer, _load_language_model(model_path, raw, kwargs), None, context_len
    tower = locate_tower(kwargs.pop("vision_tower", None) or raw["mm_vision_tower"], model_path)
    cls, config = _classify(raw, tower)
    model, missing, unexpected = load_model(cls, model_base or model_path, config=config, **kwargs)
    if model_base:
        missing -= load_additions(model, model_path)
    missing -= load_tower(model, missing, raw.get("unfreeze_mm_vision_tower", False))
    refuse({"missing": missing, "unexpected": unexpected}, model_path)
    if model_base and find_file(model_path, "adapter_config.json"):
        model = merge_lora(model, model_path)
    model.get_vision_tower().is_loaded = True
    _add_image_tokens(tokenizer, model, raw)
    _tidy_generation_config(model, tokenizer)
    model.method = method
    return tokenizer, model.eval(), model.get_vision_tower().image_processor, context_len


def read_config(model_path: str, override: str | None = None) -> dict[str, Any]:
    """Return a checkpoint's config.json as plain data, with the keys of `override` (a JSON file or folder) on top.

    Raises:
        InputError: there is no readable config.
    """
    file = find_file(model_path, "config.json")
    if file is None:
        raise InputError(f"no config.json at {model_path!r}; {REMEDY}")
    config = read_object(file)
    if override:
        file = Path(override)
        config |= read_object(file / "config.json" if file.is_dir() else file)
    return config


def choose_method(
    config: dict[str, Any], method: str | None = None, ratio: Any = None, profile: str | None = None
) -> Compressor:
    """Return the compression method: as given, else as the checkpoint's config says, else GlobalCom².

    Args:
        config: of `read_config`; its keys `method`, `retention_ratio` and `profile` are read and taken out.
        method: name or call syntax, see `llava.compress.get`.
        ratio: retention ratio.
        profile: which reading of the method runs.

    Raises:
        InputError: unknown method or profile, or a ratio that is none.
    """
    own = {key: config.pop(key, None) for key in COMPRESSION}
    if method is not None and get(method).fixed:  # what is asked for here goes before the config's ratio
        own["retention_ratio"] = None
    given = (method, ratio, profile)
    method, ratio, profile = (b if a is None else a for a, b in zip(given, own.values(), strict=True))
    return get(method or "globalcom2", retention_ratio=ratio, profile=profile)


def load_tokenizer(path: str) -> Any:
    """Load a checkpoint's tokenizer.

    LLaVA's is Llama's; `AutoTokenizer` would, by the config's `model_type: llava`, choose a class that leaves out the
    leading word mark and so produces other ids than the model was trained on.

    Raises:
        InputError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer, LlamaTokenizer

    settings = find_file(path, "tokenizer_config.json")
    options = read_object(settings) if settings else {}
    # Without settings transformers would leave out the begin-of-sequence id that every LLaVA was trained with.
    defaults = {} if "add_bos_token" in options else {"add_bos_token": True}
    cls = LlamaTokenizer if (options.get("tokenizer_class") or "Llama").startswith("Llama") else AutoTokenizer
    try:
        tokenizer = cls.from_pretrained(path, **defaults)
    except Exception as error:  # whatever the parsers of a damaged file raise, which differs between their versions
        raise InputError(f"no readable tokenizer at {path!r} ({type(error).__name__} {error})") from error
    # Lengths are checked with the images in; the tokenizer's own warning knows nothing of them.
    tokenizer.model_max_length = VERY_LONG
    # Where its files are missing or empty, LlamaTokenizer makes do with its three special tokens.
    if len(tokenizer) <= 3:
        raise InputError(f"no tokenizer.model or tokenizer.json with a vocabulary at {path!r}; {REMEDY}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _is_addition(path: str) -> bool:
    """Tell whether a folder holds a LoRA or projector and no model."""
    models = ("model.safetensors", "pytorch_model.bin")
    if any(find_file(path, name) or find_file(path, f"{name}.index.json") for name in models):
        return False
    return find_file(path, "adapter_config.json") is not None or additions_file(path) is not None


def _placement(
    kwargs: dict[str, Any], load_8bit: bool, load_4bit: bool, device_map: Any, device: str, use_flash_attn: bool
) -> dict[str, Any]:
    """Settle dtype, device, attention and quantisation; what is left of `kwargs` goes to transformers as it is."""
    kwargs = dict(kwargs)
    if device != "cuda":
        device_map = {"": device}
    elif device_map == "auto" and not torch.cuda.is_available():
        device_map = {"": "cpu"}
    places = device_map.values() if isinstance(device_map, dict) else [device_map or "cpu"]
    gpu = torch.cuda.is_available() and any(str(place) != "cpu" for place in places)
    dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or (torch.float16 if gpu else torch.float32)
    kwargs["dtype"] = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(kwargs["dtype"], torch.dtype):
        raise InputError(f"unknown dtype {dtype!r}; choose float16, bfloat16 or float32")
    if use_flash_attn:
        need("flash_attn", "use_flash_attn", "pip install flash-attn")
        kwargs["attn_implementation"] = "flash_attention_2"
    if load_8bit or load_4bit:
        need("bitsandbytes", "load_8bit and load_4bit", "pip install 'globalcom2[quant]'")
        kwargs["quantization_config"] = _quantization(kwargs["dtype"], load_8bit)
    return {"attn_implementation": "sdpa", "device_map": device_map, **kwargs}


def _quantization(dtype: torch.dtype, eight_bits: bool) -> Any:
    """Return bitsandbytes' settings; tower, projector and head keep their precision."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_8bit=eight_bits,
        load_in_4bit=not eight_bits,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["vision_tower", "mm_projector", "lm_head"],
    )


def _classify(raw: dict[str, Any], tower: str) -> tuple[type, Any]:
    """Return the model class of a config and the config as that class wants it."""
    from huggingface_hub.errors import StrictDataclassError

    from llava import model as models

    kind, (architecture, *_) = raw.get("model_type"), raw.get("architectures") or [None]
    name = architecture if architecture in SUPPORTED.values() else SUPPORTED.get(str(kind))
    if name is None or (architecture and architecture != name):
        raise InputError(f"config.json describes {architecture or kind!r}; supported are {LLAMA} and {MISTRAL}")
    cls = getattr(models, name)
    left_out = ("model_type", "architectures", "torch_dtype", "dtype", "max_length", "transformers_version")
    known = {key: value for key, value in raw.items() if key not in left_out}
    known |= {"mm_vision_tower": tower, "mm_vision_config": raw.get("mm_vision_config") or vision_config(tower)}
    try:
        config = cls.config_class(**known)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise InputError(f"config.json cannot be used: {error}") from error
    _check_vision(config)
    return cls, config


def _check_vision(config: Any) -> None:
    """Refuse vision settings that would only fail, or mean something else, once an image comes."""
    layers = config.mm_vision_config.get("num_hidden_layers", 12)
    allowed: dict[str, Any] = {
        "mm_patch_merge_type": tuple(LAYOUTS),
        "image_aspect_ratio": ("square", "pad", "anyres"),
        "mm_vision_select_layer": range(-layers, layers + 1),
    }
    for key, values in allowed.items():
        if getattr(config, key) not in values:
            said = f"{values[0]} to {values[-1]}" if isinstance(values, range) else ", ".join(values)
            raise InputError(f"config.json's {key} must be {said}, got {getattr(config, key)!r}")
    if config.image_aspect_ratio == "anyres":
        parse_pinpoints(config.image_grid_pinpoints)


def _load_language_model(path: str, raw: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """Load a checkpoint without vision."""
    from transformers import AutoModelForCausalLM

    if "vision_config" in raw:
        raise InputError(
            f"{path!r} is in transformers' own format; give the original checkpoint, as liuhaotian/llava-v1.6-vicuna-7b"
        )
    model, missing, unexpected = load_model(AutoModelForCausalLM, path, **kwargs)
    refuse({"missing": missing, "unexpected": unexpected}, path)
    return model.eval()


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
    if not settings.do_sample:
        settings.temperature = settings.top_p = settings.top_k = None
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
