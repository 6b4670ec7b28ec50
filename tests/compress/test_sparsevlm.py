"""SparseVLM: the examples of the reference by hand, the published lists, its solver, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.compress import get
from llava.compress.sparsevlm import PUBLISHED, cluster_means, density_peaks, raters, recycled
from llava.compress.stages import NEWLINE, PREFIX, TEXT, VISUAL, LayerTokens
from llava.constants import InputError

LINE = torch.tensor([0, 0.1, 0.3, 4, 4.2, 4.7, 9])[:, None]


def test_raters_by_hand() -> None:
    """Shares of the text .4386, .1510, .4104: the first and the last are above the mean."""
    words = torch.tensor([[2.0, 0], [0, 0], [1, 1]])
    assert raters(torch.eye(2), words).tolist() == [True, False, True]
    assert raters(torch.eye(2), words[:1]).tolist() == [True], "one word cannot be above the mean"


def tokens(hidden: Tensor, rows: Tensor, role: list[int], **more: Any) -> LayerTokens:
    """A sequence behind layer 2 of 32, the text's attention rows given."""
    places = {place: index for index, place in enumerate(p for p, r in enumerate(role) if r == TEXT)}
    known = torch.zeros(len(role), len(role))
    for place, index in places.items():
        known[place] = rows[index]

    def attention(asked: Tensor) -> Tensor:
        return torch.stack([known[row] for row in asked])[:, None]

    return LayerTokens(
        layer=2,
        depth=32,
        hidden=hidden,
        role=torch.tensor([role]),
        n_visual=(sum(r in (VISUAL, NEWLINE) for r in role),),
        attention=attention,
        n_text=(len(places),),
        **more,
    )


def test_scores_by_hand() -> None:
    """Of three words the first and the last rate four image tokens: .20 .21 .05 .185; half of them are kept."""
    rows = torch.tensor([[0.1, 0.3, 0.05, 0.15], [0.2, 0.2, 0.2, 0.2], [0.3, 0.12, 0.05, 0.22]])
    given = tokens(
        torch.zeros(1, 7, 2),
        torch.cat((rows, torch.zeros(3, 3)), 1),
        [VISUAL] * 4 + [TEXT] * 3,
        memo={"raters": torch.tensor([[0.5, 0, 0.5]])},
    )
    method = get("sparsevlm(layers=(2,), recycle=False, budget='after', retention_ratio=0.5)")
    scores = method._scores(given, [4])  # type: ignore[attr-defined]
    assert scores[0, :4].tolist() == pytest.approx([0.2, 0.21, 0.05, 0.185])
    reduction = method.reduce_in_llm(given)
    assert reduction.keep[0].nonzero().flatten().tolist() == [0, 1, 4, 5, 6]
    assert reduction.n_visual == (2,)
    # The raters are chosen on the embeddings, once.
    memo: dict[str, Tensor] = {}
    entry = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1], [2, 0], [0, 0], [1, 1]])[None]
    method.reduce_in_llm(replace(given, memo=memo, entry=entry))
    assert memo["raters"].tolist() == [[0.5, 0, 0.5]]


def test_clusters_by_hand() -> None:
    centres, cluster = density_peaks(LINE, 3)
    assert centres.tolist() == [1, 4, 5]
    assert cluster.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert cluster_means(LINE, cluster, 3).flatten().tolist() == pytest.approx([0.4 / 3, 4.1, 6.85])


def test_equal_tokens_make_one_centre_each() -> None:
    x = torch.tensor([[0.0], [0], [0], [5], [5]])
    centres, cluster = density_peaks(x, 2)
    assert centres.tolist() == [0, 3]
    assert cluster.tolist() == [0, 0, 0, 1, 1]
    assert density_peaks(x[:1], 1)[1].tolist() == [0]


@pytest.mark.parametrize(
    ("dropped", "expected"), [(276, (83, 9)), (109, (33, 4)), (94, (29, 3)), (1, (1, 1)), (0, (0, 0))]
)
def test_how_many_clusters(dropped: int, expected: tuple[int, int]) -> None:
    assert recycled(dropped) == expected


RAN = {192: (309, 204, 113), 128: (312, 117, 39), 96: (249, 55, 27), 64: (82, 32, 18)}


@pytest.mark.parametrize("nominal", PUBLISHED)
def test_published_lists(nominal: int) -> None:
    first, second, third = RAN[nominal]
    ran = (576,) * 3 + (first,) * 4 + (second,) * 9 + (third,) * 16
    for spec in ("sparsevlm(budget='after')", "sparsevlm(profile='released')"):
        assert get(spec, retention_ratio=nominal / 576).visual_per_layer(576, 32) == ran
    # What they are named after is what layers put out; `corrected` counts what layers run on.
    put_out = (*ran[1:], third)
    assert sum(put_out) / 32 == pytest.approx(nominal, abs=1)
    honest = get("sparsevlm", retention_ratio=nominal / 576).visual_per_layer(576, 32)
    assert sum(honest) / 32 == pytest.approx(nominal, abs=1)
    assert sum(ran) / 32 > nominal + 14, "192 tokens are 206.5, 64 are 82.25"


def test_released_knows_four_ratios_and_576_tokens() -> None:
    with pytest.raises(InputError, match=r"192/576, got 0\.25"):
        get("sparsevlm(profile='released', retention_ratio=0.25)").visual_per_layer(576, 32)
    third = "retention_ratio=0.3333"
    ran = [get(f"sparsevlm({p}, {third})").visual_per_layer(2928, 32) for p in ("profile='released'", "budget='after'")]
    assert ran[0][-1] < 200 < 550 < ran[1][-1], "the lists do not grow with the image"
    assert get(f"sparsevlm(profile='released', {third})").visual_per_layer(100, 32)[3:7] == (100,) * 4


@pytest.mark.parametrize("n", [576, 1176, 1752, 1948, 2340, 2352, 2376, 2928])
@pytest.mark.parametrize("ratio", [1.0, 0.75, 0.5, 0.25, 0.1])
def test_the_ratio_is_what_it_says(n: int, ratio: float) -> None:
    for depth in (32, 40):
        if ratio >= 0.25 or depth == 32:
            ran = get("sparsevlm", retention_ratio=ratio).visual_per_layer(n, depth)
            assert sum(ran) / depth / n == pytest.approx(ratio, abs=4e-3)
            assert ran == tuple(sorted(ran, reverse=True))
        ran = get("sparsevlm(budget='after')", retention_ratio=ratio).visual_per_layer(n, depth)
        assert sum((*ran[1:], ran[-1])) / depth / n == pytest.approx(ratio, abs=4e-3)
        ran = get("sparsevlm(budget='paper')", retention_ratio=ratio).visual_per_layer(n, depth)
        wanted = min(n, 2880 * ratio)
        assert sum((*ran[1:], ran[-1])) / depth == pytest.approx(wanted, abs=4e-3 * n)


def test_other_numbers_of_layers() -> None:
    for layers in ((1,), (1, 4), (2, 4, 8, 16), (0,)):
        ran = get(f"sparsevlm(layers={layers})", retention_ratio=0.4).visual_per_layer(1000, 24)
        assert sum(ran) / 24_000 == pytest.approx(0.4, abs=4e-3)
        assert len({*ran}) == len(layers) + 1


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match=r"keeps 9\.\d+% .*at least 9\.\d+%.*earlier layers"):
        get("sparsevlm(retention_ratio=0.05)").visual_per_layer(2928, 32)
    with pytest.raises(InputError, match=r"\(2, 6, 15\) of 16; choose earlier"):
        get("sparsevlm(retention_ratio=0.5)").visual_per_layer(2928, 16)
    for bad in ("layers=()", "layers=(3, 2)", "layers=2", "layers=(1.0,)", "budget='all'", "positions='x'", "seed=-1"):
        with pytest.raises(InputError, match=bad.split("=")[0]):
            get(f"sparsevlm({bad})")
    with pytest.raises(InputError, match="three layers"):
        get("sparsevlm(layers=(1, 2), profile='released')")


def picture(n: int = 40) -> LayerTokens:
    """An image of 39 patches and a newline between two and three words, with attention that falls along it."""
    draw = torch.Generator().manual_seed(0)
    role = [PREFIX] * 2 + [VISUAL] * 20 + [NEWLINE] + [VISUAL] * (n - 21) + [TEXT] * 3
    falling = torch.linspace(1, 0.1, len(role)).expand(3, -1)
    hidden = torch.randn(1, len(role), 4, generator=draw)
    return tokens(hidden, falling, role, entry=hidden)


def test_clusters_stand_behind_what_is_kept_and_before_the_text() -> None:
    given = picture()
    method = get("sparsevlm(layers=(2,), budget='after', retention_ratio=0.3)")
    (kept,) = method._kept(40, 32)  # type: ignore[attr-defined]
    some, clusters = recycled(40 - kept)
    assert (kept, clusters) == (8, 2)
    reduction = method.reduce_in_llm(given)
    assert reduction.n_visual == (kept + clusters,)
    assert reduction.positions == "repack"
    assert reduction.place is not None
    assert reduction.hidden is not None
    order = reduction.place[0].argsort()
    left = order[reduction.keep[0, order]]
    again = torch.arange(2 + kept, 2 + kept + some)  # attention falls, so these are the best of the dropped
    centres, cluster = density_peaks(given.hidden[0, again], clusters)
    assert left.tolist() == [*range(2 + kept), *again[centres].tolist(), 42, 43, 44]
    found = reduction.hidden[0, left]
    torch.testing.assert_close(found[: 2 + kept], given.hidden[0, : 2 + kept])
    torch.testing.assert_close(found[2 + kept : -3], cluster_means(given.hidden[0, again], cluster, clusters))
    torch.testing.assert_close(found[-3:], given.hidden[0, -3:])
    assert torch.equal(given.hidden, picture().hidden)
    # With positions kept, a cluster stands where its centre stood.
    reduction = replace(method, positions="keep").reduce_in_llm(given)
    assert (reduction.place, reduction.positions) == (None, "keep")
    # Without recycling, there are none.
    reduction = replace(method, recycle=False).reduce_in_llm(given)
    assert int(reduction.keep[0, 2:42].sum()) == reduction.n_visual[0]


def test_released_clusters_depend_on_a_seed() -> None:
    """With two neighbours (the token itself and the nearest) densities are often equal, and noise decides."""
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(3))
    seen = {profile: set() for profile in ("released", "corrected")}  # type: ignore[var-annotated]
    for profile, found in seen.items():
        for seed in range(20):
            method = get(f"sparsevlm(profile={profile!r}, seed={seed})")
            centres, means = method._clusters(x, 2)  # type: ignore[attr-defined]
            found.add((tuple(centres.tolist()), tuple(means.flatten().tolist())))
    assert len(seen["corrected"]) == 1
    assert len(seen["released"]) > 1


def test_released_means_are_a_little_short() -> None:
    x = torch.full((4, 2), 1000.0)
    means = {p: get(f"sparsevlm(profile={p!r})")._clusters(x, 1)[1] for p in ("released", "corrected")}  # type: ignore[attr-defined]
    assert (means["corrected"] == 1000).all()
    assert (means["released"] < 1000).all()
