"""A model of given sizes with random weights: what a request costs does not depend on what the weights say."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import CLIPImageProcessorPil

from llava.constants import InputError
from llava.efficiency.shapes import Model
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.miniature import published_config

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def random_model(shape: Model, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> LlavaLlamaForCausalLM:
    """Return a model in evaluation mode.

    Args:
        shape: its sizes; Mistral's run as a Llama with as many heads, which costs the same.
        dtype: of all weights.
        device: they are drawn there.

    Raises:
        InputError: a width is no even multiple of its heads.
    """
    tower, language = shape.tower, shape.language
    for width, heads in ((language.width, language.heads), (tower.width, tower.heads)):
        if width % heads or width // heads % 2:
            raise InputError(f"a width must be an even multiple of its heads, got {width} and {heads}")
    anyres = bool(shape.pinpoints)
    config = published_config("v1.6-vicuna" if anyres else "v1.5") | {
        "hidden_size": language.width,
        "intermediate_size": language.inner,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "head_dim": language.head_width,
        "vocab_size": language.vocabulary,
        "tie_word_embeddings": language.tied,
        "mm_hidden_size": tower.width,
        "mm_projector_type": f"mlp{shape.projector}x_gelu",
        "mm_patch_merge_type": shape.merge,
        "mm_vision_select_layer": tower.select_layer,
        "attn_implementation": "sdpa",
        "mm_vision_config": {
            "hidden_size": tower.width,
            "intermediate_size": tower.inner,
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
            "num_channels": tower.channels,
            "image_size": tower.image_size,
            "patch_size": tower.patch_size,
            "projection_dim": tower.width,
        },
    }
    if anyres:
        config["image_grid_pinpoints"] = [list(pair) for pair in shape.pinpoints]
    config.pop("model_type")
    with _made_as(dtype), torch.device(device):
        return cast(LlavaLlamaForCausalLM, LlavaLlamaForCausalLM(LlavaConfig(**config)).eval())


def image_processor(shape: Model) -> Any:
    """Return CLIP's preprocessing for the sizes of a model's tower."""
    tile = shape.tower.image_size
    return CLIPImageProcessorPil(size={"shortest_edge": tile}, crop_size={"height": tile, "width": tile})


@contextmanager
def _made_as(dtype: torch.dtype) -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)
