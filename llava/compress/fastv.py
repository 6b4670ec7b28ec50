"""FastV (arXiv 2403.06764): behind an early layer, keep the image tokens the last prompt token attended to there."""

from dataclasses import dataclass

import torch

from llava.compress.base import Compressor
from llava.compress.stages import BUDGETS, PAD, PAPER_TOKENS, LayerSizes, LayerTokens, Product, Reduction
from llava.compress.tokens import on_device, percent_above, top_indices
from llava.constants import InputError, OutOfReach


@dataclass(frozen=True, kw_only=True)
class FastV(Compressor):
    """Drop image tokens once, before layer K, by the head-mean attention of the last prompt token in layer K − 1.

    Newlines are image tokens here, as in every port to LLaVA-NeXT. Text is never dropped, and the tokens that are left
    keep their positions.

    Profiles: `released` looks for the image one token behind where it is, as the default of the release does: the first
    image token always stays, and the first token behind the image may go in its stead; an image that ends the prompt,
    behind which nothing is, is ranked as it stands.

    Differs from the released code in: image tokens are found per prompt and not configured; each prompt of a batch has
    its own choice; one row of attention is computed apart, so that the layer runs on fused attention; KV caches are
    really shorter.
    """

    name = "fastv"
    paper = "arXiv 2403.06764"
    profiles = ("corrected", "released")
    query_agnostic = False

    layer: int = 2
    """K: layers that run on everything."""
    budget: str = "layer_average"
    """What the retention ratio means: the mean over all layers, what is left `after` layer K (the authors'), or that
    much of `full` left after layer K, whatever the image (GlobalCom²'s `paper`)."""
    full: int = PAPER_TOKENS
    """What the ratio is of under budget='paper': five times the patches of a view."""

    def __post_init__(self) -> None:
        """Refuse values that cannot mean anything."""
        super().__post_init__()
        self._require("layer", int, 1, 10_000)
        self._require("full", int, 1, 1_000_000)
        self._require_choice("budget", BUDGETS)

    @property
    def llm_points(self) -> tuple[int, ...]:
        """After layer K − 1."""
        return (self.layer - 1,)

    def visual_per_layer(self, n_visual: int, depth: int) -> tuple[int, ...]:
        """All for K layers, then what makes the ratio."""
        ratio, layer = self.ratio, self.layer
        if layer >= depth:
            raise InputError(f"fastv drops tokens before layer {layer}, but the model has {depth} layers; lower layer")
        if self.budget == "paper":
            return (n_visual,) * layer + (min(n_visual, round(ratio * self.full)),) * (depth - layer)
        after = ratio if self.budget == "after" else (ratio * depth - layer) / (depth - layer)
        if after < -1e-9:
            raise OutOfReach(
                f"fastv with layer={layer} of {depth} keeps {layer / depth:.2%} of the image tokens on average even if "
                f"it drops all of them; ask for at least {percent_above(layer / depth)}, lower layer, or take "
                "budget='after'"
            )
        return (n_visual,) * layer + (round(n_visual * after),) * (depth - layer)

    def reduce_in_llm(self, tokens: LayerTokens) -> Reduction:
        """Rank the image tokens."""
        kept = tuple(self.visual_per_layer(n, tokens.depth)[-1] for n in tokens.n_visual)
        places = torch.arange(tokens.role.shape[1], device=tokens.role.device)
        last = torch.where(tokens.role != PAD, places, 0).amax(1, keepdim=True)  # [B, 1]
        scores = tokens.attention(last).mean(1)[:, 0]  # [B, L]
        ranked = tokens.image
        if self.profile == "released":
            # One place on, the end of the prompt taken for the image's last, unless the image itself ends the prompt.
            ranked = torch.where(ranked[:, -1:], ranked, torch.nn.functional.pad(ranked[:, :-1], (1, 0)))
        order = top_indices(scores, ranked)
        count = on_device(kept, scores.device)[:, None]
        chosen = torch.zeros_like(ranked).scatter(1, order, places < count)
        return Reduction(keep=chosen | ~ranked, n_visual=kept)

    def llm_products(self, sizes: LayerSizes) -> tuple[Product, ...]:
        """The last token's row."""
        return (sizes.attention(1),)
