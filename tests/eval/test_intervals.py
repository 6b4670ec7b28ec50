"""Bootstrap intervals: against the textbook's draw, paired, seeded, and of sensible width."""

from typing import Any

import numpy as np
import pytest

from llava.constants import InputError
from llava.eval.intervals import interval, paired_difference, pictures


def scores(seed: int, n: int = 400) -> dict[int, float]:
    drawn = np.random.default_rng(seed).choice([0, 30, 60, 90, 100], n)
    return dict(enumerate(map(float, drawn)))


def test_agrees_with_drawing_indices() -> None:
    run = scores(1)
    values = np.array(list(run.values()))
    drawn = np.random.default_rng(7).integers(0, len(values), (10_000, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    found = interval(run)
    assert found.value == pytest.approx(values.mean())
    assert found.n == 400
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.3)


def test_the_seed_decides() -> None:
    run = scores(1)
    assert interval(run) == interval(run)
    assert interval(run, seed=1) != interval(run)


def test_equal_scores_leave_no_room() -> None:
    assert interval({1: 100.0, 2: 100.0}) == (100, 100, 100, 2)
    run = scores(1)
    assert paired_difference(run, run) == (0, 0, 0, 400)


def test_pairing_ignores_what_both_find_hard() -> None:
    """Two points better on every question: certain, though each run alone is uncertain by several."""
    run = scores(1)
    better = {key: value + 2 for key, value in run.items()}
    assert paired_difference(better, run)[:3] == pytest.approx((2, 2, 2))
    assert interval(run).high - interval(run).low > 5


def test_sign_and_shared_questions() -> None:
    difference = paired_difference({1: 100.0, 2: 100.0, 3: 0.0}, {2: 0.0, 1: 100.0, 9: 50.0})
    assert (difference.value, difference.n) == (50, 2)
    assert difference.low <= 50 <= difference.high


def test_many_questions_and_many_values() -> None:
    run = dict(enumerate(np.random.default_rng(0).normal(size=20_000)))
    found = interval(run, resamples=1000)
    assert found.high - found.low == pytest.approx(2 * 1.96 / 20_000**0.5, rel=0.2)


def test_questions_about_a_picture_are_drawn_together() -> None:
    """Against the textbook's draw of clusters of unequal size; ids come alone, as text, or first in a longer key."""
    generator = np.random.default_rng(3)
    sizes = generator.integers(1, 6, 80)
    hard = generator.choice([0.0, 100.0], 80)
    run: dict[Any, float] = {}
    about = {}
    for number, (size, value) in enumerate(zip(sizes, hard, strict=True)):
        for turn in range(size):
            name = f"{number}-{turn}"
            run[(name, "what?") if turn % 2 else name] = value
            about[name] = f"{number}.png"
    drawn = generator.integers(0, 80, (10_000, 80))
    means = (hard * sizes)[drawn].sum(1) / sizes[drawn].sum(1)
    found = interval(run, about)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=1)
    assert found.n == sizes.sum()
    alone = interval(run)
    assert found.high - found.low > 1.3 * (alone.high - alone.low)
    assert interval(run, {"nobody": "x.png"}) == alone


def test_pictures_are_read_from_rows() -> None:
    rows = [
        {"question_id": 1, "metadata": {"image": "a.png"}},
        {"question_id": "2", "metadata": {}},
        {"question_id": 3},
        {"question_id": 4, "metadata": None},
    ]
    assert pictures(rows) == {"1": "a.png"}


def test_nothing_to_compare() -> None:
    with pytest.raises(InputError, match="at least one"):
        interval({})
    with pytest.raises(InputError, match="share no locally scored question"):
        paired_difference({1: 1.0}, {2: 1.0})


def test_an_id_of_several_pictures_names_none() -> None:
    rows = [{"question_id": 1, "metadata": {"image": name}} for name in ("a.png", "b.png", "a.png")]
    rows += [{"question_id": 2, "metadata": {"image": "a.png"}}] * 2
    assert pictures(rows) == {"2": "a.png"}
