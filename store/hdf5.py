"""A cache as one HDF5 file: for sharing, and for clusters that limit the number of files.

Plain h5py: one contiguous dataset per array, the manifest as a string dataset, and per array an
attribute with the crc32c of each block's rows. One process writes the file, and nothing changes it
afterwards: only a folder can grow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from runtime.files import written_aside
from runtime.program import program_text
from store.chunks import map_file
from store.coverage import Coverage
from store.errors import CacheDamaged, CacheError, CacheMissing
from store.faults import Fault, damage_error
from store.layout import (
    FORMAT_NAME,
    Block,
    crc32c,
    crc_hex,
    tap_of,
)
from store.manifest import Manifest, manifest_text, parse_manifest

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MANIFEST = "manifest"
_BLOCK_CRC = "block_crc32c"


def is_hdf5(path: Path) -> bool:
    """Whether the file claims to be HDF5."""
    with path.open("rb") as file:
        return file.read(len(_SIGNATURE)) == _SIGNATURE


@dataclass(frozen=True)
class Hdf5Source:
    """Reads the arrays of an exported cache. The methods are those of `store.source.Source`.

    Opens the file for each read, so `fork` is safe.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Hdf5Source:
        """Raises CacheMissing (an HDF5 file, but no cache), CacheDamaged, CacheMismatch."""
        try:
            with h5py.File(path, "r") as file:
                if file.attrs.get("format") != FORMAT_NAME:
                    raise CacheMissing(f"{path} is an HDF5 file, but not a teacher cache")
                text = bytes(file[_MANIFEST][()])
        except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, CacheError):
                raise
            raise _unreadable(path, error) from None
        return cls(path, parse_manifest(text, path))

    @property
    def unreadable_lines(self) -> list[str]:
        return []  # a file has no journal

    @property
    def coverage(self) -> Coverage:
        """Everything: only a complete cache is exported, and the file renamed when it is."""
        shape = (self.manifest.num_views, self.manifest.blocks_per_view)
        whole = np.broadcast_to(np.True_, shape)
        return Coverage(self.manifest, dict.fromkeys(self.manifest.arrays, whole))

    def read(self, array: str, block: Block, out: NDArray[Any]) -> None:
        fault = self._read(array, block, out)
        if fault is not None:
            raise damage_error(self.manifest.teacher, [fault])

    def verify(self, array: str, block: Block) -> None:
        spec = self.manifest.arrays[array]
        rows = self.manifest.rows_in(spec, block)
        self.read(array, block, np.empty((rows, *spec.shape), dtype=spec.dtype))

    def mapped(self, array: str, block: Block) -> NDArray[Any]:
        shape = _shape(self.manifest, array)
        try:
            with h5py.File(self.path, "r") as file:
                offset = file[array].id.get_offset()  # of a contiguous dataset; else None
                values = map_file(self.path, file[array].dtype.str, shape, offset)
        except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
            fault = Fault(f"unreadable ({_first_line(error)})", self.path, array)
            raise damage_error(self.manifest.teacher, [fault]) from None
        rows: NDArray[Any] = values[_selection(self.manifest, array, block)]
        return rows

    def read_whole(self, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        try:
            with h5py.File(self.path, "r") as file:
                values = np.asarray(file[name][()])
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise _unreadable(self.path, error) from None
        if values.shape != shape or crc_hex(crc32c(values)) != self.manifest.whole_crc32c[name]:
            raise damage_error(self.manifest.teacher, [Fault(f"{name} damaged", self.path)])
        return values.astype(dtype, copy=False)

    def metadata_faults(self, taps: Collection[str]) -> list[Fault]:
        others = set(self.manifest.taps) - set(taps)
        arrays = [name for name in self.manifest.arrays if tap_of(name) not in others]
        return [fault for name in arrays if (fault := self._shape_fault(name))]

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
        faults += self._whole_faults()
        for array, spec in self.manifest.arrays.items():
            for block in self.manifest.blocks(views):
                rows = np.empty((self.manifest.rows_in(spec, block), *spec.shape), spec.dtype)
                if on_chunk is not None:
                    on_chunk(rows.nbytes)
                if (fault := self._read(array, block, rows)) is not None:
                    faults.append(fault)
        return faults

    def _whole_faults(self) -> list[Fault]:
        faults = []
        for name, (shape, dtype) in self.manifest.whole.items():
            try:
                self.read_whole(name, shape, dtype)
            except CacheDamaged:
                faults.append(Fault(f"{name} damaged", self.path))
        return faults

    def _read(self, array: str, block: Block, out: NDArray[Any]) -> Fault | None:
        position = (array, block.view, block.index)
        try:
            with h5py.File(self.path, "r") as file:
                data = file[array]
                data.read_direct(out, _selection(self.manifest, array, block))
                expected = int(data.attrs[_BLOCK_CRC][block.view, block.index])
        except (OSError, KeyError, RuntimeError, ValueError, TypeError, IndexError) as error:
            return Fault(f"unreadable ({_first_line(error)})", self.path, *position)
        return None if crc32c(out) == expected else Fault("wrong checksum", self.path, *position)

    def _shape_fault(self, array: str) -> Fault | None:
        spec = self.manifest.arrays[array]
        expected = _shape(self.manifest, array)
        try:
            with h5py.File(self.path, "r") as file:
                shape, dtype = file[array].shape, file[array].dtype
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            return Fault(f"unreadable ({_first_line(error)})", self.path, array)
        if (shape, dtype) == (expected, np.dtype(spec.dtype)):
            return None
        return Fault(f"array has shape {shape} and dtype {dtype}", self.path, array)


def write_hdf5(
    file_path: Path,
    manifest: Manifest,
    whole: dict[str, NDArray[Any]],
    read_block: Callable[[str, Block, NDArray[Any]], None],
) -> None:
    """Write the file so that it appears under its name when it is complete.

    whole: the arrays that are stored in one piece. read_block: fills an array's rows of a block.
    """
    with written_aside(file_path) as aside, h5py.File(aside, "w", libver="latest") as file:
        file.attrs["format"] = FORMAT_NAME
        file.create_dataset(_MANIFEST, data=np.bytes_(manifest_text(manifest)))
        for name, values in whole.items():
            file.create_dataset(name, data=values)
        for array in manifest.arrays:
            _write_array(file, manifest, array, read_block)


def _write_array(
    file: h5py.File,
    manifest: Manifest,
    array: str,
    read_block: Callable[[str, Block, NDArray[Any]], None],
) -> None:
    spec = manifest.arrays[array]
    shape = _shape(manifest, array)
    data = file.create_dataset(array, shape=shape, dtype=spec.dtype)  # contiguous by default
    checksums = np.empty((manifest.num_views, manifest.blocks_per_view), dtype="<u4")
    for block in manifest.blocks():
        rows = np.empty((manifest.rows_in(spec, block), *spec.shape), dtype=spec.dtype)
        read_block(array, block, rows)
        data.write_direct(rows, dest_sel=_selection(manifest, array, block))
        checksums[block.view, block.index] = crc32c(rows)
    data.attrs[_BLOCK_CRC] = checksums


def _selection(manifest: Manifest, array: str, block: Block) -> Any:
    """The part of the dataset that holds a block's rows."""
    spec = manifest.arrays[array]
    if spec.all_views:
        return np.s_[block.start : block.stop]
    if spec.per_block:
        return np.s_[block.view, block.index : block.index + 1]
    return np.s_[block.view, block.start : block.stop]


def _shape(manifest: Manifest, array: str) -> tuple[int, ...]:
    spec = manifest.arrays[array]
    if spec.all_views:
        return (manifest.num_samples, *spec.shape)
    rows = manifest.blocks_per_view if spec.per_block else manifest.num_samples
    return (manifest.num_views, rows, *spec.shape)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _unreadable(path: Path, error: BaseException) -> CacheDamaged:
    return CacheDamaged(
        f"{path} cannot be read as HDF5: {_first_line(error)}",
        fix=f"copy it again, or export it again: {program_text('store')} export CACHE FILE.h5",
    )
