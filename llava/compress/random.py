"""Control: a random subset of every view, at the same budget as GlobalCom²."""

from dataclasses import dataclass

import torch

from llava.anyres import AnyResGrid
from llava.compress.base import Compressor, Layout, Plan, Selection, Views, exact_plan, uniform_counts
from llava.compress.tokens import on_device, top_indices


@dataclass(frozen=True, kw_only=True)
class Random(Compressor):
    """Keep patches drawn uniformly without replacement; the draw depends on seed and image size alone."""

    name = "random"

    seed: int = 0
    """Seed of the draw."""

    def __post_init__(self) -> None:
        """Refuse a seed that is none."""
        super().__post_init__()
        self._require("seed", int, -(2**63), 2**63 - 1)

    def plan(self, grid: AnyResGrid, layout: Layout = Layout()) -> Plan:  # noqa: B008 - frozen
        """⌊R·N⌋ thumbnail patches and ⌊R·Σ n_j⌋ crop patches, exactly."""
        return exact_plan(self.ratio, grid, layout.unpad)

    def select(self, views: Views) -> Selection:
        """Order the patches by a seeded draw made on the CPU, so that every device keeps the same ones."""
        counts = uniform_counts(self.ratio, views.grid, views.layout.unpad)
        draw = torch.rand(views.valid.shape, generator=torch.Generator().manual_seed(self.seed))
        return Selection(
            order=top_indices(draw.to(views.features.device, non_blocking=True), views.valid),
            count=on_device(counts, views.features.device),
            total=sum(counts),
            layout=views.layout,
        )
