"""SparseVLM (arXiv 2410.04417): drop image tokens at three layers by the attention of the words that ask about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from llava.compress.base import Compressor
from llava.compress.stages import BUDGETS, PAPER_TOKENS, TEXT, LayerSizes, LayerTokens, Product, Reduction, places_of
from llava.compress.tokens import percent_above, top_indices
from llava.constants import InputError, OutOfReach

PUBLISHED = {64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110)}
"""Tokens that the released lists keep of 576 at their three layers, by the mean count they are named after."""
PATCHES = 576
CHUNK = 64
"""Text tokens whose attention is held at once."""
CLOSE = 0.0025
"""The published shares are taken where they miss the requested mean by no more than this share of the tokens."""


def raters(image: Tensor, text: Tensor) -> Tensor:
    """Return which text tokens speak of the image: bool `[M]`.

    Every image token shares itself out among the text by a softmax over dot products; those rate that get more than the
    mean. Where none does, all rate.

    Args:
        image: `[N, D]`, input embeddings.
        text: `[M, D]`, the same of the text.
    """
    relevance = (image.float() @ text.float().T).softmax(-1).mean(0)
    chosen = relevance > relevance.mean()
    return chosen | ~chosen.any()


def recycled(dropped: int) -> tuple[int, int]:
    """Return how many of the dropped tokens live on, and in how many clusters."""
    if not dropped:
        return 0, 0
    some = int(0.3 * dropped) + 1
    return some, int(some / 10) + 1


def density_peaks(x: Tensor, clusters: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cluster tokens around density peaks (DPC-kNN, with as many neighbours as clusters).

    Args:
        x: `[M, D]`.
        clusters: how many, at most M.
        noise: `[M]`, added to the densities; without, of equally dense tokens the lower one counts as denser.

    Returns:
        Indices of the centres, best first, `[c]`, and every token's cluster, `[M]`.
    """
    x = x.float()
    # The fast way subtracts squares, after which a token is not at distance 0 from itself.
    apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    density = (-apart.topk(clusters, dim=1, largest=False).values.square().mean(1)).exp()
    density = density if noise is None else density + noise
    rank = top_indices(density).argsort()
    denser = density[None] > density[:, None] if noise is not None else rank[None] < rank[:, None]
    lonely = torch.where(denser, apart, apart.max()).amin(1)
    centres = top_indices(lonely * density)[:clusters]
    nearest = apart[:, centres].argsort(dim=1, stable=True)[:, 0]
    return centres, nearest.scatter(0, centres, torch.arange(clusters, device=x.device))


def cluster_means(x: Tensor, cluster: Tensor, clusters: int, epsilon: float = 0.0) -> Tensor:
    """Return the mean of every cluster's tokens, `[c, D]` in float32; epsilon is added to their number."""
    member = torch.nn.functional.one_hot(cluster, clusters).float().T  # [c, M]
    return (member @ x.float()) / (member.sum(1, keepdim=True) + epsilon)


@dataclass(frozen=True, kw_only=True)
class SparseVLM(Compressor):
    """Behind three layers, keep the image tokens that the raters attended to most, and a few clusters of the others.

    Raters are the prompt's words that match the image best, chosen once, on the input embeddings. The best third of
    what is dropped is clustered, and the clusters' means go on behind the kept image tokens. How many tokens are kept
    where has the shape of the published lists; a solver scales it to the ratio, the image and the model's depth.

    Profiles: `released` takes the published lists themselves, whatever the image, for the four ratios they were
    published for; it adds noise to the densities and 1e-6 to cluster sizes. There is no `paper`: it computes the number
    of tokens from the rank of an attention map, with a scale per budget that it does not state, so that the count would
    depend on the image's content and meet no ratio; the released code gave it up as well.

    Differs from the released code in: counts follow from the requested ratio for any image, AnyRes included (there:
    four lists for 576 tokens; LLaVA-NeXT fails); a layer counts by the tokens that it runs on (by those it puts out, so
    that "192" runs on 206.5 on average; that convention is budget='after'); no noise decides between equally dense
    tokens (other seeds, other tokens); padded batches and beams (batch 1, greedy search only); all layers run on fused
    attention. Its later version 2, without clusters and with original positions, is `recycle=False, positions="keep"`
    (but for the heads that it leaves out).
    """

    name = "sparsevlm"
    paper = "arXiv 2410.04417"
    profiles = ("corrected", "released")
    query_agnostic = False

    layers: tuple[int, ...] = (2, 6, 15)
    """Layers, from 0, behind which tokens are dropped."""
    budget: str = "layer_average"
    """What the retention ratio means: the mean over layers of what they run on; of what is left `after` them (the
    authors'); or the latter with the ratio of `full`, whatever the image (GlobalCom²'s `paper`)."""
    full: int = PAPER_TOKENS
    """What the ratio is of under budget='paper': five times the patches of a view."""
    recycle: bool = True
    """Let clusters of dropped tokens go on."""
    positions: str = "repack"
    """`repack` positions, as the authors do, or `keep` them; a cluster then stands where its centre stood."""
    seed: int = 0
    """Of the noise of `released`."""

    def __post_init__(self) -> None:
        """Refuse values that cannot mean anything."""
        super().__post_init__()
        layers = self.layers
        numbers = isinstance(layers, tuple) and all(type(layer) is int for layer in layers)
        if not numbers or not layers or sorted({*layers}) != [*layers] or layers[0] < 0:
            raise InputError(f"sparsevlm's layers must be ascending layer numbers, got {layers!r}")
        if self.profile == "released" and len(layers) != 3:
            raise InputError(f"sparsevlm's released lists are for three layers, got {layers!r}")
        self._require("full", int, 1, 1_000_000)
        self._require("seed", int, 0, 2**63 - 1)
        self._require_choice("budget", BUDGETS)
        self._require_choice("positions", ("repack", "keep"))
        self._require_switch("recycle")

    @property
    def llm_points(self) -> tuple[int, ...]:
        """After the layers named."""
        return self.layers

    def visual_per_layer(self, n_visual: int, depth: int) -> tuple[int, ...]:
        """All up to the first layer named, then what is kept and the clusters."""
        if self.layers[-1] >= depth - 1:
            raise InputError(f"sparsevlm drops tokens behind layers {self.layers} of {depth}; choose earlier layers")
        counts = self._counts(n_visual, self._kept(n_visual, depth))
        return tuple(counts[sum(point < layer for point in self.layers)] for layer in range(depth))

    def _counts(self, n: int, kept: Sequence[int]) -> list[int]:
        """Return the tokens before the first point and behind every point, clusters included."""
        counts = [n]
        for keep in kept:
            left, _, clusters = self._split(counts[-1], keep)
            counts.append(left + clusters)
        return counts

    def _split(self, n: int, keep: int) -> tuple[int, int, int]:
        """Return how many of n tokens a point keeps, how many others live on, and in how many clusters."""
        left = min(keep, n)
        return left, *(recycled(n - left) if self.recycle else (0, 0))

    def _mean(self, n: int, kept: Sequence[int], depth: int) -> float:
        """Return the mean over layers, of what they run on, or of what they put out."""
        late = int(self.budget == "layer_average")
        edges = [0, *(layer + late for layer in self.layers), depth]
        spans = [end - start for start, end in pairwise(edges)]
        return sum(span * count for span, count in zip(spans, self._counts(n, kept), strict=True)) / depth

    def _kept(self, n: int, depth: int) -> tuple[int, ...]:
        """Return how many tokens every point keeps, clusters not counted."""
        if not n:
            return (0,) * len(self.layers)
        ratio = self.ratio
        if self.profile == "released":
            kept = PUBLISHED.get(round(ratio * PATCHES))
            if kept is None:
                known = ", ".join(f"{count}/{PATCHES}" for count in PUBLISHED)
                raise InputError(f"sparsevlm's released lists are for ratios of {known}, got {ratio:g}; take corrected")
            return self._below(n, kept)
        target = min(n, ratio * self.full) if self.budget == "paper" else ratio * n
        shares = partial(_shares, points=len(self.layers))
        mean = partial(self._mean, n, depth=depth)

        def scaled(nominal: float) -> tuple[int, ...]:
            return tuple(round(share * n) for share in shares(nominal))

        low, high = 0.0, 1.0
        if abs(mean(scaled(target / n)) - target) <= CLOSE * n:
            return scaled(target / n)
        if (lowest := mean(scaled(low))) > target + 1e-9 * n:
            raise OutOfReach(
                f"sparsevlm behind layers {self.layers} of {depth} keeps {lowest / n:.2%} of the image tokens on "
                f"average even if it drops all it can; ask for at least {percent_above(lowest / n)}, or take earlier "
                "layers, recycle=False or budget='after'"
            )
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if mean(scaled(middle)) <= target else (low, middle)
        return min(scaled(low), scaled(high), key=lambda kept: abs(mean(kept) - target))

    def _below(self, n: int, kept: tuple[int, ...]) -> tuple[int, ...]:
        """Keep one token less than there are at most, as the released code does."""
        left: list[int] = []
        for keep in kept:
            left.append(min(keep, self._counts(n, left)[-1] - 1))
        return tuple(left)

    def reduce_in_llm(self, tokens: LayerTokens) -> Reduction:
        """Rank the image tokens and cluster what falls behind."""
        point = self.layers.index(tokens.layer)
        kept = [self._kept(n, tokens.depth) for n in tokens.n_visual]
        counts = [self._counts(n, keep) for n, keep in zip(tokens.n_visual, kept, strict=True)]
        scores = self._scores(tokens, [count[point] for count in counts])
        hidden, keep = tokens.hidden.clone(), ~tokens.image
        places = torch.arange(keep.shape[1], device=keep.device)
        place = places.repeat(len(keep), 1) * (1 + len(places))  # room for clusters behind every token
        for row, count in enumerate(counts):
            left, some, clusters = self._split(count[point], kept[row][point])
            order = top_indices(scores[row], tokens.image[row])
            keep[row, order[:left]] = True
            if clusters:
                again = order[left : left + some].sort().values
                centres, means = self._clusters(hidden[row, again], clusters)
                slots = again[centres]
                behind = place[row, places_of(tokens.image[row], count[point])[-1:]]
                hidden[row, slots], keep[row, slots] = means.to(hidden.dtype), True
                place[row, slots] = behind + 1 + places[:clusters]
        return Reduction(
            keep=keep,
            n_visual=tuple(count[point + 1] for count in counts),
            hidden=hidden,
            place=place if self.positions == "repack" else None,
            positions=self.positions,
        )

    def llm_products(self, sizes: LayerSizes) -> tuple[Product, ...]:
        """At the first point the raters; everywhere the text's rows, their mean over the raters, and the clusters."""
        point = self.layers.index(sizes.layer)
        kept = self._kept(sizes.n_visual, sizes.depth)
        n = self._counts(sizes.n_visual, kept)[point]
        _, some, clusters = self._split(n, kept[point])
        return (
            Product("raters", n * (point == 0), sizes.width, sizes.n_text),
            sizes.attention(sizes.n_text),
            Product("scores", 1, sizes.n_text, sizes.tokens),
            Product("clusters", clusters, some, sizes.width),
        )

    def _clusters(self, x: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
        """Return centres and means of tokens `[M, D]`."""
        noise, epsilon = None, 0.0
        if self.profile == "released":
            draw = torch.Generator().manual_seed(self.seed)
            noise, epsilon = (torch.rand(len(x), generator=draw) * 1e-6).to(x.device), 1e-6
        centres, cluster = density_peaks(x, clusters, noise)
        return centres, cluster_means(x, cluster, clusters, epsilon)

    def _scores(self, tokens: LayerTokens, n_visual: Sequence[int]) -> Tensor:
        """Return the mean attention of the raters, `[B, L]`."""
        text = places_of(tokens.role == TEXT, max(tokens.n_text))  # [B, M]
        if "raters" not in tokens.memo:
            tokens.memo["raters"] = self._raters(tokens, text, n_visual)
        weight = tokens.memo["raters"]
        scores = torch.zeros(tokens.role.shape, device=tokens.role.device)
        for rows, share in zip(text.split(CHUNK, 1), weight.split(CHUNK, 1), strict=True):
            # Rows that stand for no text may be padding, which attends to nothing.
            scores = scores + (share[:, None] @ tokens.attention(rows).mean(1).nan_to_num())[:, 0]
        return scores

    def _raters(self, tokens: LayerTokens, text: Tensor, n_visual: Sequence[int]) -> Tensor:
        """Return the weight of every text token, `[B, M]`: the same for all raters of a prompt, 0 for the others."""
        if tokens.entry is None:
            raise ValueError("sparsevlm chooses its raters on the input embeddings; these tokens have none")
        weight = torch.zeros(text.shape, device=text.device)
        for row, (n, m) in enumerate(zip(n_visual, tokens.n_text, strict=True)):
            if n and m:
                entry = tokens.entry[row]
                chosen = raters(entry[places_of(tokens.image[row], n)], entry[text[row, :m]]).float()
                weight[row, :m] = chosen / chosen.sum()
        return weight


def _shares(nominal: float, points: int) -> list[float]:
    """Return the shares of the tokens kept at every point: published ones at their nominal mean, lines between them."""
    anchors = {count / PATCHES: [keep / PATCHES for keep in kept] for count, kept in PUBLISHED.items()}
    anchors |= {0.0: [0.0] * 3, 1.0: [1.0] * 3}
    grid = sorted(anchors)
    above = next(index for index, mean in enumerate(grid) if mean >= nominal)
    low, high = grid[max(above - 1, 0)], grid[above]
    lean = (nominal - low) / (high - low) if high > low else 0.0
    three = [a + lean * (b - a) for a, b in zip(anchors[low], anchors[high], strict=True)]
    # Other numbers of points read the same curve elsewhere.
    at = [2 * index / (points - 1) if points > 1 else 1.0 for index in range(points)]
    return [three[int(x)] + (x - int(x)) * (three[min(int(x) + 1, 2)] - three[int(x)]) for x in at]
