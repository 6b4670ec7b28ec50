"""Pictures: kept patches keep their colour, dropped ones are bleached, at the right place."""

import numpy as np
import pytest
import torch
from PIL import Image

from llava import visualize
from llava.compress import get
from llava.compress.trace import Trace
from llava.mm_utils import process_images
from tests.conftest import picture


@pytest.fixture
def traced(loaded, monkeypatch):
    """Compress one picture; returns its views and trace."""

    def run(image, version="v1.6-vicuna", method="globalcom2(retention_ratio=0.25)"):
        _, model, processor, _ = loaded(version)
        monkeypatch.setattr(model, "method", get(method), raising=False)
        pixels = process_images([image], processor, model.config)[0]
        trace = Trace()
        with torch.no_grad():
            model.compress_images([pixels], [image.size], trace)
        return (pixels if pixels.ndim == 4 else pixels[None]), trace.images[0], processor

    return run


def test_kept_patches_are_those_of_the_selection(traced):
    _, trace, _ = traced(picture(300, 200))
    kept = visualize.kept_patches(trace).flatten(1)
    for view, indices in enumerate(trace.selection.keep):
        assert kept[view].nonzero().flatten().tolist() == sorted(indices.tolist())


def test_view_pixels_invert_the_normalisation(traced):
    image = picture(168, 168)
    views, _, processor = traced(image)
    # A picture that fills its 2x2 canvas exactly is cut, not resized.
    assert np.array_equal(visualize.view_pixels(views, processor)[1], np.asarray(image)[:84, :84])


def test_bleached_where_dropped_untouched_where_kept(traced):
    """On a black picture a kept pixel is black and a dropped one pale: count them per panel of the original."""
    image = Image.new("RGB", (168, 168))
    _, trace, _ = traced(image, method="random(retention_ratio=0.5)")
    keep = visualize.kept_patches(trace)[1:].view(2, 2, 6, 6).permute(0, 2, 1, 3).reshape(12, 12).numpy()
    drawn = np.asarray(visualize._on_original(image, keep.repeat(14, 0).repeat(14, 1)))
    for row in range(12):
        for col in range(12):
            assert drawn[row * 14 + 7, col * 14 + 7, 0] == (0 if keep[row, col] else 204)


def test_padding_is_left_out_of_the_original(traced):
    """A wide picture shows only its own rows of the canvas: its top edge is the first unpadded row."""
    image = Image.new("RGB", (336, 168))
    keep = np.zeros((168, 168), dtype=bool)
    keep[42:84] = True  # the upper half of the unpadded box
    drawn = np.asarray(visualize._on_original(image, keep))
    assert (drawn[:80] == 0).all()
    assert (drawn[88:] == 204).all()


@pytest.mark.parametrize("version", ["v1.6-vicuna", "v1.5"])
@pytest.mark.parametrize("size", [(300, 200), (60, 400), (1, 1)])
def test_draws_any_picture(traced, version, size):
    image = picture(*size)
    views, trace, processor = traced(image, version)
    drawn = visualize.draw(image, views, trace, processor, "title")
    assert drawn.mode == "RGB"
    assert min(drawn.size) > 168


def test_every_crop_carries_its_ratio(traced, monkeypatch):
    written = []
    image = picture(300, 200)
    views, trace, processor = traced(image)
    monkeypatch.setattr(
        visualize, "_mosaic", lambda crops, grid, labels: written.extend(labels) or Image.new("RGB", (9, 9))
    )
    visualize.draw(image, views, trace, processor)
    counts = trace.ledger()["patches_after"][1:]
    assert written == [f"{k}/24 = {k / 24:.2f}" for k in counts]


def test_a_picture_is_drawn_upright(checkpoint, tmp_path, command):
    exif = Image.Exif()
    exif[0x0112] = 6
    drawn = []
    for name, image, options in (
        ("sideways", picture(300, 200), {"exif": exif}),
        ("upright", picture(300, 200).transpose(Image.Transpose.ROTATE_270), {}),
    ):
        image.save(tmp_path / f"{name}.png", **options)
        out = tmp_path / f"{name} kept.png"
        arguments = ["--model-path", checkpoint(), "--image-file", tmp_path / f"{name}.png", "--output", out]
        assert command(visualize.main, *arguments)[0] == 0
        drawn.append(Image.open(out).tobytes())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("size", [(6000, 1), (1, 6000), (2200, 900)])
def test_a_drawing_is_of_bounded_size(traced, size):
    image = picture(*size)
    views, trace, processor = traced(image)
    drawn = visualize.draw(image, views, trace, processor)
    assert drawn.width < 10 * drawn.height
    assert drawn.width * drawn.height < 10**7


def test_command_writes_a_png(checkpoint, tmp_path, command):
    photo, out = tmp_path / "photo.png", tmp_path / "kept.png"
    picture(300, 200).save(photo)
    arguments = ["--model-path", checkpoint(), "--image-file", photo, "--output", out, "--method", "uniform"]
    code, said, _ = command(visualize.main, *arguments)
    assert (code, said.strip()) == (0, str(out))
    assert Image.open(out).format == "PNG"


def test_missing_output_folder_is_said_before_anything_runs(tmp_path, command):
    for output in (tmp_path / "no" / "kept.png", tmp_path, tmp_path / "kept.foo"):
        arguments = ["--model-path", "nosuch", "--image-file", "nosuch.png", "--output", output]
        code, _, err = command(visualize.main, *arguments)
        assert code == 2
        assert "--output" in err
