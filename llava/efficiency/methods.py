"""From a method and an image's size, or from what a model wrote down, to the tokens of a request."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from llava.anyres import AnyResGrid, Size, choose_grid
from llava.compress import get
from llava.compress.base import Compressor, Layout, Plan, Views
from llava.compress.encoding import EncoderSizes, stand_in
from llava.compress.pack import EXTRA, pack
from llava.compress.stages import LayerSizes, Product
from llava.compress.tokens import budget
from llava.compress.trace import Trace
from llava.constants import InputError
from llava.efficiency.flops import every_layer
from llava.efficiency.request import Request
from llava.efficiency.shapes import Language, Model, Tower
from llava.model.views import LAYOUTS

CHANNELS, HEADS = 8, 2


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a method intends for an image of a given size."""

    method: str
    grid: AnyResGrid
    plan: Plan
    newlines: int
    """Newline tokens of the sequence."""
    extra: int
    """Tokens the method appends."""
    text: int
    """Tokens of the prompt."""
    request: Request
    """With as many patches as are asked for, within the bounds of the plan."""

    @property
    def visual(self) -> int:
        """Tokens of the image in the sequence, newlines included."""
        return self.request.kept + self.newlines + self.extra


def image_grid(model: Model, image_size: Size) -> AnyResGrid:
    """Return the views a model makes of an image of `(width, height)` pixels.

    Raises:
        InputError: the image has no pixels, or a canvas is no multiple of the tower's input.
    """
    width, height = image_size
    if width < 1 or height < 1:
        raise InputError(f"image of {width}x{height} pixels: both sides must be at least 1")
    tile, side = model.tower.image_size, model.tower.side
    if not model.pinpoints:
        return AnyResGrid(image_size=image_size, side=side)
    if any(length % tile or not length for pair in model.pinpoints for length in pair):
        raise InputError(f"image_grid_pinpoints of {model.name!r} must be multiples of {tile}, got {model.pinpoints}")
    crops = choose_grid(image_size, model.pinpoints, tile, model.rule)
    return AnyResGrid(image_size=image_size, crops=crops, side=side, rule=model.rule)


def plan_request(
    model: Model,
    method: Compressor,
    image_size: Size,
    *,
    text: int = 0,
    prefix: int = 0,
    output: int = 1,
    batch: int = 1,
) -> Planned:
    """Return what a method makes of an image, before any pixel is looked at.

    The number of patches is the method's own plan; where that is a range, the number asked for or the end of the range
    next to it. Newlines and appended tokens are counted by letting the method select from noise.

    Args:
        model: the model.
        method: the compression method.
        image_size: `(width, height)` in pixels.
        text: tokens of the prompt.
        prefix: those of them before the image, which no method takes for the question.
        output: tokens produced.
        batch: such requests run together.

    Raises:
        InputError: the model does not know what to do with such an image, or the method cannot meet its ratio in it.
    """
    if model.merge not in LAYOUTS:
        raise InputError(f"mm_patch_merge_type of {model.name!r} must be one of {', '.join(LAYOUTS)}")
    grid, layout = image_grid(model, image_size), LAYOUTS[model.merge]
    plan = method.plan(grid, layout)
    if method.encoder_points(model.tower.depth):  # how deep the encoder is, the plan does not know
        left = min(plan.at_most, sum(method.patches_per_layer(grid, layout, model.tower.depth)[-1]))
        plan = replace(plan, at_least=left, at_most=left)
    newlines, extra = _rehearse(model, method, grid, layout)
    wanted = plan.patches if plan.ratio is None else budget(plan.ratio, plan.patches)
    kept = min(max(wanted, plan.at_least), plan.at_most)
    request = _request(
        model,
        method,
        [grid],
        layout,
        kept=kept,
        projected=kept + extra,
        visual=method.visual_per_layer(kept + newlines + extra, model.language.layers),
        text=text,
        prefix=prefix,
        output=output,
        batch=batch,
    )
    return Planned(method=str(method), grid=grid, plan=plan, newlines=newlines, extra=extra, text=text, request=request)


def check_reach(model: Model, method: Compressor) -> None:
    """Let a method plan for the largest and for the smallest sequence of image tokens that a model makes.

    Raises:
        InputError: it cannot do what it is asked to for either; for one in between it still may not be able to.
    """
    tile = model.tower.image_size
    refusals = []
    for size in (max(model.pinpoints, key=prod, default=(tile, tile)), (1, tile)):
        try:
            plan_request(model, method, size)
        except InputError as error:
            refusals.append(error)
        else:
            return
    raise refusals[0]


def trace_requests(model: Model, trace: Trace, output: int = 1) -> list[Request]:
    """Return the requests that a model really ran, one for every row of the batch.

    Each is what its row would be alone, of one beam: padding is not counted, which rows of unequal length run on as
    well, questions of unequal length inside SparseVLM, and views that methods in the encoder leave unequally long; nor
    is what a method looks at inside the language model where there is no image at all. The cache is taken to grow with
    the answer and attention to reach all of it: a static cache and a window shorter than the prompt are not modelled.

    Args:
        model: the model.
        trace: filled by `generate(trace=…)`.
        output: tokens produced.

    Raises:
        InputError: it is unknown which image belongs to which row, as they do not have equally many, or as nothing was
            generated.
    """
    rows, images = trace.sequence_lengths, trace.images
    if not rows or len(images) % len(rows):
        raise InputError(f"cannot tell which of {len(images)} images belong to which of {len(rows)} rows")
    visual = trace.visual_per_layer[:: max(1, len(trace.visual_per_layer) // len(rows))]
    visual = visual or [every_layer(model.language, 0)] * len(rows)
    method = get(trace.method if images else "none")
    share = len(images) // len(rows)
    requests = []
    for row, (length, question) in enumerate(zip(rows, trace.n_text, strict=True)):
        own = images[row * share : (row + 1) * share]
        if sum(len(image.packed.features) for image in own) != visual[row][0]:
            raise InputError(f"cannot tell which images belong to row {row}; give every row as many, and generate")
        layout = Layout(unpad=all(image.unpad for image in own))
        request = _request(
            model,
            method,
            [image.grid for image in own],
            layout,
            kept=sum(image.packed.patches for image in own),
            projected=sum(image.packed.visual for image in own),
            visual=visual[row],
            text=length - visual[row][0],
            prefix=length - visual[row][0] - question,
            output=output,
        )
        requests.append(request)
    return requests


def _request(
    model: Model,
    method: Compressor,
    grids: Sequence[AnyResGrid],
    layout: Layout,
    *,
    kept: int,
    projected: int,
    visual: tuple[int, ...],
    text: int,
    prefix: int,
    output: int,
    batch: int = 1,
) -> Request:
    """One prompt about images of these grids, of which every layer of the language model runs on `visual` tokens."""
    if not 0 <= prefix <= text:
        raise InputError(f"prefix must be a part of the {text} text tokens, got {prefix}")
    tower, depth = model.tower, model.language.layers
    rows, keys = ({index % tower.layers for index in tapped} for tapped in (method.taps.cls, method.taps.keys))
    left = [method.patches_per_layer(grid, layout, tower.depth) for grid in grids]
    merging = bool(method.encoder_points(tower.depth))
    tokens, last = tuple(count + text for count in visual), text + method.visual_left(visual[0], depth)
    return Request(
        model=model,
        views=sum(grid.n_views for grid in grids),
        kept=kept,
        projected=projected,
        tokens=tokens,
        mlp_tokens=(*tokens[1:], last) if method.llm_middle else None,
        runs=(0, *(point + 1 for point in method.checked_points(depth) if point + 1 < depth)),
        output=output,
        batch=batch,
        # A tap records a layer's input, so every layer before it must run (see `compress.attach`).
        tower_layers=max(tower.depth, *rows, *keys) if rows | keys else tower.depth,
        # The views of a call are one rectangle.
        tower_tokens=tuple(1 + max(map(max, views)) for views in zip(*left, strict=True)) if merging else None,
        cls_rows=len(rows),
        key_rows=len(keys),
        own=(
            *(p for grid in grids for p in method.select_products(grid, layout, tower.width, tower.heads)),
            *_encoder_products(tower, method, grids, layout, left),
            *_llm_products(model.language, method, visual, text, text - prefix),
        ),
    )


def _encoder_products(
    tower: Tower,
    method: Compressor,
    grids: Sequence[AnyResGrid],
    layout: Layout,
    left: Sequence[tuple[tuple[int, ...], ...]],
) -> Iterator[Product]:
    """What a method multiplies at its points in the tower, all views of the images in one call."""
    before = tuple(n for grid in grids for n in (grid.patches_per_view, *grid.crop_patches(layout.unpad)))
    for layer in method.encoder_points(tower.depth):
        after = tuple(n for views in left for n in views[layer + 1])
        yield from method.encoder_products(
            EncoderSizes(
                layer=layer, depth=tower.depth, before=before, after=after, width=tower.width, heads=tower.heads
            )
        )
        before = after


def _llm_products(
    language: Language, method: Compressor, visual: tuple[int, ...], text: int, question: int
) -> Iterator[Product]:
    """What a method multiplies at its points in the language model; `question` tokens of the text follow an image."""
    for layer in method.points_in(language.layers):
        yield from method.llm_products(
            LayerSizes(
                layer=layer,
                depth=language.layers,
                tokens=visual[layer] + text,
                n_visual=visual[0],
                n_text=question,
                width=language.width,
                heads=language.heads,
                head_width=language.head_width,
            )
        )


def _rehearse(model: Model, method: Compressor, grid: AnyResGrid, layout: Layout) -> tuple[int, int]:
    """Count the newlines and the appended tokens of a selection from noise."""
    generator = torch.Generator().manual_seed(0)
    v, n, ids, valid = grid.n_views, grid.patches_per_view, None, None
    if method.encoder_points(model.tower.depth):
        ids, valid = stand_in(grid, layout, method.patches_per_layer(grid, layout, model.tower.depth)[-1])
        n = ids.shape[1]
    features = torch.randn(v, n, CHANNELS, generator=generator)
    taps = method.taps
    views = Views(
        features=features,
        grid=grid,
        cls_logits={layer: torch.randn(v, HEADS, 1 + n, generator=generator) for layer in taps.cls},
        keys={layer: torch.randn(v, n, CHANNELS, generator=generator) for layer in taps.keys},
        cls=features[:, 0] if taps.cls_feature else None,
        layout=layout,
        ids=ids,
        valid=valid,  # type: ignore[arg-type]
    )
    newline = torch.zeros(CHANNELS) if "unpad" in model.merge else None
    packed = pack(views, method.select(views), lambda tokens: tokens, newline)
    return packed.newlines, int((packed.origin == EXTRA).sum())
