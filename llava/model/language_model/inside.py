"""Drops image tokens between the layers of the language model, for as long as a `with` block lasts.

Tokens are chosen once, at prefill. From then on the layers behind a point run on shorter hidden states and keep shorter
KV caches; each gets the mask and the positions of what it sees. Nothing is changed but the arguments of layer calls, so
that every attention implementation works as it does without.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava.compress.base import PAD, TEXT, Compressor, LayerTokens, Reduction
from llava.constants import InputError


@dataclass(kw_only=True)
class _Stage:
    """What a run of layers sees: all that are given the same tokens."""

    first: int
    """Its first layer."""
    role: Tensor
    """`[B, L]`, of all tokens so far."""
    positions: Tensor
    """`[B, L]`."""
    repacked: bool
    n_visual: tuple[int, ...]
    changed: dict[str, Any] | None = None
    """Arguments of the layers for the current call, where they are not the model's own."""


class Inside:
    """One generation: which tokens every layer sees."""

    def __init__(self, inner: Any, method: Compressor, role: Tensor, n_visual: tuple[int, ...]) -> None:
        """Prepare for a prefill.

        Args:
            inner: transformers' `LlamaModel` or `MistralModel`.
            method: decides what is dropped.
            role: `[B, L]` of the prompts.
            n_visual: image tokens per row.

        Raises:
            InputError: the model has too few layers, or the ratio cannot be met in it.
        """
        self.inner, self.method, self.n_visual = inner, method, n_visual
        self.points, self.depth = method.llm_points, len(inner.layers)
        if self.points and self.points[-1] >= self.depth - 1:
            raise InputError(
                f"{method} drops tokens after layer {self.points[-1]}, but the model has {self.depth} layers; "
                "choose an earlier one"
            )
        self.planned = [method.visual_per_layer(n, self.depth) for n in n_visual]
        """Image tokens of every layer, per row."""
        positions = ((role != PAD).cumsum(1) - 1).clamp_min(0)
        self._stages: list[_Stage] = []
        self._stage_of: dict[int, _Stage] = {}
        self._entry = _Stage(first=0, role=role, positions=positions, repacked=False, n_visual=n_visual)
        self._input: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    @property
    def ran(self) -> list[tuple[int, ...]]:
        """Image tokens every layer ran on at prefill, per row."""
        if not self.points:
            return self.planned
        return list(zip(*(self._stage_of[layer].n_visual for layer in range(self.depth)), strict=True))

    def check(self) -> None:
        """Compare what ran with the plan.

        Raises:
            RuntimeError: the method did not do what it planned.
        """
        rows = len(self._stages[0].n_visual) // len(self.planned) if self._stages else 1
        planned = [plan for plan in self.planned for _ in range(rows)]
        if self.points and self.ran != planned:
            raise RuntimeError(f"{self.method} planned {planned} image tokens per layer, but ran on {self.ran}")

    def before(self, index: int, hidden: Tensor, given: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return hidden states and arguments for layer `index`, given those the model calls it with."""
        prefill = index not in self._stage_of
        if prefill:
            hidden = self._enter(index, hidden)
        stage = self._stage_of[index]
        if stage.first == index and not prefill:
            self._append(stage, given["position_ids"].expand(len(hidden), -1))
        if stage.first == index and stage.first:
            stage.changed = self._arguments(stage, hidden, given["past_key_values"])
        given = given | (stage.changed or {})
        if prefill and index in self.points:
            self._input = hidden, given["position_embeddings"]
        return hidden, given

    def _enter(self, index: int, hidden: Tensor) -> Tensor:
        """Find the stage of a layer at prefill; behind a point it is a new one, and the sequence gets shorter."""
        if not index:
            self._stages.append(self._widened(len(hidden)))
        elif index - 1 in self.points:
            hidden = self._reduce(index, hidden)
        self._stage_of[index] = self._stages[-1]
        return hidden

    def _widened(self, rows: int) -> _Stage:
        """Repeat every prompt for its beams."""
        entry, times = self._entry, rows // len(self._entry.role)
        entry.role, entry.positions = (t.repeat_interleave(times, 0) for t in (entry.role, entry.positions))
        entry.n_visual = tuple(n for n in entry.n_visual for _ in range(times))
        return entry

    def _reduce(self, index: int, hidden: Tensor) -> Tensor:
        """Ask the method what goes on to layer `index`: `[B, L', D]`, padded on the left."""
        before = self._stages[-1]
        tokens = LayerTokens(
            layer=index - 1,
            depth=self.depth,
            hidden=hidden,
            role=before.role,
            n_visual=self._stages[0].n_visual,
            attention=self._attention,
        )
        reduction = self.method.reduce_in_llm(tokens)
        self._input = None
        chosen, role = gather_kept(reduction, before.role, before.n_visual)
        positions = before.positions.gather(1, chosen)
        repacked = reduction.positions == "repack"
        if repacked:
            positions = ((role != PAD).cumsum(1) - 1).clamp_min(0)
        self._stages.append(
            _Stage(first=index, role=role, positions=positions, repacked=repacked, n_visual=reduction.n_visual)
        )
        return hidden.gather(1, chosen[..., None].expand(-1, -1, hidden.shape[-1]))

    def _append(self, stage: _Stage, positions: Tensor) -> None:
        """Take in the tokens of a decoding step, at `[B, 1]` unless the stage counts on its own."""
        stage.role = torch.cat((stage.role, torch.full_like(positions, TEXT)), 1)
        if stage.repacked:
            positions = stage.positions[:, -1:] + 1
        stage.positions = torch.cat((stage.positions, positions), 1)

    def _arguments(self, stage: _Stage, hidden: Tensor, cache: Any) -> dict[str, Any]:
        """Make mask and rotary embeddings of a stage for this call, in the form its attention wants."""
        positions = stage.positions[:, -hidden.shape[1] :]
        mask = create_causal_mask(
            config=self.inner.config,
            inputs_embeds=hidden,
            attention_mask=(stage.role != PAD).long(),
            past_key_values=cache,
            layer_idx=stage.first,
        )
        return {
            "attention_mask": mask,
            "position_ids": positions,
            "position_embeddings": self.inner.rotary_emb(hidden, position_ids=positions),
        }

    def _attention(self, rows: Tensor) -> Tensor:
        """Recompute rows `[B, Q]` of the attention of the layer that just ran: `[B, H, Q, L]` in float32."""
        if self._input is None:
            raise RuntimeError("attention can be asked for at an LLM point only")
        hidden, (cos, sin) = self._input
        stage = self._stages[-1]
        layer = self.inner.layers[max(self._stage_of)]
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        at = rows[..., None]
        q = attention.q_proj(normed.gather(1, at.expand(-1, -1, normed.shape[-1])))
        q, k = (x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in (q, attention.k_proj(normed)))
        width = cos.shape[-1]
        q, _ = apply_rotary_pos_emb(
            q, q, *(t.expand(len(rows), -1, -1).gather(1, at.expand(-1, -1, width)) for t in (cos, sin))
        )
        k, _ = apply_rotary_pos_emb(k, k, cos, sin)
        k = k.repeat_interleave(attention.num_key_value_groups, 1)
        scores = (q.float() @ k.float().transpose(2, 3)) * attention.scaling  # [B, H, Q, L]
        seen = (torch.arange(hidden.shape[1], device=rows.device) <= at) & (stage.role != PAD)[:, None]  # [B, Q, L]
        return cast(Tensor, scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1))


def gather_kept(reduction: Reduction, role: Tensor, n_visual: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return where the tokens that go on stand, `[B, L']`, in order and padded on the left, and their roles.

    Args:
        reduction: the choice.
        role: `[B, L]` before.
        n_visual: image tokens before, per row.
    """
    keep = reduction.keep & (role != PAD)
    dropped = [before - after for before, after in zip(n_visual, reduction.n_visual, strict=True)]
    # The row with the fewest dropped is not always the longest, but no row is longer than this.
    length = role.shape[1] - min(dropped)
    chosen = keep.long().argsort(stable=True, dim=1)[:, -length:]
    return chosen, role.gather(1, chosen).masked_fill(~keep.gather(1, chosen), PAD)


@contextmanager
def drop_inside(inner: Any, method: Compressor, role: Tensor, n_visual: tuple[int, ...]) -> Iterator[Inside]:
    """Let a method drop tokens inside a language model; every hook is gone afterwards, also after an error.

    Arguments and errors are those of `Inside`.
    """
    session = Inside(inner, method, role, n_visual)

    def look(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, changed = session.before(index, args[0], kwargs)
            return (hidden, *args[1:]), changed

        return hook

    with ExitStack() as hooks:
        for index, layer in enumerate(inner.layers if session.points else ()):
            hooks.callback(layer.register_forward_pre_hook(look(index), with_kwargs=True).remove)
        yield session
