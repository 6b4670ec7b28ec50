"""FiCoCo-L (arXiv 2411.17686, §3.3): inside the language model, merge redundant image tokens into those they match."""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from llava.compress.base import Compressor
from llava.compress.merge import merge_into, merge_product, n_targets, target_weights
from llava.compress.stages import BUDGETS, TEXT, LayerSizes, LayerTokens, Product, Reduction, places_of
from llava.compress.tokens import percent_above, top_indices
from llava.constants import InputError, OutOfReach

CHUNK = 128
"""Rows of softmax attention held at once."""


class Reading(NamedTuple):
    """What is read differently in the paper's equations, the released code and here."""

    logits: bool = True
    """Correlate head-mean logits, unmasked; else head-mean causal attention, read from text to image."""
    mean_vision: bool = True
    """A token's redundancy is its mean over the image; else the sum."""
    mean_indirect: bool = True
    """The way through the text is a mean over it; else the sum."""
    weights: str = "softmax"
    normalise: bool = True
    """Merged tokens are weighted means; else sums, which grow."""


READINGS = {
    "corrected": Reading(),
    "released": Reading(mean_vision=False, mean_indirect=False, normalise=False),
    "paper": Reading(logits=False, weights="ratio"),
}


def redundancy(vision: Tensor, task: Tensor, beta: float, n: int, reading: Reading = READINGS["corrected"]) -> Tensor:
    """Return how dispensable tokens are (eq. 3): much seen in the image, little in the text.

    Args:
        vision: `[..., N]`, a token's mean over the image's tokens.
        task: `[..., N]`, its mean over the text's.
        beta: weight of the first.
        n: image tokens.
        reading: says whether the first is a mean.
    """
    return beta * vision * (1 if reading.mean_vision else n) - (1 - beta) * task


def correlation(
    direct: Tensor, out: Tensor, back: Tensor, gamma: float, reading: Reading = READINGS["corrected"]
) -> Tensor:
    """Return how well targets match sources (eq. 4), `[S, T]`: directly, and by way of the text.

    Args:
        direct: `[S, T]`, sources × targets.
        out: `[S, M]`, sources × text.
        back: `[M, T]`, text × targets.
        gamma: weight of the direct way.
        reading: says whether the way through the text is a mean.
    """
    indirect = out @ back
    if reading.mean_indirect:
        indirect = indirect / max(1, len(back))
    return gamma * direct + (1 - gamma) * indirect


class _Logits:
    """Head-mean logits of a layer, never more of them than asked for."""

    def __init__(self, tokens: LayerTokens) -> None:
        self.q, self.k = tokens.queries_keys()

    def means(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Every token's means over the keys of two sets, `[B, L]` each: products with the mean key."""

        def mean(chosen: Tensor) -> Tensor:
            keys = chosen.float()[:, None] @ self.k / chosen.sum(1).clamp_min(1)[:, None, None]  # [B, 1, H·d]
            return (self.q @ keys.mT)[..., 0]

        return mean(image), mean(text)

    def parts(self, row: int, sources: Tensor, targets: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `correlation` takes, given places in a row's sequence."""
        q, k = self.q[row], self.k[row]
        return q[sources] @ k[targets].T, q[sources] @ k[text].T, q[text] @ k[targets].T

    @staticmethod
    def products(sizes: LayerSizes, sources: int, targets: int, text: int) -> tuple[Product, ...]:
        """What both multiply."""
        n, q = sizes.tokens, sizes.heads * sizes.head_width
        means = (Product("mean keys", 1, n, q, 2), Product("means", n, q, 1, 2))
        pairs = {"direct": (sources, targets), "out": (sources, text), "back": (text, targets)}
        return (*means, *(Product(name, rows, q, columns) for name, (rows, columns) in pairs.items()))


class _Softmax:
    """Head-mean causal attention of a layer, some rows at a time."""

    def __init__(self, tokens: LayerTokens) -> None:
        self.attention, self.shape = tokens.attention, tokens.role.shape
        self.places = torch.arange(self.shape[1], device=tokens.role.device)

    def _rows(self, rows: Tensor, prompts: slice = slice(None)) -> Tensor:
        """Rows `[B, Q]` of all prompts or these, `[B, Q, L]`; padding has seen nothing."""
        return self.attention(rows, prompts=prompts).mean(1).nan_to_num()

    def means(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """What every token gives to the image, and what it receives from the text, as means; `[B, L]` each."""
        given, received = [], torch.zeros(self.shape, device=image.device)
        for rows in self.places.split(CHUNK):
            some = self._rows(rows.expand(len(text), -1))
            given.append((some @ image.float()[..., None])[..., 0])
            received = received + (text[:, None, rows].float() @ some)[:, 0]
        count = (chosen.sum(1, keepdim=True).clamp_min(1) for chosen in (image, text))
        return torch.cat(given, 1) / next(count), received / next(count)

    def parts(self, row: int, sources: Tensor, targets: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `correlation` takes; a source does not see the text behind it, so that way is read backwards."""
        alone = slice(row, row + 1)
        direct = [self._rows(rows[None], alone)[0][:, targets] for rows in sources.split(CHUNK)]
        back = [self._rows(rows[None], alone)[0] for rows in text.split(CHUNK)]
        seen = torch.cat(back) if back else direct[0].new_zeros(0, self.shape[1])
        return torch.cat(direct), seen[:, sources].T, seen[:, targets]

    @staticmethod
    def products(sizes: LayerSizes, sources: int, targets: int, text: int) -> tuple[Product, ...]:
        """What both multiply."""
        n = sizes.tokens
        return (*(sizes.attention(rows) for rows in (n, sources, text)), Product("means", 1, n, n, 2))


@dataclass(frozen=True, kw_only=True)
class FiCoCoL(Compressor):
    """Layer by layer, between attention and MLP, drop the most redundant image tokens and merge them into others.

    A token is redundant if it matches the image's other tokens well and the text badly. It goes, weighted, into the one
    or two image tokens that stay and match it best, directly or through the text, and these keep at least the share of
    one token in their mean. Newlines are image tokens here; text is never touched. The switches of the authors' README
    are fields: `r` (tokens merged per layer; left out, it follows from the retention ratio), `control_encoding_layer`
    (the last layer left whole) and `AT` (whether FiCoCo-L is on).

    Profiles: `paper` takes causal softmax attention where `corrected` takes logits, and weights by ratios where that
    takes a softmax; as no image token sees the text behind it, eq. 3 and 4 read what it receives from there. `released`
    is refused, because the released file does not parse; its formulas are `READINGS["released"]`.

    Differs from the released code in: the image's tokens are found per prompt (there: the first 576 of the sequence, so
    that part of the text before an image is merged, and as much of the image taken for text); redundancy is a mean
    over the image (a sum, next to which the text's mean is nothing); only tokens that stay are targets (all but the
    token itself: what goes into a dropped one is lost); the way through the text is a mean (a sum); merged tokens are
    weighted means (sums, which grow layer by layer); the position of new tokens is one behind the prompt's last in
    every layer (too low by r per layer); each prompt of a padded batch has its own choice (fails); all layers run on
    fused attention, and only the logits that are needed are computed (every map, without fusion).
    """

    name = "ficoco_l"
    paper = "arXiv 2411.17686"
    profiles = ("corrected", "paper")
    query_agnostic = False
    numbers = ("r",)
    llm_middle = True

    control_encoding_layer: int = 4
    """The last layer, from 0, that does not merge; -1: all merge."""
    AT: bool = True
    """Merge at all."""
    r: int | None = None
    """Tokens merged in every merging layer; None: what makes the retention ratio."""
    layers: int | None = None
    """How many layers merge; None: all to the last one."""
    budget: str = "layer_average"
    """What the retention ratio means: the mean over all layers, or what is left `after` all of them."""
    beta: float = 0.6
    """Weight of the image in a token's redundancy, against the text."""
    gamma: float = 0.6
    """Weight of the direct way in the correlation, against the way through the text."""
    epsilon: float = 0.998
    """Quantile of a token's correlations from which on others are its targets."""
    positions: str = "keep"
    """`keep` positions, with gaps, or `repack` them in every layer, as the authors do."""

    def __post_init__(self) -> None:
        """Refuse values that cannot mean anything."""
        if self.profile == "released":
            raise InputError(
                "ficoco_l cannot run as released: the authors' file does not parse (IndentationError) and imports "
                "files that were not published; choose the profile corrected or paper"
            )
        super().__post_init__()
        self._require("control_encoding_layer", int, -1, 10_000)
        for name in ("r", "layers"):
            if getattr(self, name) is not None:
                self._require(name, int, int(name == "layers"), 1_000_000)
        for name in ("beta", "gamma", "epsilon"):
            self._require(name, float, 0, 1)
        self._require_choice("budget", BUDGETS[:2])
        self._require_choice("positions", ("keep", "repack"))
        self._require_switch("AT")

    @property
    def llm_points(self) -> tuple[int, ...]:
        """The merging layers of 32."""
        return self.points_in(32)

    def points_in(self, depth: int) -> tuple[int, ...]:
        """Every merging layer."""
        first = self.control_encoding_layer + 1
        last = depth if self.layers is None else min(depth, first + self.layers)
        return tuple(range(first, last)) if self.AT else ()

    def visual_per_layer(self, n_visual: int, depth: int) -> tuple[int, ...]:
        """All up to the first merging layer, then in every layer fewer by what the layer before merged."""
        merged = self._merged(n_visual, depth)
        first = self.control_encoding_layer + 1
        return tuple(n_visual - merged[min(max(layer - first, 0), len(merged) - 1)] for layer in range(depth))

    def visual_left(self, n_visual: int, depth: int) -> int:
        """What the last merging layer leaves."""
        return n_visual - self._merged(n_visual, depth)[-1]

    def _merged(self, n: int, depth: int) -> list[int]:
        """Return how many of n tokens are gone behind 0, 1, … merging layers: as even a series as integers allow."""
        if not self.AT or not n:
            return [0] * (1 + len(self.points_in(depth)))
        points = self.points_in(depth)
        if not points:
            raise InputError(
                f"ficoco_l merges from layer {self.control_encoding_layer + 1} on, but the model has {depth} layers; "
                "lower control_encoding_layer"
            )
        if self.r is not None:
            if self.r * len(points) >= n:
                raise InputError(
                    f"ficoco_l with r={self.r} in {len(points)} layers merges {self.r * len(points)} tokens, but the "
                    f"image has {n}; set r to {(n - 1) // len(points)} at most"
                )
            return [self.r * layers for layers in range(len(points) + 1)]
        step = self._step(n, depth)
        return [round(step * layers) for layers in range(len(points) + 1)]

    def _step(self, n: int, depth: int) -> float:
        """Solve for the tokens merged per layer."""
        ratio, points = self.ratio, self.points_in(depth)
        most = (n - 1) / len(points)  # one token is left
        if self.budget == "after":
            return min((1 - ratio) * n / len(points), most)
        # Layers without one merged token count it once each: a token less from layer to layer, until all have merged.
        weight = sum(min(max(layer - points[0], 0), len(points)) for layer in range(depth))
        lowest = 1 - most * weight / (n * depth)
        if ratio < lowest - 1e-9:
            raise OutOfReach(
                f"ficoco_l merging in layers {points[0]} to {points[-1]} of {depth} keeps {lowest:.2%} of the image "
                f"tokens on average even if it merges all into one; ask for at least {percent_above(lowest)}, lower "
                "control_encoding_layer, merge early and at once with layers=1, or take budget='after'"
            )
        return (1 - ratio) * n * depth / weight if weight else 0.0

    def reduce_in_llm(self, tokens: LayerTokens) -> Reduction:
        """Filter, correlate, compress: every prompt on its own."""
        reading = READINGS[self.profile]
        place = tokens.layer - self.control_encoding_layer - 1
        merged = [self._merged(n, tokens.depth)[place : place + 2] for n in tokens.n_visual]
        before = [n - gone for n, (gone, _) in zip(tokens.n_visual, merged, strict=True)]
        after = tuple(n - gone for n, (_, gone) in zip(tokens.n_visual, merged, strict=True))
        text = tokens.role == TEXT
        look: _Logits | _Softmax = _Logits(tokens) if reading.logits else _Softmax(tokens)
        vision, task = look.means(tokens.image, text)  # [B, L]
        hidden, keep = tokens.hidden.clone(), torch.ones_like(tokens.image)
        for row, (n, kept) in enumerate(zip(before, after, strict=True)):
            if n == kept:
                continue
            image = places_of(tokens.image[row], n)  # [N]
            order = top_indices(redundancy(vision[row, image], task[row, image], self.beta, n, reading))
            sources, targets = order[: n - kept], order[n - kept :].sort().values
            words = places_of(text[row], tokens.n_text[row])
            scores = correlation(*look.parts(row, image[sources], image[targets], words), self.gamma, reading)
            ids, weights = target_weights(scores, n_targets(kept, self.epsilon), reading.weights)
            x = cast(Tensor, hidden[row, image])
            hidden[row, image] = merge_into(x, sources, targets[ids], weights, reading.normalise)
            keep[row, image[sources]] = False
        return Reduction(keep=keep, n_visual=after, hidden=hidden, positions=self.positions)

    def llm_products(self, sizes: LayerSizes) -> tuple[Product, ...]:
        """Every token's means over image and text, the correlation of what goes, and the merging."""
        place = sizes.layer - self.control_encoding_layer - 1
        before, after = (sizes.n_visual - gone for gone in self._merged(sizes.n_visual, sizes.depth)[place : place + 2])
        sources, look = before - after, _Logits if READINGS[self.profile].logits else _Softmax
        text = sizes.n_text if sources else 0  # nothing is correlated where nothing goes
        return (
            *look.products(sizes, sources, after, text),
            Product("indirect", sources, text, after),
            merge_product(before, sources, sizes.width),
        )
