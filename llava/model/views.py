"""What callers pass as `images`, taken apart into views and their geometry."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from llava.anyres import AnyResGrid, choose_grid
from llava.compress.base import Layout
from llava.constants import InputError

# The sequence formats checkpoints are trained with, by `mm_patch_merge_type`.
LAYOUTS = {
    "spatial_unpad": Layout(),
    "spatial": Layout(unpad=False, newline="none"),
    "flat": Layout(unpad=False, newline="none", placement="flat"),
}


def view_images(
    images: Tensor | Sequence[Tensor], image_sizes: Sequence[Sequence[int]] | None, config: Any, tower: Any
) -> tuple[list[Tensor], list[AnyResGrid], Layout]:
    """Take what callers pass as `images` apart into views `[V, 3, S, S]`, their geometry and the sequence format.

    As in LLaVA, a 4-D tensor holds single views and bypasses all merging: no newline is added, whatever the model.

    Raises:
        InputError: sizes are missing or do not fit the images.
    """
    if isinstance(images, Tensor) and images.ndim not in (4, 5):
        raise InputError(f"images must be [B, 3, S, S], [B, V, 3, S, S] or a list, got shape {list(images.shape)}")
    whole = isinstance(images, Tensor) and images.ndim == 4
    layout = LAYOUTS["flat" if whole else config.mm_patch_merge_type]
    views = [image if image.ndim == 4 else image[None] for image in images]
    side, tile = tower.num_patches_per_side, tower.config.image_size
    if image_sizes is None:
        if any(len(image) > 1 for image in views):
            raise InputError("image_sizes must give the (width, height) of every image that has several views")
        image_sizes = [(tile, tile)] * len(views)
    if len(image_sizes) != len(views):
        raise InputError(f"{len(image_sizes)} image_sizes for {len(views)} images; give one (width, height) each")
    grids = []
    for image, size in zip(views, image_sizes, strict=True):
        width, height = (int(length) for length in size)
        crops = choose_grid((width, height), config.image_grid_pinpoints, tile) if len(image) > 1 else None
        grids.append(AnyResGrid(image_size=(width, height), crops=crops, side=side))
        if grids[-1].n_views != len(image):
            raise InputError(f"an image of {width}x{height} has {grids[-1].n_views} views, got {len(image)}")
    return views, grids, layout
