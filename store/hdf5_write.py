"""Writes a cache as one HDF5 file with plain h5py: see `store.hdf5`.

The disk's room is reserved first, because libhdf5 may crash where a write fails.
"""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from runtime.files import written_aside
from runtime.formats import format_size
from runtime.reading import BadFile
from store.errors import CacheError, CacheFull, CacheNotWritable
from store.hdf5_layout import (
    BLOCK_CRC,
    HDF5_ERRORS,
    MANIFEST_DATASET,
    first_line,
    selection,
    shape_in_file,
)
from store.layout import FORMAT_NAME, Block, crc32c
from store.manifest import Manifest, manifest_text

_SPARE_BYTES = 2**20  # for what HDF5 itself writes
_MAKE_ROOM = "make room, or export to another disk"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_hdf5(
    file_path: Path,
    manifest: Manifest,
    whole: dict[str, NDArray[Any]],
    read_block: Callable[[str, Block, NDArray[Any]], None],
) -> None:
    """Write the file so that it appears under its name when it is complete.

    whole: the arrays that are stored in one piece. read_block: fills an array's rows of a block.
    Raises CacheFull, CacheNotWritable, and CacheError where the file cannot be written.
    """
    with _refusals(file_path), written_aside(file_path) as aside:
        _reserve(aside, _most_bytes(manifest))
        with h5py.File(aside, "r+", libver="latest") as file:
            file.attrs["format"] = FORMAT_NAME
            file.create_dataset(MANIFEST_DATASET, data=np.bytes_(manifest_text(manifest)))
            for name, values in whole.items():
                file.create_dataset(name, data=values)
            for array in manifest.arrays:
                _write_array(file, manifest, array, read_block)


def _reserve(path: Path, num_bytes: int) -> None:
    """Make an empty HDF5 file that has that much room on the disk; closing it gives back the rest.

    Raises CacheFull, OSError.
    """
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        needed = f"{format_size(num_bytes)} are needed, {format_size(free)} are free"
        raise CacheFull(f"the disk of {path.parent} is too full: {needed}", fix=_MAKE_ROOM)
    with h5py.File("empty", "w", driver="core", backing_store=False, libver="latest") as empty:
        empty.flush()
        image = empty.id.get_file_image()
    with path.open("wb") as file:
        file.write(image)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, num_bytes)


def _most_bytes(manifest: Manifest) -> int:
    """More than the file will have."""
    checksums = 4 * manifest.num_views * manifest.blocks_per_view
    sizes = [manifest.whole[name] for name in manifest.whole]
    sizes += [(shape_in_file(manifest, name), a.dtype) for name, a in manifest.arrays.items()]
    values = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in sizes)
    spare = _SPARE_BYTES + 2 * checksums * len(manifest.arrays)
    return values + len(manifest_text(manifest)) + spare


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """What the system or libhdf5 refuses, as one error."""
    try:
        yield
    except (CacheError, BadFile):
        raise
    except HDF5_ERRORS as error:
        named = re.search(r"errno = (\d+)", str(error))  # libhdf5 keeps it in its text
        number = getattr(error, "errno", None) or (int(named[1]) if named else None)
        if number in _NO_ROOM:
            raise CacheFull(f"the disk of {path} is too full", fix=_MAKE_ROOM) from None
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise CacheNotWritable(
                f"{path} cannot be written: {first_line(error)}", fix="choose another folder"
            ) from None
        raise CacheError(f"{path} cannot be written: {first_line(error)}") from None


def _write_array(
    file: h5py.File,
    manifest: Manifest,
    array: str,
    read_block: Callable[[str, Block, NDArray[Any]], None],
) -> None:
    spec = manifest.arrays[array]
    shape = shape_in_file(manifest, array)
    data = file.create_dataset(array, shape=shape, dtype=spec.dtype)  # contiguous by default
    checksums = np.empty((manifest.num_views, manifest.blocks_per_view), dtype="<u4")
    for block in manifest.blocks():
        rows = np.empty((manifest.rows_in(spec, block), *spec.shape), dtype=spec.dtype)
        read_block(array, block, rows)
        data.write_direct(rows, dest_sel=selection(manifest, array, block))
        checksums[block.view, block.index] = crc32c(rows)
    data.attrs[BLOCK_CRC] = checksums
