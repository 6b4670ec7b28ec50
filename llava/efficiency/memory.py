"""What must fit into a device's memory at once. Not to be confused with the bytes moved, which `ops` counts."""

from collections.abc import Sequence
from dataclasses import dataclass

from llava.constants import InputError
from llava.efficiency.devices import Device
from llava.efficiency.flops import every_layer, kv_bytes, prefill
from llava.efficiency.ops import Fusion
from llava.efficiency.shapes import Language, Model

RESERVE = 3e9
"""Bytes assumed to be taken by the driver, the framework and fragmentation."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that are occupied at the same time at the end of prefill."""

    weights: int
    """Tower, projector and language model, embedding and LM head included."""
    cache: int
    """The KV cache."""
    scratch: int
    """What the widest operator of prefill reads and writes, and the hidden states around it: frameworks hold more."""

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.scratch


def scratch_bytes(shape: Language, tokens: Sequence[int], *, batch: int = 1, fusion: Fusion = Fusion.ATTENTION) -> int:
    """Return the least that prefill needs beside weights and KV cache, in bytes.

    Two hidden states, the residual stream and the layer's normed input, and the widest operator's inputs and outputs:
    2Td + 3Tm elements where attention is fused, as the MLP's activation is the widest then.

    Args:
        shape: the language model.
        tokens: entering every layer.
        batch: sequences run at once.
        fusion: unfused attention holds its T x T maps.
    """
    widest = max(op.activations for op in prefill(shape, tokens, batch=batch, fusion=fusion))
    return 2 * batch * max(tokens) * shape.width * shape.element_bytes + widest


def footprint(
    model: Model,
    tokens: Sequence[int],
    *,
    cached: Sequence[int] | None = None,
    batch: int = 1,
    fusion: Fusion = Fusion.ATTENTION,
) -> Footprint:
    """Return what prefill occupies.

    Args:
        model: whose weights are held.
        tokens: entering every layer of the language model.
        cached: tokens in every layer's KV cache afterwards; None: the same.
        batch: sequences run at once.
        fusion: of the language model's operators.
    """
    return Footprint(
        weights=model.weight_bytes,
        cache=kv_bytes(model.language, tokens if cached is None else cached, batch),
        scratch=scratch_bytes(model.language, tokens, batch=batch, fusion=fusion),
    )


def largest_batch(
    model: Model, device: Device, prompt: int | Sequence[int], output: int = 0, reserve: float = RESERVE
) -> int:
    """Return how many sequences a device can decode at once, prefilled one by one with fused attention; 0: not one.

    Args:
        model: whose weights are held once.
        device: its capacity.
        prompt: tokens of every sequence, or the tokens entering every layer.
        output: tokens each will have produced.
        reserve: bytes that cannot be used.

    Raises:
        InputError: the sequences are empty.
    """
    shape = model.language
    tokens = every_layer(shape, prompt) if isinstance(prompt, int) else tuple(prompt)
    each = kv_bytes(shape, [count + output for count in tokens])
    if each <= 0:
        raise InputError(f"a sequence must have at least one token, got {prompt} and {output} more")
    free = device.capacity - model.weight_bytes - reserve - scratch_bytes(shape, tokens)
    return max(0, int(free // each))
