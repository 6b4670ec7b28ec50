"""KV cache of what several prompts begin with, so that it is computed once."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from llava.compress.attach import exclusive
from llava.compress.pack import Packed
from llava.compress.tokens import on_device
from llava.model.splice import splice


@dataclass
class SharedPrefix:
    """The beginning of B prompts, already run through the language model.

    Holes in the mask are padding between a shorter beginning and what was appended to it; positions are counted
    without them, so a prompt's tokens stand where they would stand alone.
    """

    cache: DynamicCache
    mask: Tensor
    """`[B, P]`, 1 for a token."""
    lengths: list[int]
    """Tokens per row, padding not counted."""

    @classmethod
    def empty(cls, model: Any, rows: int) -> "SharedPrefix":
        """Start `rows` prompts from nothing."""
        mask = torch.zeros(rows, 0, dtype=torch.long, device=model.device)
        return cls(DynamicCache(config=model.config), mask, [0] * rows)

    def rows(self, indices: Sequence[int]) -> "SharedPrefix":
        """Copy the given rows, each as often as it is named; the original stays as it is."""
        chosen = on_device(indices, self.mask.device)
        cache = copy(self.cache)
        cache.layers = [copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(chosen)  # new tensors; layers only ever replace theirs
        return SharedPrefix(cache, self.mask[chosen], [self.lengths[i] for i in indices])

    def extend(self, model: Any, ids: Tensor, packed: Sequence[Packed] = ()) -> "SharedPrefix":
        """Run what comes next, ids `[B, L]` with the images of their placeholders; this prefix is used up."""
        with exclusive(model.get_model().layers):
            part = splice(ids.to(model.device), packed, model.get_model().embed_tokens, padding_side="left")
            whole = torch.cat((self.mask, part.attention_mask), 1)
            positions = (whole.cumsum(1) - 1).clamp_min(0)[:, self.mask.shape[1] :]
            model.get_model()(
                inputs_embeds=part.inputs_embeds,
                attention_mask=whole,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
            )
        lengths = [before + more for before, more in zip(self.lengths, part.lengths, strict=True)]
        return SharedPrefix(self.cache, whole, lengths)
