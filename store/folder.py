"""A cache in a folder of zarr chunks, which are read straight into arrays and checked.

Plain zarr slicing gives the same values. This path skips its copies, and also compares each
checksum with the journal's, which finds a chunk that was exchanged for another sound one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.chunks import map_file, read_chunk, size_fault
from store.faults import Fault, damage_error
from store.identity import identity_sha256
from store.journal import ChunkKey, Journal, read_journal
from store.layout import (
    CHECKSUM_BYTES,
    Block,
    chunk_path,
    crc32c,
    tap_of,
    whole_path,
)
from store.manifest import Manifest, read_manifest, refuse_other_name
from store.metadata import metadata_faults
from store.parallel import in_threads


@dataclass(frozen=True)
class FolderSource:
    """Reads the arrays of a cache folder. The methods are those of `store.source.Source`."""

    path: Path
    manifest: Manifest
    journal: Journal

    @classmethod
    def open(cls, path: Path, manifest: Manifest | None = None) -> FolderSource:
        """Read the journal, and the manifest if it is not given.

        Raises CacheMissing, CacheDamaged, CacheMismatch.
        """
        if manifest is None:
            manifest = read_manifest(path)
            refuse_other_name(path, manifest)
        return cls(path, manifest, read_journal(path, identity_sha256(manifest.identity)))

    @property
    def unreadable_lines(self) -> list[str]:
        return self.journal.damaged_lines

    def has(self, array: str, block: Block) -> bool:
        return (array, block.view, block.index) in self.journal.committed

    def read(self, array: str, block: Block, out: NDArray[Any]) -> None:
        fault = self.fault_of(array, block, out)
        if fault is not None:
            raise damage_error(self.manifest.teacher, [fault])

    def verify(self, array: str, block: Block) -> None:
        if (fault := self.fault_of(array, block)) is not None:
            raise damage_error(self.manifest.teacher, [fault])

    def mapped(self, array: str, block: Block) -> NDArray[Any]:
        spec = self.manifest.arrays[array]
        path = chunk_path(self.path, array, spec, block)
        what = size_fault(path, self.manifest.chunk_file_bytes(spec))
        if what is not None:
            fault = Fault(what, path, array, block.view, block.index)
            raise damage_error(self.manifest.teacher, [fault])
        shape = (self.manifest.rows_in(spec, block), *spec.shape)
        return map_file(path, spec.dtype, shape)

    def read_whole(self, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        fault = self._whole_fault(name, shape, dtype)
        if fault is not None:
            raise damage_error(self.manifest.teacher, [fault])
        data = whole_path(self.path, name, len(shape)).read_bytes()[:-CHECKSUM_BYTES]
        return np.frombuffer(data, dtype=dtype).reshape(shape)

    def _whole_fault(self, name: str, shape: tuple[int, ...], dtype: str) -> Fault | None:
        file = whole_path(self.path, name, len(shape))
        try:
            data = np.frombuffer(file.read_bytes(), dtype=np.uint8)
        except FileNotFoundError:
            return Fault(f"{name} missing", file)
        payload, trailer = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
        expected_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        sums = {
            crc32c(payload),
            int(self.manifest.whole_crc32c[name], 16),
            int.from_bytes(trailer, "little"),
        }
        whole = payload.size == expected_bytes and len(sums) == 1
        return None if whole else Fault(f"{name} damaged", file)

    def fault_of(self, array: str, block: Block, out: NDArray[Any] | None = None) -> Fault | None:
        """Read one committed chunk, into `out` if given; what is wrong with it, or None."""
        spec = self.manifest.arrays[array]
        path = chunk_path(self.path, array, spec, block)
        committed = self.journal.committed[array, block.view, block.index]
        if spec.all_views and self._views_disagree(array, block.index):
            return Fault("differs between views", path, array, block.view, block.index)
        what = read_chunk(path, out, self.manifest.chunk_file_bytes(spec), committed)
        return Fault(what, path, array, block.view, block.index) if what else None

    def _views_disagree(self, array: str, index: int) -> bool:
        keys = ((array, view, index) for view in range(self.manifest.num_views))
        checksums = {self.journal.committed[key] for key in keys if key in self.journal.committed}
        return len(checksums) > 1

    def faults(
        self,
        *,
        every_byte: bool,
        num_views: int | None = None,
        on_chunk: Callable[[int], None] | None = None,
    ) -> list[Fault]:
        views = self.manifest.num_views if num_views is None else num_views
        keys = list(self._keys(views))
        sizes = {
            name: self.manifest.chunk_file_bytes(spec)
            for name, spec in self.manifest.arrays.items()
        }
        to_read = sum(sizes[array] for array, _, _ in keys) if every_byte else 0
        faults = []
        checks = in_threads(lambda key: self._checked(key, every_byte), keys, to_read)
        for (array, _, _), fault in zip(keys, checks, strict=True):
            if on_chunk is not None:
                on_chunk(sizes[array])
            if fault is not None:
                faults.append(fault)
        whole = self._whole_faults() if every_byte else []
        return self.metadata_faults(self.manifest.taps) + whole + faults

    def metadata_faults(self, taps: Collection[str]) -> list[Fault]:
        others = set(self.manifest.taps) - set(taps)
        arrays = {name for name in self.manifest.arrays if tap_of(name) in others}
        return [
            fault
            for fault in metadata_faults(self.path, self.manifest)
            if fault.file.parent.name not in arrays
        ]

    def _whole_faults(self) -> list[Fault]:
        faults = (self._whole_fault(name, *shape) for name, shape in self.manifest.whole.items())
        return [fault for fault in faults if fault is not None]

    def _keys(self, num_views: int) -> Iterable[ChunkKey]:
        """The committed chunks that the manifest plans."""
        arrays = self.manifest.arrays
        blocks = self.manifest.blocks_per_view
        for array, view, index in self.journal.committed:
            if array in arrays and view < num_views and index < blocks:
                yield array, view, index

    def _checked(self, key: ChunkKey, every_byte: bool) -> Fault | None:
        array, view, index = key
        block, spec = self.manifest.block(view, index), self.manifest.arrays[array]
        if every_byte:
            return self.fault_of(array, block)
        path = chunk_path(self.path, array, spec, block)
        what = size_fault(path, self.manifest.chunk_file_bytes(spec))
        return Fault(what, path, array, view, index) if what else None
