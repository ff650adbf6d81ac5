"""A cache as one HDF5 file: for sharing, and for clusters that limit the number of files.

One contiguous dataset per array, the manifest as a string dataset, and per array an attribute with
the crc32c of each block's rows. One process writes the file (`store.move.hdf5`), and nothing
changes it afterwards: only a folder can grow.
"""

from __future__ import annotations

import itertools
import math
import os
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from teach_once.runtime.command.program import program_text
from teach_once.runtime.safe.safe_read import BadFile, is_out_of_resources, open_regular
from teach_once.runtime.safe.text import one_line
from teach_once.store.errors import CacheDamaged, CacheError, CacheMissing, Fault, damage_error
from teach_once.store.format.journal import Coverage
from teach_once.store.format.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from teach_once.store.format.spec import FORMAT_NAME, LABELS, Block, crc_hex, tap_of
from teach_once.store.format.values import Check, Seen, checked_read, label_fault
from teach_once.store.identity import EVALUATION
from teach_once.store.place.chunks import map_file, read_pieces
from teach_once.store.place.open import place_at
from teach_once.store.place.parallel import in_threads
from teach_once.store.place.place import Item, Result

MANIFEST_DATASET = "manifest"
_MOST_EVALUATIONS = 10_000
BLOCK_CRC = "block_crc32c"
SIGNATURE = b"\x89HDF\r\n\x1a\n"
# All exceptions of libhdf5's binding, also for malicious files.
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
    """The position of a dataset's values in the file: C order, little endian."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass
class Hdf5Layout:
    """The datasets of a file: positions, crc32c of each block, and faults."""

    extents: dict[str, Extent] = field(default_factory=dict)
    checksums: dict[str, NDArray[np.uint32]] = field(default_factory=dict)  # (views, blocks)
    wrong: dict[str, str] = field(default_factory=dict)


def is_hdf5(path: Path) -> bool:
    """Return True if a regular file has the signature of HDF5. Raises BadFile, OSError."""
    with open_regular(path, follow=True) as file:
        return file.read(len(SIGNATURE)) == SIGNATURE


def read_hdf5_manifest(path: Path, group: str = "") -> Manifest:
    """Read the manifest of an HDF5 file, or of an evaluation cache in it.

    group: name of the evaluation cache's group, such as "evaluation/test-12345678".

    Raises CacheMissing if the file is not a cache, CacheDamaged, CacheMismatch.
    """
    try:
        with h5py.File(path, "r") as file:
            if not _claims_to_be_a_cache(within := _group(file, group)):
                raise CacheMissing(f"{one_line(path)} is an HDF5 file, but not a teacher cache")
            text = _manifest_text(within, path)
    except HDF5_ERRORS as error:
        if isinstance(error, CacheError):
            raise
        raise unreadable(path, error) from None
    return parse_manifest(text, path, fix=copy_again(path))


def hdf5_evaluations(path: Path) -> list[str]:
    """Return the names of the evaluation caches in an HDF5 file, in order; [] without any.

    Raises CacheDamaged if the file cannot be read.
    """
    try:
        with h5py.File(path, "r") as file:
            if EVALUATION not in file:
                return []
            names = list(itertools.islice(_group(file, EVALUATION), _MOST_EVALUATIONS))
    except HDF5_ERRORS as error:
        raise unreadable(path, error) from None
    return sorted(names)


def hdf5_group(path: Path) -> tuple[Path, str] | None:
    """Split the path of an evaluation cache in an HDF5 file, FILE.h5/evaluation/NAME.

    Returns the file and the name of the group; None for any other path.
    """
    if path.parent.name != EVALUATION or not place_at(path).is_local:
        return None
    file = path.parent.parent
    if not file.is_file() or not is_hdf5(file):
        return None
    return file, f"{EVALUATION}/{path.name}"


def _group(file: h5py.File, group: str) -> h5py.Group:
    """Open a group of the file; "": its root. Raises ValueError if a part of it is a link."""
    found = file
    for part in filter(None, group.split("/")):
        if found.id.links.get_info(part.encode()).type != h5py.h5l.TYPE_HARD:
            raise ValueError(f"{part} is a link to something else, expected a group")
        child = h5py.h5o.open(found.id, part.encode())
        if not isinstance(child, h5py.h5g.GroupID):
            raise ValueError(f"{part} is not a group")
        found = h5py.Group(child)
    return found


def _claims_to_be_a_cache(file: h5py.Group) -> bool:
    """Return True if the attribute `format` marks the file or group as a cache.

    A string of variable length is not read. It is in a heap without a checksum, where a single
    flipped bit may make libhdf5 loop endlessly. The manifest contains the same value.
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


def _manifest_text(file: h5py.Group, path: Path) -> bytes:
    dataset = _dataset(file, MANIFEST_DATASET)
    kind = dataset.get_type()
    if not isinstance(kind, h5py.h5t.TypeStringID) or kind.is_variable_str():
        raise ValueError(f"{MANIFEST_DATASET} is not a string of fixed length")
    if dataset.shape != () or kind.get_size() > MAX_MANIFEST_BYTES:
        raise ValueError(
            f"{MANIFEST_DATASET} is not a string of at most {MAX_MANIFEST_BYTES:,} bytes"
        )
    extent = Extent(_offset(dataset, path, kind.get_size()), (kind.get_size(),), "uint8")
    with open_regular(path, follow=True) as raw:
        raw.seek(extent.offset)
        return raw.read(extent.num_bytes).rstrip(b"\0")


def read_layout(
    path: Path, manifest: Manifest, arrays: Iterable[str], group: str = ""
) -> Hdf5Layout:
    """Find the datasets of these arrays and of the arrays in one piece. Raises CacheDamaged."""
    layout = Hdf5Layout()
    whole = manifest.whole
    try:
        with h5py.File(path, "r") as opened:
            file = _group(opened, group)
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
    """Return the shape and dtype that the manifest implies."""
    if name in manifest.whole:
        return manifest.whole[name]
    return shape_in_file(manifest, name), manifest.arrays[name].dtype


def shape_in_file(manifest: Manifest, array: str) -> tuple[int, ...]:
    """Return the shape of an array's dataset."""
    spec = manifest.arrays[array]
    if spec.all_views:
        return (manifest.num_samples, *spec.shape)
    rows = manifest.blocks_per_view if spec.per_block else manifest.num_samples
    return (manifest.num_views, rows, *spec.shape)


def first_row(manifest: Manifest, array: str, block: Block) -> int:
    """Return the index of a block's first row in the array's dataset."""
    spec = manifest.arrays[array]
    if spec.all_views:
        return block.start
    if spec.per_block:
        return block.view * manifest.blocks_per_view + block.index
    return block.view * manifest.num_samples + block.start


def _dataset(file: h5py.Group, name: str) -> h5py.h5d.DatasetID:
    """Open the dataset of that name. Raises KeyError, or ValueError if it is not a plain one."""
    if file.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise ValueError(f"{name} is a link to something else, expected a dataset")
    found = h5py.h5o.open(file.id, name.encode())
    if not isinstance(found, h5py.h5d.DatasetID):
        raise ValueError(f"{name} is not a dataset")
    properties = found.get_create_plist()
    if properties.get_layout() != h5py.h5d.CONTIGUOUS:
        raise ValueError(f"{name} is chunked, compact or virtual, expected contiguous")
    if properties.get_external_count() or properties.get_nfilters():
        raise ValueError(f"{name} is stored in other files or filtered, expected plain bytes")
    return found


def _extent(file: h5py.Group, path: Path, name: str, shape: tuple[int, ...], dtype: str) -> Extent:
    dataset = _dataset(file, name)
    little = h5py.h5t.py_create(np.dtype(dtype).newbyteorder("<"))
    if dataset.shape != shape or not dataset.get_type().equal(little):
        found = f"shape {dataset.shape} and dtype {dataset.dtype}"
        raise ValueError(f"array has {found}, expected {shape} and {dtype}")
    extent = Extent(0, shape, dtype)
    return Extent(_offset(dataset, path, extent.num_bytes), shape, dtype)


def _offset(dataset: h5py.h5d.DatasetID, path: Path, num_bytes: int) -> int:
    """Return the position of the dataset's bytes. Raises ValueError if some are not in the file."""
    offset, size = dataset.get_offset(), os.stat(path).st_size
    stored = dataset.get_storage_size()
    if offset is None or stored != num_bytes or offset + num_bytes > size:
        raise ValueError(f"dataset of {num_bytes:,} bytes is not in the file of {size:,}")
    return int(offset)


def _checksums(file: h5py.Group, path: Path, manifest: Manifest, name: str) -> NDArray[np.uint32]:
    """Return the crc32c of each block's rows: (views, blocks) uint32."""
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
    """Return the fix for an invalid file."""
    file = shlex.quote(str(path))
    return f"copy it again, or export it again: {program_text('store')} export CACHE {file}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without control characters."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    return one_line((str(text).splitlines() or [type(error).__name__])[0])


def unreadable(path: Path, error: BaseException) -> CacheDamaged:
    """Return the error for a file that libhdf5 refuses, or that is not a regular file.

    Raises `error` itself if the file is not its cause, as when too many files are open.
    """
    if is_out_of_resources(error):
        raise error
    what = error.what if isinstance(error, BadFile) else first_line(error)
    return CacheDamaged(f"{one_line(path)} cannot be read as HDF5: {what}", fix=copy_again(path))


def selection(manifest: Manifest, array: str, block: Block) -> Any:
    """Return the index of a block's rows in the dataset."""
    spec = manifest.arrays[array]
    if spec.all_views:
        return np.s_[block.start : block.stop]
    if spec.per_block:
        return np.s_[block.view, block.index : block.index + 1]
    return np.s_[block.view, block.start : block.stop]


@dataclass(frozen=True)
class Hdf5Source:
    """Reads the arrays of an exported cache, with the methods of `store.read.source.Source`.

    Opens the file for each read, so `fork` is safe. group: of an evaluation cache, whose
    `path` is FILE.h5/evaluation/NAME; "": the whole cache.
    """

    path: Path
    manifest: Manifest
    group: str = ""
    _seen: Seen = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> Hdf5Source:
        """Open an exported file, or an evaluation cache in it.

        Raises CacheMissing if it is not a cache, CacheDamaged, CacheMismatch.
        """
        if (found := hdf5_group(path)) is None:
            return cls(path, read_hdf5_manifest(path))
        file, group = found
        if path.name not in hdf5_evaluations(file):
            raise CacheMissing(f"{one_line(file)} has no evaluation cache {one_line(path.name)}")
        return cls(path, read_hdf5_manifest(file, group), group)

    @property
    def file(self) -> Path:
        """The HDF5 file."""
        return self.path.parent.parent if self.group else self.path

    @property
    def unreadable_lines(self) -> list[str]:
        return []  # a file has no journal

    @property
    def coverage(self) -> Coverage:
        """Everything: only complete caches are exported, and the file is renamed at the end."""
        shape = (self.manifest.num_views, self.manifest.blocks_per_view)
        whole = np.broadcast_to(np.True_, shape)
        return Coverage(self.manifest, dict.fromkeys(self.manifest.arrays, whole))

    @cached_property
    def _layout(self) -> Hdf5Layout:
        return read_layout(self.file, self.manifest, self.manifest.arrays, self.group)

    def read(self, array: str, block: Block, out: NDArray[Any]) -> None:
        if (fault := self._fault_of(array, block, out)) is not None:
            raise self._damaged(fault)

    def verify(self, array: str, block: Block) -> None:
        if (fault := self._fault_of(array, block, None)) is not None:
            raise self._damaged(fault)

    def fetch(self, chunks: Sequence[tuple[str, Block]]) -> None:
        """Do nothing: the file is local."""

    def at_once(
        self, function: Callable[[Item], Result], items: Iterable[Item], num_bytes: int
    ) -> Iterator[Result]:
        return in_threads(function, items, num_bytes)

    def mapped(self, array: str, block: Block) -> NDArray[Any]:
        extent = self._layout.extents.get(array)
        if extent is None:
            raise self._damaged(Fault(self._layout.wrong[array], self.path, array))
        spec = self.manifest.arrays[array]
        start = extent.offset + first_row(self.manifest, array, block) * spec.bytes_per_row
        shape = (self.manifest.rows_in(spec, block), *spec.shape)
        try:
            return map_file(self.file, extent.dtype, shape, start, follow=True)
        except (OSError, BadFile) as error:
            if is_out_of_resources(error):
                raise
            what = f"unreadable ({first_line(error)})"
            raise self._damaged(Fault(what, self.path, array)) from None

    def size_fault(self, array: str, block: Block) -> Fault | None:
        what = self._layout.wrong.get(array)  # a dataset without all its bytes has a fault
        return None if what is None else Fault(what, self.path, array, block.view, block.index)

    def read_whole(self, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        values, what = self._whole(name)
        if what is not None:
            raise self._damaged(Fault(what, self.path))
        return values

    def metadata_faults(self, taps: Collection[str]) -> list[Fault]:
        others = set(self.manifest.taps) - set(taps)
        arrays = [name for name in self.manifest.arrays if tap_of(name) not in others]
        wrong = read_layout(self.file, self.manifest, arrays, self.group).wrong
        return [Fault(what, self.path, name) for name, what in wrong.items()]

    def faults(
        self,
        *,
        every_byte: bool,
        num_views: int | None = None,
        on_chunk: Callable[[int], None] | None = None,
    ) -> list[Fault]:
        views = self.manifest.num_views if num_views is None else num_views
        faults = self.metadata_faults(self.manifest.taps)
        if not every_byte or faults:
            return faults
        for name in self.manifest.whole:
            if (what := self._whole(name)[1]) is not None:
                faults.append(Fault(what, self.path))
        for array, spec in self.manifest.arrays.items():
            for block in self.manifest.blocks(views):
                if on_chunk is not None:
                    on_chunk(self.manifest.rows_in(spec, block) * spec.bytes_per_row)
                if (fault := self._fault_of(array, block, None)) is not None:
                    faults.append(fault)
        return faults

    def _whole(self, name: str) -> tuple[NDArray[Any], str | None]:
        """Return an array that is stored in one piece, and its fault."""
        if name in self._layout.wrong:
            return np.empty(0), f"{name}: {self._layout.wrong[name]}"
        extent = self._layout.extents[name]
        values = np.empty(extent.shape, extent.dtype)
        pieces = self._pieces(extent.offset, extent.num_bytes, values, None)
        if isinstance(pieces, str) or crc_hex(pieces[0]) != self.manifest.whole_crc32c[name]:
            return values, f"{name} damaged"
        what = label_fault(values, self.manifest.num_classes) if name == LABELS else None
        return values, None if what is None else f"{name}: {what}"

    def _fault_of(self, array: str, block: Block, out: NDArray[Any] | None) -> Fault | None:
        def read(wanted: NDArray[Any] | None, num_bytes: int, check: Check | None) -> str | None:
            if array in self._layout.wrong:
                return self._layout.wrong[array]
            spec, extent = self.manifest.arrays[array], self._layout.extents[array]
            start = extent.offset + first_row(self.manifest, array, block) * spec.bytes_per_row
            pieces = self._pieces(start, num_bytes, wanted, check)
            if isinstance(pieces, str):
                return pieces
            expected = int(self._layout.checksums[array][block.view, block.index])
            return "wrong checksum" if pieces[0] != expected else pieces[1]

        what = checked_read(self.manifest, array, block, out, self._seen, read)
        return None if what is None else Fault(what, self.path, array, block.view, block.index)

    def _pieces(
        self, offset: int, num_bytes: int, out: NDArray[Any] | None, check: Check | None
    ) -> tuple[int, str | None] | str:
        """Return the crc32c of these bytes and the fault of a value, or the error as text."""
        wanted = np.empty(0, np.uint8) if out is None else out.reshape(-1).view(np.uint8)
        try:
            with open_regular(self.file, follow=True) as file:
                file.seek(offset)
                return read_pieces(file, wanted, num_bytes, num_bytes, check)
        except (OSError, BadFile) as error:
            if is_out_of_resources(error):
                raise
            return f"unreadable ({first_line(error)})"

    def _damaged(self, fault: Fault) -> CacheDamaged:
        return damage_error(self.fix, [fault])

    @property
    def fix(self) -> str:
        return copy_again(self.file)
