"""ToMe: the example of the reference by hand, and a run through CLIP against loops."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llava.compress import get
from llava.compress.base import Layout
from llava.compress.encoding import EncoderTokens, Merging
from tests.compress.reference_encoder import CLS, encode, tome
from tests.compress.test_attach import make_tower
from tests.compress.test_encoding import DEPTH, GRIDS, PIXELS, SPANS, by_patch
from tests.compress.test_encoding import encode as run

KEYS = torch.tensor([[1, 0], [0, 1], [1, 0], [0.6, 0.8], [0, 1], [0.8, 0.6]])


def example(r: int, views: int = 1) -> EncoderTokens:
    """Six tokens, the first is [CLS]; both heads have the same keys."""
    keys = KEYS.expand(views, 2, 6, 2)
    return EncoderTokens(
        layer=0,
        depth=1,
        hidden=torch.arange(6.0).expand(views, 6)[..., None],
        queries=torch.full_like(keys, torch.nan),  # nobody looks
        keys=keys,
        bias=None,
        ids=torch.arange(5).expand(views, 5),
        side=3,
        sizes=torch.ones(views, 6),
        before=(5,) * views,
        after=(5 - r,) * views,
    )


def shown(merging: Merging, left: int, view: int = 0) -> tuple[list[int], list[float], list[float]]:
    """Places, values and sizes of what is left."""
    places = torch.cat((torch.zeros(1, dtype=torch.long), merging.order[view, :left] + 1))
    assert merging.sizes is not None
    rounded = [[round(float(x), 4) for x in row[view].flatten()[places]] for row in (merging.hidden, merging.sizes)]
    return places.tolist(), rounded[0], rounded[1]


def test_the_example_by_hand() -> None:
    """Oracle T1: likeness rows (0, .6, .8) and (1, .8, .6) of the two even patches."""
    merging = get("tome").reduce_in_encoder(example(1))
    assert shown(merging, 4) == ([0, 2, 1, 3, 5], [0, 2, 2.5, 3, 5], [1, 1, 2, 1, 1])
    assert float(merging.sizes.log().max()) == pytest.approx(0.6931, abs=1e-4)
    merging = get("tome").reduce_in_encoder(example(2))
    assert shown(merging, 3) == ([0, 1, 3, 5], [0, 2.5, 3, 3.5], [1, 2, 1, 2])
    assert get("tome(r=5)")._path(5, 1, [0]) == [3]  # no more than half


def test_tokens_weigh_as_much_as_they_stand_for() -> None:
    tokens = example(1)
    merging = get("tome").reduce_in_encoder(replace(tokens, sizes=torch.tensor([[1.0, 3, 1, 1, 2, 1]])))
    assert shown(merging, 4) == ([0, 2, 1, 3, 5], [0, 2, 2.2, 3, 5], [1, 1, 5, 1, 1])  # (3·1 + 2·4) / 5


def test_views_lose_different_numbers() -> None:
    tokens = replace(example(0, views=3), after=(5, 4, 3))
    merging = get("tome").reduce_in_encoder(tokens)
    assert shown(merging, 5)[1:] == ([0, 2, 4, 1, 3, 5], [1] * 6)
    assert shown(merging, 4, 1) == ([0, 2, 1, 3, 5], [0, 2, 2.5, 3, 5], [1, 1, 2, 1, 1])
    assert shown(merging, 3, 2) == ([0, 1, 3, 5], [0, 2.5, 3, 3.5], [1, 2, 1, 2])


def test_equal_pairs_go_by_place() -> None:
    tokens = replace(example(1), keys=torch.ones(1, 2, 6, 2))
    assert shown(get("tome").reduce_in_encoder(tokens), 4)[:2] == ([0, 4, 1, 3, 5], [0, 4, 1.5, 3, 5])


@pytest.mark.parametrize(
    "spec",
    ["tome(retention_ratio=0.4)", "tome(retention_ratio=0.15, proportional=False)", "tome(r=3, first_layer=1)"],
)
@torch.no_grad()
def test_against_loops(spec: str) -> None:
    """All layers by hand, one view and one token at a time."""
    tower, method = make_tower(), get(spec)
    _, batch = run(tower, method)
    points = method.encoder_points(DEPTH)
    for grid, span, views in zip(GRIDS[:3], SPANS, batch, strict=False):
        rows = method.patches_per_layer(grid, Layout(), DEPTH)
        sizes = (16, *grid.crop_patches())
        for view, (pixels, valid, ours) in enumerate(zip(PIXELS[span], grid.valid(), by_patch(views), strict=True)):
            path = [sizes[view], *(rows[point + 1][view] for point in points)]
            steps = {p: tome(a - b) for p, a, b in zip(points, path, path[1:], strict=False)}
            theirs = encode(tower.vision_tower, pixels, valid.tolist(), steps, method.proportional)
            assert [t.patch for t in theirs] == [CLS, *ours]
            for token in theirs[1:]:
                torch.testing.assert_close(ours[token.patch], token.x, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_proportional_attention_matters() -> None:
    tower = make_tower()
    with_, without = (
        run(tower, get(f"tome(retention_ratio=0.4, proportional={switch})"))[1][0].features for switch in (True, False)
    )
    assert not torch.allclose(with_, without, atol=1e-3)


def test_sizes_add_up() -> None:
    """Every patch stands in exactly one token, [CLS] for itself."""
    seen: list[Tensor] = []

    class Watched(type(get("tome"))):  # type: ignore[misc]
        def reduce_in_encoder(self, tokens: EncoderTokens) -> Merging:
            merging = super().reduce_in_encoder(tokens)
            kept = torch.arange(tokens.ids.shape[1]) < torch.tensor(tokens.after)[:, None]
            seen.append((merging.sizes[:, 1:].gather(1, merging.order) * kept).sum(1))
            assert bool((merging.sizes[:, 0] == 1).all())
            return merging

    run(make_tower(), Watched(retention_ratio=0.3))
    patches = torch.tensor([float(n) for grid in GRIDS for n in (16, *grid.crop_patches())])
    assert len(seen) == DEPTH
    assert all(torch.equal(total, patches) for total in seen)
