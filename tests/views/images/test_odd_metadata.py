"""Photographs with valid pixels and invalid metadata, and files that are not images."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from teach_once.views.images.decode import check_image_header, decode_bytes
from teach_once.views.splits import DatasetError

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
TIFF_HEAD = b"II*\0\x08\0\0\0"


def encoded(file_format: str, **options: object) -> bytes:
    target = io.BytesIO()
    Image.fromarray(PIXELS).save(target, format=file_format, **options)
    return target.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def png_with(*chunks: bytes, at_the_end: bool = False) -> bytes:
    plain = encoded("PNG")
    place = len(plain) - 12 if at_the_end else 33
    return plain[:place] + b"".join(chunks) + plain[place:]


def exif_of(orientation: int) -> bytes:
    """EXIF with an orientation, and a resolution of -1/2 in a field of unsigned numbers."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, orientation)
    entries += struct.pack("<HHII", 0x011A, 10, 1, 38)
    return TIFF_HEAD + struct.pack("<H", 2) + entries + bytes(4) + struct.pack("<ii", -1, 2)


LONG = zlib.compress(bytes(2**20 + 1))
XMP = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="3"/>'


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize(
    "odd",
    [
        chunk(b"zTXt", b"Comment\0\0" + LONG),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + LONG),
        chunk(b"zTXt", b"Comment\0\7" + LONG[:99]),
        chunk(b"iCCP", b"profile\0\0" + LONG),
        chunk(b"pHYs", b"\0\0"),
        chunk(b"eXIf", b"no EXIF at all"),
        chunk(b"eXIf", TIFF_HEAD + b"\xff\xff"),
        chunk(b"eXIf", b""),
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nzz\n"),
        chunk(b"tEXt", b"a\0b")[:-1] + b"?",
    ],
)
def test_decode_png_with_odd_metadata_shows_its_pixels(odd: bytes, at_the_end: bool) -> None:
    content = png_with(odd, at_the_end=at_the_end)
    assert (decode_bytes(content, "a.png") == PIXELS).all()
    check_image_header(content, "a.png", 1000)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_decode_orientation_is_obeyed_next_to_a_negative_rational(
    file_format: str, orientation: int
) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {}
    plain = decode_bytes(encoded(file_format, **options), "a")
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = ImageOps.exif_transpose(
        Image.open(io.BytesIO(encoded(file_format, exif=exif, **options)))
    )
    odd = encoded(file_format, exif=b"Exif\0\0" + exif_of(orientation), **options)
    found = decode_bytes(odd, "a")
    assert (found == np.asarray(expected.convert("RGB"))).all()
    assert (found.shape == plain.shape) == (orientation not in (5, 6, 7, 8))


def test_decode_orientation_of_xmp_is_obeyed_next_to_a_long_text() -> None:
    xmp, text = chunk(b"iTXt", XMP), chunk(b"zTXt", b"Comment\0\0" + LONG)
    exif = chunk(b"eXIf", exif_of(3))
    for odd in ([xmp], [xmp, text], [xmp, chunk(b"eXIf", b"no EXIF at all")], [exif, text]):
        assert (decode_bytes(png_with(*odd), "a.png") == PIXELS[::-1, ::-1]).all()


def test_decode_jpeg_with_odd_segments_shows_its_pixels() -> None:
    plain = encoded("JPEG")
    for data in (
        b"Exif\0\0no EXIF",
        b"MPF\0II*\0\x08\0\0\0\x09\0",
        b"http://ns.adobe.com/xap/1.0/\0<",
    ):
        for marker in (b"\xff\xe1", b"\xff\xe2", b"\xff\xed"):
            segment = marker + struct.pack(">H", len(data) + 2) + data
            found = decode_bytes(plain[:2] + segment + plain[2:], "a.jpg")
            assert (found == decode_bytes(plain, "b.jpg")).all()


def test_decode_damaged_pixels_are_still_an_error() -> None:
    content = bytearray(png_with(chunk(b"zTXt", b"Comment\0\0" + LONG)))
    content[-30] ^= 255
    with pytest.raises(DatasetError, match="cannot read the image a"):
        decode_bytes(bytes(content), "a")
    with pytest.raises(DatasetError, match="cannot read the image a"):
        decode_bytes(encoded("JPEG")[:200], "a")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "it is empty"),
        (LFS, "it is a Git LFS pointer: the file itself has not been fetched"),
        (b"\n<!DOCTYPE html><html><title>404</title>", "it is an HTML page"),
        (b"\xef\xbb\xbf<html>", "it is an HTML page"),
        (
            b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>',
            "it is an error message of an object store",
        ),
        (b"GIF", "its format is not one of BMP, GIF"),
    ],
)
def test_decode_well_known_other_content_is_named(content: bytes, told: str) -> None:
    for call in (decode_bytes, lambda *given: check_image_header(*given, 100)):
        with pytest.raises(DatasetError, match=rf"cannot read the image cat/1\.jpg: {told}"):
            call(content, "cat/1.jpg")
