"""95 % intervals by the bootstrap: how far a score, or the difference of two, may lie from what was measured.

Pictures are drawn with replacement, each with all questions about it, as many as there are (answers that do not say
which picture they are about count as one each); the interval runs from the 2.5th to the 97.5th percentile of the mean
over 10 000 such draws (percentile method). Two runs are compared pair by pair: a draw takes both answers to a question,
so that what both runs find hard does not widen the interval. Only chance in the choice of pictures counts.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llava.constants import InputError
from llava.eval.benchmarks.base import Row

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


def pictures(rows: Iterable[Row]) -> dict[str, str]:
    """Return which picture the questions of an answers file are about, by question id, as far as the rows say.

    An id that stands for questions about several pictures is left out.
    """
    named: dict[str, set[str]] = {}
    for row in rows:
        if image := (row.get("metadata") or {}).get("image"):
            named.setdefault(str(row["question_id"]), set()).add(image)
    return {question: images.pop() for question, images in named.items() if len(images) == 1}


def interval(
    per_question: Mapping[Any, float],
    pictures: Mapping[str, str] = MappingProxyType({}),
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the mean over questions and its 95 % interval.

    Args:
        per_question: question -> its contribution, as in `Result.per_question`.
        pictures: question id -> picture; questions about one are drawn together.
        resamples: number of draws.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        InputError: there are no questions.
    """
    if not per_question:
        raise InputError("an interval needs at least one locally scored question")
    values = np.fromiter(per_question.values(), dtype=np.float64, count=len(per_question))
    # A key may carry more than the question's id, which comes first then.
    names = [str(key[0] if isinstance(key, tuple) else key) for key in per_question]
    groups = [("picture", pictures[n]) if n in pictures else k for n, k in zip(names, per_question, strict=True)]
    number = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    member = np.fromiter((number[group] for group in groups), dtype=np.int64, count=len(groups))
    # [C, 2]: sum and number of every picture's questions.
    units: NDArray[np.float64] = np.zeros((len(number), 2))
    np.add.at(units, member, np.stack([values, np.ones_like(values)], 1))
    low, high = np.percentile(_means(units, resamples, seed), [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(float(values.mean()), float(low), float(high), len(values))


def paired_difference(
    first: Mapping[Any, float],
    second: Mapping[Any, float],
    pictures: Mapping[str, str] = MappingProxyType({}),
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the mean of `first` − `second` over the questions in both, and its 95 % interval.

    Args:
        first: question -> its contribution in one run.
        second: the same of the run it is compared with.
        pictures: question id -> picture; questions about one are drawn together.
        resamples: number of draws.
        seed: of the draws.

    Raises:
        InputError: the runs have no question in common.
    """
    shared = {key: value - second[key] for key, value in first.items() if key in second}
    if not shared:
        raise InputError("the answers files share no locally scored question; compare runs of one benchmark")
    return interval(shared, pictures, resamples=resamples, seed=seed)


def _means(units: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Return the mean over questions of every draw of units `[C, 2]`.

    Scores take few distinct values, so a draw is how often each comes up: one multinomial instead of C indices, with
    the same distribution, and 100 000 questions cost no more than ten.
    """
    distinct, counts = np.unique(units.round(9), axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    rows = max(1, BLOCK // len(distinct))
    sums = [
        generator.multinomial(len(units), counts / len(units), size=min(rows, resamples - start)) @ distinct
        for start in range(0, resamples, rows)
    ]
    drawn: NDArray[np.float64] = np.concatenate(sums)
    return drawn[:, 0] / drawn[:, 1]
