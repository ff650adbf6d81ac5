"""Remove the metadata of image files whose pixels are valid but whose metadata is not.

Pillow fails on a text chunk that is too long or an EXIF entry that it cannot parse. A rejected file
is tried again without everything that does not affect its pixels.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"tRNS", b"eXIf")  # in addition to the critical chunks
_XMP = b"XML:com.adobe.xmp\0\0"  # not compressed
_MOST_XMP_BYTES = 2**16
_JPEG = b"\xff\xd8"
_JPEG_DROPPED = (
    *range(0xE1, 0xEE),
    0xEF,
    0xFE,
)  # APP1 to 13, 15, comments; not Adobe's APP14
_JPEG_SCAN = 0xDA
_JPEG_ALONE = (0x01, *range(0xD0, 0xD8))  # markers without a length


def without_metadata(content: bytes) -> bytes | None:
    """Return a PNG or JPEG file without metadata; None if it has none or is of another format."""
    if content.startswith(_PNG):
        bare = _PNG + b"".join(_png_chunks(content))
    elif content.startswith(_JPEG):
        bare = _JPEG + b"".join(_jpeg_segments(content))
    else:
        return None
    return bare if len(bare) < len(content) else None


def find_orientation(xmp: bytes | str) -> int:
    """Return the EXIF orientation in XMP text; 1 (upright) if there is none."""
    text = xmp if isinstance(xmp, str) else xmp.decode("latin-1")
    match = re.search(r'tiff:Orientation(="|>)([0-9])', text)
    return int(match[2]) if match else 1


def _png_chunks(content: bytes) -> Iterator[bytes]:
    position = len(_PNG)
    while position + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, position)
        kind, stop = content[position + 4 : position + 8], position + 12 + length
        data = content[position + 8 : min(stop - 4, position + 8 + _MOST_XMP_BYTES)]
        is_critical = not kind[0] & 0x20
        is_xmp = kind == b"iTXt" and length <= _MOST_XMP_BYTES and data.startswith(_XMP)
        if is_critical or ((kind in _PNG_KEPT or is_xmp) and _is_whole(content, position, stop)):
            yield content[position:stop]
        position = stop
    yield content[position:]


def _is_whole(content: bytes, start: int, stop: int) -> bool:
    expected = zlib.crc32(content[start + 4 : stop - 4]).to_bytes(4, "big")
    return content[stop - 4 : stop] == expected


def _jpeg_segments(content: bytes) -> Iterator[bytes]:
    position = len(_JPEG)
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == _JPEG_SCAN:
            break
        if marker == 0xFF or marker in _JPEG_ALONE:  # a fill byte or a marker without a length
            length = 1 if marker == 0xFF else 2
        else:
            length = 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        if marker not in _JPEG_DROPPED:
            yield content[position : position + length]
        position += length
    yield content[position:]
