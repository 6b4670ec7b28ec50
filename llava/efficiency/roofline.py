"""The time a device cannot go below: every operator is bound by arithmetic or by memory, one after the other.

t = Σ times · max(FLOPs ÷ peak, bytes ÷ bandwidth) over operators (Williams et al., 2009), as LLM-Viewer sums it: one
maximum over whole stages would let operators overlap that wait for each other. Launches, synchronisation and the host
are left out, and devices do not reach what they promise, so a measured time is longer.
"""

from collections.abc import Iterable

from llava.constants import InputError
from llava.efficiency.devices import Device
from llava.efficiency.ops import Op


def seconds(ops: Iterable[Op], device: Device) -> float:
    """Return the least time operators take one after the other, in seconds."""
    return sum(op.times * max(op.flops / device.flops, op.bytes / device.bandwidth) for op in ops)


def compute_bound(op: Op, device: Device) -> bool:
    """Tell whether an operator is bound by arithmetic rather than by memory."""
    return op.flops / device.flops >= op.bytes / device.bandwidth


def removed_share(measured: float, limit: float) -> float:
    """Return Φ = (1 - 1/S) / (1 - 1/S_limit): the share of the removable time that was removed.

    Args:
        measured: S, the speedup measured against the uncompressed model, same run and device.
        limit: S_limit, what the roofline allows for the same tokens and device.

    Raises:
        InputError: a speedup is not positive, or the limit is 1: there is nothing to remove.
    """
    if measured <= 0 or limit <= 0 or limit == 1:
        raise InputError(f"speedups must be positive and the limit other than 1, got {measured:g} of {limit:g}")
    return (1 - 1 / measured) / (1 - 1 / limit)
