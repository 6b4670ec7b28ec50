"""HiRED against its oracle, a loop-written reference and what the release does differently."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.anyres import AnyResGrid
from llava.compress import get
from llava.compress.base import Layout, Views
from llava.constants import InputError
from tests.compress.reference_released import NL, hired_counts, largest_remainder, single_precision, unpadded_box
from tests.compress.test_fastervlm import (
    RATIOS,
    SIDE,
    best,
    check_through_the_model,
    every_dtype,
    every_image,
    every_ratio,
    grid_of,
    laid_out,
    logits_of,
    patches_of,
    probabilities,
    sequence_of,
    views_of,
)

ALPHAS = (0.0, 0.3, 0.5, 1.0)


def with_favourites(grid: AnyResGrid, early: Tensor) -> Views:
    """Views whose thumbnail has the early [CLS] attention `early` `[S, S]`."""
    rows = logits_of(torch.ones(grid.n_views, grid.patches_per_view))
    rows[0] = logits_of(early.flatten()[None])
    return views_of(grid, cls_logits={0: rows, -2: torch.zeros(grid.n_views, 1, 1 + grid.patches_per_view)})


def counts(views: Views, **fields: Any) -> list[int]:
    return get("hired", **fields).select(views).count.tolist()


# --- the oracle ------------------------------------------------------------------------------------------------------

O10 = torch.tensor([[9, 8, 5, 4], [7, 6, 0, 0], [0, 0, 0, 0], [1, 2, 3, 0.5]])


@pytest.mark.parametrize(("profile", "crops"), [("released", [12, 6, 0, 6]), ("corrected", [12, 6, 3, 3])])
def test_oracle_o10(profile: str, crops: list[int]) -> None:
    views = with_favourites(AnyResGrid(image_size=(672, 672), crops=(2, 2), side=4), O10)
    assert counts(views, retention_ratio=0.5, profile=profile) == [16, *crops]


# --- loop-written references -----------------------------------------------------------------------------------------


def crop_seen_at(grid: AnyResGrid, patch: int) -> int:
    """The crop that shows what the middle of a thumbnail patch shows."""
    left, top, right, bottom = unpadded_box(grid.image_size, grid.crops, grid.side)
    x = left + (patch % grid.side + Fraction(1, 2)) * Fraction(right - left, grid.side)
    y = top + (patch // grid.side + Fraction(1, 2)) * Fraction(bottom - top, grid.side)
    return int(y // grid.side) * grid.crops[0] + int(x // grid.side)


def fill(weights: Sequence[int], capacity: Sequence[int], total: int) -> list[Fraction]:
    """Give `total` out by weight, no more than the capacity; who has no weight gets an equal part of what is left."""
    shares = [Fraction(0)] * len(weights)
    for level in ([Fraction(w) for w in weights], [Fraction(int(w == 0)) for w in weights]):
        open_ = {i for i, w in enumerate(level) if w}
        while open_:
            rest = total - sum(shares[i] for i in range(len(shares)) if i not in open_)
            offer = {i: rest * level[i] / sum(level[k] for k in open_) for i in open_}
            full = {i for i in open_ if offer[i] >= capacity[i]}
            for i in open_:
                shares[i] = min(offer[i], Fraction(capacity[i]))
            if not full:
                break
            open_ -= full
    return shares


def corrected_counts(grid: AnyResGrid, early: Sequence[float], ratio: float, alpha: float) -> list[int]:
    sizes, n = [len(valid) for valid in patches_of(grid)], grid.side**2
    whole = int(ratio * n) + int(ratio * sum(sizes[1:]))
    if not grid.crops:
        return [whole]
    crops = min(whole - min(int(alpha * whole), n), sum(sizes[1:]))
    found = [0] * grid.n_crops
    for patch in best(early, range(n), int((1 - alpha) * n)):
        found[crop_seen_at(grid, patch)] += 1
    return [whole - crops, *largest_remainder(fill(found, sizes[1:], crops), sizes[1:], crops)]


@every_image
@every_dtype
@every_ratio
def test_equals_the_naive_reference(image: str, dtype: torch.dtype, ratio: float) -> None:
    grid = grid_of(image)
    views = views_of(grid, dtype)
    early, late = probabilities(views.cls_logits[0])[0], probabilities(views.cls_logits[-2])
    valid = patches_of(grid)
    for alpha in ALPHAS:
        expected = corrected_counts(grid, early, ratio, alpha)
        kept = [best(s, among, k) for s, among, k in zip(late, valid, expected, strict=True)]
        selection = get("hired", retention_ratio=ratio, alpha=alpha).select(views)
        assert selection.count.tolist() == expected
        assert selection.total == sum(expected)
        assert sequence_of(views, selection) == laid_out(grid, kept)

        # Ranked with the padding, which is taken out afterwards.
        expected = hired_counts(early, grid.crops, SIDE, ratio, alpha, next_=views.layout.unpad)
        ranked = [best(s, range(SIDE**2), k) for s, k in zip(late, expected, strict=True)]
        kept = [[patch for patch in r if patch in among] for r, among in zip(ranked, valid, strict=True)]
        method = get("hired", retention_ratio=ratio, alpha=alpha, profile="released")
        selection, plan = method.select(views), method.plan(grid, views.layout)
        mine = [order[:k].tolist() for order, k in zip(selection.order, selection.count, strict=True)]
        assert mine == (kept if ratio < 1 else [sorted(view) for view in kept])  # nothing is ranked to be kept
        assert sequence_of(views, selection) == [entry for entry in laid_out(grid, kept) if entry != NL]
        assert plan.at_least <= sum(map(len, kept)) <= plan.at_most
        assert plan.exact or (grid.crops and ratio < 1)
        assert selection.total in (None, sum(map(len, kept)))


# --- what corrected and released differ in ---------------------------------------------------------------------------


def test_three_crops_across_see_unequal_parts_of_a_padded_image() -> None:
    # 1000x400: the crops show 18, 24 and 18 columns of the image, which are 7, 10 and 7 columns of the thumbnail. The
    # release cuts the map into three bands of eight rows instead.
    grid = AnyResGrid(image_size=(1000, 400), crops=(3, 1))
    early = torch.ones(24, 24)
    early[:, 7:10] = 2
    views = with_favourites(grid, early)
    fields = {"retention_ratio": 0.2, "alpha": 1 - 3 / 24}  # the favourites are as many as are counted
    total = int(0.2 * 576) + int(0.2 * 60 * 24)
    assert counts(views, **fields) == [int(total * 0.875), 0, total - int(total * 0.875), 0]
    released = get("hired", profile="released", **fields)
    total = int(0.2 * 4 * 576)
    assert released._budgets(grid, views.layout) == (int(total * 0.875), total - int(total * 0.875))
    found = released._found(torch.arange(576).reshape(24, 24)[:, 7:10].flatten(), grid)
    assert found.tolist() == [24, 24, 24]


def test_what_rounding_leaves_is_lost_only_when_released() -> None:
    # 18 patches of the thumbnail count: 6, 4, 3 and 5 of them in its bands, 6, 4, 4 and 4 in its quadrants. 27 tokens
    # are for the crops, half of 54 (released) and of 10 + 43; by bands that is 9, 6, 4.5 and 7.5.
    early = torch.zeros(6, 6)
    for row, columns in enumerate([(0, 1, 2, 3, 4), (0, 3, 4), (0, 1), (0, 1, 3), (3, 4, 5), (0, 1)]):
        early[row, list(columns)] = 1
    views = with_favourites(AnyResGrid(image_size=(672, 672), crops=(2, 2), side=6), early)
    assert counts(views, retention_ratio=0.3, profile="released") == [27, 9, 6, 4, 7]
    assert counts(views, retention_ratio=0.3) == [26, 9, 6, 6, 6]


def test_what_a_full_crop_leaves_goes_to_the_others_only_when_corrected() -> None:
    early = torch.zeros(6, 6)
    early[:3, :3] = 2  # one quadrant holds 9 of the 18 that count; ties go to the lower index
    views = with_favourites(AnyResGrid(image_size=(672, 672), crops=(2, 2), side=6), early)
    for ratio in RATIOS:
        assert sum(counts(views, retention_ratio=ratio)) == int(ratio * 36) + int(ratio * 144)
    # At 0.9 the thumbnail takes 36 of 161 tokens, or of 162 when released. Nine of the 18 favourites are in the second
    # quadrant, as equal ones go by their index, and nine in the second band: both ask for more than a crop holds.
    assert counts(views, retention_ratio=0.9) == [36, 36, 36, 27, 26]
    assert counts(views, retention_ratio=0.9, profile="released") == [36, 36, 36, 0, 0]


def test_crops_without_a_favourite_take_what_full_ones_leave() -> None:
    early = torch.zeros(6, 6)
    early[:3, :3] = 1
    views = with_favourites(AnyResGrid(image_size=(672, 672), crops=(2, 2), side=6), early)
    # A quarter of the thumbnail counts, which is all in the first crop. Of 16 + 64 tokens α wants 60 for the thumbnail,
    # which takes 36; the first crop takes 36 of the other 44.
    fields = {"retention_ratio": 0.45, "alpha": 0.75}
    assert counts(views, **fields) == [36, 36, 3, 3, 2]
    # Released, 60 of 81 are for the thumbnail, and its bands hold 6 and 3 of the nine.
    assert counts(views, profile="released", **fields) == [36, 30, 15, 0, 0]


def test_padding_costs_tokens_only_when_released() -> None:
    grid = grid_of("2x2 wide")
    valid = grid.valid()
    views = views_of(grid)
    views.cls_logits = {0: views.cls_logits[0], -2: logits_of(torch.where(valid, 1.0, 2.0) + torch.rand(valid.shape))}
    # Half of the budget is for the crops, and at this ratio their padding, looked at most, takes all of it.
    released = get("hired", retention_ratio=0.25, profile="released")
    selection = released.select(views)
    assert int(selection.count[1:].sum()) < released._budgets(grid, views.layout)[1] // 2
    assert not (selection.kept & ~valid).any()
    assert int(get("hired", retention_ratio=0.25).select(views).count.sum()) == 9 + int(0.25 * valid[1:].sum())


def test_at_one_the_release_drops_nothing() -> None:
    """It has no budget then; what a full crop cannot hold would be lost otherwise."""
    early = torch.zeros(6, 6)
    early[0] = 1
    for image in ("2x2 full", "2x2 wide", "1x3", "1x2 sliver", "single"):
        grid = grid_of(image)
        sizes = [len(valid) for valid in patches_of(grid)]
        for alpha in ALPHAS:
            fields = {"retention_ratio": 1.0, "alpha": alpha, "profile": "released"}
            assert counts(with_favourites(grid, early), **fields) == sizes
            assert get("hired", **fields).plan(grid).at_least == get("hired", **fields).plan(grid).at_most == sum(sizes)


def test_the_release_shares_out_in_single_precision() -> None:
    # R = 0.25 of five views is 720 tokens, 360 of them for the crops, and 288 favourites, of which the bands hold 92,
    # 100, 48 and 48. 92 / 288 · 360 = 115, for which float64 has 114.99…; 100 / 288 · 360 = 125 is 124.99… in float32.
    early = torch.zeros(4, 144)
    for band, favourites in enumerate((92, 100, 48, 48)):
        early[band, :favourites] = 1
    views = with_favourites(AnyResGrid(image_size=(672, 672), crops=(2, 2)), early.view(24, 24))
    assert counts(views, retention_ratio=0.25, profile="released") == [360, 115, 124, 60, 60]


@pytest.mark.parametrize("total", [27, 144, 360, 864, 1584])
def test_single_precision_over_all_counts(total: int) -> None:
    """Whatever is found in a crop, of 288 and of 172 favourites: the reference's number, which is not float64's."""
    grid = AnyResGrid(image_size=(672, 336), crops=(2, 1))
    views, method, off = views_of(grid), get("hired", profile="released"), 0
    for favourites in (288, 172):
        for found in range(favourites + 1):
            both = torch.tensor([found, favourites - found])
            expected = [int(single_precision(single_precision(f / favourites) * total)) for f in both.tolist()]
            assert method._count(both, views, total).tolist() == expected
            off += expected[0] != int(found / favourites * total)
    assert off == {27: 0, 144: 0, 360: 6, 864: 24, 1584: 18}[total]


@pytest.mark.parametrize("ratio", [0.75, 0.25, 0.1])
def test_a_single_view_of_llava_next_stays_whole_only_when_released(ratio: float) -> None:
    grid = grid_of("single")
    views = views_of(grid, layout=Layout())
    method = get("hired", retention_ratio=ratio, profile="released")
    assert hired_counts([0.0] * 36, None, SIDE, ratio, 0.5, next_=True) == [36]
    assert sequence_of(views, method.select(views)) == [(0, patch) for patch in range(36)]  # no newline, as ever
    assert method.plan(grid).at_least == method.plan(grid).at_most == 36
    assert method.select(views_of(grid)).count.tolist() == [int(36 * ratio)]  # of LLaVA-1.5
    corrected = get("hired", retention_ratio=ratio).select(views)
    assert len(sequence_of(views, corrected)) == int(36 * ratio) + 1


def test_newlines_are_left_out_only_when_released() -> None:
    views = views_of(grid_of("2x2 wide"))
    _, top, _, bottom = views.grid.box
    for profile, newlines in (("released", 0), ("corrected", bottom - top)):
        selection = get("hired", retention_ratio=0.25, profile=profile).select(views)
        assert sequence_of(views, selection).count(NL) == newlines


@pytest.mark.parametrize("profile", ["corrected", "released"])
def test_alpha_one_gives_the_thumbnail_what_it_can_hold(profile: str) -> None:
    # Here the release divides nothing by nothing as soon as the budget exceeds one view.
    views = views_of(AnyResGrid(image_size=(672, 672), crops=(2, 2), side=6))
    assert (
        counts(views, retention_ratio=0.1, alpha=1.0, profile=profile)[0] == {"corrected": 17, "released": 18}[profile]
    )
    found = counts(views, retention_ratio=0.5, alpha=1.0, profile=profile)
    assert found == {"corrected": [36, 14, 14, 13, 13], "released": [36, 0, 0, 0, 0]}[profile]


def test_the_published_budgets() -> None:
    # A square image: rate 75, 50, 25 and 10 % are 576 + 1584, 576 + 864, 360 + 360 and 144 + 144 tokens.
    grid = AnyResGrid(image_size=(672, 672), crops=(2, 2))
    for ratio, parts in ((0.75, (576, 1584)), (0.5, (576, 864)), (0.25, (360, 360)), (0.1, (144, 144))):
        assert get("hired", retention_ratio=ratio, profile="released")._budgets(grid, views_of(grid).layout) == parts
    for ratio in (0.75, 0.5, 0.25):
        assert sum(get("hired", retention_ratio=ratio)._budgets(grid, views_of(grid).layout)) == int(ratio * 2880)


@pytest.mark.parametrize("value", [-0.1, 1.1, "half", True])
def test_bad_alphas_are_named(value: object) -> None:
    with pytest.raises(InputError, match=rf"alpha.*{value}"):
        get("hired", alpha=value)


@pytest.mark.parametrize("profile", ["corrected", "released"])
def test_through_the_model(loaded: Any, profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_through_the_model(loaded, f"hired(retention_ratio=0.3, profile='{profile}')", monkeypatch)
