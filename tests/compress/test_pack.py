"""Packing against transformers' own, against a loop over the canvas, and through the origin of every token."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from llava.anyres import AnyResGrid, choose_grid
from llava.compress.base import Extra, Layout, Selection, Views
from llava.compress.pack import EXTRA, NEWLINE, Packed, _rows, pack

TILE, SIDE = 84, 6
GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
PINPOINTS = [(TILE * cols, TILE * rows) for cols, rows in GRIDS]
LINE = torch.tensor([-7.0, -8.0])  # a newline embedding no feature looks like


def views_of(grid: AnyResGrid, layout: Layout = Layout()) -> Views:
    """Every patch carries its own number: view · N + patch."""
    n = grid.patches_per_view
    number = torch.arange(grid.n_views * n, dtype=torch.float32).reshape(grid.n_views, n)
    return Views(features=torch.stack((number, -number), -1), grid=grid, layout=layout)


def keep_all(views: Views, layout: Layout | None = None) -> Selection:
    """Keep every patch that is no padding, in their order."""
    order = torch.argsort((~views.valid).long(), dim=1, stable=True)
    return Selection(order=order, count=views.valid.sum(1), layout=layout or views.layout)


def keep_some(views: Views, layout: Layout | None = None, seed: int = 0, share: float = 0.4) -> Selection:
    """Keep a random share of every view's valid patches."""
    draw = torch.rand(views.valid.shape, generator=torch.Generator().manual_seed(seed))
    order = (draw - 2.0 * ~views.valid).argsort(dim=1, descending=True)
    return Selection(order=order, count=(views.valid.sum(1) * share).long(), layout=layout or views.layout)


def origin_of(views: Views, selection: Selection) -> list[int]:
    return pack(views, selection, lambda x: x, LINE).origin.tolist()


# --- transformers' packing -------------------------------------------------------------------------------------------


def theirs(features: Tensor, size: tuple[int, int], newline: Tensor | None = LINE) -> Tensor:
    """transformers' `pack_image_features` for one image; it thinks in (height, width)."""
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=TILE, patch_size=TILE // SIDE),
        image_grid_pinpoints=[list(pinpoint) for pinpoint in PINPOINTS],
    )
    packed, lengths = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config), [features], [size[::-1]], "default", image_newline=newline
    )
    assert lengths.tolist() == [len(packed[0])]
    return packed[0]


def rounded_noise(size: tuple[int, int], crops: tuple[int, int]) -> bool:
    """True where the length of the shorter side is an integer but for float noise, which only LLaVA truncates."""
    (width, height), (across, down) = size, (crops[0] * SIDE, crops[1] * SIDE)
    wide = width / height > across / down
    length = height * (across / width) if wide else width * (down / height)
    return int(length) != int(round(length, 7))


def tie(size: tuple[int, int]) -> bool:
    """True where every canvas keeps as much of the image: it fits one view, or is too thin for a pixel to count."""
    scales = [min(across / size[0], down / size[1]) for across, down in PINPOINTS]
    return max(size) <= TILE or not any(int(size[0] * s) * int(size[1] * s) for s in scales)


def sizes(count: int) -> list[tuple[int, int]]:
    """Random sizes, every fourth of them a sliver, and extremes of both kinds."""
    draw = torch.Generator().manual_seed(7)
    pairs = torch.randint(1, 700, (count, 2), generator=draw).tolist()
    slivers = [(w, max(1, h // 40)) if i % 8 else (max(1, w // 40), h) for i, (w, h) in enumerate(pairs) if i % 4 == 0]
    extremes = [(1, 1), (10000, 37), (37, 10000), (84, 84), (85, 85), (168, 168), (640, 480), (480, 640), (252, 84)]
    return [*((w, h) for i, (w, h) in enumerate(pairs) if i % 4), *slivers, *extremes]


def test_keeping_everything_equals_transformers() -> None:
    checked = 0
    for size in sizes(320):
        crops = choose_grid(size, PINPOINTS, TILE)
        # The two documented differences: ties among small images, and float noise in the unpadded box.
        if tie(size) or rounded_noise(size, crops):
            continue
        views = views_of(AnyResGrid(image_size=size, crops=crops, side=SIDE))
        packed = pack(views, keep_all(views), lambda x: x, LINE)
        assert torch.equal(packed.features, theirs(views.features, size)), size
        assert packed.patches + packed.newlines == len(packed.features)
        checked += 1
    assert checked >= 200


def test_the_other_rule_equals_transformers_without_exception() -> None:
    differences = 0
    for size in [*sizes(160), (55, 176), (88, 99), (205, 656), (40, 47), (47, 40)]:
        crops = choose_grid(size, PINPOINTS, TILE, rule="hf")
        differences += crops != choose_grid(size, PINPOINTS, TILE) or rounded_noise(size, crops)
        views = views_of(AnyResGrid(image_size=size, crops=crops, side=SIDE, rule="hf"))
        assert torch.equal(pack(views, keep_all(views), lambda x: x, LINE).features, theirs(views.features, size)), size
    assert differences > 5


def test_checkpoints_without_a_newline_equal_transformers() -> None:
    for size in [(640, 480), (480, 640), (100, 500), (500, 100)]:
        views = views_of(AnyResGrid(image_size=size, crops=choose_grid(size, PINPOINTS, TILE), side=SIDE))
        packed = pack(views, keep_all(views), lambda x: x)
        assert torch.equal(packed.features, theirs(views.features, size, None))
        assert packed.newlines == 0
        assert NEWLINE not in packed.origin


def test_single_views_equal_transformers() -> None:
    views = views_of(AnyResGrid(image_size=(300, 200), side=SIDE))
    packed = pack(views, keep_all(views), lambda x: x, LINE)
    assert torch.equal(packed.features, theirs(views.features, (300, 200)))
    assert (packed.patches, packed.newlines, packed.origin.tolist()[-1]) == (36, 1, NEWLINE)
    none = Layout(unpad=False, newline="none", placement="flat")  # LLaVA-1.5
    assert origin_of(views_of(views.grid, none), keep_all(views, none)) == list(range(36))


# --- the canvas, cell by cell ----------------------------------------------------------------------------------------


def by_hand(views: Views, selection: Selection) -> list[int]:
    """The sequence as origins: walk the canvas and look every cell up."""
    grid, layout = views.grid, selection.layout
    cols, rows = grid.crops
    side, n = grid.side, grid.side**2
    _, top, _, bottom = grid.box
    best = [order[:k] for order, k in zip(selection.order.tolist(), selection.count.tolist(), strict=True)]
    cells: dict[tuple[int, int], int] = {}
    for crop, kept in enumerate(best[1:]):
        visible = [p for p in range(n) if views.valid[1 + crop, p]]
        for patch in kept:
            place = visible.index(patch) if layout.placement == "released" else patch
            cells[crop // cols * side + place // side, crop % cols * side + place % side] = (1 + crop) * n + patch
    sequence = best[0] if layout.thumbnail == "score" else sorted(best[0])
    if layout.placement == "flat":
        return [*sequence, *((1 + crop) * n + p for crop, kept in enumerate(best[1:]) for p in sorted(kept))]
    sequence = list(sequence)
    for y in range(rows * side):
        row = [cells[y, x] for x in range(cols * side) if (y, x) in cells]
        closes = {"canvas": True, "unpadded": top <= y < bottom, "occupied": bool(row), "none": False}
        sequence += row + [NEWLINE] * closes[layout.newline]
    return sequence


LAYOUTS = [
    *(Layout(newline=newline) for newline in ("unpadded", "canvas", "occupied", "none")),
    *(Layout(newline=newline, thumbnail="score") for newline in ("unpadded", "canvas")),
    *(Layout(newline=newline, placement="released") for newline in ("canvas", "occupied", "none")),
    Layout(newline="canvas", thumbnail="score", placement="released"),
    Layout(newline="none", placement="flat"),
    *(Layout(unpad=False, newline=newline) for newline in ("canvas", "occupied", "none")),
    Layout(unpad=False, newline="none", placement="flat"),
    Layout(unpad=False, newline="none", placement="flat", thumbnail="score"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_by_hand(layout: Layout) -> None:
    for seed, (size, crops) in enumerate(
        [
            ((640, 480), (2, 2)),
            ((480, 640), (2, 2)),
            ((100, 500), (1, 3)),
            ((700, 130), (3, 1)),
            ((300, 300), (1, 2)),
            ((30, 900), (2, 2)),
        ]
    ):
        views = views_of(AnyResGrid(image_size=size, crops=crops, side=SIDE), layout)
        for share in (1.0, 0.4, 0.05, 0.0):
            selection = keep_some(views, seed=seed, share=share)
            expected = by_hand(views, selection)
            packed = pack(views, selection, lambda x: x, LINE)
            assert packed.origin.tolist() == expected
            assert packed.newlines == expected.count(NEWLINE)
            assert packed.patches == len(expected) - packed.newlines


def check_origin(views: Views, packed: Packed, newline: Tensor) -> None:
    flat = views.features.flatten(0, 1)
    patches = packed.origin >= 0
    assert torch.equal(packed.features[patches], flat[packed.origin[patches]])
    assert torch.equal(packed.features[packed.origin == NEWLINE], newline.expand(packed.newlines, -1))
    assert int(patches.sum()) == packed.patches
    assert len(set(packed.origin[patches].tolist())) == packed.patches


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_origin_leads_back_to_the_features(layout: Layout) -> None:
    views = views_of(AnyResGrid(image_size=(480, 640), crops=(2, 2), side=SIDE), layout)
    for selection in (keep_all(views), keep_some(views)):
        check_origin(views, pack(views, selection, lambda x: x, LINE), LINE)


@pytest.mark.parametrize("size", [(10000, 37), (37, 10000), (1, 3000), (3000, 1), (1, 1)])
def test_slivers_leave_the_thumbnail(size: tuple[int, int]) -> None:
    for crops in GRIDS:
        views = views_of(AnyResGrid(image_size=size, crops=crops, side=SIDE))
        for newline in ("unpadded", "canvas", "occupied", "none"):
            layout = Layout(newline=newline)
            assert origin_of(views, keep_all(views, layout)) == by_hand(views, keep_all(views, layout))


def test_a_stated_total_is_taken_at_its_word() -> None:
    views = views_of(AnyResGrid(image_size=(640, 480), crops=(2, 2), side=SIDE))
    selection = keep_some(views)
    stated = Selection(order=selection.order, count=selection.count, total=int(selection.count.sum()))
    assert origin_of(views, stated) == origin_of(views, selection)


def test_the_thumbnail_in_order_of_worth() -> None:
    grid = AnyResGrid(image_size=(84, 84), side=2)
    selection = Selection(order=torch.tensor([[2, 0, 3, 1]]), count=torch.tensor([3]), layout=Layout(thumbnail="score"))
    assert origin_of(views_of(grid), selection) == [2, 0, 3, NEWLINE]
    selection.layout = Layout()
    assert origin_of(views_of(grid), selection) == [0, 2, 3, NEWLINE]
    assert [kept.tolist() for kept in selection.keep] == [[0, 2, 3]]


# --- the projector ---------------------------------------------------------------------------------------------------


def test_the_projector_sees_kept_tokens_only() -> None:
    views = views_of(AnyResGrid(image_size=(640, 480), crops=(2, 2), side=SIDE))
    selection = keep_some(views)
    seen = []

    def projector(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return torch.cat((tokens, tokens, tokens), -1)  # [T, C] -> [T, D]

    packed = pack(views, selection, projector, torch.zeros(6))
    (tokens,) = seen
    assert tokens.shape == (int(selection.count.sum()), 2)
    expected = [view * 36 + patch for view, kept in enumerate(selection.keep) for patch in kept.tolist()]
    assert sorted(tokens[:, 0].tolist()) == expected
    assert packed.features.shape == (len(tokens) + packed.newlines, 6)
    rows = packed.features[packed.origin >= 0]
    assert torch.equal(rows[:, 0], packed.origin[packed.origin >= 0].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_projectors_dtype_wins(dtype: torch.dtype) -> None:
    views = views_of(AnyResGrid(image_size=(640, 480), crops=(2, 2), side=SIDE))
    packed = pack(views, keep_some(views), lambda x: x.to(dtype), LINE)
    assert packed.features.dtype == dtype


def test_arguments_are_left_alone() -> None:
    views = views_of(AnyResGrid(image_size=(480, 640), crops=(2, 2), side=SIDE))
    selection = keep_some(views)
    tensors = [views.features, views.valid, selection.order, selection.count, LINE]
    before = [tensor.clone() for tensor in tensors]
    packed = pack(views, selection, lambda x: x, LINE)
    origin = packed.origin.tolist()
    packed.features.zero_()
    packed.origin.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert origin_of(views, selection) == origin


# --- merged, appended and already reduced tokens ---------------------------------------------------------------------


def test_merged_features_take_the_place_of_the_originals() -> None:
    views = views_of(AnyResGrid(image_size=(480, 640), crops=(2, 2), side=SIDE))
    selection = keep_some(views)
    plain = pack(views, selection, lambda x: x, LINE)
    selection.features = views.features + 1000
    merged = pack(views, selection, lambda x: x, LINE)
    assert torch.equal(merged.origin, plain.origin)
    patches = plain.origin >= 0
    assert torch.equal(merged.features[patches], plain.features[patches] + 1000)
    assert torch.equal(merged.features[~patches], plain.features[~patches])


def with_extra(selection: Selection, anchors: list[tuple[int, int]]) -> Selection:
    """Append tokens 5000, 5001, … behind the given (view, patch)."""
    number = 5000.0 + torch.arange(len(anchors))
    view, anchor = torch.tensor(anchors).T
    selection.extra = Extra(features=torch.stack((number, -number), -1), view=view, anchor=anchor)
    return selection


def numbers(views: Views, selection: Selection) -> list[int]:
    """The sequence by the first feature: patch numbers, 5000… for appended tokens, -7 for newlines."""
    packed = pack(views, selection, lambda x: x, LINE)
    assert (packed.origin == EXTRA).sum() == len(selection.extra.features)
    assert torch.equal(packed.origin == EXTRA, packed.features[:, 0] >= 5000)
    assert len(packed.features) == packed.patches + packed.newlines + len(selection.extra.features)
    return packed.features[:, 0].int().tolist()


def test_appended_tokens_follow_their_anchor() -> None:
    # 2x2 patches, two crops side by side: canvas rows are 4 5 8 9 and 6 7 10 11.
    views = views_of(AnyResGrid(image_size=(168, 84), crops=(2, 1), side=2))
    selection = with_extra(keep_all(views), [(0, 1), (1, 3), (2, 0), (2, 1)])
    assert numbers(views, selection) == [0, 1, 5000, 2, 3, 4, 5, 8, 5002, 9, 5003, -7, 6, 7, 5001, 10, 11, -7]


def test_appended_tokens_behind_a_whole_view() -> None:
    views = views_of(AnyResGrid(image_size=(168, 84), crops=(2, 1), side=2))
    selection = with_extra(keep_all(views), [(1, 4), (0, 4), (2, 4)])
    # Behind the thumbnail, and behind the whole canvas, in the order given.
    assert numbers(views, selection) == [0, 1, 2, 3, 5001, 4, 5, 8, 9, -7, 6, 7, 10, 11, -7, 5000, 5002]


def test_a_token_behind_the_view_follows_one_at_its_last_patch() -> None:
    views = views_of(AnyResGrid(image_size=(84, 84), side=2))
    assert numbers(views, with_extra(keep_all(views), [(0, 4), (0, 3)])) == [0, 1, 2, 3, 5001, 5000, -7]


def test_appended_tokens_stand_where_a_dropped_anchor_was() -> None:
    views = views_of(AnyResGrid(image_size=(168, 84), crops=(2, 1), side=2))
    order = torch.arange(4).repeat(3, 1)
    selection = with_extra(Selection(order=order, count=torch.tensor([1, 2, 2])), [(0, 2), (1, 2), (1, 1)])
    assert numbers(views, selection) == [0, 5000, 4, 5, 5002, 8, 9, -7, 5001, -7]


def test_appended_tokens_follow_anchors_in_order_of_worth() -> None:
    views = views_of(AnyResGrid(image_size=(84, 84), side=2))
    layout = Layout(thumbnail="score")
    selection = Selection(order=torch.tensor([[2, 0, 3, 1]]), count=torch.tensor([3]), layout=layout)
    assert numbers(views, with_extra(selection, [(0, 2), (0, 3), (0, 4)])) == [2, 5000, 0, 3, 5001, 5002, -7]


def reduced() -> Views:
    """Views of which the encoder left three of four patches each, in no order."""
    ids = torch.tensor([[3, 0, 1], [2, 1, 3], [0, 3, 2]])
    number = torch.arange(3)[:, None] * 4 + ids
    grid = AnyResGrid(image_size=(168, 84), crops=(2, 1), side=2)
    return Views(features=torch.stack((number, -number), -1).float(), grid=grid, ids=ids)


def test_tokens_the_encoder_already_reduced() -> None:
    views = reduced()
    # Kept: patches 3 and 0 of the thumbnail, 2 and 3 of crop 0, all of crop 1.
    order = torch.tensor([[0, 1, 2], [0, 2, 1], [0, 1, 2]])
    selection = Selection(order=order, count=torch.tensor([2, 2, 3]))
    packed = pack(views, selection, lambda x: x, LINE)
    # Canvas rows: 4 5 | 8 9 and 6 7 | 10 11.
    assert packed.origin.tolist() == [0, 3, 8, -1, 6, 7, 10, 11, -1]
    assert packed.features[:, 0].tolist() == [0, 3, 8, -7, 6, 7, 10, 11, -7]


def test_appended_tokens_among_reduced_ones_are_anchored_by_patch() -> None:
    views = reduced()
    selection = Selection(order=torch.arange(3).repeat(3, 1), count=torch.tensor([3, 3, 3]))
    # Patch 1 of the thumbnail, patches 3 and 1 of crop 0, the whole of crop 1: none is found at its number's slot.
    selection = with_extra(selection, [(0, 1), (1, 3), (1, 1), (2, 4)])
    assert numbers(views, selection) == [0, 1, 5000, 3, 5, 5002, 8, -7, 6, 7, 5001, 10, 11, -7, 5003]


def test_appended_tokens_stand_where_the_encoder_dropped_their_anchor() -> None:
    views = reduced()
    selection = Selection(order=torch.arange(3).repeat(3, 1), count=torch.tensor([3, 3, 3]))
    selection = with_extra(selection, [(0, 2), (1, 0)])
    assert numbers(views, selection) == [0, 1, 5000, 3, 5001, 5, 8, -7, 6, 7, 10, 11, -7]


@pytest.mark.parametrize("layout", ["sliced", "dense", "permuted", "expanded", "one view", "reversed views"])
def test_rows_are_gathered_whatever_the_memory_holds_between_them(layout: str) -> None:
    hidden = torch.randn(3, 7, 4)
    features = {
        "sliced": hidden[:, 1:],
        "dense": hidden,
        "permuted": hidden.permute(0, 2, 1),
        "expanded": hidden[:1, :1].expand(3, 5, -1),
        "one view": hidden[1:2, 2:],
        "reversed views": hidden[1:, :5, ::2],
    }[layout]
    index = torch.randperm(features.shape[0] * features.shape[1])
    assert torch.equal(_rows(features, index), features.flatten(0, 1)[index])
    for nothing in (features[:, :, :0], features[:, :0]):
        assert torch.equal(_rows(nothing, index[:0]), nothing.flatten(0, 1)[index[:0]])
