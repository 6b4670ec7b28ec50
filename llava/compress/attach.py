"""The only code that touches hooks: a method works in the encoder for as long as a `with` block lasts.

It may look (`Taps`), by hooks, and merge tokens between attention and MLP of layers that it names (`encoder_points`).
For the latter the layers from the first point on get a forward of their own, instances of this tower only. Meanwhile no
other thread uses these layers (`exclusive`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from threading import RLock
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.anyres import AnyResGrid
from llava.compress.attention import cls_logits, patch_keys
from llava.compress.base import Compressor, Layout, Taps, Views
from llava.compress.encoding import EncoderTokens, column

# Beside the layers and not in them, as locks can be neither copied nor pickled: a copy of a model gets its own.
_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_LOCKS_LOCK = RLock()


def exclusive(layers: nn.Module) -> AbstractContextManager[Any]:
    """Return what keeps other threads from these layers during a `with` block; the thread itself may nest it.

    The lock belongs to the layers, whichever models they are part of: two models that share a tower take turns in it.
    Code that `torch.compile` traces goes without, as whoever calls it holds the lock.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    with _LOCKS_LOCK:
        lock: AbstractContextManager[Any] = _LOCKS.setdefault(layers, RLock())
    return lock


class Shortening:
    """The layers of an encoder from the first point on, run on fewer and fewer tokens.

    All views of a call are one rectangle, as long as the view with most patches left. Views with fewer have empty slots
    behind, which a bias keeps out of attention. How many are left follows from sizes: nothing is read from the device.
    """

    def __init__(
        self, layers: nn.ModuleList, method: Compressor, depth: int, grids: Sequence[AnyResGrid], layout: Layout
    ) -> None:
        """Prepare for images of the given grids, whose views the encoder will get one after the other.

        Raises:
            InputError: the method cannot meet its ratio in an encoder of that depth.
        """
        self.layers, self.method, self.depth, self.grids, self.layout = layers, method, depth, grids, layout
        self.points = method.encoder_points(depth)
        if self.points and not grids:
            raise ValueError(f"{method} merges inside the encoder, so it must be told the grids of the images")
        images = [method.patches_per_layer(grid, layout, depth) for grid in grids]
        self.planned = [sum(views, ()) for views in zip(*images, strict=True)] if self.points else []
        """Patches of all views that enter every layer; last, those of the features."""
        self.count: tuple[int, ...] = ()
        self.ids = self.sizes = torch.empty(0)
        self.bias: Tensor | None = None

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Run layer `index` on `[V, 1 + N', C]`; behind a point the result is shorter."""
        if index == self.points[0]:
            hidden = self._start(hidden)
        layer: Any = self.layers[index]
        attention, normed = layer.self_attn, layer.layer_norm1(hidden)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (p(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for p in projections)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=attention.scale)
        hidden = hidden + attention.out_proj(mixed.transpose(1, 2).flatten(2))
        del normed, v, mixed  # the method's own work comes on top of what is held here
        if index in self.points:
            hidden = self._reduce(index, hidden, q, k)
        del q, k
        return cast(Tensor, hidden + layer.mlp(layer.layer_norm2(hidden)))

    def _start(self, hidden: Tensor) -> Tensor:
        """Begin with an encoder's run: put padding behind, where the first point leaves it."""
        valid = torch.cat([grid.valid(self.layout.unpad, hidden.device) for grid in self.grids])
        if len(valid) != len(hidden):
            raise ValueError(f"the encoder got {len(hidden)} views for grids of {len(valid)}")
        sizes = ((grid.patches_per_view, *grid.crop_patches(self.layout.unpad)) for grid in self.grids)
        self.count, self.bias = sum(sizes, ()), None
        self.ids = valid.long().argsort(dim=1, descending=True, stable=True)
        self.sizes = torch.ones(hidden.shape[:2], device=hidden.device)
        return _take(hidden, self.ids)

    def _reduce(self, index: int, hidden: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """Ask the method what goes on to the MLP of layer `index`."""
        tokens = EncoderTokens(
            layer=index,
            depth=self.depth,
            hidden=hidden,
            queries=queries,
            keys=keys,
            bias=self.bias,
            ids=self.ids,
            side=self.grids[0].side,
            sizes=self.sizes,
            before=self.count,
            after=self.planned[index + 1],
        )
        merging = self.method.reduce_in_encoder(tokens)
        self.count = tokens.after
        order = merging.order[:, : max(self.count)]
        sizes = self.sizes if merging.sizes is None else merging.sizes
        self.ids, self.sizes = self.ids.gather(1, order), _take(sizes[..., None], order)[..., 0]
        self.bias = self._bias(hidden.dtype, merging.proportional)
        return _take(merging.hidden, order)

    def _bias(self, dtype: torch.dtype, proportional: bool) -> Tensor | None:
        """What attention adds to the logits of its keys, `[V, 1, 1, 1 + N']`; None where that is nothing."""
        if not proportional and min(self.count) == max(self.count):
            return None
        empty = torch.arange(self.sizes.shape[1], device=self.sizes.device) > column(self.count, self.sizes)
        bias = self.sizes.log() if proportional else torch.zeros_like(self.sizes)
        return bias.masked_fill(empty, torch.finfo(dtype).min).to(dtype)[:, None, None]


def _take(tokens: Tensor, order: Tensor) -> Tensor:
    """Bring [CLS] and the patches in slots `order [V, M]` of `[V, 1 + N', C]` into that order: `[V, 1 + M, C]`."""
    return tokens.take_along_dim(F.pad(order + 1, (1, 0))[..., None], 1)


@dataclass
class Session:
    """What was recorded inside the encoder, by layer as `Taps` names it; see `Views` for the shapes."""

    layers: nn.ModuleList
    taps: Taps
    shortening: Shortening | None = None
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
        left = [self._left(span, hidden.shape[1] - 1) for span in spans]
        return [
            Views(
                features=hidden[span, 1 : 1 + slots],
                grid=grid,
                cls_logits={layer: rows[span] for layer, rows in self.cls_logits.items()},
                keys={layer: keys[span] for layer, keys in self.keys.items()},
                cls=hidden[span, 0] if self.taps.cls_feature else None,
                layout=layout,
                ids=ids,
                valid=valid,  # type: ignore[arg-type]
            )
            for grid, span, (slots, ids, valid) in zip(grids, spans, left, strict=True)
        ]

    def _left(self, span: slice, slots: int) -> tuple[int, Tensor | None, Tensor | None]:
        """Slots an image needs, their patch ids and which of them hold a patch; None where the encoder left all."""
        if self.shortening is None:
            return slots, None, None
        count = self.shortening.count[span]
        ids = self.shortening.ids[span, : max(count)]
        return max(count), ids, torch.arange(max(count), device=ids.device) < column(count, ids)


@contextmanager
def attach(
    *,
    tower: Any,
    method: Compressor,
    depth: int | None = None,
    grids: Sequence[AnyResGrid] = (),
    layout: Layout = Layout(),  # noqa: B008 - frozen
) -> Iterator[Session]:
    """Let a method work in a CLIP encoder; every hook is gone afterwards, also after an error.

    Args:
        tower: transformers' `CLIPVisionModel`.
        method: its `taps` say what is recorded, nothing unasked is; its `encoder_points`, where it merges.
        depth: layers whose output the features are; None: all.
        grids: of the images whose views the encoder will get, in this order; for methods that merge.
        layout: the sequence format of the checkpoint; for methods that merge.

    Raises:
        InputError: the method cannot meet its ratio in an encoder of that depth.
    """
    session = Session(tower.encoder.layers, method.taps)
    shortening = Shortening(session.layers, method, len(session.layers) if depth is None else depth, grids, layout)

    def look(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            session.record(index, args[0] if args else kwargs["hidden_states"])

        return hook

    def shorten(index: int) -> Any:
        def forward(hidden_states: Tensor, attention_mask: None = None, **kwargs: Any) -> Tensor:
            return shortening.run(index, hidden_states)

        return forward

    with ExitStack() as hooks:
        hooks.enter_context(exclusive(session.layers))
        for index in session.tapped:
            handle = session.layers[index].register_forward_pre_hook(look(index), with_kwargs=True)
            hooks.callback(handle.remove)
        if shortening.points:
            session.shortening = shortening
            for index in range(shortening.points[0], len(session.layers)):
                hooks.callback(StandIn(session.layers[index], shorten(index)).leave)
        yield session


class StandIn:
    """A forward that is put in another's place, and leaves it in whatever order several of them come and go."""

    def __init__(self, module: nn.Module, forward: Callable[..., Tensor], name: str = "forward") -> None:
        """Take the place of `name`, an attribute of this instance or a method of its class."""
        self.module, self.forward, self.name = module, forward, name
        self.below = vars(module).get(name)  # somebody else's, if any
        self.gone = False
        setattr(module, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward; one that has left, and that somebody put back since, runs what it stood before."""
        if not self.gone:
            return self.forward(*args, **kwargs)
        if self.below is not None:
            return self.below(*args, **kwargs)
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    def leave(self) -> None:
        """Give the place back, as soon as nobody stands before it; what somebody else put there stays."""
        self.gone = True
        while isinstance(top := vars(self.module).get(self.name), StandIn) and top.gone:
            if top.below is None:
                delattr(self.module, self.name)
            else:
                setattr(self.module, self.name, top.below)
