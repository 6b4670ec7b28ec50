"""FasterVLM (arXiv 2412.01818, later VisPruner): every view keeps the patches its own [CLS] token looks at most."""

from dataclasses import dataclass, replace

from llava.anyres import AnyResGrid
from llava.compress.base import (
    Compressor,
    Layout,
    Plan,
    Selection,
    Taps,
    Views,
    exact_plan,
    nearest_count,
    uniform_counts,
)
from llava.compress.tokens import on_device, top_indices


@dataclass(frozen=True, kw_only=True)
class FasterVLM(Compressor):
    """Keep the same share of every view, by [CLS] attention in the encoder layer that made the features.

    A patch's score is its softmax probability in the [CLS] row, [CLS] column included in the denominator, averaged
    over heads.

    Differs from the released code in (profile `corrected`): padding is neither ranked nor kept, so that the ratio
    applies to what is left after unpadding, as GlobalCom² runs it for its tables; unpadded rows end in the newline the
    checkpoint was trained with, where the release merges as `spatial`, without either; ⌊R·N⌋ + ⌊R·Σ n_j⌋ tokens are
    kept, where the release takes one absolute number for every view, R·N to the nearest; the projector runs on kept
    tokens. `released` shares the last one, which changes no selection, and the grid of crops, which is chosen before
    any method runs: the release fills the canvas best, even by enlarging (300x300 gets 2x2 crops instead of 1x2).
    """

    name = "fastervlm"
    paper = "arXiv 2412.01818"
    profiles = ("corrected", "released")
    taps = Taps(cls=(-2,))

    def plan(self, grid: AnyResGrid, layout: Layout = Layout()) -> Plan:  # noqa: B008 - frozen
        """Exact; `released` keeps the same number of every view, padding or not."""
        if self.profile == "corrected":
            return exact_plan(self.ratio, grid, layout.unpad)
        kept = grid.n_views * nearest_count(self.ratio, grid)  # 0.10 -> 58, 0.05 -> 29 of 576
        return Plan(ratio=self.ratio, patches=grid.n_patches(layout.unpad), at_least=kept, at_most=kept)

    def select(self, views: Views) -> Selection:
        """Rank every view's patches by their probability."""
        scores = views.attention(-2).mean(1)  # [V, N]
        if self.profile == "released":
            order, layout = top_indices(scores), replace(views.layout, unpad=False, newline="none", placement="raster")
            counts = (nearest_count(self.ratio, views.grid),) * views.grid.n_views
        else:
            order, layout = top_indices(scores, views.valid), views.layout
            counts = uniform_counts(self.ratio, views.grid, layout.unpad)
        count = on_device(counts, order.device)
        return Selection(order=order, count=count, total=sum(counts), layout=layout)
