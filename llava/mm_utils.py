"""From picture files to view tensors and from prompts to ids, under the names LLaVA's users know."""

from collections.abc import Iterable
from itertools import chain
from math import ceil
from typing import Any, cast, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava.anyres import Size, best_resolution, choose_grid, parse_pinpoints
from llava.constants import IMAGE_TOKEN_INDEX, InputError
from llava.images import Source, load_images
from llava.images import load_image as load_image
from llava.images import load_image_from_base64 as load_image_from_base64
from llava.images import to_rgb as to_rgb
from llava.resize import BICUBIC, pad_and_resize, resize_and_crop

# Pixels of the largest square that is made, 400 MB, and how many times as long as wide a picture may be to be resized
# whole.
CANVAS, SLENDER = 10**8, 16


def select_best_resolution(original_size: Size, possible_resolutions: list[Size]) -> Size:
    """Return the AnyRes canvas `(W, H)` for an image of `(w, h)` pixels."""
    return best_resolution(original_size, possible_resolutions)


def get_anyres_image_grid_shape(image_size: Size, grid_pinpoints: Any, patch_size: int) -> Size:
    """Return the grid `(cols, rows)` of crops, `patch_size` being the side of a crop in pixels."""
    return choose_grid(image_size, grid_pinpoints, patch_size)


def resize_and_pad_image(image: Image.Image, target_resolution: Size) -> Image.Image:
    """Fit a picture into a canvas `(W, H)` without distortion, centred on black."""
    width, height = image.size
    across, down = target_resolution
    if across / width < down / height:
        fitted = (across, min(ceil(height * (across / width)), down))
    else:
        fitted = (min(ceil(width * (down / height)), across), down)
    canvas = Image.new("RGB", (across, down))
    canvas.paste(image.resize(fitted), ((across - fitted[0]) // 2, (down - fitted[1]) // 2))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Cut a canvas into square crops of `patch_size` pixels, row-major."""
    return [
        image.crop((left, top, left + patch_size, top + patch_size))
        for top in range(0, image.height, patch_size)
        for left in range(0, image.width, patch_size)
    ]


def expand2square(pil_img: Image.Image, background_color: tuple[int, ...]) -> Image.Image:
    """Pad the shorter side of a picture with a colour, keeping it centred.

    Raises:
        InputError: the square would have more than 100 megapixels.
    """
    side = max(pil_img.size)
    if side**2 > max(CANVAS, pil_img.width * pil_img.height):
        raise InputError(f"an image of {pil_img.width}x{pil_img.height} pixels is too slender to be padded; crop it")
    square = Image.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, ((side - pil_img.width) // 2, (side - pil_img.height) // 2))
    return square


def process_anyres_image(image: Image.Image, processor: Any, grid_pinpoints: Any) -> Tensor:
    """Turn a picture into the views of its AnyRes grid.

    Returns:
        `[1 + n, 3, S, S]`: the thumbnail (the whole picture, squashed to a square), then the crops row-major.
    """
    target = best_resolution(image.size, parse_pinpoints(grid_pinpoints))
    tile, shortest = processor.crop_size["height"], processor.size["shortest_edge"]
    thumbnail, canvas = image.resize((shortest, shortest)), resize_and_pad_image(image, target)
    if image.mode == "RGB" and _keeps_tiles(processor) and not any(length % tile for length in target):
        return _look_up([thumbnail, canvas], processor)
    return preprocess_each([thumbnail, *divide_to_patches(canvas, tile)], processor)


def _process_padded_image(image: Image.Image, processor: Any) -> Tensor:
    """Turn an RGB picture into `[3, S, S]`, made square with the processor's mean colour."""
    colour = tuple(int(255 * mean) for mean in processor.image_mean)
    if not _keeps_tiles(processor):
        return preprocess_each([expand2square(image, colour)], processor)[0]
    return _look_up([pad_and_resize(image, colour, processor.crop_size["height"], processor.resample)], processor)[0]


def _cut(image: Image.Image, processor: Any) -> Image.Image:
    """Return the middle of a slender RGB picture as the processor would resize and crop it; any other as it is.

    Raises:
        InputError: the processor would make it enormous, and has settings unlike CLIP's.
    """
    edge = getattr(processor.size, "shortest_edge", None) if processor.do_resize else None
    if not edge or max(image.size) <= SLENDER * min(image.size):
        return image
    if _keeps_tiles(processor) and processor.resample == BICUBIC and processor.do_center_crop:
        return resize_and_crop(image, edge)
    raise InputError(f"an image of {image.width}x{image.height} pixels is too slender for the image processor; crop it")


def preprocess_each(images: list[Image.Image], processor: Any) -> Tensor:
    """Send pictures through an image processor, which takes them one by one, into `[B, 3, S, S]`."""
    return cast(Tensor, processor.preprocess(images, return_tensors="pt")["pixel_values"])


def _keeps_tiles(processor: Any) -> bool:
    """Tell whether a processor is CLIP's and neither resizes nor crops an RGB picture that has its crop size.

    All that its other settings can do to such a picture is to map the levels of a channel, each for itself.
    """
    from transformers import CLIPImageProcessorPil

    if type(processor) is not CLIPImageProcessorPil:  # a subclass may do anything
        return False
    side = getattr(processor.size, "shortest_edge", None)
    return (
        processor.size == {"shortest_edge": side}
        and processor.crop_size == {"height": side, "width": side}
        and isinstance(processor.resample, int)  # one of Pillow's filters
        and bool(processor.do_resize and not processor.do_pad)
    )


def _look_up(pictures: list[Image.Image], processor: Any) -> Tensor:
    """Turn the tiles of RGB pictures, each row-major, into views `[V, 3, S, S]` as a processor that keeps tiles does.

    The processor is asked what it makes of every level; one pass then writes everything to its place.
    """
    asked = {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_first"}
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    tables = processor.preprocess(levels, **asked, return_tensors="np")["pixel_values"][0, :, 0]  # [3, 256]
    side = processor.crop_size["height"]
    tiles: list[np.ndarray] = []
    for picture in pictures:
        planes = np.frombuffer(b"".join(picture.tobytes("raw", band) for band in "RGB"), dtype=np.uint8)
        planes = planes.reshape(3, picture.height // side, side, picture.width // side, side)
        tiles += chain(*planes.transpose(1, 3, 0, 2, 4))  # [rows, cols, 3, S, S]
    views = np.empty((len(tiles), 3, side, side), dtype=tables.dtype)
    for tile, view in zip(tiles, views, strict=True):
        for table, plane, out in zip(tables, tile, view, strict=True):
            table.take(plane, out=out, mode="clip")  # nothing to clip: the other modes fill a buffer first
    return torch.from_numpy(views)


def process_images(images: Source | Iterable[Source], image_processor: Any, model_cfg: Any) -> Tensor | list[Tensor]:
    """Preprocess pictures of any mode as `model_cfg.image_aspect_ratio` says.

    Args:
        images: PIL pictures, or whatever else `load_image` takes; one alone is a list of one. EXIF is ignored.
        image_processor: CLIP's.
        model_cfg: anything with `image_aspect_ratio`, and for `anyres` `image_grid_pinpoints`.

    Returns:
        `pad`: `[B, 3, S, S]`. `anyres`: `[B, V, 3, S, S]` if all have as many views, else a list of `[V, 3, S, S]`.
        Otherwise `[B, 3, S, S]`, resized and centre-cropped by CLIP's processor.

    Raises:
        InputError: one is no picture, is too large (see `load_image`), or memory does not suffice.
    """
    pictures = load_images(images)
    mode = getattr(model_cfg, "image_aspect_ratio", None)
    try:
        if mode == "anyres":
            views = [process_anyres_image(image, image_processor, model_cfg.image_grid_pinpoints) for image in pictures]
        elif mode == "pad":
            views = [_process_padded_image(image, image_processor) for image in pictures]
        else:
            return preprocess_each([_cut(image, image_processor) for image in pictures], image_processor)
    except MemoryError as error:
        sizes = ", ".join(f"{image.width}x{image.height}" for image in pictures)
        raise InputError(f"memory does not suffice for images of {sizes} pixels; make them smaller") from error
    if len(views) == 1:
        return views[0][None]  # the usual case, without a copy
    return torch.stack(views) if len({view.shape for view in views}) == 1 else views


@overload
def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = ..., return_tensors: None = None
) -> list[int]: ...
@overload
def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = ..., *, return_tensors: str
) -> Tensor: ...
def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | Tensor:
    """Turn a prompt into ids, `image_token_index` where `<image>` stands.

    Every stretch between images is tokenised on its own, as in training, so each keeps its leading word mark; of the
    begin-of-sequence ids only the first stays.

    Raises:
        ValueError: `return_tensors` is neither None nor `"pt"`.
    """
    # SentencePiece puts its word mark before a leading space too; transformers' tokenizers put none there.
    swallowed = " " if tokenizer(" a").input_ids == tokenizer("a").input_ids else ""
    texts = (swallowed + text if text.startswith(" ") else text for text in prompt.split("<image>"))
    stretches = [list(tokenizer(text).input_ids) for text in texts]
    begins = bool(stretches[0]) and stretches[0][0] == tokenizer.bos_token_id
    ids = stretches[0][:1] if begins else []
    for index, stretch in enumerate(stretches):
        ids += [image_token_index] * (index > 0) + stretch[begins:]
    if return_tensors is None:
        return ids
    if return_tensors == "pt":
        return torch.tensor(ids, dtype=torch.long)
    raise ValueError(f"return_tensors must be None or 'pt', got {return_tensors!r}")


def get_model_name_from_path(model_path: str) -> str:
    """Return the last part of a path; of `…/run/checkpoint-5` it is `run_checkpoint-5`."""
    parts = model_path.strip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


class KeywordsStoppingCriteria:
    """Stops when every row of the output ends with one of the keywords, or its decoded tail contains one."""

    def __init__(self, keywords: list[str], tokenizer: Any, input_ids: Tensor) -> None:
        """Prepare the keywords' ids; `input_ids` `[B, L]` is the prompt."""
        # Some templates end turns with nothing, which every text would contain.
        self.keywords = keywords = [keyword for keyword in keywords if keyword]
        self.tokenizer = tokenizer
        ids = [tokenizer(keyword).input_ids for keyword in keywords]
        self.keyword_ids = [torch.tensor(i[1:] if len(i) > 1 and i[0] == tokenizer.bos_token_id else i) for i in ids]
        self.max_keyword_len = max(map(len, self.keyword_ids), default=0)
        self.start_len = input_ids.shape[1]

    def __call__(self, output_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        """Tell whether all rows `[B, L]` have ended."""
        return all(self._ended(row) for row in output_ids)

    def _ended(self, row: Tensor) -> bool:
        for ids in self.keyword_ids:
            if len(ids) <= len(row) and torch.equal(row[-len(ids) :], ids.to(row.device)):
                return True
        # As in LLaVA: the tail is only decoded once the output is longer than the prompt was.
        tail = min(len(row) - self.start_len, self.max_keyword_len)
        if tail <= 0:
            return False
        text = self.tokenizer.decode(row[-tail:], skip_special_tokens=True)
        return any(keyword in text for keyword in self.keywords)
