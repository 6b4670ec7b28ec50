"""The projector from the vision tower's width to the language model's."""

import re
from typing import Any

from torch import nn

from llava.constants import InputError


def build_vision_projector(config: Any, delay_load: bool = False, **kwargs: Any) -> nn.Module:
    """Build the projector that `config.mm_projector_type` names: `linear`, `mlp{N}x_gelu` or `identity`.

    Args:
        config: gives `mm_projector_type`, `mm_hidden_size` and `hidden_size`.
        delay_load: accepted for compatibility; the projector is always built.
        **kwargs: likewise.

    Raises:
        InputError: the type is none of these.
    """
    kind, width, hidden = config.mm_projector_type, config.mm_hidden_size, config.hidden_size
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, hidden)
    depth = re.fullmatch(r"mlp(\d{1,2})x_gelu", kind)
    if not depth:
        raise InputError(f"unknown mm_projector_type {kind!r} in config.json; known: linear, mlp2x_gelu, identity")
    layers: list[nn.Module] = [nn.Linear(width, hidden)]
    for _ in range(int(depth[1]) - 1):
        layers += [nn.GELU(), nn.Linear(hidden, hidden)]
    return nn.Sequential(*layers)
