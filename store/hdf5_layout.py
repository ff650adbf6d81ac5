"""What an exported HDF5 file holds, and where: looked at before a byte of it is read.

Only plain datasets are accepted: hard links to contiguous values of the right type and shape, whose
bytes all lie in this file. HDF5 can do more (external files, virtual and linked datasets, filters,
types of its own), by which a stranger's file could copy foreign files into a cache or grow without
end. The bytes are then read where they lie, without libhdf5.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from runtime.program import program_text
from runtime.reading import BadFile, is_out_of_resources, open_regular
from runtime.text import one_line
from store.errors import CacheDamaged, CacheError, CacheMissing
from store.layout import FORMAT_NAME, Block
from store.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest

MANIFEST_DATASET = "manifest"
BLOCK_CRC = "block_crc32c"
SIGNATURE = b"\x89HDF\r\n\x1a\n"
# All that libhdf5's binding raises, also for files that are made to break it.
HDF5_ERRORS = (
    OSError,
    KeyError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
)


@dataclass(frozen=True)
class Extent:
    """Where the values of a dataset lie in the file: C order, little endian."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass
class Hdf5Layout:
    """The datasets of a file: where each lies, each block's crc32c, or what is wrong with it."""

    extents: dict[str, Extent] = field(default_factory=dict)
    checksums: dict[str, NDArray[np.uint32]] = field(default_factory=dict)  # (views, blocks)
    wrong: dict[str, str] = field(default_factory=dict)


def is_hdf5(path: Path) -> bool:
    """Whether a regular file claims to be HDF5. Raises BadFile, OSError."""
    with open_regular(path, follow=True) as file:
        return file.read(len(SIGNATURE)) == SIGNATURE


def read_hdf5_manifest(path: Path) -> Manifest:
    """Raises CacheMissing (an HDF5 file, but no cache), CacheDamaged, CacheMismatch."""
    try:
        with h5py.File(path, "r") as file:
            if not _claims_to_be_a_cache(file):
                raise CacheMissing(f"{one_line(path)} is an HDF5 file, but not a teacher cache")
            text = _manifest_text(file, path)
    except HDF5_ERRORS as error:
        if isinstance(error, CacheError):
            raise
        raise unreadable(path, error) from None
    return parse_manifest(text, path, fix=copy_again(path))


def _claims_to_be_a_cache(file: h5py.File) -> bool:
    """By its attribute `format`.

    A string of any length is not read: it lies in a heap without a checksum, in which one changed
    bit may send libhdf5 round and round. The manifest says the same.
    """
    if not h5py.h5a.exists(file.id, b"format"):
        return False
    attribute = h5py.h5a.open(file.id, b"format")
    kind = attribute.get_type()
    if not isinstance(kind, h5py.h5t.TypeStringID) or attribute.shape != ():
        return False
    if kind.is_variable_str():
        return True
    if kind.get_size() != len(FORMAT_NAME):
        return False
    value = np.empty((), dtype=f"S{len(FORMAT_NAME)}")
    attribute.read(value)
    return bool(value[()] == FORMAT_NAME.encode())


def _manifest_text(file: h5py.File, path: Path) -> bytes:
    dataset = _dataset(file, MANIFEST_DATASET)
    kind = dataset.get_type()
    if not isinstance(kind, h5py.h5t.TypeStringID) or kind.is_variable_str():
        raise ValueError(f"{MANIFEST_DATASET} is no string of fixed length")
    if dataset.shape != () or kind.get_size() > MAX_MANIFEST_BYTES:
        raise ValueError(f"{MANIFEST_DATASET} is no string of at most {MAX_MANIFEST_BYTES:,} bytes")
    extent = Extent(_offset(dataset, path, kind.get_size()), (kind.get_size(),), "uint8")
    with open_regular(path, follow=True) as raw:
        raw.seek(extent.offset)
        return raw.read(extent.num_bytes).rstrip(b"\0")


def read_layout(path: Path, manifest: Manifest, arrays: Iterable[str]) -> Hdf5Layout:
    """Where these arrays, and those stored in one piece, lie. Raises CacheDamaged."""
    layout = Hdf5Layout()
    whole = manifest.whole
    try:
        with h5py.File(path, "r") as file:
            for name in (*arrays, *whole):
                try:
                    layout.extents[name] = _extent(file, path, name, *_planned(manifest, name))
                    if name not in whole:
                        layout.checksums[name] = _checksums(file, path, manifest, name)
                except HDF5_ERRORS as error:
                    if is_out_of_resources(error):
                        raise
                    layout.wrong[name] = first_line(error)
    except HDF5_ERRORS as error:
        raise unreadable(path, error) from None
    return layout


def _planned(manifest: Manifest, name: str) -> tuple[tuple[int, ...], str]:
    """The shape and dtype that the manifest implies."""
    if name in manifest.whole:
        return manifest.whole[name]
    return shape_in_file(manifest, name), manifest.arrays[name].dtype


def shape_in_file(manifest: Manifest, array: str) -> tuple[int, ...]:
    """The shape of an array's dataset."""
    spec = manifest.arrays[array]
    if spec.all_views:
        return (manifest.num_samples, *spec.shape)
    rows = manifest.blocks_per_view if spec.per_block else manifest.num_samples
    return (manifest.num_views, rows, *spec.shape)


def first_row(manifest: Manifest, array: str, block: Block) -> int:
    """How many rows lie before those of a block in the array's dataset."""
    spec = manifest.arrays[array]
    if spec.all_views:
        return block.start
    if spec.per_block:
        return block.view * manifest.blocks_per_view + block.index
    return block.view * manifest.num_samples + block.start


def _dataset(file: h5py.File, name: str) -> h5py.h5d.DatasetID:
    """The dataset of that name, if it is a plain one. Raises KeyError, ValueError."""
    if file.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise ValueError(f"{name} is a link to something else, expected a dataset")
    found = h5py.h5o.open(file.id, name.encode())
    if not isinstance(found, h5py.h5d.DatasetID):
        raise ValueError(f"{name} is no dataset")
    properties = found.get_create_plist()
    if properties.get_layout() != h5py.h5d.CONTIGUOUS:
        raise ValueError(f"{name} is chunked, compact or virtual, expected contiguous")
    if properties.get_external_count() or properties.get_nfilters():
        raise ValueError(f"{name} lies in other files or is filtered, expected plain bytes")
    return found


def _extent(file: h5py.File, path: Path, name: str, shape: tuple[int, ...], dtype: str) -> Extent:
    dataset = _dataset(file, name)
    little = h5py.h5t.py_create(np.dtype(dtype).newbyteorder("<"))
    if dataset.shape != shape or not dataset.get_type().equal(little):
        found = f"shape {dataset.shape} and dtype {dataset.dtype}"
        raise ValueError(f"array has {found}, expected {shape} and {dtype}")
    extent = Extent(0, shape, dtype)
    return Extent(_offset(dataset, path, extent.num_bytes), shape, dtype)


def _offset(dataset: h5py.h5d.DatasetID, path: Path, num_bytes: int) -> int:
    """Where the dataset's bytes begin. Raises ValueError where they are not all in the file."""
    offset, size = dataset.get_offset(), os.stat(path).st_size
    stored = dataset.get_storage_size()
    if offset is None or stored != num_bytes or offset + num_bytes > size:
        raise ValueError(f"dataset of {num_bytes:,} bytes does not lie in a file of {size:,}")
    return int(offset)


def _checksums(file: h5py.File, path: Path, manifest: Manifest, name: str) -> NDArray[np.uint32]:
    """(views, blocks) uint32: the crc32c of each block's rows."""
    shape = (manifest.num_views, manifest.blocks_per_view)
    dataset = h5py.h5o.open(file.id, name.encode())
    if not h5py.h5a.exists(dataset, BLOCK_CRC.encode()):
        raise ValueError(f"attribute {BLOCK_CRC} is missing")
    attribute = h5py.h5a.open(dataset, BLOCK_CRC.encode())
    is_right = attribute.shape == shape and attribute.get_type().equal(h5py.h5t.STD_U32LE)
    if not is_right or 4 * math.prod(shape) > os.stat(path).st_size:
        raise ValueError(f"attribute {BLOCK_CRC} is not uint32 of shape {shape}")
    values = np.empty(shape, dtype="<u4")
    attribute.read(values)
    return values


def copy_again(path: Path) -> str:
    """The fix for a file that is not valid."""
    file = shlex.quote(str(path))
    return f"copy it again, or export it again: {program_text('store')} export CACHE {file}"


def first_line(error: BaseException) -> str:
    """Of its message, shown without control characters."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    return one_line((str(text).splitlines() or [type(error).__name__])[0])


def unreadable(path: Path, error: BaseException) -> CacheDamaged:
    """Return the error for a file that libhdf5 refuses, or that is not plain.

    Raises `error` itself if it says nothing of the file, as when too many files are open.
    """
    if is_out_of_resources(error):
        raise error
    what = error.what if isinstance(error, BadFile) else first_line(error)
    return CacheDamaged(f"{one_line(path)} cannot be read as HDF5: {what}", fix=copy_again(path))


def selection(manifest: Manifest, array: str, block: Block) -> Any:
    """The part of the dataset that holds a block's rows."""
    spec = manifest.arrays[array]
    if spec.all_views:
        return np.s_[block.start : block.stop]
    if spec.per_block:
        return np.s_[block.view, block.index : block.index + 1]
    return np.s_[block.view, block.start : block.stop]
