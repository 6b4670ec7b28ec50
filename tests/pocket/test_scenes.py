"""Scenes: seeded, drawn as their things say, on the lattice that AnyRes keeps; what a test scene shows is new."""

from functools import cache
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from llava.constants import InputError
from llava.mm_utils import process_images
from llava.pocket import scenes as drawing
from llava.pocket.scenes import (
    CANVASES,
    CELL,
    CHARACTERS,
    COLOURS,
    DARK,
    DIGITS,
    FONTS,
    KINDS,
    SHAPES,
    SIDE,
    SPLITS,
    TILE,
    WORDS,
    Scene,
    Thing,
    handwriting,
    make_scene,
)
from llava.pocket.train import Anyres, processor
from tests.pocket.tiny import box, drawn, undrawn

Plane = NDArray[np.float64]
SHIFTS = tuple(product((-1, 0, 1), repeat=2))
# Where scikit-learn's digits start over with 0123456789: one person filled in all of a stretch.
PEOPLE = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667, 1797)


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_arguments_give_the_same_pixels(split: str) -> None:
    first = [make_scene(split, index) for index in range(5)]
    np.random.seed(3)  # noqa: NPY002 - nobody may read it
    for one in reversed(first):
        other = make_scene(split, one.index)
        assert (one.split, one.index, one.grid, one.things) == (split, other.index, other.grid, other.things)
        assert np.array_equal(one.pixels, other.pixels)
        assert np.array_equal(np.asarray(one.image), one.pixels)


def test_another_index_or_split_gives_other_pixels() -> None:
    scenes = [make_scene(split, index, (2, 2)) for split in SPLITS for index in range(8)]
    assert len({scene.pixels.tobytes() for scene in scenes}) == len(scenes)
    assert len({scene.things for scene in scenes}) == len(scenes)


@pytest.mark.parametrize("grid", CANVASES)
def test_a_canvas_asked_for_is_filled(grid: tuple[int, int]) -> None:
    scene = make_scene("val", 3, grid)
    assert (scene.grid, scene.size) == (grid, (12 * grid[0], 12 * grid[1]))
    assert scene.pixels.shape == (96 * grid[1], 96 * grid[0], 3)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(InputError, match="unknown split 'testing'; choose from train, val, test"):
        make_scene("testing", 0)


def test_scenes_are_of_every_kind() -> None:
    scenes = undrawn("test", 400)
    things = [thing for scene in scenes for thing in scene.things]
    assert {scene.grid for scene in scenes} == set(CANVASES)
    assert {len(scene.things) for scene in scenes} == {1, 2, 3, 4, 5, 6}
    assert {(thing.kind, thing.big) for thing in things} == set(product(KINDS, (False, True)))
    assert {thing.colour for thing in things} == set(COLOURS)
    assert {thing.text for thing in things if thing.text.isalpha()} == set(WORDS)
    assert all(scene.pixels.dtype == np.uint8 for scene in drawn())


@pytest.mark.parametrize("split", SPLITS)
def test_things_keep_apart_and_within_a_view(split: str) -> None:
    for scene in undrawn(split, 500):
        assert 1 <= len(scene.things) <= 6
        assert len({thing.name for thing in scene.things}) == len(scene.things)
        for thing in scene.things:
            assert 0 <= thing.left < thing.left + thing.width <= scene.size[0]
            assert 0 <= thing.top < thing.top + thing.height <= scene.size[1]
            assert thing.left // SIDE == (thing.left + thing.width - 1) // SIDE
            assert thing.top // SIDE == (thing.top + thing.height - 1) // SIDE
        for one, other in combinations(scene.things, 2):
            apart_across = one.left >= other.left + other.width or other.left >= one.left + one.width
            assert apart_across or one.top >= other.top + other.height or other.top >= one.top + one.height
    for drawn_scene, bare in zip(drawn(split, 5), undrawn(split, 5), strict=True):
        assert drawn_scene.things == bare.things, "what these tests look at is what is drawn"


def test_plates_do_not_touch() -> None:
    for scene in undrawn("train", 500):
        owner = np.zeros((scene.size[1] * CELL, scene.size[0] * CELL), int)
        for thing in scene.things:
            assert not owner[box(thing, around=2)].any()
            owner[box(thing, around=2)] = 1


@pytest.mark.parametrize("split", SPLITS)
def test_what_things_say_and_how_large_they_are(split: str) -> None:
    for scene in undrawn(split, 300):
        assert sum(thing.kind == "note" for thing in scene.things) <= 1
        for thing in scene.things:
            room = (thing.width, thing.height)
            if thing.kind in SHAPES:
                assert (thing.text, room) == ("", (4, 4) if thing.big else (2, 2))
            elif thing.kind == "note":
                assert 10 <= int(thing.text) <= 99
                assert room == ((4, 2) if thing.big else (2, 1))
            else:
                assert thing.text in WORDS or 10 <= int(thing.text) <= 99
                letters = len(thing.text)
                assert room == ((2 * letters, 3) if thing.big else (letters, 2))


def covered(scene: Scene, thing: Thing) -> Plane:
    """How far every pixel of a shape's box is on the way from the ground around it to its colour."""
    around = scene.pixels[box(thing, around=4)].astype(float).reshape(-1, 3)
    inner = scene.pixels[box(thing, around=1)].astype(float).reshape(-1, 3)
    ground = (np.sort(around, 0).sum(0) - np.sort(inner, 0).sum(0)) / (len(around) - len(inner))
    way = np.array(COLOURS[thing.colour]) - ground
    found: Plane = (scene.pixels[box(thing)] - ground) @ way / (way @ way)
    return found


@cache
def outlines(side: int) -> tuple[list[str], Plane]:
    """The six shapes by their equations, in a box of `side` pixels, at several sizes and places: `[n, side²]`."""
    fine = (np.arange(4 * side) + 0.5) / 4
    kinds, planes = [], []
    for inset, (down, across) in product(np.arange(0, 0.121, 0.02), SHIFTS):
        half = side * (0.46 - inset)
        x, y = np.meshgrid((fine - side / 2 - across) / half, (fine - side / 2 - down) / half)
        radius, square = np.hypot(x, y), np.maximum(abs(x), abs(y))
        shapes = {
            "circle": radius < 1,
            "square": square < 1,
            "triangle": (abs(y) < 1) & (abs(x) < (y + 1) / 2),
            "cross": (square < 1) & (np.minimum(abs(x), abs(y)) < 1 / 3),
            "ring": (radius < 1) & (radius > 0.46),
            "diamond": abs(x) + abs(y) < 1,
        }
        for kind, shape in shapes.items():
            kinds.append(kind)
            planes.append(shape.reshape(side, 4, side, 4).mean((1, 3)).ravel())
    return kinds, np.array(planes)


def alike(one: Plane, many: Plane) -> Plane:
    """Correlation of `[n]` with the rows of `[m, n]`."""
    one, many = one - one.mean(), many - many.mean(1, keepdims=True)
    found: Plane = many @ one / (np.linalg.norm(many, axis=1) * np.linalg.norm(one))
    return found


def nearest_colour(pixels: Plane) -> str:
    return min(COLOURS, key=lambda name: float(np.linalg.norm(pixels - COLOURS[name])))


@pytest.mark.parametrize("split", SPLITS)
def test_a_shape_is_where_its_thing_says_in_shape_and_colour(split: str) -> None:
    """Told from the pixels by equations that the drawing does not know."""
    seen = 0
    for scene in drawn(split):
        for thing in (thing for thing in scene.things if thing.kind in SHAPES):
            cover = covered(scene, thing).ravel()
            kinds, planes = outlines(thing.width * CELL)
            likeness = alike(cover, planes)
            assert kinds[int(likeness.argmax())] == thing.kind, (scene.index, thing)
            assert likeness.max() > 0.9, (scene.index, thing)
            solid = scene.pixels[box(thing)].reshape(-1, 3)[planes[likeness.argmax()] == 1]
            assert nearest_colour(solid.mean(0)) == thing.colour, (scene.index, thing)
            seen += 1
    assert seen > 50


@cache
def print_of(across: int) -> tuple[list[tuple[str, str]], Plane]:
    """Every glyph of every font, at every place jitter puts it: (split, character), coverage `[n, pixels]`."""
    names, planes = [], []
    for split, character, shift in product(SPLITS, CHARACTERS, SHIFTS):
        for font in FONTS[split]:
            names.append((split, character))
            planes.append(np.roll(drawing._glyph(font, character, across), shift, (0, 1)).ravel())
    return names, np.array(planes, np.float64)


@cache
def hands(across: int) -> tuple[list[tuple[str, str]], Plane]:
    """Every handwritten digit: (split, digit), coverage `[n, pixels]`."""
    names, planes = [], []
    for split in SPLITS:
        for digit, drawings in handwriting(split).items():
            for one in drawings.astype(np.float32) / 16:
                names.append((split, digit))
                large = drawing.Image.fromarray(one).resize((16, 16), drawing.Image.Resampling.BICUBIC)
                planes.append((one if across == 1 else np.asarray(large).clip(0, 1)).ravel())
    return names, np.array(planes, np.float64)


def letters(scene: Scene, thing: Thing) -> list[Plane]:
    """Coverage of every letter's cells, from the pixels: 0 where they show the plate, 1 where the ink."""
    whole = scene.pixels[box(thing, around=1)].astype(float)
    inner = scene.pixels[box(thing)].astype(float)
    plate = (whole.sum((0, 1)) - inner.sum((0, 1))) / (whole[..., 0].size - inner[..., 0].size)
    way = np.array((245,) * 3 if thing.colour in DARK else (20,) * 3) - plate
    cover = (inner - plate) @ way / (way @ way)
    return [part.ravel() for part in np.split(cover, len(thing.text), axis=1)]


@pytest.mark.parametrize("split", SPLITS)
def test_writing_is_where_its_thing_says_in_the_splits_own_hand(split: str) -> None:
    """Every letter's cells are nearest to that letter, printed or written by someone of the scene's split."""
    seen = 0
    for scene in drawn(split):
        for thing in (thing for thing in scene.things if thing.text):
            across = thing.width // len(thing.text)
            names, planes = hands(across) if thing.kind == "note" else print_of(across)
            for character, cover in zip(thing.text, letters(scene, thing), strict=True):
                best = int(np.linalg.norm(planes - cover, axis=1).argmin())
                assert names[best] == (split, character), (scene.index, thing)
                seen += 1
            rim = scene.pixels[box(thing, around=1)].astype(float)
            rim[1:-1, 1:-1] = np.nan
            assert nearest_colour(np.nanmean(rim, (0, 1))) == thing.colour
    assert seen > 100


def test_anyres_cuts_a_scene_into_its_own_pixels() -> None:
    """The canvas is chosen by the picture's size, and nothing is resampled but the thumbnail."""
    tool = processor()
    mean, deviation = np.array(tool.image_mean), np.array(tool.image_std)
    for scene in drawn("val", 12):
        views = process_images([scene.image], tool, Anyres())[0]
        cols, rows = scene.grid
        assert views.shape == (1 + cols * rows, 3, TILE, TILE)
        shown = (views.permute(0, 2, 3, 1).double().numpy() * deviation + mean) * 255
        for number, crop in enumerate(shown[1:]):
            top, left = number // cols * TILE, number % cols * TILE
            wanted = scene.pixels[top : top + TILE, left : left + TILE]
            assert np.abs(crop - wanted).max() < 0.01
        coarse = scene.pixels.reshape(TILE, rows, TILE, cols, 3).mean((1, 3))
        assert np.abs(shown[0] - coarse).mean() < 12, "the thumbnail is the whole scene"


def empty_cells(scene: Scene) -> Plane:
    """Pixels of the cells no thing reaches: `[n, 64, 3]`."""
    taken = np.zeros(scene.pixels.shape[:2], bool)
    for thing in scene.things:
        taken[box(thing, around=2)] = True
    height, width = (side // CELL for side in taken.shape)

    def cells(plane: Plane) -> Plane:
        whole = plane.reshape(height, CELL, width, CELL, -1)
        return whole.swapaxes(1, 2).reshape(height * width, CELL * CELL, -1)

    return cells(scene.pixels.astype(float))[~cells(taken).any((1, 2))]


@pytest.mark.parametrize("split", SPLITS)
def test_the_ground_shows_nothing_to_find(split: str) -> None:
    """Muted, changing little from cell to cell and within one, where every thing is vivid, nearly white or black."""
    for scene in drawn(split):
        cells = empty_cells(scene)
        means = cells.mean(1)
        assert np.ptp(means, 0).max() < 100
        assert cells.std(1).max() < 35
        assert np.ptp(means, 1).max() < 75, "grey, nearly"
        assert means.min() > 30
        assert means.max() < 230
    for name, colour in COLOURS.items():
        assert np.ptp(colour) > 100 or name in ("white", "black")
        assert name not in ("white", "black") or min(colour) > 235 or max(colour) < 25


def test_the_ground_does_not_tell_how_much_there_is() -> None:
    numbers = [len(scene.things) for scene in (*drawn("train"), *drawn("test"))]
    for measure in (np.mean, np.std):
        values = [measure(empty_cells(scene)) for scene in (*drawn("train"), *drawn("test"))]
        assert abs(np.corrcoef(numbers, values)[0, 1]) < 0.25


@pytest.mark.parametrize(("one", "other"), [("train", "val"), ("train", "test"), ("val", "test")])
def test_no_font_and_no_glyph_is_on_two_sides(one: str, other: str) -> None:
    """Faces of different names may print alike: every glyph is compared, wherever jitter puts it, beyond the noise."""
    assert set(FONTS[one]).isdisjoint(FONTS[other])
    for across, character in product((1, 2), CHARACTERS):
        glyphs = [drawing._glyph(font, character, across) for font in FONTS[one]]
        known = np.array([np.roll(glyph, shift, (0, 1)) for glyph, shift in product(glyphs, SHIFTS)])
        for font in FONTS[other]:
            apart = np.abs(known - drawing._glyph(font, character, across)).max((1, 2))
            assert apart.min() > 0.05, (font, character, across)


def test_every_digit_is_on_one_side() -> None:
    sides = [{one.tobytes() for drawings in handwriting(split).values() for one in drawings} for split in SPLITS]
    assert sum(map(len, sides)) == len(set().union(*sides)) == sum(stop - start for start, stop in DIGITS.values())
    digits = load_digits()
    for split in SPLITS:
        start, stop = DIGITS[split]
        for digit, drawings in handwriting(split).items():
            assert np.array_equal(drawings, digits.images[start:stop][digits.target[start:stop] == int(digit)])


def test_the_digits_stretches_are_known() -> None:
    digits = "".join(map(str, load_digits().target))
    for start, stop in pairwise(PEOPLE):
        stretch = digits[start:stop].removeprefix("0")
        assert stretch.startswith("123456789")
        assert 0 < stretch.find("09556509898417735") < 32
        assert stretch.count("09556509898417735") == 1


def test_nobody_writes_on_two_sides() -> None:
    for start, stop in pairwise(PEOPLE):
        sides = [split for split, (first, last) in DIGITS.items() if first < stop and start < last]
        assert len(sides) <= 1, (start, stop, sides)


def test_no_scene_is_on_two_sides() -> None:
    sides = [{scene.pixels.tobytes() for scene in drawn(split)} for split in SPLITS]
    assert sum(map(len, sides)) == len(set().union(*sides)) == 3 * 60
    things = [{scene.things for scene in undrawn(split, 200) if len(scene.things) > 1} for split in SPLITS]
    assert sum(map(len, things)) == len(set().union(*things))
