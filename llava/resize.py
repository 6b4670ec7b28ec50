"""Resizing slender pictures as Pillow does, bit for bit, without the large pictures that would come in between.

Padded to a square, 60000x1 pixels would be 3.6 billion; resized until the shorter side has 336, twenty million across,
of which the middle is kept. Pillow resizes rows first and rounds to 8 bits, then columns: pieces can be had one by one.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

BICUBIC, BITS = Image.Resampling.BICUBIC, 22  # fixed-point weights, as in Pillow's Resample.c
BAND = 2**20  # pixels resized at a time
# From this side on, Pillow's time for rows that are all padding but an eighth is more than NumPy's for the picture.
LARGE, SLENDER = 8192, 8


def pad_and_resize(image: Image.Image, colour: tuple[int, ...], size: int, resample: int = BICUBIC) -> Image.Image:
    """Resize an RGB picture, made square with a colour and centred, to `size` x `size` pixels.

    Args:
        image: the picture.
        colour: red, green and blue of the padding.
        size: side of the result in pixels.
        resample: one of Pillow's filters.
    """
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    rows = np.asarray(Image.new("RGB", (side, 1), colour).resize((size, 1), resample))
    canvas = Image.fromarray(rows.repeat(side, 0))
    narrow = resample == BICUBIC and side > max(LARGE, SLENDER * image.width)
    axis = _Axis(side, size, 0, size) if narrow else None
    step = max(1, BAND // max(size, image.width if narrow else side))
    for row in range(0, image.height, step):
        band = image.crop((0, row, image.width, min(row + step, image.height)))
        if axis:
            band = Image.fromarray(axis.apply(np.asarray(band), left, colour))
        else:
            padded = Image.new("RGB", (side, band.height), colour)
            padded.paste(band, (left, 0))
            band = padded.resize((size, band.height), resample)
        canvas.paste(band, (0, top + row))
    return canvas.resize((size, size), resample)


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize an RGB picture, bicubically, until its shorter side is `size` pixels long, and keep the middle `size`."""
    shorter = min(image.size)
    lengths = [size if side == shorter else int(size * side / shorter) for side in image.size]
    if image.height - lengths[1] > 2 * (image.width - lengths[0]) > 0 and _columns_first():
        turned = resize_and_crop(image.transpose(Image.Transpose.TRANSPOSE), size)
        return turned.transpose(Image.Transpose.TRANSPOSE)
    across, down = (
        _Axis(side, length, (length - size) // 2, (length - size) // 2 + size)
        for side, length in zip(image.size, lengths, strict=True)
    )
    part = np.asarray(image.crop((across.begin, down.begin, across.end, down.end)))
    part = across.apply(part, across.begin).swapaxes(0, 1)
    return Image.fromarray(np.ascontiguousarray(down.apply(part, down.begin).swapaxes(0, 1)))


@cache
def _columns_first() -> bool:
    """Tell whether this version of Pillow begins with the columns of a picture that shrinks more in height; 13 does."""
    tall = Image.fromarray((np.arange(3 * 90 * 3) ** 2 % 251).astype(np.uint8).reshape(90, 3, 3))
    return tall.resize((2, 60), BICUBIC).tobytes() != tall.resize((2, 90), BICUBIC).resize((2, 60), BICUBIC).tobytes()


class _Axis:
    """A direction in which `length` pixels become `size`, of which those from `first` to `last` are wanted."""

    def __init__(self, length: int, size: int, first: int, last: int) -> None:
        """Compute the weights (Pillow's `precompute_coeffs` and `normalize_coeffs_8bpc`)."""
        scale = length / size
        spread = max(scale, 1.0)
        center = (np.arange(first, last) + 0.5) * scale
        low = np.maximum((center - 2 * spread + 0.5).astype(np.int64), 0)
        high = np.minimum((center + 2 * spread + 0.5).astype(np.int64), length)
        self.begin, self.end = int(low[0]), int(high[-1])  # of the pixels that matter
        self.pixel = low[:, None] + np.arange((high - low).max())  # [outputs, taps]
        x = np.abs((self.pixel - center[:, None] + 0.5) * (1 / spread))
        near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0)) * (self.pixel < high[:, None])
        weights = weights / weights.cumsum(1)[:, -1:] * 2**BITS  # summed in order, as Pillow does
        self.weights = np.trunc(weights + np.copysign(0.5, weights))  # whole numbers: sums are exact

    def apply(self, pixels: Pixels, place: int, colour: tuple[int, ...] = (0, 0, 0)) -> Pixels:
        """Resize the second axis of pixels, before and behind which all has a colour.

        Args:
            pixels: `[A, n, 3]`.
            place: where the first of them stands.
            colour: red, green and blue.

        Returns:
            `[A, last - first, 3]`.
        """
        row, tap = np.nonzero((self.pixel >= place) & (self.pixel < place + pixels.shape[1]))
        touched = slice(row.min(), row.max() + 1)
        dense = np.zeros((len(self.weights), pixels.shape[1]))
        dense[row, self.pixel[row, tap] - place] = self.weights[row, tap]
        total = np.outer(self.weights.sum(1) - dense.sum(1), colour)[None].repeat(len(pixels), 0)  # [A, outputs, 3]
        total[:, touched] += np.tensordot(pixels.astype(np.float64), dense[touched], (1, 1)).swapaxes(1, 2)
        levels: Pixels = np.floor((total + 2 ** (BITS - 1)) / 2**BITS).clip(0, 255).astype(np.uint8)
        return levels
