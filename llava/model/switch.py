"""The parts of a model that callers set or share: the switch `model.method`, and layers that threads take turns at."""

from collections.abc import Callable
from typing import Any

import torch

from llava.compress import get
from llava.compress.attach import exclusive
from llava.compress.base import Compressor
from llava.constants import InputError

_RATIOS = "retention_ratio ratio keep_ratio keep_rate retain_ratio compression_ratio reduction_ratio pruning_ratio"
_METHODS = "compressor compression compress compression_method compress_method method_name token_compression"
LOOKALIKES = {
    **dict.fromkeys(_RATIOS.split(), "retention_ratio"),
    **{name: name for name in ("profile", "temperature", "alpha", "allocation", "criterion")},
    **dict.fromkeys(_METHODS.split(), ""),
}
"""Attributes that one may take for the switch -> the field of a method that is meant; none where it is a method."""


class _Lookalike:
    """An attribute that nobody would read: it is not there, and setting it is refused."""

    def __init__(self, name: str, remedy: Callable[[Any, Any], str]) -> None:
        self.name, self.remedy = name, remedy

    def __get__(self, instance: Any, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__!r} object has no attribute {self.name!r}")

    def __set__(self, instance: Any, value: Any) -> None:
        raise InputError(f"setting {self.name} on a model changes nothing; {self.remedy(instance, value)}")


def _on_the_model(field: str) -> Callable[[Any, Any], str]:
    """Say what to do instead of setting a lookalike on the model."""

    def remedy(model: Any, value: Any) -> str:
        if not field:
            return f"write model.method = {str(value)!r:.80}"
        method = model.method.name if model.method.has_ratio and hasattr(model.method, field) else "globalcom2"
        return f'write model.method = "{method}({field}={value!r:.80})"'

    return remedy


def _on_its_inside(model: Any, value: Any) -> str:
    """Say what to do instead of setting the switch, or a lookalike, on the inner model."""
    return "the switch is the whole model's: model.method = …, not model.get_model().…"


class Parts:
    """What a LLaVA is made of: a language model with a tower inside, and a compression method."""

    model: Any
    config: Any
    dtype: torch.dtype
    _method: Compressor

    def get_model(self) -> Any:
        """Return the inner model, which has no language-model head."""
        return self.model

    def get_vision_tower(self) -> Any:
        """Return the CLIP tower."""
        return self.get_model().get_vision_tower()

    @property
    def method(self) -> Compressor:
        """The compression method; assign another, or its name or call: `model.method = "uniform"`.

        A call works with the one it began with, whoever changes it meanwhile.
        """
        return self._method

    @method.setter
    def method(self, value: Compressor | str) -> None:
        self._method = as_method(value)


class LanguageLayers:
    """The language model inside a LLaVA: its layers are used by one thread at a time."""

    layers: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layers; arguments are those of transformers' model."""
        with exclusive(self.layers):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


# Descriptors and no `__setattr__`, which every other attribute would have to go through.
for _name, _field in LOOKALIKES.items():
    setattr(Parts, _name, _Lookalike(_name, _on_the_model(_field)))
for _name in ("method", *LOOKALIKES):
    setattr(LanguageLayers, _name, _Lookalike(_name, _on_its_inside))


def as_method(value: Compressor | str) -> Compressor:
    """Return a method as it is, or the one of a name or call, as `llava.compress.get` does.

    Raises:
        InputError: it is neither, or there is no such method, field or value.
    """
    if isinstance(value, str):
        return get(value)
    if isinstance(value, type) or not hasattr(value, "select_all"):
        raise InputError(
            f"method must be a name, a call like 'uniform(retention_ratio=0.5)' or what llava.compress.get returns, "
            f"got {value!r:.80}; 'none' compresses nothing"
        )
    return value
