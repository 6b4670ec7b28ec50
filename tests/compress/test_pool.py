"""Pooling against average pooling where it divides, a loop-written reference and invariants."""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llava.anyres import AnyResGrid
from llava.compress import get
from llava.compress.base import Layout, Views
from llava.compress.pack import pack
from llava.compress.pool import _cells
from tests.compress.test_fastervlm import (
    RATIOS,
    SIDE,
    check_through_the_model,
    equal_shares,
    every_dtype,
    every_image,
    every_ratio,
    grid_of,
    laid_out,
    patches_of,
    sequence_of,
    views_of,
)

Cell = tuple[int, int, int, int]


# --- average pooling, where the budget is a square -------------------------------------------------------------------

# The canvas of 640x480 is unpadded to 48x36 patches, 24x18 of every crop, at the bottom of the upper ones.
SQUARES = [*(((672, 672), stride) for stride in (1, 2, 3, 4, 6)), *(((640, 480), stride) for stride in (1, 2, 3, 6))]


@pytest.mark.parametrize(("size", "stride"), SQUARES)
def test_a_square_budget_is_average_pooling(size: tuple[int, int], stride: int) -> None:
    views = views_of(AnyResGrid(image_size=size, crops=(2, 2)))
    selection = get("pool", retention_ratio=1 / stride**2).select(views)
    pad = {672: 0, 480: 6}[size[1]]
    for view, rows in enumerate([slice(24), *[slice(pad, 24)] * 2, *[slice(24 - pad)] * 2]):
        plane = views.features[view].T.reshape(1, 8, 24, 24)[:, :, rows]
        expected = F.avg_pool2d(plane, stride).flatten(2)[0].T
        torch.testing.assert_close(selection.features[view, selection.keep[view]], expected)


def test_four_by_hand() -> None:
    # Patches 0 to 15 in rows of four: the means of the quarters, at the first patch of each quarter.
    views = Views(
        features=torch.arange(16.0)[None, :, None], grid=AnyResGrid(image_size=(9, 9), side=4), layout=Layout()
    )
    selection = get("pool", retention_ratio=0.25).select(views)
    packed = pack(views, selection, lambda x: x, torch.zeros(1))
    assert packed.origin.tolist() == [0, 2, 8, 10, -1]
    assert packed.features[:, 0].tolist() == [2.5, 4.5, 10.5, 12.5, 0.0]


def test_three_by_hand() -> None:
    # Three of sixteen: two bands of two rows, one cell above and two below.
    views = Views(features=torch.arange(16.0)[None, :, None], grid=AnyResGrid(image_size=(9, 9), side=4))
    selection = get("pool", retention_ratio=0.2).select(views)
    assert [patches.tolist() for patches in selection.keep] == [[1, 8, 10]]
    assert selection.features[0, [1, 8, 10], 0].tolist() == [3.5, 10.5, 12.5]


# --- a loop-written reference ----------------------------------------------------------------------------------------


def cells_of(count: int, box: Cell) -> Iterator[Cell]:
    """Rectangles `(left, top, right, bottom)`: bands, each cut into as many cells as bring the number along."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    bands = min(max(round((count * height / width) ** 0.5), -(-count // width)), height, count)
    for band in range(bands):
        above, below = (top + int(Fraction(height * i, bands)) for i in (band, band + 1))
        cells = int(Fraction(count * (band + 1), bands)) - int(Fraction(count * band, bands))
        for cell in range(cells):
            before, behind = (left + int(Fraction(width * i, cells)) for i in (cell, cell + 1))
            yield before, above, behind, below


def box_of(patches: list[int], side: int) -> Cell:
    x, y = [patch % side for patch in patches], [patch // side for patch in patches]
    return min(x), min(y), max(x) + 1, max(y) + 1


@every_image
@every_dtype
@every_ratio
def test_equals_the_naive_reference(image: str, dtype: torch.dtype, ratio: float) -> None:
    grid = grid_of(image)
    views = views_of(grid, dtype)
    features = views.features.tolist()
    kept: list[list[int]] = []
    values: dict[tuple[int, int], list[float]] = {}
    for view, (valid, count) in enumerate(zip(patches_of(grid), equal_shares(grid, ratio), strict=True)):
        kept.append([])
        for left, top, right, bottom in cells_of(count, box_of(valid, SIDE)) if count else []:
            members = [y * SIDE + x for y in range(top, bottom) for x in range(left, right)]
            middle = (top + bottom - 1) // 2 * SIDE + (left + right - 1) // 2
            kept[view].append(middle)
            values[view, middle] = [sum(features[view][m][i] for m in members) / len(members) for i in range(8)]
    selection = get("pool", retention_ratio=ratio).select(views)
    expected = laid_out(grid, kept)
    assert sequence_of(views, selection) == expected
    packed = pack(views, selection, lambda x: x, torch.zeros(8))
    tokens = packed.features[packed.origin >= 0]
    assert tokens.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    wanted = torch.tensor([values[entry] for entry in expected if entry in values])
    torch.testing.assert_close(tokens.float(), wanted, atol=tolerance, rtol=tolerance)


# --- invariants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "box", [(0, 0, 24, 24), (0, 6, 24, 24), (0, 0, 18, 24), (3, 2, 4, 11), (5, 5, 23, 6), (2, 3, 9, 8), (0, 0, 24, 2)]
)
def test_every_patch_is_in_exactly_one_cell_whatever_the_budget(box: Cell) -> None:
    width, height = box[2] - box[0], box[3] - box[1]
    inside = torch.zeros(24, 24, dtype=torch.long)
    inside[box[1] : box[3], box[0] : box[2]] = 1
    for count in range(1, width * height + 1):
        patches, member, middle = _cells(count, box, 24, torch.device("cpu"))
        assert torch.equal(torch.bincount(patches[member], minlength=576), inside.flatten())
        assert len(middle.unique()) == len(patches) == count
        assert ((patches == middle[:, None]) & member).any(1).all()  # the middle is in its cell
        sizes = member.sum(1)
        assert int(sizes.max()) <= 4 * int(sizes.min())


@every_dtype
def test_a_plain_image_stays_as_it_is(dtype: torch.dtype) -> None:
    for image in ("single", "2x2 wide", "3x1"):
        grid = grid_of(image)
        colour = torch.tensor([0.3, -2.0, 7.0]).to(dtype).expand(grid.n_views, SIDE**2, 3).contiguous()
        for ratio in RATIOS:
            selection = get("pool", retention_ratio=ratio).select(views_of(grid, features=colour))
            torch.testing.assert_close(selection.features, colour)


def test_padding_is_not_pooled() -> None:
    grid = grid_of("2x2 wide")
    valid = grid.valid()
    plane = torch.where(valid, 1.0, 1000.0)[..., None]
    views = views_of(grid, features=plane)
    for ratio in RATIOS:
        selection = get("pool", retention_ratio=ratio).select(views)
        assert (selection.features[selection.kept] == 1).all()


def test_pooling_looks_at_sizes_alone() -> None:
    one, other = views_of(grid_of("2x2 wide")), views_of(grid_of("2x2 wide"))
    other.features = torch.randn_like(other.features)
    method = get("pool", retention_ratio=0.3)
    assert torch.equal(method.select(one).order, method.select(other).order)


def test_through_the_model(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_through_the_model(loaded, "pool(retention_ratio=0.3)", monkeypatch)
