"""Ranking: figures that can be said by hand, on answers that are right as often as a test wants."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llava.constants import InputError
from llava.eval import benchmarks
from llava.eval.benchmarks.mme import Picture
from llava.eval.published import COLUMNS, UPPER
from llava.eval.runs import collect
from llava.pocket import rank
from llava.pocket.gates import percent
from llava.pocket.rank import add_up, as_markdown, compare, per_question, scene_of
from tests.conftest import Command
from tests.eval.benchmarks.rows import row
from tests.pocket.test_write import data, right, truth_of, wrong

__all__ = ["data"]  # the fixture
Chosen = Callable[[int], bool]


@pytest.fixture
def answer(data: Path, tmp_path: Path) -> Any:
    """Write the answers of a method to all tasks; those about the scenes `chosen` are right."""

    def write(method: str, chosen: Chosen, tasks: Any = COLUMNS) -> Path:
        for task in tasks:
            say, err = right(task, data), wrong(task, data)
            rows = [
                row(q.id, (say if chosen(known["scene"]) else err)(q, known), q.prompt or q.text, **q.extra)
                for q, known in truth_of(task, data)
            ]
            folder = tmp_path / "out" / benchmarks.get(task).folder
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{method}.jsonl"
            file.write_text("".join(json.dumps(one) + "\n" for one in rows))
            record = {"method": method, "benchmark": task, "model_path": "pocket", "questions": "x"}
            file.with_name(file.name + ".config.json").write_text(json.dumps(record))
        return tmp_path / "out"

    return write


def found_in(root: Path, data: Path) -> Any:
    return add_up(collect(root, data).runs, data)


def test_every_question_is_counted_under_its_scene(answer: Any, data: Path) -> None:
    """Right about even scenes only: every sum of an even scene is full, every other is nothing."""
    found = found_in(answer("none()", lambda scene: scene % 2 == 0), data)
    (sums,) = found.values()
    assert list(found) == [UPPER]
    for task, each in zip(COLUMNS, sums, strict=True):
        asked = each[:, 1] > 0
        assert asked.sum() > 12, task
        share = each[asked, 0] / each[asked, 1]
        if task == "mme":  # linear in how much a picture lies above its category's mean: apart, on average
            assert share[::2].mean() > 90 > 10 > share[1::2].mean()
            continue
        even = np.nonzero(asked)[0] % 2 == 0
        assert np.allclose(share[even], 100), task
        assert np.allclose(share[~even], 0), task


@pytest.mark.parametrize("some", [lambda s: True, lambda s: s % 3 != 0, lambda s: s < 6])
def test_a_methods_score_is_the_mean_of_the_gates(answer: Any, data: Path, some: Chosen) -> None:
    root = answer("none()", some)
    runs = collect(root, data).runs
    for run in runs:
        values = per_question(run, data).values()
        assert sum(values) / len(values) == pytest.approx(percent(run.result)), run.benchmark
    value = compare(add_up(runs, data)[UPPER])
    assert value.value == pytest.approx(sum(percent(run.result) for run in runs) / 10)
    assert value.low <= value.value <= value.high


def test_the_difference_of_a_method_to_itself_is_nothing(answer: Any, data: Path) -> None:
    sums = found_in(answer("none()", lambda scene: scene % 2 == 0), data)[UPPER]
    assert compare(sums, sums)[:3] == (0, 0, 0)
    assert compare(sums).high - compare(sums).low > 10


def test_a_benchmark_that_is_no_task_of_the_pocket_is_passed_over(answer: Any, data: Path) -> None:
    runs = collect(answer("none()", lambda scene: True), data).runs
    other = SimpleNamespace(benchmark="mybench", key=("uniform", 0.5))
    assert list(add_up([*runs, other], data)) == [UPPER]  # type: ignore[list-item]


def test_pairing_leaves_out_what_both_find_hard(answer: Any, data: Path) -> None:
    """Two scenes fewer right: the difference is sure, though the scores themselves are not."""
    answer("random(retention_ratio=0.5)", lambda scene: scene % 2 == 0 and scene > 3)
    found = found_in(answer("none()", lambda scene: scene % 2 == 0), data)
    less, more = found["random", 0.5], found[UPPER]
    difference = compare(less, more)
    assert difference.value == pytest.approx(compare(less).value - compare(more).value)
    assert difference.high < 0.5, "but for what linear figures leave"
    assert difference.high - difference.low < 0.8 * (compare(more).high - compare(more).low)


def test_by_hand() -> None:
    """Three scenes, the same for every task: 100 of 1, 50 of 1 and 0 of 2 questions."""
    sums = np.tile(np.array([[100.0, 1], [50, 1], [0, 2]]), (10, 1, 1))
    found = compare(sums)
    assert found.value == pytest.approx(150 / 4)
    # All 27 draws, each as likely.
    draws = []
    for draw in np.ndindex(3, 3, 3):
        total = sums[0][list(draw)].sum(0)
        draws.append(total[0] / total[1])
    low, high = np.percentile(np.repeat(draws, 1000), [2.5, 97.5])
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.n == 40


def test_draws_without_a_task_do_not_count() -> None:
    """One of three scenes has no question of the first task, one has none of the second."""
    sums = np.tile(np.array([[100.0, 1], [50, 1], [0, 1]]), (10, 1, 1))
    sums[0, 0] = sums[1, 1] = 0
    found = compare(sums)
    assert 0 <= found.low < found.value < found.high <= 100
    with np.errstate(all="raise"):
        assert np.isnan(compare(np.zeros((10, 3, 2))).low)


def test_the_table_puts_the_best_first(answer: Any, data: Path) -> None:
    answer("none()", lambda scene: True)
    answer("random(retention_ratio=0.25)", lambda scene: scene % 3 == 0)
    answer("globalcom2(retention_ratio=0.25)", lambda scene: scene % 3 != 0)
    answer("uniform(retention_ratio=0.25)", lambda scene: True, ("gqa",))
    found = found_in(answer("fastervlm(retention_ratio=0.25)", lambda scene: True), data)
    lines = as_markdown(found, "globalcom2").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "none, R = 1",
        "`fastervlm`",
        "`globalcom2`",
        "`random`",
    ]
    assert lines[2].split("|")[2].strip() == "100.0 [100.0, 100.0]"
    assert lines[3].split("|")[3].strip().startswith("+")
    assert lines[4].split("|")[3].strip() == ""
    assert lines[5].split("|")[3].strip().startswith("-")
    assert len({line.count("|") for line in lines}) == 1


def test_methods_that_reach_less_stand_behind_and_those_without_a_ratio_apart(answer: Any, data: Path) -> None:
    answer("none()", lambda scene: True)
    answer("thumbnail_only()", lambda scene: scene % 2 == 0)
    answer("fastv(retention_ratio=0.5)", lambda scene: True)
    for ratio in (0.5, 0.25):
        root = answer(f"globalcom2(retention_ratio={ratio})", lambda scene: scene % 3 != 0)
    head, _, *lines = as_markdown(found_in(root, data), "globalcom2").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (head, *lines)]
    assert cells[0] == ["", "R = 0.5", "− globalcom2", "R = 0.25", "− globalcom2"]
    assert [row[0] for row in cells[1:]] == ["none, R = 1", "thumbnail_only, its own R", "`globalcom2`", "`fastv`"]
    apart, fastv = cells[2], cells[4]
    assert apart[1].startswith("5")
    assert apart[3] == ""
    assert apart[2] == apart[4] != ""  # globalcom2 answers the same at both ratios
    assert fastv[2].startswith("+")
    assert fastv[3:] == ["–", ""]


def test_what_is_not_there_is_said(answer: Any, data: Path, command: Command) -> None:
    root = answer("none()", lambda scene: True, ("gqa", "pope"))
    with pytest.raises(InputError, match="all ten tasks"):
        found_in(root, data)
    answer("random(retention_ratio=0.25)", lambda scene: True)
    code, _, err = command(rank.main, "--root", root, "--data", data, "--against", "fastv")
    assert code == 2
    assert "fastv has not answered" in err


def test_scenes_are_found_by_what_a_question_is_called() -> None:
    truth = {"7": {"scene": 3}}
    assert scene_of("gqa", "7", truth) == scene_of("pope", (7, "random"), truth) == 3
    assert scene_of("mmbench", 3_000_007, truth) == 3
    assert scene_of("mme", Picture("color", "0005"), {}) == 5
    assert scene_of("textvqa", ("000000000000001f", "What?"), truth) == 31
