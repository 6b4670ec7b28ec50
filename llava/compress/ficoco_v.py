"""FiCoCo-V (arXiv 2411.17686): inside the encoder, filter redundant patches, correlate them with the others, compress.

Where the steps are:
    filter      `FiCoCoV._redundancy` (the two terms), `redundancy` (their balance), `promote` (the local penalty)
    correlate   `FiCoCoV._correlation`
    compress    `FiCoCoV._compress` (with `compress.merge`)
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.compress.encoding import EncoderSizes, EncoderTokens, InEncoder, Merging, column
from llava.compress.merge import merge_into, merge_product, n_targets, target_weights
from llava.compress.stages import Product
from llava.compress.tokens import top_indices, unit
from llava.constants import InputError

WINDOW = 2
WEIGHTS = {"corrected": 0.65, "paper": 0.35}


@dataclass(frozen=True, kw_only=True)
class FiCoCoV(InEncoder):
    """In each layer of the second half, merge the r most redundant patches into those they attend to most.

    Redundant is a patch that attends to the other patches and that [CLS] does not attend to; in every 2×2 window the
    most redundant one is twice as much so. What is merged is shared out over the few targets that reach the
    ε-quantile of its attention, one or two: a target is the mean of itself and the shares it takes in.

    `corrected` and the released code read attention as logits averaged over heads, `paper` as probabilities, with
    weights as printed; its vision term is then nearly the same for every patch. There is no profile `released`: the
    code's penalty depends on every image the process saw before, and it fails on several views and in half precision.

    Differs from the released code in (profile `corrected`): the penalty is that of this image, at the patches' true
    places; a merged patch reaches the targets it chose; targets are patches that stay, never itself, [CLS] or one that
    goes; survivors stay in raster order behind [CLS], so that [CLS] is what later layers read as such; padding is
    dropped first and takes no part; views and images do not share indices; r follows from the retention ratio, for
    every view its own; any grid, batch and dtype runs. `paper` shares all of these.
    """

    name = "ficoco_v"
    paper = "arXiv 2411.17686"
    profiles = ("corrected", "paper")
    encoder_reads = ("[CLS] attention", "patch attention")

    control_encoding_layer: int | None = None
    """The last layer that runs on everything (the authors' 11 of 24); None: half of those that run."""
    merge_visual: bool = True
    """Whether it merges at all."""
    vision_weight: float | None = None
    """λ, weight of attention to other patches against [CLS]'s; None: 0.65, in `paper` 0.35."""
    penalty: float = 2.0
    """What the most redundant patch of a window has its score multiplied by; 1: no penalty."""
    epsilon: float = 0.998
    """ε, the quantile of its scores that a target must reach."""
    cls_free: bool = False
    """Take likeness to the mean key for what [CLS] does not attend to (for encoders without [CLS])."""

    def __post_init__(self) -> None:
        """Refuse values that cannot mean anything."""
        if self.profile == "released":
            raise InputError(
                f"{self.name} has no profile 'released': the code's local penalty is never reset between images and it "
                f"fails on several views, so no selection can be called its own; choose from {', '.join(self.profiles)}"
            )
        super().__post_init__()
        self._require_switch("merge_visual", "cls_free")
        self._require("penalty", float, 1, 1e6)
        self._require("epsilon", float, 0, 1)
        if self.control_encoding_layer is not None:
            self._require("control_encoding_layer", int, -1, 10_000)
        if self.vision_weight is not None:
            self._require("vision_weight", float, 0, 1)

    @property
    def idle(self) -> bool:
        """The encoder is left alone."""
        return not self.merge_visual or super().idle

    def _first(self, depth: int) -> tuple[int, str]:
        control = self.control_encoding_layer
        # From layer 12 on of the 23 that LLaVA runs, as released.
        return (min((depth + 1) // 2, depth - 1) if control is None else control + 1), "control_encoding_layer"

    def reduce_in_encoder(self, tokens: EncoderTokens) -> Merging:
        """Filter, correlate, compress."""
        scores = promote(self._redundancy(tokens), tokens.ids, tokens.alive, tokens.side, self.penalty)
        order = top_indices(scores, tokens.alive)  # [V, N']
        goes = torch.arange(order.shape[1], device=order.device) < tokens.gives
        left = tokens.alive & ~torch.zeros_like(goes).scatter(1, order, goes)
        sources = order[:, : tokens.most]  # [V, S]
        hidden = self._compress(tokens, sources, goes[:, : tokens.most], left)
        return Merging(hidden=hidden, order=top_indices(left.float()))

    def encoder_products(self, sizes: EncoderSizes) -> tuple[Product, ...]:
        """Both terms of the redundancy, the correlation of what goes, and the merging."""
        n, c, v, goes = sizes.slots, sizes.width, sizes.views, sizes.most
        merge = merge_product(1 + n, goes, c, v)
        if self.profile == "paper":
            # Of the patches' attention all is computed, in one kernel where that is fused.
            everything, heads, d = 1 + n, v * sizes.heads, c // sizes.heads
            return (
                Product("vision q·k", everything, d, everything, heads),
                Product("vision scores·v", everything, everything, d, heads),
                Product("semantic", 1, d, everything, heads),
                Product("correlation", goes, d, everything, heads),
                merge,
            )
        means = (Product(name, n, c, 1, v) for name in ("vision", "semantic"))
        return (*means, Product("correlation", goes, c, n, v), merge)

    def _redundancy(self, tokens: EncoderTokens) -> Tensor:
        """How little would be lost with every patch: `[V, N']`."""
        weight = WEIGHTS[self.profile] if self.vision_weight is None else self.vision_weight
        number = column(tokens.before, tokens.ids).clamp_min(1)
        if self.profile == "paper":
            vision = share_on_patches(tokens) / number
            semantic = attention_rows(tokens, torch.zeros_like(tokens.ids[:, :1]))[:, 0]
        else:
            q, k, scale = flat(tokens)
            mean = (k[:, 1:] * tokens.alive[..., None]).sum(1) / number  # [V, C]; so no N × N map is made
            vision = (q[:, 1:] @ mean[..., None])[..., 0] * scale
            semantic = (k[:, 1:] @ q[:, 0, :, None])[..., 0] * scale
        if self.cls_free:
            semantic = dissimilarity(tokens.keys.float().mean(1)[:, 1:], tokens.alive)
        return redundancy(vision, semantic, tokens.alive, weight, normalise=self.profile == "corrected")

    def _correlation(self, tokens: EncoderTokens, sources: Tensor) -> Tensor:
        """What the sources `[V, S]` attend to: `[V, S, N']`."""
        if self.profile == "paper":
            return attention_rows(tokens, sources + 1)
        q, k, scale = flat(tokens)
        rows = q[:, 1:].gather(1, sources[..., None].expand(-1, -1, q.shape[-1]))
        return rows @ k[:, 1:].mT * scale

    def _compress(self, tokens: EncoderTokens, sources: Tensor, goes: Tensor, left: Tensor) -> Tensor:
        """Merge the sources that go `[V, S]` into patches that are left `[V, N']`: `[V, 1 + N', C]`."""
        kind, never = ("ratio", 0.0) if self.profile == "paper" else ("softmax", -torch.inf)
        scores = self._correlation(tokens, sources).masked_fill(~left[:, None], never)
        number = [n_targets(n, self.epsilon) for n in tokens.after]
        targets, weights = target_weights(scores, max(number), kind)  # [V, S, K]
        # Views with fewer targets than the others share their sources out over those.
        used = torch.arange(targets.shape[-1], device=targets.device) < column(number, targets)  # [V, K]
        weights = torch.where(used[:, None] & goes[..., None], weights, 0)
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        return merge_into(tokens.hidden, sources + 1, targets + 1, weights)


def redundancy(vision: Tensor, semantic: Tensor, alive: Tensor, weight: float, normalise: bool) -> Tensor:
    """Balance attention to other patches against [CLS]'s attention (eq. 1): λ · vision − (1 − λ) · semantic, `[V, N]`.

    Args:
        vision: `[V, N]`.
        semantic: `[V, N]`.
        alive: bool `[V, N]`.
        weight: λ.
        normalise: scale both to unit length over the patches alive first.
    """
    if normalise:
        vision, semantic = unit(vision, alive), unit(semantic, alive)
    return weight * vision - (1 - weight) * semantic


def promote(scores: Tensor, ids: Tensor, alive: Tensor, side: int, penalty: float) -> Tensor:
    """Make the most redundant patch of every window more so, that a window does not go as a whole.

    Positive scores are multiplied, negative ones divided. Rows and columns that fill no window are left as they are.

    Args:
        scores: `[V, N']`.
        ids: `[V, N']`, patch ids.
        alive: bool `[V, N']`.
        side: patches along a view.
        penalty: the factor.
    """
    across, slots = side // WINDOW, torch.arange(scores.shape[1], device=scores.device)
    row, col = ids // side // WINDOW, ids % side // WINDOW
    inside = alive & (row < across) & (col < across)
    number = max(across**2, 1)
    window = torch.where(inside, row * across + col, 0)  # [V, N']
    best = scores.new_full((len(scores), number), -torch.inf)
    best = best.scatter_reduce(1, window, scores.masked_fill(~inside, -torch.inf), "amax")
    highest = inside & (scores == best.gather(1, window))
    first = ids.new_full((len(scores), number), len(slots))
    first = first.scatter_reduce(1, window, torch.where(highest, slots, len(slots)), "amin")  # the first of equal ones
    promoted = highest & (slots == first.gather(1, window))
    return torch.where(promoted, torch.where(scores > 0, scores * penalty, scores / penalty), scores)


def dissimilarity(keys: Tensor, alive: Tensor) -> Tensor:
    """Return how unlike the mean of the keys alive every key `[V, N, d]` is, as minus the cosine: `[V, N]`."""
    mean = (keys * alive[..., None]).sum(1, keepdim=True)  # as good as the mean for a cosine
    return -F.cosine_similarity(keys, mean, dim=-1)


def flat(tokens: EncoderTokens) -> tuple[Tensor, Tensor, float]:
    """Return queries and keys, heads concatenated: `[V, 1 + N', C]` in float32, and what makes q·k a mean logit."""
    heads, width = tokens.keys.shape[1], tokens.keys.shape[3]
    q, k = (x.float().transpose(1, 2).flatten(2) for x in (tokens.queries, tokens.keys))
    return q, k, 1 / (heads * width**0.5)


def attention_rows(tokens: EncoderTokens, places: Tensor) -> Tensor:
    """Return the attention of the tokens at `places [V, Q]` ([CLS] is 0) to patches, mean of heads: `[V, Q, N']`."""
    rows = tokens.queries.float().take_along_dim(places[:, None, :, None], 2)  # [V, H, Q, d]
    logits = rows @ tokens.keys.float().mT * rows.shape[-1] ** -0.5
    if tokens.bias is not None:
        logits = logits + tokens.bias.float()
    return cast(Tensor, logits.softmax(-1).mean(1)[..., 1:])


def share_on_patches(tokens: EncoderTokens) -> Tensor:
    """Return how much of every patch's attention patches get, mean of heads: `[V, N']`.

    It is what attention makes of values that are 1 for patches and 0 for the rest, so that no N × N map is made.
    """
    values = F.pad(tokens.alive, (1, 0)).to(torch.float32)[:, None, :, None].expand_as(tokens.keys)
    bias = None if tokens.bias is None else tokens.bias.float()
    got = F.scaled_dot_product_attention(tokens.queries.float(), tokens.keys.float(), values, attn_mask=bias)
    return got[..., 0].mean(1)[:, 1:]
