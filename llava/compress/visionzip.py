"""VisionZip (arXiv 2412.04467): dominant tokens stay as they are, the others are merged into a few contextual ones."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.anyres import AnyResGrid
from llava.compress.base import (
    Compressor,
    Extra,
    Layout,
    Plan,
    Selection,
    Taps,
    Views,
    nearest_count,
    uniform_counts,
)
from llava.compress.stages import Product
from llava.compress.tokens import budget, on_device, top_indices


class _Part(NamedTuple):
    """Tokens of one view by kind; together they are its budget."""

    dominant: int
    contextual: int
    cls: int


@dataclass(frozen=True, kw_only=True)
class VisionZip(Compressor):
    """Keep every view's [CLS] token, its dominant patches, and contextual tokens the other patches are merged into.

    Dominant are the patches of highest [CLS] attention in the layer that made the features (probabilities, summed
    over heads). Of the others, evenly spaced ones are targets; each of the rest joins the target whose key, averaged
    over heads, is most like its own (cosine). The published settings are 54 + 10, 108 + 20 and 162 + 30 tokens.

    Differs from the released code in (profile `corrected`): a contextual token is the mean of its patches, where the
    release adds the mean of the joining ones to the target, about twice as long a vector; it stands where its target
    was and counts as that patch, where the release puts those of all crops at the end; padding is neither kept nor
    merged; unpadded rows end in the checkpoint's newline, where the release has one behind single views alone; with
    its [CLS] token, a view keeps its share of ⌊R·N⌋ + ⌊R·Σ n_j⌋, where the release takes one absolute number for every
    view, R·N to the nearest; a view that loses nothing, or keeps a single token, gets no [CLS] token, so that R = 1
    changes nothing; other CLIP models of the process are left alone. `released` shares the last one.
    """

    name = "visionzip"
    paper = "arXiv 2412.04467"
    profiles = ("corrected", "released")
    taps = Taps(cls=(-2,), keys=(-2,), cls_feature=True)

    contextual: float = 5 / 32
    """Share of a view's tokens that are contextual; the authors' settings all have 5 of 32."""

    def __post_init__(self) -> None:
        """Refuse values that cannot mean anything."""
        super().__post_init__()
        self._require("contextual", float, 0, 1)

    def plan(self, grid: AnyResGrid, layout: Layout = Layout()) -> Plan:  # noqa: B008 - frozen
        """Exact. Only patches are counted: `corrected` adds a [CLS] token, `released` the contextual ones as well."""
        kept = sum(self._counts(self._parts(grid, layout)))
        return Plan(ratio=self.ratio, patches=grid.n_patches(layout.unpad), at_least=kept, at_most=kept)

    def select(self, views: Views) -> Selection:
        """Rank every view's patches and merge what is not dominant."""
        released, layout, device = self.profile == "released", views.layout, views.features.device
        parts = self._parts(views.grid, layout)
        valid = torch.ones_like(views.valid) if released else views.valid
        dominant, contextual, _ = on_device(parts, device).T[..., None]  # [V, 1] each
        order = top_indices(views.attention(-2).sum(1), valid)  # [V, N]
        rest = valid & (order.argsort(dim=1) >= dominant)
        target = _targets(rest, contextual)
        ids = top_indices(target.float())[:, : max(part.contextual for part in parts)]  # [V, K], raster
        merged = self._merge(views, rest & ~target, ids, contextual)
        extra, features = _cls_tokens(views, parts), None
        if released:
            extra = _append(extra, merged, views.grid.patches_per_view)
            newline = "none" if views.grid.crops else layout.newline  # a single view goes LLaVA's own way
            layout = replace(layout, unpad=False, newline=newline, placement="raster")
        else:
            features = views.features.scatter(1, _wide(ids, merged), merged.to(views.features.dtype))
            tier = target + 2 * (valid & ~rest).long()
            order = order.gather(1, top_indices(tier.gather(1, order)))
        counts = self._counts(parts)
        count = on_device(counts, device)
        return Selection(order=order, count=count, total=sum(counts), features=features, extra=extra, layout=layout)

    def select_products(self, grid: AnyResGrid, layout: Layout, width: int, heads: int) -> tuple[Product, ...]:
        """Likeness of patches to targets, and the sums of what joins these."""
        n, v, targets = grid.patches_per_view, grid.n_views, max(p.contextual for p in self._parts(grid, layout))
        return (
            Product("likeness", n, width // heads, targets, v),
            Product("contextual", targets, n, width, v),
        )

    def _parts(self, grid: AnyResGrid, layout: Layout) -> list[_Part]:
        """What every view keeps of each kind; follows from sizes."""
        if self.profile == "released":
            budgets = [nearest_count(self.ratio, grid)] * grid.n_views
            cls = [1] * grid.n_views
        else:
            budgets = list(uniform_counts(self.ratio, grid, layout.unpad))
            sizes = (grid.patches_per_view, *grid.crop_patches(layout.unpad))
            cls = [int(1 < k < n) for k, n in zip(budgets, sizes, strict=True)]
        contextual = [min(budget(self.contextual, k), k - own) for k, own in zip(budgets, cls, strict=True)]
        return [_Part(k - own - c, c, own) for k, c, own in zip(budgets, contextual, cls, strict=True)]

    def _counts(self, parts: list[_Part]) -> list[int]:
        """Kept patches per view: contextual tokens are patches where they stand in for their target."""
        return [part.dominant + (part.contextual if self.profile == "corrected" else 0) for part in parts]

    def _merge(self, views: Views, joining: Tensor, ids: Tensor, contextual: Tensor) -> Tensor:
        """Merge patches into their nearest target.

        Args:
            views: the image.
            joining: bool `[V, N]`, the patches to be merged.
            ids: `[V, K]`, the targets; beyond a view's own number anything, which is left as it is.
            contextual: `[V, 1]`, that number.

        Returns:
            `[V, K, C]` in float32.
        """
        features = views.features.float()
        own = features.gather(1, _wide(ids, features))  # [V, K, C]
        if not ids.shape[1]:
            return own
        heads = views.cls_logits[-2].shape[1]
        keys = F.normalize(views.keys[-2].float().unflatten(-1, (heads, -1)).mean(2), dim=-1)  # [V, N, C/H]
        likeness = keys @ keys.gather(1, _wide(ids, keys)).mT  # [V, N, K]
        slot = torch.arange(ids.shape[1], device=ids.device)
        used = slot < contextual  # [V, K]
        nearest = likeness.masked_fill(~used[:, None], -torch.inf).argmax(-1)  # [V, N], the first of equal ones
        member = (nearest[:, None] == slot[:, None]) & used[..., None] & joining[:, None]  # [V, K, N]
        total, size = member.float() @ features, member.sum(-1, keepdim=True)
        return own + total / size.clamp_min(1) if self.profile == "released" else (own + total) / (1 + size)


def _targets(rest: Tensor, contextual: Tensor) -> Tensor:
    """Mark the first `contextual` `[V, 1]` of evenly spaced patches among `rest` `[V, N]`: bool `[V, N]`."""
    step = (rest.sum(1, keepdim=True) // contextual.clamp_min(1)).clamp_min(1)
    place = rest.cumsum(1) - 1
    return rest & (place % step == 0) & (place // step < contextual)


def _wide(ids: Tensor, features: Tensor) -> Tensor:
    """Widen ids `[V, K]` so that they gather or scatter whole rows of features `[V, ·, C]`: `[V, K, C]`."""
    return ids[..., None].expand(-1, -1, features.shape[-1])


def _cls_tokens(views: Views, parts: list[_Part]) -> Extra:
    """The [CLS] tokens: the thumbnail's before it, those of the crops behind the canvas."""
    if views.cls is None:
        raise ValueError("VisionZip keeps the [CLS] feature, which these views do not have")
    view = on_device([v for v, part in enumerate(parts) if part.cls], views.cls.device, torch.long)
    return Extra(features=views.cls[view], view=view, anchor=torch.where(view == 0, -1, views.grid.patches_per_view))


def _append(extra: Extra, merged: Tensor, behind: int) -> Extra:
    """Add contextual tokens `[V, K, C]` view by view, at the anchor `behind`: behind their whole view."""
    view = torch.arange(len(merged), device=merged.device).repeat_interleave(merged.shape[1])
    return Extra(
        features=torch.cat((extra.features, merged.flatten(0, 1).to(extra.features.dtype))),
        view=torch.cat((extra.view, view)),
        anchor=torch.cat((extra.anchor, torch.full_like(view, behind))),
    )
