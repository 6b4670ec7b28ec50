"""Control: evenly spaced patches of every view, at the same budget as GlobalCom²."""

from dataclasses import dataclass

import torch

from llava.anyres import AnyResGrid
from llava.compress.base import Compressor, Layout, Plan, Selection, Views, exact_plan, uniform_counts
from llava.compress.tokens import on_device, top_indices

# Powers of the inverse of the plastic number, the root of x³ = x + 1: the two-dimensional counterpart of the golden
# ratio, whose multiples modulo 1 fill the unit square evenly.
_ACROSS, _DOWN = 0.7548776662466927, 0.5698402909980532


@dataclass(frozen=True, kw_only=True)
class Uniform(Compressor):
    """Subsample the grid of patches evenly in both directions, whatever the budget.

    A plain stride only fits budgets of 1/k; ranking the patches by a low-discrepancy dither spreads any number of
    them evenly, and the patches kept at a small ratio are among those kept at a larger one.
    """

    name = "uniform"

    def plan(self, grid: AnyResGrid, layout: Layout = Layout()) -> Plan:  # noqa: B008 - frozen
        """⌊R·N⌋ thumbnail patches and ⌊R·Σ n_j⌋ crop patches, exactly."""
        return exact_plan(self.ratio, grid, layout.unpad)

    def select(self, views: Views) -> Selection:
        """Order the patches of a view by their dither value."""
        side, device = views.grid.side, views.features.device
        along = torch.arange(side, device=device, dtype=torch.float64)
        dither = (along * _ACROSS + along[:, None] * _DOWN + 0.5) % 1  # [S, S]
        counts = uniform_counts(self.ratio, views.grid, views.layout.unpad)
        return Selection(
            order=top_indices(dither.flatten().expand(views.valid.shape), views.valid),
            count=on_device(counts, device),
            total=sum(counts),
            layout=views.layout,
        )
