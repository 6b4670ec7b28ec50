"""Slender pictures are resized in pieces exactly as Pillow and CLIP's processor resize the whole."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil

from llava import resize
from llava.constants import InputError
from llava.mm_utils import SLENDER, expand2square, process_images
from llava.resize import pad_and_resize, resize_and_crop
from tests.conftest import picture

FILTERS = [Image.Resampling(number) for number in range(6)]
MEAN = (122, 116, 104)
sides = st.tuples(st.integers(1, 250), st.integers(1, 250))
slender = st.tuples(st.integers(1, 5), st.integers(1, 1500)).flatmap(lambda pair: st.permutations(pair).map(tuple))


def processor(tile: int, **options: Any) -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": tile}, crop_size={"height": tile, "width": tile}, **options)


def theirs(image: Image.Image, tile: int) -> torch.Tensor:
    return processor(tile).preprocess(image, return_tensors="pt")["pixel_values"]


def by_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let NumPy resize even what Pillow would be faster for."""
    monkeypatch.setattr(resize, "LARGE", 0)
    monkeypatch.setattr(resize, "SLENDER", 0)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    size=sides | slender,
    seed=st.integers(0, 2**32),
    tile=st.sampled_from([1, 14, 28, 57]),
    colour=st.tuples(*[st.integers(0, 255)] * 3),
    band=st.sampled_from([1, 3000, resize.BAND]),
)
def test_padding_equals_the_padded_square(size, seed, tile, colour, band):
    image = picture(*size, seed=seed)
    square = expand2square(image, colour)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resize, "BAND", band)
        for resample in FILTERS:
            expected = square.resize((tile, tile), resample).tobytes()
            assert pad_and_resize(image, colour, tile, resample).tobytes() == expected
        by_numpy(patch)
        assert pad_and_resize(image, colour, tile).tobytes() == square.resize((tile, tile)).tobytes()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(size=sides | slender, seed=st.integers(0, 2**32), tile=st.sampled_from([1, 14, 28, 57]))
def test_the_middle_is_that_of_the_whole(size, seed, tile):
    image = picture(*size, seed=seed)
    shorter = min(size)
    whole = image.resize([tile if side == shorter else int(tile * side / shorter) for side in size])
    left, top = (whole.width - tile) // 2, (whole.height - tile) // 2
    expected = whole.crop((left, top, left + tile, top + tile))
    assert resize_and_crop(image, tile).tobytes() == expected.tobytes()


@pytest.mark.parametrize("mode", ["pad", None])
@pytest.mark.parametrize("size", [(900, 3), (3, 900), (1, 700), (700, 1), (640, 37), (37, 640), (2000, 60), (60, 2000)])
def test_slender_pictures_equal_transformers(size, mode):
    image = picture(*size)
    assert max(size) > SLENDER * min(size)
    found = process_images([image], processor(28), SimpleNamespace(image_aspect_ratio=mode))
    assert torch.equal(found, theirs(expand2square(image, MEAN) if mode == "pad" else image, 28))


def test_a_batch_of_both_kinds_stays_in_order():
    images = [picture(640, 3), picture(40, 30), picture(3, 640)]
    found = process_images(images, processor(28), SimpleNamespace())
    assert torch.equal(found, torch.cat([theirs(image, 28) for image in images]))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(9000, 40), (40, 9000), (9001, 1400), (1, 8200), (5000, 8500)])
def test_large_pictures_equal_transformers(size):
    # The square is as large as can be made here without gigabytes.
    image = picture(*size)
    found = process_images([image], processor(336), SimpleNamespace(image_aspect_ratio="pad"))
    assert torch.equal(found, theirs(expand2square(image, MEAN), 336))
    if max(size) < 300 * min(size):
        assert torch.equal(process_images([image], processor(336), SimpleNamespace()), theirs(image, 336))


def test_no_square_is_made(monkeypatch):
    seen, create, whole = [], Image.new, Image.Image.resize

    def new(mode: str, size: tuple[int, int], *rest: Any) -> Image.Image:
        seen.append(size[0] * size[1])
        return create(mode, size, *rest)

    def shrink(self: Image.Image, *rest: Any) -> Image.Image:
        seen.append(self.width * self.height)
        return whole(self, *rest)

    images = [create("RGB", size) for size in [(60000, 1), (1, 60000), (1500, 4000), (4000, 1500)]]
    monkeypatch.setattr(Image, "new", new)
    monkeypatch.setattr(Image.Image, "resize", shrink)
    for image in images:
        pad_and_resize(image, MEAN, 28)
    assert 0 < max(seen) < 28 * 60000 + 1


def test_a_colour_between_levels_is_rounded_as_pillow_does():
    # Of a picture so slender that hardly anything of it is left: the weights of the colour do not sum up to one.
    for size in ((1500, 1), (1, 1500)):
        image = Image.new("RGB", size, (255, 0, 1))
        assert pad_and_resize(image, MEAN, 57).tobytes() == expand2square(image, MEAN).resize((57, 57)).tobytes()


ODD = [{"resample": Image.Resampling.LANCZOS}, {"do_center_crop": False}, {"crop_size": {"height": 20, "width": 20}}]


@pytest.mark.parametrize("options", ODD, ids=str)
def test_a_processor_with_other_settings_is_not_given_what_it_would_blow_up(options):
    odd = CLIPImageProcessorPil(**{"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}} | options)
    with pytest.raises(InputError, match="900x3 pixels is too slender"):
        process_images([picture(900, 3)], odd, SimpleNamespace())
    assert process_images([picture(40, 40)], odd, SimpleNamespace()).shape[:2] == (1, 3)


def test_a_square_that_would_be_enormous_is_refused():
    with pytest.raises(InputError, match="60000x1 pixels is too slender"):
        expand2square(Image.new("RGB", (60000, 1)), MEAN)


def test_both_orders_of_pillows_passes_are_known(monkeypatch):
    # Versions differ in which comes first; each is right for its own Pillow, and they do differ.
    image, answers = picture(60, 2000), set()
    for first in (True, False):
        monkeypatch.setattr(resize, "_columns_first", lambda first=first: first)
        answers.add(resize_and_crop(image, 28).tobytes())
    assert len(answers) == 2
    assert np.ptp([len(answer) for answer in answers]) == 0
