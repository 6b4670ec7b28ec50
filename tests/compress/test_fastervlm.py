"""FasterVLM against its oracle, a loop-written reference and what the release does differently.

The helpers at the top serve the tests of the other methods that select before the language model.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.anyres import AnyResGrid
from llava.compress import get
from llava.compress.base import Layout, Selection, Views
from llava.compress.pack import EXTRA, NEWLINE, pack
from llava.compress.trace import Trace
from llava.mm_utils import process_images
from tests.compress.reference_released import NL, Entry, descending, largest_remainder, raster_sequence, valid_patches
from tests.conftest import Loaded, picture

SIDE = 6
SINGLE = Layout(unpad=False, newline="none", placement="flat")  # LLaVA-1.5
# Size and crops: LLaVA-1.5, then padded above, at the sides, slightly and by far, and not at all.
IMAGES: dict[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "single": ((500, 375), None),
    "2x2 wide": ((640, 480), (2, 2)),
    "2x2 tall": ((300, 700), (2, 2)),
    "2x2 full": ((672, 672), (2, 2)),
    "1x3": ((300, 1000), (1, 3)),
    "3x1": ((1000, 250), (3, 1)),
    "3x1 tall": ((1000, 400), (3, 1)),
    "1x2 sliver": ((40, 900), (1, 2)),
}
RATIOS = (1.0, 0.75, 0.5, 0.25, 0.1)

every_image = pytest.mark.parametrize("image", IMAGES)
every_ratio = pytest.mark.parametrize("ratio", RATIOS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def grid_of(image: str, side: int = SIDE) -> AnyResGrid:
    size, crops = IMAGES[image]
    return AnyResGrid(image_size=size, crops=crops, side=side)


def views_of(grid: AnyResGrid, dtype: torch.dtype = torch.float32, heads: int = 2, **given: Any) -> Views:
    """A random image in the format of its checkpoint, with every tap a method here wants; `given` replaces fields."""
    draw, v, n, c = torch.Generator().manual_seed(grid.n_views), grid.n_views, grid.patches_per_view, 8

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    fields = {
        "features": noise(v, n, c),
        "cls_logits": {layer: noise(v, heads, 1 + n) for layer in (0, -2)},
        "keys": {-2: noise(v, n, c)},
        "cls": noise(v, c),
        "layout": Layout() if grid.crops else SINGLE,
    }
    return Views(grid=grid, **(fields | given))


def logits_of(scores: Tensor) -> Tensor:
    """[CLS] logits `[V, H, 1 + N]` whose probabilities are in proportion to `scores` `[V, N]` or `[V, H, N]`."""
    scores = scores[:, None] if scores.ndim == 2 else scores
    return torch.cat((torch.ones_like(scores[..., :1]), scores), -1).log()


def sequence_of(views: Views, selection: Selection) -> list[Entry]:
    """The packed sequence in the reference's notation; an appended token is `(view, number)` of its first feature."""
    packed = pack(views, selection, lambda x: x, torch.zeros(views.features.shape[-1]))
    n, names = views.grid.patches_per_view, {NEWLINE: NL, EXTRA: "+"}
    return [names.get(origin) or divmod(origin, n) for origin in packed.origin.tolist()]


def probabilities(rows: Tensor) -> list[list[float]]:
    """[CLS] attention `[V][N]` from logits `[V, H, 1 + N]`, mean over heads, softmax over [CLS] and patches."""
    scores = []
    for heads in rows.tolist():
        mean = [0.0] * (len(heads[0]) - 1)
        for row in heads:
            total = sum(math.exp(value - max(row)) for value in row)
            for i, value in enumerate(row[1:]):
                mean[i] += math.exp(value - max(row)) / total / len(heads)
        scores.append(mean)
    return scores


def patches_of(grid: AnyResGrid) -> list[list[int]]:
    """Patch ids of every view that show the image, thumbnail first."""
    whole = list(range(grid.side**2))
    return [whole, *(valid_patches(grid.image_size, grid.crops, grid.side) if grid.crops else [])]


def equal_shares(grid: AnyResGrid, ratio: float) -> list[int]:
    """Kept patches per view: ⌊R·N⌋, and ⌊R·Σ n⌋ in proportion to size."""
    sizes = [len(valid) for valid in patches_of(grid)]
    total = int(ratio * sum(sizes[1:]))
    shares = [Fraction(total * n, max(1, sum(sizes[1:]))) for n in sizes[1:]]
    return [int(ratio * sizes[0]), *largest_remainder(shares, sizes[1:], total)]


def laid_out(grid: AnyResGrid, kept: Sequence[Sequence[int]]) -> list[Entry]:
    """Kept patches in the checkpoint's own format."""
    if grid.crops:
        return raster_sequence(kept[0], kept[1:], grid.image_size, grid.crops, grid.side)
    return [(0, patch) for patch in sorted(kept[0])]


def bare_canvas(grid: AnyResGrid, kept: Sequence[Sequence[int]]) -> list[Entry]:
    """Kept patches, then the canvas cell by cell, padding too, without a newline."""
    sequence: list[Entry] = [(0, patch) for patch in sorted(kept[0])]
    cols, rows = grid.crops or (0, 0)
    for y in range(rows * grid.side):
        for x in range(cols * grid.side):
            view = 1 + y // grid.side * cols + x // grid.side
            patch = y % grid.side * grid.side + x % grid.side
            if patch in kept[view]:
                sequence.append((view, patch))
    return sequence


def best(scores: Sequence[float], among: Sequence[int], count: int) -> list[int]:
    return descending({patch: scores[patch] for patch in among})[:count]


def entries(text: str) -> list[Entry]:
    """Read the oracles' notation: `G1` thumbnail patch 1, `c2p0` patch 0 of crop 2, `NL`, `+` an appended token."""
    words = text.split()
    return [
        word if word in (NL, "+") else (0, int(word[1:])) if word[0] == "G" else (1 + int(word[1]), int(word[3:]))
        for word in words
    ]


def looked_up(model: Any, pixels: Tensor, grid: AnyResGrid, layout: Layout) -> Views:
    """The views of an image from the tower's hidden states: its features and what any method here taps."""
    tower = model.get_vision_tower().vision_tower
    states, layers = tower(pixels, output_hidden_states=True).hidden_states, tower.encoder.layers

    def projected(layer: int, name: str) -> Tensor:
        attention = layers[layer].self_attn
        made = getattr(attention, name)(layers[layer].layer_norm1(states[layer % len(layers)]))
        return made.unflatten(-1, (attention.num_heads, -1))  # [V, 1 + N, H, C/H]

    def rows(layer: int) -> Tensor:
        query, keys = projected(layer, "q_proj")[:, 0], projected(layer, "k_proj")
        return torch.einsum("vhc,vnhc->vhn", query, keys) / query.shape[-1] ** 0.5

    return Views(
        features=states[-2][:, 1:],
        grid=grid,
        cls_logits={layer: rows(layer) for layer in (0, -2)},
        keys={-2: projected(-2, "k_proj")[:, 1:].flatten(2)},
        cls=states[-2][:, 0],
        layout=layout,
    )


@torch.no_grad()
def check_through_the_model(loaded: Callable[..., Loaded], spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compress a padded, a tall and a single image on their checkpoints and compare with views made by hand."""
    for version, sizes in (("v1.6-vicuna", [(640, 480), (90, 400)]), ("v1.5", [(500, 375)])):
        _, model, processor, _ = loaded(version)
        method, trace = get(spec), Trace()
        monkeypatch.setattr(model, "method", method)
        pixels = [process_images([picture(*size)], processor, model.config)[0] for size in sizes]
        images = torch.stack(pixels) if version == "v1.5" else pixels
        packed = model.compress_images(images, sizes, trace)
        newline = getattr(model.get_model(), "image_newline", None)
        for made, image, views in zip(packed, trace.images, pixels, strict=True):
            layout = Layout() if image.grid.crops else SINGLE
            by_hand = looked_up(model, views if views.ndim == 4 else views[None], image.grid, layout)
            expected = pack(by_hand, method.select(by_hand), model.get_model().mm_projector, newline)
            assert made.origin.tolist() == expected.origin.tolist()
            torch.testing.assert_close(made.features, expected.features, atol=1e-4, rtol=1e-4)
            assert image.ledger()["kept"] == made.patches > 0
            assert image.plan == method.plan(image.grid, layout)


# --- FasterVLM -------------------------------------------------------------------------------------------------------

O6 = torch.tensor([[1.0, 4, 2, 3], [4, 3, 2, 1], [1, 2, 3, 4], [3, 1, 4, 2], [2, 3, 1, 4]])
O6_SEQUENCE = {
    "released": "G1 G3 c0p0 c0p1 c1p2 c1p3 c2p0 c3p1 c2p2 c3p3",
    "corrected": "G1 G3 c0p0 c0p1 NL c1p2 c1p3 NL c2p0 c3p1 NL c2p2 c3p3 NL",
}


@pytest.mark.parametrize("profile", O6_SEQUENCE)
def test_oracle_o6(profile: str) -> None:
    views = views_of(AnyResGrid(image_size=(672, 672), crops=(2, 2), side=2), cls_logits={-2: logits_of(O6)})
    selection = get("fastervlm", retention_ratio=0.5, profile=profile).select(views)
    assert sequence_of(views, selection) == entries(O6_SEQUENCE[profile])


def test_heads_are_averaged_after_the_softmax() -> None:
    # Oracle O2: the mean logits are -2.5 and 0, the mean probabilities .4934 and .2533. Both other patches are out.
    out = [-50.0, -50.0]
    rows = torch.tensor([[[0.0, 5.0, 0.0, *out], [0.0, -10.0, 0.0, *out]]])
    assert probabilities(rows)[0][:2] == pytest.approx([0.493363, 0.253319], abs=1e-6)
    views = views_of(AnyResGrid(image_size=(9, 9), side=2), cls_logits={-2: rows})
    for profile in ("corrected", "released"):
        assert get("fastervlm", retention_ratio=0.25, profile=profile).select(views).keep[0].tolist() == [0]


def test_the_cls_column_counts() -> None:
    # Patch 0 has more of what the patches get, both heads together (.79 + .38 against .19 + .6), but the first head
    # looks at [CLS], so the second decides.
    shares = torch.tensor([[[0.79, 0.19, 0.01, 0.01], [0.38, 0.6, 0.01, 0.01]]])
    column = torch.tensor([[[99.0], [0.01]]])
    views = views_of(AnyResGrid(image_size=(9, 9), side=2), cls_logits={-2: torch.cat((column, shares), -1).log()})
    assert get("fastervlm", retention_ratio=0.25).select(views).keep[0].tolist() == [1]


@every_image
@every_dtype
@every_ratio
def test_equals_the_naive_reference(image: str, dtype: torch.dtype, ratio: float) -> None:
    grid = grid_of(image)
    views = views_of(grid, dtype)
    scores, valid = probabilities(views.cls_logits[-2]), patches_of(grid)

    kept = [best(s, among, k) for s, among, k in zip(scores, valid, equal_shares(grid, ratio), strict=True)]
    selection = get("fastervlm", retention_ratio=ratio).select(views)
    assert sequence_of(views, selection) == laid_out(grid, kept)
    assert [order[:k].tolist() for order, k in zip(selection.order, selection.count, strict=True)] == kept

    kept = [best(s, range(SIDE**2), max(1, round(ratio * SIDE**2))) for s in scores]
    method = get("fastervlm", retention_ratio=ratio, profile="released")
    selection, plan = method.select(views), method.plan(grid, views.layout)
    assert sequence_of(views, selection) == bare_canvas(grid, kept)
    assert plan.at_least == plan.at_most == selection.total == sum(map(len, kept))


@pytest.mark.parametrize(("ratio", "tokens"), [(0.75, 432), (0.5, 288), (0.25, 144), (0.1, 58), (0.05, 29)])
def test_the_authors_settings(ratio: float, tokens: int) -> None:
    released = get("fastervlm", retention_ratio=ratio, profile="released")
    assert released.plan(AnyResGrid(image_size=(336, 336))).at_most == tokens
    # Five views whatever the padding: 290 tokens at 10 %, where 10 % of what is left after unpadding are 228.
    grid = AnyResGrid(image_size=(640, 480), crops=(2, 2))
    assert released.plan(grid).at_most == 5 * tokens
    assert get("fastervlm", retention_ratio=ratio).plan(grid).at_most == int(ratio * 576) + int(ratio * 1728)


def test_padding_is_kept_only_when_released() -> None:
    grid = grid_of("2x2 wide")
    valid = grid.valid()
    views = views_of(grid, cls_logits={-2: logits_of(torch.where(valid, 1.0, 2.0) + torch.rand(valid.shape))})
    released = get("fastervlm", retention_ratio=0.5, profile="released").select(views)
    assert (released.kept & ~valid).sum() == (~valid).sum() > 0  # all of the padding, as its attention is high
    assert released.total == 5 * SIDE**2 // 2
    assert not (get("fastervlm", retention_ratio=0.5).select(views).kept & ~valid).any()


def test_newlines_are_left_out_only_when_released() -> None:
    views = views_of(grid_of("2x2 wide"))
    _, top, _, bottom = views.grid.box
    for profile, newlines in (("released", 0), ("corrected", bottom - top)):
        selection = get("fastervlm", retention_ratio=0.25, profile=profile).select(views)
        assert sequence_of(views, selection).count(NL) == newlines


def test_ties_go_to_the_lower_index() -> None:
    grid = grid_of("2x2 full")
    views = views_of(grid, cls_logits={-2: torch.zeros(5, 3, 1 + SIDE**2)})
    for profile in ("corrected", "released"):
        kept = get("fastervlm", retention_ratio=0.25, profile=profile).select(views).keep
        assert [patches.tolist() for patches in kept] == [list(range(9))] * 5


@every_image
def test_larger_ratios_keep_what_smaller_ones_do(image: str) -> None:
    views = views_of(grid_of(image))
    kept = [get("fastervlm", retention_ratio=ratio).select(views).kept for ratio in reversed(RATIOS)]
    for smaller, larger in pairwise(kept):
        assert bool((larger | ~smaller).all())


@pytest.mark.parametrize("profile", ["corrected", "released"])
def test_through_the_model(loaded: Any, profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_through_the_model(loaded, f"fastervlm(retention_ratio=0.3, profile='{profile}')", monkeypatch)
