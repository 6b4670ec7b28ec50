"""FiCoCo-L: the examples of the reference by hand, its solver, and what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llava.compress import get
from llava.compress.ficoco_l import READINGS, correlation, redundancy
from llava.compress.merge import merge_into, n_targets, target_weights
from llava.compress.stages import TEXT, VISUAL, LayerTokens
from llava.constants import InputError

# Three image tokens and two of text, row by row.
VV = torch.tensor([[1.0, 2, 3], [3, 3, 3], [0, 1, 2]])
VT = torch.tensor([[1.0, 1], [0, 2], [4, 2]])
TV = torch.tensor([[1.0, 0, 1], [0, 1, 1]])


def test_the_filter_by_hand() -> None:
    vision, task = VV.mean(1), VT.mean(1)
    assert redundancy(vision, task, 0.6, 3).tolist() == pytest.approx([0.8, 1.4, -0.6])
    assert redundancy(vision, 2 * task, 0.6, 3).tolist() == pytest.approx([0.4, 1.0, -1.8])  # the paper's algorithm 2
    assert redundancy(vision, TV.mean(0), 0.6, 3, READINGS["paper"]).tolist() == pytest.approx([1.0, 1.6, 0.2])


def test_the_correlation_by_hand() -> None:
    """Token 1 goes; into token 0 or 2?"""
    scores = correlation(VV[1:2, [0, 2]], VT[1:2], TV[:, [0, 2]], 0.6)
    assert scores[0].tolist() == pytest.approx([1.8, 2.2])
    ids, _ = target_weights(scores, n_targets(2, 0.998), "softmax")
    assert ids.tolist() == [[1]]
    for kind, expected in (("ratio", [0.55, 0.45]), ("softmax", [0.5987, 0.4013])):
        _, alpha = target_weights(scores, n_targets(2, 0), kind)
        assert alpha[0].tolist() == pytest.approx(expected, abs=1e-4)
    after = merge_into(torch.tensor([[1.0], [5], [3]]), torch.tensor([1]), torch.tensor([[2]]), torch.ones(1, 1))
    assert after[2] == 4


def test_the_released_formulas_and_what_is_wrong_with_them() -> None:
    """The file does not run, but its arithmetic does."""
    reading = READINGS["released"]
    vision, task = VV.mean(1), VT.mean(1)
    assert redundancy(vision, task, 0.6, 3, reading).tolist() == pytest.approx([3.2, 5.0, 0.6])
    # As the image's term is a sum, the text has nothing to say: 576 tokens that the text tells apart, and only it.
    vision, task = torch.full((576,), 2.0), torch.linspace(0, 10, 576)
    spread = redundancy(vision, task, 0.6, 576, reading)
    assert float((spread.max() - spread.min()) / spread.mean()) < 0.01
    spread = redundancy(vision, task, 0.6, 576)
    assert float((spread.max() - spread.min()) / spread.abs().mean()) > 1
    scores = correlation(VV[1:2, [0, 2]], VT[1:2], TV[:, [0, 2]], 0.6, reading)
    assert scores[0].tolist() == pytest.approx([1.8, 2.6])
    for kind, expected in (("ratio", [0.5909, 0.4091]), ("softmax", [0.69, 0.31])):
        _, alpha = target_weights(scores, n_targets(2, 0), kind)
        assert alpha[0].tolist() == pytest.approx(expected, abs=1e-3)
    # Merged tokens grow.
    x, one = torch.tensor([[1.0], [5], [3]]), torch.ones(1, 1)
    assert merge_into(x, torch.tensor([1]), torch.tensor([[2]]), one, reading.normalise)[2] == 8


def test_released_is_refused_as_a_whole() -> None:
    with pytest.raises(InputError, match="does not parse"):
        get("ficoco_l(profile='released')")


def tokens(layer: int = 5) -> LayerTokens:
    """The example as a sequence: image tokens of values 1, 5, 3, then two of text."""
    logits = torch.cat((torch.cat((VV, VT), 1), torch.cat((TV, torch.zeros(2, 2)), 1)))[None]  # [1, 5, 5]

    def attention(rows: Tensor, prompts: slice) -> Tensor:
        seen = logits.masked_fill(torch.tensor([[False] * 3 + [True] * 2] * 3 + [[False] * 5] * 2), 0)
        return seen[:, None].gather(2, rows[:, None, :, None].expand(-1, -1, -1, 5))

    return LayerTokens(
        layer=layer,
        depth=32,
        hidden=torch.tensor([1.0, 5, 3, 7, 8])[None, :, None],
        role=torch.tensor([[VISUAL] * 3 + [TEXT] * 2]),
        n_visual=(3,),
        attention=attention,
        queries_keys=lambda: (logits, torch.eye(5)[None]),
        n_text=(2,),
    )


@pytest.mark.parametrize("profile", ["corrected", "paper"])
def test_the_example_as_a_whole(profile: str) -> None:
    given = tokens()
    reduction = get(f"ficoco_l(r=1, layers=1, profile={profile!r})").reduce_in_llm(given)
    assert reduction.keep.tolist() == [[True, False, True, True, True]]
    assert (reduction.n_visual, reduction.positions) == ((2,), "keep")
    assert reduction.hidden is not None
    assert reduction.hidden[0, [0, 2, 3, 4], 0].tolist() == [1, 4, 7, 8]
    assert torch.equal(given.hidden, tokens().hidden)
    # With all that stay as targets: weights .4013 and .5987; ratios of 1.8 and 1.8 + 0.4 / 2.
    reduction = get(f"ficoco_l(r=1, layers=1, epsilon=0, profile={profile!r})").reduce_in_llm(given)
    share = 0.5987 if profile == "corrected" else 2 / 3.8
    assert reduction.hidden is not None
    wanted = [(1 + (1 - share) * 5) / (2 - share), (3 + share * 5) / (1 + share)]
    assert reduction.hidden[0, [0, 2], 0].tolist() == pytest.approx(wanted, abs=1e-4)


def test_without_text_the_image_decides_alone() -> None:
    given = replace(tokens(), role=torch.tensor([[VISUAL] * 3 + [0] * 2]), n_text=(0,))
    for profile in ("corrected", "paper"):
        reduction = get(f"ficoco_l(r=1, layers=1, profile={profile!r})").reduce_in_llm(given)
        assert reduction.keep[0, :3].tolist() == [True, False, True]
        assert reduction.hidden is not None
        assert not reduction.hidden.isnan().any()


def test_layers_run_on_what_the_reference_measured() -> None:
    """35 + 576 + 40 tokens, r = 14 from layer 5 on: what the caches hold, and what is left behind the last layer."""
    method = get("ficoco_l(r=14)")
    assert [75 + n for n in method.visual_per_layer(576, 32)] == [*[651] * 6, *range(637, 286, -14)]
    assert method.llm_points == method.points_in(32) == tuple(range(5, 32))
    assert method.points_in(40)[-1] == 39


@pytest.mark.parametrize(("r", "left", "mean"), [(14, 198, 422.4), (17, 117, 389.5), (19, 63, 367.6), (21, 9, 345.7)])
def test_the_authors_budgets(r: int, left: int, mean: float) -> None:
    ran = get(f"ficoco_l(r={r})").visual_per_layer(576, 32)
    assert sum(ran) / 32 == pytest.approx(mean, abs=0.05)
    assert ran[-1] - r == left
    # Their own convention names the tokens behind the last layer.
    after = get("ficoco_l(budget='after')", retention_ratio=left / 576)
    assert after.visual_per_layer(576, 32) == ran


@pytest.mark.parametrize("n", [576, 1176, 1948, 2340, 2928])
@pytest.mark.parametrize(
    ("ratio", "fields"),
    [
        (1.0, ""),
        (0.75, ""),
        (0.6, ""),
        (0.5, "layers=3"),
        (0.25, "layers=1"),
        (0.1, "layers=1, control_encoding_layer=1"),
        (0.55, "control_encoding_layer=-1"),
    ],
)
def test_the_ratio_is_the_mean_over_layers(n: int, ratio: float, fields: str) -> None:
    for depth in (32, 40):
        method = get(f"ficoco_l({fields})", retention_ratio=ratio)
        ran = method.visual_per_layer(n, depth)
        assert sum(ran) / depth / n == pytest.approx(ratio, abs=2e-3)
        first = method.points_in(depth)[0]
        assert set(ran[: first + 1]) == {n}
        steps = [a - b for a, b in zip(ran[first:], ran[first + 1 :], strict=False)]
        merging = steps[: len(method.points_in(depth))]
        assert max(merging) - min(merging) <= 1, "as even as integers allow"
        assert min(ran) >= 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ficoco_l(retention_ratio=0.25)", r"59\.4.%.*at least 59\.4\d%.*layers=1"),
        ("ficoco_l(r=22)", r"r=22 in 27 layers merges 594 tokens.*has 576.*21 at most"),
        ("ficoco_l(control_encoding_layer=40)", r"from layer 41 on.*32 layers"),
    ],
)
def test_the_unreachable_is_refused(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        get(spec).visual_per_layer(576, 32)
    assert get(spec).visual_per_layer(0, 32) == (0,) * 32 or "40" in spec


@pytest.mark.parametrize(
    "bad",
    ["control_encoding_layer=-2", "r=-1", "r=1.5", "layers=0", "beta=2", "epsilon='x'", "budget='paper'", "AT='no'"],
)
def test_bad_fields_are_named(bad: str) -> None:
    with pytest.raises(InputError, match=bad.split("=")[0]):
        get(f"ficoco_l({bad})")


def test_switched_off() -> None:
    method = get("ficoco_l(AT=False)")
    assert method.points_in(32) == ()
    assert method.visual_per_layer(576, 32) == (576,) * 32
