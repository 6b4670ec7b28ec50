"""The recomputed [CLS] row and keys equal what the layer itself computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.compress.attention import cls_logits, patch_keys

HEADS, LAYERS = 4, 5


def clip(attention: str = "eager", gain: float = 3.0) -> Any:
    """A tiny random CLIP whose attention is far from uniform, so that a wrong row or scale shows."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=56,
        patch_size=14,
        attn_implementation=attention,
    )
    model = CLIPVisionModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        fan_in = noise[0].numel() ** 0.5 if noise.ndim > 1 else 2.0
        weight.data = noise * (gain if "q_proj" in name or "k_proj" in name else 1.0) / fan_in
    return model


@pytest.fixture(scope="module")
def eager() -> Any:
    """The reference's inputs of every layer, attention maps, and what `k_proj` returned."""
    model = clip()
    keys: list[Tensor] = []
    for layer in model.encoder.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, output: keys.append(output))
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(pixels, output_hidden_states=True, output_attentions=True)
    return model, out.hidden_states, out.attentions, keys


@pytest.mark.parametrize("layer", [-1, -2, 0, 2])
@torch.no_grad()
def test_softmax_equals_the_eager_row(eager: Any, layer: int) -> None:
    model, hidden, attentions, _ = eager
    row = attentions[layer][:, :, 0]  # [V, H, 1+N]
    logits = cls_logits(model.encoder.layers[layer], hidden[layer % LAYERS])
    assert logits.shape == row.shape == (3, HEADS, 17)
    assert row.max() > 0.3  # else a wrong scale would not show
    assert (logits.softmax(-1) - row).abs().max() <= 1e-5


@pytest.mark.parametrize("layer", [-1, 1])
@torch.no_grad()
def test_logits_are_the_scaled_products(eager: Any, layer: int) -> None:
    # Not only up to a constant per row: the released code averages logits, not probabilities, over heads.
    model, hidden, _, _ = eager
    attention = model.encoder.layers[layer].self_attn
    x = model.encoder.layers[layer].layer_norm1(hidden[layer % LAYERS])
    for head in range(HEADS):
        part = slice(head * 8, head * 8 + 8)
        expected = (attention.q_proj(x)[:, 0, part, None] * attention.k_proj(x)[:, :, part].mT).sum(1) / 8**0.5
        found = cls_logits(model.encoder.layers[layer], hidden[layer % LAYERS])[:, head]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [-1, 0, 3])
@torch.no_grad()
def test_patch_keys_are_what_k_proj_returned(eager: Any, layer: int) -> None:
    model, hidden, _, keys = eager
    found = patch_keys(model.encoder.layers[layer], hidden[layer % LAYERS])
    assert torch.equal(found, keys[layer][:, 1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_close_and_scores_are_float32(eager: Any, dtype: torch.dtype) -> None:
    """Only the projections are rounded; the products are taken in float32."""
    _, hidden, attentions, _ = eager
    layer = clip().to(dtype).encoder.layers[-1]
    logits = cls_logits(layer, hidden[LAYERS - 1].to(dtype))
    assert logits.dtype == torch.float32
    assert patch_keys(layer, hidden[LAYERS - 1].to(dtype)).dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.01
    assert (logits.softmax(-1) - attentions[-1][:, :, 0]).abs().max() <= tolerance


@pytest.mark.parametrize("read", [cls_logits, patch_keys])
@torch.no_grad()
def test_the_input_is_not_changed(eager: Any, read: Callable[[Any, Tensor], Tensor]) -> None:
    model, hidden, _, _ = eager
    before = hidden[1].clone()
    read(model.encoder.layers[1], hidden[1])
    assert torch.equal(hidden[1], before)


@torch.no_grad()
def test_views_do_not_see_each_other(eager: Any) -> None:
    model, hidden, _, _ = eager
    together = cls_logits(model.encoder.layers[-1], hidden[-2])
    alone = torch.cat([cls_logits(model.encoder.layers[-1], view[None]) for view in hidden[-2]])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
