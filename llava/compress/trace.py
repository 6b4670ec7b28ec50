"""What happened to the visual tokens of one call: the only thing that ledgers, pictures and answer files read."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from llava.anyres import AnyResGrid
from llava.compress.base import Compressor, Plan, Selection
from llava.compress.pack import Packed

Moment = float | torch.cuda.Event
"""A point in time: of this process, or in the work of a CUDA device, which is not made to wait by asking."""


@dataclass(kw_only=True)
class ImageTrace:
    """One image: its geometry, what the method planned and what it chose."""

    grid: AnyResGrid
    unpad: bool
    """Whether padding was left out of the count."""
    plan: Plan
    selection: Selection
    packed: Packed

    def __str__(self) -> str:
        """One line for the log."""
        plan, packed = self.plan, self.packed
        planned = f"{plan.at_least}" if plan.exact else f"{plan.at_least} to {plan.at_most}"
        asked = "no ratio" if plan.ratio is None else f"ratio {plan.ratio:g}"
        width, height = self.grid.image_size
        return (
            f"{width}x{height}: {asked} of {plan.patches} patches, planned {planned}, "
            f"kept {packed.patches}, {len(packed.origin)} tokens with {packed.newlines} newlines"
            + (f" and {self.appended} appended" if self.appended else "")
        )

    @property
    def appended(self) -> int:
        """Tokens of the method's own, which are no patch of the image."""
        return 0 if self.selection.extra is None else len(self.selection.extra.features)

    def check(self) -> None:
        """Compare what was packed with the plan; reads nothing from the device.

        Raises:
            RuntimeError: the method did not do what it planned.
        """
        if not self.plan.at_least <= self.packed.patches <= self.plan.at_most:
            raise RuntimeError(f"the method broke its plan: {self}")

    def ledger(self) -> dict[str, Any]:
        """Return the account of this image as plain data; tokens = kept + newlines + appended.

        `kept` are patches, `appended` the method's own tokens, which cost as much, so that `kept_ratio` counts both.

        Raises:
            RuntimeError: the counts do not add up to what was packed.
        """
        before = [self.grid.patches_per_view, *self.grid.crop_patches(self.unpad)]
        after = self.selection.count.tolist()
        plan = self.plan
        if sum(after) != self.packed.patches:
            raise RuntimeError(f"the method counts {sum(after)} kept tokens ({after}), but: {self}")
        if sum(after) + self.appended != self.packed.visual:
            raise RuntimeError(f"{sum(after)} kept and {self.appended} appended tokens are not what was packed: {self}")
        return {
            "size": list(self.grid.image_size),
            "grid": list(self.grid.crops) if self.grid.crops else None,
            "patches_before": before,
            "patches_after": after,
            "crop_ratios": [round(k / n, 4) if n else None for k, n in zip(after[1:], before[1:], strict=True)],
            "newlines": self.packed.newlines,
            "appended": self.appended,
            "tokens": len(self.packed.origin),
            "requested_ratio": plan.ratio,
            "planned": plan.at_least if plan.exact else [plan.at_least, plan.at_most],
            "kept": sum(after),
            "kept_ratio": round((sum(after) + self.appended) / sum(before), 4),
        }


@dataclass(kw_only=True)
class Trace:
    """Filled by the model while it answers; pass one to `generate(trace=…)` to get it."""

    method: str = ""
    images: list[ImageTrace] = field(default_factory=list)
    sequence_lengths: list[int] = field(default_factory=list)
    """Tokens entering the language model, per row of the batch, padding not counted."""
    n_text: list[int] = field(default_factory=list)
    """Text tokens behind the first image, per row: what methods take for the question. All of a row without images."""
    visual_per_layer: list[tuple[int, ...]] = field(default_factory=list)
    """Per row of the batch, the image tokens, newlines included, that every layer of the language model ran on."""
    spans: list[tuple[str, Moment, Moment]] = field(default_factory=list, repr=False)
    """What was timed: stage, beginning and end."""

    def add(self, method: Compressor, image: ImageTrace) -> None:
        """Take an image in."""
        self.method = str(method)
        self.images.append(image)

    @contextmanager
    def clock(self, stage: str, device: torch.device) -> Iterator[None]:
        """Add the time of the block to a stage."""
        start = moment(device)
        yield
        self.spans.append((stage, start, moment(device)))

    @property
    def seconds(self) -> dict[str, float]:
        """Time of every stage, waited for: vision, selection, packing (projector included), prefill, decode."""
        total: dict[str, float] = {}
        for stage, start, end in self.spans:
            total[stage] = total.get(stage, 0.0) + seconds_between(start, end)
        return total

    def ledger(self) -> dict[str, Any]:
        """Return the whole account as plain data, ready for JSON."""
        return {
            "method": self.method,
            "images": [image.ledger() for image in self.images],
            "sequence_lengths": self.sequence_lengths,
            "visual_per_layer": [list(layers) for layers in self.visual_per_layer],
            "seconds": {stage: round(seconds, 4) for stage, seconds in self.seconds.items()},
        }


class GenerationClock:
    """Splits the time of `generate` at its first token: prefill before, decode after. Idle without a trace."""

    def __init__(self, trace: Trace | None, device: torch.device) -> None:
        """Prepare to time a generation on `device` for `trace`."""
        self.trace, self.device = trace, device
        self.start: Moment | None = None
        self.first: Moment | None = None

    @property
    def criteria(self) -> list[Callable[..., bool]]:
        """What to add to the stopping criteria, which transformers calls after every token."""
        return [self._token] if self.trace else []

    def _token(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
        if self.first is None:
            self.first = moment(self.device)
        return False

    def __enter__(self) -> "GenerationClock":
        """Start the clock."""
        if self.trace:
            self.start = moment(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the clock and write both spans down."""
        if self.trace and self.start is not None and self.first is not None:
            spans = [("prefill", self.start, self.first), ("decode", self.first, moment(self.device))]
            self.trace.spans += spans


def moment(device: torch.device) -> Moment:
    """Return the moment at which the device has done all it was given so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Moment, end: Moment) -> float:
    """Return the time between two moments of one device; waits for the later one."""
    if isinstance(start, float) or isinstance(end, float):
        return float(end) - float(start)  # type: ignore[arg-type]
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
