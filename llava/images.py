"""The one door for pictures: files, addresses, bytes and base64 become RGB pictures of bounded size, or one line."""

import base64
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import BytesIO
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import IO, Any, TypeAlias, cast

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import DecompressionBombError, DecompressionBombWarning, Transpose

from llava.constants import InputError
from llava.fetch import fetch, shortened

Source: TypeAlias = str | PathLike[str] | bytes | bytearray | IO[bytes] | Image.Image

# From here on Pillow warns. Decoders hold 8 to 16 bytes a pixel, some formats' more: all stay below 1.5 GiB.
MAX_PIXELS, HUNGRY = 89_478_485, {"JPEG2000": 2}
# The longest a JPEG can be. Pillow keeps an address per row, and a resized picture has as many rows halfway.
MAX_SIDE = 65_535
# They start a program (Ghostscript) and unpack a compressed file whole, whatever its header says.
UNSAFE_FORMATS = {"EPS", "FITS"}
BAND = 2**22  # pixels
PROBLEMS: dict[Any, str] = {
    FileNotFoundError: "does not exist; check the path",
    PermissionError: "may not be read; check its permissions",
    IsADirectoryError: "is a folder; give a picture file",
    UnidentifiedImageError: "is not a picture Pillow can read",
    (
        DecompressionBombError,
        DecompressionBombWarning,
    ): f"has more than {MAX_PIXELS // 10**6} megapixels; make it smaller",
    MemoryError: "needs more memory than there is; make it smaller",
}
# What turns a picture upright, by EXIF's orientation, and where files note it.
TURNS = dict(enumerate([Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM], 2)) | dict(
    enumerate([Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90], 5)
)
# Of damage Pillow logs, too, which without a handler would come out on stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())
METADATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


class _Shared:
    """A context of the whole process: the first of the threads in it enters, the last leaves."""

    def __init__(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._context, self._lock, self._inside = context, Lock(), 0
        self._entered: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._entered = self._context()
                self._entered.__enter__()
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._entered.__exit__(None, None, None)


@_Shared
@contextmanager
def _quiet() -> Iterator[None]:
    """Let Pillow not warn of damage, and refuse where it would warn of size."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.filterwarnings("error", category=DecompressionBombWarning)
        yield


@_Shared
@contextmanager
def _mute() -> Iterator[None]:
    """Let nothing reach stderr: libtiff writes there, past Python, what it dislikes about a file."""
    try:
        stderr = os.dup(2)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def load_image(source: Source, exif: bool = False) -> Image.Image:
    """Read a picture as RGB.

    Args:
        source: a file, by path or opened in binary; the bytes of one; an http(s) address (`llava.fetch` says what is
            fetched) or one of `data:image/…;base64,…`; or a PIL picture.
        exif: turn the picture upright as its EXIF orientation says. LLaVA's benchmarks do not, nor does
            `process_images`; `ask`, `run_llava` and `visualize` do. (TIFF files are turned by Pillow in any case.)

    Raises:
        InputError: there is no such picture, or it is empty, damaged, no picture, or too large: more than 89 megapixels
            (JPEG 2000: 44) or 65535 pixels a side.
    """
    name, content = _find(source)
    with _reading(name), _opened(content) as image:
        return to_rgb(image, exif)


def load_images(sources: Source | Iterable[Source], exif: bool = False) -> list[Image.Image]:
    """Read one picture or several, as `load_image` does.

    Raises:
        InputError: see `load_image`.
    """
    one = isinstance(sources, str | bytes | bytearray | PathLike | Image.Image) or hasattr(sources, "read")
    if not one and not isinstance(sources, Iterable):
        raise InputError(f"images must be pictures, got {type(sources).__name__}; give a list of what load_image takes")
    return [load_image(source, exif) for source in cast(Iterable[Source], [sources] if one else sources)]


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """Decode a base64 picture, in whatever mode it has.

    Raises:
        InputError: see `load_image`.
    """
    name = f"image of {len(image)} characters in base64"
    with _reading(name):
        picture = Image.open(BytesIO(base64.b64decode(image)), formats=_formats())
        _load(picture)
        return picture


def to_rgb(image: Image.Image, exif: bool = False) -> Image.Image:
    """Return the picture as RGB, whatever its mode; 16-bit grey is scaled down, of an animation the first frame counts.

    What is RGB already is returned itself. A colour that a file declares transparent is a colour like others.

    Args:
        image: a PIL picture.
        exif: turn it upright as its metadata say; the result has none of them left, so that nobody turns it again.

    Raises:
        InputError: the picture has no pixels, or too many (see `load_image`).
    """
    _load(image)
    turn = _turn(image) if exif else None
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.mode != "RGB" or "transparency" in image.info:
        image = image.convert("RGB")
        image.info.pop("transparency", None)  # which transformers 5.23 would paint white
    if turn is not None:
        image = image.transpose(turn)
        for key in METADATA:
            image.info.pop(key, None)
    return image


def check_size(image: Image.Image) -> None:
    """Refuse a picture without pixels, or with so many that decoding and resizing it would take gigabytes.

    Raises:
        InputError: it is one.
    """
    width, height = image.size
    if not width or not height:
        raise InputError(f"image of {width}x{height} pixels: both sides must be at least 1")
    most = MAX_PIXELS // HUNGRY.get(image.format or "", 1)
    if width * height > most or max(width, height) > MAX_SIDE:
        limits = f"over {most // 10**6} megapixels or {MAX_SIDE} pixels a side"
        raise InputError(f"image of {width}x{height} pixels: {limits}; make it smaller")


def _load(image: Image.Image) -> None:
    """Decode a picture that is not too large; only then its mode and size are certain."""
    check_size(image)
    with _mute if image.format == "TIFF" else nullcontext():
        image.load()
    check_size(image)


def _find(source: Any) -> tuple[str, Any]:
    """Return what messages call a picture, and its file, by path or opened, or itself."""
    if isinstance(source, Image.Image):
        return "PIL image", source
    if isinstance(source, str) and (source.startswith("data:") or "://" in source):
        return f"image at {shortened(source)}", fetch(source)
    if isinstance(source, bytes | bytearray):
        return f"image of {len(source)} bytes", bytes(source)
    if isinstance(source, str | PathLike):
        return f"image file {str(source)!r}", Path(source)
    if hasattr(source, "read"):
        return f"image file {getattr(source, 'name', type(source).__name__)!r}", source
    raise InputError(
        f"an image must be a path, an address, bytes, a binary file or a PIL picture, got {type(source).__name__}; "
        "Image.fromarray makes a picture of an array"
    )


def _opened(content: Any) -> Any:
    """Open a picture for a `with` block; one of PIL's stays open behind it."""
    if isinstance(content, Image.Image):
        return nullcontext(content)
    if isinstance(content, Path) and content.exists() and not (content.is_file() or content.is_dir()):
        raise InputError("it is a pipe or a device, which may never end; give a picture file")
    empty = not content.stat().st_size if isinstance(content, Path) else content == b""
    if empty:
        raise InputError("it is empty; save it again")
    content = BytesIO(content) if isinstance(content, bytes) else content
    return Image.open(content, formats=_formats())


def _formats() -> list[str]:
    """Return the formats that are read, in the order in which Pillow tries them."""
    Image.preinit()
    Image.init()
    return [name for name in Image.ID if name not in UNSAFE_FORMATS]


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn whatever is raised when a picture is read into one line."""
    try:
        with _quiet:
            yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # Pillow's decoders, a plugin per format, raise all kinds on damaged files
        said = (problem for kind, problem in PROBLEMS.items() if isinstance(error, kind))
        raise InputError(f"{name} {next(said, f'cannot be decoded ({error}); save it again')}") from error


def _turn(image: Image.Image) -> Transpose | None:
    """Return what turns a picture upright, None if it is or its metadata cannot be read."""
    try:
        return TURNS.get(cast(int, image.getexif().get(ExifTags.Base.Orientation)))
    except Exception:  # metadata of all kinds of damage, in a picture that is whole
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a grey picture of more than 8 bits as `L`; Pillow would clip instead, and turn nearly all of it white."""
    deep = image.mode != "I" or cast(tuple[int, int], image.getextrema())[1] > 255
    grey, rows = Image.new("L", image.size), max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        levels = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        levels = (levels >> 8 if deep else levels).clip(0, 255).astype(np.uint8)
        grey.paste(Image.fromarray(levels), (0, top))
    return grey
