"""The arrangement that first codes of the field share, GlobalCom²'s release among them: what ours is measured against.

All layers of the tower run with their attention written out, and every layer's map and output are kept; all patches are
projected; kept tokens are copied one by one into a dense buffer as wide as the language model, which is permuted, gets
its newlines and is gathered by a mask. What comes out is what the profile `released` selects; only the way is naive.
"""

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from llava.anyres import AnyResGrid, best_resolution, parse_pinpoints
from llava.compress.allocation import crop_ratios
from llava.compress.tokens import budget
from llava.mm_utils import divide_to_patches, resize_and_pad_image
from llava.model.llava_arch import interpolate_and_split_cls_attn_scores


def encode(tower: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Run all layers of a CLIP tower, attention written out, keeping every output and every head-mean map.

    Args:
        tower: a `CLIPVisionTower`.
        pixels: `[V, 3, S, S]`.

    Returns:
        The patches' features `[V, N, C]` and their [CLS] scores `[V, N]`, logits of the last layer.
    """
    clip = tower.vision_tower
    outputs = [clip.pre_layrnorm(clip.embeddings(pixels.to(tower.device, tower.dtype)))]
    maps = []
    for layer in clip.encoder.layers:
        hidden, attention = outputs[-1], layer.self_attn
        normed = layer.layer_norm1(hidden)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (p(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for p in projections)
        logits = q @ k.mT * attention.scale  # [V, H, 1 + N, 1 + N]
        maps.append(logits.mean(1))
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        hidden = hidden + attention.out_proj(mixed)
        outputs.append(hidden + layer.mlp(layer.layer_norm2(hidden)))
    return outputs[tower.depth][:, 1:], maps[-1][:, 0, 1:]


def compress(
    features: Tensor, scores: Tensor, grid: AnyResGrid, ratio: float, newline: Tensor, temperature: float = 10.0
) -> tuple[Tensor, list[list[int]]]:
    """Select tokens of projected views, token by token.

    Args:
        features: `[V, N, D]`, projected.
        scores: `[V, N]`, [CLS] scores.
        grid: the image's geometry, with crops.
        ratio: R.
        newline: `[D]`.
        temperature: τ.

    Returns:
        The sequence `[T, D]`, and the patches kept of every view: the thumbnail's by score, the crops' ascending.
    """
    (cols, rows), side, n = grid.crops or (0, 0), grid.side, grid.patches_per_view
    best = scores[0].argsort(descending=True)[: budget(ratio, n)]
    kept = [best.tolist()]
    ratios = _ratios(scores[0], cols, rows, ratio, temperature)
    left, top, right, bottom = grid.box
    shapes = [(x1 - x0, y1 - y0) for x0, y0, x1, y1 in grid.crop_boxes]
    views = interpolate_and_split_cls_attn_scores(scores[0], right - left, bottom - top, cols, rows, shapes)
    valid = grid.valid(device=scores.device)
    dense = features.new_zeros((grid.n_crops, n, features.shape[-1]))
    taken = torch.zeros(grid.n_crops, n, dtype=torch.bool, device=features.device)
    for crop, share in enumerate(ratios):
        inside = valid[crop + 1].nonzero().flatten()
        own, tokens = scores[crop + 1][inside], features[crop + 1][inside]
        worth = F.normalize(views[crop], dim=-1) + F.normalize(own, dim=-1)
        order = worth.topk(int(len(inside) * min(share, 1.0))).indices.sort().values
        for index in order:
            if index < len(inside):
                dense[crop, int(index)] = tokens[int(index)]
        taken[crop, order] = True
        kept.append(inside[order].tolist())
    canvas = dense.view(rows, cols, side, side, -1).permute(4, 0, 2, 1, 3).contiguous().flatten(1, 2).flatten(2)
    mask = taken.view(rows, cols, side, side).transpose(1, 2).reshape(rows * side, cols * side)
    canvas = torch.cat((canvas, newline[:, None, None].expand(-1, rows * side, 1)), -1)
    mask = F.pad(mask, (0, 1), value=True)
    crops = canvas.flatten(1).T[mask.flatten()].half().to(features.dtype)
    return torch.cat((features[0][best], crops)), kept


def _ratios(scores: Tensor, cols: int, rows: int, ratio: float, temperature: float) -> list[float]:
    """The crops' retention ratios, every score of the thumbnail read from the device."""
    side = int(len(scores) ** 0.5)
    sums = torch.zeros(rows * cols, dtype=torch.float64)
    for y in range(side):
        for x in range(side):
            row, col = min(y // (side // rows), rows - 1), min(x // (side // cols), cols - 1)
            sums[row * cols + col] += scores[y * side + x].item()
    found: list[float] = crop_ratios(sums, ratio, temperature).tolist()
    return found


def preprocess(image: Image.Image, processor: Any, pinpoints: Any) -> Tensor:
    """Send every view of a picture through CLIP's processor on its own: `[V, 3, S, S]`."""
    tile = processor.crop_size["height"]
    canvas = resize_and_pad_image(image, best_resolution(image.size, parse_pinpoints(pinpoints)))
    views = [image.resize((tile, tile)), *divide_to_patches(canvas, tile)]
    return torch.cat([processor.preprocess(view, return_tensors="pt")["pixel_values"] for view in views])
