"""LLaVA's joint between vision and language, and GlobalCom² (arXiv 2501.05179), which lives in it.

The way of an image: `view_images` -> CLIP tower -> `Views` -> `method.select` -> `pack` (projects kept tokens only) ->
`splice` -> language model. GlobalCom² is one `method` of those in `llava/compress`; it stands where its users look.

Where the paper's equations are:
    eq. 1    [CLS] score of a patch          `GlobalCom2._scores` (from `compress.attention.cls_logits`)
    eq. 2-5  a crop's preliminary ratio      `compress.allocation`: `crop_importance`, `crop_ratios`
    eq. 6-7  its tokens, within the budget   `GlobalCom2._count`
             as the released code has them   `generate_scale_for_crop_features`
    "interp" the thumbnail's view of a crop  `GlobalCom2._project`; per crop, `interpolate_and_split_cls_attn_scores`
    eq. 8    worth of a crop's patch         `GlobalCom2._blend`
R is line 101, where its users edit it, and where a test holds it.
τ, α and the variants of Tables III and IV are fields of `GlobalCom2`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from logging import getLogger
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.anyres import AnyResGrid
from llava.compress import attach, base
from llava.compress.allocation import ALLOCATIONS, crop_importance, crop_ratios, crop_weights
from llava.compress.base import Compressor, Layout, Plan, Selection, Taps, Views
from llava.compress.pack import Packed, pack
from llava.compress.tokens import apportion, budget, fill_shares, on_device, top_indices, unit
from llava.compress.trace import ImageTrace, Trace
from llava.constants import IMAGE_TOKEN_INDEX, InputError, PromptTooLong
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.splice import Spliced, splice
from llava.model.switch import LanguageLayers, Parts, as_method
from llava.model.views import view_images

logger = getLogger(__name__)


class LlavaMetaModel(LanguageLayers):
    """The part of LLaVA's inner model that is not the language model: tower, projector, newline embedding."""

    def __init__(self, config: Any) -> None:
        """Build the parts from the model's config; weights come with the checkpoint or from CLIP's (see builder)."""
        super().__init__(config)  # type: ignore[call-arg]
        self.vision_tower = build_vision_tower(config)
        self.mm_projector = build_vision_projector(config)
        if "unpad" in config.mm_patch_merge_type:
            self.image_newline = nn.Parameter(torch.zeros(config.hidden_size))

    def get_vision_tower(self) -> Any:
        """Return the CLIP tower."""
        return self.vision_tower


def interpolate_scores(scores: Tensor, width: int, height: int) -> Tensor:
    """Resize the thumbnail's score map `[N]` bilinearly (half-pixel centres, clamped edges) to `[height, width]`."""
    side = isqrt(scores.numel())
    if not width or not height:  # an image so thin that nothing of it survives unpadding
        return scores.new_zeros(height, width)
    plane = scores.reshape(1, 1, side, side)
    return F.interpolate(plane, size=(height, width), mode="bilinear", align_corners=False)[0, 0]


def interpolate_and_split_cls_attn_scores(
    base_cls_attn_scores: Tensor,
    cur_width: int,
    cur_height: int,
    num_patch_width: int,
    num_patch_height: int,
    crop_dimensions: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """Resize the thumbnail's scores to the unpadded canvas and cut them per crop (see `GlobalCom2._project`).

    Args:
        base_cls_attn_scores: `[N]`, the thumbnail's [CLS] scores.
        cur_width: patches across the unpadded canvas.
        cur_height: patches down the unpadded canvas.
        num_patch_width: crops across.
        num_patch_height: crops down.
        crop_dimensions: `(height, width)` of every crop's unpadded part in patches, row-major.

    Returns:
        One `[height * width]` tensor per crop, row-major.
    """
    plane = interpolate_scores(base_cls_attn_scores.flatten(), cur_width, cur_height)
    cols, n = num_patch_width, num_patch_width * num_patch_height
    heights = [max(h for h, _ in crop_dimensions[first:][:cols]) for first in range(0, n, cols)]
    widths = [max(w for _, w in crop_dimensions[first::cols]) for first in range(cols)]
    return [tile.flatten() for band in plane.split(heights) for tile in band.split(widths, dim=1)]


# The share of visual tokens to keep, GlobalCom²'s one hyper-parameter: kept ÷ uncompressed, in (0, 1]. Edit it here, or
# leave it and give --retention-ratio or LLAVA_RETENTION_RATIO, which go first. It is looked up at every use, never
# bound as a default, so assigning `llava.model.llava_arch.retention_ratio` at run time works too.
retention_ratio = 0.25


def generate_scale_for_crop_features(
    base_cls_attn_scores: Tensor,
    num_patch_width: int,
    num_patch_height: int,
    base_scale: float | None = None,
    temperature: float = 10.0,
) -> list[float]:
    """Return the retention ratio of every crop as the released code does (eq. 2-7); `GlobalCom2` itself counts tokens.

    Args:
        base_cls_attn_scores: `[N]`, the thumbnail's [CLS] scores.
        num_patch_width: crops across.
        num_patch_height: crops down.
        base_scale: the retention ratio R; None: the one in force, see `resolve_ratio`.
        temperature: τ; large values make the crops equal.
    """
    importance = crop_importance(base_cls_attn_scores.flatten(), num_patch_width, num_patch_height)
    return crop_ratios(importance, base.resolve_ratio(base_scale), temperature).clamp_max(1).tolist()


CRITERIA = ("local", "global", "both")


@dataclass(frozen=True, kw_only=True)
class GlobalCom2(Compressor):
    """The thumbnail's [CLS] attention decides how much every crop keeps and, with the crop's own, which tokens.

    `corrected` keeps ⌊R·N⌋ + ⌊R·Σ n_j⌋ tokens exactly, so the sequence length follows from image size and ratio.
    `released` reproduces the selection and the sequence of the authors' code, `paper` the equations as printed.

    Differs from the released code in (profile `corrected`): both scores are blended with α; what clipping at 1 frees is
    given to the other crops, and rounding is by largest remainder; the thumbnail is in raster order; crop tokens stand
    where they are in the image; padding rows get no newline; every image of a call is ranked by its own scores;
    single views (LLaVA-1.5 too) follow the thumbnail rule; the model's dtype is kept; the projector runs on kept
    tokens. `released` shares the last two, which change no selection.
    """

    name = "globalcom2"
    paper = "arXiv 2501.05179"
    profiles = base.PROFILES
    taps = Taps(cls=(-1,))

    temperature: float = 10.0
    """τ of eq. 3: how evenly the budget is shared over the crops."""
    alpha: float = 0.5
    """α of eq. 8: weight of the thumbnail's view of a patch against its crop's own; for criterion `both` alone."""
    allocation: str = "softmax_sum"
    """What sets a crop's ratio (Table III): `softmax_sum` or `softmax_max` of the thumbnail's scores in its region,
    `topk_count`, its part of the thumbnail's best ⌊R·N⌋ patches instead of σ, or nothing, `uniform`."""
    criterion: str = "both"
    """Whose view ranks a crop's patches (Table IV, Table III has `local`): `local` the crop's, `global`
    the thumbnail's, or `both`."""

    def __post_init__(self) -> None:
        """Refuse values that cannot mean anything."""
        super().__post_init__()
        self._require("temperature", float, 1e-6, 1e6)
        self._require("alpha", float, 0, 1)
        self._require_choice("allocation", ALLOCATIONS)
        self._require_choice("criterion", CRITERIA)

    def plan(self, grid: AnyResGrid, layout: Layout = Layout()) -> Plan:  # noqa: B008 - frozen
        """Exact for `corrected` and for single views; otherwise the bounds of eq. 5."""
        ratio, n = self.ratio, grid.n_crops
        if self._passes_through(grid, layout):
            return super().plan(grid, layout)
        if self.profile == "corrected" or not n:
            return base.exact_plan(ratio, grid, layout.unpad)
        thumbnail, sizes = base.split_budget(ratio, grid, layout.unpad)[0], grid.crop_patches(layout.unpad)
        # The margin covers the 1e-8 in eq. 4 and rounding, which can cost a token where the bound is an integer.
        low, high = ratio * (1 - 1 / n) - 1e-6, min(1.0, ratio * (2 - 1 / n) + 1e-6)
        return Plan(
            ratio=ratio,
            patches=grid.n_patches(layout.unpad),
            at_least=thumbnail + sum(int(max(0.0, low) * size) for size in sizes),
            at_most=thumbnail + sum(int(high * size) for size in sizes),
        )

    def select(self, views: Views) -> Selection:
        """Rank every view's patches and count how many stay (eq. 1-8)."""
        grid = views.grid
        if self._passes_through(grid, views.layout):
            return super().select(views)
        layout = views.layout
        scores = worth = self._scores(views.cls_logits[-1])  # [V, N]
        budgets = base.split_budget(self.ratio, grid, layout.unpad)
        # Where every patch shows the image, no launches are spent on a mask.
        valid = views.valid if grid.n_patches(layout.unpad) < scores.numel() else None
        if grid.crops:
            crops = self._blend(self._project(scores[0], grid, layout), scores[1:], valid)
            worth = torch.cat((scores[:1], crops))
        order, count = top_indices(worth, valid), self._count(scores[0], views, *budgets)
        if self.profile == "released":
            layout = replace(layout, newline="canvas", thumbnail="score", placement="released")
        total = sum(budgets) if self.profile == "corrected" or not grid.crops else None
        return Selection(order=order, count=count, total=total, layout=layout)

    @property
    def mixes_images(self) -> bool:
        """Only as released."""
        return self.profile == "released"

    def select_all(self, batch: Sequence[Views]) -> list[Selection]:
        """Select per image; `released` repeats the release's slip of ranking image i by views i, i+1, … of the call."""
        if not self.mixes_images or len(batch) == 1:
            return super().select_all(batch)
        logger.warning("profile 'released' ranks the images of one call by the first one's scores; call it per image")
        logits = torch.cat([views.cls_logits[-1] for views in batch])
        shifted = (logits[i : i + views.grid.n_views] for i, views in enumerate(batch))
        return super().select_all([replace(v, cls_logits={-1: own}) for v, own in zip(batch, shifted, strict=True)])

    def _passes_through(self, grid: AnyResGrid, layout: Layout) -> bool:
        """The released code compresses unpadded crops or nothing."""
        return self.profile == "released" and not (grid.crops and layout.unpad)

    def _scores(self, cls_logits: Tensor) -> Tensor:
        """Head-mean [CLS] scores of the patches `[V, N]` in float32 (eq. 1; `paper` alone as printed)."""
        patches = cls_logits[:, :, 1:].float()  # [V, H, N]
        return (patches.softmax(-1) if self.profile == "paper" else patches).mean(1)

    def _project(self, thumbnail: Tensor, grid: AnyResGrid, layout: Layout) -> Tensor:
        """The thumbnail's scores at the place of every crop patch: `[rows, cols, S, S]`, 0 where padded."""
        left, top, right, bottom = grid.box if layout.unpad else (0, 0, *grid.canvas)
        plane = interpolate_scores(thumbnail, right - left, bottom - top)
        across, down = grid.canvas
        padding = (left, across - right, top, down - bottom)
        return grid.tiles(F.pad(plane, padding) if any(padding) else plane)

    def _blend(self, overall: Tensor, local: Tensor, valid: Tensor | None) -> Tensor:
        """Both views `[rows, cols, S, S]` and `[n, N]` of a patch's worth as one `[n, N]` (eq. 8), or one of them."""
        both = torch.stack((overall, local.view_as(overall))).view(2, *local.shape)
        if self.profile != "paper":
            both = unit(both, None if valid is None else valid[1:])
        blend = 0.5 if self.profile == "released" else self.alpha  # a sum, as released, ranks as half and half
        alpha = {"local": 0.0, "global": 1.0}.get(self.criterion, blend)
        return torch.add((1 - alpha) * both[1], both[0], alpha=alpha)

    def _count(self, thumbnail: Tensor, views: Views, own: int, total: int) -> Tensor:
        """Tokens every view keeps: `[V]`, `own` of the thumbnail and `total` of all crops (eq. 2-7); on the device."""
        grid, patches = views.grid, views.grid.crop_patches(views.layout.unpad)
        count = torch.full((grid.n_views,), own, device=thumbnail.device)
        if not grid.crops:
            return count
        sizes = on_device(patches, count.device, torch.float64)
        kept = max(1, budget(self.ratio, len(thumbnail)))
        importance = crop_importance(thumbnail, *grid.crops, self.allocation, kept)
        if self.profile == "corrected":
            # Beside a dominant crop the others' ratios may agree to the last bit; odd tokens still go by importance.
            importance, first = importance.sort(descending=True, stable=True)
            weights = crop_weights(importance, self.temperature, self.allocation)
            sizes = sizes[first] if len({*patches}) > 1 else sizes
            count[1:].scatter_(0, first, apportion(fill_shares(weights, sizes, total), total))
            return count
        ratios = crop_ratios(importance, self.ratio, self.temperature, self.allocation)
        if self.profile == "paper":
            ratios = ratios * (self.ratio / ratios.mean())
        count[1:] = (ratios.clamp_max(1) * sizes).floor()
        return count


class LlavaMetaForCausalLM(Parts):
    """What makes a causal language model a LLaVA: images become tokens, compressed by `method`, and join the prompt."""

    _method = GlobalCom2()

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode and project single views `[B, 3, S, S]`, uncompressed: `[B, N, D]`."""
        features = self.get_vision_tower()(images)
        with attach.exclusive(self.get_model().layers):
            return self.get_model().mm_projector(features.to(self.dtype))

    def compress_images(
        self,
        images: Tensor | Sequence[Tensor],
        image_sizes: Sequence[Sequence[int]] | None = None,
        trace: Trace | None = None,
        method: Compressor | str | None = None,
    ) -> list[Packed]:
        """Encode images, select their tokens, project what is kept and lay it out.

        Args:
            images: `[B, 3, S, S]` single views, or a list or 5-D tensor of an image's views `[V, 3, S, S]`.
            image_sizes: `(width, height)` of every image in pixels.
            trace: filled with what happened, if given.
            method: for this call; None: the model's.

        Raises:
            InputError: sizes and images do not belong together.
        """
        tower, inner = self.get_vision_tower(), self.get_model()
        method = as_method(self.method if method is None else method)
        clock = trace.clock if trace else lambda *_: nullcontext()
        pixels, grids, layout = view_images(images, image_sizes, self.config, tower)
        with clock("vision", tower.device):
            batch = tower.views(pixels, grids, layout, method)
        with clock("selection", tower.device):
            selections = method.select_all(batch)
        with attach.exclusive(inner.layers), clock("packing", tower.device):
            newline = getattr(inner, "image_newline", None)
            packed = [pack(v, s, inner.mm_projector, newline) for v, s in zip(batch, selections, strict=True)]
        for grid, selection, result in zip(grids, selections, packed, strict=True):
            plan = method.plan(grid, layout)
            image = ImageTrace(grid=grid, unpad=layout.unpad, plan=plan, selection=selection, packed=result)
            image.check()
            logger.info("%s %s", method, image)
            if trace:
                trace.add(method, image)
        return packed

    def splice_images(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Sequence[Sequence[int]] | None = None,
        padding_side: str = "right",
        trace: Trace | None = None,
        method: Compressor | str | None = None,
    ) -> Spliced:
        """Compress the images and put them into the prompts; see `splice`.

        Raises:
            InputError: placeholders and images do not match, or a prompt does not fit the model.
        """
        packed = [] if images is None or not len(images) else self.compress_images(images, image_sizes, trace, method)
        embed = self.get_model().embed_tokens
        with attach.exclusive(self.get_model().layers):
            spliced = splice(input_ids.to(embed.weight.device), packed, embed, attention_mask, labels, padding_side)
        longest, limit = max(spliced.lengths), self.config.max_position_embeddings
        if longest > limit:
            raise PromptTooLong(
                f"the prompt is {longest} tokens long with its images, the model's limit is {limit}; "
                "lower the retention ratio, give fewer images or a shorter question"
            )
        if trace:
            trace.sequence_lengths += spliced.lengths
            trace.n_text += spliced.n_text
        return spliced

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Tensor | Sequence[Tensor] | None,
        image_sizes: Sequence[Sequence[int]] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Any, Tensor | None, Tensor | None]:
        """Return `(input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels)`, as LLaVA does.

        Without images, and for the one token of a decoding step, the arguments come back as they are; otherwise
        `input_ids` is None and `inputs_embeds` holds the compressed sequence.

        Raises:
            InputError: the method works inside the language model too; or see `splice_images`.
        """
        if input_ids.shape[1] == 1 or (images is None and not bool((input_ids == IMAGE_TOKEN_INDEX).any())):
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        method = self.method
        if method.points_in(self.config.num_hidden_layers):  # it would pass for what was not compressed there
            raise InputError(f"{method} works inside the language model, for which there is generate(); call that")
        side = self.config.tokenizer_padding_side
        s = self.splice_images(input_ids, attention_mask, labels, images, image_sizes, padding_side=side, method=method)
        return None, s.position_ids, s.attention_mask, past_key_values, s.inputs_embeds, s.labels
