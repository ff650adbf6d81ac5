"""Shrink images before they are packed: a quarter of the bytes, decoded in half the time.

Afterwards the new bytes are the dataset for teacher and student alike. They depend on the versions
of Pillow and its JPEG library; the digest of the packed dataset covers the result.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import PIL
from PIL import Image, features

from teach_once.views.augment.crops import as_picture
from teach_once.views.images.decode import decode_bytes
from teach_once.views.images.encoded import EncodedSplit
from teach_once.views.images.forked import run_forked


@dataclass(frozen=True)
class Recode:
    """JPEG quality (1 to 100) and an optional limit in pixels on the short or the long side.

    An image within the limit keeps its original bytes. Without a limit all images are re-encoded.
    """

    short_side_px: int | None = None
    max_side_px: int | None = None
    quality: int = 90

    def plain(self) -> dict[str, Any]:
        """Return everything that determines the bytes, as stored in a header."""
        encoder = f"Pillow {PIL.__version__}, libjpeg {features.version('jpg')}"
        return {**self.__dict__, "encoder": encoder}

    def size_of(self, width: int, height: int) -> tuple[int, int] | None:
        """Return the new width and height; None if the image keeps its original bytes."""
        limits = ((self.short_side_px, min(width, height)), (self.max_side_px, max(width, height)))
        scales = [limit / side for limit, side in limits if limit is not None]
        if not scales:
            return width, height
        if (scale := min(scales)) >= 1:
            return None
        return max(1, round(width * scale)), max(1, round(height * scale))


def recoded(content: bytes, name: str, recode: Recode, max_pixels: int) -> bytes:
    """Return the bytes that replace an image file. Raises DatasetError with `name` on failure."""
    image = decode_bytes(content, name, max_pixels)
    height, width, _ = image.shape
    size = recode.size_of(width, height)
    if size is None:
        return content
    picture = as_picture(image)
    if size != (width, height):
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    target = io.BytesIO()
    picture.save(target, format="JPEG", quality=recode.quality)
    return target.getvalue()


_FILES_AT_ONCE = 16


class _Work:
    """The function of a pool's workers, inherited by forking, since functions cannot be sent."""

    def __init__(self, split: EncodedSplit, recode: Recode, max_pixels: int) -> None:
        self.split, self.recode, self.max_pixels = split, recode, max_pixels

    def __call__(self, start: int) -> list[bytes]:
        return [self._one(i) for i in range(start, min(start + _FILES_AT_ONCE, len(self.split)))]

    def _one(self, sample: int) -> bytes:
        name = self.split.name_of(sample)
        return recoded(self.split.read(sample), name, self.recode, self.max_pixels)


def recoded_files(
    split: EncodedSplit, recode: Recode, max_pixels: int, num_workers: int
) -> Iterator[bytes]:
    """Yield the new bytes of each file.

    num_workers: processes; 0: this process. Raises DatasetError if an image cannot be read.
    """
    starts = range(0, len(split), _FILES_AT_ONCE)
    for files in run_forked(_Work(split, recode, max_pixels), starts, num_workers):
        yield from files
