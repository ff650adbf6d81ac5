"""Photographs of ImageNet's usual size, made up: 500x375 pixels, JPEG files of about 110 kB.

CIFAR-10's pictures enlarged, where they are in data/cifar10; else pictures with the spectrum of
natural images (amplitude falling as 1 / frequency). Noise is added until the file has its size,
since the time that decoding takes depends on the bytes more than on what is seen.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT = 500, 375
FILE_BYTES = 110_000
_QUALITY = 90
_TRIALS = 6
_MOST_NOISE = 64.0  # standard deviation, of 255
CIFAR = Path("data/cifar10/train")

Floats = NDArray[np.float64]


def photographs(count: int, seed: int = 0, file_bytes: int = FILE_BYTES) -> Iterator[bytes]:
    """`count` different JPEG files of `file_bytes`, within a few per cent."""
    rng = np.random.default_rng(seed)
    files = sorted(CIFAR.glob("*/*.jpg"))[:: max(1, 50_000 // max(count, 1))]
    for number in range(count):
        pixels = _enlarged(files[number % len(files)]) if files else _natural(rng)
        yield _of_size(pixels, rng.normal(size=pixels.shape), file_bytes)


def origin() -> str:
    """What `photographs` makes them of, in words."""
    return "enlarged CIFAR-10 pictures" if CIFAR.is_dir() else "made-up pictures"


def _enlarged(file: Path) -> Floats:
    with Image.open(file) as small:
        large = small.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    return np.asarray(large, dtype=np.float64)


def _natural(rng: np.random.Generator) -> Floats:
    """(HEIGHT, WIDTH, 3): brightness common to the channels, and a weaker colour in each."""
    rows, columns = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]
    frequency = np.maximum(np.hypot(rows, columns), 1 / WIDTH)
    channels = []
    for _ in range(4):
        waves = np.fft.rfft2(rng.normal(size=(HEIGHT, WIDTH))) / frequency
        plane = np.fft.irfft2(waves, s=(HEIGHT, WIDTH))
        channels.append(plane / plane.std())
    brightness, *colours = channels
    return np.stack([128 + 45 * brightness + 15 * colour for colour in colours], axis=-1)


def _of_size(pixels: Floats, noise: Floats, file_bytes: int) -> bytes:
    """The JPEG file with as much noise as gives it that size: halving an interval."""
    low, high, encoded = 0.0, _MOST_NOISE, b""
    for _ in range(_TRIALS):
        middle = (low + high) / 2
        encoded = _encoded(pixels + middle * noise)
        low, high = (middle, high) if len(encoded) < file_bytes else (low, middle)
    return encoded


def _encoded(pixels: Floats) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    picture.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
