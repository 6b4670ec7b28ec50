"""VisionZip against its oracle, a loop-written reference and what the release does differently."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.anyres import AnyResGrid
from llava.compress import get
from llava.compress.base import Layout, Views
from llava.compress.pack import pack
from llava.constants import InputError
from tests.compress.reference_released import NL, Entry
from tests.compress.test_fastervlm import (
    SIDE,
    SINGLE,
    bare_canvas,
    best,
    check_through_the_model,
    entries,
    equal_shares,
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

Vector = Sequence[float]


def first_features(views: Views, **fields: Any) -> list[float]:
    """The first feature of every token of the sequence; newlines are 0."""
    method = get("visionzip", **fields)
    return pack(views, method.select(views), lambda x: x, torch.zeros(views.features.shape[-1])).features[:, 0].tolist()


# --- the oracle ------------------------------------------------------------------------------------------------------


def o9() -> Views:
    """Oracle O9 with a ninth patch to make a square: it is dominant, so it changes nothing else."""
    scores = torch.tensor([[0.2, 0.3, 0.25, 0.4, 0.1, 0.1, 0.1, 0.1, 0.9]])
    keys = torch.tensor([[1, 0], [0, 1], [1, 0.1], [0, 1], [1, 1], [0.1, 1], [1, 0], [0, 1], [1, 1]])
    return views_of(
        AnyResGrid(image_size=(9, 9), side=3),
        features=torch.arange(1.0, 10)[None, :, None],
        cls_logits={-2: logits_of(scores)},
        keys={-2: keys[None]},
        cls=torch.tensor([[-1.0]]),
        layout=Layout(),
    )


# Six tokens of nine patches: [CLS], the dominant 2, 4 and 9, and two contextual ones, of 1, 3 and 7 and of 6, 5 and 8.
O9 = {
    "released": [-1, 2, 4, 9, 6, 12.5, 0],
    "corrected": [-1, 11 / 3, 2, 4, 19 / 3, 9, 0],
}


@pytest.mark.parametrize("profile", O9)
def test_oracle_o9(profile: str) -> None:
    found = first_features(o9(), retention_ratio=0.67, contextual=0.34, profile=profile)
    assert found == pytest.approx(O9[profile])


def test_keys_are_averaged_over_heads() -> None:
    # Two heads of width one: whole keys are more like the second target's, their means like the first one's.
    views = o9()
    keys = torch.tensor([[5, 5], [0, 1], [1, -1.5], [0, 1], [1, 1], [1, -9], [4, -3], [0, 1], [1, 1]])
    views.keys = {-2: keys[None]}
    views.cls_logits = {-2: views.cls_logits[-2].expand(-1, 2, -1)}
    # The means of 1, 3, 5, 6, 7, 8 are 5, -.25, 1, -4, .5, .5: 3 joins 6, and 5, 7 and 8 join 1.
    found = first_features(views, retention_ratio=0.67, contextual=0.34)
    assert found == pytest.approx([-1, (1 + 5 + 7 + 8) / 4, 2, 4, (6 + 3) / 2, 9, 0])


# --- a loop-written reference ----------------------------------------------------------------------------------------


def cosine(a: Vector, b: Vector) -> float:
    norm = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm


def merge(
    rest: Sequence[int], contextual: int, keys: Sequence[Vector], features: Sequence[Vector], profile: str
) -> dict[int, list[float]]:
    """Contextual tokens of one view by target."""
    if not contextual:
        return {}
    targets = list(rest)[:: max(1, len(rest) // contextual)][:contextual]
    joined: dict[int, list[int]] = {target: [] for target in targets}
    for patch in rest:
        if patch not in joined:
            joined[max(targets, key=lambda target: cosine(keys[patch], keys[target]))].append(patch)
    tokens = {}
    for target, members in joined.items():
        total = [sum(features[member][i] for member in members) for i in range(len(features[target]))]
        if profile == "released":
            tokens[target] = [a + b / max(1, len(members)) for a, b in zip(features[target], total, strict=True)]
        else:
            tokens[target] = [(a + b) / (1 + len(members)) for a, b in zip(features[target], total, strict=True)]
    return tokens


def expected(views: Views, ratio: float, profile: str) -> tuple[list[Entry], list[list[float]]]:
    """The sequence, and the features of its tokens (newlines left out)."""
    grid, released = views.grid, profile == "released"
    whole = list(range(grid.side**2))
    valid = [whole] * grid.n_views if released else patches_of(grid)
    budgets = [max(1, round(ratio * len(whole)))] * grid.n_views if released else equal_shares(grid, ratio)
    own = [released or 1 < k < len(among) for k, among in zip(budgets, valid, strict=True)]
    features, cls = views.features.tolist(), views.cls.tolist()
    scores = probabilities(views.cls_logits[-2])
    heads = views.cls_logits[-2].shape[1]
    dominant, contextual = [], []
    for view, (k, among) in enumerate(zip(budgets, valid, strict=True)):
        merged = min(int(k * 5 / 32), k - own[view])
        dominant.append(best(scores[view], among, k - own[view] - merged))
        width = len(features[view][0]) // heads
        keys = [
            [sum(key[h * width + i] for h in range(heads)) / heads for i in range(width)]
            for key in views.keys[-2][view].tolist()
        ]
        rest = [patch for patch in among if patch not in dominant[view]]
        contextual.append(merge(rest, merged, keys, features[view], profile))

    own_crops = [view for view in range(1, grid.n_views) if own[view]]
    front = ["+"] * own[0]
    if released:
        behind = len(contextual[0])
        canvas = bare_canvas(grid, dominant)
        base = [entry for entry in canvas if entry[0] == 0]
        sequence = [*front, *base, *["+"] * behind, *canvas[len(base) :]]
        sequence += ["+"] * (len(own_crops) + behind * len(own_crops))
        values = [cls[0], *(features[0][p] for p in sorted(dominant[0])), *contextual[0].values()]
        values += [features[v][p] for v, p in canvas[len(base) :]]
        values += [cls[v] for v in own_crops] + [token for v in own_crops for token in contextual[v].values()]
        return sequence, values
    patches = laid_out(grid, [[*d, *c] for d, c in zip(dominant, contextual, strict=True)])
    values = [cls[0]] * own[0] + [contextual[e[0]].get(e[1], features[e[0]][e[1]]) for e in patches if e != NL]
    return [*front, *patches, *["+"] * len(own_crops)], values + [cls[v] for v in own_crops]


@every_image
@every_dtype
@every_ratio
@pytest.mark.parametrize("profile", ["corrected", "released"])
def test_equals_the_naive_reference(image: str, dtype: torch.dtype, ratio: float, profile: str) -> None:
    views = views_of(grid_of(image), dtype)
    method = get("visionzip", retention_ratio=ratio, profile=profile)
    selection, plan = method.select(views), method.plan(views.grid, views.layout)
    sequence, values = expected(views, ratio, profile)
    assert sequence_of(views, selection) == sequence
    packed = pack(views, selection, lambda x: x, torch.zeros(8))
    tokens = packed.features[packed.origin != -1]
    assert tokens.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(tokens.float(), torch.tensor(values), atol=tolerance, rtol=tolerance)
    assert plan.at_least == plan.at_most == selection.total == packed.patches


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "parts"), [(192, (162, 30)), (128, (108, 20)), (64, (54, 10)), (32, (27, 5))])
def test_the_published_settings(tokens: int, parts: tuple[int, int]) -> None:
    # `dominant` includes the [CLS] token.
    ratio = tokens / 576
    for grid in (AnyResGrid(image_size=(336, 336)), AnyResGrid(image_size=(672, 672), crops=(2, 2))):
        (part, *others) = get("visionzip", retention_ratio=ratio, profile="released")._parts(grid, Layout())
        assert (part.dominant + part.cls, part.contextual) == parts
        assert others == [part] * grid.n_crops
    (part,) = get("visionzip", retention_ratio=(tokens + 0.5) / 576)._parts(AnyResGrid(image_size=(336, 336)), SINGLE)
    assert (part.dominant + part.cls, part.contextual) == parts


@every_image
@every_ratio
def test_with_its_cls_tokens_a_view_keeps_its_share(image: str, ratio: float) -> None:
    views = views_of(grid_of(image))
    selection = get("visionzip", retention_ratio=ratio).select(views)
    owners = selection.extra.view.tolist()
    assert [k + owners.count(view) for view, k in enumerate(selection.count.tolist())] == equal_shares(
        views.grid, ratio
    )
    sizes = [len(valid) for valid in patches_of(views.grid)]
    assert owners == [v for v, k in enumerate(equal_shares(views.grid, ratio)) if 1 < k < sizes[v]]


def test_one_token_is_a_patch_when_corrected_and_the_cls_token_when_released() -> None:
    views = views_of(AnyResGrid(image_size=(9, 9), side=6))
    selection = get("visionzip", retention_ratio=0.01).select(views)
    assert (selection.total, len(selection.extra.view)) == (1, 0)
    selection = get("visionzip", retention_ratio=0.01, profile="released").select(views)
    assert (selection.total, len(selection.extra.view)) == (0, 1)
    assert sequence_of(views, selection) == entries("+")


@pytest.mark.parametrize("share", [0, 0.0, 1, 1.0])
@pytest.mark.parametrize("profile", ["corrected", "released"])
def test_all_or_nothing_contextual(share: float, profile: str) -> None:
    views = views_of(grid_of("2x2 wide"))
    method = get("visionzip", retention_ratio=0.25, contextual=share, profile=profile)
    selection = method.select(views)
    plain = get("fastervlm", retention_ratio=0.25, profile=profile).select(views)
    owners = selection.extra.view.tolist()
    if share:
        assert [part.dominant for part in method._parts(views.grid, views.layout)] == [0] * 5
    else:  # FasterVLM, but for the [CLS] tokens
        assert [k + owners.count(view) for view, k in enumerate(selection.count.tolist())] == plain.count.tolist()
        assert torch.equal(selection.order, plain.order)
        assert selection.features is None or torch.equal(selection.features, views.features)


# --- what corrected and released differ in ---------------------------------------------------------------------------


@pytest.mark.parametrize(("profile", "length"), [("corrected", 1.0), ("released", 2.0)])
def test_contextual_tokens_are_twice_as_long_only_when_released(profile: str, length: float) -> None:
    # All patches alike, so that their mean is any of them.
    grid = AnyResGrid(image_size=(336, 336))
    views = replace(views_of(grid), features=torch.ones(1, 576, 8), cls=torch.full((1, 8), -1.0))
    found = first_features(views, retention_ratio=0.25, profile=profile)
    tokens = [value for value in found if value != -1]
    contextual = int(144 * 5 / 32)
    assert tokens.count(1.0) == len(tokens) - (contextual if length != 1 else 0)
    assert tokens.count(2.0) == (contextual if length != 1 else 0)


@pytest.mark.parametrize(("attention", "kept"), [(2.0, True), (0.5, False)])
def test_padding_is_kept_or_merged_only_when_released(attention: float, kept: bool) -> None:
    # Padding is looked at most, or least, and is a thousand where the image is one.
    grid = grid_of("2x2 wide")
    valid = grid.valid()
    scores = torch.where(valid, 1.0, attention) + torch.rand(valid.shape) / 2
    plane = torch.where(valid, 1.0, 1000.0)[..., None].expand(-1, -1, 8).contiguous()
    views = views_of(grid, cls_logits={-2: logits_of(scores)}, features=plane, cls=torch.zeros(5, 8))
    released = get("visionzip", retention_ratio=0.25, profile="released").select(views)
    assert bool((released.kept & ~valid).any()) == kept
    assert bool((released.extra.features[5:] > 2).any()) != kept  # one and one, but for the padding merged into it
    assert set(first_features(views, retention_ratio=0.25)) == {0.0, 1.0}


def test_newlines_are_left_out_only_when_released() -> None:
    views = views_of(grid_of("2x2 wide"))
    _, top, _, bottom = views.grid.box
    for profile, newlines in (("released", 0), ("corrected", bottom - top)):
        selection = get("visionzip", retention_ratio=0.25, profile=profile).select(views)
        assert sequence_of(views, selection).count(NL) == newlines


@pytest.mark.parametrize("profile", ["corrected", "released"])
def test_a_single_view_ends_in_a_newline_where_the_checkpoint_unpads(profile: str) -> None:
    """The release leaves the end of a single view to LLaVA: behind the contextual tokens, if the merge type unpads."""
    views = views_of(grid_of("single"), layout=Layout())
    method = get("visionzip", retention_ratio=0.5, profile=profile)
    selection = method.select(views)
    expected_, _ = expected(replace(views, layout=SINGLE), 0.5, profile)
    assert sequence_of(views, selection) == [*expected_, NL]
    for layout in (SINGLE, Layout(unpad=False, newline="none")):
        views = views_of(grid_of("single"), layout=layout)
        assert sequence_of(views, method.select(views)) == expected_


# --- invariants ------------------------------------------------------------------------------------------------------


@every_image
def test_the_order_puts_dominant_before_contextual_before_the_rest(image: str) -> None:
    views = views_of(grid_of(image))
    method = get("visionzip", retention_ratio=0.5)
    selection, parts = method.select(views), method._parts(views.grid, views.layout)
    scores, valid = probabilities(views.cls_logits[-2]), patches_of(views.grid)
    for order, part, score, among in zip(selection.order.tolist(), parts, scores, valid, strict=True):
        end = part.dominant + part.contextual
        assert order[: part.dominant] == best(score, among, part.dominant)
        contextual = order[part.dominant : end]
        assert contextual == best(score, contextual, len(contextual))
        assert sorted(order[: len(among)]) == sorted(among)


@every_dtype
def test_every_patch_is_in_exactly_one_token(dtype: torch.dtype) -> None:
    # Give every patch a feature of its own: a token's non-zero features are its patches, at 1 / their number.
    features = torch.eye(SIDE**2, dtype=dtype).expand(5, -1, -1).contiguous()
    views = views_of(grid_of("2x2 wide"), dtype, features=features)
    selection = get("visionzip", retention_ratio=0.5).select(views)
    for view, kept in enumerate(selection.keep):
        tokens = selection.features[view, kept].float()
        assert ((tokens > 0).sum(0) == views.valid[view]).all()
        torch.testing.assert_close(tokens.sum(1), torch.ones(len(kept)), atol=1e-2, rtol=0)
        assert (tokens[torch.arange(len(kept)), kept] > 0).all()  # a target is in its own token


def test_views_too_small_for_a_contextual_token_stay_as_they_are() -> None:
    # The crops keep four or five of 18 patches each, the first among them; only the thumbnail keeps enough to merge.
    scores = torch.ones(5, SIDE**2)
    scores[:, 0] = 2
    views = views_of(grid_of("2x2 tall"), cls_logits={-2: logits_of(scores)})
    method = get("visionzip", retention_ratio=0.25)
    assert [part.contextual for part in method._parts(views.grid, views.layout)] == [1, 0, 0, 0, 0]
    features = method.select(views).features
    assert torch.equal(features[1:], views.features[1:])
    assert not torch.equal(features[0], views.features[0])


def test_equal_keys_join_the_first_target() -> None:
    views = views_of(AnyResGrid(image_size=(9, 9), side=6), keys={-2: torch.ones(1, 36, 8)})
    views.features = torch.zeros(1, 36, 8)
    views.features[:, :, 0] = 1
    method = get("visionzip", retention_ratio=0.5, profile="released")
    tokens = method.select(views).extra.features[1:, 0].tolist()  # behind the [CLS] token
    assert tokens == [2.0] + [1.0] * (len(tokens) - 1)


def test_views_without_the_cls_feature_are_refused() -> None:
    views = replace(views_of(grid_of("single")), cls=None)
    with pytest.raises(ValueError, match=r"\[CLS\]"):
        get("visionzip").select(views)


def test_arguments_are_left_alone() -> None:
    views = views_of(grid_of("2x2 wide"))
    tensors: list[Tensor] = [views.features, views.cls, views.keys[-2], views.cls_logits[-2]]
    before = [tensor.clone() for tensor in tensors]
    for profile in ("corrected", "released"):
        selection = get("visionzip", retention_ratio=0.25, profile=profile).select(views)
        pack(views, selection, lambda x: x, torch.zeros(8)).features.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize("value", [-0.1, 1.1, "half", True])
def test_bad_shares_are_named(value: object) -> None:
    with pytest.raises(InputError, match=rf"contextual.*{value}"):
        get("visionzip", contextual=value)


@pytest.mark.parametrize("profile", ["corrected", "released"])
def test_through_the_model(loaded: Any, profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_through_the_model(loaded, f"visionzip(retention_ratio=0.3, profile='{profile}')", monkeypatch)
