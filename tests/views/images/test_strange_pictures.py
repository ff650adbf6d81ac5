"""Untrusted image folders: one message with the file's name, no started program, no hang."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from teach_once.configs.schema import CenterCrop
from teach_once.views.augment.crops import center_crop
from teach_once.views.images import decode as pictures
from teach_once.views.images.decode import decode_bytes
from teach_once.views.images.folders import image_folder
from teach_once.views.splits import DatasetError
from tests.support.datasets.image_folders import write_image_folder
from tests.support.project import ROOT


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(DatasetError) as caught:
        call()
    return str(caught.value)


def encoded(image: Image.Image, file_format: str) -> bytes:
    target = io.BytesIO()
    image.save(target, format=file_format)
    return target.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG file of that size without any pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("file_format", ["EPS", "PDF", "ICO", "TGA", "PCX"])
def test_only_named_formats_are_opened(
    file_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encoded(Image.new("RGB", (8, 8)), file_format)
    program = tmp_path / "gs"  # what Pillow would start for EPS
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert "its format is not one of BMP, GIF, JPEG" in refusal(
        lambda: decode_bytes(content, "cat/1.jpg")
    )
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("file_format", pictures.FORMATS)
def test_named_formats_are_opened_whatever_the_file_is_called(file_format: str) -> None:
    content = encoded(Image.new("RGB", (8, 6), (200, 10, 30)), file_format)
    assert decode_bytes(content, "1.jpg").shape == (6, 8, 3)


def test_an_image_of_too_many_pixels_is_refused_by_its_header() -> None:
    told = refusal(lambda: decode_bytes(png_header(60_000, 60_000), "cat/1.png"))
    assert "cat/1.png has 60,000 x 60,000 pixels, more than dataset.max_pixels (178" in told
    assert "raise dataset.max_pixels" in told
    small = encoded(Image.new("RGB", (20, 10)), "PNG")
    assert decode_bytes(small, "1.png", max_pixels=200).shape == (10, 20, 3)
    assert "max_pixels (199)" in refusal(lambda: decode_bytes(small, "1.png", max_pixels=199))


def test_an_image_for_which_memory_is_short_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_LARGE_PIXELS", 100)
    content = encoded(Image.new("RGB", (20, 10)), "PNG")
    monkeypatch.setattr(pictures, "free_memory", lambda: 1600)
    assert decode_bytes(content, "1.png").shape == (10, 20, 3)
    monkeypatch.setattr(pictures, "free_memory", lambda: 1599)
    told = refusal(lambda: decode_bytes(content, "1.png"))
    assert "1.png: decoding its 200 pixels takes 1.6 kB of memory, but 1.6 kB is free" in told


def test_a_large_image_has_the_pixels_that_pillow_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_LARGE_PIXELS", 100)
    monkeypatch.setattr(pictures, "_STRIP_ROWS", 7)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    assert (decode_bytes(encoded(Image.fromarray(pixels), "PNG"), "1.png") == pixels).all()


LARGE = """
import sys
from pathlib import Path
from teach_once.runtime.command.cost import peak_memory
from teach_once.views.images.folders import image_folder
images = image_folder(Path(sys.argv[1])).train.images
print(images.shape, peak_memory() // 2**20)
"""


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "data", per_class=1)
    content = encoded(Image.new("RGB", (4200, 4000)), "JPEG")
    for kind in ("cat", "dog"):
        for number in range(4):
            (root / "train" / kind / f"{number:02d}.png").write_bytes(content)
    found = subprocess.run(
        [sys.executable, "-c", LARGE, root], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *_, megabytes = found.stdout.split()
    pixels = 4.2 * 4.0  # millions of an image
    held = 8 * 3 * pixels  # MB of the images themselves
    assert int(megabytes) < held + 16 * pixels + 150


def test_an_image_that_would_become_huge_by_resizing_is_refused() -> None:
    image = np.zeros((1, 1_000_000, 3), dtype=np.uint8)
    augment = CenterCrop(resize_px=256, crop_px=224)
    told = refusal(lambda: center_crop(image, augment, "cat/1.png"))
    assert "cat/1.png is 1000000x1: resized to 256 pixels on the short side" in told


def test_a_file_that_becomes_a_fifo_or_huge_is_refused_when_it_is_read(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "data")
    train = image_folder(root).train
    first = root / "train" / "cat" / "00.png"
    os.truncate(first, 2**31)
    assert "00.png has 2.1 GB, expected at most 536.9 MB" in refusal(lambda: train.images)
    first.unlink()
    os.mkfifo(first)
    for read in (lambda: train.images, lambda: train.read_digests(np.arange(1))):
        assert "00.png is a FIFO" in refusal(read)
    first.unlink()
    assert "No such file" in refusal(lambda: train.read_digests(np.arange(1)))


def test_no_flipped_bit_of_an_image_is_a_traceback() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    image.info["comment"] = b"x"
    for file_format in pictures.FORMATS:
        content = encoded(image, file_format)
        for position in rng.integers(0, 8 * len(content), 150):
            flipped = bytearray(content)
            flipped[position // 8] ^= 1 << position % 8
            try:
                decoded = decode_bytes(bytes(flipped), "1.png", max_pixels=10_000)
            except DatasetError as error:
                assert str(error).startswith(("1.png", "cannot read the image 1.png"))  # noqa: PT017
            else:
                assert decoded.shape[2] == 3
