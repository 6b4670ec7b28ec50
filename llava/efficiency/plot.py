"""A picture of the analysis: where the time goes at every retention ratio, and how much faster it can get."""

from dataclasses import dataclass, replace
from pathlib import Path

from llava.compress import get
from llava.compress.base import Compressor
from llava.constants import InputError
from llava.efficiency.devices import Device
from llava.efficiency.methods import plan_request
from llava.efficiency.ops import Fusion, total
from llava.efficiency.request import STAGES, limits
from llava.efficiency.shapes import Model
from llava.utils import new_figure, save_figure

RATIOS = (1.0, 0.75, 0.5, 0.25, 0.1)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A method at several ratios on one device, everything fused."""

    title: str
    ratios: tuple[float, ...]
    milliseconds: dict[str, list[float]]
    """Stage -> least time at every ratio."""
    speedups: dict[str, list[float]]
    """What is compared with the uncompressed request -> by how much it is less, at every ratio."""


def sweep(
    model: Model,
    method: Compressor,
    image_size: tuple[int, int],
    device: Device,
    *,
    text: int,
    output: int,
    batch: int,
) -> Sweep:
    """Return what a method can gain at several ratios; arguments as of `analysis.analyse`.

    Raises:
        InputError: a ratio has no effect on the method.
    """
    if not method.follows_ratio:
        raise InputError(f"a retention ratio has no effect on {method}; there is nothing to draw")
    methods = [get("none"), *(replace(method, retention_ratio=ratio) for ratio in RATIOS)]
    base, *found = (
        plan_request(model, each, image_size, text=text, output=output, batch=batch).request for each in methods
    )
    times = [request.seconds(device) for request in found]
    ceilings = [limits(base, request, device) for request in found]
    flops = [total(request.stages(Fusion.NONE)["prefill"]).flops for request in (base, *found)]
    speedups = {name: [ceiling[name] for ceiling in ceilings] for name in ceilings[0]}
    return Sweep(
        title=f"{model.name}, {method.name}, {image_size[0]}x{image_size[1]}, {device.name}, at best",
        ratios=RATIOS,
        milliseconds={stage: [1e3 * time[stage] for time in times] for stage in STAGES},
        speedups={"FLOPs of prefill": [flops[0] / count for count in flops[1:]], **speedups},
    )


def draw(found: Sweep, output: Path) -> None:
    """Draw into a file.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(11, 4.5)
    left, right = figure.subplots(1, 2)
    labels, floor = [f"{ratio:.0%}" for ratio in found.ratios], [0.0] * len(found.ratios)
    for stage, values in found.milliseconds.items():
        left.bar(labels, values, bottom=floor, label=stage)
        floor = [below + value for below, value in zip(floor, values, strict=True)]
    for name, values in found.speedups.items():
        right.plot(labels, values, marker="o", label=name)
    left.set(xlabel="retention ratio", ylabel="least time (ms)")
    right.set(xlabel="retention ratio", ylabel="speedup over no compression")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend()
    figure.suptitle(found.title)
    save_figure(figure, output)
