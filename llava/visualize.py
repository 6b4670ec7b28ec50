"""Pictures of what a method kept: `python -m llava.visualize --model-path DIR --image-file IMG --output OUT.png`.

Three panels, as in the paper's Fig. 4: the original picture, the thumbnail and the crops, dropped patches bleached, the
share kept written on every crop. Drawn from the trace and from the very pixels the encoder saw.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from llava.anyres import AnyResGrid
from llava.compress import base
from llava.compress.trace import ImageTrace, Trace
from llava.constants import InputError
from llava.mm_utils import load_image, process_images
from llava.utils import OneLineParser, add_method_arguments, add_model_arguments, load_options, ratio_text, run_command

GAP, TITLE, BLEACH, LEGIBLE, LARGEST, WIDEST = 12, 28, 0.8, 168, 2048, 4
Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def kept_patches(trace: ImageTrace) -> Tensor:
    """Return which patches of every view are in the sequence: bool `[V, S, S]`, read from the tokens' origin."""
    side = trace.grid.side
    origin = trace.packed.origin.cpu()
    kept = torch.zeros(trace.grid.n_views * side**2, dtype=torch.bool)
    kept[origin[origin >= 0]] = True
    return kept.view(-1, side, side)


def view_pixels(pixels: Tensor, processor: Any) -> Pixels:
    """Undo CLIP's normalisation of views `[V, 3, S, S]`: `[V, S, S, 3]`, 8 bits."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    shown = (pixels.float().cpu() * std + mean).clamp(0, 1) * 255
    return shown.round().byte().permute(0, 2, 3, 1).numpy()


def bleach(picture: Pixels, keep: Mask) -> Pixels:
    """Bleach the pixels `[h, w, 3]` where `keep` `[h, w]` is False."""
    pale = (picture * (1 - BLEACH) + 255 * BLEACH).astype(np.uint8)
    return np.where(keep[..., None], picture, pale)


def draw(image: Image.Image, pixels: Tensor, trace: ImageTrace, processor: Any, title: str = "") -> Image.Image:
    """Draw the kept and dropped patches of one image.

    Args:
        image: the original picture.
        pixels: its views `[V, 3, S, S]` as the encoder got them.
        trace: what happened to it.
        processor: the image processor, for undoing the normalisation.
        title: written above the panels.
    """
    views, grid = view_pixels(pixels, processor), trace.grid
    zoom = -(-LEGIBLE // views.shape[1])  # labels must fit on the crops of a small model too
    views = views.repeat(zoom, 1).repeat(zoom, 2)
    tile = views.shape[1]
    keep = kept_patches(trace).numpy().repeat(tile // grid.side, 1).repeat(tile // grid.side, 2)  # [V, S, S] in pixels
    ledger = trace.ledger()
    thumbnail = Image.fromarray(bleach(views[0], keep[0]))
    captions = [f"thumbnail {_share(ledger, 0)}"]
    panels = [thumbnail]
    if grid.crops:
        cols, rows = grid.crops
        canvas_keep = keep[1:].reshape(rows, cols, tile, tile).swapaxes(1, 2).reshape(rows * tile, cols * tile)
        panels.insert(0, _on_original(image.convert("RGB"), canvas_keep))
        captions.insert(0, f"original {image.width}x{image.height}")
        crops = [Image.fromarray(bleach(view, mask)) for view, mask in zip(views[1:], keep[1:], strict=True)]
        panels.append(_mosaic(crops, grid, [_share(ledger, 1 + j) for j in range(len(crops))]))
        captions.append("crops")
    return _side_by_side(panels, captions, title)


def _share(ledger: dict[str, Any], view: int) -> str:
    before, after = ledger["patches_before"][view], ledger["patches_after"][view]
    return f"{after}/{before}" + (f" = {after / before:.2f}" if before else "")


def _on_original(image: Image.Image, keep: Mask) -> Image.Image:
    """Bleach the original picture where its part of the canvas `[h, w]` was dropped."""
    if max(image.size) > LARGEST:
        image = image.resize([max(1, side * LARGEST // max(image.size)) for side in image.size])
    down, across = keep.shape
    scale = min(across / image.width, down / image.height)
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    left, top = (across - width) // 2, (down - height) // 2
    part = Image.fromarray(keep).crop((left, top, left + width, top + height))
    mask = np.asarray(part.resize(image.size, Image.Resampling.NEAREST))
    return Image.fromarray(bleach(np.asarray(image), mask))


def _mosaic(crops: list[Image.Image], grid: AnyResGrid, labels: list[str]) -> Image.Image:
    """Lay the crops out with gaps and write what each kept."""
    cols, rows = grid.crops or (0, 0)
    step = crops[0].width + GAP // 2
    sheet = Image.new("RGB", (cols * step - GAP // 2, rows * step - GAP // 2), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(max(10, crops[0].width // 18))
    for j, (crop, label) in enumerate(zip(crops, labels, strict=True)):
        corner = (j % cols * step, j // cols * step)
        sheet.paste(crop, corner)
        pen.rectangle(pen.textbbox(corner, label, font), fill="black")
        pen.text(corner, label, "yellow", font)
    return sheet


def _side_by_side(panels: list[Image.Image], captions: list[str], title: str) -> Image.Image:
    """Scale the panels to one height and put them in a row under their captions."""
    height = max(panel.height for panel in panels[1:] or panels)
    scaled = [_fit(panel, height) for panel in panels]
    font = ImageFont.load_default(16)
    widths = [max(panel.width, round(font.getlength(text))) for panel, text in zip(scaled, captions, strict=True)]
    top = TITLE * (2 if title else 1)
    width = max(sum(widths) + GAP * (len(widths) + 1), round(font.getlength(title)) + 2 * GAP)
    sheet = Image.new("RGB", (width, top + height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 6), title, "black", font)
    left = GAP
    for panel, caption, width in zip(scaled, captions, widths, strict=True):
        pen.text((left, top - TITLE + 6), caption, "black", font)
        sheet.paste(panel, (left, top))
        left += width + GAP
    return sheet


def _fit(panel: Image.Image, height: int) -> Image.Image:
    """Scale a panel to a height, or less where it would get too wide."""
    scale = min(height / panel.height, WIDEST * height / panel.width)
    return panel.resize((max(1, round(panel.width * scale)), max(1, round(panel.height * scale))))


def visualize(args: argparse.Namespace) -> None:
    """Load a model, compress one picture and write what was kept as PNG."""
    output = Path(args.output)
    if not output.parent.is_dir() or output.is_dir() or output.suffix.lower() != ".png":
        raise InputError(f"--output {args.output!r} must be a .png file in a folder that exists")

    from llava.model.builder import choose_method, load_pretrained_model, read_config

    image = load_image(args.image_file, exif=True)
    method = choose_method(read_config(args.model_path), args.method, args.retention_ratio, args.profile)
    base.resolve_ratio(method.retention_ratio)  # a bad value in the environment is refused before the model loads
    _, model, processor, _ = load_pretrained_model(args.model_path, args.model_base, **load_options(args))
    model.method = method
    pixels = process_images([image], processor, model.config)
    trace = Trace()
    with torch.no_grad():
        model.compress_images(pixels, [image.size], trace)
    views = pixels[0] if pixels[0].ndim == 4 else pixels[0][None]
    shown = trace.images[0]
    draw(image, views, shown, processor, f"{trace.method} at {ratio_text(shown.plan.ratio)}").save(output)
    print(output)


def main() -> None:
    """Run the command."""
    parser = OneLineParser(prog="llava.visualize", description="Draw which patches of a picture a method keeps.")
    add_model_arguments(parser)
    parser.add_argument("--image-file", required=True)
    parser.add_argument("--output", required=True, help="PNG file to write")
    add_method_arguments(parser)
    visualize(parser.parse_args())


if __name__ == "__main__":
    run_command(main)
