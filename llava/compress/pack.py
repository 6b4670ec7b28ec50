"""From selected patches to the visual part of the sequence: project, put in order, add newlines.

Every method goes through here. Where a selection states its total, nothing is read back from the device: all shapes
follow from image size and ratio.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.compress.base import Selection, Views

NEWLINE, EXTRA = -1, -2
_NEVER = 1 << 62


@dataclass(kw_only=True)
class Packed:
    """The visual tokens of one image as the language model gets them."""

    features: Tensor
    """`[T, D]`, projected."""
    origin: Tensor
    """`[T]`: view · N + patch of every token; -1 for a newline, -2 for a token the method appended."""
    patches: int
    """Kept patches among the T tokens."""
    newlines: int
    """Newline tokens among the T tokens."""

    @property
    def visual(self) -> int:
        """Tokens that show something: kept patches and what the method appended."""
        return len(self.origin) - self.newlines


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
    n, slots = views.grid.patches_per_view, features.shape[1]
    place = _places(views, selection)  # [V, N]
    key, index = place.masked_fill(~selection.kept, _NEVER).flatten().sort()
    key, index = key[:total], index[:total]  # [total] in sequence order, into the flattened slots
    chosen = features.flatten(0, 1)[index]  # [total, C]
    patch = index if views.ids is None else (index // slots) * n + views.ids.flatten()[index]

    keys, origins = [key], [patch]
    if selection.extra is not None:
        extra = selection.extra
        chosen = torch.cat((chosen, extra.features.to(chosen.dtype)))
        keys.append(_extra_places(views, _table(views, selection), extra.view, extra.anchor))
        origins.append(torch.full_like(keys[-1], EXTRA))
    tokens = projector(chosen)  # [total + E, D]
    rows = _newline_rows(views, selection) if newline is not None else key[:0]
    if newline is not None:
        tokens = torch.cat((tokens, newline.to(tokens).expand(len(rows), -1)))
        keys.append(_row_end(views, rows))
        origins.append(torch.full_like(rows, NEWLINE))
    # Stable: an appended token shares its anchor's place and follows it.
    sequence = torch.cat(keys).argsort(stable=True)
    return Packed(features=tokens[sequence], origin=torch.cat(origins)[sequence], patches=total, newlines=len(rows))


def _table(views: Views, selection: Selection) -> Tensor:
    """Sort key `[V, N]` of every patch: N thumbnail places and one behind, then canvas rows, each with a newline's."""
    grid, layout = views.grid, selection.layout
    n, side = grid.patches_per_view, grid.side
    device = views.features.device
    patch = torch.arange(n, device=device).expand(grid.n_views, -1)
    thumbnail = patch[:1]
    if layout.thumbnail == "score":
        ranked = selection.order[:1] if views.ids is None else views.ids[:1].gather(1, selection.order[:1])
        thumbnail = torch.full_like(thumbnail, n).scatter(1, ranked, patch[:1, : ranked.shape[1]])
    if grid.crops is None:
        return thumbnail
    crop = torch.arange(grid.n_crops, device=device)[:, None]
    if layout.placement == "flat":
        return torch.cat((thumbnail, n + 1 + n * crop + patch[1:]))
    within = patch[1:]
    if layout.placement == "released":
        within = views.valid[1:].long().cumsum(1) - 1
    cols = grid.crops[0]
    x = crop % cols * side + within % side
    y = crop // cols * side + within // side
    return torch.cat((thumbnail, n + 1 + y * (grid.canvas[0] + 1) + x))


def _places(views: Views, selection: Selection) -> Tensor:
    """Sort key `[V, N']` of every token: its patch's."""
    table = _table(views, selection)
    return table if views.ids is None else table.gather(1, views.ids)


def _row_end(views: Views, rows: Tensor) -> Tensor:
    """Sort keys of the newlines that close the given canvas rows."""
    return views.grid.patches_per_view + 1 + rows * (views.grid.canvas[0] + 1) + views.grid.canvas[0]


def _newline_rows(views: Views, selection: Selection) -> Tensor:
    """Canvas rows that end in a newline token; a single view is closed by one."""
    grid, policy, device = views.grid, selection.layout.newline, views.features.device
    if policy == "none":
        return torch.arange(0, device=device)
    if grid.crops is None:
        return torch.arange(1, device=device)
    rows = torch.arange(grid.canvas[1], device=device)
    if policy == "canvas":
        return rows
    _, top, _, bottom = grid.box
    if policy == "unpadded":
        return rows[top:bottom]
    occupied = (_places(views, selection)[1:][selection.kept[1:]] - grid.patches_per_view - 1) // (grid.canvas[0] + 1)
    return rows[torch.isin(rows, occupied)]


def _extra_places(views: Views, table: Tensor, view: Tensor, anchor: Tensor) -> Tensor:
    """Sort keys `[E]` of appended tokens: the place of the anchor, before the view (anchor -1) or behind it (N)."""
    n = views.grid.patches_per_view
    before, behind = torch.where(view == 0, -1, n), torch.where(view == 0, n, _NEVER)
    place = torch.where(anchor < n, table[view, anchor.clamp(0, n - 1)], behind)
    return torch.where(anchor < 0, before, place)
