"""Invalid and oversized images."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from tests.support.attacks.strangers.changes.change import Change, byte_rewrites, rewriting
from tests.support.attacks.strangers.changes.places import place_changes

_EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    b"(PWNED) (w) file closefile\nshowpage\n%%EOF\n"
)


def image_changes(file: Path) -> Iterator[Change]:
    for name, content in _pictures():
        yield Change("picture", name, rewriting(lambda old, content=content: content))
    for kind, name, rewrite in byte_rewrites(file.read_bytes()):
        yield Change(kind, name, rewriting(rewrite))
    yield from place_changes(is_folder=False)


def _pictures() -> Iterator[tuple[str, bytes]]:
    yield "is an EPS, which a program would run", _EPS
    yield "is text", b"this is no picture"
    yield "claims 13,000 x 13,000 pixels", _png(13_000, 13_000)
    yield "claims 2 billion x 2 billion pixels", _png(2**31 - 1, 2**31 - 1)
    yield "claims no pixels", _png(0, 8)
    yield "claims 100,000 x 1 pixels", _png(100_000, 1)
    yield "has a long text inside", _png(8, 8, _text_chunk())
    for kind in ("GIF", "TIFF", "BMP", "PPM", "ICO", "PDF", "WEBP", "JPEG2000"):
        yield f"is a {kind}", _saved(kind)
    for mode in ("1", "L", "P", "LA", "RGBA", "CMYK", "I", "F", "I;16"):
        yield f"has the mode {mode}", _saved("TIFF", mode)


def _saved(kind: str, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (8, 8)).save(out, kind)
    return out.getvalue()


def _png(width: int, height: int, more: bytes = b"") -> bytes:
    """Return a PNG whose header claims a size, with a few real bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(8 * 25))
    chunks = _chunk(b"IHDR", header) + more + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


@functools.cache
def _text_chunk() -> bytes:
    return _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000)))
