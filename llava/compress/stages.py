"""What a method sees, does and costs between the layers of a model it is at work in: plain tensors, no modules."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

PAD, PREFIX, VISUAL, NEWLINE, TEXT = range(5)
"""What a token of the sequence is: padding, text before the first image, patch, newline, any other text."""


BUDGETS = ("layer_average", "after", "paper")
"""What a retention ratio can mean inside the language model; every method says what its `after` is."""
PAPER_TOKENS = 2880
"""Five views of 576 patches: GlobalCom²'s comparison takes ratios of them inside the language model."""


def places_of(chosen: Tensor, count: int) -> Tensor:
    """Return where the first `count` true entries of `chosen [..., L]` stand, in order; nothing is read back."""
    return (~chosen).long().argsort(dim=-1, stable=True)[..., :count]


@dataclass(frozen=True)
class Product:
    """A matrix product that a method runs itself, in float32: `times` times `[rows, inner] @ [inner, columns]`."""

    name: str
    rows: int
    inner: int
    columns: int
    times: int = 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all of them."""
        return self.times * self.rows * self.inner * self.columns


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """The sizes of `LayerTokens` of one prompt alone, of which follows what a method multiplies there."""

    layer: int
    depth: int
    """Layers of the language model."""
    tokens: int
    """L, with which the layer began."""
    n_visual: int
    """Image tokens, newlines included, that entered the language model."""
    n_text: int
    """TEXT tokens."""
    width: int
    """D."""
    heads: int
    """H, of the queries."""
    head_width: int
    """d."""

    def attention(self, rows: int) -> Product:
        """Return what `LayerTokens.attention` multiplies for so many rows."""
        return Product("rows", rows, self.head_width, self.tokens, self.heads)


def _unoffered() -> tuple[Tensor, Tensor]:
    raise RuntimeError("no queries and keys were given to these tokens")


@dataclass(frozen=True, kw_only=True)
class LayerTokens:
    """The sequence between two layers of the language model, or between the halves of one, at prefill."""

    layer: int
    """The layer that just ran, or whose attention just ran."""
    depth: int
    """Layers of the language model."""
    hidden: Tensor
    """`[B, L, D]`, its output, or the residual stream behind its attention."""
    role: Tensor
    """`[B, L]`: PAD, PREFIX, VISUAL, NEWLINE or TEXT."""
    n_visual: tuple[int, ...]
    """B numbers of image tokens, newlines included, that entered the language model."""
    attention: Callable[..., Tensor]
    """Rows `[B, Q]` -> attention of this layer, `[B, H, Q, L]` in float32, only these rows are computed.

    With a slice `prompts`, rows of these prompts alone."""
    queries_keys: Callable[[], tuple[Tensor, Tensor]] = _unoffered
    """-> this layer's queries and keys behind rotary embeddings, `[B, L, H·d]` in float32, heads side by side.

    They are scaled so that q_i · k_j is the mean over heads of the logits, before mask and softmax."""
    n_text: tuple[int, ...] = ()
    """B numbers of TEXT tokens; layers never change them."""
    entry: Tensor | None = None
    """`[B, L, D]`, what the first layer was given; L is that of the first point."""
    memo: dict[str, Tensor] = field(default_factory=dict)
    """What the method wrote down at earlier points of this forward."""

    @property
    def image(self) -> Tensor:
        """Bool `[B, L]`: the token belongs to an image; released in-LLM methods rank newlines like patches."""
        return (self.role == VISUAL) | (self.role == NEWLINE)


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """What goes on to the next layer."""

    keep: Tensor
    """Bool `[B, L]`; padding does not matter."""
    n_visual: tuple[int, ...]
    """B numbers of image tokens kept: they follow from sizes alone, so that nothing is read from the device."""
    positions: str = "keep"
    """`keep` the tokens' positions, with gaps, or `repack` them without."""
    hidden: Tensor | None = None
    """`[B, L, D]`, if tokens were merged: what stands in every slot from here on."""
    place: Tensor | None = None
    """Integers `[B, L]`: the order in which the kept go on, equal ones as they stood; None: all as they stood."""
