"""Control: the thumbnail alone, which is what LLaVA-1.5 would see; what crops are worth is measured against it."""

from dataclasses import dataclass, replace
from typing import ClassVar

from llava.anyres import AnyResGrid
from llava.compress.base import Compressor, Layout, Plan, Selection, Views


@dataclass(frozen=True, kw_only=True)
class ThumbnailOnly(Compressor):
    """Keep all of the first view and nothing of the crops; a retention ratio has no effect."""

    name = "thumbnail_only"
    has_ratio: ClassVar[bool] = False

    def plan(self, grid: AnyResGrid, layout: Layout = Layout()) -> Plan:  # noqa: B008 - frozen
        """The patches of one view, exactly."""
        kept = grid.n_patches(layout.unpad) - sum(grid.crop_patches(layout.unpad))
        return Plan(ratio=1.0, patches=grid.n_patches(layout.unpad), at_least=kept, at_most=kept)

    def select(self, views: Views) -> Selection:
        """Count the crops' patches out; without them, their rows end in no newline."""
        everything = super().select(views)
        count = everything.count.clone()
        count[1:] = 0
        layout = replace(views.layout, newline="none") if views.grid.crops else views.layout
        return replace(everything, count=count, total=self.plan(views.grid, views.layout).at_most, layout=layout)
