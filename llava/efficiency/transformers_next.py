"""transformers' own LLaVA-NeXT around the weights of one of ours, so that both can be compared in one run."""

from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.models.llava_next import LlavaNextImageProcessorPil

from llava.constants import InputError

# How ours are called, and how theirs.
NAMES = {
    "model.vision_tower.vision_tower.": "model.vision_tower.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.image_newline": "model.image_newline",
    "lm_head.": "lm_head.",
    "model.": "model.language_model.",
}
_LANGUAGE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
)


def their_name(name: str) -> str:
    """Return what transformers calls a tensor of ours."""
    prefix = next(prefix for prefix in NAMES if name.startswith(prefix))
    return NAMES[prefix] + name.removeprefix(prefix)


def around(model: Any, placeholder: int, pinpoints: Any = None) -> Any:
    """Return a `LlavaNextForConditionalGeneration` that shares a LLaVA-NeXT's tensors.

    Args:
        model: ours, on Llama.
        placeholder: the id that stands for an image token in its prompts.
        pinpoints: canvases as `(height, width)`; None: the model's own, as converted checkpoints have them.

    Raises:
        InputError: the model is none that transformers' LLaVA-NeXT can be.
    """
    config = model.config
    wanted = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "mm_projector_type": "mlp2x_gelu"}
    for key, value in wanted.items():
        if getattr(config, key) != value:
            raise InputError(f"transformers' LLaVA-NeXT has {key} {value!r}, this model {getattr(config, key)!r}")
    attention = config._attn_implementation or "sdpa"
    theirs = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**config.mm_vision_config),
        text_config=LlamaConfig(**{key: getattr(config, key) for key in _LANGUAGE}),
        image_token_index=placeholder,
        image_grid_pinpoints=pinpoints or config.image_grid_pinpoints,
        vision_feature_layer=config.mm_vision_select_layer,
        vision_feature_select_strategy="default",
        attn_implementation=attention,
    )
    with torch.device("meta"):
        found = LlavaNextForConditionalGeneration(theirs)
    found.load_state_dict({their_name(n): t for n, t in model.state_dict().items()}, strict=True, assign=True)
    buffers = {their_name(name): buffer for name, buffer in model.named_buffers()}
    for name, _ in list(found.named_buffers()):  # rotary frequencies and the like, which no state holds
        path, _, last = name.rpartition(".")
        found.get_submodule(path).register_buffer(last, buffers[name], persistent=False)
    return found.eval()


def processor(tile: int, pinpoints: Any) -> Any:
    """Return the preprocessing of transformers' LLaVA-NeXT for crops of `tile` pixels."""
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": tile}, crop_size={"height": tile, "width": tile}, image_grid_pinpoints=pinpoints
    )
