"""What every method asks of numbers: how many, which ones, how to share a total out; and how to say and move them."""

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor


def budget(ratio: float, n: int) -> int:
    """Return ⌊ratio · n⌋, computed on the float product as the released codes do."""
    return int(ratio * n)


def percent_above(share: float) -> str:
    """Write a share as the least percentage, to two places, that is not below it: what there is to ask for."""
    return f"{ceil(share * 10_000 - 1e-9) / 100:.2f}%"


def on_device(
    numbers: Sequence[float] | Sequence[Sequence[float]],
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Put numbers that follow from sizes alone on a device; unlike `torch.tensor`, without waiting for what it does."""
    return torch.tensor(numbers, dtype=dtype, device="cpu").to(device, non_blocking=True)


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


def unit(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Scale scores `[..., N]` to unit L2 norm over the valid entries (None: all); the others become 0."""
    return torch.nn.functional.normalize(scores if valid is None else scores * valid, dim=-1)


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
    if not len(weights):
        return weights
    # The water level is the part of its capacity that weight 1 gets: Σ capacity · min(weight · level, 1) = total. To
    # count any set as full raises that sum, hence lowers the level found; the set that is full finds it. It holds the
    # heaviest, so that the sets of those heavier than each in turn are enough.
    full = (weights > weights[:, None]) * capacity  # [n, n]
    rest, room = total - full.sum(1), (capacity - full) @ weights  # tiny weights are never lost beside a full one
    level = (rest / room.clamp_min(1e-300)).amax()
    return (weights * level).clamp_max(1) * capacity


def apportion(shares: Tensor, total: int) -> Tensor:
    """Round shares `[n]` to integers that sum to `total`, by largest remainder (ties: lower index first).

    The shares must sum to `total` but for float noise, as those of `fill_shares` do. Each comes out less than one away
    from its share, a full one as it is. Where shares ÷ capacity are in some order, so are the counts of equal
    capacity, while between unequal capacities counts ÷ capacity may be off that order by the rounding.
    """
    floors = shares.long()
    rank = top_indices(shares.frac()).argsort()
    return floors + (rank < total - floors.sum())
