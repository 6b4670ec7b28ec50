"""Pictures of a question file: found safely, decoded and preprocessed in worker processes that keep ahead."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llava.constants import InputError
from llava.eval.benchmarks.base import Question
from llava.interrupts import deaf_children, end_with_parent
from llava.mm_utils import load_image, load_image_from_base64, process_images, to_rgb

# Pictures that tell whether the folder is the right one.
FIRST = 20
# A warning that the processes started from here on leave out.
UNSAID = "ignore:resource_tracker"
# Seconds in which a signal to us follows one to our workers.
GRACE = 0.5
# Below this many pictures worker processes cost more time to start than they save.
WORTHWHILE, WORKERS = 100, 4


class Source(NamedTuple):
    """Where the picture of a group of questions comes from."""

    group: int
    """Which group it is."""
    image: str | None = None
    """File, relative to the image folder; None and no data: there is no picture."""
    data: str | None = None
    """The picture itself in base64."""


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

    def pin_memory(self) -> "Picture":
        """Return the picture with its views in page-locked memory, as a DataLoader that pins asks for."""
        return self if self.views is None else replace(self, views=self.views.pin_memory())


def check_paths(questions: Iterable[Question], folder: Path) -> None:
    """Make sure that no question names a picture outside the image folder.

    Raises:
        InputError: one does, by an absolute path, by `..`, or through a link.
    """
    root = folder.resolve()
    named = {question.file: question for question in questions if question.file is not None}
    for image, question in named.items():
        if not _lies_within(root, image):
            raise InputError(
                f"question {question.id!r} names a picture outside the image folder: {question.image!r}; "
                "move it in, or pass --allow-outside if you trust the question file"
            )


def _lies_within(root: Path, image: str | None) -> bool:
    try:
        return (root / str(image)).resolve().is_relative_to(root)
    except (OSError, RuntimeError, ValueError):  # links in a circle, a NUL in the name: nothing that could be read
        return True


class Pictures(Dataset[Picture]):
    """Loads pictures by their source; one that cannot be read comes back as an error, nothing raises."""

    def __init__(self, folder: Path, processor: Any, config: Any) -> None:
        """Load pictures of a folder for a model; `config` is the model's."""
        self.folder, self.processor = folder, processor
        # Worker processes get a copy of this object: two values of the config, and no question.
        self.config = SimpleNamespace(
            image_aspect_ratio=config.image_aspect_ratio, image_grid_pinpoints=config.image_grid_pinpoints
        )

    def __getitem__(self, source: Source) -> Picture:
        """Load a picture."""
        group, name, data = source
        if name is None and data is None:
            return Picture(group)
        try:
            image = open_picture(self.folder / str(name)) if data is None else to_rgb(load_image_from_base64(data))
            return Picture(group, process_images([image], self.processor, self.config)[0], image.size)
        except Exception as error:  # decoders raise all kinds on damaged pictures, and one may be too odd to resize
            return Picture(group, error=f"{about(name)} {' '.join(str(error).split()) or type(error).__name__}")


def about(name: str | None) -> str:
    """Return how an error begins that is about a picture."""
    return " ".join(f"{name}:".split())


def open_picture(path: Path) -> Image.Image:
    """Read a picture of the image folder as RGB.

    Raises:
        InputError: it is no picture that can be read.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device never ends
        raise InputError(f"image file {str(path)!r} is no regular file")
    return load_image(path)


def readable(path: Path) -> bool:
    """Whether a picture is there and can be decoded, whatever becomes of it then."""
    try:
        open_picture(path)
    except Exception:  # as above
        return False
    return True


def check_folder(questions: Iterable[Question], folder: Path) -> None:
    """Make sure that the image folder is not a wrong one: that some of the first pictures are there.

    Raises:
        InputError: of the first 20 pictures that questions name, or of all if there are fewer, none is.
    """
    named = dict.fromkeys(question.file for question in questions if question.file is not None)
    first = list(islice(named, FIRST))
    if first and not any(_exists(folder / name) for name in first):
        said = f"the first {len(first)} pictures" if len(named) > len(first) else f"the {len(first)} pictures"
        raise InputError(
            f"none of {said} is in the image folder {str(folder)!r} ({first[0]!r} is the first); "
            "give the right --image-folder"
        )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def worker_count(wanted: int | None, pictures: int, processes: int = 1) -> int:
    """Return how many worker processes load pictures for a process of a run.

    Args:
        wanted: as asked for; None: some from `WORTHWHILE` pictures on.
        pictures: that the run loads.
        processes: of the run on this machine, which share its CPUs.
    """
    if wanted is None:
        wanted = WORKERS if pictures >= WORTHWHILE * processes else 0
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(wanted, max(1, cpus // processes))


def stream(pictures: Pictures, sources: Iterable[Source], workers: int) -> Iterator[Picture]:
    """Load pictures in order, `workers` processes ahead of the consumer (0: none); sources are drawn as needed.

    Where there is a GPU, views come in page-locked memory, which it copies from while the host goes on.

    Raises:
        InputError: a worker process was ended from outside.
    """
    ahead: dict[str, Any] = {}
    if workers:
        # Started afresh, as a forked copy of a process with threads and a GPU may hang.
        ahead = {"multiprocessing_context": "spawn", "worker_init_fn": end_with_parent}
        # Where we are killed, Python's tracker tidies up after us, and need not say so.
        sys.warnoptions += [] if UNSAID in sys.warnoptions else [UNSAID]
    sampler: Any = sources
    ahead["pin_memory"] = torch.cuda.is_available()
    loader = DataLoader(pictures, batch_size=None, sampler=sampler, num_workers=workers, **ahead)
    with deaf_children() if workers else nullcontext(), _ended_workers_said():
        iterator = iter(loader)
    while True:
        with _ended_workers_said():
            picture = next(iterator, None)
        if picture is None:
            return
        # What a worker made lies in shared memory, which containers have little of; pinning has copied it already.
        shared = picture.views is not None and picture.views.is_shared()
        yield replace(picture, views=picture.views.clone()) if shared else picture


@contextmanager
def _ended_workers_said() -> Iterator[None]:
    """Turn the end of a worker process into an error of the user's: its memory ran out, or somebody ended it."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        time.sleep(GRACE)  # whoever ended it may be ending us too, which is said then
        said = str(error).split(". It is possible")[0]
        raise InputError(f"{said}; where memory is short, start again with fewer --num-workers") from error
