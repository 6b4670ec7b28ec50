"""All AnyRes geometry: which canvas an image gets, which patches of it show the image, and how crops tile it.

Sizes are `(width, height)` in pixels or patches; tensors are `[..., height, width]`.
"""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llava.constants import InputError

Size = tuple[int, int]


def parse_pinpoints(pinpoints: str | Sequence[Sequence[int]]) -> list[Size]:
    """Return the canvas sizes `[(W, H), …]` of a config entry, given as a list or as its string form.

    Raises:
        InputError: it is neither.
    """
    try:
        pairs = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        return [(int(width), int(height)) for width, height in pairs]
    except (SyntaxError, TypeError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        said = repr(pinpoints[:80] if isinstance(pinpoints, str) else pinpoints)[:80]
        raise InputError(f"image_grid_pinpoints must be a list of [width, height], got {said}") from error


def best_resolution(image_size: Size, resolutions: Sequence[Size]) -> Size:
    """Choose the canvas that keeps most pixels of the image, then wastes least; the first listed wins a tie.

    Args:
        image_size: `(width, height)` of the image in pixels.
        resolutions: canvases `(W, H)` in pixels, in the order of the checkpoint's `image_grid_pinpoints`.

    Raises:
        InputError: the image has no pixels.
    """
    width, height = image_size
    if width < 1 or height < 1:
        raise InputError(f"image of {width}x{height} pixels: both sides must be at least 1")

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas[0] * canvas[1]

    return max(resolutions, key=merit)


def choose_grid(image_size: Size, pinpoints: str | Sequence[Sequence[int]], tile: int, rule: str = "llava") -> Size:
    """Return the grid `(cols, rows)` of crops for an image.

    Args:
        image_size: `(width, height)` in pixels.
        pinpoints: the config's `image_grid_pinpoints`, `(W, H)` in pixels.
        tile: side of a view in pixels.
        rule: `"llava"` reads the pinpoints as `(W, H)`; `"hf"` as transformers does, `(H, W)`, which breaks the
            tie of images that fit into one view the other way.
    """
    canvases = parse_pinpoints(pinpoints)
    if rule == "hf":
        canvases = [(height, width) for width, height in canvases]
    width, height = best_resolution(image_size, canvases)
    return width // tile, height // tile


@dataclass(frozen=True, kw_only=True)
class AnyResGrid:
    """Geometry of one image after AnyRes preprocessing, in patches; view 0 is the thumbnail."""

    image_size: Size
    """`(width, height)` of the original image in pixels."""
    crops: Size | None = None
    """`(cols, rows)` of the crop grid; None: a single view, nothing to unpad."""
    side: int = 24
    """Patches along one side of a view."""
    rule: str = "llava"
    """How the unpadded box is rounded: `"llava"` truncates, `"hf"` rounds to 7 digits first."""

    @property
    def n_crops(self) -> int:
        """Number of crops; 0 for a single view."""
        return self.crops[0] * self.crops[1] if self.crops else 0

    @property
    def n_views(self) -> int:
        """Number of views, thumbnail included."""
        return 1 + self.n_crops

    @property
    def patches_per_view(self) -> int:
        """Patches of one view, padding included (N)."""
        return self.side**2

    @property
    def canvas(self) -> Size:
        """`(width, height)` of the stitched crops, in patches."""
        cols, rows = self.crops or (0, 0)
        return cols * self.side, rows * self.side

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        """The unpadded part of the canvas as `(left, top, right, bottom)`, in patches.

        The float expressions are those of the checkpoints' training code: the truncated noise is part of the format.
        """
        width, height = self.image_size
        across, down = self.canvas
        if not self.crops:
            return 0, 0, 0, 0
        if width / height > across / down:
            pad = (down - self._truncate(height * (across / width))) // 2
            return 0, pad, across, down - pad
        pad = (across - self._truncate(width * (down / height))) // 2
        return pad, 0, across - pad, down

    def _truncate(self, length: float) -> int:
        return int(round(length, 7)) if self.rule == "hf" else int(length)

    @property
    def unpadded(self) -> Size:
        """`(width, height)` of the unpadded box, in patches; a side may be 0 for extreme aspect ratios."""
        left, top, right, bottom = self.box
        return right - left, bottom - top

    @cached_property
    def crop_boxes(self) -> tuple[tuple[int, int, int, int], ...]:
        """The unpadded part of every crop as `(left, top, right, bottom)` on the canvas, row-major; may be empty."""
        left, top, right, bottom = self.box
        cols, rows = self.crops or (0, 0)
        side = self.side
        return tuple(
            (
                min(max(left, col * side), right),
                min(max(top, row * side), bottom),
                max(min(right, (col + 1) * side), left),
                max(min(bottom, (row + 1) * side), top),
            )
            for row in range(rows)
            for col in range(cols)
        )

    def crop_patches(self, unpad: bool = True) -> tuple[int, ...]:
        """Patches of every crop (n_j), row-major: those that show the image, or all where nothing is unpadded."""
        if not unpad:
            return (self.patches_per_view,) * self.n_crops
        return tuple(max(0, r - l) * max(0, b - t) for l, t, r, b in self.crop_boxes)

    def n_patches(self, unpad: bool = True) -> int:
        """Patches of the whole image, thumbnail included, newlines not."""
        return self.patches_per_view + sum(self.crop_patches(unpad))

    def valid(self, unpad: bool = True, device: torch.device | str | None = None) -> Tensor:
        """Tell which patches show the image and not padding: bool `[V, N]`, thumbnail first.

        It is made on the host, which is what None means, and reaches the device in one copy, without waiting.
        """
        left, top, right, bottom = self.box if unpad else (0, 0, *self.canvas)
        canvas = torch.zeros(self.canvas[::-1], dtype=torch.bool, device="cpu")
        canvas[top:bottom, left:right] = True
        valid = torch.cat((canvas.new_ones(1, self.patches_per_view), self.split(canvas)))
        return valid if device is None else valid.to(device, non_blocking=True)

    def tiles(self, canvas: Tensor) -> Tensor:
        """Look at a map on the canvas `[height, width]` as those of its crops: a view `[rows, cols, S, S]`."""
        cols, rows = self.crops or (0, 0)
        return canvas.reshape(rows, self.side, cols, self.side).transpose(1, 2)

    def split(self, canvas: Tensor) -> Tensor:
        """Cut a map on the canvas `[height, width]` into its crops: `[n, N]`, row-major."""
        return self.tiles(canvas).reshape(self.n_crops, self.patches_per_view)
