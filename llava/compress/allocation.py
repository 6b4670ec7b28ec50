"""What GlobalCom² (arXiv 2501.05179) reads off the thumbnail: how its budget is shared over the crops (eq. 2 to 5, and
the variants of Table III), and its view of the crops' patches."""

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.compress.tokens import top_indices

ALLOCATIONS = ("softmax_sum", "softmax_max", "topk_count", "uniform")


def _regions(scores: Tensor, cols: int, rows: int) -> Tensor:
    """Bool `[n, N]`: the thumbnail patch lies in the region of the crop. What does not divide goes to the last."""
    side = isqrt(scores.numel())
    along = torch.arange(side, device=scores.device)
    col = (along // max(1, side // cols)).clamp_max(cols - 1)
    row = (along // max(1, side // rows)).clamp_max(rows - 1)
    region = (row[:, None] * cols + col).flatten()  # [N]
    return region == torch.arange(cols * rows, device=scores.device)[:, None]


def crop_importance(
    scores: Tensor, cols: int, rows: int, allocation: str = "softmax_sum", kept: int | None = None
) -> Tensor:
    """Say what every crop's region of the thumbnail is worth; as printed (eq. 2), the sum of its scores.

    Args:
        scores: `[N]`, the thumbnail's [CLS] scores.
        cols: crops across.
        rows: crops down.
        allocation: `softmax_sum` adds a region's scores, `softmax_max` takes the highest, `topk_count` counts those
            among the thumbnail's best, for `uniform` all regions are alike.
        kept: how many are the best (`topk_count` alone).

    Returns:
        `[n]` in float64, row-major.
    """
    side = isqrt(scores.numel())
    if allocation == "topk_count":
        scores = torch.zeros_like(scores).index_fill(0, top_indices(scores)[:kept], 1.0)
    elif allocation == "uniform":
        scores = torch.zeros_like(scores)
    if side % cols == side % rows == 0:  # as with every published checkpoint: the map cut evenly, nothing to mask
        tiles = scores.view(rows, side // rows, cols, side // cols)
        worth = tiles.amax((1, 3)).double() if allocation == "softmax_max" else tiles.sum((1, 3), dtype=torch.float64)
        return worth.flatten()
    member = _regions(scores, cols, rows)
    if allocation == "softmax_max":
        return torch.where(member, scores.double(), -torch.inf).amax(1)
    return (member * scores.double()).sum(1)


def crop_ratios(importance: Tensor, ratio: float, temperature: float, allocation: str = "softmax_sum") -> Tensor:
    """Turn the crops' importance `[n]` into retention ratios `[n]`, not yet clipped (eq. 3-5).

    Where counts are the importance, a crop's part of them stands for σ of eq. 4; equal shares leave every crop at R.
    """
    if allocation == "topk_count":
        share = importance / importance.sum()
    else:
        weight = torch.exp((importance - importance.max()) / temperature)
        share = weight / (weight.sum() + 1e-8)
    return ratio * (1 + share - share.mean())


def crop_weights(importance: Tensor, temperature: float, allocation: str = "softmax_sum") -> Tensor:
    """Turn the crops' importance `[n]` into weights `[n]` to share a total out by, from 1 - 1/n to 2 - 1/n.

    They are `crop_ratios` ÷ R, as only their proportions matter then, without the 1e-8 of eq. 4, which would change
    them by as little; the mean of σ is 1/n.
    """
    share = importance / importance.sum() if allocation == "topk_count" else (importance / temperature).softmax(0)
    return share + (1 - 1 / len(importance))


def interpolate_scores(scores: Tensor, width: int, height: int) -> Tensor:
    """Resize the thumbnail's score map `[N]` bilinearly (half-pixel centres, clamped edges) to `[height, width]`."""
    side = isqrt(scores.numel())
    if not width or not height:  # an image so thin that nothing of it survives unpadding
        return scores.new_zeros(height, width)
    plane = scores.reshape(1, 1, side, side)
    return F.interpolate(plane, size=(height, width), mode="bilinear", align_corners=False)[0, 0]
