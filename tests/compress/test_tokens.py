"""How many, which ones, and how a total is shared out: against exact arithmetic and plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.compress.tokens import apportion, budget, fill_shares, on_device, top_indices, unit
from tests.compress.reference_released import largest_remainder, water_level_shares


@pytest.mark.parametrize(
    ("ratio", "n", "expected"),
    [
        (0.25, 576, 144),
        (0.1, 576, 57),
        (1.0, 576, 576),
        (0.75, 2304, 1728),
        (0.29, 100, 28),
        (0.001, 576, 0),
        (0.5, 0, 0),
    ],
)
def test_budget_truncates_the_float_product(ratio: float, n: int, expected: int) -> None:
    # 0.29 · 100 is 28.999999999999996 in floats, and so it is for the released codes.
    assert budget(ratio, n) == expected


def test_numbers_are_put_on_a_device_without_waiting() -> None:
    assert on_device([3, 1], "cpu").tolist() == [3, 1]
    assert on_device([[3], [1]], "cpu", torch.float64).dtype == torch.float64
    there = on_device((2,), "meta", torch.long)
    assert (there.device.type, there.dtype, there.shape) == ("meta", torch.long, (1,))


# --- top_indices -----------------------------------------------------------------------------------------------------


def test_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([[1.0, 3.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert top_indices(scores).tolist() == [[1, 3, 4, 0, 2], [0, 1, 2, 3, 4]]


def test_invalid_candidates_come_last() -> None:
    scores = torch.tensor([5.0, -1e30, 9.0, 0.0])
    valid = torch.tensor([True, True, False, True])
    assert top_indices(scores, valid).tolist() == [0, 3, 1, 2]
    assert top_indices(scores, ~valid)[0] == 2
    assert top_indices(scores, torch.zeros(4, dtype=torch.bool)).sort().values.tolist() == [0, 1, 2, 3]


@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=40), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_top_indices_equals_a_stable_sort(values: list[int], dtype: torch.dtype) -> None:
    scores = torch.tensor(values, dtype=dtype)
    before = scores.clone()
    assert top_indices(scores).tolist() == sorted(range(len(values)), key=lambda i: (-values[i], i))
    valid = scores >= 0
    first = [i for i in sorted(range(len(values)), key=lambda i: (-values[i], i)) if values[i] >= 0]
    assert top_indices(scores, valid)[: len(first)].tolist() == first
    assert torch.equal(scores, before)


# --- unit ------------------------------------------------------------------------------------------------------------


def test_unit_scales_the_valid_entries_alone() -> None:
    scores = torch.tensor([[3.0, 100.0, -4.0], [1.0, 2.0, 2.0], [0.0, 7.0, 0.0]])
    valid = torch.tensor([[True, False, True], [True, True, True], [True, False, True]])
    scaled = unit(scores, valid)
    assert scaled[0].tolist() == pytest.approx([0.6, 0.0, -0.8])
    assert scaled[1].tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert scaled[2].tolist() == [0.0, 0.0, 0.0]  # nothing to divide by
    assert scores[0, 1] == 100.0
    assert torch.equal(unit(scores), unit(scores, torch.ones_like(valid)))


# --- fill_shares -----------------------------------------------------------------------------------------------------


@st.composite
def crops(draw: st.DrawFn) -> tuple[list[float], list[int], int]:
    """Weights, capacities and a total that fits."""
    n = draw(st.integers(1, 6))
    scale = draw(st.sampled_from([1e-6, 0.25, 1.0, 50.0]))
    weights = draw(st.lists(st.floats(0.01, 1.0).map(lambda w: w * scale), min_size=n, max_size=n))
    if draw(st.booleans()):  # several equal ones
        weights = [weights[0]] * (n // 2) + weights[n // 2 :]
    capacity = draw(st.lists(st.integers(0, 576) | st.sampled_from([0, 576]), min_size=n, max_size=n))
    return weights, capacity, draw(st.integers(0, sum(capacity)) | st.just(sum(capacity)))


def shared(weights: list[float], capacity: list[int], total: int) -> torch.Tensor:
    return fill_shares(torch.tensor(weights, dtype=torch.float64), torch.tensor(capacity, dtype=torch.float64), total)


HAND = [
    # Proportional to weight · capacity: nobody is full.
    ([1.0, 3.0], [10, 10], 8, [2.0, 6.0]),
    # The second is full at 10; the rest goes to the others as 1 : 2.
    ([1.0, 9.0, 2.0], [10, 10, 10], 16, [2.0, 10.0, 4.0]),
    # What the last cannot take fills the third as well; 13 are left for the first two as 1 : 2.
    ([1.0, 2.0, 4.0, 8.0], [10, 10, 10, 10], 33, [13 / 3, 26 / 3, 10.0, 10.0]),
    # An empty crop takes nothing, equal weights share by size.
    ([1.0, 1.0, 1.0], [0, 10, 30], 20, [0.0, 5.0, 15.0]),
    ([1.0, 5.0], [0, 0], 0, [0.0, 0.0]),
    ([0.1, 5.0], [7, 9], 16, [7.0, 9.0]),
    ([0.1, 5.0], [7, 9], 0, [0.0, 0.0]),
    # Next to nothing gets what the full one leaves, and no sum loses it beside the large one.
    ([1.0, 1e-30, 3e-30], [10, 10, 10], 18, [10.0, 2.0, 6.0]),
    ([1.0, 1e-30], [10, 0], 10, [10.0, 0.0]),
    ([], [], 0, []),
]


@pytest.mark.parametrize(("weights", "capacity", "total", "expected"), HAND)
def test_fill_shares_by_hand(weights: list[float], capacity: list[int], total: int, expected: list[float]) -> None:
    assert shared(weights, capacity, total).tolist() == pytest.approx(expected)
    assert [float(s) for s in water_level_shares(weights, capacity, total)] == pytest.approx(expected)


@given(case=crops())
@settings(max_examples=500, deadline=None, derandomize=True)
def test_fill_shares_equals_the_exact_water_level(case: tuple[list[float], list[int], int]) -> None:
    weights, capacity, total = case
    shares = shared(weights, capacity, total).tolist()
    assert shares == pytest.approx([float(s) for s in water_level_shares(weights, capacity, total)], abs=1e-8)
    assert sum(shares) == pytest.approx(total, abs=1e-8)
    assert all(0 <= share <= c for share, c in zip(shares, capacity, strict=True))
    # Heavier means fuller, and equal means equal.
    level = [(w, s / c) for w, s, c in zip(weights, shares, capacity, strict=True) if c]
    assert all(f <= g + 1e-12 for v, f in level for w, g in level if v <= w)


# --- apportion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "capacity", "total", "expected"),
    [
        ([1.2, 2.7, 3.1], [9, 9, 9], 7, [1, 3, 3]),
        ([1.5, 1.5, 1.5, 1.5], [9, 9, 9, 9], 6, [2, 2, 1, 1]),  # ties: lower index
        ([3.0, 1.0, 0.0], [3, 3, 0], 4, [3, 1, 0]),
        ([3.0, 0.5, 0.5], [3, 1, 1], 4, [3, 1, 0]),  # the full one cannot take more
        ([], [], 0, []),
    ],
)
def test_apportion_by_hand(shares: list[float], capacity: list[int], total: int, expected: list[int]) -> None:
    rounded = apportion(torch.tensor(shares, dtype=torch.float64), total)
    assert rounded.tolist() == expected == largest_remainder(shares, capacity, total)
    assert rounded.dtype == torch.long


@given(case=crops())
@settings(max_examples=500, deadline=None, derandomize=True)
def test_apportion_meets_the_total(case: tuple[list[float], list[int], int]) -> None:
    weights, capacity, total = case
    shares = shared(weights, capacity, total)
    rounded = apportion(shares, total).tolist()
    assert sum(rounded) == total
    assert all(0 <= k <= c for k, c in zip(rounded, capacity, strict=True))
    assert all(abs(k - s) < 1 + 1e-9 for k, s in zip(rounded, shares.tolist(), strict=True))
    assert rounded == largest_remainder(shares.tolist(), capacity, total)


@given(n=st.integers(1, 9), size=st.integers(1, 576), data=st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_equal_crops_differ_by_one_at_most_and_the_first_get_more(n: int, size: int, data: st.DataObject) -> None:
    total = data.draw(st.integers(0, n * size))
    ones, sizes = torch.ones(n, dtype=torch.float64), torch.full((n,), float(size), dtype=torch.float64)
    rounded = apportion(fill_shares(ones, sizes, total), total).tolist()
    assert rounded == [math.ceil((total - i) / n) for i in range(n)]
