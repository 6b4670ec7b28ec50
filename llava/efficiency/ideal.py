"""What a measured request could at best take with less to do, and what of that is reached."""

from collections.abc import Mapping

from llava.efficiency.ops import Fusion, total
from llava.efficiency.request import Request


def work(request: Request) -> dict[str, int]:
    """Return what the time of every stage goes with: operations, and in decoding, bytes moved."""
    stages = request.stages(Fusion.ATTENTION)
    return {name: total(ops).bytes if name == "decode" else total(ops).flops for name, ops in stages.items()}


def ideal(base: Mapping[str, float], before: Request, after: Request) -> dict[str, float]:
    """Return the seconds of every part of a request if each stage did its work at the rate it had in another.

    Args:
        base: seconds of the other's parts; what belongs to no stage, and preprocessing, goes with the requests alone.
        before: the other.
        after: the request. Its selection runs at the rate of the tower, whose layers it looks into.
    """
    old, new = work(before), work(after)
    requests = after.batch / before.batch
    found = {part: base[part] * requests for part in ("preprocessing", "other")}
    for stage in ("tower", "projector", "prefill", "decode"):
        found[stage] = base[stage] * new[stage] / old[stage] if old[stage] else 0.0
    found["selection"] = base["tower"] * new["selection"] / old["tower"]
    request = sum(found.values())
    return found | {"first token": request - found["decode"], "request": request}


def phi(measured: float, limit: float) -> float | None:
    """Return the share of what can be saved that is saved, from two speed-ups; None where nothing can."""
    return None if limit <= 1 else (1 - 1 / measured) / (1 - 1 / limit)
