"""Turns, quartiles, memory and the largest batch: figures that can be said by hand."""

import subprocess
import sys

import pytest
import torch

from llava.efficiency import bench
from llava.efficiency.bench import Spread, alternate, largest, machine, peak_bytes, spreads, table, timed

CPU = torch.device("cpu")


def test_runs_take_turns_and_the_first_of_each_does_not_count() -> None:
    log: list[str] = []

    def run(name: str):
        def one() -> dict[str, float]:
            log.append(name)
            return {"all": float(len(log))}

        return one

    taken = alternate([run("a"), run("b"), run("c")], 2)
    assert log == [*"abc", *"abc", *"acb"]
    assert taken == [[{"all": 4}, {"all": 7}], [{"all": 5}, {"all": 9}], [{"all": 6}, {"all": 8}]]


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5, 1, 4, 2, 3]) == Spread(median=3, low=2, high=4)
    assert Spread.of([7.0]) == Spread(median=7, low=7, high=7)
    found = spreads([{"x": 1, "y": 5}, {"x": 3, "y": 5}])
    assert found == {"x": Spread(median=2, low=1.5, high=2.5), "y": Spread(median=5, low=5, high=5)}


def test_timed_returns_the_result_and_the_time_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((10.0, 12.5))
    monkeypatch.setattr(bench, "moment", lambda device: next(clock))
    monkeypatch.setattr(bench, "seconds_between", lambda start, end: end - start)
    assert timed(lambda: "done", CPU) == ("done", 2.5)


def test_peak_is_what_is_held_at_once() -> None:
    old = torch.ones(1000)

    def block() -> None:
        a = old + 1  # 4000 bytes
        b = a[:500] * 2  # and 2000
        del a
        torch.cat((b, b))  # 2000 and 4000

    assert peak_bytes(block, CPU) == 6000


@pytest.mark.parametrize("room", [0, 1, 5, 63, 64, 100])
def test_the_largest_batch_is_found(room: int) -> None:
    tried: list[int] = []

    def works(batch: int) -> None:
        tried.append(batch)
        if batch > room:
            raise torch.OutOfMemoryError

    assert largest(works, 64) == min(room, 64)
    assert tried[0] == 1  # whatever a device keeps for its libraries is there before much is asked for
    assert max(tried) <= 2 * max(room, 1)
    assert len(tried) <= 12  # doubled and halved, each six times at most


def test_libraries_say_it_in_their_own_words() -> None:
    def works(batch: int) -> None:
        if batch > 3:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")

    assert largest(works, 100) == 3


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def fails(batch: int) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        largest(fails, 4)


def test_pooled_memory_is_kept() -> None:
    """In a process of its own, as it cannot be undone: freed buffers come back without a page being touched anew."""
    program = """
import resource, sys, torch
from llava.efficiency.bench import pool_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.set_num_threads(1)
faults()
usual = faults()
if not pool_memory():
    sys.exit(77)
faults()
print(usual, faults())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("no mallopt in this C library")
    assert done.returncode == 0, done.stderr
    usual, pooled = map(int, done.stdout.split())
    assert pooled < usual / 10


def test_a_library_without_the_switch_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.ctypes, "CDLL", lambda _: object())
    assert not bench.pool_memory()


def test_the_machine_is_named_with_versions() -> None:
    said = machine(CPU)
    assert f"torch {torch.__version__}" in said
    assert f"{torch.get_num_threads()} threads" in said
    assert bench._processor()


def test_a_table_is_markdown() -> None:
    assert table([("", "a", "b"), ("x", "1", "2")]) == "|  | a | b |\n|---|---:|---:|\n| x | 1 | 2 |"
