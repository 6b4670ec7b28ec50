"""From selected patches to the visual part of the sequence: project, put in order, add newlines.

Every method goes through here. Where a selection states its total, nothing is read back from the device: all shapes
follow from image size and ratio.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llava.anyres import AnyResGrid
from llava.compress.base import Selection, Views

NEWLINE, EXTRA = -1, -2
_NEVER = 1 << 62


class Packed:
    """The visual tokens of one image as the language model gets them."""

    def __init__(self, *, features: Tensor, origin: Tensor | Callable[[], Tensor], patches: int, newlines: int) -> None:
        """Take the tokens; where they come from may be left to a function, which runs if anybody asks."""
        self.features = features
        """`[T, D]`, projected."""
        self.patches = patches
        """Kept patches among the T tokens."""
        self.newlines = newlines
        """Newline tokens among the T tokens."""
        self._origin = origin

    @property
    def origin(self) -> Tensor:
        """`[T]`: view · N + patch of every token; -1 for a newline, -2 for a token the method appended."""
        if callable(self._origin):
            self._origin = self._origin()
        return self._origin

    @property
    def visual(self) -> int:
        """Tokens that show something: kept patches and what the method appended."""
        return len(self.features) - self.newlines


def pack(
    views: Views, selection: Selection, projector: Callable[[Tensor], Tensor], newline: Tensor | None = None
) -> Packed:
    """Project the kept tokens of one image and lay them out as a sequence.

    The thumbnail's tokens come first, then the kept tokens of the crops in the order of the canvas, its rows closed
    by the newline embedding (LLaVA-NeXT's `spatial_unpad`); `selection.layout` says which variant of it.

    Args:
        views: the image after the encoder.
        selection: what to keep of it.
        projector: maps `[T, C]` to `[T, D]`; it sees kept tokens only.
        newline: `[D]`, the checkpoint's newline embedding, or None if it has none.
    """
    features = views.features if selection.features is None else selection.features
    total = int(selection.count.sum()) if selection.total is None else selection.total
    grid, ids = views.grid, views.ids
    n, slots = grid.patches_per_view, features.shape[1]
    line = _line(grid, selection.layout.placement == "flat").to(features.device, non_blocking=True)
    table, ends = _table(views, selection, line[: grid.n_views * n].view(-1, n)), line[grid.n_views * n :]
    place = table if ids is None else table.gather(1, ids)  # [V, N']
    # The line begins with 0, 1, …, which are also the ranks.
    dropped = torch.empty_like(selection.order, dtype=torch.bool)
    dropped.scatter_(1, selection.order, line[:slots] >= selection.count[:, None])
    key, index = torch.add(place, dropped, alpha=_NEVER).flatten().sort()
    key, index = key[:total], index[:total]  # [total] in sequence order, into the flattened slots
    chosen = _rows(features, index)  # [total, C]

    keys, extra = [key], selection.extra
    if extra is not None:
        chosen = torch.cat((chosen, extra.features.to(chosen.dtype)))
        keys.append(_extra_places(views, table, extra.view, extra.anchor))
    tokens = projector(chosen)  # [total + E, D]
    ends = ends[:0] if newline is None else _newlines(views, selection, ends, key)
    if newline is not None:
        tokens = torch.cat((tokens, newline.to(tokens).expand(len(ends), -1)))
        keys.append(ends)
    # Stable: an appended token shares its anchor's place and follows it.
    sequence = torch.cat(keys).argsort(stable=True)

    def origin() -> Tensor:
        patch = index if ids is None else (index // slots) * n + ids.flatten()[index]
        others = patch.new_full((len(sequence) - total,), EXTRA)
        others[len(others) - len(ends) :] = NEWLINE
        return torch.cat((patch, others))[sequence]

    placed = tokens.index_select(0, sequence.to(tokens.device))  # the projector may lie elsewhere than the tower
    return Packed(features=placed, origin=origin, patches=total, newlines=len(ends))


def _rows(features: Tensor, index: Tensor) -> Tensor:
    """Gather tokens `[T, C]` of `[V, N', C]` by their number v · N' + n.

    Flattening patches without the [CLS] token before each view's would copy all of them, so that is stepped over.
    """
    views, slots, width = features.shape
    if features.stride(2) != 1 or features.stride(1) != width or features.stride(0) % max(1, width):
        features = features.contiguous()
    step = features.stride(0) // max(1, width)  # from a view to the next, in tokens
    rows = features.as_strided(((views - 1) * step + slots, width), (width, 1))
    if step > slots:
        index = torch.add(index, index // slots, alpha=step - slots)
    return rows.index_select(0, index)


def _line(grid: AnyResGrid, flat: bool) -> Tensor:
    """Sort keys of every patch `[V · N]`, then of the newline behind every canvas row, or behind a single view.

    Places are counted along the thumbnail, which has one behind it, and then along the canvas rows, each with its
    newline's, or crop after crop if `flat`. All follows from sizes: it is made on the host, for one copy to the device.
    """
    n, (width, height) = grid.patches_per_view, grid.canvas
    rows = max(1, height)
    places = torch.arange(n + 1 + rows * (width + 1), device="cpu")
    canvas = places[n + 1 :].view(rows, width + 1)
    crops = places[n + 1 :][: n * grid.n_crops] if flat else grid.tiles(canvas[:, :-1]).flatten()
    return torch.cat((places[:n], crops, canvas[:, -1]))


def _table(views: Views, selection: Selection, table: Tensor) -> Tensor:
    """Sort key `[V, N]` of every patch, given those that follow from sizes alone."""
    layout, thumbnail, crops = selection.layout, table[:1], table[1:]
    if layout.thumbnail == "score":
        ranked = selection.order[:1] if views.ids is None else views.ids[:1].gather(1, selection.order[:1])
        ranks = thumbnail[:, : ranked.shape[1]]
        thumbnail = torch.full_like(thumbnail, thumbnail.shape[1]).scatter(1, ranked, ranks)
    if layout.placement == "released":
        crops = crops.gather(1, (views.valid[1:].cumsum(1) - 1).clamp_min(0))
    changed = layout.thumbnail == "score" or layout.placement == "released"
    return torch.cat((thumbnail, crops)) if changed else table


def _newlines(views: Views, selection: Selection, ends: Tensor, key: Tensor) -> Tensor:
    """Which of the canvas rows' `ends` become newlines, given the sort keys of what is kept; a single view has one."""
    grid, policy = views.grid, selection.layout.newline
    if policy == "none":
        return ends[:0]
    if policy == "canvas" or grid.crops is None:
        return ends
    if policy == "unpadded":
        return ends[grid.box[1] : grid.box[3]]
    first, width = grid.patches_per_view + 1, grid.canvas[0] + 1
    return ends[torch.isin((ends - first) // width, (key - first) // width)]


def _extra_places(views: Views, table: Tensor, view: Tensor, anchor: Tensor) -> Tensor:
    """Sort keys `[E]` of appended tokens: the place of the anchor, before the view (anchor -1) or behind it (N)."""
    n = views.grid.patches_per_view
    before, behind = torch.where(view == 0, -1, n), torch.where(view == 0, n, _NEVER)
    place = torch.where(anchor < n, table[view, anchor.clamp(0, n - 1)], behind)
    return torch.where(anchor < 0, before, place)
