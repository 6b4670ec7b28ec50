"""Merging inside CLIP once more, one view and one token at a time: plain loops that run the layers by hand.

Nothing of `llava` is imported. What the released FiCoCo-V does differently is here as well, each slip by itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CLS = -1


@dataclass
class Token:
    """One token of one view."""

    patch: int
    x: Tensor
    size: float = 1.0
    q: Tensor = field(default_factory=lambda: torch.empty(0))
    """`[H, d]`"""
    k: Tensor = field(default_factory=lambda: torch.empty(0))


Step = Callable[[list[Token], list[Token]], list[Token]]
"""From the tokens that take part, and all that the layer's attention saw, to those that are left."""


def encode(clip: Any, pixels: Tensor, valid: Sequence[bool], steps: dict[int, Step], proportional: bool) -> list[Token]:
    """Encode one view `[3, S, S]` up to behind the last step, [CLS] first; padding leaves at the first step."""
    x = clip.pre_layrnorm(clip.embeddings(pixels[None]))[0]
    tokens = [Token(index - 1, row) for index, row in enumerate(x)]
    for index in range(max(steps) + 1):
        layer = clip.encoder.layers[index]
        attend(layer, tokens, proportional)
        if index in steps:
            tokens = steps[index]([t for t in tokens if t.patch == CLS or valid[t.patch]], tokens)
        for token in tokens:
            token.x = token.x + layer.mlp(layer.layer_norm2(token.x))
    return tokens


def attend(layer: Any, tokens: list[Token], proportional: bool) -> None:
    """Attention and its residual, head by head; leaves every token's query and key behind."""
    attention = layer.self_attn
    heads = attention.num_heads
    values = []
    for token in tokens:
        normed = layer.layer_norm1(token.x)
        token.q, token.k = attention.q_proj(normed).view(heads, -1), attention.k_proj(normed).view(heads, -1)
        values.append(attention.v_proj(normed).view(heads, -1))
    out = []
    for token in tokens:
        mixed = []
        for head in range(heads):
            logits = [float(token.q[head] @ other.k[head]) / math.sqrt(len(token.q[head])) for other in tokens]
            if proportional:
                logits = [logit + math.log(other.size) for logit, other in zip(logits, tokens, strict=True)]
            weights = torch.tensor(logits).softmax(0)
            mixed.append(sum(w * value[head] for w, value in zip(weights, values, strict=True)))
        out.append(token.x + attention.out_proj(torch.cat(mixed)))
    for token, x in zip(tokens, out, strict=True):
        token.x = x


# --- ToMe ------------------------------------------------------------------------------------------------------------


def tome(r: int) -> Step:
    """Bipartite soft matching of r pairs."""

    def step(tokens: list[Token], seen: list[Token]) -> list[Token]:
        evens, odds = tokens[0::2], tokens[1::2]

        def likeness(a: Token, b: Token) -> float:
            x, y = a.k.mean(0), b.k.mean(0)
            return float(x @ y / x.norm() / y.norm())

        best = {}
        for place, even in enumerate(evens):
            if even.patch != CLS:
                found = [likeness(even, odd) for odd in odds]
                best[place] = (max(found), found.index(max(found)))
        gone = sorted(best, key=lambda place: -best[place][0])[: min(r, (len(tokens) - 1) // 2)]
        joined = {place: [odds[place]] for place in range(len(odds))}
        for place in gone:
            joined[best[place][1]].append(evens[place])
        for place, group in joined.items():
            total = sum(t.size for t in group)
            x = sum(t.size * t.x for t in group) / total
            odds[place] = Token(odds[place].patch, x, total)
        return [even for place, even in enumerate(evens) if place not in gone] + odds

    return step


# --- FiCoCo-V --------------------------------------------------------------------------------------------------------


def logit(a: Token, b: Token) -> float:
    """Scaled q·k, mean over heads."""
    return float((a.q * b.k).sum(1).mean()) / math.sqrt(a.q.shape[1])


def attention(a: Token, b: Token, tokens: list[Token]) -> float:
    """Softmax attention of a to b, mean over heads."""
    rows = torch.stack([torch.stack([(a.q[h] @ t.k[h]) for t in tokens]) for h in range(len(a.q))])
    place = next(i for i, t in enumerate(tokens) if t is b)
    return float((rows / math.sqrt(a.q.shape[1])).softmax(1)[:, place].mean())


def penalised(scores: dict[int, float], side: int, factor: float) -> dict[int, float]:
    """The first highest score of every 2×2 window, made higher."""
    found = dict(scores)
    for top in range(0, side - 1, 2):
        for left in range(0, side - 1, 2):
            window = [y * side + x for y in (top, top + 1) for x in (left, left + 1)]
            window = [patch for patch in window if patch in scores]
            if window:
                best = max(window, key=lambda patch: (scores[patch], -patch))
                found[best] = scores[best] * factor if scores[best] > 0 else scores[best] / factor
    return found


def chosen(row: Sequence[float], epsilon: float) -> list[int]:
    """Places of a row that reach its ε-quantile."""
    threshold = float(torch.quantile(torch.tensor(row, dtype=torch.float64), epsilon))
    return [i for i, value in enumerate(row) if value >= threshold - 1e-12]


def ficoco_v(r: int, side: int, *, paper: bool = False, epsilon: float = 0.998) -> Step:
    """One step: filter r patches, correlate, compress."""

    def step(tokens: list[Token], seen: list[Token]) -> list[Token]:
        cls, patches = tokens[0], tokens[1:]
        if not r:
            return tokens

        def weight(a: Token, b: Token) -> float:
            return attention(a, b, seen) if paper else logit(a, b)

        vision = [sum(weight(a, b) for b in patches) / len(patches) for a in patches]
        semantic = [weight(cls, a) for a in patches]
        if not paper:
            vision, semantic = ([v / math.sqrt(sum(w * w for w in term)) for v in term] for term in (vision, semantic))
        share = 0.35 if paper else 0.65
        scores = {t.patch: share * v - (1 - share) * a for t, v, a in zip(patches, vision, semantic, strict=True)}
        scores = penalised(scores, side, 2.0)
        gone = sorted(patches, key=lambda t: (-scores[t.patch], t.patch))[:r]
        stay = [t for t in patches if all(t is not g for g in gone)]
        total = {t.patch: t.x.clone() for t in stay}
        taken = {t.patch: 1.0 for t in stay}
        for source in gone:
            row = [weight(source, target) for target in stay]
            places = chosen(row, epsilon)
            parts = [row[p] if paper else math.exp(row[p]) for p in places]
            for place, part in zip(places, parts, strict=True):
                total[stay[place].patch] += part / sum(parts) * source.x
                taken[stay[place].patch] += part / sum(parts)
        return [cls, *(Token(t.patch, total[t.patch] / taken[t.patch]) for t in stay)]

    return step


# --- what the released FiCoCo-V does differently ---------------------------------------------------------------------


def released_order(keep: Sequence[float], r: int) -> tuple[list[int], list[int]]:
    """Which of the patches 1… go, and the order of what is left: by worth, and [CLS] (0), of endless worth, last."""
    ranked = sorted(range(1 + len(keep)), key=lambda i: math.inf if i == 0 else keep[i - 1])
    return ranked[:r], ranked[r:]


def released_places(left: Sequence[int], targets: Sequence[int], r: int) -> list[int]:
    """Where what is meant for `targets` really goes: their old places are looked up among the sorted survivors."""
    return [left[t if t < len(left) else t - r] for t in targets]


def released_penalty(scores: Sequence[float], side: int, buffer: list[float]) -> list[float]:
    """The penalty with its buffer: never emptied, and it forgets the promoted places instead of those that went."""
    plane = {i: score for i, score in enumerate(scores) if buffer[i] != math.inf}
    found = penalised(plane, side, 2.0)
    for place, score in found.items():
        if score != plane[place]:
            buffer[place] = math.inf
    return [found.get(i, score) for i, score in enumerate(scores)]
