"""Sizes of models, as everything that costs depends on them: known ones by name, any other from its config.json."""

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from llava.constants import InputError
from llava.model.files import find_file, read_object
from llava.model.multimodal_encoder.builder import KNOWN_TOWERS, locate_tower, vision_config


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A CLIP vision transformer, and how much of it LLaVA runs."""

    width: int
    """C."""
    inner: int
    """Width inside the MLP."""
    layers: int
    heads: int
    image_size: int
    """Side of a view in pixels."""
    patch_size: int
    """Side of a patch in pixels."""
    channels: int = 3
    select_layer: int = -2
    """Whose output the features are, as `mm_vision_select_layer` counts: -1 is the last layer's, 0 the embeddings."""
    element_bytes: int = 2
    """Bytes per weight and activation."""

    @property
    def side(self) -> int:
        """Patches along a view (S)."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of a view (N)."""
        return self.side**2

    @property
    def positions(self) -> int:
        """Tokens of a view inside the tower: its patches and [CLS]."""
        return 1 + self.patches

    @property
    def depth(self) -> int:
        """Layers that must run for the features."""
        return self.select_layer if self.select_layer >= 0 else self.layers + 1 + self.select_layer

    @property
    def parameters(self) -> int:
        """Number of weights, layers that are never run included."""
        width, inner = self.width, self.inner
        embeddings = width + self.channels * self.patch_size**2 * width + self.positions * width
        layer = 4 * (width * width + width) + (2 * width * inner + inner + width) + 4 * width
        return embeddings + self.layers * layer + 4 * width  # norms before the first and after the last layer


@dataclass(frozen=True, kw_only=True)
class Language:
    """A Llama-like language model: gated MLP, RMS norms, rotary positions, no biases."""

    width: int
    """d."""
    inner: int
    """m, width inside the MLP."""
    layers: int
    """L."""
    heads: int
    """h, of the queries."""
    kv_heads: int
    """Heads of keys and values; fewer than `heads` with grouped queries."""
    head_width: int
    vocabulary: int
    """V."""
    tied: bool = False
    """The embedding is the LM head as well."""
    element_bytes: int = 2
    """Bytes per weight, activation and cache entry."""

    @property
    def query_width(self) -> int:
        """Width of all queries together."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Width of all keys, and of all values."""
        return self.kv_heads * self.head_width

    @property
    def kv_bytes_per_token(self) -> int:
        """κ: what one token occupies in the KV cache of all layers, in bytes."""
        return 2 * self.layers * self.kv_width * self.element_bytes

    @property
    def parameters(self) -> int:
        """Number of weights, embedding and LM head included."""
        width = self.width
        layer = 2 * width * (self.query_width + self.kv_width) + 3 * width * self.inner + 2 * width
        return self.layers * layer + width + (1 if self.tied else 2) * self.vocabulary * width


@dataclass(frozen=True, kw_only=True)
class Model:
    """A LLaVA: tower, projector, language model, and what it makes of an image's size."""

    name: str
    tower: Tower
    language: Language
    projector: int = 2
    """Linear layers of the projector, GELU between them."""
    pinpoints: tuple[tuple[int, int], ...] = ()
    """Canvases of AnyRes in pixels; none: an image is a single view."""
    merge: str = "flat"
    """`mm_patch_merge_type`: `spatial_unpad`, `spatial` or `flat`."""
    rule: str = "llava"
    """`llava`: pinpoints are `(width, height)`; `hf`: `(height, width)`."""

    @property
    def projector_parameters(self) -> int:
        """Number of the projector's weights."""
        widths = [self.tower.width] + [self.language.width] * self.projector
        return sum(i * o + o for i, o in pairwise(widths))

    @property
    def parameters(self) -> int:
        """Number of all weights, the newline embedding included."""
        newline = self.language.width if "unpad" in self.merge else 0
        return self.tower.parameters + self.projector_parameters + self.language.parameters + newline

    @property
    def weight_bytes(self) -> int:
        """What all weights occupy, in bytes."""
        other = self.parameters - self.tower.parameters
        return self.tower.parameters * self.tower.element_bytes + other * self.language.element_bytes


CLIP = "openai/clip-vit-large-patch14-336"
# The grids of the released v1.6 checkpoints, `(width, height)`.
_NEXT = {"pinpoints": ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)), "merge": "spatial_unpad"}
_LLAMA = {"7b": (4096, 11008, 32, 32, 32), "13b": (5120, 13824, 40, 40, 40), "mistral-7b": (4096, 14336, 32, 32, 8)}


def _known(name: str, size: str, kind: Mapping[str, Any]) -> Model:
    width, inner, layers, heads, kv_heads = _LLAMA[size]
    language = Language(
        width=width,
        inner=inner,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_width=width // heads,
        vocabulary=32000,
    )
    return Model(name=name, tower=_tower(KNOWN_TOWERS[CLIP], -2, 2, CLIP), language=language, **kind)


# What a key of the language model's config means where it is missing: the defaults of transformers' LlamaConfig and
# MistralConfig, which a config.json written by transformers leaves out.
_DEFAULTS = {
    "llama": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "mistral": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
}


def load(source: str) -> Model:
    """Return a model's sizes.

    Args:
        source: a name of `MODELS`, a checkpoint's folder or config.json (LLaVA's format or transformers'), or a hub id.

    Raises:
        InputError: there is no such model, or its config does not say all its sizes.
    """
    if source in MODELS:
        return MODELS[source]
    file = Path(source)
    if not file.is_file():
        if not file.exists() and "/" not in source:
            raise InputError(f"unknown model {source!r}; give a folder, a config.json, or one of {', '.join(MODELS)}")
        found = find_file(source, "config.json")
        if found is None:
            raise InputError(f"no config.json at {source!r}; give the folder of a checkpoint")
        file = found
    return from_config(read_object(file), source, file.parent)


def from_config(config: Mapping[str, Any], name: str, folder: Path = Path()) -> Model:
    """Return the sizes a config.json speaks of.

    Args:
        config: its content, in LLaVA's format or transformers'.
        name: what the model is called.
        folder: where the config lies, for a tower named relative to it.

    Raises:
        InputError: a size is missing or no positive number, or there is no vision tower.
    """
    if isinstance(config.get("text_config"), dict) and isinstance(config.get("vision_config"), dict):
        return _from_transformers(config, name)
    if not config.get("mm_vision_tower"):
        raise InputError(f"the config of {name!r} names no mm_vision_tower; give a LLaVA checkpoint")
    vision = config.get("mm_vision_config") or vision_config(locate_tower(str(config["mm_vision_tower"]), str(folder)))
    anyres = config.get("image_aspect_ratio") == "anyres"
    element = _element_bytes(config)
    return Model(
        name=name,
        tower=_tower(vision, config.get("mm_vision_select_layer", -2), element, name),
        language=_language(config, element, name),
        projector=_projector(str(config.get("mm_projector_type", "linear"))),
        pinpoints=_pinpoints(config.get("image_grid_pinpoints"), name) if anyres else (),
        merge=str(config.get("mm_patch_merge_type") or "flat") if anyres else "flat",
    )


def _from_transformers(config: Mapping[str, Any], name: str) -> Model:
    text, pinpoints = config["text_config"], config.get("image_grid_pinpoints")
    element = _element_bytes(config)
    return Model(
        name=name,
        tower=_tower(config["vision_config"], config.get("vision_feature_layer", -2), element, name),
        language=_language(_DEFAULTS.get(str(text.get("model_type", "llama")), {}) | text, element, name),
        pinpoints=_pinpoints(pinpoints, name) if pinpoints else (),
        merge="spatial_unpad" if pinpoints else "flat",
        rule="hf",
    )


def _tower(vision: Mapping[str, Any], select_layer: Any, element: int, name: str) -> Tower:
    layers = _size(vision, "num_hidden_layers", name)
    if type(select_layer) is not int or not -layers - 1 <= select_layer <= layers:
        raise InputError(f"the config of {name!r} must select one of {layers} vision layers, got {select_layer}")
    return Tower(
        width=_size(vision, "hidden_size", name),
        inner=_size(vision, "intermediate_size", name),
        layers=layers,
        heads=_size(vision, "num_attention_heads", name),
        image_size=_size(vision, "image_size", name),
        patch_size=_size(vision, "patch_size", name),
        channels=_size(vision, "num_channels", name, 3),
        select_layer=select_layer,
        element_bytes=element,
    )


def _language(config: Mapping[str, Any], element: int, name: str) -> Language:
    width, heads = _size(config, "hidden_size", name), _size(config, "num_attention_heads", name)
    return Language(
        width=width,
        inner=_size(config, "intermediate_size", name),
        layers=_size(config, "num_hidden_layers", name),
        heads=heads,
        kv_heads=_size(config, "num_key_value_heads", name, heads),
        head_width=_size(config, "head_dim", name, width // heads),
        vocabulary=_size(config, "vocab_size", name),
        tied=bool(config.get("tie_word_embeddings", False)),
        element_bytes=element,
    )


def _size(config: Mapping[str, Any], key: str, name: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"the config of {name!r} must give {key} as a positive integer, got {json.dumps(value)}")
    return value


def _element_bytes(config: Mapping[str, Any]) -> int:
    return 4 if config.get("torch_dtype", config.get("dtype")) == "float32" else 2


def _projector(kind: str) -> int:
    depth = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if depth is None and kind not in ("linear", "identity"):
        raise InputError(f"unknown mm_projector_type {kind!r}; known: linear, mlp2x_gelu, identity")
    return int(depth[1]) if depth else int(kind == "linear")


def _pinpoints(given: Any, name: str) -> tuple[tuple[int, int], ...]:
    try:
        pairs = ast.literal_eval(given) if isinstance(given, str) else given
        return tuple((int(across), int(down)) for across, down in pairs)
    except (SyntaxError, TypeError, ValueError) as error:
        raise InputError(f"the config of {name!r} must give image_grid_pinpoints as pairs, got {given!r}") from error


MODELS = {
    model.name: model
    for model in (
        _known("llava-1.5-7b", "7b", {}),
        _known("llava-1.5-13b", "13b", {}),
        _known("llava-next-7b", "7b", _NEXT),
        _known("llava-next-13b", "13b", _NEXT),
        _known("llava-next-mistral-7b", "mistral-7b", _NEXT),
    )
}
"""Sizes of the published checkpoints (their config.json; CLIP's from its model card), Vicuna unless named otherwise."""
