"""The processes of one run, started by torchrun or accelerate: who am I, what is next, are we done."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from llava.constants import InputError
from llava.interrupts import exit_code

T = TypeVar("T")
# Seconds after which a launcher has ended a process whose companions ended.
GRACE = 30


class Ranks:
    """This process among those of the run; alone where no launcher started it. A context manager."""

    def __init__(self, wanted: int | None = None) -> None:
        """Join the run.

        Args:
            wanted: number of processes the user asked for; None: as many as there are.

        Raises:
            InputError: there are fewer or more.
        """
        self.rank, self.world, self.local = 0, 1, 0
        self._counts: Counter[str] = Counter()
        if dist.is_torchelastic_launched():
            # One rank may wait long for another's last image.
            dist.init_process_group("gloo", timeout=timedelta(days=7))
            self.rank, self.world, self.local = dist.get_rank(), dist.get_world_size(), dist.get_node_local_rank()
        if wanted is not None and wanted != self.world:
            error = InputError(
                f"{wanted} processes were asked for, but {self.world} started; launch with torchrun "
                f"--nproc_per_node {wanted} (accelerate launch --cpu starts one)"
            )
            self.close(error)
            raise error

    @property
    def device(self) -> str:
        """Device of this process; one that is alone may spread a large model over all."""
        if not torch.cuda.is_available():
            return "cpu"
        return "cuda" if self.world == 1 else f"cuda:{self.local}"

    def claim(self, items: int, chunk: int) -> Iterator[int]:
        """Draw from a queue all processes share, `chunk` at a time, so that all stay busy to the end."""
        while (start := (self.count("next", 1) - 1) * chunk) < items:
            yield from range(start, min(start + chunk, items))

    def count(self, what: str, number: int) -> int:
        """Add to a counter that all processes share; returns where it stands."""
        if self.world == 1:
            self._counts[what] += number
            return self._counts[what]
        return int(dist.distributed_c10d._get_default_store().add(what, number))

    def share(self, value: T | None) -> T:
        """Return what the first process gives, to all of them."""
        held = [value]
        if self.world > 1:
            with _together():
                dist.broadcast_object_list(held, src=0)
        return cast(T, held[0])

    def first(self, work: Callable[[], T]) -> T:
        """Have the first process do something; return what it returns, or raise its `InputError`, in all of them."""
        done: tuple[T | None, InputError | None] = None, None
        if self.rank == 0:
            try:
                done = work(), None
            except InputError as refused:
                done = None, refused
        found, error = cast(tuple[T, InputError | None], self.share(done))
        if error is not None:
            raise error
        return found

    def wait(self) -> None:
        """Wait for the others."""
        if self.world > 1:
            with _together():
                dist.barrier()

    def close(self, error: BaseException | None = None) -> None:
        """Leave the run; after an error the launcher stops the others.

        Raises:
            SystemExit: another process says why: the one that stopped first with an error of the user's or of the
                machine's, or of an interrupted run the first.
        """
        said = isinstance(error, InputError | OSError) and self.count("said", 1) > 1
        if dist.is_initialized():
            dist.destroy_process_group()
        if said:
            raise SystemExit(2)
        if self.rank > 0 and isinstance(error, KeyboardInterrupt):
            raise SystemExit(exit_code(error))

    def __enter__(self) -> "Ranks":
        """Return self."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the run."""
        self.close(error)


@contextmanager
def _together() -> Iterator[None]:
    """Wait for processes one of which may end; the launcher says so and ends the others, this one among them."""
    try:
        yield
    except RuntimeError:
        time.sleep(GRACE)
        raise SystemExit(1) from None
