"""Pictures to tensors against plain PIL and float32 NumPy, exactly; bad files; small helpers with upstream's names.

`tokenizer_image_token` has tests of its own in test_tokenizer.py.
"""

import base64
import io
import os
import struct
import zlib
from collections.abc import Callable
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features
from transformers import CLIPImageProcessorPil, LlavaNextImageProcessorPil, StoppingCriteriaList
from transformers.image_processing_utils import get_patch_output_size
from transformers.image_utils import ChannelDimension

from llava.anyres import AnyResGrid, choose_grid
from llava.constants import InputError
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    divide_to_patches,
    expand2square,
    get_anyres_image_grid_shape,
    get_model_name_from_path,
    load_image,
    load_image_from_base64,
    process_anyres_image,
    process_images,
    resize_and_pad_image,
    select_best_resolution,
    to_rgb,
)
from tests.conftest import picture

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
TILE = 28  # most tests: a twelfth of CLIP's 336, and every size with it
TINY_PINPOINTS = [[width // 12, height // 12] for width, height in PINPOINTS]
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def clip_processor(tile: int) -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": tile}, crop_size={"height": tile, "width": tile})


def config(mode: str | None, tile: int = TILE) -> SimpleNamespace:
    return SimpleNamespace(image_aspect_ratio=mode, image_grid_pinpoints=TINY_PINPOINTS if tile == TILE else PINPOINTS)


# --- the reference: PIL's bicubic filter and float32 NumPy -----------------------------------------------------------


def normalised(image: Image.Image) -> torch.Tensor:
    scaled = (np.asarray(image, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return torch.from_numpy(((scaled - MEAN) / STD).transpose(2, 0, 1))


def tiles_of(image: Image.Image, canvas: tuple[int, int], tile: int) -> list[Image.Image]:
    """The crops of the picture fitted into a canvas, row-major; what lies outside it is black too."""
    (width, height), (across, down) = image.size, canvas
    scale = min(across / width, down / height)
    fitted = (min(ceil(width * scale), across), min(ceil(height * scale), down))
    left, top = (across - fitted[0]) // 2, (down - fitted[1]) // 2
    pixels = np.zeros((ceil(down / tile) * tile, ceil(across / tile) * tile, 3), dtype=np.uint8)
    pixels[top : top + fitted[1], left : left + fitted[0]] = np.asarray(image.resize(fitted, Image.Resampling.BICUBIC))
    corners = [(y, x) for y in range(0, down, tile) for x in range(0, across, tile)]
    return [Image.fromarray(pixels[y : y + tile, x : x + tile]) for y, x in corners]


def reference_anyres(image: Image.Image, canvas: tuple[int, int], tile: int) -> torch.Tensor:
    thumbnail = image.resize((tile, tile), Image.Resampling.BICUBIC)
    return torch.stack([normalised(view) for view in [thumbnail, *tiles_of(image, canvas, tile)]])


def squared(image: Image.Image, colour: tuple[int, ...] = (122, 116, 104)) -> Image.Image:
    side = max(image.size)
    pixels = np.full((side, side, 3), colour, dtype=np.uint8)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    pixels[top : top + image.height, left : left + image.width] = np.asarray(image)
    return Image.fromarray(pixels)


def reference_pad(image: Image.Image, tile: int) -> torch.Tensor:
    return normalised(squared(image).resize((tile, tile), Image.Resampling.BICUBIC))


def reference_plain(image: Image.Image, tile: int) -> torch.Tensor:
    width, height = image.size
    fitted = (tile, int(tile * height / width)) if width <= height else (int(tile * width / height), tile)
    left, top = (fitted[0] - tile) // 2, (fitted[1] - tile) // 2
    resized = image.resize(fitted, Image.Resampling.BICUBIC)
    return normalised(resized.crop((left, top, left + tile, top + tile)))


CANVASES = [
    ((28, 28), (28, 56)),
    ((53, 40), (56, 56)),
    ((40, 53), (56, 56)),
    ((160, 90), (56, 56)),
    ((83, 25), (84, 28)),
    ((25, 83), (28, 84)),
    ((70, 20), (84, 28)),
    ((56, 56), (56, 56)),
    ((3, 3), (28, 56)),
    ((1, 1), (28, 56)),
    ((833, 10), (84, 28)),
    ((10, 833), (28, 84)),
    ((833, 3), (28, 56)),  # nothing would be left of it on any canvas: the smallest wastes least
]


@pytest.mark.parametrize(("size", "canvas"), CANVASES)
def test_anyres_views_equal_plain_pil(size, canvas):
    image = picture(*size)
    views = process_images([image], clip_processor(TILE), config("anyres"))
    assert views.shape == (1, 1 + canvas[0] * canvas[1] // TILE**2, 3, TILE, TILE)
    assert views.dtype == torch.float32
    assert torch.equal(views[0], reference_anyres(image, canvas, TILE))
    assert torch.equal(process_anyres_image(image, clip_processor(TILE), TINY_PINPOINTS), views[0])


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (28, 28), (1, 1), (3, 3), (5, 3), (3, 5), (1, 7), (101, 64)])
@pytest.mark.parametrize("mode", ["pad", None, "square"])
def test_other_modes_equal_plain_pil(mode, size):
    # Heights of 1 and 3 also look like a leading channel axis to array code that has to guess.
    image = picture(*size)
    pixels = process_images([image], clip_processor(TILE), config(mode))
    reference = reference_pad if mode == "pad" else reference_plain
    assert torch.equal(pixels, reference(image, TILE)[None])


@pytest.mark.parametrize(
    ("size", "canvas"), [((640, 427), (672, 672)), ((1000, 300), (1008, 336)), ((40, 47), (336, 672))]
)
def test_anyres_at_clips_own_size(size, canvas):
    image = picture(*size)
    views = process_images([image], clip_processor(336), config("anyres", 336))
    assert torch.equal(views[0], reference_anyres(image, canvas, 336))


def test_padding_colour_is_the_mean_truncated():
    pixels = process_images([Image.new("RGB", (40, 10))], clip_processor(TILE), config("pad"))
    corner = pixels[0, :, 0, 0].numpy() * STD + MEAN
    assert np.rint(corner * 255).tolist() == [122, 116, 104]


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (700, 200), (200, 700), (672, 672), (337, 336), (704, 396)])
def test_anyres_pixels_equal_transformers(size):
    # Images of up to 336x336 are left out: transformers breaks that tie the other way (see test_anyres.py).
    image = picture(*size)
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, image_grid_pinpoints=PINPOINTS
    )(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(process_images([image], clip_processor(336), config("anyres", 336))[0], theirs)


def test_images_of_one_grid_are_stacked_and_others_listed():
    wide, square, tall = picture(80, 24), picture(50, 50), picture(24, 80)
    stacked = process_images([wide, tall], clip_processor(TILE), config("anyres"))
    assert stacked.shape == (2, 4, 3, TILE, TILE)
    listed = process_images([wide, square], clip_processor(TILE), config("anyres"))
    assert isinstance(listed, list)
    assert [len(views) for views in listed] == [4, 5]
    for views, image in zip(listed, (wide, square), strict=True):
        assert torch.equal(views, process_images([image], clip_processor(TILE), config("anyres"))[0])


@pytest.mark.parametrize("mode", ["pad", None])
def test_images_of_other_modes_are_always_stacked(mode):
    images = [picture(80, 24), picture(50, 50), picture(24, 80)]
    pixels = process_images(images, clip_processor(TILE), config(mode))
    assert pixels.shape == (3, 3, TILE, TILE)
    for row, image in zip(pixels, images, strict=True):
        assert torch.equal(row, process_images([image], clip_processor(TILE), config(mode))[0])


def test_a_config_may_be_a_bare_namespace():
    # VLMEvalKit's call: nothing but the mode.
    pixels = process_images([picture(9, 7)], clip_processor(TILE), SimpleNamespace(image_aspect_ratio="pad"))
    assert pixels.shape == (1, 3, TILE, TILE)
    assert process_images([picture(9, 7)], clip_processor(TILE), SimpleNamespace()).shape == (1, 3, TILE, TILE)


def test_pinpoints_may_be_a_string():
    image, as_text = picture(53, 40), SimpleNamespace(image_aspect_ratio="anyres")
    as_text.image_grid_pinpoints = str(TINY_PINPOINTS)
    processor = clip_processor(TILE)
    assert torch.equal(
        process_images([image], processor, as_text), process_images([image], processor, config("anyres"))
    )


@pytest.mark.parametrize("mode", ["P", "RGB"])
def test_images_are_not_changed(mode):
    image = picture(53, 40).convert(mode)
    image.info["transparency"] = (1, 2, 3) if mode == "RGB" else 3
    before, info = image.tobytes(), dict(image.info)
    for aspect in ("anyres", "pad", None):
        process_images([image], clip_processor(TILE), config(aspect)).zero_()
    assert (image.mode, image.size, image.tobytes(), image.info) == (mode, (53, 40), before, info)


@pytest.mark.parametrize("size", [(1, 1), (10000, 37), (37, 10000)])
def test_extreme_sizes_of_anyres(size):
    image = picture(*size)
    views = process_images([image], clip_processor(336), config("anyres", 336))[0]
    grid = AnyResGrid(image_size=size, crops=choose_grid(size, PINPOINTS, 336))
    assert views.shape == (grid.n_views, 3, 336, 336)
    assert views.isfinite().all()
    assert torch.equal(views[0], normalised(image.resize((336, 336), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("size", [(1, 1), (10000, 37), (37, 10000)])
def test_extreme_sizes_resized_and_cropped(size):
    image = Image.new("RGB", size, (250, 0, 0))
    pixels = process_images([image], clip_processor(TILE), config(None))
    assert torch.equal(pixels[0], normalised(Image.new("RGB", (TILE, TILE), (250, 0, 0))))


@pytest.mark.parametrize(
    "size", [(1, 1), (37, 10000)]
)  # the other way round costs another 400 MB and shows nothing new
def test_extreme_sizes_padded(size):
    pixels = process_images([Image.new("RGB", size, (250, 0, 0))], clip_processor(TILE), config("pad"))
    assert pixels.shape == (1, 3, TILE, TILE)
    assert pixels.isfinite().all()


def test_a_picture_without_pixels_is_the_users_error():
    with pytest.raises(InputError, match="0x5"):
        process_images([Image.new("RGB", (0, 5))], clip_processor(TILE), config("anyres"))


# --- CLIP's processor, view by view ----------------------------------------------------------------------------------


def view_by_view(views: list[Image.Image], processor: Any) -> torch.Tensor:
    """What the processor makes of pictures, each sent alone."""
    return torch.cat([processor.preprocess(view, return_tensors="pt")["pixel_values"] for view in views])


def expected_views(image: Image.Image, processor: Any, mode: str, pinpoints: list[list[int]]) -> torch.Tensor:
    """What `process_images` should give for one picture, every view sent alone: `[V, 3, S, S]`."""
    if mode == "pad":
        return view_by_view([squared(image, tuple(int(255 * mean) for mean in processor.image_mean))], processor)
    tile, shortest = processor.crop_size["height"], processor.size["shortest_edge"]
    canvas = select_best_resolution(image.size, [(width, height) for width, height in pinpoints])
    thumbnail = image.resize((shortest, shortest), Image.Resampling.BICUBIC)
    return view_by_view([thumbnail, *tiles_of(image, canvas, tile)], processor)


def assert_as_view_by_view(image: Image.Image, processor: Any, pinpoints: list[list[int]] = TINY_PINPOINTS) -> None:
    for mode in ("anyres", "pad"):
        shape = SimpleNamespace(image_aspect_ratio=mode, image_grid_pinpoints=pinpoints)
        (found,), wanted = process_images([image], processor, shape), expected_views(image, processor, mode, pinpoints)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted if mode == "anyres" else wanted[0])


def all_levels(tile: int) -> Image.Image:
    """A picture of two tiles with every level in every channel, in another order each."""
    levels = np.arange(2 * tile**2).reshape(tile, 2 * tile, 1) * [1, 3, 7] % 256
    assert all(len(np.unique(levels[:, half, c])) == 256 for c in range(3) for half in (slice(tile), slice(tile, None)))
    return Image.fromarray(levels.astype(np.uint8))


sides = st.integers(1, 120)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    size=st.tuples(sides, sides) | st.tuples(st.integers(1, 4), st.integers(1, 900)),
    seed=st.integers(0, 2**32),
    tile=st.sampled_from([1, 2, 14, 28]),
)
def test_any_picture_is_as_view_by_view(size, seed, tile):
    pinpoints = [[tile * width // 336, tile * height // 336] for width, height in PINPOINTS]
    assert_as_view_by_view(picture(*size, seed=seed), clip_processor(tile), pinpoints)


SETTINGS = [
    {},
    {"image_mean": [0.5, 0.25, 0.1], "image_std": [0.1, 0.7, 1.3]},
    {"image_std": 0.3},
    {"do_normalize": False},
    {"do_rescale": False},
    {"do_rescale": False, "do_normalize": False},  # bytes then
    {"rescale_factor": 1 / 127.5},
    {"rescale_factor": 3.7, "do_normalize": False},
    {"rescale_factor": 1 / 7, "image_mean": [1 / 3, 1 / 7, 1 / 11]},
    {"do_convert_rgb": False},
    {"do_center_crop": False},
    {"resample": Image.Resampling.NEAREST},
    {"resample": Image.Resampling.LANCZOS},
]


def with_settings(changed: dict[str, Any], made_with: bool, tile: int = TILE) -> Any:
    """A processor that was made with some settings, or used first and then changed."""
    if made_with:
        geometry = {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}}
        return CLIPImageProcessorPil(**geometry | changed)
    processor = clip_processor(tile)
    assert_as_view_by_view(picture(30, 20), processor)
    for name, value in changed.items():
        setattr(processor, name, value)
    return processor


@pytest.mark.parametrize("made_with", [True, False])
@pytest.mark.parametrize("changed", SETTINGS, ids=str)
def test_every_setting_is_as_view_by_view(changed, made_with):
    processor = with_settings(changed, made_with)
    assert_as_view_by_view(all_levels(TILE), processor)
    assert_as_view_by_view(picture(45, 61), processor)


def test_clips_own_size_is_as_view_by_view():
    for size in [(640, 480), (336, 672), (500, 1000)]:
        assert_as_view_by_view(picture(*size), clip_processor(336), PINPOINTS)


def test_processors_do_not_answer_for_each_other():
    dark, light = clip_processor(TILE), clip_processor(TILE)
    light.rescale_factor = 1 / 100
    for processor in (dark, light, dark):
        assert_as_view_by_view(picture(40, 50), processor)


@pytest.mark.parametrize("mode", ["anyres", "pad"])
@pytest.mark.parametrize("changed", SETTINGS, ids=str)
def test_no_view_goes_through_the_processor_by_itself(changed, mode, monkeypatch):
    # All that the processor of a checkpoint is asked for is what it makes of 256 levels.
    processor, sent = with_settings(changed, True), []
    monkeypatch.setattr(CLIPImageProcessorPil, "process_image", spy(sent, CLIPImageProcessorPil.process_image))
    process_images([picture(50, 40)], processor, config(mode))
    assert sum(np.asarray(image).size for image in sent) == 3 * 256


def spy(seen: list[Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, image: Any, **kwargs: Any) -> Any:
        seen.append(image)
        return function(self, image, **kwargs)

    return call


class Mirrored(CLIPImageProcessorPil):
    def center_crop(self, image: np.ndarray, size: Any, **kwargs: Any) -> np.ndarray:
        return super().center_crop(image, size, **kwargs)[..., ::-1]


GEOMETRIES = [
    {"size": {"shortest_edge": 32}},
    {"size": {"shortest_edge": 20}},
    {"crop_size": {"height": 28, "width": 24}},
    {"size": {"shortest_edge": 28, "longest_edge": 20}},
    {"resample": "torchvision's"},  # transformers takes a filter of its own choice then
    {"do_pad": True, "pad_size": {"height": 30, "width": 33}},
]


@pytest.mark.parametrize("made_with", [True, False])
@pytest.mark.parametrize("changed", GEOMETRIES, ids=str)
def test_a_processor_that_changes_tiles_is_given_them(changed, made_with):
    processor = with_settings(changed, made_with)
    for image in (picture(56, 56), picture(50, 50)):  # squares, as one setting would give sizes that do not stack
        assert_as_view_by_view(image, processor)


def test_a_processor_that_does_not_resize_is_given_the_square():
    processor = with_settings({"do_resize": False}, True)
    for size in [(56, 28), (20, 10)]:
        assert_as_view_by_view(picture(*size), processor)


def test_a_processor_of_another_class_is_given_the_tiles():
    mirrored = Mirrored(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE})
    assert_as_view_by_view(picture(50, 40), mirrored)


def test_a_canvas_need_not_be_whole_tiles():
    assert_as_view_by_view(picture(50, 40), clip_processor(TILE), [[60, 40], [40, 60]])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_one_picture_of_another_mode_is_given_to_the_processor(mode):
    # `process_images` converts first; a caller of the inner function leaves it to Pillow and the processor.
    image, processor = picture(53, 40).convert(mode), clip_processor(TILE)
    views = [image.resize((TILE, TILE)), *divide_to_patches(resize_and_pad_image(image, (56, 56)), TILE)]
    assert torch.equal(process_anyres_image(image, processor, TINY_PINPOINTS), view_by_view(views, processor))


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_colour_declared_transparent_is_a_colour_like_others(mode, tmp_path):
    # transformers 5.23 paints it white, in the thumbnail and not in the crops.
    image, file = Image.new("RGB", (40, 30), (9, 9, 9)).convert(mode), tmp_path / "picture.png"
    image.save(file, transparency={"RGB": (9, 9, 9), "L": 9, "P": image.getpixel((0, 0))}[mode])
    assert "transparency" in Image.open(file).info
    for read in (Image.open(file), load_image(file)):
        assert "transparency" not in to_rgb(read).info
        for aspect in ("anyres", "pad", None):
            plain = process_images([image], clip_processor(TILE), config(aspect))
            assert torch.equal(process_images([read], clip_processor(TILE), config(aspect)), plain)


def test_rgb_is_not_copied():
    image = picture(8, 6)
    assert to_rgb(image) is image


# --- modes -----------------------------------------------------------------------------------------------------------


def gradient16(dtype: str = "<u2") -> np.ndarray:
    """All grey levels from black to white, 16 bits deep, `[64, 64]`."""
    return np.linspace(0, 65535, 64 * 64).astype(dtype).reshape(64, 64)


def in_mode(mode: str) -> tuple[Image.Image, Image.Image]:
    """A picture in some mode, and what it should be read as."""
    if mode == "I;16":
        levels = gradient16()
        return Image.fromarray(levels), Image.fromarray((levels // 256).astype(np.uint8)).convert("RGB")
    image = picture(50, 30)
    if mode == "LA":
        image = image.convert("L")
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    if mode in ("I", "F"):
        return image.convert("L").convert(mode), image.convert("L").convert("RGB")
    converted = image.convert(mode)
    return converted, converted.convert("RGB")


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_processed_as_rgb(mode):
    image, expected = in_mode(mode)
    assert image.mode == mode
    assert to_rgb(image).tobytes() == expected.tobytes()
    for aspect in ("anyres", "pad", None):
        pixels = process_images([image], clip_processor(TILE), config(aspect))
        assert torch.equal(pixels, process_images([expected], clip_processor(TILE), config(aspect)))


FILES = [
    *[("1", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("P", "gif"), ("RGB", "png"), ("RGB", "bmp")],
    *[("RGBA", "png"), ("CMYK", "tiff"), ("I;16", "png"), ("I;16", "tiff"), ("I", "tiff"), ("F", "tiff")],
]


@pytest.mark.parametrize(("mode", "extension"), FILES)
def test_every_mode_is_read_as_rgb(mode, extension, tmp_path):
    image, expected = in_mode(mode)
    file = tmp_path / f"picture.{extension}"
    image.save(file)
    read = load_image(file)
    assert (read.mode, read.size) == ("RGB", expected.size)
    assert read.tobytes() == expected.tobytes()


def test_a_cmyk_jpeg_is_read_as_rgb(tmp_path):
    file = tmp_path / "print.jpg"
    Image.new("CMYK", (20, 10), (0, 255, 255, 0)).save(file)
    red, green, blue = np.asarray(load_image(file), dtype=int)[5, 10]
    assert red > 240
    assert max(green, blue) < 15


def pgm(levels: np.ndarray, top: int) -> bytes:
    return b"P5 %d %d %d\n" % (levels.shape[1], levels.shape[0], top) + levels.astype(">u2").tobytes()


def write_gradient(kind: str, file: Path) -> None:
    if kind == "pgm":
        file.write_bytes(pgm(gradient16(), 65535))
    elif kind == "12-bit pgm":
        file.write_bytes(pgm(gradient16() // 16, 4095))
    else:
        Image.fromarray(gradient16(">u2" if kind == "big-endian tiff" else "<u2")).save(file, format=kind.split()[-1])


@pytest.mark.parametrize("kind", ["png", "tiff", "big-endian tiff", "pgm", "12-bit pgm"])
def test_a_deep_gradient_stays_a_gradient(kind, tmp_path):
    # Pillow's own conversion clips at 255 and gives white from the first 256th on.
    file = tmp_path / "gradient"
    write_gradient(kind, file)
    grey = np.asarray(load_image(file), dtype=int)
    assert (grey == grey[..., :1]).all()
    levels = grey[..., 0].ravel()
    assert (np.diff(levels) >= 0).all()
    assert abs(levels - np.linspace(0, 255, levels.size)).max() <= 1


def test_shallow_integers_keep_their_levels():
    # Mode I also carries 8-bit values: these are no deep picture.
    levels = np.arange(256, dtype=np.int32).reshape(16, 16)
    assert np.asarray(to_rgb(Image.fromarray(levels)))[..., 0].ravel().tolist() == list(range(256))


def test_of_an_animation_the_first_frame_counts(tmp_path):
    file = tmp_path / "moving.gif"
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=50)
    assert Image.open(file).n_frames == 3
    assert load_image(file).tobytes() == frames[0].tobytes()
    pixels = process_images([Image.open(file)], clip_processor(TILE), config("anyres"))
    assert torch.equal(pixels, process_images(frames[:1], clip_processor(TILE), config("anyres")))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_picture_is_read_whole_at_once(kind, tmp_path):
    file = tmp_path / "picture.png"
    picture(8, 6).save(file)
    read = load_image(kind(file))
    file.unlink()
    assert read.tobytes() == picture(8, 6).tobytes()


# --- files that cannot be used ---------------------------------------------------------------------------------------


def encoded(file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture(60, 50).save(buffer, file_format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A well-formed PNG of a few bytes that claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def odd_dds() -> bytes:
    """A DDS file whose pixel format Pillow knows nothing about: its reader raises NotImplementedError."""
    data = bytearray(encoded("DDS"))
    data[80:84] = struct.pack("<I", 26)
    return bytes(data)


BAD_FILES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"a picture of a cat\n" * 20,
    "zeros": lambda: bytes(4096),
    "truncated_jpeg": lambda: encoded("JPEG")[:-400],
    "jpeg_header_only": lambda: encoded("JPEG")[:200],
    "truncated_png": lambda: encoded("PNG")[:-4000],
    "png_signature_only": lambda: encoded("PNG")[:8],
    "damaged_png": lambda: encoded("PNG")[:200] + b"\xff" * 50 + encoded("PNG")[250:],
    "truncated_gif": lambda: encoded("GIF")[:-1500],
    "truncated_tiff": lambda: encoded("TIFF", compression="tiff_lzw")[:100],
    "truncated_bmp": lambda: encoded("BMP")[:-3000],
    "unknown_dds": odd_dds,
    "no_pixels_png": lambda: png_header(0, 5),
    "no_pixels_ppm": lambda: b"P6 0 5 255\n",
    "huge_png": lambda: png_header(20000, 20000),
    "huge_gif": lambda: b"GIF89a" + struct.pack("<HH", 65535, 65535) + encoded("GIF")[10:],
}
if features.check("webp"):
    BAD_FILES["truncated_webp"] = lambda: encoded("WEBP")[:-500]
if features.check("avif"):
    BAD_FILES["truncated_avif"] = lambda: encoded("AVIF")[:-200]


def complaint_about(path: str | Path) -> str:
    """What `load_image` says; one line that names the file."""
    with pytest.raises(InputError) as error:
        load_image(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message or repr(str(path)) in message
    return message


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", sorted(BAD_FILES))
def test_a_bad_file_is_one_line_naming_it(name, tmp_path):
    file = tmp_path / f"{name}.img"
    file.write_bytes(BAD_FILES[name]())
    complaint_about(file)


@pytest.mark.parametrize(
    ("name", "said"), [("empty", "empty"), ("huge_png", "89 megapixel"), ("huge_gif", "89 megapixel")]
)
def test_the_complaint_says_what_is_wrong(name, said, tmp_path):
    file = tmp_path / name
    file.write_bytes(BAD_FILES[name]())
    assert said in complaint_about(file)


def test_a_missing_file_a_folder_and_an_address(tmp_path):
    assert "does not exist" in complaint_about(tmp_path / "missing.jpg")
    assert "folder" in complaint_about(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    complaint_about(tmp_path / "file" / "below.jpg")
    complaint_about(tmp_path / "two\nlines.jpg")
    complaint_about("nul\0byte.jpg")
    complaint_about("a" * 5000)
    complaint_about("https://example.org/cat.jpg")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_one_may_not_read(tmp_path):
    file = tmp_path / "secret.png"
    picture(4, 4).save(file)
    file.chmod(0)
    complaint_about(file)


def test_a_file_one_may_not_read_even_where_tests_run_as_root(tmp_path, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "secret.png"))

    (tmp_path / "secret.png").write_bytes(b"secret")
    monkeypatch.setattr(Image, "open", refuse)
    assert "ermission" in complaint_about(tmp_path / "secret.png")


CODECS = [
    "PNG",
    "JPEG",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "TGA",
    *(c for c in ("WEBP", "AVIF") if features.check(c.lower())),
]


def read_or_refuse(file: Path) -> None:
    """A file is read, or refused in one line; a traceback would mean "our defect"."""
    try:
        assert load_image(file).mode == "RGB"
    except InputError as error:
        complaint = str(error)
    else:
        complaint = ""
    assert "\n" not in complaint


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("codec", CODECS)
def test_a_file_cut_anywhere_is_read_or_refused(codec, tmp_path):
    whole = encoded(codec)
    file = tmp_path / "cut"
    for length in sorted({len(whole) * step // 60 for step in range(60)} | set(range(0, min(len(whole), 64), 7))):
        file.write_bytes(whole[:length])
        read_or_refuse(file)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("codec", CODECS)
def test_a_file_with_damaged_bytes_is_read_or_refused(codec, tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / "damaged"
    for _ in range(60):
        data = bytearray(encoded(codec))
        # Headers are where decoders are most easily misled.
        for place in rng.integers(0, min(len(data), 200), 3).tolist():
            data[place] = int(rng.integers(256))
        file.write_bytes(data)
        read_or_refuse(file)


# --- helpers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "canvas"), [((640, 480), (672, 672)), ((40, 47), (336, 672)), ((1000, 300), (1008, 336))]
)
def test_select_best_resolution(size, canvas):
    assert select_best_resolution(size, [(w, h) for w, h in PINPOINTS]) == canvas


@pytest.mark.parametrize(
    ("size", "grid"), [((1000, 300), (3, 1)), ((300, 1000), (1, 3)), ((640, 480), (2, 2)), ((672, 300), (2, 1))]
)
def test_grid_shape_is_width_first(size, grid):
    assert get_anyres_image_grid_shape(size, PINPOINTS, 336) == grid
    assert get_anyres_image_grid_shape(size, str(PINPOINTS), 336) == grid


white_sizes = st.tuples(st.integers(1, 300), st.integers(1, 300)) | st.tuples(st.integers(1, 4), st.integers(1, 2000))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(size=white_sizes, canvas=st.sampled_from([(28, 56), (56, 28), (56, 56), (84, 28), (28, 84), (11, 23)]))
def test_a_picture_is_fitted_as_transformers_does(size, canvas):
    padded = resize_and_pad_image(Image.new("RGB", size, "white"), canvas)
    assert (padded.mode, padded.size) == ("RGB", canvas)
    down, across = get_patch_output_size(np.empty((3, *size[::-1])), canvas[::-1], ChannelDimension.FIRST)
    left, top = (canvas[0] - across) // 2, (canvas[1] - down) // 2
    expected = np.zeros((*canvas[::-1], 3), dtype=np.uint8)
    expected[top : top + down, left : left + across] = 255
    assert np.array_equal(np.asarray(padded), expected)


def test_crops_are_row_major():
    levels = np.arange(6, dtype=np.uint8).reshape(2, 3).repeat(4, axis=0).repeat(4, axis=1)
    crops = divide_to_patches(Image.fromarray(levels), 4)
    assert [crop.size for crop in crops] == [(4, 4)] * 6
    assert [crop.getextrema() for crop in crops] == [(level, level) for level in range(6)]


@pytest.mark.parametrize(
    ("size", "corner"), [((6, 3), (0, 1)), ((3, 6), (1, 0)), ((7, 2), (0, 2)), ((2, 7), (2, 0)), ((5, 5), (0, 0))]
)
@pytest.mark.parametrize(("mode", "colour"), [("RGB", (9, 8, 7)), ("L", 5)])
def test_expand2square_centres_on_colour(size, corner, mode, colour):
    image = picture(*size).convert(mode)
    square = expand2square(image, colour)
    assert (square.mode, square.size) == (mode, (max(size),) * 2)
    expected = Image.new(mode, square.size, colour)
    expected.paste(image, corner)
    assert square.tobytes() == expected.tobytes()


@pytest.mark.parametrize("mode", ["RGB", "P", "L", "LA", "RGBA", "1"])
def test_a_base64_picture_keeps_its_mode(mode):
    buffer = io.BytesIO()
    image = picture(9, 5).convert(mode)
    image.save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue())
    for given_as in (text, text.decode()):
        decoded = load_image_from_base64(given_as)
        assert (decoded.mode, decoded.size) == (mode, (9, 5))
        assert decoded.tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("liuhaotian/llava-v1.6-vicuna-7b", "llava-v1.6-vicuna-7b"),
        ("./liuhaotian/llava-next-7b", "llava-next-7b"),
        ("/data/models/llava-v1.5-7b/", "llava-v1.5-7b"),
        ("llava-v1.5-7b", "llava-v1.5-7b"),
        ("runs/llava-lora/checkpoint-5000", "llava-lora_checkpoint-5000"),
        ("/runs/llava-lora/checkpoint-5000/", "llava-lora_checkpoint-5000"),
        ("runs/my-checkpoint-5", "my-checkpoint-5"),
        ("checkpoint-5", "checkpoint-5"),
    ],
)
def test_model_name_from_path(path, name):
    assert get_model_name_from_path(path) == name


# --- stopping --------------------------------------------------------------------------------------------------------


class Letters:
    """One id per letter, 1 begins a sequence, and id 500 stands for "ab" as a whole."""

    bos_token_id = 1

    def __init__(self, begins: bool = True) -> None:
        self.begins = begins

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[1] * self.begins + [ord(letter) for letter in text])

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return "".join({1: "", 500: "ab"}.get(i, chr(i)) for i in ids.tolist())


def criterion(*keywords: str, prompt: int = 3, begins: bool = True) -> KeywordsStoppingCriteria:
    return KeywordsStoppingCriteria(list(keywords), Letters(begins), torch.zeros(1, prompt, dtype=torch.long))


def rows(*texts: str) -> torch.Tensor:
    return torch.tensor([[ord(letter) for letter in text] for text in texts])


@pytest.mark.parametrize(
    ("text", "ended"), [("xy##", True), ("##", True), ("x##y", False), ("xy#", False), ("#", False), ("xyz", False)]
)
@pytest.mark.parametrize("begins", [True, False])
def test_an_output_that_ends_with_a_keyword_stops(text, ended, begins):
    # The keyword's begin-of-sequence id never appears in an output. A prompt longer than the output: ids alone count.
    assert criterion("##", prompt=9, begins=begins)(rows(text), None) is ended


def test_any_keyword_stops():
    stop = criterion("##", "END", prompt=9)
    assert [stop(rows(text), None) for text in ("x##", "xEND", "xEN")] == [True, True, False]


def test_an_empty_keyword_stops_nothing():
    # Templates whose turns end in nothing have "" as separator, which is part of every text.
    assert criterion("", prompt=0)(rows("xy"), None) is False
    assert criterion("", "#", prompt=0)(rows("xy"), None) is False
    assert criterion("", "#", prompt=0)(rows("xy#"), None) is True


def test_every_row_must_have_ended():
    stop = criterion("#", "!", prompt=9)
    assert stop(rows("ab#", "cd!"), None) is True
    assert stop(rows("ab#", "cde"), None) is False
    assert stop(rows("abc", "cd!"), None) is False
    assert stop(rows("abc", "cde"), None) is False


def test_the_decoded_tail_counts_once_the_output_outgrows_the_prompt():
    stop = criterion("b", prompt=3)
    inside_another_token = torch.tensor([[120, 120, 500]])  # decodes to "xxab", but no id is that of "b"
    assert stop(inside_another_token, None) is False
    longer = torch.tensor([[120, 120, 120, 500]])
    assert stop(longer, None) is True
    # The tail is as long as the longest keyword, no longer.
    assert stop(torch.tensor([[120, 120, 500, 120]]), None) is False
    assert criterion("b", "long", prompt=0)(torch.tensor([[120, 120, 500, 120]]), None) is True
    # Every row of its own.
    assert stop(torch.tensor([[120, 120, 120, 500], [120, 120, 120, 120]]), None) is False
    assert stop(torch.tensor([[120, 120, 120, 500], [120, 120, 120, 98]]), None) is True


def test_transformers_accepts_the_criterion():
    stop = StoppingCriteriaList([criterion("#", prompt=9)])
    assert stop(rows("ab#", "cd#"), None).tolist() == [True, True]
    assert stop(rows("ab#", "cde"), None).tolist() == [False, False]
