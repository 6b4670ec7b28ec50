"""The door for pictures: what is taken, turned upright, refused in one line, and how much memory it may cost.

Files that Pillow cannot read, and picture modes, are in test_mm_utils.py; addresses in test_fetch.py.
"""

import base64
import io
import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features
from transformers import CLIPImageProcessorPil

from llava import images, mm_utils
from llava.constants import InputError
from llava.images import load_image, load_image_from_base64, load_images, to_rgb
from llava.mm_utils import process_images
from tests.conftest import picture

ORIENTATION = 0x0112
SIZE = (30, 20)


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def refusal(function: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        function(*arguments, **options)
    return str(error.value)


# --- what is taken ---------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a picture, or two.png"
    picture(*SIZE).save(path)
    return path


def test_every_source_gives_the_picture(file):
    data = file.read_bytes()
    read = io.BytesIO(data)
    read.seek(0, os.SEEK_END)
    with file.open("rb") as opened:
        sources = [file, str(file), data, bytearray(data), read, opened, Image.open(file), picture(*SIZE)]
        for source in sources:
            assert load_image(source).tobytes() == picture(*SIZE).tobytes()
            assert [image.size for image in load_images(source)] == [SIZE]
        assert not opened.closed
    assert not read.closed
    assert [image.size for image in load_images(iter([data, file, picture(4, 9)]))] == [SIZE, SIZE, (4, 9)]
    assert load_images([]) == []


def test_a_picture_is_returned_itself():
    image = picture(*SIZE)
    assert load_image(image) is image


@pytest.mark.parametrize("wrong", [None, 5, np.zeros((4, 4, 3)), torch.zeros(3, 4, 4), [picture(4, 4)], {}])
def test_what_is_no_source_is_told_what_is(wrong):
    assert "must be a path, an address, bytes, a binary file or a PIL picture" in refusal(load_image, wrong)
    with pytest.raises(InputError, match="must be"):
        process_images([wrong], processor(28), SimpleNamespace())


@pytest.mark.parametrize("wrong", [None, 5])
def test_what_is_no_list_of_sources_is_told_so(wrong):
    assert "give a list" in refusal(load_images, wrong)


def test_process_images_takes_one_picture_and_other_sources(file):
    expected = process_images([picture(*SIZE)], processor(28), config("anyres"))
    for given in (picture(*SIZE), str(file), file, file.read_bytes(), [file], (picture(*SIZE),)):
        assert torch.equal(process_images(given, processor(28), config("anyres")), expected)


def test_bytes_that_are_no_picture(tmp_path):
    assert refusal(load_image, b"") == "image of 0 bytes: it is empty; save it again"
    assert refusal(load_image, b"a cat") == "image of 5 bytes is not a picture Pillow can read"
    assert "cannot be decoded" in refusal(load_image, encoded(picture(60, 50))[:-4000])
    assert "BytesIO" in refusal(load_image, io.BytesIO(b"a cat"))
    (tmp_path / "text.png").write_text("a cat")
    with (tmp_path / "text.png").open("rb") as opened:
        assert "text.png" in refusal(load_image, opened)
    assert "closed file" in refusal(load_image, opened)


def test_a_picture_that_was_opened_and_is_damaged(tmp_path):
    (tmp_path / "cut.png").write_bytes(encoded(picture(60, 50))[:-4000])
    with Image.open(tmp_path / "cut.png") as opened:
        assert "PIL image cannot be decoded" in refusal(process_images, [opened], processor(28), config("pad"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "pipe or a device" in refusal(load_image, tmp_path / "pipe.png")
    assert "pipe or a device" in refusal(load_image, "/dev/zero")


@pytest.mark.parametrize("text", ["", "a cat", "AAAA", "x", b"\xff\xfe", "ä", base64.b64encode(b"GIF89a").decode()])
def test_base64_that_is_no_picture(text):
    assert refusal(load_image_from_base64, text).startswith(f"image of {len(text)} characters in base64 ")


def test_base64_goes_through_the_same_door(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 599)
    text = base64.b64encode(encoded(picture(*SIZE))).decode()
    assert "30x20" in refusal(load_image_from_base64, text)
    damaged = base64.b64encode(encoded(picture(60, 50))[:-4000])
    monkeypatch.setattr(images, "MAX_PIXELS", 3000)
    assert "cannot be decoded" in refusal(load_image_from_base64, damaged)


def test_formats_that_start_a_program_are_not_read(tmp_path, monkeypatch):
    file = tmp_path / "drawing.eps"
    picture(*SIZE).save(file)
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("Ghostscript was called"))
    assert "not a picture" in refusal(load_image, file)


# --- upright ---------------------------------------------------------------------------------------------------------


def stored(orientation: int) -> tuple[Image.Image, Image.Image]:
    """A picture as its file has it, and upright."""
    image = picture(64, 40)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image.info["exif"] = exif.tobytes()
    return picture(64, 40), ImageOps.exif_transpose(image)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", *(["WEBP"] if features.check("webp") else [])])
def test_upright_is_what_exif_says(orientation, file_format):
    plain, upright = stored(orientation)
    assert (upright.size != plain.size) == (orientation > 4)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {"quality": 100, "subsampling": 0}
    data = encoded(plain, file_format, exif=exif, **options)
    as_stored, turned = load_image(data), load_image(data, exif=True)
    assert (as_stored.size, turned.size) == (plain.size, upright.size)
    distance = 12 if file_format == "JPEG" else 0
    for found, wanted in ((as_stored, plain), (turned, upright)):
        assert abs(np.asarray(found, int) - np.asarray(wanted, int)).max() <= distance
    # Nobody turns it a second time, whatever it is given to.
    assert load_image(turned, exif=True) is turned
    assert load_image(encoded(turned), exif=True).tobytes() == turned.tobytes()
    # And what was not turned still can be.
    assert load_image(as_stored, exif=True).tobytes() == turned.tobytes()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "CMYK"])
def test_every_mode_is_turned(mode, tmp_path):
    image = Image.fromarray(np.arange(600, dtype="<u2").reshape(20, 30) * 109) if mode == "I;16" else picture(*SIZE)
    image = image if mode == "I;16" else image.convert(mode)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    if mode == "CMYK":
        image.save(tmp_path / "picture", "JPEG", exif=exif)
    else:
        image.save(tmp_path / "picture", "PNG", exif=exif)
    turned = load_image(tmp_path / "picture", exif=True)
    expected = load_image(tmp_path / "picture").transpose(Image.Transpose.ROTATE_270)
    assert (turned.mode, turned.size) == ("RGB", (20, 30))
    assert turned.tobytes() == expected.tobytes()


def test_xmp_counts_too():
    image = picture(*SIZE)
    image.info["XML:com.adobe.xmp"] = '<x tiff:Orientation="8"/>'
    turned = to_rgb(image, exif=True)
    assert turned.tobytes() == picture(*SIZE).transpose(Image.Transpose.ROTATE_90).tobytes()
    assert to_rgb(turned, exif=True) is turned


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"garbage", b"II*\0\x08\0\0\0\x01\0"]
)
def test_damaged_metadata_turn_nothing(exif):
    data = encoded(picture(*SIZE), "PNG", exif=exif)
    assert load_image(data, exif=True).tobytes() == picture(*SIZE).tobytes()


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_there_are_not_turn_nothing(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert load_image(encoded(picture(*SIZE), exif=exif), exif=True).size == SIZE


def test_benchmarks_see_a_picture_as_it_is_stored():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    given = Image.open(io.BytesIO(encoded(picture(*SIZE), exif=exif)))
    found = process_images([given], processor(28), config("anyres"))
    assert torch.equal(found, process_images([picture(*SIZE)], processor(28), config("anyres")))


# --- bounds ----------------------------------------------------------------------------------------------------------


def processor(tile: int) -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": tile}, crop_size={"height": tile, "width": tile})


def config(mode: str | None) -> SimpleNamespace:
    return SimpleNamespace(image_aspect_ratio=mode, image_grid_pinpoints=[[28, 56], [56, 28], [56, 56], [84, 28]])


def header(width: int, height: int) -> bytes:
    """A little PNG that claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "size", [(9460, 9460), (20000, 20000), (1, 65536), (65536, 1), (2**31 - 1, 1), (1, 178_000_000)]
)
def test_too_many_pixels_are_refused_unread(size):
    message = refusal(load_image, header(*size))
    assert "89 megapixels" in message
    assert "make it smaller" in message


def test_the_bounds_hold_for_pictures_made_by_pil(monkeypatch):
    for size in ((65536, 1), (1, 65536)):
        assert "65535 pixels a side" in refusal(process_images, Image.new("L", size), processor(28), config("pad"))
    monkeypatch.setattr(images, "MAX_PIXELS", 599)
    assert "30x20" in refusal(to_rgb, picture(*SIZE))
    monkeypatch.setattr(images, "MAX_PIXELS", 600)
    assert to_rgb(picture(*SIZE)).size == SIZE


@pytest.mark.skipif(not features.check("jpg_2000"), reason="needs JPEG 2000")
def test_a_hungry_format_is_bounded_more_closely(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1199)
    data = encoded(picture(*SIZE), "JPEG2000")
    assert "30x20" in refusal(load_image, data)
    assert load_image(encoded(picture(*SIZE))).size == SIZE


def icon_of_another_size() -> bytes:
    """An icon whose directory says 16x16 and whose picture says more than may be read."""
    picture_file = header(12000, 12000)
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(picture_file), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + picture_file


def test_a_picture_inside_a_picture_is_bounded():
    assert "89 megapixels" in refusal(load_image, icon_of_another_size())


def test_memory_that_does_not_suffice_is_the_pictures_fault(monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    data = encoded(picture(*SIZE))
    monkeypatch.setattr(mm_utils, "pad_and_resize", fail)
    assert "memory does not suffice for images of 30x20" in refusal(process_images, data, processor(28), config("pad"))
    monkeypatch.setattr(Image.Image, "load", fail)
    assert "more memory than there is" in refusal(load_image, data)


@pytest.mark.parametrize("band", [1, 70, 2**22])
def test_deep_grey_is_scaled_down_in_bands(monkeypatch, band):
    monkeypatch.setattr(images, "BAND", band)
    deep = np.arange(600, dtype="<u2").reshape(20, 30) * 109
    expected = (deep >> 8).astype(np.uint8)
    for image in (Image.fromarray(deep), Image.fromarray(deep.astype(np.int32))):
        assert np.array_equal(np.asarray(to_rgb(image))[..., 0], expected)
    shallow = Image.fromarray((deep % 256).astype(np.int32))
    assert np.array_equal(np.asarray(to_rgb(shallow))[..., 0], deep % 256)


# --- silence ---------------------------------------------------------------------------------------------------------


def test_pillow_does_not_warn_and_filters_stay_as_they_were():
    before = list(warnings.filters)
    noisy = encoded(picture(*SIZE), "TIFF")[:-30]  # its directory is cut
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for data in (noisy, b"a cat", encoded(picture(*SIZE))):
            with suppress(InputError):
                load_image(data)
    assert caught == []
    assert list(warnings.filters) == before


def damaged_tiffs() -> list[bytes]:
    """Of which libtiff complains on stderr, past Python, and Pillow by logging."""
    whole = encoded(picture(40, 30), "TIFF", compression="tiff_adobe_deflate")
    fax = encoded(picture(40, 30).convert("1"), "TIFF", compression="group4")
    samples = bytearray(encoded(picture(40, 30), "TIFF"))
    tag = samples.index(struct.pack("<HH", 277, 3))
    samples[tag + 8 : tag + 10] = b"\xff\xff"
    return [whole[:40] + bytes(20) + whole[60:], fax[:20] + b"\x55" * 30 + fax[50:], bytes(samples)]


def test_nothing_reaches_stderr(capfd):
    for data in damaged_tiffs():
        with suppress(InputError):
            load_image(data)
    assert capfd.readouterr() == ("", "")
    os.write(2, b"stderr works")
    assert capfd.readouterr().err == "stderr works"


def test_filters_are_put_back_when_threads_overlap():
    before, inside, leave = list(warnings.filters), threading.Barrier(3), [threading.Event(), threading.Event()]

    def read(event: threading.Event) -> None:
        with images._quiet:
            inside.wait(5)
            event.wait(5)

    threads = [threading.Thread(target=read, args=[event]) for event in leave]
    for thread in threads:
        thread.start()
    inside.wait(5)
    assert list(warnings.filters) != before
    for thread, event in zip(threads, leave, strict=True):  # the first one in is the first one out
        assert list(warnings.filters) != before
        event.set()
        thread.join()
    assert list(warnings.filters) == before


# --- memory and damage, in a process with a cap ----------------------------------------------------------------------

CAP = 3 * 2**29


def cap_memory() -> None:
    """Let this process take 1.5 GiB more than it has: its libraries are no work on pictures."""
    import resource

    taken = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (int(taken.split()[1]) * 1024 + CAP,) * 2)


def capped(function: str) -> str:
    """Run a function of this module in a process with a cap; it prints what is returned, and nothing to stderr."""
    code = f"from tests.test_images import cap_memory, {function}\ncap_memory()\n{function}()"
    words = [sys.executable, "-c", code]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-3000:]
    return done.stdout


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SLENDER = [(60000, 1), (1, 60000), (8000, 1), (1, 8000), (65535, 1365), (1365, 65535), (9459, 9459), (17000, 5000)]


def process_bombs() -> None:
    for size in SLENDER:
        for mode in ("pad", None, "anyres"):
            clip = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
            shape = SimpleNamespace(
                image_aspect_ratio=mode, image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336]]
            )
            pixels = process_images(load_image(encoded(Image.new("P", size), compress_level=1)), clip, shape)
            assert pixels.isfinite().all()
    print("done")


@linux
@pytest.mark.slow
def test_pictures_of_any_shape_are_processed_within_the_cap():
    assert capped("process_bombs") == "done\n"


def wholes() -> dict[str, bytes]:
    """Files in many formats, and variants of those that are met most."""
    image = picture(40, 30)
    grey = image.convert("L")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    made = {
        "png": encoded(image, exif=exif),
        "png deep": encoded(Image.fromarray(np.asarray(grey).astype("<u2") * 200)),
        "png palette": encoded(image.convert("P"), transparency=3),
        "png alpha": encoded(image.convert("RGBA")),
        "jpeg": encoded(image, "JPEG", exif=exif),
        "jpeg progressive": encoded(image, "JPEG", progressive=True),
        "jpeg cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "gif moving": encoded(image, "GIF", save_all=True, append_images=[picture(40, 30, seed=1)]),
        "ico bitmap": encoded(image, "ICO", sizes=[(16, 16), (24, 24)], bitmap_format="bmp"),
        "ppm": encoded(image, "PPM"),
        "pgm": encoded(grey, "PPM"),
    }
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4"):
        tone = image.convert("1") if compression == "group4" else image
        made[f"tiff {compression}"] = encoded(tone, "TIFF", compression=compression, exif=exif)
    formats = ["BMP", "DIB", "GIF", "ICO", "ICNS", "TGA", "DDS", "PCX", "SGI", "SPIDER", "QOI", "MPO"]
    formats += [
        name
        for name, feature in {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}.items()
        if features.check(feature)
    ]
    for name in formats:
        try:
            made[name] = encoded(grey.convert("F") if name == "SPIDER" else image, name)
        except (KeyError, ValueError, OSError):  # this Pillow does not write it
            continue
    if features.check("webp"):
        made["webp lossless"] = encoded(image.convert("RGBA"), "WEBP", lossless=True)
    return made


EXTREMES = [
    bytes(4),
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\xff\xff",
    b"\x00\x80",
    b"\x00\x01\x00\x00",
]


def repaired(data: bytes) -> bytes:
    """A PNG whose chunks' checksums are right again, as far as there are chunks."""
    out, place = bytearray(data), 8
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        end = place + 8 + length
        if end + 4 > len(data):
            break
        out[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(out)


def mutated(count: int) -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(20)
    kinds = sorted(wholes().items())
    for number in range(count):
        name, whole = kinds[number % len(kinds)]
        data = bytearray(whole)
        directory = int.from_bytes(whole[4:8], "little") if name.startswith("tiff") else 0
        for _ in range(int(rng.integers(1, 4))):
            where = int(rng.choice([rng.integers(len(data)), directory + rng.integers(200), rng.integers(64)]))
            where %= max(len(data), 1)
            match int(rng.integers(5)):
                case 0:
                    data[where : where + 1] = rng.bytes(1)
                case 1:
                    extreme = EXTREMES[int(rng.integers(len(EXTREMES)))]
                    data[where : where + len(extreme)] = extreme
                case 2:
                    del data[where : where + int(rng.integers(1, 9))]
                case 3:
                    other = kinds[int(rng.integers(len(kinds)))][1]
                    data[where : where + 16] = other[where : where + 16]
                case _:
                    data = data[: max(1, where)] if rng.integers(3) == 0 else data
        yield name, repaired(bytes(data)) if name.startswith("png") and rng.integers(4) else bytes(data)


def read_mutated() -> None:
    clip, read, refused = processor(28), 0, 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, data in mutated(10_000):
            try:
                image = load_image(data, exif=True)
                if image.size not in ((40, 30), (30, 40)):
                    process_images(image, clip, config(["pad", "anyres", None][read % 3]))
            except InputError:
                refused += 1
            except BaseException:
                sys.stderr.write(f"{name}: {data[:300].hex()}\n")
                raise
            else:
                assert image.mode == "RGB", name
                read += 1
    assert [str(warning.message) for warning in caught] == []
    print(read, refused)


@linux
@pytest.mark.slow
def test_ten_thousand_damaged_files_are_read_or_refused_within_the_cap():
    read, refused = map(int, capped("read_mutated").split())
    assert read + refused == 10_000
    assert min(read, refused) > 1000
