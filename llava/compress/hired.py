"""HiRED (arXiv 2408.10945): early [CLS] attention shares a budget out over the crops, late attention spends it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava.anyres import AnyResGrid
from llava.compress.base import Compressor, Layout, Plan, Selection, Taps, Views, exact_plan, split_budget
from llava.compress.tokens import apportion, budget, fill_shares, top_indices


@dataclass(frozen=True, kw_only=True)
class HiRED(Compressor):
    """Keep what late [CLS] attention favours; each crop gets its share of the patches early attention favours.

    Of the budget B the thumbnail gets α·B. Its (1 - α)·N patches of highest [CLS] attention in the *first* encoder
    layer, each counted for the crop that shows it, share the rest out. The tokens themselves are chosen per view by
    the layer that made the features; both scores are softmax probabilities summed over heads. A single view gets B.

    Differs from the released code in (profile `corrected`): a thumbnail patch counts for the crop that shows the same
    part of the image, where the release cuts the map into contiguous raster bands; B is ⌊R·N⌋ + ⌊R·Σ n_j⌋ and is met
    exactly, where the release counts padding into B, drops what rounding down and full crops leave over, and ranks
    padding, which it removes only afterwards; a single view is compressed, which the release does for LLaVA-1.5 and
    not for LLaVA-NeXT; rows, and single views, end in the checkpoint's newline; α = 1 works; the projector runs on
    kept tokens. `released` shares the last two, which change no selection, and the checkpoint's grid, whose sides the
    release's transformers swaps.
    """

    name = "hired"
    paper = "arXiv 2408.10945"
    profiles = ("corrected", "released")
    taps = Taps(cls=(0, -2))

    alpha: float = 0.5
    """α: the thumbnail's share of the budget; 1 - α of its patches share out the rest."""

    def __post_init__(self) -> None:
        """Refuse values that cannot mean anything."""
        super().__post_init__()
        self._require("alpha", float, 0, 1)

    def plan(self, grid: AnyResGrid, layout: Layout = Layout()) -> Plan:  # noqa: B008 - frozen
        """Exact for `corrected` and for what stays whole; otherwise anything from the thumbnail's part up to B."""
        if self.profile == "corrected":
            return exact_plan(self.ratio, grid, layout.unpad)
        if self._stays_whole(grid, layout):
            return super().plan(grid, layout)
        thumbnail, crops = self._budgets(grid, layout)
        most = thumbnail + min(crops, sum(grid.crop_patches(layout.unpad)))
        return Plan(ratio=self.ratio, patches=grid.n_patches(layout.unpad), at_least=thumbnail, at_most=most)

    def select(self, views: Views) -> Selection:
        """Share the budget out by the first layer, spend it by the layer of the features."""
        if self._stays_whole(views.grid, views.layout):
            return replace(super().select(views), layout=replace(views.layout, newline="none"))
        thumbnail, crops = self._budgets(views.grid, views.layout)
        scores = views.attention(-2).sum(1)  # [V, N]
        count = torch.full((1,), thumbnail, device=scores.device)
        if views.grid.crops:
            favoured = top_indices(views.attention(0)[0].sum(0))  # [N], of the thumbnail
            found = self._found(favoured[: budget(1 - self.alpha, len(favoured))], views.grid)
            count = torch.cat((count, self._count(found, views, crops)))
        order, layout, total = top_indices(scores, views.valid), views.layout, thumbnail + crops
        if self.profile == "released":
            # Ranked among all patches, then unpadded: what is left of the first `count` are valid and still in order.
            rank = top_indices(scores).argsort(dim=1)  # [V, N]
            count = ((rank < count[:, None]) & views.valid).sum(1)
            layout = replace(layout, newline="none")
        exact = self.profile == "corrected" or not views.grid.crops
        return Selection(order=order, count=count, total=total if exact else None, layout=layout)

    def _stays_whole(self, grid: AnyResGrid, layout: Layout) -> bool:
        """The release drops nothing at R = 1, nor of a single view of LLaVA-NeXT, which is the model that unpads."""
        return self.profile == "released" and (self.ratio == 1 or (layout.unpad and not grid.crops))

    def _budgets(self, grid: AnyResGrid, layout: Layout) -> tuple[int, int]:
        """Tokens for the thumbnail and for all crops together."""
        n, released = grid.patches_per_view, self.profile == "released"
        if released:
            whole, room = max(1, budget(self.ratio, n * grid.n_views)), n * grid.n_crops
        else:
            whole, room = sum(split_budget(self.ratio, grid, layout.unpad)), sum(grid.crop_patches(layout.unpad))
        if not grid.crops:
            return whole, 0
        thumbnail = min(budget(self.alpha, whole), n)
        crops = min(whole - thumbnail, room)
        # What the crops have no room for goes back to the thumbnail; the release loses it.
        return max(1, thumbnail) if released else whole - crops, crops

    def _found(self, favoured: Tensor, grid: AnyResGrid) -> Tensor:
        """Count the favoured thumbnail patches `[K]` of every crop: `[n]`."""
        (cols, rows), side = grid.crops or (1, 1), grid.side
        if self.profile == "released":
            crop = (favoured // (side**2 // (cols * rows))).clamp_max(cols * rows - 1)
        else:
            # The thumbnail is the unpadded box stretched to a square; its patches' centres, back on the canvas.
            left, top, right, bottom = grid.box
            x = (2 * side * left + (2 * (favoured % side) + 1) * (right - left)) // (2 * side**2)
            y = (2 * side * top + (2 * (favoured // side) + 1) * (bottom - top)) // (2 * side**2)
            crop = y * cols + x
        return (crop == torch.arange(cols * rows, device=crop.device)[:, None]).sum(1)

    def _count(self, found: Tensor, views: Views, total: int) -> Tensor:
        """Tokens every crop may keep `[n]`, in proportion to what was found in it; stays on the device."""
        if self.profile == "released":
            return (found.float() / found.sum().clamp_min(1) * total).long()  # in float32, as the release has it
        sizes = views.valid[1:].sum(1).double()
        # Next to nothing instead of nothing, so that crops without a find take what the full ones leave.
        shares = fill_shares(found.double().clamp_min(1e-30) / sizes.clamp_min(1), sizes, total)
        # Fractions of small integers tie often; on a fixed grid they also tie in floating point.
        return apportion((shares * 2**20).round() / 2**20, total)
