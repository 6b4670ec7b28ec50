"""Merging tokens inside the vision encoder: what a method sees there and may do, and what such methods share."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from llava.anyres import AnyResGrid
from llava.compress.base import Compressor, Layout, Plan, Selection, Views, exact_plan, uniform_counts
from llava.compress.tokens import on_device, percent_above, top_indices
from llava.constants import InputError, OutOfReach


@dataclass(frozen=True, kw_only=True)
class EncoderTokens:
    """All views of a call between attention and MLP of one layer of the encoder, in one rectangle.

    Views may hold different numbers of patches. Those that a view still has come first; the slots behind them are
    empty: what they hold means nothing, and no later attention sees it. Padding is gone from the first point on.
    """

    layer: int
    """The layer whose attention just ran."""
    depth: int
    """Layers of the encoder that run."""
    hidden: Tensor
    """`[V, 1 + N', C]` after the attention's residual, [CLS] first."""
    queries: Tensor
    """`[V, H, 1 + N', d]` of this attention."""
    keys: Tensor
    """`[V, H, 1 + N', d]` of this attention."""
    bias: Tensor | None
    """`[V, 1, 1, 1 + N']`, what this attention added to the logits of its keys."""
    ids: Tensor
    """`[V, N']`, patch ids."""
    side: int
    """Patches along a view."""
    sizes: Tensor
    """`[V, 1 + N']` in float32: the patches every token stands for, as far as the method counts them."""
    before: tuple[int, ...]
    """Patches that every view has now."""
    after: tuple[int, ...]
    """Patches that every view is to have."""

    @property
    def alive(self) -> Tensor:
        """Bool `[V, N']`: the slot holds a patch."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < column(self.before, self.ids)

    @property
    def most(self) -> int:
        """The most patches that any view has to give up."""
        return max(before - after for before, after in zip(self.before, self.after, strict=True))

    @property
    def gives(self) -> Tensor:
        """`[V, 1]`: the patches that every view has to give up."""
        return column(self.before, self.ids) - column(self.after, self.ids)


@dataclass(frozen=True, kw_only=True)
class EncoderSizes:
    """The sizes of `EncoderTokens`, of which follows what a method multiplies there."""

    layer: int
    depth: int
    """Layers of the encoder that run."""
    before: tuple[int, ...]
    """Patches that every view of the call has now."""
    after: tuple[int, ...]
    """Patches that every view is to have."""
    width: int
    """C."""
    heads: int
    """H."""

    @property
    def views(self) -> int:
        """V."""
        return len(self.before)

    @property
    def slots(self) -> int:
        """N', empty ones included; as a thumbnail has no padding, also at the first point."""
        return max(self.before)

    @property
    def most(self) -> int:
        """The most patches that any view has to give up."""
        return max(before - after for before, after in zip(self.before, self.after, strict=True))


@dataclass(frozen=True, kw_only=True)
class Merging:
    """What goes on to the MLP."""

    hidden: Tensor
    """`[V, 1 + N', C]`, with whatever was merged in its place."""
    order: Tensor
    """`[V, N']` slots of patches, [CLS] not counted: first those that go on, in their new order."""
    sizes: Tensor | None = None
    """`[V, 1 + N']`, the patches every token stands for now; None: as before."""
    proportional: bool = False
    """Whether later attention adds the logarithm of a key's size to its logits."""


@dataclass(frozen=True, kw_only=True)
class InEncoder(Compressor):
    """The base of methods that merge tokens layer by layer; every view ends with its share of the budget.

    In each layer every view gives up the same number r of patches, the smallest that ends at its budget, the last layer
    less. A view that has any patch keeps one until `select`.
    """

    numbers: ClassVar[tuple[str, ...]] = ("r",)

    r: int | None = None
    """Patches every view gives up in every merging layer, the authors' switch; None: what the ratio asks for."""

    def __post_init__(self) -> None:
        """Refuse values that cannot mean anything."""
        super().__post_init__()
        if self.r is not None:
            self._require("r", int, 1, 1_000_000)

    @property
    def encoder_ratio(self) -> float:
        """The share of patches that leaves the encoder."""
        return self.ratio

    @property
    def idle(self) -> bool:
        """The encoder is left alone."""
        return self.r is None and self.encoder_ratio == 1

    def _first(self, depth: int) -> tuple[int, str]:
        """The first merging layer in an encoder that runs `depth`, and the field that moves it."""
        raise NotImplementedError

    def _most(self, n: int) -> int:
        """How many of n patches one layer can take from a view."""
        return max(n - 1, 0)

    def encoder_points(self, depth: int) -> tuple[int, ...]:
        """All layers from the first on.

        Raises:
            InputError: so few layers run that this is none.
        """
        first, name = self._first(depth)
        if not self.idle and first >= depth:
            raise InputError(
                f"{self.name} would merge from layer {first} on, but the encoder runs {depth}; lower {name}"
            )
        return () if self.idle else tuple(range(first, depth))

    def patches_per_layer(self, grid: AnyResGrid, layout: Layout, depth: int) -> tuple[tuple[int, ...], ...]:
        """All of them up to the first merging layer, then what the schedule of every view says."""
        points = self.encoder_points(depth)
        if not points:
            return super().patches_per_layer(grid, layout, depth)
        sizes = (grid.patches_per_view, *grid.crop_patches(layout.unpad))
        wanted = (0,) * grid.n_views if self.r else uniform_counts(self.encoder_ratio, grid, layout.unpad)
        paths = [self._path(n, max(k, min(n, 1)), points) for n, k in zip(sizes, wanted, strict=True)]
        untouched = (grid.patches_per_view,) * grid.n_views
        return (*(untouched,) * (points[0] + 1), *zip(*paths, strict=True))

    def _path(self, n: int, k: int, points: Sequence[int]) -> list[int]:
        """Patches of a view after every point, on the way from n to k.

        Raises:
            OutOfReach: there are too few layers.
        """

        def path(r: int) -> list[int]:
            left = [n]
            for _ in points:
                left.append(left[-1] - min(r, self._most(left[-1]), left[-1] - k))
            return left[1:]

        least = path(n)[-1]
        if self.r is not None or least == k + 1:  # one too many is dropped by `select`
            return path(self.r or n)
        if least > k:
            raise OutOfReach(
                f"{self.name} cannot bring {n} patches down to {k} (retention_ratio {self.ratio:g}) in {len(points)} "
                f"layers; ask for at least {percent_above(least / n)}, or let it begin before layer {points[0]} "
                f"({self._first(points[-1] + 1)[1]})"
            )
        return path(bisect_left(range(n), True, key=lambda r: path(r)[-1] <= k))

    def plan(self, grid: AnyResGrid, layout: Layout = Layout()) -> Plan:  # noqa: B008 - frozen
        """Exact; with a given r bounds, as the number of layers is not known here."""
        if self.idle:
            return super().plan(grid, layout)
        if self.r is None:
            return replace(exact_plan(self.encoder_ratio, grid, layout.unpad), ratio=self.ratio)
        sizes = [n for n in (grid.patches_per_view, *grid.crop_patches(layout.unpad)) if n]
        most = sum(n - min(self.r, self._most(n)) for n in sizes)
        return Plan(ratio=None, patches=sum(sizes), at_least=len(sizes), at_most=most)

    def select(self, views: Views) -> Selection:
        """Take what the encoder left, and no more than planned."""
        everything = super().select(views)
        if self.idle:
            return everything
        if views.ids is None:
            raise ValueError(f"{self.name} merges inside the encoder, but these views come from one it was not in")
        if self.r is not None:
            return everything
        counts = uniform_counts(self.encoder_ratio, views.grid, views.layout.unpad)
        return replace(everything, count=on_device(counts, views.ids.device), total=sum(counts))


def column(numbers: Sequence[int], like: Tensor) -> Tensor:
    """Turn a number per view into `[V, 1]` on the device of `like`."""
    return on_device(numbers, like.device)[:, None]


def stand_in(grid: AnyResGrid, layout: Layout, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return what an encoder could have left of an image, for whoever has none: its first patches.

    Args:
        grid: the image.
        layout: says whether padding is left out.
        counts: patches left of every view.

    Returns:
        `ids [V, N']` and `valid [V, N']` of such `Views`.
    """
    ids = top_indices(grid.valid(layout.unpad).float())[:, : max(counts)]
    return ids, torch.arange(ids.shape[1]) < column(counts, ids)
