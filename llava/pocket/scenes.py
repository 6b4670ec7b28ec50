"""Seeded synthetic pictures of high resolution, with all there is to know about them.

A scene fills a canvas of 96-pixel views exactly, so that its crops are its own pixels and its thumbnail is two or three
times coarser. Objects stand on a lattice of 8 pixels, the patch of the pocket checkpoint's vision tower, jittered by a
pixel: a small model can learn to see them in minutes. Small writing is legible in a crop and hardly in the thumbnail.

Training, validation and test scenes differ in their seeds, their fonts and the people whose digits they show.
"""

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from llava.constants import InputError

CELL = 8
"""Pixels of a lattice cell, the patch of the vision tower."""
SIDE = 12
"""Cells along a view."""
TILE = CELL * SIDE
CANVASES = ((2, 2), (2, 1), (1, 2), (3, 1), (1, 3))
"""(columns, rows) of views."""
SPLITS = ("train", "val", "test")

COLOURS = {
    "red": (214, 32, 36),
    "green": (22, 150, 58),
    "blue": (32, 74, 214),
    "yellow": (246, 218, 34),
    "orange": (247, 134, 18),
    "purple": (142, 44, 168),
    "white": (250, 250, 250),
    "black": (14, 14, 16),
}
DARK = {"red", "green", "blue", "purple", "black"}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
KINDS = (*SHAPES, "sign", "note")
"""Signs carry print, notes a handwritten number."""
WORDS = (
    *("ANT", "BAG", "BED", "BOX", "BUS", "CAP", "CAT", "COW", "CUP", "DOG", "EGG", "FAN", "FOX", "GYM", "HAT", "HEN"),
    *("ICE", "JAM", "KEY", "LEG", "MAP", "NUT", "OAK", "OWL", "PEN", "PIG", "RUG", "SKY", "SUN", "TAP", "VAN", "ZOO"),
)
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# Faces that print alike never stand on two sides.
FONTS = {
    "train": (
        *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold"),
        *("STIXGeneral", "STIXGeneralBol", "cmr10", "cmss10", "cmtt10"),
    ),
    "val": ("DejaVuSerif-Italic", "STIXGeneralItalic"),
    "test": ("DejaVuSansMono-Bold", "cmb10", "Pillow"),
}
# Ranges of scikit-learn's 1 797 digits, in the order in which they were collected: person after person, by the digits
# each was asked to write. Nobody writes on two sides; what lies between, somebody of training's has written.
DIGITS = {"train": (0, 1300), "val": (1415, 1545), "test": (1545, 1797)}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """An object of a scene; positions and sizes in cells."""

    kind: str
    colour: str
    text: str = ""
    """What is written on it."""
    left: int
    top: int
    width: int
    height: int
    big: bool
    """Whether it can be told in the thumbnail, too."""

    @property
    def name(self) -> str:
        """Colour and kind."""
        return f"{self.colour} {self.kind}"

    @property
    def centre(self) -> tuple[float, float]:
        """Its middle (x, y) in cells."""
        return self.left + self.width / 2, self.top + self.height / 2


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture and what is in it."""

    split: str
    index: int
    grid: tuple[int, int]
    """Columns and rows of views."""
    things: tuple[Thing, ...]
    pixels: NDArray[np.uint8]
    """`[H, W, 3]`."""

    @property
    def image(self) -> Image.Image:
        """The picture."""
        return Image.fromarray(self.pixels)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in cells."""
        return self.grid[0] * SIDE, self.grid[1] * SIDE


def home(scene: Scene, thing: Thing) -> int:
    """Return the number of the view (thumbnail 0) whose crop a thing is in."""
    return 1 + thing.top // SIDE * scene.grid[0] + thing.left // SIDE


def make_scene(split: str, index: int, grid: tuple[int, int] | None = None) -> Scene:
    """Draw a scene; the same arguments give the same pixels.

    Args:
        split: `train`, `val` or `test`.
        index: number of the scene within the split.
        grid: (columns, rows) of views; None: drawn from `CANVASES`.

    Raises:
        InputError: there is no such split, or matplotlib or scikit-learn is missing.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    rng = np.random.default_rng([SPLITS.index(split), index])
    drawn = CANVASES[rng.integers(len(CANVASES))]
    grid = grid or drawn
    things = _place(rng, grid, split)
    pixels = _background(rng, grid)
    for thing in things:
        _draw(rng, pixels, thing, split)
    noisy = pixels + rng.normal(0, 4, pixels.shape).astype(np.float32)
    return Scene(split=split, index=index, grid=grid, things=things, pixels=noisy.clip(0, 255).round().astype(np.uint8))


def _place(rng: np.random.Generator, grid: tuple[int, int], split: str) -> tuple[Thing, ...]:
    """Put one to six objects around one or two spots of the canvas; no two overlap, none crosses a view's border."""
    cols, rows = grid
    taken = np.zeros((rows * SIDE, cols * SIDE), dtype=bool)
    spots = rng.uniform(0, 1, (rng.integers(1, 3), 2)) * (rows * SIDE, cols * SIDE)
    things: list[Thing] = []
    for _ in range(rng.integers(1, 7)):
        thing = _invent(rng, things)
        height, width = thing.height, thing.width
        for _ in range(30):
            near = rng.normal(spots[rng.integers(len(spots))], 0.45 * SIDE)
            top, left = (int(v) for v in np.clip(near, 0, (rows * SIDE - height, cols * SIDE - width)))
            inside = top // SIDE == (top + height - 1) // SIDE and left // SIDE == (left + width - 1) // SIDE
            around = taken[max(0, top - 1) : top + height + 1, max(0, left - 1) : left + width + 1]
            if inside and not around.any():
                taken[top : top + height, left : left + width] = True
                things.append(replace(thing, left=left, top=top))
                break
    return tuple(things)


def _invent(rng: np.random.Generator, others: list[Thing]) -> Thing:
    """Choose what an object is; no two of a scene share kind and colour, and one note is enough."""
    while True:
        kinds = [*SHAPES, "sign", "sign", "sign", *(["note"] * (2 * all(o.kind != "note" for o in others)))]
        kind = kinds[rng.integers(len(kinds))]
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        if all((o.kind, o.colour) != (kind, colour) for o in others):
            break
    big = bool(rng.random() < 0.3)
    text = ""
    if kind == "note" or (kind == "sign" and rng.random() < 0.5):
        text = f"{rng.integers(10, 100)}"
    elif kind == "sign":
        text = WORDS[rng.integers(len(WORDS))]
    across, down = letter_cells(kind, big)
    width, height = (len(text) * across, down) if text else ((4, 4) if big else (2, 2))
    return Thing(kind=kind, colour=colour, text=text, left=0, top=0, width=width, height=height, big=big)


def letter_cells(kind: str, big: bool) -> tuple[int, int]:
    """Return the cells a letter takes, across and down: handwriting is square, print is tall."""
    if kind == "note":
        return (2, 2) if big else (1, 1)
    return (2, 3) if big else (1, 2)


def _background(rng: np.random.Generator, grid: tuple[int, int]) -> NDArray[np.float32]:
    """Draw a muted ground `[H, W, 3]`: gradients, waves or blotches in which nothing needs to be found."""
    height, width = grid[1] * TILE, grid[0] * TILE
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    base = rng.uniform(95, 170) + rng.uniform(-18, 18, 3)
    ground = np.broadcast_to(base.astype(np.float32), (height, width, 3)).copy()
    tint = rng.uniform(-1, 1, 3).astype(np.float32)
    for _ in range(rng.integers(1, 3)):
        angle, kind = rng.uniform(0, 2 * np.pi), rng.integers(4)
        along = x * np.cos(angle) + y * np.sin(angle)
        if kind == 0:
            field = along / max(height, width)
        elif kind == 1:
            field = np.sin(along * 2 * np.pi / rng.uniform(6, 40) + rng.uniform(0, 6))
        elif kind == 2:
            coarse = rng.normal(0, 1, (height // 16 + 2, width // 16 + 2)).astype(np.float32)
            field = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        else:
            field = np.sign(np.sin(x * np.pi / rng.uniform(8, 30)) * np.sin(y * np.pi / rng.uniform(8, 30)))
        strength = rng.uniform(4, 18)
        ground += (strength * field)[..., None] * (0.6 + 0.4 * tint)
    return ground


def _draw(rng: np.random.Generator, pixels: NDArray[np.float32], thing: Thing, split: str) -> None:
    """Paint an object."""
    colour = np.array(COLOURS[thing.colour], np.float32) + rng.uniform(-12, 12, 3).astype(np.float32)
    top, left = thing.top * CELL, thing.left * CELL
    height, width = thing.height * CELL, thing.width * CELL
    if not thing.text:
        room = pixels[top : top + height, left : left + width]
        mask = _shape(thing.kind, height, round(float(rng.uniform(0, 0.12)), 2))
        mask = np.roll(mask, tuple(rng.integers(-1, 2, 2)), (0, 1))[..., None]
        room += mask * (colour - room)
        return
    # A plate reaches a pixel or two beyond its letters.
    rim = 1 + int(rng.integers(2))
    plate = pixels[max(0, top - rim) : top + height + rim, max(0, left - rim) : left + width + rim]
    plate[:] = colour
    ink = np.array((245, 245, 245) if thing.colour in DARK else (20, 20, 20), np.float32)
    across, down = letter_cells(thing.kind, thing.big)
    fonts = FONTS[split]
    font = fonts[rng.integers(len(fonts))]
    for place, character in enumerate(thing.text):
        mask = _handwritten(rng, character, split, across) if thing.kind == "note" else _glyph(font, character, across)
        mask = np.roll(mask, tuple(rng.integers(-1, 2, 2)), (0, 1)) if thing.kind == "sign" else mask
        start = left + place * across * CELL
        room = pixels[top : top + down * CELL, start : start + across * CELL]
        room += mask[..., None] * (ink - room)


@lru_cache(maxsize=512)
def _shape(kind: str, side: int, inset: float) -> NDArray[np.float32]:
    """Return a shape's coverage `[side, side]` in [0, 1]."""
    fine = 4 * side
    low, high, middle = fine * (0.04 + inset), fine * (0.96 - inset), fine / 2
    image = Image.new("L", (fine, fine))
    draw = ImageDraw.Draw(image)
    if kind in ("circle", "ring"):
        draw.ellipse((low, low, high, high), fill=255)
    if kind == "ring":
        hole = (high - low) * 0.27
        draw.ellipse((low + hole, low + hole, high - hole, high - hole), fill=0)
    elif kind == "square":
        draw.rectangle((low, low, high, high), fill=255)
    elif kind == "triangle":
        draw.polygon([(middle, low), (high, high), (low, high)], fill=255)
    elif kind == "diamond":
        draw.polygon([(middle, low), (high, middle), (middle, high), (low, middle)], fill=255)
    elif kind == "cross":
        third = (high - low) / 3
        draw.rectangle((low + third, low, high - third, high), fill=255)
        draw.rectangle((low, low + third, high, high - third), fill=255)
    return np.asarray(image.reduce(4), np.float32) / np.float32(255)


@lru_cache(maxsize=2048)
def _glyph(font: str, character: str, across: int) -> NDArray[np.float32]:
    """Return a printed character's coverage: 8 x 16 pixels, or 16 x 24."""
    width, height, points = (CELL, 2 * CELL, 13) if across == 1 else (2 * CELL, 3 * CELL, 24)
    image = Image.new("L", (width, height))
    face = _face(font, points)
    left, top, right, bottom = face.getbbox(character)
    # Wide letters are squeezed into their cell.
    drawn = Image.new("L", (max(1, round(right - left)), max(1, round(bottom - top))))
    ImageDraw.Draw(drawn).text((-left, -top), character, fill=255, font=face)
    drawn = drawn.resize((min(drawn.width, width), min(drawn.height, height)), Image.Resampling.LANCZOS)
    image.paste(drawn, ((width - drawn.width) // 2, (height - drawn.height) // 2))
    return np.asarray(image, np.float32) / np.float32(255)


@cache
def _face(font: str, points: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if font == "Pillow":
        return ImageFont.load_default(points)
    package = find_spec("matplotlib")
    if package is None or package.origin is None:
        raise InputError("the pocket scenes need matplotlib's fonts; run pip install -e '.[pocket]'")
    return ImageFont.truetype(Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / f"{font}.ttf", points)


@cache
def handwriting(split: str) -> dict[str, NDArray[np.uint8]]:
    """Return the handwritten digits of a split, `[n, 8, 8]` of 0 to 16 by digit.

    Raises:
        InputError: scikit-learn is missing.
    """
    if find_spec("sklearn") is None:
        raise InputError("the pocket scenes need scikit-learn's digits; run pip install -e '.[pocket]'")
    from sklearn.datasets import load_digits

    digits = load_digits()
    start, stop = DIGITS[split]
    images, labels = digits.images[start:stop].astype(np.uint8), digits.target[start:stop]
    return {str(number): images[labels == number] for number in range(10)}


def _handwritten(rng: np.random.Generator, digit: str, split: str, across: int) -> NDArray[np.float32]:
    """Return somebody's digit as coverage: 8 x 8 pixels, or 16 x 16."""
    drawn = handwriting(split)[digit]
    one: NDArray[np.float32] = drawn[rng.integers(len(drawn))].astype(np.float32) / 16
    if across == 1:
        return one
    large = Image.fromarray(one).resize((16, 16), Image.Resampling.BICUBIC)
    coverage: NDArray[np.float32] = np.asarray(large).clip(0, 1)
    return coverage
