"""AnyRes geometry against the published table, transformers' own functions and naive references."""

from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from llava.anyres import AnyResGrid, best_resolution, choose_grid, parse_pinpoints
from llava.constants import InputError

TILE, SIDE = 336, 24
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # those of the published checkpoints
PAPER_GRIDS = [(2, 2), (1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (4, 1)]  # the templates the paper lists
PAPER_PINPOINTS = [[cols * TILE, rows * TILE] for cols, rows in PAPER_GRIDS]

# image, best canvas, kept patches (w x h), tokens with newlines: reference/llava_surface.md, section 3
TABLE = [
    ((336, 336), (336, 672), (24, 24), 1176),
    ((224, 224), (336, 672), (24, 24), 1176),
    ((640, 480), (672, 672), (48, 36), 2340),
    ((480, 640), (672, 672), (36, 48), 2352),
    ((640, 427), (672, 672), (48, 32), 2144),
    ((1024, 768), (672, 672), (48, 36), 2340),
    ((1024, 899), (672, 672), (48, 42), 2634),
    ((1920, 1080), (672, 672), (48, 28), 1948),
    ((1000, 300), (1008, 336), (72, 22), 2182),
    ((300, 1000), (336, 1008), (22, 72), 2232),
    ((672, 672), (672, 672), (48, 48), 2928),
    ((2000, 400), (1008, 336), (72, 14), 1598),
]

# Many examples, the same ones on every run, nothing written to the working directory.
thorough = settings(max_examples=2500, deadline=None, derandomize=True, database=None)
brief = settings(max_examples=500, deadline=None, derandomize=True, database=None)


def lengths(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


# Small images tie between canvases, slivers leave empty boxes, multiples of 24 make the exact lengths that float noise
# pushes below an integer: each kind gets its share.
sizes = st.one_of(
    st.tuples(lengths(1, 400), lengths(1, 400)),
    st.tuples(lengths(1, 5000), lengths(1, 5000)),
    st.tuples(lengths(1, 12), lengths(1, 20000)),
    st.tuples(lengths(1, 20000), lengths(1, 12)),
    st.builds(lambda w, h, k: (w * k, h * k), lengths(1, 48), lengths(1, 48), lengths(1, 60)),
)
grids = st.sampled_from(sorted({*PAPER_GRIDS, (3, 2), (2, 3), (5, 1), (1, 1)}))
rules = st.sampled_from(["llava", "hf"])


def grid_of(size: tuple[int, int], rule: str = "llava", side: int = SIDE) -> AnyResGrid:
    return AnyResGrid(image_size=size, crops=choose_grid(size, PINPOINTS, TILE, rule), side=side, rule=rule)


def tokens(grid: AnyResGrid) -> int:
    """Patches plus one newline per kept row."""
    return grid.n_patches() + grid.unpadded[1]


# --- the published numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "canvas", "kept", "total"), TABLE)
def test_table_of_published_sizes(size, canvas, kept, total):
    assert best_resolution(size, parse_pinpoints(PINPOINTS)) == canvas
    grid = grid_of(size)
    assert grid.crops == (canvas[0] // TILE, canvas[1] // TILE)
    assert grid.n_crops == canvas[0] * canvas[1] // TILE**2
    assert grid.n_views == grid.n_crops + 1
    assert grid.unpadded == kept
    assert tokens(grid) == total


@pytest.mark.parametrize(
    ("size", "crops", "box", "total"),
    [
        ((640, 480), (2, 2), (0, 6, 48, 42), 2340),
        ((480, 640), (2, 2), (6, 0, 42, 48), 2352),
        ((1000, 500), (2, 1), (0, 0, 48, 24), 1752),
        ((336, 1000), (1, 3), (0, 0, 24, 72), 2376),
    ],
)
def test_oracle_o1(size, crops, box, total):
    grid = grid_of(size)
    assert (grid.crops, grid.box, tokens(grid)) == (crops, box, total)


@pytest.mark.parametrize(("size", "box"), [((100, 50), (0, 2, 8, 6)), ((50, 100), (2, 0, 6, 8))])
def test_box_of_oracle_o5(size, box):
    grid = AnyResGrid(image_size=size, crops=(2, 2), side=4)
    assert grid.box == box
    assert sum(grid.crop_patches()) == 32


def test_oracle_o1c():
    assert grid_of((704, 396)).box == (0, 11, 48, 37)
    assert grid_of((704, 396), "hf").box == (0, 10, 48, 38)


def exact_sizes(low: int, high: int) -> list[tuple[int, int]]:
    """Sizes whose unpadded length is a whole number of patches in exact arithmetic."""
    w, h = np.meshgrid(np.arange(low, high + 1), np.arange(low, high + 1), indexing="ij")
    hit = np.zeros_like(w, dtype=bool)
    for cols, rows in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)):
        hit |= (h * cols * SIDE % w == 0) | (w * rows * SIDE % h == 0)
    candidates = np.argwhere(hit) + low
    return [size for size in map(tuple, candidates.tolist()) if exact_length(grid_of(size)).denominator == 1]


def is_wide(grid: AnyResGrid) -> bool:
    """The image is wider than its canvas: rows are padding, not columns."""
    return Fraction(*grid.image_size) > Fraction(*grid.canvas)


def exact_length(grid: AnyResGrid) -> Fraction:
    """Length of the image along the padded axis in patches, without float noise."""
    (width, height), (across, down) = grid.image_size, grid.canvas
    return Fraction(height * across, width) if is_wide(grid) else Fraction(width * down, height)


def other_rule(grid: AnyResGrid) -> AnyResGrid:
    return replace(grid, rule="hf")


def test_rounding_rules_differ_for_31_of_11849_exact_sizes():
    sizes = exact_sizes(100, 1400)
    differing = {size for size in sizes if grid_of(size).box != other_rule(grid_of(size)).box}
    assert (len(differing), len(sizes)) == (31, 11849)
    assert {(704, 396), (205, 656), (352, 924)} <= differing


def test_36_sizes_from_40_to_1399_change_with_the_rounding_rule():
    # Only exact lengths can differ: a fraction is at least 1/1399 away from the next integer.
    sizes = exact_sizes(40, 1399)
    differing = {size for size in sizes if grid_of(size).box != other_rule(grid_of(size)).box}
    assert len(differing) == 36
    assert {(55, 176), (88, 99), (205, 656)} <= differing


# --- which canvas ----------------------------------------------------------------------------------------------------


def test_tie_rule_of_transformers_differs_exactly_for_images_that_fit_into_one_view():
    # 131044 sizes, 11449 = 107² of them with both sides up to 336.
    axis = range(16, 1100, 3)
    differing = set()
    for size in product(axis, axis):
        ours, theirs = choose_grid(size, PINPOINTS, TILE), choose_grid(size, PINPOINTS, TILE, "hf")
        if ours != theirs:
            assert (ours, theirs) == ((1, 2), (2, 1))
            differing.add(size)
    assert differing == {size for size in product(axis, axis) if max(size) <= TILE}
    assert (len(differing), len(axis) ** 2) == (11449, 131044)


@pytest.mark.parametrize("size", [(336, 336), (336, 1), (1, 336), (1, 1)])
def test_tie_rule_includes_the_edge(size):
    assert (choose_grid(size, PINPOINTS, TILE), choose_grid(size, PINPOINTS, TILE, "hf")) == ((1, 2), (2, 1))


@pytest.mark.parametrize("size", [(337, 336), (336, 337), (337, 1), (1, 337)])
def test_tie_rule_ends_behind_the_edge(size):
    assert choose_grid(size, PINPOINTS, TILE) == choose_grid(size, PINPOINTS, TILE, "hf")


def test_tie_rule_example():
    assert tokens(grid_of((40, 47))) == 1276
    assert tokens(grid_of((40, 47), "hf")) == 1080


# Lengths that end in .9997 and .9998: rounded up by a rule of fewer than 7 digits.
@example(size=(3151, 3689), pinpoints=PINPOINTS)
@example(size=(5735, 1832), pinpoints=PINPOINTS)
@thorough
@given(size=sizes, pinpoints=st.sampled_from([PINPOINTS, PAPER_PINPOINTS]))
def test_hf_rule_equals_transformers(size, pinpoints):
    width, height = size
    rows, cols = get_anyres_image_grid_shape((height, width), pinpoints, TILE)
    assert choose_grid(size, pinpoints, TILE, "hf") == (cols, rows)
    best = select_best_resolution((height, width), pinpoints)
    assert best_resolution(size, [(w, h) for h, w in parse_pinpoints(pinpoints)]) == best[::-1]

    grid = AnyResGrid(image_size=size, crops=(cols, rows), side=SIDE, rule="hf")
    across, down = grid.canvas
    places = torch.arange(down * across).reshape(1, down, across)
    left, top, right, bottom = grid.box
    assert torch.equal(places[:, top:bottom, left:right], unpad_image(places, (height, width)))


def naive_canvas(size, pinpoints):
    """The rule in words: most image pixels, then least waste, then first in the list."""
    ranked = []
    for place, (across, down) in enumerate(pinpoints):
        scale = min(across / size[0], down / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        ranked.append((-shown, across * down - shown, place))
    return tuple(pinpoints[min(ranked)[2]])


def naive_mask(size, crops, side):
    """Which patches of the canvas the image covers, row by row."""
    (width, height), across, down = size, crops[0] * side, crops[1] * side
    if width / height > across / down:
        pad = (down - int(height * (across / width))) // 2
        return [[pad <= y < down - pad for _ in range(across)] for y in range(down)]
    pad = (across - int(width * (down / height))) // 2
    return [[pad <= x < across - pad for x in range(across)] for _ in range(down)]


@thorough
@given(size=sizes, pinpoints=st.sampled_from([PINPOINTS, PAPER_PINPOINTS, PINPOINTS[::-1]]))
def test_llava_rule_chooses_the_naive_canvas(size, pinpoints):
    canvas = naive_canvas(size, pinpoints)
    assert best_resolution(size, parse_pinpoints(pinpoints)) == canvas
    assert choose_grid(size, pinpoints, TILE) == (canvas[0] // TILE, canvas[1] // TILE)


@brief
@given(size=sizes, crops=grids, side=st.integers(1, 12))
def test_llava_rule_keeps_the_naive_box(size, crops, side):
    grid = AnyResGrid(image_size=size, crops=crops, side=side)
    mask = torch.tensor(naive_mask(size, crops, side))
    left, top, right, bottom = grid.box
    boxed = torch.zeros_like(mask)
    boxed[top:bottom, left:right] = True
    assert torch.equal(boxed, mask)


@thorough
@given(size=sizes, crops=grids, side=st.integers(1, 24), rule=rules)
def test_box_is_exact_arithmetic_but_for_whole_lengths(size, crops, side, rule):
    grid = AnyResGrid(image_size=size, crops=crops, side=side, rule=rule)
    exact, axis = exact_length(grid), int(is_wide(grid))
    full, kept = grid.canvas[axis], grid.unpadded[axis]
    assert grid.unpadded[1 - axis] == grid.canvas[1 - axis]
    noisy = {int(exact)}
    if rule == "llava" and exact.denominator == 1:
        noisy.add(int(exact) - 1)
    assert kept in {full - 2 * ((full - n) // 2) for n in noisy}


@brief
@given(size=st.tuples(lengths(1, TILE), lengths(1, TILE)))
def test_first_listed_canvas_wins_a_tie(size):
    # All images up to one tile are shown whole and waste equally on both two-tile canvases.
    assert choose_grid(size, [[336, 672], [672, 336]], TILE) == (1, 2)
    assert choose_grid(size, [[672, 336], [336, 672]], TILE) == (2, 1)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0), (-3, 7), (7, -1)])
@pytest.mark.parametrize("rule", ["llava", "hf"])
def test_an_image_without_pixels_is_the_users_error(size, rule):
    with pytest.raises(InputError) as error:
        choose_grid(size, PINPOINTS, TILE, rule)
    assert f"{size[0]}x{size[1]}" in str(error.value)


@pytest.mark.parametrize("rule", ["llava", "hf"])
@pytest.mark.parametrize("size", [(640, 480), (40, 47), (300, 1000)])
def test_pinpoints_may_be_a_string_or_tuples(size, rule):
    expected = choose_grid(size, PINPOINTS, TILE, rule)
    assert choose_grid(size, str(PINPOINTS), TILE, rule) == expected
    assert choose_grid(size, tuple(map(tuple, PINPOINTS)), TILE, rule) == expected


def test_parse_pinpoints_gives_tuples_in_order():
    expected = [(336, 672), (672, 336)]
    assert parse_pinpoints("[(336, 672), [672, 336]]") == parse_pinpoints([[336, 672], (672, 336)]) == expected


def test_the_papers_seven_grids_are_each_chosen_for_their_own_aspect():
    for cols, rows in PAPER_GRIDS:
        size = (cols * TILE, rows * TILE)
        grid = AnyResGrid(image_size=size, crops=choose_grid(size, PAPER_PINPOINTS, TILE))
        assert grid.crops == (cols, rows)
        assert grid.box == (0, 0, cols * SIDE, rows * SIDE)
        assert grid.crop_patches() == (SIDE**2,) * (cols * rows)
        assert tokens(grid) == SIDE**2 + rows * SIDE * (cols * SIDE + 1)


# --- crops and masks -------------------------------------------------------------------------------------------------

geometries = st.builds(
    lambda size, crops, side, rule: AnyResGrid(image_size=size, crops=crops, side=side, rule=rule),
    sizes,
    grids,
    st.integers(1, 8),
    rules,
)


def stitch(maps: torch.Tensor, grid: AnyResGrid) -> torch.Tensor:
    """Put the crops' maps `[n, N]` where they belong on the canvas, one by one."""
    canvas = maps.new_zeros(grid.canvas[::-1])
    for index, crop in enumerate(maps):
        row, col = divmod(index, grid.crops[0])
        for y in range(grid.side):
            for x in range(grid.side):
                canvas[row * grid.side + y, col * grid.side + x] = crop[y * grid.side + x]
    return canvas


@brief
@given(grid=geometries)
def test_split_inverts_stitching(grid):
    maps = torch.arange(grid.n_crops * grid.patches_per_view).reshape(grid.n_crops, grid.patches_per_view)
    assert torch.equal(grid.split(stitch(maps, grid)), maps)


def test_split_keeps_any_dtype_and_is_row_major():
    grid = AnyResGrid(image_size=(6, 4), crops=(3, 2), side=2)
    canvas = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    crops = grid.split(canvas)
    assert crops.dtype == torch.bfloat16
    assert crops[1].tolist() == [2, 3, 8, 9]
    assert crops[3].tolist() == [12, 13, 18, 19]


@brief
@given(grid=geometries)
def test_valid_counts_are_the_crop_patches(grid):
    valid = grid.valid()
    assert valid.dtype == torch.bool
    assert valid.shape == (grid.n_views, grid.patches_per_view)
    assert valid[0].all()
    assert tuple(valid[1:].sum(1).tolist()) == grid.crop_patches()
    assert int(valid.sum()) == grid.n_patches()
    everything = grid.valid(unpad=False)
    assert everything.all()
    assert everything.shape == valid.shape
    assert grid.crop_patches(unpad=False) == (grid.patches_per_view,) * grid.n_crops
    assert grid.n_patches(unpad=False) == grid.n_views * grid.patches_per_view


@brief
@given(size=sizes, crops=grids, side=st.integers(1, 6))
def test_valid_is_the_naive_mask_cut_into_crops(size, crops, side):
    grid = AnyResGrid(image_size=size, crops=crops, side=side)
    assert torch.equal(stitch(grid.valid()[1:], grid), torch.tensor(naive_mask(size, crops, side)))


@brief
@given(grid=geometries)
def test_crop_boxes_tile_the_unpadded_box(grid):
    left, top, right, bottom = grid.box
    assert 0 <= left <= right <= grid.canvas[0]
    assert 0 <= top <= bottom <= grid.canvas[1]
    assert grid.unpadded == (right - left, bottom - top)
    # Padding is the same on both sides, and on one axis only.
    assert left == grid.canvas[0] - right
    assert top == grid.canvas[1] - bottom
    assert left == 0 or top == 0

    painted = torch.zeros(grid.canvas[::-1], dtype=torch.int)
    assert len(grid.crop_boxes) == grid.n_crops
    for index, ((x0, y0, x1, y1), n) in enumerate(zip(grid.crop_boxes, grid.crop_patches(), strict=True)):
        row, col = divmod(index, grid.crops[0])
        assert n == max(0, x1 - x0) * max(0, y1 - y0)
        if n:
            assert col * grid.side <= x0 < x1 <= (col + 1) * grid.side
            assert row * grid.side <= y0 < y1 <= (row + 1) * grid.side
            painted[y0:y1, x0:x1] += 1
    expected = torch.zeros_like(painted)
    expected[top:bottom, left:right] = 1
    assert torch.equal(painted, expected)


@brief
@given(grid=geometries)
def test_crop_boxes_of_padding_only_are_empty_slices(grid):
    # Whoever slices a canvas with a box must get nothing for a crop of padding, not a slice counted from the end.
    canvas = torch.ones(grid.canvas[::-1])
    for (x0, y0, x1, y1), n in zip(grid.crop_boxes, grid.crop_patches(), strict=True):
        assert 0 <= x0 <= x1
        assert 0 <= y0 <= y1
        assert canvas[y0:y1, x0:x1].numel() == n


@pytest.mark.parametrize(
    ("size", "unpadded"),
    [
        ((1000, 10), (72, 0)),  # 0.72 of a patch high: nothing is left
        ((30, 1), (24, 0)),
        ((1, 30), (2, 48)),  # 1.6 patches wide: an odd rest is kept whole
        ((10000, 37), (72, 0)),
        ((37, 10000), (0, 72)),
        ((20000, 300), (72, 2)),
        ((1, 1), (24, 24)),
    ],
)
def test_slivers(size, unpadded):
    grid = grid_of(size)
    assert grid.unpadded == unpadded
    assert grid.n_patches() == SIDE**2 + unpadded[0] * unpadded[1]
    assert int(grid.valid()[1:].sum()) == unpadded[0] * unpadded[1]


def test_outer_crops_of_a_narrow_image_hold_padding_only():
    # Not a canvas AnyRes would choose, but pinpoints are free: 300x800 on three columns leaves the outer two empty.
    grid = AnyResGrid(image_size=(300, 800), crops=(3, 2), side=24)
    assert grid.box == (27, 0, 45, 48)
    assert grid.crop_patches() == (0, 18 * 24, 0, 0, 18 * 24, 0)


def test_a_single_view_has_no_crops():
    grid = AnyResGrid(image_size=(640, 480))
    assert (grid.n_crops, grid.n_views, grid.patches_per_view) == (0, 1, 576)
    assert (grid.canvas, grid.box, grid.unpadded) == ((0, 0), (0, 0, 0, 0), (0, 0))
    assert (grid.crop_boxes, grid.crop_patches(), grid.crop_patches(unpad=False)) == ((), (), ())
    assert grid.n_patches() == grid.n_patches(unpad=False) == 576
    assert grid.valid().shape == grid.valid(unpad=False).shape == (1, 576)
    assert grid.valid().all()


def test_grids_are_values():
    grid, twin = grid_of((640, 480)), grid_of((640, 480))
    assert grid.box  # cached from here on, which must not tell the two apart
    assert grid == twin
    assert hash(grid) == hash(twin)
    assert grid != grid_of((640, 481))
    with pytest.raises(FrozenInstanceError):
        grid.side = 12
    with pytest.raises(TypeError):
        AnyResGrid((640, 480))


@pytest.mark.parametrize("pinpoints", ["[[336, 672", "many", None, [336, 672], [[1, 2, 3]]])
def test_unreadable_pinpoints_are_named(pinpoints):
    with pytest.raises(InputError, match="image_grid_pinpoints"):
        choose_grid((640, 480), pinpoints, 336)
