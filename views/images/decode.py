"""Decode image files to pixels and reject files that are not safe to decode.

Pillow opens many formats, some by starting other programs (EPS starts Ghostscript), so the accepted
formats are listed here. An image with too many pixels is rejected by its header, before memory is
allocated. Images that need much memory are decoded one at a time.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from teach_once.configs.schema import ImageFolder
from teach_once.runtime.formats import format_size
from teach_once.runtime.machine.resources import free_memory
from teach_once.runtime.safe.safe_read import BadFile, open_regular, read_bounded
from teach_once.runtime.safe.stand_ins import HEAD_BYTES, find_stand_in
from teach_once.runtime.safe.text import one_line
from teach_once.views.images.metadata import find_orientation, without_metadata
from teach_once.views.splits import DatasetError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # as Pillow calls them
MOST_BYTES = 2**29  # size of a file
_LARGE_PIXELS = 2**24
_BYTES_PER_PIXEL = 8  # at the peak: four in Pillow, three in the array, and strips
_STRIP_ROWS = 256
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Image.MAX_IMAGE_PIXELS = None  # `dataset.max_pixels` is the limit, and names the file

_one_large = threading.Lock()


class Undecodable(DatasetError):
    """Bytes that cannot be decoded to an image."""


def _renew_lock() -> None:
    global _one_large
    _one_large = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)  # a thread of the parent may have held it


def read_picture(path: Path) -> bytes:
    """Read an image file; symbolic links are followed to regular files only.

    Raises DatasetError if it cannot be read.
    """
    try:
        return read_bounded(path, MOST_BYTES, follow=True)
    except BadFile as error:
        raise DatasetError(str(error)) from None
    except OSError as error:
        raise DatasetError(f"cannot read the image {shown_path(path)}: {error.strerror}") from None


def picture_size(path: Path) -> int:
    """Return the size of an image file in bytes. Raises DatasetError if it cannot be read."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise DatasetError(f"cannot read the image {shown_path(path)}: {error.strerror}") from None


def shown_path(path: Path) -> str:
    """Return a path formatted for messages."""
    return one_line(path, longest=1000)


def check_header(path: Path, max_pixels: int) -> None:
    """Raise DatasetError if a file does not begin like an image. Reads only its header."""
    shown = shown_path(path)
    try:
        with (
            open_regular(path, follow=True) as file,
            suppress(Exception),
            Image.open(file, formats=FORMATS) as image,
        ):
            if image.width * image.height <= max_pixels:
                return
    except (BadFile, OSError):
        pass
    check_image_header(read_picture(path), shown, max_pixels)  # raises with its message


def has_more_pages(content: bytes) -> bool:
    """Return True if a file has several pages or frames."""
    with suppress(Exception), Image.open(io.BytesIO(content), formats=FORMATS) as image:
        return bool(getattr(image, "is_animated", False))
    return False


def is_large(size: Sequence[int]) -> bool:
    """Return True if an image of (height, width) or (width, height) needs much memory."""
    return size[0] * size[1] >= _LARGE_PIXELS


def decode_bytes(
    content: bytes, name: str, max_pixels: int = ImageFolder.max_pixels
) -> NDArray[np.uint8]:
    """Decode an image to (H, W, 3) uint8, rotated upright according to its EXIF orientation.

    Gray becomes RGB with equal channels, 16-bit gray by its upper 8 bits. Transparency is dropped,
    as in torchvision's loader. Raises DatasetError with `name` if the image cannot be decoded, has
    too many pixels, or needs more memory than is free.
    """
    return np.asarray(decode_picture(content, name, max_pixels))


def decode_picture(
    content: bytes, name: str, max_pixels: int = ImageFolder.max_pixels
) -> Image.Image | NDArray[np.uint8]:
    """Return the pixels of `decode_bytes`, as Pillow's image if it is not large.

    Cropping a Pillow image is faster than cropping an array, into which all pixels are copied.
    """
    try:
        return _decode(content, name, max_pixels)
    except Undecodable as error:
        if (bare := without_metadata(content)) is not None:
            with suppress(Undecodable):
                return _decode(bare, name, max_pixels)
        raise error from None


def _decode(content: bytes, name: str, max_pixels: int) -> Image.Image | NDArray[np.uint8]:
    with _opened(content, name, max_pixels) as image:
        if not is_large(image.size):
            upright = _as_rgb(image, name)
            upright.load()
            return upright
        with _one_large:
            _check_memory(image.width * image.height, name)
            return _in_strips(_as_rgb(image, name))


def check_image_header(content: bytes, name: str, max_pixels: int) -> None:
    """Raise DatasetError if bytes that are about to be copied do not begin like an image.

    A symbolic link in an untrusted folder may lead to any of the user's files.
    """
    try:
        with _opened(content, name, max_pixels):
            pass
    except Undecodable as error:
        if (bare := without_metadata(content)) is None:
            raise
        with suppress(Undecodable), _opened(bare, name, max_pixels):
            return
        raise error from None


@contextmanager
def _opened(content: bytes, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image with Pillow; any error raised in the context becomes a DatasetError."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_num_pixels(image, max_pixels, name)
            yield image
    except DatasetError:
        raise
    except UnidentifiedImageError:
        raise _not_an_image(content, name) from None
    except Exception as error:  # decoders raise almost any exception for damaged files
        raise Undecodable(f"cannot read the image {name}: {one_line(error)}") from None


def _not_an_image(content: bytes, name: str) -> Undecodable:
    what, fix = f"its format is not one of {', '.join(FORMATS)}", None
    if not content:
        what = "it is empty"
    elif (found := find_stand_in(content[:HEAD_BYTES], Path(name))) is not None:
        what = f"it {found.what}"
        fix = found.fix if os.path.lexists(name) else None  # not a member of an archive
    return Undecodable(f"cannot read the image {name}: {what}", fix=fix)


def _check_num_pixels(image: Image.Image, max_pixels: int, name: str) -> None:
    if image.width * image.height > max_pixels:
        raise DatasetError(
            f"{name} has {image.width:,} x {image.height:,} pixels, more than dataset.max_pixels "
            f"({max_pixels:,})",
            fix="make it smaller, remove it, or raise dataset.max_pixels",
        )


def _check_memory(num_pixels: int, name: str) -> None:
    needed, free = num_pixels * _BYTES_PER_PIXEL, free_memory()
    if needed > free:
        raise DatasetError(
            f"{name}: decoding its {num_pixels:,} pixels takes {format_size(needed)} of memory, "
            f"but {format_size(free)} is free",
            fix="make it smaller, or run with fewer --workers",
        )


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    image.load()
    file_format, upright = image.format, image
    if (method := _TURNS.get(_orientation(image))) is not None:
        upright = image.transpose(method)
        image.close()  # free its pixels
    upright = _of_eight_bits(upright, file_format, name)
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # from a palette, Pillow drops it only this way
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, ignoring other entries, which may be invalid; 1 on any error."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata can raise any exception in Pillow
        return find_orientation(image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b"")


def _of_eight_bits(image: Image.Image, file_format: str | None, name: str) -> Image.Image:
    """Convert 16-bit gray to 8 bits; Pillow would clip it, which makes most of it white.

    Pillow reads such PNG files in mode I;16, and such PGM files, scaled to 16 bits, in mode I.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DatasetError(
            f"{name} has 32-bit pixels (Pillow's mode {image.mode}) with an unknown range from "
            f"black to white",
            fix="convert it to gray or RGB with 8 or 16 bits",
        )
    return image


def _in_strips(image: Image.Image) -> NDArray[np.uint8]:
    """Copy an image to an array in strips; np.asarray would need two more copies in memory."""
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    for top in range(0, image.height, _STRIP_ROWS):
        bottom = min(top + _STRIP_ROWS, image.height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return pixels
