"""Pictures of a question file: found safely, decoded and preprocessed in worker processes that keep ahead."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llava.constants import InputError
from llava.eval.benchmarks.base import Question
from llava.mm_utils import load_image, load_image_from_base64, process_images, to_rgb


@dataclass(frozen=True)
class Picture:
    """One picture as the model takes it, or why there is none."""

    group: int
    """Which group of questions it belongs to."""
    views: Tensor | None = None
    """`[V, 3, S, S]`, or `[3, S, S]` where the model takes single views."""
    size: tuple[int, int] = (0, 0)
    """`(width, height)` of the original in pixels."""
    error: str | None = None


def check_paths(questions: Iterable[Question], folder: Path) -> None:
    """Make sure that no question names a picture outside the image folder.

    Raises:
        InputError: one does, by an absolute path, by `..`, or through a link.
    """
    root = folder.resolve()
    for question in questions:
        if question.image is None or question.data is not None:
            continue
        if not (root / question.image).resolve().is_relative_to(root):
            raise InputError(
                f"question {question.id!r} names a picture outside the image folder: {question.image!r}; "
                "move it in, or pass --allow-outside if you trust the question file"
            )


class Pictures(Dataset[Picture]):
    """Loads the picture of every group of questions; what cannot be read comes back as an error, never raises."""

    def __init__(self, questions: Sequence[Question], folder: Path, processor: Any, config: Any) -> None:
        """Name the pictures by one question of every group; `config` is the model's."""
        self.questions, self.folder, self.processor = questions, folder, processor
        # Worker processes get a copy of this object: two values, not the model's whole config.
        self.config = SimpleNamespace(
            image_aspect_ratio=config.image_aspect_ratio, image_grid_pinpoints=config.image_grid_pinpoints
        )

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.questions)

    def __getitem__(self, group: int) -> Picture:
        """Load the picture of a group."""
        question = self.questions[group]
        if question.image is None and question.data is None:
            return Picture(group)
        try:
            if question.data is not None:
                image = to_rgb(load_image_from_base64(question.data))
            else:
                image = load_image(self.folder / str(question.image))
        except (InputError, OSError, ValueError) as error:
            return Picture(group, error=f"{question.image}: {error}")
        views = process_images([image], self.processor, self.config)[0]
        return Picture(group, views, image.size)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def stream(pictures: Pictures, groups: Iterable[int], workers: int) -> Iterator[Picture]:
    """Load the pictures of the given groups in order, `workers` processes ahead of the consumer (0: none)."""
    ahead: dict[str, Any] = {}
    if workers:
        # Started afresh, as a forked copy of a process with threads and a GPU may hang.
        ahead = {"multiprocessing_context": "spawn", "prefetch_factor": 4, "worker_init_fn": _one_thread}
    sampler: Any = _Lazy(groups)
    yield from DataLoader(pictures, batch_size=None, sampler=sampler, num_workers=workers, **ahead)


class _Lazy:
    """A sampler that draws the next group only when a worker is free for it."""

    def __init__(self, groups: Iterable[int]) -> None:
        self.groups = groups

    def __iter__(self) -> Iterator[int]:
        return iter(self.groups)
