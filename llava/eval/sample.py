"""A fair part of a benchmark: seeded, the same for every method and number of processes, spread over the categories.

The first N questions of a file need not be like the others: the first 8 of MME are of 4 of its 14 categories.
"""

from collections.abc import Hashable, Sequence
from random import Random

from llava.eval.benchmarks.base import Benchmark, Question

SEED = 0


def sample(questions: Sequence[Question], benchmark: Benchmark, number: int | None) -> list[Question]:
    """Draw about `number` questions, in the order of the file.

    What is scored as one (`Benchmark.unit`) is drawn as one. Every category gets a unit before any gets its second;
    from there on categories have their share of the benchmark. A larger sample holds every smaller one.

    Args:
        questions: all questions of a file.
        benchmark: whose they are.
        number: how many at most, though always one unit; None: all.
    """
    if number is None or number >= len(questions):
        return list(questions)
    units: dict[Hashable, list[int]] = {}
    for place, question in enumerate(questions):
        unit = benchmark.unit(question)
        units.setdefault(("alone", place) if unit is None else ("unit", unit), []).append(place)
    chosen: list[int] = []
    for places in _in_turn([(questions[places[0]].category, places) for places in units.values()]):
        if chosen and len(chosen) + len(places) > number:
            break
        chosen += places
    return [questions[place] for place in sorted(chosen)]


def _in_turn(units: Sequence[tuple[str, list[int]]]) -> list[list[int]]:
    """Return units (category, places) in an order of which every beginning is spread over the categories."""
    draw = Random(SEED)
    categories: dict[str, list[list[int]]] = {}
    for category, places in units:
        categories.setdefault(category, []).append(places)
    turns = []
    for members in categories.values():
        shuffled = sorted(members, key=lambda _: draw.random())
        start = draw.random()
        # The k-th of n stands at about k / n of the way, whatever n is.
        turns += [(k > 0, (k + start) / len(members), places) for k, places in enumerate(shuffled)]
    return [places for _, _, places in sorted(turns)]
