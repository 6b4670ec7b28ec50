"""FiCoCo-V: the examples of the reference by hand, a run through CLIP against loops, and the released slips."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.compress import get
from llava.compress.base import Layout
from llava.compress.encoding import EncoderTokens, Merging
from llava.compress.ficoco_v import attention_rows, dissimilarity, promote, redundancy, share_on_patches
from llava.compress.merge import merge_into, n_targets, target_weights
from llava.constants import InputError
from tests.compress import reference_encoder as by_hand
from tests.compress.test_attach import make_tower
from tests.compress.test_encoding import DEPTH, GRIDS, PIXELS, SPANS, by_patch
from tests.compress.test_encoding import encode as run

# Oracle V1: the [CLS] row, and the rows of four patches that fill one window.
CLS_ROW = torch.tensor([1.0, 2, 2, 4])
ROWS = torch.tensor([[4.0, 4, 6, 2], [2, 1, 4, 1], [1, 4, 2, 1], [1, 0, 2, 1]])
ALIVE = torch.ones(1, 4, dtype=torch.bool)


def tokens_of(rows: Tensor, cls_row: Tensor, x: Tensor, after: int, ids: Tensor | None = None, side: int = 2) -> Any:
    """One view whose logits between patches, and of [CLS] to them, are as given: keys are unit vectors."""
    n = len(rows)
    logits = torch.zeros(1 + n, 1 + n)
    logits[1:, 1:], logits[0, 1:] = rows, cls_row
    return EncoderTokens(
        layer=0,
        depth=1,
        hidden=torch.cat((torch.zeros(1, x.shape[1]), x))[None],
        queries=(logits * math.sqrt(1 + n))[None, None],
        keys=torch.eye(1 + n)[None, None],
        bias=None,
        ids=torch.arange(n)[None] if ids is None else ids[None],
        side=side,
        sizes=torch.ones(1, 1 + n),
        before=(n,),
        after=(after,),
    )


def left(merging: Merging, count: int) -> tuple[list[int], list[float]]:
    """Slots and values that go on."""
    slots = merging.order[0, :count]
    return slots.tolist(), [round(float(v), 4) for v in merging.hidden[0, slots + 1, 0]]


def close(found: Tensor, expected: list[float], atol: float = 1e-4) -> None:
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float32), atol=atol, rtol=0)


# --- oracles ---------------------------------------------------------------------------------------------------------


def test_v1_filter() -> None:
    """Corrected: .65 and unit length; the paper as printed: .35 and neither."""
    vision = ROWS.mean(1)
    close(vision, [4, 2, 2, 1])
    for weight, normalise, raw, promoted in [
        (0.65, True, [0.45, 0.12, 0.12, -0.15], [0.90, 0.12, 0.12, -0.15]),
        (0.35, True, [0.15, -0.12, -0.12, -0.45], [0.30, -0.12, -0.12, -0.45]),
        (0.35, False, [0.75, -0.60, -0.60, -2.25], [1.5, -0.60, -0.60, -2.25]),
    ]:
        scores = redundancy(vision[None], CLS_ROW[None], ALIVE, weight, normalise)
        close(scores, raw)
        close(promote(scores, torch.arange(4)[None], ALIVE, 2, 2.0), promoted)


def test_v1_through_the_method() -> None:
    method, x = get("ficoco_v"), torch.arange(4.0)[:, None]
    for r, expected in ((1, [1, 2, 3]), (2, [2, 3])):
        merging = method.reduce_in_encoder(tokens_of(ROWS, CLS_ROW, x, 4 - r))
        assert left(merging, 4 - r)[0] == expected
    scores = method._redundancy(tokens_of(ROWS, CLS_ROW, x, 3))
    close(scores, [0.45, 0.12, 0.12, -0.15])
    close(get("ficoco_v(vision_weight=0.35)")._redundancy(tokens_of(ROWS, CLS_ROW, x, 3)), [0.15, -0.12, -0.12, -0.45])


def test_v2_penalty_of_what_is_left() -> None:
    # Patch 0 is gone: the first of equal ones is promoted; negative scores are divided.
    alive = torch.ones(1, 3, dtype=torch.bool)
    close(promote(torch.tensor([[0.12, 0.12, -0.15]]), torch.tensor([[1, 2, 3]]), alive, 2, 2.0), [0.24, 0.12, -0.15])
    close(promote(torch.tensor([[-0.4, -0.1, -0.3]]), torch.tensor([[1, 2, 3]]), alive, 2, 2.0), [-0.4, -0.05, -0.3])


def test_v3_correlate() -> None:
    x = torch.tensor([[10.0], [1], [2], [3]])
    tokens = tokens_of(ROWS, CLS_ROW, x, 3)
    assert left(get("ficoco_v").reduce_in_encoder(tokens), 3) == ([1, 2, 3], [1, 6, 3])
    assert left(get("ficoco_v(epsilon=0.5)").reduce_in_encoder(tokens), 3)[1] == [1.9586, 5.7465, 3]
    scores = torch.tensor([[4.0, 6, 2]])
    ids, weights = target_weights(scores, n_targets(3, 0.5), "ratio")  # the paper's
    close(merge_into(x, torch.tensor([0]), ids + 1, weights)[1:], [3.5714, 5, 3])
    assert n_targets(3, 0.5, strict=True) == 1  # the released test


def test_v4_several_sources_share_a_target() -> None:
    """The mean of three: the promised share of one half is not kept."""
    x = torch.tensor([[10.0], [4], [1], [7]])
    ids, weights = target_weights(torch.tensor([[5.0, 1], [4, 0]]), n_targets(2, 0.998), "softmax")
    assert ids.tolist() == [[0], [0]]
    close(merge_into(x, torch.tensor([0, 1]), ids + 2, weights)[2:], [5, 7])


def test_v6_without_cls() -> None:
    keys = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 1]])
    semantic = dissimilarity(keys[None], ALIVE)
    close(semantic, [-0.8321, -0.5547, -0.8321, -0.9806])
    scores = redundancy(torch.tensor([[4.0, 2, 2, 1]]), semantic, ALIVE, 0.35, normalise=False)
    close(scores, [1.9408, 1.0606, 1.2408, 0.9874])
    # The mean is that of patches alive.
    more = torch.cat((keys, torch.tensor([[-50.0, 3]])))[None]
    close(dissimilarity(more, torch.tensor([[True] * 4 + [False]]))[:, :4], semantic.flatten().tolist())


@pytest.mark.parametrize("n", [577, 576, 535, 534, 502, 501, 500, 493, 114])
def test_v7_targets_per_source(n: int) -> None:
    assert n_targets(n, 0.998) == (2 if n >= 501 else 1)
    assert n_targets(n, 0.998, strict=True) == (2 if n >= 502 else 1)


def test_v8_the_released_index_slip() -> None:
    """V6 of the released code: sources 4 and 2 are meant for 1 and 3, and land in 5 and 0."""
    x = torch.eye(6)
    gone, stay, targets = [4, 2], [1, 5, 3, 0], [1, 3]
    places = by_hand.released_places(stay, targets, len(gone))
    assert places == [5, 0]
    ones = torch.ones(2, 1)
    wrong = merge_into(x, torch.tensor(gone), torch.tensor(places)[:, None], ones)
    right = merge_into(x, torch.tensor(gone), torch.tensor(targets)[:, None], ones)
    assert torch.equal(right[1], (x[1] + x[4]) / 2)
    assert torch.equal(right[3], (x[3] + x[2]) / 2)
    assert torch.equal(wrong[5], (x[5] + x[4]) / 2)
    assert torch.equal(wrong[0], (x[0] + x[2]) / 2)
    # Corrected, through the method: 3 and 1 are most redundant, and match 0 and 2 best.
    rows = torch.full((5, 5), -4.0)
    rows[3, 0] = rows[1, 2] = 30.0
    merging = get("ficoco_v").reduce_in_encoder(tokens_of(rows, -rows.sum(1), torch.eye(6)[1:], 3, side=3))
    assert merging.order[0, :3].tolist() == [0, 2, 4]
    torch.testing.assert_close(merging.hidden[0, 1 + 0], (x[1] + x[4]) / 2)
    torch.testing.assert_close(merging.hidden[0, 1 + 2], (x[3] + x[2]) / 2)


# --- the penalty -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7])
def test_penalty_against_loops(side: int) -> None:
    """Any grid: what fills no window is left alone; the slots may be in any order, and some empty."""
    n = side * side
    draw = torch.Generator().manual_seed(side)
    scores = torch.randn(3, n, generator=draw).round(decimals=1)
    ids = torch.arange(n).expand(3, n)
    alive = torch.rand(3, n, generator=draw) < 0.7
    found = promote(scores, ids, alive, side, 2.0)
    for mine, before, there in zip(found, scores, alive, strict=True):
        expected = by_hand.penalised({i: float(before[i]) for i in range(n) if there[i]}, side, 2.0)
        for patch, value in expected.items():
            assert float(mine[patch]) == pytest.approx(value)
    assert torch.equal(promote(scores, ids, alive, side, 1.0), scores)


# --- through CLIP ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        "ficoco_v(retention_ratio=0.4)",
        "ficoco_v(retention_ratio=0.3, epsilon=0.7, control_encoding_layer=0)",
        "ficoco_v(r=3)",
        "ficoco_v(retention_ratio=0.4, profile='paper')",
        "ficoco_v(retention_ratio=0.4, profile='paper', epsilon=0.7)",
    ],
)
@torch.no_grad()
def test_against_loops(spec: str) -> None:
    """All layers by hand, one view and one token at a time, no mean key and no mask."""
    tower, method = make_tower(), get(spec)
    _, batch = run(tower, method)
    points, paper = method.encoder_points(DEPTH), method.profile == "paper"
    for grid, span, views in zip(GRIDS[:3], SPANS, batch, strict=False):
        rows = method.patches_per_layer(grid, Layout(), DEPTH)
        sizes = (16, *grid.crop_patches())
        for view, (pixels, valid, ours) in enumerate(zip(PIXELS[span], grid.valid(), by_patch(views), strict=True)):
            path = [sizes[view], *(rows[point + 1][view] for point in points)]
            steps = {
                p: by_hand.ficoco_v(a - b, 4, paper=paper, epsilon=method.epsilon)
                for p, a, b in zip(points, path, path[1:], strict=False)
            }
            theirs = by_hand.encode(tower.vision_tower, pixels, valid.tolist(), steps, False)
            assert [t.patch for t in theirs] == [by_hand.CLS, *ours]
            for token in theirs[1:]:
                torch.testing.assert_close(ours[token.patch], token.x, atol=1e-4, rtol=1e-4)


def test_attention_as_probabilities_needs_no_map() -> None:
    """The paper's terms against the whole map, empty slots and a bias included."""
    draw = torch.Generator().manual_seed(5)
    q, k = (torch.randn(2, 3, 8, 4, generator=draw) for _ in "qk")
    bias = torch.zeros(2, 1, 1, 8)
    bias[1, ..., 6:] = torch.finfo(torch.float32).min
    tokens = EncoderTokens(
        layer=0,
        depth=1,
        hidden=torch.zeros(2, 8, 5),
        queries=q,
        keys=k,
        bias=bias,
        ids=torch.arange(7).expand(2, 7),
        side=3,
        sizes=torch.ones(2, 8),
        before=(7, 5),
        after=(6, 4),
    )
    full = (q @ k.mT / 2 + bias).softmax(-1).mean(1)  # [V, 8, 8]
    torch.testing.assert_close(attention_rows(tokens, torch.tensor([[0, 3], [2, 5]]))[0], full[0, [0, 3], 1:])
    expected = (full[:, 1:, 1:] * tokens.alive[:, None]).sum(-1)
    torch.testing.assert_close(share_on_patches(tokens), expected)


# --- the released slips, and that they are not here ------------------------------------------------------------------


def test_profiles_read_attention_differently() -> None:
    """V1 to V3: logits of unit length at .65 here, probabilities as they are at .35 in the paper's equations."""
    x = torch.arange(4.0)[:, None]
    tokens = tokens_of(ROWS, CLS_ROW, x, 3)
    paper = get("ficoco_v(profile='paper')")
    probabilities = torch.cat((torch.zeros(5, 1), torch.cat((CLS_ROW[None], ROWS))), 1).softmax(1)[:, 1:]
    expected = 0.35 * probabilities[1:].mean(1) - 0.65 * probabilities[0]
    close(paper._redundancy(tokens), expected.tolist())
    assert not torch.allclose(get("ficoco_v")._redundancy(tokens), expected)
    # Its vision term is what [CLS] leaves of the attention, nearly the same for every patch.
    assert float(probabilities[1:].mean(1).std()) < 0.02


@torch.no_grad()
def test_the_penalty_starts_afresh() -> None:
    """V4: the released buffer fills up, so that the same scores give something else the second time."""
    scores = torch.randn(16, generator=torch.Generator().manual_seed(0)).tolist()
    buffer = [0.0] * 16
    first = by_hand.released_penalty(scores, 4, buffer)
    assert first != by_hand.released_penalty(scores, 4, buffer)
    for _ in range(3):
        by_hand.released_penalty(scores, 4, buffer)
    assert all(math.isinf(slot) for slot in buffer)  # from now on content does not matter
    assert by_hand.released_penalty(scores, 4, buffer) == scores
    tower, method = make_tower(), get("ficoco_v(retention_ratio=0.4)")
    one, two = run(tower, method)[1], run(tower, method)[1]
    assert all(torch.equal(a.features, b.features) for a, b in zip(one, two, strict=True))


@torch.no_grad()
def test_cls_stays_in_front() -> None:
    """V5: the released order puts [CLS] last, so that the next layer takes a patch for it, and it may be merged."""
    gone, stay = by_hand.released_order([0.3, 0.1, 0.5, 0.2], 1)
    assert (gone, stay) == ([2], [4, 1, 3, 0])
    seen: list[Tensor] = []

    class Watched(type(get("ficoco_v"))):  # type: ignore[misc]
        def reduce_in_encoder(self, tokens: EncoderTokens) -> Merging:
            merging = super().reduce_in_encoder(tokens)
            assert torch.equal(merging.hidden[:, 0], tokens.hidden[:, 0])  # no target either
            seen.append(tokens.ids)
            return merging

    _, batch = run(make_tower(), Watched(retention_ratio=0.4, control_encoding_layer=-1))
    assert len(seen) == DEPTH
    for views in batch:
        for ids, valid in zip(views.ids, views.valid, strict=True):
            assert ids[valid].tolist() == sorted(ids[valid].tolist())


def test_targets_are_patches_that_stay() -> None:
    """V7: the released candidates hold the patch itself, [CLS] and what goes as well; what goes there is lost."""
    rows = torch.full((4, 4), 0.1)
    rows[0] = torch.tensor([9.0, 8, 7, 0])  # likes itself best, then another one that goes
    rows[1] = torch.tensor([8.0, 9, 0, 6])
    x = torch.tensor([[10.0], [20], [2], [3]])
    merging = get("ficoco_v(penalty=1)").reduce_in_encoder(tokens_of(rows, torch.zeros(4), x, 2))
    assert left(merging, 2) == ([2, 3], [6, 11.5])
    assert max(range(4), key=lambda j: float(rows[0, j])) == 0  # the released target of 0


@torch.no_grad()
def test_views_do_not_share_indices() -> None:
    """V9: the released code ranks by the mean map of the batch."""
    _, batch = run(make_tower(), get("ficoco_v(retention_ratio=0.4)"))
    chosen = [tuple(ids.tolist()) for views in batch for ids in views.ids]
    assert len(set(chosen)) > len(chosen) // 2


def test_any_grid_and_half_precision_run() -> None:
    """V8 and V10: the released code knows 24 by 24 patches in float32 only."""
    rows = torch.randn(25, 25, generator=torch.Generator().manual_seed(2)).to(torch.float16)
    tokens = tokens_of(rows.float(), rows[0].float(), torch.randn(25, 3), 9, side=5)
    half = EncoderTokens(
        **vars(tokens) | {name: getattr(tokens, name).half() for name in ("hidden", "queries", "keys")}
    )
    merging = get("ficoco_v").reduce_in_encoder(half)
    assert merging.hidden.dtype == torch.float16
    assert bool(merging.hidden.isfinite().all())


def test_released_is_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match=r"no profile 'released'.*never reset.*choose from corrected, paper"):
        get("ficoco_v(profile='released')")


def test_switches_of_the_readme() -> None:
    grid = GRIDS[0]
    off = get("ficoco_v(merge_visual=False, r=42)")
    assert off.encoder_points(23) == ()
    assert off.plan(grid).at_least == 16
    assert get("ficoco_v(control_encoding_layer=11)").encoder_points(23) == tuple(range(12, 23))
    assert [get("ficoco_v").encoder_points(depth) for depth in (1, 2, 3, 4)] == [(0,), (1,), (2,), (2, 3)]
