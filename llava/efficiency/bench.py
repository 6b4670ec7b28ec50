"""Timing things side by side: in turns, in one process, so that what the machine does meanwhile befalls all alike."""

import ctypes
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers

from llava.compress.trace import moment, seconds_between
from llava.efficiency.meter import Meter

Seconds = Mapping[str, float]
"""Time of every part of one run."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What several runs took, in seconds."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        """Sum runs up; a single one is its own quartiles."""
        low, _, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
        return cls(median=median(seconds), low=low, high=high)


def alternate(runs: Sequence[Callable[[], Seconds]], repeats: int) -> list[list[Seconds]]:
    """Run all once to warm up, then `repeats` times in turns, beginning with another one each time, and to and fro.

    So none always finds the caches as the same other one left them.

    Returns:
        Of every one, what its repeated runs took.
    """
    for run in runs:
        run()
    taken: list[list[Seconds]] = [[] for _ in runs]
    for turn in range(repeats):
        order = [(turn + place) % len(runs) for place in range(len(runs))]
        for index in order if turn % 2 == 0 else reversed(order):
            taken[index].append(runs[index]())
    return taken


def spreads(taken: Sequence[Seconds]) -> dict[str, Spread]:
    """Sum every part of repeated runs up."""
    return {part: Spread.of([one[part] for one in taken]) for part in taken[0]}


def timed(block: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Return what a call returns, and the seconds it took; a CUDA device has then done its work."""
    start = moment(device)
    result = block()
    return result, seconds_between(start, moment(device))


def peak_bytes(block: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes of tensors a call holds at once, on top of those there were.

    On CUDA they are those of the allocator. Elsewhere they are counted (`Meter`), which leaves out what a kernel needs
    inside.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        block()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with Meter() as meter:
        block()
    return int(meter.peak)


def largest(works: Callable[[int], Any], most: int) -> int:
    """Return the largest batch up to `most` that a call can do without running out of the device's memory; 0: none.

    Batches are doubled until one fails, then bisected; what fits is taken to fit in any smaller batch too.
    """

    def fits(batch: int) -> bool:
        try:
            works(batch)
        except RuntimeError as error:  # of libraries beneath torch, too, some of which have no class of their own
            if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
                raise
            return False
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # of the attempt, for the next
        return True

    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def pool_memory() -> bool:
    """Let glibc keep what is freed, as CUDA's allocator does; False where the C library has no such switch.

    By default it hands large buffers back and takes new ones, page by page, which costs a tower on a CPU more than
    what it computes can save.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_max = -1, -4  # malloc.h
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, 2**31 - 1))


def machine(device: torch.device) -> str:
    """Return what a figure must be given with: device, threads, versions, day."""
    name, threads = _processor(), f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        name, threads = torch.cuda.get_device_name(device), f"CUDA {torch.version.cuda}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{name}, {threads}, {versions}, {datetime.now(UTC):%Y-%m-%d}"


def _processor() -> str:
    """The processor's name; Linux alone says it in full."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(lines: Sequence[Sequence[str]]) -> str:
    """Lay lines of cells out as a table in Markdown, the first line its head."""
    body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([body[0], "|---|" + "---:|" * (len(lines[0]) - 1), *body[1:]])
