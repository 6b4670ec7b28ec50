"""95 % intervals by the bootstrap: how far a score, or the difference of two, may lie from what was measured.

Questions are drawn with replacement, as many as there are; the interval runs from the 2.5th to the 97.5th percentile of
the mean over 10 000 such draws (percentile method). Two runs are compared pair by pair: a draw takes both answers to a
question, so that what both runs find hard does not widen the interval. Only chance in the choice of questions counts.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llava.constants import InputError

RESAMPLES = 10_000
LEVEL = 0.95
# Draws held in memory at once, in numbers.
BLOCK = 4_000_000


class Interval(NamedTuple):
    """A mean and where it may lie."""

    value: float
    low: float
    high: float
    n: int
    """Questions it rests on."""


def interval(per_question: Mapping[Any, float], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return the mean over questions and its 95 % interval.

    Args:
        per_question: question -> its contribution, as in `Result.per_question`.
        resamples: number of draws.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        InputError: there are no questions.
    """
    if not per_question:
        raise InputError("an interval needs at least one locally scored question")
    values = np.fromiter(per_question.values(), dtype=np.float64, count=len(per_question))
    low, high = np.percentile(_means(values, resamples, seed), [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(float(values.mean()), float(low), float(high), len(values))


def paired_difference(
    first: Mapping[Any, float], second: Mapping[Any, float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the mean of `first` − `second` over the questions in both, and its 95 % interval.

    Args:
        first: question -> its contribution in one run.
        second: the same of the run it is compared with.
        resamples: number of draws.
        seed: of the draws.

    Raises:
        InputError: the runs have no question in common.
    """
    shared = {key: value - second[key] for key, value in first.items() if key in second}
    if not shared:
        raise InputError("the answers files share no locally scored question; compare runs of one benchmark")
    return interval(shared, resamples=resamples, seed=seed)


def _means(values: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Return the mean of every draw.

    Scores take few distinct values, so a draw is how often each comes up: one multinomial instead of n indices, with
    the same distribution, and 100 000 questions cost no more than ten.
    """
    distinct, counts = np.unique(values.round(9), return_counts=True)
    generator = np.random.default_rng(seed)
    rows = max(1, BLOCK // len(distinct))
    blocks = [
        generator.multinomial(len(values), counts / len(values), size=min(rows, resamples - start)) @ distinct
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(blocks) / len(values)
