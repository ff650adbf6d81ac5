"""Reads one chunk file and checks every byte of it; or maps it into memory."""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any, cast

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from store.layout import CHECKSUM_BYTES, crc_hex

_PIECE_BYTES = 256 * 1024


def read_chunk(path: Path, out: NDArray[Any] | None, size: int, committed: str) -> str | None:
    """Read one chunk file, into `out` if given; None if every byte is right, else what is wrong.

    size: bytes that the file must have. committed: its checksum in the journal. The checksum is
    computed piece by piece, while a piece is still in the processor's cache.
    """
    payload_bytes = size - CHECKSUM_BYTES
    wanted = np.empty(0, np.uint8) if out is None else out.reshape(-1).view(np.uint8)
    scratch = np.empty(min(_PIECE_BYTES, max(payload_bytes, CHECKSUM_BYTES)), dtype=np.uint8)
    checksum = done = 0
    try:
        with path.open("rb", buffering=0) as file:
            while done < payload_bytes:
                end = min(done + _PIECE_BYTES, payload_bytes)
                if done < wanted.size:  # the rows of `out`, then padding
                    end = min(end, wanted.size)
                    piece = wanted[done:end]
                else:
                    piece = scratch[: end - done]
                if _read_into(file, piece) < end - done:
                    return f"chunk is truncated: expected {size:,} bytes"
                checksum = int(google_crc32c.extend(checksum, piece))
                done = end
            trailer = file.read(CHECKSUM_BYTES + 1)
    except FileNotFoundError:
        return "chunk missing"
    except OSError as error:
        return f"chunk unreadable ({error.strerror})"
    if len(trailer) != CHECKSUM_BYTES:
        return f"chunk has the wrong size: expected {size:,} bytes"
    if checksum != int.from_bytes(trailer, "little"):
        return "wrong checksum"
    if crc_hex(checksum) != committed:
        return "checksum differs from the journal's"
    return None


def _read_into(file: Any, part: NDArray[np.uint8]) -> int:
    view = memoryview(cast(Any, part))
    total = 0
    while total < len(view):
        got = file.readinto(view[total:])
        if not got:
            break
        total += got
    return total


def map_file(path: Path, dtype: str, shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
    """An array of little-endian values in a file, read-only, mapped from byte `offset` on.

    Needs no open file afterwards: a system allows far more maps than files.
    """
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    little = np.dtype(dtype).newbyteorder("<")
    return np.frombuffer(content, little, math.prod(shape), offset).reshape(shape)


def size_fault(path: Path, expected_bytes: int) -> str | None:
    """What is wrong with a chunk file as far as its size tells."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "chunk missing"
    return (
        None if size == expected_bytes else f"chunk has {size:,} bytes, expected {expected_bytes:,}"
    )
