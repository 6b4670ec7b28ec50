"""Bytes of tensors that live at once, on any device; they do not depend on allocators, and so repeat exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class Meter(TorchDispatchMode):
    """Counts the bytes of all tensors that were made since it began and still live."""

    def __init__(self) -> None:
        """Begin at nothing."""
        super().__init__()
        self.live = self.peak = 0
        self.at = "start"
        self.points: dict[str, int] = {}
        """Live bytes at every mark."""
        self.peaks: dict[str, int] = {}
        """Most live bytes between every mark and the next."""
        self.own: dict[str, int] = {}
        """Most bytes that spans of a stage took, see `span`."""
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it makes."""
        for storage in _storages((args, kwargs)):
            self._see(storage, 0)  # weights and the like: older than this, and never counted
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._see(storage, storage.nbytes())
        self.peak = max(self.peak, self.live)
        self.peaks[self.at] = max(self.peaks.get(self.at, 0), self.live)
        return result

    def _see(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        key = id(storage)  # torch keeps the object as long as the memory
        if key not in self._known:
            self._known.add(key)
            self.live += nbytes
            finalize(storage, self._free, key, nbytes).atexit = False

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes

    def mark(self, label: str) -> None:
        """Pass a place that other runs pass too."""
        self.at = label
        self.points.setdefault(label, self.live)
        self.peaks[label] = max(self.peaks.get(label, 0), self.live)

    @contextmanager
    def span(self, label: str, base: dict[str, int]) -> Iterator[None]:
        """Count the block as a method's own work.

        Args:
            label: the mark that it belongs to; its first word is the stage.
            base: live bytes at the marks without a method. What lives on top of them at the beginning is counted too.
        """
        self.points.setdefault(label, self.live)
        before, outer, self.peak = self.live, self.peak, self.live
        yield
        stage = label.split()[0]
        self.own[stage] = max(self.own.get(stage, 0), self.peak - min(before, base.get(label, before)))
        self.peak = max(outer, self.peak)
