"""FastV: the example of the reference by hand, budgets, and what is refused."""

import pytest
import torch

from llava.compress import get
from llava.compress.stages import NEWLINE, PAD, PREFIX, TEXT, VISUAL, LayerTokens
from llava.constants import InputError

ROW = torch.tensor(
    [
        [0.20, 0.10, 0.10, 0.05, 0.20, 0.05, 0.20, 0.10],
        [0.20, 0.10, 0.02, 0.25, 0.06, 0.07, 0.10, 0.20],
    ]
)


def tokens(row: torch.Tensor, role: list[int], n_visual: int) -> LayerTokens:
    def attention(rows: torch.Tensor) -> torch.Tensor:
        assert rows.tolist() == [[len(role) - 1]], "the last prompt token's row"
        return row[None, :, None]

    hidden = torch.zeros(1, len(role), 4)
    return LayerTokens(
        layer=1, depth=32, hidden=hidden, role=torch.tensor([role]), n_visual=(n_visual,), attention=attention
    )


def test_the_example_by_hand() -> None:
    """Two text, four image, two text tokens; head means .06 .155 .13 .06 of the image: half of them goes."""
    role = [PREFIX, PREFIX, VISUAL, VISUAL, VISUAL, VISUAL, TEXT, TEXT]
    reduction = get("fastv(retention_ratio=0.5, budget='after')").reduce_in_llm(tokens(ROW, role, 4))
    assert reduction.keep[0].nonzero().flatten().tolist() == [0, 1, 3, 4, 6, 7]
    assert (reduction.n_visual, reduction.positions) == ((2,), "keep")


def test_released_is_off_by_one() -> None:
    """The first image token stays unranked, and the first word behind the image goes."""
    row = ROW.clone()
    row[:, 6] = torch.tensor([0.15, 0.10])
    role = [PREFIX, PREFIX, VISUAL, VISUAL, VISUAL, VISUAL, TEXT, TEXT]
    for profile, expected in (("released", [0, 1, 2, 3, 4, 7]), ("corrected", [0, 1, 3, 4, 6, 7])):
        method = get(f"fastv(retention_ratio=0.5, budget='after', profile={profile!r})")
        reduction = method.reduce_in_llm(tokens(row, role, 4))
        assert reduction.keep[0].nonzero().flatten().tolist() == expected
        assert reduction.n_visual == (2,)
        everything = get(f"fastv(retention_ratio=1, profile={profile!r})").reduce_in_llm(tokens(row, role, 4))
        assert bool(everything.keep.all())


def test_an_image_at_the_very_end_has_no_place_behind_it() -> None:
    role = [PREFIX, PREFIX, PREFIX, PREFIX, VISUAL, VISUAL, VISUAL, VISUAL]
    for profile in ("released", "corrected"):
        method = get(f"fastv(retention_ratio=0.5, budget='after', profile={profile!r})")
        reduction = method.reduce_in_llm(tokens(ROW, role, 4))
        assert reduction.keep[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 6, 7]
        assert reduction.n_visual == (2,)


def test_newlines_compete_and_padding_does_not_matter() -> None:
    role = [PAD, PREFIX, VISUAL, NEWLINE, VISUAL, NEWLINE, TEXT, TEXT]
    reduction = get("fastv(retention_ratio=0.25, budget='after')").reduce_in_llm(tokens(ROW, role, 4))
    assert (reduction.keep[0] & (torch.tensor(role) != PAD)).nonzero().flatten().tolist() == [1, 3, 6, 7]


@pytest.mark.parametrize(("ratio", "after"), [(0.75, 0.7333), (0.5, 0.4667), (0.25, 0.2), (0.1, 0.04)])
def test_the_ratio_is_the_mean_over_layers(ratio: float, after: float) -> None:
    """The post-K shares for K = 2 of 32 layers, as the reference tabulates them."""
    ran = get(f"fastv(retention_ratio={ratio})").visual_per_layer(2880, 32)
    assert ran[:2] == (2880, 2880)
    assert set(ran[2:]) == {round(2880 * after) if ratio != 0.75 else 2112, ran[2]}
    assert ran[2] / 2880 == pytest.approx(after, abs=1e-4)
    assert sum(ran) / 32 / 2880 == pytest.approx(ratio, abs=5e-4)


def test_after_is_the_authors_convention() -> None:
    assert get("fastv(retention_ratio=0.1, budget='after')").visual_per_layer(2340, 32)[-1] == 234


def test_the_comparison_of_globalcom2() -> None:
    """The ratio is one of 2880 tokens, whatever the image, behind the second layer."""
    for ratio, kept in ((0.75, 2160), (0.5, 1440), (0.25, 720), (0.1, 288)):
        method = get("fastv(budget='paper')", retention_ratio=ratio)
        assert method.visual_per_layer(2928, 32) == (2928,) * 2 + (kept,) * 30
        assert method.visual_per_layer(1176, 32)[-1] == min(kept, 1176)
        assert method.visual_per_layer(0, 32) == (0,) * 32
    assert get("fastv(budget='paper', full=720, retention_ratio=0.25)").visual_per_layer(600, 32)[-1] == 180


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match=r"6\.25%.*at least 6\.25%"):
        get("fastv(retention_ratio=0.06)").visual_per_layer(2880, 32)
    with pytest.raises(InputError, match="before layer 32, but the model has 32"):
        get("fastv(layer=32, retention_ratio=0.5)").visual_per_layer(2880, 32)
    for field, value in (("layer", "0"), ("layer", "1.5"), ("budget", "'all'"), ("full", "0")):
        with pytest.raises(InputError, match=f"fastv's {field} must be .*, got {value}$"):
            get(f"fastv({field}={value})")
