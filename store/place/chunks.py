"""Read one chunk and check every byte of it, or map its file into memory.

The checksum is computed piece by piece, while a piece is still in the processor's cache. A second
pass over the rows would read them from memory again.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from pathlib import Path
from typing import Any, BinaryIO, cast

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from teach_once.runtime.safe.safe_read import BadFile, open_regular
from teach_once.store.format.spec import CHECKSUM_BYTES, crc_hex
from teach_once.store.format.values import Check

_PIECE_BYTES = 256 * 1024


def read_opened(
    file: BinaryIO,
    found: int,
    out: NDArray[Any] | None,
    size: int,
    committed: str,
    value_bytes: int | None = None,
    check: Check | None = None,
) -> str | None:
    """Read an open chunk, into `out` if given. Return None if every byte is valid, else the fault.

    found: the file's bytes; size: the expected bytes. committed: its checksum in the journal.
    value_bytes: bytes of values, without padding (default: the bytes of `out`). check: checks the
    values of each piece.
    """
    if found != size:
        return wrong_size(found, size)
    wanted = np.empty(0, np.uint8) if out is None else out.reshape(-1).view(np.uint8)
    length = wanted.size if value_bytes is None else value_bytes
    checksum, bad_value = read_pieces(file, wanted, size - CHECKSUM_BYTES, length, check)
    trailer = file.read(CHECKSUM_BYTES + 1)
    if len(trailer) != CHECKSUM_BYTES:
        return f"chunk has the wrong size: expected {size:,} bytes"
    if checksum != int.from_bytes(trailer, "little"):
        return "wrong checksum"
    if crc_hex(checksum) != committed:
        return "checksum differs from the journal's"
    return bad_value


def content_fault(content: NDArray[np.uint8], size: int, committed: str) -> str | None:
    """Find the fault of a whole chunk file in memory, as `read_opened` does for a file."""
    if len(content) != size:
        return wrong_size(len(content), size)
    checksum = int(google_crc32c.value(content[:-CHECKSUM_BYTES]))
    if checksum != int.from_bytes(content[-CHECKSUM_BYTES:].tobytes(), "little"):
        return "wrong checksum"
    if crc_hex(checksum) != committed:
        return "checksum differs from the journal's"
    return None


def read_pieces(
    file: BinaryIO, wanted: NDArray[np.uint8], payload: int, value_bytes: int, check: Check | None
) -> tuple[int, str | None]:
    """Read `payload` bytes, the first into `wanted`; return their crc32c and the fault of a value.

    If the file ends early, the checksum covers the existing bytes.
    """
    scratch = np.empty(min(_PIECE_BYTES, payload), dtype=np.uint8)
    checksum = done = 0
    bad_value: str | None = None
    while done < payload:
        end = min(done + _PIECE_BYTES, payload)
        if done < value_bytes:  # the rows, then padding
            end = min(end, value_bytes)
        piece = wanted[done:end] if done < wanted.size else scratch[: end - done]
        if _read_into(file, piece) < end - done:
            break
        checksum = int(google_crc32c.extend(checksum, piece))
        if check is not None and bad_value is None and done < value_bytes:
            bad_value = check(piece)
        done = end
    return checksum, bad_value


def _read_into(file: BinaryIO, part: NDArray[np.uint8]) -> int:
    view = memoryview(cast(Any, part))
    total = 0
    while total < len(view):
        got = cast(Any, file).readinto(view[total:])
        if not got:
            break
        total += got
    return total


def map_file(
    path: Path, dtype: str, shape: tuple[int, ...], offset: int = 0, *, follow: bool = False
) -> NDArray[Any]:
    """Map values of a file into memory: a read-only array of `shape`, little-endian.

    offset: of the first value, in bytes. Only the pages of these values are mapped. They are
    unmapped with the last array that refers to them, and no file stays open: a system allows far
    more maps than open files, and Python's own `mmap` holds a descriptor for each (until 3.13).

    Raises BadFile if the file is not a regular one or ends before the last value, OSError.
    """
    little = np.dtype(dtype).newbyteorder("<")
    num_bytes = math.prod(shape) * little.itemsize
    with open_regular(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        if offset + num_bytes > size:
            raise BadFile(path, f"has {size:,} bytes, expected {offset + num_bytes:,}")
        if num_bytes == 0:
            return np.empty(shape, little)
        before = offset % mmap.ALLOCATIONGRANULARITY
        content = _map_pages(file.fileno(), offset - before, before + num_bytes)
    values: NDArray[Any] = np.frombuffer(cast(Any, content), little, math.prod(shape), before)
    values.flags.writeable = False
    return values.reshape(shape)


def _map_pages(handle: int, offset: int, num_bytes: int) -> ctypes.Array[ctypes.c_ubyte]:
    """Map a part of an open file, shared and read-only. Raises OSError (ENOMEM)."""
    address = _MMAP(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, handle, offset)
    if address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)} (mapping {num_bytes:,} bytes)")
    content = (ctypes.c_ubyte * num_bytes).from_address(address)
    weakref.finalize(content, _MUNMAP, address, num_bytes).atexit = False
    return content


_LIBC = ctypes.CDLL(None, use_errno=True)
_MMAP, _MUNMAP = _LIBC.mmap, _LIBC.munmap
_MMAP.restype = ctypes.c_void_p
_MMAP.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int64),
]
_MUNMAP.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value


def wrong_size(found: int, expected: int) -> str:
    """Describe a chunk of another size."""
    return f"chunk has {found:,} bytes, expected {expected:,}"
