"""The three integer questions every method asks: how many, which ones, and how to share a total out."""

import torch
from torch import Tensor


def budget(ratio: float, n: int) -> int:
    """Return ⌊ratio · n⌋, computed on the float product as the released codes do."""
    return int(ratio * n)


def top_indices(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Order candidates by decreasing score, equal scores by lower index, invalid ones last.

    Args:
        scores: `[..., N]`.
        valid: bool `[..., N]`; None: all.

    Returns:
        Indices `[..., N]`; the first k of them are the top k for every k at once.
    """
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    return scores.argsort(dim=-1, descending=True, stable=True)


def unit(scores: Tensor, valid: Tensor) -> Tensor:
    """Scale scores `[..., N]` to unit L2 norm over the valid entries; the others become 0."""
    return torch.nn.functional.normalize(scores * valid, dim=-1)


def fill_shares(weights: Tensor, capacity: Tensor, total: int) -> Tensor:
    """Share `total` out in proportion to `weights · capacity`, no share above its capacity.

    What clipping frees goes to the unclipped in proportion (water-filling), so the shares sum to `total` exactly up
    to rounding, as long as it does not exceed the summed capacity.

    Args:
        weights: positive `[n]`, float64.
        capacity: `[n]`, float64.
        total: an integer at most `capacity.sum()`.

    Returns:
        Shares `[n]`, float64, with 0 ≤ share ≤ capacity.
    """
    level = torch.zeros_like(weights)
    full = torch.zeros_like(weights, dtype=torch.bool)
    for _ in range(len(weights)):  # every pass fills at least one more, so n passes reach the fixed point
        rest = total - (capacity * full).sum()
        level = weights * (rest / (weights * capacity * ~full).sum().clamp_min(1e-300))
        full = full | (level >= 1)
    return torch.where(full, capacity, level * capacity)


def round_shares(shares: Tensor, capacity: Tensor, total: int) -> Tensor:
    """Round shares `[n]` to integers that sum to `total`, by largest remainder (ties: lower index first).

    The shares must come from `fill_shares` with the same capacity and total. Each comes out less than one away from
    its share; where shares ÷ capacity are in some order, so are the counts of equal capacity, while between unequal
    capacities counts ÷ capacity may be off that order by the rounding.
    """
    floors = shares.floor()
    remainder = torch.where(floors < capacity, shares - floors, -1.0)
    rank = top_indices(remainder).argsort()
    return (floors + (rank < total - floors.sum())).long()
