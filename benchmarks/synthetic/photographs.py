"""Photographs of ImageNet's usual size, made up, and image folders of any number of them.

They are JPEG files of 500x375 pixels and about 110 kB with the spectrum of natural images, whose
amplitude falls as 1 / frequency. Noise is added until the file has its size, since decoding time
depends on the bytes more than on the contents.

A folder holds hard links to a few hundred of them: a link takes a name and no inode. File systems
allow about 65,000 links to one file (ext4): 16 million samples of 256 photographs.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from teach_once.store.errors import require_room
from teach_once.views.splits import sample_digest, stack_digests

WIDTH, HEIGHT = 500, 375
FILE_BYTES = 110_000
PHOTOGRAPHS = 256  # different ones in a large folder
_QUALITY = 90
_TRIALS = 6
_MOST_NOISE = 64.0  # standard deviation, of 255
_BYTES_PER_NAME = 100  # of a folder's entry, generously

Floats = NDArray[np.float64]


def photographs(count: int, seed: int = 0, file_bytes: int = FILE_BYTES) -> Iterator[bytes]:
    """Yield `count` different JPEG files of `file_bytes`, within a few percent."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        pixels = _natural(rng)
        yield _encode_to_size(pixels, rng.normal(size=pixels.shape), file_bytes)


def _natural(rng: np.random.Generator) -> Floats:
    """Return (HEIGHT, WIDTH, 3): brightness common to all channels plus a weaker color in each."""
    rows, columns = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]
    frequency = np.maximum(np.hypot(rows, columns), 1 / WIDTH)
    channels = []
    for _ in range(4):
        waves = np.fft.rfft2(rng.normal(size=(HEIGHT, WIDTH))) / frequency
        plane = np.fft.irfft2(waves, s=(HEIGHT, WIDTH))
        channels.append(plane / plane.std())
    brightness, *colors = channels
    return np.stack([128 + 45 * brightness + 15 * color for color in colors], axis=-1)


def _encode_to_size(pixels: Floats, noise: Floats, file_bytes: int) -> bytes:
    """Encode a JPEG file with enough noise to reach that size, by bisection."""
    low, high, encoded = 0.0, _MOST_NOISE, b""
    for _ in range(_TRIALS):
        middle = (low + high) / 2
        picture, buffer = (pixels + middle * noise).clip(0, 255).astype(np.uint8), io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=_QUALITY)
        encoded = buffer.getvalue()
        low, high = (middle, high) if len(encoded) < file_bytes else (low, middle)
    return encoded


def photograph_folder(
    root: Path, num_samples: int, contents: Sequence[bytes], classes: int
) -> NDArray[np.uint8]:
    """Write `root/train/<class>/<n>.JPEG`, and one image per class in `root/val`.

    Returns (num_samples, 16): the digests of all training samples in order.
    """
    originals = [root / "originals" / f"{number}.JPEG" for number in range(len(contents))]
    originals[0].parent.mkdir(parents=True)
    for original, content in zip(originals, contents, strict=True):
        original.write_bytes(content)
    first = 0
    for number in range(classes):
        train, val = (root / split / f"n{number:08d}" for split in ("train", "val"))
        train.mkdir(parents=True)
        val.mkdir(parents=True)
        count = num_samples // classes + (number < num_samples % classes)
        for sample in range(first, first + count):
            name = train / f"n{number:08d}_{sample - first:06d}.JPEG"
            os.link(originals[sample % len(contents)], name)
        os.link(originals[number % len(contents)], val / f"val_{number:06d}.JPEG")
        first += count
    digests = stack_digests(map(sample_digest, contents))
    return digests[np.arange(num_samples) % len(contents)]


def check_disk(folder: Path, num_samples: int, more_bytes: int = 0) -> None:
    """Raise CacheFull if the disk of `folder` lacks room for the links and `more_bytes`."""
    num_bytes = more_bytes + _BYTES_PER_NAME * num_samples + 2 * PHOTOGRAPHS * FILE_BYTES
    fix = "set TMPDIR to a folder on a larger disk, or give fewer --samples"
    require_room(folder, num_bytes, where=folder, fix=fix)
