"""LLaVA's model classes, resolved on first use so that the pure parts stay free of transformers."""

from importlib import import_module
from typing import Any

_LAZY = {
    "LlavaConfig": "llava.model.language_model.llava_llama",
    "LlavaLlamaForCausalLM": "llava.model.language_model.llava_llama",
    "LlavaMistralConfig": "llava.model.language_model.llava_mistral",
    "LlavaMistralForCausalLM": "llava.model.language_model.llava_mistral",
}
__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    """Import the module of a model class on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'llava.model' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
