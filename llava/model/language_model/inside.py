"""Drops or merges image tokens inside the language model, for as long as a `with` block lasts.

Tokens are chosen once, at prefill. From then on the layers behind a point run on shorter hidden states and keep shorter
KV caches; each gets the mask and the positions of what it sees. Nothing is changed but the arguments of layer calls, so
that every attention implementation works as it does without. For points in the middle of a layer, the forward of that
layer instance is replaced meanwhile, its attention and its MLP running as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava.compress.attach import StandIn, exclusive
from llava.compress.base import Compressor
from llava.compress.stages import PAD, TEXT, LayerTokens, Reduction
from llava.model.splice import Spliced


@dataclass(kw_only=True)
class _Stage:
    """What a run of layers sees: all that are given the same tokens."""

    first: int
    """Its first layer."""
    role: Tensor
    """`[B, L]`, of all tokens so far."""
    positions: Tensor
    """`[B, L]`."""
    n_visual: tuple[int, ...]
    changed: dict[str, Any] | None = None
    """Arguments of the layers for the current call, where they are not the model's own."""


class _Look:
    """Queries and keys of one layer at prefill, caught from its own projections while it ran."""

    def __init__(self, attention: Any, rotary: tuple[Tensor, Tensor], role: Tensor) -> None:
        self.attention, self.rotary, self.role = attention, rotary, role
        self.caught: dict[str, Tensor] = {}
        """By projection, `[B, L, heads·d]` before rotary embeddings."""

    def _heads(self, projection: str) -> Tensor:
        return self.caught[projection].unflatten(-1, (-1, self.attention.head_dim)).transpose(1, 2)

    def _keys(self) -> Tensor:
        rotated = _rotate(self._heads("k_proj"), *self.rotary).float()
        return rotated.repeat_interleave(self.attention.num_key_value_groups, 1)

    @cached_property
    def keys(self) -> Tensor:
        """`[B, H, L, d]` in float32, for as long as rows are asked for."""
        return self._keys()

    def rows(self, rows: Tensor, prompts: slice = slice(None)) -> Tensor:
        """Attention of `rows [B, Q]` of some prompts, `[B, H, Q, L]` in float32."""
        at, role = rows[..., None], self.role[prompts]  # [B, Q, 1], [B, L]
        angles = (t.expand(len(self.role), -1, -1)[prompts] for t in self.rotary)
        cos, sin = (t.gather(1, at.expand(-1, -1, t.shape[-1])) for t in angles)
        q = self._heads("q_proj")[prompts]
        q = _rotate(q.gather(2, at[:, None].expand(-1, q.shape[1], -1, q.shape[3])), cos, sin)
        scores = (q.float() @ self.keys[prompts].mT) * self.attention.scaling  # [B, H, Q, L]
        places = torch.arange(role.shape[1], device=rows.device)
        seen = (places <= at) & (role != PAD)[:, None]  # [B, Q, L]
        return cast(Tensor, scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1))

    def queries_keys(self) -> tuple[Tensor, Tensor]:
        """Both `[B, L, H·d]` in float32, their products the head means of the logits."""
        q = _rotate(self._heads("q_proj"), *self.rotary).float()
        q = q * (self.attention.scaling / q.shape[1])
        return q.transpose(1, 2).flatten(2), self._keys().transpose(1, 2).flatten(2)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings `[B, L, d]` to `[B, heads, L, d]`."""
    return cast(Tensor, apply_rotary_pos_emb(states, states[:, :0], cos, sin)[0])


class Inside:
    """One generation: which tokens every layer sees."""

    def __init__(self, inner: Any, method: Compressor, prompts: Spliced) -> None:
        """Prepare for a prefill.

        Args:
            inner: transformers' `LlamaModel` or `MistralModel`.
            method: decides what is dropped.
            prompts: what the language model is going to get.

        Raises:
            InputError: the model has too few layers, or the ratio cannot be met in it.
        """
        self.inner, self.method = inner, method
        self.depth = len(inner.layers)
        self.points = method.checked_points(self.depth) if any(prompts.n_visual) else ()
        self.planned = [method.visual_per_layer(n, self.depth) for n in prompts.n_visual]
        """Image tokens of every layer, per row."""
        self._stages: list[_Stage] = []
        self._stage_of: dict[int, _Stage] = {}
        self._entry = _Stage(first=0, role=prompts.role, positions=prompts.position_ids, n_visual=prompts.n_visual)
        self._cache: Any = None
        self._embeds: Tensor | None = None
        self._n_text = prompts.n_text
        self._memo: dict[str, Tensor] = {}
        self._look: _Look | None = None

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
        if self._cache is None:
            self._cache = given["past_key_values"]
        if given["past_key_values"] is not self._cache:  # another run, of a streamer or a stopping criterion
            return hidden, given
        prefill = index not in self._stage_of
        if prefill:
            hidden = self._enter(index, hidden)
        stage = self._stage_of[index]
        if stage.first == index and not prefill:
            self._append(stage, hidden.shape[1])
        if stage.first == index and stage.first:
            stage.changed = self._arguments(stage, hidden, given["past_key_values"])
        given = given | (stage.changed or {})
        if prefill and index in self.points:
            self._look = _Look(self.inner.layers[index].self_attn, given["position_embeddings"], stage.role)
        return hidden, given

    def catch(self, projection: str, output: Tensor) -> None:
        """Take in what a projection of a layer at a point made."""
        if self._look is not None:
            self._look.caught[projection] = output

    def middle(self, hidden: Tensor) -> Tensor:
        """Return what a layer at a point goes on with behind its attention; only prefill changes it."""
        return hidden if self._look is None else self._reduce(hidden)

    def _enter(self, index: int, hidden: Tensor) -> Tensor:
        """Find the stage of a layer at prefill; behind a point it is a new one, and the sequence gets shorter."""
        if not index:
            self._stages.append(self._widened(len(hidden)))
            self._embeds = hidden
        elif self._look is not None:  # caught by the layer before, and not used in its middle
            hidden = self._reduce(hidden)
        self._stage_of[index] = self._stages[-1]
        return hidden

    def _widened(self, rows: int) -> _Stage:
        """Repeat every prompt for its beams."""
        entry, times = self._entry, rows // len(self._entry.role)
        entry.role, entry.positions = (t.repeat_interleave(times, 0) for t in (entry.role, entry.positions))
        entry.n_visual, self._n_text = (
            tuple(n for n in numbers for _ in range(times)) for numbers in (entry.n_visual, self._n_text)
        )
        return entry

    def _reduce(self, hidden: Tensor) -> Tensor:
        """Ask the method what goes on from the point that was just reached: `[B, L', D]`, padded on the left."""
        before, look, layer = self._stages[-1], self._look, max(self._stage_of)
        if look is None or self._embeds is None:
            raise RuntimeError("tokens can be reduced at an LLM point only")
        self._follow(hidden.device)
        tokens = LayerTokens(
            layer=layer,
            depth=self.depth,
            hidden=hidden,
            role=before.role,
            n_visual=self._stages[0].n_visual,
            attention=look.rows,
            queries_keys=look.queries_keys,
            n_text=self._n_text,
            entry=self._embeds,
            memo=self._memo,
        )
        reduction = self.method.reduce_in_llm(tokens)
        self._look = None
        if layer == self.points[-1]:
            self._embeds, self._memo = None, {}
        chosen, role = gather_kept(reduction, before.role, before.n_visual)
        positions = before.positions.gather(1, chosen)
        if reduction.positions == "repack":
            positions = ((role != PAD).cumsum(1) - 1).clamp_min(0)
        self._stages.append(_Stage(first=layer + 1, role=role, positions=positions, n_visual=reduction.n_visual))
        hidden = hidden if reduction.hidden is None else reduction.hidden
        return hidden.gather(1, chosen[..., None].expand(-1, -1, hidden.shape[-1]))

    def _follow(self, device: torch.device) -> None:
        """Bring what a method looks at to the device of the layer at a point: a model may lie on several."""
        before, look = self._stages[-1], self._look
        before.role, before.positions = before.role.to(device), before.positions.to(device)
        if look is not None:
            cos, sin = look.rotary
            look.rotary, look.role = (cos.to(device), sin.to(device)), before.role
        self._embeds = None if self._embeds is None else self._embeds.to(device)
        self._memo = {name: tensor.to(device) for name, tensor in self._memo.items()}

    def _append(self, stage: _Stage, new: int) -> None:
        """Take in the tokens of a decoding step: they follow the last of the prompt, whichever way it was counted."""
        role = torch.full_like(stage.role[:, :new], TEXT)
        stage.role = torch.cat((stage.role, role), 1)
        stage.positions = torch.cat((stage.positions, stage.positions[:, -1:] + role.bool().cumsum(1)), 1)

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
    if reduction.place is None:
        chosen = keep.long().argsort(stable=True, dim=1)[:, -length:]
    else:
        order = reduction.place.argsort(stable=True, dim=1)
        chosen = order.gather(1, keep.gather(1, order).long().argsort(stable=True, dim=1)[:, -length:])
    return chosen, role.gather(1, chosen).masked_fill(~keep.gather(1, chosen), PAD)


@contextmanager
def drop_inside(inner: Any, method: Compressor, prompts: Spliced) -> Iterator[Inside]:
    """Let a method drop tokens inside a language model; every hook is gone afterwards, also after an error.

    No other thread uses the language model's layers meanwhile. Arguments and errors are those of `Inside`.
    """
    session = Inside(inner, method, prompts)

    def look(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, changed = session.before(index, args[0], kwargs)
            return (hidden, *args[1:]), changed

        return hook

    def catch(projection: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            session.catch(projection, output)

        return hook

    with ExitStack() as hooks:
        hooks.enter_context(exclusive(inner.layers))
        for index, layer in enumerate(inner.layers if session.points else ()):
            hooks.callback(layer.register_forward_pre_hook(look(index), with_kwargs=True).remove)
            if index not in session.points:
                continue
            for name in ("q_proj", "k_proj"):
                projection = getattr(layer.self_attn, name)
                hooks.callback(projection.register_forward_hook(catch(name)).remove)
            if method.llm_middle:
                hooks.callback(_open(layer, session.middle).leave)
        yield session


def _open(layer: Any, middle: Callable[[Tensor], Tensor]) -> StandIn:
    """Run `middle` between attention and MLP of a decoder layer of Llama or Mistral."""
    # The forward of a layer that accelerate put on a device is accelerate's, and calls the layer's own by this name.
    return StandIn(layer, partial(_forward, layer, middle), "_old_forward" if hasattr(layer, "_hf_hook") else "forward")


def _forward(layer: Any, middle: Callable[[Tensor], Tensor], hidden_states: Tensor, **given: Any) -> Tensor:
    """Run a decoder layer as its own forward does, but for `middle`."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **given)
    hidden = middle(hidden_states + attended)
    return cast(Tensor, hidden + layer.mlp(layer.post_attention_layernorm(hidden)))
