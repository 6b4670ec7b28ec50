"""A compressed request beside the uncompressed one, as plain data: what `python -m llava.efficiency` prints."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llava.compress import get
from llava.compress.base import Compressor
from llava.efficiency.devices import Device
from llava.efficiency.memory import largest_batch
from llava.efficiency.methods import Planned, plan_request
from llava.efficiency.ops import Fusion, total
from llava.efficiency.report import SIDES
from llava.efficiency.request import STAGES, VISION, limits
from llava.efficiency.roofline import seconds
from llava.efficiency.shapes import Model

Data = dict[str, Any]


def analyse(
    model: Model,
    method: Compressor,
    image_size: tuple[int, int],
    devices: Sequence[Device],
    *,
    text: int,
    output: int,
    batch: int,
) -> Data:
    """Return everything that is known of a request without running it.

    Args:
        model: the model.
        method: the compression method.
        image_size: `(width, height)` in pixels.
        devices: to give the least times for.
        text: tokens of the prompt.
        output: tokens produced.
        batch: such requests run together.
    """
    base, planned = (
        plan_request(model, each, image_size, text=text, output=output, batch=batch) for each in (get("none"), method)
    )
    plan = planned.plan
    return {
        "model": model.name,
        "method": str(method),
        "image_size": list(image_size),
        "crops": list(planned.grid.crops) if planned.grid.crops else None,
        "views": planned.grid.n_views,
        "text_tokens": text,
        "output_tokens": output,
        "batch": batch,
        "requested_ratio": plan.ratio,
        "planned": plan.at_least if plan.exact else [plan.at_least, plan.at_most],
        **{side: _side(each) for side, each in zip(SIDES, (base, planned), strict=True)},
        "devices": {device.name: _times(base, planned, device) for device in devices},
    }


def _side(planned: Planned) -> Data:
    """Tokens, operations and bytes of one request."""
    request, layers = planned.request, planned.request.tokens
    visual = [count - planned.text for count in layers]
    return {
        "patches": request.kept,
        "newlines": planned.newlines,
        "extra": planned.extra,
        "visual_tokens": planned.visual,
        "sequence": layers[0],
        "tokens_per_layer": list(layers),
        "mean_visual_tokens_per_layer": sum(visual) / len(visual),
        "tower_layers": request.tower_layers,
        "kv_entries_per_layer": sum(request.context) / len(request.context),
        "kv_bytes": request.kv_bytes,
        "footprint": {fusion: asdict(request.footprint(fusion)) for fusion in (Fusion.NONE, Fusion.ATTENTION)},
        "stages": {
            stage: {"macs": cost.macs, "matmul_flops": cost.matmul_flops, "flops": cost.flops}
            for stage, cost in ((name, total(ops)) for name, ops in request.stages().items())
        },
        "bytes_moved": {
            fusion: {stage: total(ops).bytes for stage, ops in request.stages(fusion).items()} for fusion in Fusion
        },
    }


def _times(base: Planned, planned: Planned, device: Device) -> Data:
    """Least times on a device, in seconds, by fusion; and how many sequences it can decode at once."""
    pair = dict(zip(SIDES, (base.request, planned.request), strict=True))
    found: Data = {
        fusion: {
            **{side: _seconds(request.seconds(device, fusion)) for side, request in pair.items()},
            "decode_step": {side: seconds(r.decode_step(1, fusion), device) for side, r in pair.items()},
            "speedup_limit": limits(base.request, planned.request, device, fusion),
        }
        for fusion in Fusion
    }
    model, output = base.request.model, base.request.output
    batches = {side: largest_batch(model, device, r.context, output) for side, r in pair.items()}
    return found | {"largest_batch": batches}


def _seconds(stages: dict[str, float]) -> Data:
    first = sum(stages[stage] for stage in (*VISION, "prefill"))
    return {**stages, "first token": first, "request": sum(stages[stage] for stage in STAGES)}
