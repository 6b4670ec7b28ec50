"""Operators: what one multiplies, computes and moves, and sums of them; the bricks that `flops` builds stages of.

Everything counts two operations (FLOPs) per multiply-accumulate (MAC). Operations that are no matrix product are
counted per element as LLM-Viewer (commit 472f71f) does: 5 for a softmax, 7 for a norm, 1 for an addition or an
activation, 2 for an activation with its product; 3 for a rotation.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

SOFTMAX, NORM, ADD, GATE, GELU, ROTATE = 5, 7, 1, 2, 1, 3
"""Operations per element of what is no matrix product."""


class Fusion(StrEnum):
    """Which intermediate results are written to memory and read back."""

    NONE = "unfused"
    """Every operator reads its inputs and writes its outputs; attention multiplies the whole T x T square."""
    ATTENTION = "flash"
    """Attention is one operator (FlashAttention): no T x T map is moved, and nothing computed that a mask hides."""
    ALL = "fused"
    """Norms, rotations, additions and activations cost nothing of their own, and inputs are read once: a bound."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operator, run once; bytes are those to and from the device's memory."""

    name: str
    macs: int = 0
    """Multiply-accumulates of matrix products."""
    other: int = 0
    """Operations that are no matrix product."""
    weights: int = 0
    """Bytes of weights read."""
    cache: int = 0
    """Bytes of keys and values written to or read from the KV cache."""
    activations: int = 0
    """Bytes of all other inputs read and outputs written."""
    times: int = 1
    """How often it runs; everything above is for once."""

    @property
    def flops(self) -> int:
        """Operations of one run, two per MAC."""
        return 2 * self.macs + self.other

    @property
    def bytes(self) -> int:
        """Bytes moved by one run."""
        return self.weights + self.cache + self.activations

    def repeated(self, times: int) -> "Op":
        """The operator, running so many times as often."""
        return replace(self, times=self.times * times)


Ops = tuple[Op, ...]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Sums over operators."""

    macs: int
    """Multiply-accumulates of matrix products."""
    flops: int
    """All operations, two per MAC."""
    weights: int
    """Bytes of weights read."""
    cache: int
    """Bytes moved to and from the KV cache."""
    activations: int
    """Bytes of activations moved."""

    @property
    def matmul_flops(self) -> int:
        """Operations of the matrix products alone: what torch's `FlopCounterMode` counts of unfused operators.

        On CPU it counts nothing of fused attention: choose the backend MATH.
        """
        return 2 * self.macs

    @property
    def bytes(self) -> int:
        """Bytes moved in all; this is traffic, not what must fit into memory (see `memory`)."""
        return self.weights + self.cache + self.activations


def total(ops: Iterable[Op]) -> Cost:
    """Sum operators up."""
    ops = tuple(ops)
    return Cost(
        macs=sum(op.macs * op.times for op in ops),
        flops=sum(op.flops * op.times for op in ops),
        weights=sum(op.weights * op.times for op in ops),
        cache=sum(op.cache * op.times for op in ops),
        activations=sum(op.activations * op.times for op in ops),
    )


def attention(
    heads: int, *, width: int, rows: int, stored: int, square: int, seen: int, element: int, fusion: Fusion
) -> Ops:
    """Attention of all heads.

    Args:
        heads: of the queries.
        width: of all queries together.
        rows: queries of all sequences.
        stored: bytes of all keys, and of all values.
        square: pairs of a query and a key.
        seen: those that no mask hides.
        element: bytes per number.
        fusion: what is moved.
    """
    across = rows * width * element
    if fusion is not Fusion.NONE:
        other = 0 if fusion is Fusion.ALL else SOFTMAX * heads * seen
        return (Op(name="attention", macs=2 * seen * width, other=other, cache=2 * stored, activations=2 * across),)
    maps = heads * square * element
    return (
        Op(name="q·k", macs=square * width, cache=stored, activations=across + maps),
        pointwise("softmax", heads * square, SOFTMAX, 2, element),
        Op(name="scores·v", macs=square * width, cache=stored, activations=maps + across),
    )


def linear(name: str, rows: int, inputs: int, outputs: int, element: int, bias: bool = False) -> Op:
    """A linear layer on `rows` tokens."""
    return Op(
        name=name,
        macs=rows * inputs * outputs,
        other=rows * outputs * bias,
        weights=(inputs + bias) * outputs * element,
        activations=rows * (inputs + outputs) * element,
    )


def pointwise(name: str, elements: int, operations: int, passes: int, element: int) -> Op:
    """What is computed element by element, or along rows, read and written `passes` times in all."""
    return Op(name=name, other=operations * elements, activations=passes * elements * element)


def matrix_products(ops: Iterable[Op]) -> Ops:
    """Leave out what hides in the neighbouring matrix products when everything is fused."""
    return tuple(replace(op, other=0) for op in ops if op.macs)
