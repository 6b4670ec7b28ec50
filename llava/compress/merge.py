"""Self-preserving merging, as the FiCoCo family does it (arXiv 2411.17686): targets, weights and the weighted mean."""

from fractions import Fraction
from math import ceil, floor

import torch
from torch import Tensor

from llava.compress.stages import Product


def n_targets(n: int, epsilon: Fraction | float, strict: bool = False) -> int:
    """Return how many of n tie-free values reach their own linearly interpolated ε-quantile.

    It is the same for every row of n candidates, so that no quantile has to be computed.

    Args:
        n: candidates of one source.
        epsilon: the quantile, in [0, 1]; a float is taken as the decimal it prints as.
        strict: count values above the quantile only, not those on it; the result may then be 0.
    """
    if n < 1:
        return 0
    place = Fraction(str(epsilon)) * (n - 1)
    return n - 1 - floor(place) if strict else n - ceil(place)


def target_weights(scores: Tensor, k: int, kind: str) -> tuple[Tensor, Tensor]:
    """Choose every source's k best targets and share the source out among them.

    Args:
        scores: `[..., S, T]`, sources × targets.
        k: targets per source, at most T.
        kind: `softmax` over the chosen scores, or their `ratio` to their sum (for scores that are never negative).

    Returns:
        Columns of the targets, best first, equal scores by lower column, and weights; both `[..., S, K]`, the weights
        in float32 and of sum 1.
    """
    best, ids = scores.float().sort(dim=-1, descending=True, stable=True)
    best, ids = best[..., :k], ids[..., :k]
    if kind == "softmax":
        return ids, best.softmax(-1)
    if kind == "ratio":
        return ids, best / best.sum(-1, keepdim=True).clamp_min(torch.finfo(best.dtype).tiny)
    raise ValueError(f"kind must be softmax or ratio, got {kind!r}")


def merge_into(x: Tensor, sources: Tensor, targets: Tensor, weights: Tensor, normalise: bool = True) -> Tensor:
    """Add tokens to others: x_j becomes (x_j + Σ α_ij x_i) / (1 + Σ α_ij) for every target j.

    What is added is what the sources were before; the sources stand where they stood.

    Args:
        x: `[..., N, C]`.
        sources: `[..., S]`, indices i into N.
        targets: `[..., S, K]`, indices j into N, different ones for a source.
        weights: `[..., S, K]`, α.
        normalise: divide; without, tokens that take others in grow.

    Returns:
        `[..., N, C]` in x's dtype, computed in float32.
    """
    moved = x.gather(-2, sources[..., None].expand(*sources.shape, x.shape[-1])).float()  # [..., S, C]
    share = moved.new_zeros(*sources.shape, x.shape[-2]).scatter_add(-1, targets, weights.float())  # [..., S, N]
    merged = x.float() + share.mT @ moved
    if normalise:
        merged = merged / (1 + share.sum(-2))[..., None]
    return merged.to(x.dtype)


def merge_product(tokens: int, sources: int, width: int, times: int = 1) -> Product:
    """Return the matrix product of `merge_into` for N tokens `[N, C]`, S of them sources, so many times."""
    return Product("merge", tokens, sources, width, times)
