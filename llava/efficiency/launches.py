"""Counts what a stretch of code asks of a device: kernels launched, values read back."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

QUIET = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
"""ATen operations that launch nothing although their result is no view: they allocate, or view under another name."""


class Launches(TorchDispatchMode):
    """Counts while it is entered: `with Launches(device) as count: …`, then `count.launches` and `count.reads`.

    A launch is an ATen operation whose result is on the device, a copy to it included; views and allocations are none.
    (Some operations run several kernels: CUDA's sort moves its input first.) A read is an operation on the device's
    tensors that the host has to wait for: its result is a number, is on the host, or has a shape that values decide.
    What `torch.tensor` puts on a device passes unseen.

    On "meta" tensors, which hold no values, the launches are those of a GPU, and what would read raises. On the CPU
    device and host are one: all operations count, copies to the host are no reads, and neither are `tolist` and
    `numpy`, which are no operations there.
    """

    def __init__(self, device: torch.device | str) -> None:
        """Prepare to count for a device; its index does not matter."""
        super().__init__()
        self.device = torch.device(device).type
        self.operations: Counter[str] = Counter()
        """Launches by ATen operation."""
        self.reads = 0

    @property
    def launches(self) -> int:
        """Launches so far."""
        return self.operations.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at where its arguments and its result are."""
        result = func(*args, **(kwargs or {}))
        given, made = self._here((args, kwargs)), self._here(result)
        name, silent = (
            func.overloadpacket.__name__,
            not func._schema.returns,
        )  # as `_foreach_add_`, which works in place
        if (made or (given and silent)) and not func.is_view and name not in QUIET:
            self.operations[name] += 1
        if given and not silent and (not made or _shaped_by_values(func, name, args)):
            self.reads += 1
        return result

    def _here(self, values: Any) -> bool:
        """Whether any of them is a tensor on the device."""
        return any(
            isinstance(value, torch.Tensor) and value.device.type == self.device for value in tree_leaves(values)
        )


def _shaped_by_values(func: Any, name: str, args: Any) -> bool:
    """Whether the operation's values decide the shape of its result; indexing is such only where it is by a mask."""
    if name == "index":
        return any(index.dtype in (torch.bool, torch.uint8) for index in args[1] if index is not None)
    return torch.Tag.dynamic_output_shape in func.tags
