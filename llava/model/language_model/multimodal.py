"""The config keys that make a language model a LLaVA, with the defaults that published checkpoints leave out."""

from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class MultimodalFields:
    """Mixed into the config of every language model LLaVA is built on."""

    mm_vision_tower: str = "openai/clip-vit-large-patch14-336"
    """Folder or hub id of the CLIP model."""
    mm_vision_config: dict[str, Any] | None = None
    """CLIP's shape; filled in when a checkpoint is loaded, so that a saved model needs no CLIP folder."""
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    mm_projector_type: str = "linear"
    mm_hidden_size: int = 1024
    mm_patch_merge_type: str = "flat"
    image_aspect_ratio: str = "square"
    image_grid_pinpoints: Any = None
    tokenizer_padding_side: str = "right"
