"""The only code that touches hooks: a method looks into the encoder for as long as a `with` block lasts."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from llava.anyres import AnyResGrid
from llava.compress.attention import cls_logits, patch_keys
from llava.compress.base import Compressor, Layout, Taps, Views


@dataclass
class Session:
    """What was recorded inside the encoder, by layer as `Taps` names it; see `Views` for the shapes."""

    layers: nn.ModuleList
    taps: Taps
    cls_logits: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)

    @property
    def tapped(self) -> list[int]:
        """The layers looked at, counted from the start, in ascending order."""
        return sorted({index % len(self.layers) for index in (*self.taps.cls, *self.taps.keys)})

    def record(self, index: int, hidden: Tensor) -> None:
        """Record what is wanted of layer `index` (from the start) given its input `[V, 1 + N, C]`."""
        layer = self.layers[index]
        for name in (index, index - len(self.layers)):  # counted from the start, and from the end
            if name in self.taps.cls:
                self.cls_logits[name] = cls_logits(layer, hidden)
            if name in self.taps.keys:
                self.keys[name] = patch_keys(layer, hidden)

    def finish(self, index: int, hidden: Tensor) -> None:
        """Record the layers the tower did not run, given the input of the first of them.

        The features are the input of the last layer (`mm_vision_select_layer = -2`), so the row that scores them
        costs two projections and the layer itself is never run.
        """
        missing = [layer for layer in self.tapped if layer >= index]
        for current in range(index, missing[-1] + 1 if missing else index):
            self.record(current, hidden)
            if current < missing[-1]:
                hidden = self.layers[current](hidden, attention_mask=None)

    def views(self, hidden: Tensor, grids: Sequence[AnyResGrid], layout: Layout) -> list[Views]:
        """Hand the views of several images `[ΣV, 1 + N, C]` and what was recorded of them out per image."""
        ends = list(accumulate(grid.n_views for grid in grids))
        spans = [slice(end - grid.n_views, end) for grid, end in zip(grids, ends, strict=True)]
        return [
            Views(
                features=hidden[span, 1:],
                grid=grid,
                cls_logits={layer: rows[span] for layer, rows in self.cls_logits.items()},
                keys={layer: keys[span] for layer, keys in self.keys.items()},
                cls=hidden[span, 0] if self.taps.cls_feature else None,
                layout=layout,
            )
            for grid, span in zip(grids, spans, strict=True)
        ]


@contextmanager
def attach(*, tower: Any, method: Compressor) -> Iterator[Session]:
    """Let a method look into a CLIP encoder; every hook is gone afterwards, also after an error.

    Args:
        tower: transformers' `CLIPVisionModel`.
        method: its `taps` say what is recorded; nothing unasked is.
    """
    session = Session(tower.encoder.layers, method.taps)

    def look(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            session.record(index, args[0] if args else kwargs["hidden_states"])

        return hook

    with ExitStack() as hooks:
        for index in session.tapped:
            handle = session.layers[index].register_forward_pre_hook(look(index), with_kwargs=True)
            hooks.callback(handle.remove)
        yield session
