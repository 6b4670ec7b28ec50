"""Control: average pooling, at the same budget as GlobalCom²; every patch counts, whatever it shows."""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from llava.anyres import AnyResGrid
from llava.compress.base import Compressor, Layout, Plan, Selection, Views, exact_plan, uniform_counts
from llava.compress.tokens import on_device, top_indices

Box = tuple[int, int, int, int]
"""`(left, top, right, bottom)` within a view, in patches."""


@dataclass(frozen=True, kw_only=True)
class Pool(Compressor):
    """Cut every view into as many nearly square cells as it may keep tokens, and keep the mean of each.

    A quarter of an unpadded view is pooled 2x2, a ninth 3x3; other budgets get rectangles of similar sizes. A mean
    stands where the middle of its cell was and counts as one kept patch.
    """

    name = "pool"

    def plan(self, grid: AnyResGrid, layout: Layout = Layout()) -> Plan:  # noqa: B008 - frozen
        """⌊R·N⌋ thumbnail cells and ⌊R·Σ n_j⌋ crop cells, exactly."""
        return exact_plan(self.ratio, grid, layout.unpad)

    def select(self, views: Views) -> Selection:
        """Pool the views one by one, as their cells differ in number and shape."""
        counts = uniform_counts(self.ratio, views.grid, views.layout.unpad)
        features, kept = views.features.clone(), torch.zeros_like(views.valid)
        for view, (count, box) in enumerate(zip(counts, _boxes(views.grid, views.layout.unpad), strict=True)):
            if count:
                patches, member, middle = _cells(count, box, views.grid.side, features.device)
                taken = views.features[view, patches].float() * member[..., None]  # [K, M, C]
                features[view, middle] = (taken.sum(1) / member.sum(1, keepdim=True)).to(features.dtype)
                kept[view, middle] = True
        return Selection(
            order=top_indices(kept.float(), views.valid),
            count=on_device(counts, features.device),
            total=sum(counts),
            features=features,
            layout=views.layout,
        )


def _boxes(grid: AnyResGrid, unpad: bool) -> list[Box]:
    """What of every view shows the image, or all of it where nothing is unpadded."""
    side, cols = grid.side, grid.crops[0] if grid.crops else 1
    if not unpad:
        return [(0, 0, side, side)] * grid.n_views
    corners = [(crop % cols * side, crop // cols * side) for crop in range(grid.n_crops)]
    crops = zip(grid.crop_boxes, corners, strict=True)
    return [(0, 0, side, side), *((l - x, t - y, r - x, b - y) for (l, t, r, b), (x, y) in crops)]


def _cells(count: int, box: Box, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a box into `count` rectangles: bands of near-equal height, each cut into near-equal widths.

    Args:
        count: K, from 1 to the number of patches in the box.
        box: what to cut.
        side: patches along the view.
        device: where the results shall be.

    Returns:
        Patch ids `[K, M]` of every cell in reading order, bool `[K, M]` which of them count (cells differ in size),
        and the id of every cell's middle `[K]`. All follows from sizes, so nothing is read from the device.
    """
    width, height = box[2] - box[0], box[3] - box[1]
    # As square as can be, but no cell without a patch.
    bands = min(max(round(sqrt(count * height / width)), -(-count // width)), height, count)
    cell = torch.arange(count, device=device)
    band = ((cell + 1) * bands - 1) // count
    first = band * count // bands
    number, place = (band + 1) * count // bands - first, cell - first
    top, bottom = box[1] + band * height // bands, box[1] + (band + 1) * height // bands
    left, right = box[0] + place * width // number, box[0] + (place + 1) * width // number
    tall, wide = -(-height // bands), -(-width // (count // bands))
    y = top[:, None, None] + torch.arange(tall, device=device)[:, None]  # [K, tall, 1]
    x = left[:, None, None] + torch.arange(wide, device=device)  # [K, 1, wide]
    member = (y < bottom[:, None, None]) & (x < right[:, None, None])  # [K, tall, wide]
    patches = (y * side + x) * member  # what sticks out reads patch 0 and counts for nothing
    middle = (top + bottom - 1) // 2 * side + (left + right - 1) // 2
    return patches.flatten(1), member.flatten(1), middle
