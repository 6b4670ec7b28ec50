"""Attention a method wants to look at, recomputed from the layer's own weights: only the rows asked for.

Fused kernels return no attention, and asking for it (`output_attentions`) would either cost every map of every layer
or, under SDPA in transformers 5, yield nothing. The projections of one row are cheap, so they are done again.
"""

from typing import Any, cast

from torch import Tensor


def cls_logits(layer: Any, hidden: Tensor) -> Tensor:
    """Return the scaled dot products of the [CLS] query with every key, before softmax.

    Args:
        layer: a CLIP encoder layer of transformers.
        hidden: `[V, 1 + N, C]`, the layer's input, [CLS] first.

    Returns:
        `[V, H, 1 + N]` in float32; its softmax over the last dimension is the layer's [CLS] attention row.
    """
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    query = attention.q_proj(normed[:, 0]).unflatten(-1, (attention.num_heads, -1))  # [V, H, C/H]
    key = attention.k_proj(normed).unflatten(-1, (attention.num_heads, -1))  # [V, 1+N, H, C/H]
    products = query.float()[:, :, None] @ key.float().permute(0, 2, 3, 1)  # [V, H, 1, 1+N]
    return cast(Tensor, products.squeeze(2) * attention.scale)


def patch_keys(layer: Any, hidden: Tensor) -> Tensor:
    """Return the keys of the patches, heads concatenated: `[V, N, C]`, from the layer's input `[V, 1 + N, C]`."""
    return cast(Tensor, layer.self_attn.k_proj(layer.layer_norm1(hidden))[:, 1:])
