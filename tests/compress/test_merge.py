"""Self-preserving merging: the examples of the reference by hand, and a loop over tokens."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from llava.compress.merge import merge_into, n_targets, target_weights


@pytest.mark.parametrize(
    ("n", "count"), [(577, 2), (576, 2), (535, 2), (534, 2), (502, 2), (501, 2), (500, 1), (493, 1), (114, 1), (1, 1)]
)
def test_targets_per_source(n: int, count: int) -> None:
    assert n_targets(n, 0.998) == n_targets(n, Fraction(499, 500)) == count
    assert n_targets(n, 0.998, strict=True) == {501: 1, 1: 0}.get(n, count)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5, 0.93, 0.998, 1.0])
@pytest.mark.parametrize("n", [1, 2, 11, 50, 501])
def test_no_quantile_has_to_be_computed(n: int, epsilon: float) -> None:
    row = torch.randperm(n).double()
    bound = row.quantile(epsilon)
    assert n_targets(n, epsilon) == int((row >= bound - 1e-9).sum())
    assert n_targets(n, epsilon, strict=True) == int((row > bound + 1e-9).sum())
    assert n_targets(0, epsilon) == 0


@pytest.mark.parametrize(
    ("epsilon", "strict", "kind", "weights", "merged"),
    [
        (0.998, False, "softmax", [0, 1, 0], [1, 6, 3]),
        (0.5, False, "softmax", [0.1192, 0.8808, 0], [1.9586, 5.7465, 3]),
        (0.5, False, "ratio", [0.4, 0.6, 0], [3.5714, 5, 3]),
        (0.5, True, "softmax", [0, 1, 0], [1, 6, 3]),
    ],
)
def test_one_source(epsilon: float, strict: bool, kind: str, weights: list[float], merged: list[float]) -> None:
    """Token 0, of value 10, matches tokens of values 1, 2, 3 by 4, 6, 2."""
    ids, alpha = target_weights(torch.tensor([[4.0, 6, 2]]), n_targets(3, epsilon, strict), kind)
    assert torch.zeros(1, 3).scatter(1, ids, alpha)[0].tolist() == pytest.approx(weights, abs=1e-4)
    x = torch.tensor([[10.0], [1], [2], [3]])
    after = merge_into(x, torch.tensor([0]), ids + 1, alpha)
    assert after[1:, 0].tolist() == pytest.approx(merged, abs=1e-4)
    assert after[0] == x[0], "a source stands where it stood"


def test_two_sources_leave_a_target_its_share() -> None:
    ids, alpha = target_weights(torch.tensor([[5.0, 1], [4, 0]]), 1, "softmax")
    x = torch.tensor([[10.0], [4], [1], [7]])
    assert merge_into(x, torch.tensor([0, 1]), ids + 2, alpha)[2:, 0].tolist() == [5, 7]
    assert merge_into(x, torch.tensor([0, 1]), ids + 2, alpha, normalise=False)[2:, 0].tolist() == [15, 7]


def test_information_goes_where_it_was_meant() -> None:
    """Tokens 4 and 2 go into 1 and 3 (the released encoder mixes positions up and feeds 5 and 0)."""
    after = merge_into(torch.eye(6), torch.tensor([4, 2]), torch.tensor([[1], [3]]), torch.ones(2, 1))
    assert after[1].tolist() == [0, 0.5, 0, 0, 0.5, 0]
    assert after[3].tolist() == [0, 0, 0.5, 0.5, 0, 0]
    assert after[[0, 5]].tolist() == torch.eye(6)[[0, 5]].tolist()


def test_ties_go_to_the_lower_index_and_a_kind_is_named() -> None:
    ids, alpha = target_weights(torch.tensor([[1.0, 3, 3, 3]]), 2, "softmax")
    assert (ids.tolist(), alpha.tolist()) == ([[1, 2]], [[0.5, 0.5]])
    ids, alpha = target_weights(torch.zeros(1, 3), 2, "ratio")
    assert alpha.tolist() == [[0, 0]], "nothing matches: the source is dropped"
    with pytest.raises(ValueError, match="softmax or ratio, got 'mean'"):
        target_weights(torch.zeros(1, 3), 2, "mean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalise", [True, False])
def test_against_a_loop(dtype: torch.dtype, normalise: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 3, generator=draw).to(dtype)
    sources = torch.stack([torch.randperm(9, generator=draw)[:4] for _ in range(2)])
    rest = torch.stack([torch.tensor([i for i in range(9) if i not in row]) for row in sources])
    ids, alpha = target_weights(torch.randn(2, 4, 5, generator=draw), 2, "softmax")
    targets = rest[:, None].expand(-1, 4, -1).gather(2, ids)
    before = x.clone()
    after = merge_into(x, sources, targets, alpha, normalise)
    assert torch.equal(x, before)
    assert after.dtype == dtype
    for b in range(2):
        expected: list[Tensor] = []
        for j in range(9):
            total, share = x[b, j].float(), 1.0
            for s, i in enumerate(sources[b].tolist()):
                for k in range(2):
                    if int(targets[b, s, k]) == j:
                        total = total + alpha[b, s, k] * x[b, i].float()
                        share += float(alpha[b, s, k])
            expected.append(total / share if normalise else total)
        torch.testing.assert_close(after[b], torch.stack(expected).to(dtype), rtol=1e-5, atol=1e-5)
