"""From the bytes of an image file to its pixels, and which files are refused.

Pillow opens many formats, some by starting other programs (EPS starts Ghostscript); those that are
opened here are named. An image is refused by its header where it has too many pixels, before any
memory is taken for them. Images that need much memory are decoded one at a time.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from configs.schema import ImageFolder
from runtime.formats import format_size
from runtime.limits import free_memory
from runtime.reading import BadFile, read_bounded
from runtime.text import one_line
from views.splits import DatasetError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # as Pillow calls them
MOST_BYTES = 2**29  # of a file
_LARGE_PIXELS = 2**24
_BYTES_PER_PIXEL = 8  # at the peak: four of Pillow's, three of the array, and strips
_STRIP_ROWS = 256

Image.MAX_IMAGE_PIXELS = None  # `dataset.max_pixels` is the limit, and names the file

_one_large = threading.Lock()


def _renew_lock() -> None:
    global _one_large
    _one_large = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)  # a thread of the parent's may have held it


def read_picture(path: Path) -> bytes:
    """The bytes of an image file; links are followed to regular files only. Raises DatasetError."""
    try:
        return read_bounded(path, MOST_BYTES, follow=True)
    except BadFile as error:
        raise DatasetError(str(error)) from None
    except OSError as error:
        raise DatasetError(f"cannot read the image {shown_path(path)}: {error.strerror}") from None


def picture_size(path: Path) -> int:
    """Bytes of an image file. Raises DatasetError where it is gone."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise DatasetError(f"cannot read the image {shown_path(path)}: {error.strerror}") from None


def shown_path(path: Path) -> str:
    """A path as messages show it."""
    return one_line(path, longest=1000)


def is_large(size: Sequence[int]) -> bool:
    """Whether an image of (height, width) or (width, height) needs much memory."""
    return size[0] * size[1] >= _LARGE_PIXELS


def decode_bytes(
    content: bytes, name: str, max_pixels: int = ImageFolder.max_pixels
) -> NDArray[np.uint8]:
    """An encoded image as (H, W, 3) uint8, turned upright as its EXIF orientation says.

    Grey becomes RGB of equal channels, of 16 bits their upper 8; transparency is dropped, as
    torchvision's loader does. Raises DatasetError with `name` where it cannot be read, has more
    pixels than allowed, or where the memory is short.
    """
    return np.asarray(decode_picture(content, name, max_pixels))


def decode_picture(
    content: bytes, name: str, max_pixels: int = ImageFolder.max_pixels
) -> Image.Image | NDArray[np.uint8]:
    """The pixels of `decode_bytes`, as Pillow's image where that is not large.

    Cutting a part out of it is faster than out of an array, into which all pixels are copied.
    """
    with _opened(content, name, max_pixels) as image:
        if not is_large(image.size):
            upright = _as_rgb(image, name)
            upright.load()
            return upright
        with _one_large:
            _refuse_short_memory(image.width * image.height, name)
            return _in_strips(_as_rgb(image, name))


def refuse_other_files(content: bytes, name: str, max_pixels: int) -> None:
    """Raise DatasetError where bytes that are about to be copied do not begin like an image.

    A link in somebody's folder may lead to any file of the user's.
    """
    with _opened(content, name, max_pixels):
        pass


@contextmanager
def _opened(content: bytes, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """Whatever is raised inside becomes a DatasetError."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _refuse_too_large(image, max_pixels, name)
            yield image
    except DatasetError:
        raise
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise DatasetError(f"cannot read the image {name}: its format is none of {known}") from None
    except Exception as error:  # decoders of damaged files raise almost anything
        raise DatasetError(f"cannot read the image {name}: {one_line(error)}") from None


def _refuse_too_large(image: Image.Image, max_pixels: int, name: str) -> None:
    if image.width * image.height > max_pixels:
        raise DatasetError(
            f"{name} has {image.width:,} x {image.height:,} pixels, more than dataset.max_pixels "
            f"({max_pixels:,})",
            fix="make it smaller, remove it, or raise dataset.max_pixels",
        )


def _refuse_short_memory(num_pixels: int, name: str) -> None:
    needed, free = num_pixels * _BYTES_PER_PIXEL, free_memory()
    if needed > free:
        raise DatasetError(
            f"{name}: decoding its {num_pixels:,} pixels takes {format_size(needed)} of memory, "
            f"{format_size(free)} are free",
            fix="make it smaller, or run with fewer --workers",
        )


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    upright = image
    ImageOps.exif_transpose(upright, in_place=True)
    upright = _of_eight_bits(upright, image.format, name)
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # from a palette, Pillow drops it only this way
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _of_eight_bits(image: Image.Image, file_format: str | None, name: str) -> Image.Image:
    """Grey of 16 bits as 8; Pillow would clip it, and most of it would be white.

    Pillow reads such PNG files in mode I;16 and such PGM files, scaled to 16 bits, in mode I.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DatasetError(
            f"{name} holds numbers of 32 bits (Pillow's mode {image.mode}), of which nothing says "
            f"what is black and what white",
            fix="convert it to grey or RGB of 8 or 16 bits",
        )
    return image


def _in_strips(image: Image.Image) -> NDArray[np.uint8]:
    """np.asarray(image), which would hold two more copies while it works."""
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    for top in range(0, image.height, _STRIP_ROWS):
        bottom = min(top + _STRIP_ROWS, image.height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return pixels
