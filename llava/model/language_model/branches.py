"""KV cache of prompts that go on from a common beginning, which is kept and read once for all of them.

A batch of U·R rows continues U beginnings, R rows each. A copy of the beginning's keys and values for every row would
cost R times the memory and, in decoding, R times the reading. Here the rows of a beginning are one sequence for
attention: their queries stand side by side, and a mask lets each row see the beginning and itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llava.compress.attach import exclusive

ATTENTION = "llava_branches"


class _Layer(DynamicLayer):
    """Keys or values `[U, H, P + T·R, D]`: the beginning, then step by step one token of each of the R rows."""

    def __init__(self, beginning: Any, rows: int) -> None:
        super().__init__()
        self.rows, self.shared = rows, beginning.get_seq_length()
        if beginning.is_initialized:
            self.lazy_initialization(beginning.keys, beginning.values)
            self.keys, self.values = beginning.keys, beginning.values  # only ever replaced, never written to

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append a step's keys and values `[U·R, H, L, D]`; returns all there are."""
        return super().update(fold(key_states, self.rows), fold(value_states, self.rows), *args, **kwargs)

    def get_seq_length(self) -> int:
        """Tokens a row sees."""
        own = self.keys.shape[-2] - self.shared if self.is_initialized and self.keys.numel() else 0
        return int(self.shared + own // self.rows)


class Branches(DynamicCache):
    """The cache of U·R rows that continue the U beginnings of another cache, which stays as it is."""

    def __init__(self, beginnings: Cache, rows: int) -> None:
        """Start R = `rows` rows from each of the beginnings; row r of beginning u is row u·R + r of the batch."""
        super().__init__()
        self.rows, self.shared = rows, beginnings.get_seq_length()
        self.layers = [_Layer(layer, rows) for layer in beginnings.layers]

    def visible(self, mask: Tensor | None, tokens: Any) -> Tensor:
        """Say which keys the next tokens may see.

        Args:
            mask: `[U·R, P + T]`, 1 for a token, the next ones included; None (transformers' shorthand): no padding.
            tokens: the next L of every row, ids `[U·R, L]` or embeddings `[U·R, L, C]`.

        Returns:
            `[U, 1, L·R, P + T·R]`, in the order of the layers.
        """
        length = tokens.shape[1]
        if mask is None:
            mask = torch.ones(len(tokens), self.get_seq_length() + length, device=tokens.device)
        mask = mask.bool().unflatten(0, (-1, self.rows))  # [U, R, P + T]
        units, rows, _ = mask.shape
        shared, own = mask[:, None, :, : self.shared], mask[:, None, :, self.shared :]
        steps = torch.arange(own.shape[-1], device=mask.device)  # [T]
        now = steps[len(steps) - length :, None]  # [L, 1]
        # Padding sees itself, since a softmax over nothing is not a number; nobody sees padding.
        own = (own & (steps <= now)[:, None]) | (steps == now)[:, None]  # [U, L, R, T]
        same = torch.eye(rows, dtype=torch.bool, device=mask.device)[:, None]  # [R, 1, R]
        own = (own[..., None] & same).flatten(3)  # [U, L, R, T·R]
        seen = torch.cat((shared.expand(units, length, rows, -1), own), -1)
        return seen.flatten(1, 2)[:, None]


def fold(states: Tensor, rows: int) -> Tensor:
    """Put the rows of every beginning side by side, step by step: `[U·R, H, L, D]` to `[U, H, L·R, D]`."""
    return states.unflatten(0, (-1, rows)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA of queries `[U·R, H, L, D]` on the keys and values of `Branches`."""
    rows = len(query) // len(key)
    output, _ = sdpa_attention_forward(module, fold(query, rows), key, value, attention_mask, **kwargs)
    return output.unflatten(1, (-1, rows)).transpose(1, 2).flatten(0, 1), None  # [U·R, L, H, D]


AttentionInterface.register(ATTENTION, _attend)


@contextmanager
def branching(inner: Any) -> Iterator[None]:
    """Let the layers of a language model attend to `Branches`, whatever attention they run on otherwise.

    The config stays as it is, as other models may share it; no other thread uses the layers meanwhile.

    Args:
        inner: transformers' `LlamaModel` or `MistralModel`.
    """
    with exclusive(inner.layers):
        attentions = [layer.self_attn for layer in inner.layers]
        before = [attention.config for attention in attentions]
        branched = copy(inner.config)
        branched._attn_implementation = ATTENTION
        try:
            for attention in attentions:
                attention.config = branched
            yield
        finally:
            for attention, config in zip(attentions, before, strict=True):
                attention.config = config
