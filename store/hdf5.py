"""A cache as one HDF5 file: for sharing, and for clusters that limit the number of files.

One contiguous dataset per array, the manifest as a string dataset, and per array an attribute with
the crc32c of each block's rows. One process writes the file (`store.hdf5_write`), and nothing
changes it afterwards: only a folder can grow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.reading import BadFile, is_out_of_resources, open_regular
from store.chunks import map_file, read_pieces
from store.coverage import Coverage
from store.errors import CacheDamaged
from store.faults import Fault, damage_error
from store.hdf5_layout import (
    Hdf5Layout,
    copy_again,
    first_line,
    first_row,
    read_hdf5_manifest,
    read_layout,
)
from store.layout import LABELS, Block, crc_hex, tap_of
from store.manifest import Manifest
from store.values import Check, Seen, checked_read, label_fault


@dataclass(frozen=True)
class Hdf5Source:
    """Reads the arrays of an exported cache. The methods are those of `store.source.Source`.

    Opens the file for each read, so `fork` is safe.
    """

    path: Path
    manifest: Manifest
    _seen: Seen = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> Hdf5Source:
        """Raises CacheMissing (an HDF5 file, but no cache), CacheDamaged, CacheMismatch."""
        return cls(path, read_hdf5_manifest(path))

    @property
    def unreadable_lines(self) -> list[str]:
        return []  # a file has no journal

    @property
    def coverage(self) -> Coverage:
        """Everything: only a complete cache is exported, and the file renamed when it is."""
        shape = (self.manifest.num_views, self.manifest.blocks_per_view)
        whole = np.broadcast_to(np.True_, shape)
        return Coverage(self.manifest, dict.fromkeys(self.manifest.arrays, whole))

    @cached_property
    def _layout(self) -> Hdf5Layout:
        return read_layout(self.path, self.manifest, self.manifest.arrays)

    def read(self, array: str, block: Block, out: NDArray[Any]) -> None:
        if (fault := self._fault_of(array, block, out)) is not None:
            raise self._damaged(fault)

    def verify(self, array: str, block: Block) -> None:
        if (fault := self._fault_of(array, block, None)) is not None:
            raise self._damaged(fault)

    def fetch(self, chunks: Sequence[tuple[str, Block]]) -> None:
        """Nothing to do: the file is here."""

    def mapped(self, array: str, block: Block) -> NDArray[Any]:
        extent = self._layout.extents.get(array)
        if extent is None:
            raise self._damaged(Fault(self._layout.wrong[array], self.path, array))
        spec = self.manifest.arrays[array]
        start = extent.offset + first_row(self.manifest, array, block) * spec.bytes_per_row
        shape = (self.manifest.rows_in(spec, block), *spec.shape)
        try:
            return map_file(self.path, extent.dtype, shape, start, follow=True)
        except (OSError, BadFile) as error:
            if is_out_of_resources(error):
                raise
            what = f"unreadable ({first_line(error)})"
            raise self._damaged(Fault(what, self.path, array)) from None

    def size_fault(self, array: str, block: Block) -> Fault | None:
        what = self._layout.wrong.get(array)  # all of a dataset's bytes are there, or it is wrong
        return None if what is None else Fault(what, self.path, array, block.view, block.index)

    def read_whole(self, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        values, what = self._whole(name)
        if what is not None:
            raise self._damaged(Fault(what, self.path))
        return values

    def metadata_faults(self, taps: Collection[str]) -> list[Fault]:
        others = set(self.manifest.taps) - set(taps)
        arrays = [name for name in self.manifest.arrays if tap_of(name) not in others]
        wrong = read_layout(self.path, self.manifest, arrays).wrong
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
        """An array that is stored in one piece, and what is wrong with it."""
        if name in self._layout.wrong:
            return np.empty(0), f"{name}: {self._layout.wrong[name]}"
        extent = self._layout.extents[name]
        values = np.empty(extent.shape, extent.dtype)
        pieces = self._pieces(extent.offset, extent.num_bytes, values, None)
        if isinstance(pieces, str) or crc_hex(pieces[0]) != self.manifest.whole_crc32c[name]:
            return values, f"{name} damaged"
        what = label_fault(values, len(self.manifest.class_names)) if name == LABELS else None
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
        """The crc32c of these bytes of the file, and a bad value; or why they cannot be read."""
        wanted = np.empty(0, np.uint8) if out is None else out.reshape(-1).view(np.uint8)
        try:
            with open_regular(self.path, follow=True) as file:
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
        return copy_again(self.path)
