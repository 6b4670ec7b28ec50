"""ToMe (arXiv 2210.09461): in every layer of the encoder, merge the patches that are most alike."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.compress.encoding import EncoderSizes, EncoderTokens, InEncoder, Merging
from llava.compress.merge import merge_into, merge_product
from llava.compress.stages import Product
from llava.compress.tokens import top_indices


@dataclass(frozen=True, kw_only=True)
class ToMe(InEncoder):
    """Merge the r tokens at even places that are most alike one at an odd place into those, in each layer and view.

    Alike are keys, averaged over heads, by cosine. A token is the mean of the patches it stands for, and counts as so
    many in later attention. [CLS] is never merged. As a layer merges half of the patches at most, small ratios take
    several layers: what cannot be reached in those that run is refused.

    Differs from the released code in: r follows from the retention ratio, for every view its own; padding is dropped
    first and merges with nothing; where two tokens are equally alike the lower place goes first; class, model and
    attention are left as they are. LLaVA has no distillation token, so that its rules are not here.
    """

    name = "tome"
    paper = "arXiv 2210.09461"
    encoder_reads = ("keys",)

    first_layer: int = 0
    """The first layer that merges; all that run after it do."""
    proportional: bool = True
    """Add the logarithm of a token's size to the logits of later attention, as for models not trained with ToMe."""

    def __post_init__(self) -> None:
        """Refuse values that cannot mean anything."""
        super().__post_init__()
        self._require("first_layer", int, 0, 10_000)
        self._require_switch("proportional")

    def _first(self, depth: int) -> tuple[int, str]:
        return self.first_layer, "first_layer"

    def _most(self, n: int) -> int:
        return n // 2

    def reduce_in_encoder(self, tokens: EncoderTokens) -> Merging:
        """Merge the r most alike pairs of every view."""
        alive = F.pad(tokens.alive, (1, 0), value=True)  # [V, 1+N'], with [CLS]
        sources, partners = match(tokens.keys.float().mean(1), alive)
        sources, partners = sources[:, : tokens.most], partners[:, : tokens.most]  # [V, r]
        real = torch.arange(tokens.most, device=sources.device) < tokens.gives
        moved = torch.where(real, tokens.sizes.gather(1, sources), 0)
        weights = moved / tokens.sizes.gather(1, partners)  # so that the sum of both is the mean of all their patches
        left = alive & ~torch.zeros_like(alive).scatter(1, sources, real)
        return Merging(
            hidden=merge_into(tokens.hidden, sources, partners[..., None], weights[..., None]),
            order=even_before_odd(left) - 1,
            sizes=tokens.sizes.scatter_add(1, partners, moved),
            proportional=self.proportional,
        )

    def encoder_products(self, sizes: EncoderSizes) -> tuple[Product, ...]:
        """Likeness of even to odd places, heads averaged, and the merging."""
        tokens, v = 1 + sizes.slots, sizes.views
        return (
            Product("likeness", tokens - tokens // 2, sizes.width // sizes.heads, tokens // 2, v),
            merge_product(tokens, sizes.most, sizes.width, v),
        )


def match(metric: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Find for every token at an even place the most alike one at an odd place.

    Args:
        metric: `[V, 1 + N, d]`, [CLS] first.
        alive: bool `[V, 1 + N]`; the others are no partners, and come last.

    Returns:
        Even places by decreasing likeness, those that may not be merged last, and the partners' places; both `[V, A]`.
    """
    unit = F.normalize(metric, dim=-1)
    likeness = (unit[:, 0::2] @ unit[:, 1::2].mT).masked_fill(~alive[:, None, 1::2], -torch.inf)  # [V, A, B]
    best, partner = likeness.max(-1)
    patch = torch.arange(best.shape[1], device=best.device) > 0
    order = top_indices(best, alive[:, 0::2] & patch)
    return 2 * order, 2 * partner.gather(1, order) + 1


def even_before_odd(left: Tensor) -> Tensor:
    """Order places `[V, 1 + N]` as ToMe does, even before odd, without [CLS], those not `left` behind: `[V, N]`."""
    place = torch.arange(left.shape[1], device=left.device)
    key = (place + place % 2 * len(place)).expand_as(left).masked_fill(~left, 2 * len(place))
    return key[:, 1:].argsort(dim=1, stable=True) + 1
