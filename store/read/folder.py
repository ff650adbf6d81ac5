"""A cache in a folder of zarr chunks, which are read straight into arrays and checked.

Plain zarr slicing gives the same values. This path skips its copies, and also compares each
checksum with the journal's, which finds a chunk that was exchanged for another sound one.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from teach_once.runtime.safe.confined import listed_inside
from teach_once.runtime.safe.text import one_line
from teach_once.store.errors import CacheDamaged, Fault, TeacherPass, damage_as_error, damage_error
from teach_once.store.format.journal import ChunkKey, Coverage, Journal, read_journal
from teach_once.store.format.manifest import Manifest, read_manifest, refuse_other_name
from teach_once.store.format.metadata import metadata_faults
from teach_once.store.format.spec import (
    CHECKSUM_BYTES,
    LABELS,
    ZARR_GROUP,
    Block,
    chunk_path,
    crc_hex,
    tap_of,
    whole_name,
)
from teach_once.store.format.values import Check, Seen, checked_read, label_fault
from teach_once.store.place.parallel import in_threads
from teach_once.store.read.chunks import map_file, read_chunk, size_fault

Result = TypeVar("Result")


@dataclass(frozen=True)
class FolderSource:
    """Reads the arrays of a cache folder. The methods are those of `store.read.source.Source`."""

    path: Path
    manifest: Manifest
    journal: Journal
    _seen: Seen = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path, manifest: Manifest | None = None) -> FolderSource:
        """Read the journal, and the manifest if it is not given.

        Raises CacheMissing, CacheDamaged, CacheMismatch.
        """
        if manifest is None:
            manifest = read_manifest(path)
            refuse_other_name(path, manifest)
        with damage_as_error(manifest.teacher):
            _refuse_names_without_text(path, manifest.teacher)
            return cls(path, manifest, read_journal(path, manifest))

    @property
    def unreadable_lines(self) -> list[str]:
        return self.journal.damaged_lines

    @property
    def coverage(self) -> Coverage:
        return Coverage(self.manifest, self.journal.there)

    def read(self, array: str, block: Block, out: NDArray[Any]) -> None:
        if (fault := self.fault_of(array, block, out)) is not None:
            raise self.damaged(fault)

    def verify(self, array: str, block: Block) -> None:
        if (fault := self.fault_of(array, block)) is not None:
            raise self.damaged(fault)

    def fetch(self, chunks: Sequence[tuple[str, Block]]) -> None:
        """Nothing to do: a folder's chunks are here."""

    def damaged(self, fault: Fault) -> CacheDamaged:
        """The error that names a fault, and what repairs it."""
        return damage_error(self.fix, [fault])

    @property
    def fix(self) -> TeacherPass:
        return TeacherPass(self.manifest.teacher, caches=self.path.parent, recheck=True)

    def mapped(self, array: str, block: Block) -> NDArray[Any]:
        spec = self.manifest.arrays[array]
        path = chunk_path(self.path, array, spec, block)
        what = size_fault(path, self.manifest.chunk_file_bytes(spec))
        if what is not None:
            raise self.damaged(Fault(what, path, array, block.view, block.index))
        shape = (self.manifest.rows_in(spec, block), *spec.shape)
        return map_file(path, spec.dtype, shape)

    def read_whole(self, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        values, fault = self._whole(name, shape, dtype)
        if fault is not None:
            raise self.damaged(fault)
        return values

    def _whole(
        self, name: str, shape: tuple[int, ...], dtype: str
    ) -> tuple[NDArray[Any], Fault | None]:
        """The array, and what is wrong with it."""
        path = self.path / whole_name(name, len(shape))
        size = math.prod(shape) * np.dtype(dtype).itemsize + CHECKSUM_BYTES
        if (what := self._size_fault(path, size)) is not None:
            return np.empty(0, dtype), Fault(f"{name}: {what}", path)
        values = np.empty(shape, dtype)
        if self._read(path, values, size, self.manifest.whole_crc32c[name]) is not None:
            return values, Fault(f"{name} damaged", path)
        what = label_fault(values, len(self.manifest.class_names)) if name == LABELS else None
        return values, Fault(f"{name}: {what}", path) if what else None

    def fault_of(self, array: str, block: Block, out: NDArray[Any] | None = None) -> Fault | None:
        """Read one committed chunk, into `out` if given; what is wrong with it, or None."""
        spec = self.manifest.arrays[array]
        path = chunk_path(self.path, array, spec, block)
        size = self.manifest.chunk_file_bytes(spec)
        committed = crc_hex(int(self.journal.crc32c[array][block.view, block.index]))
        if spec.all_views and self._disagreeing[array][block.index]:
            return Fault("differs between views", path, array, block.view, block.index)

        def read(wanted: NDArray[Any] | None, num_bytes: int, check: Check | None) -> str | None:
            return self._read(path, wanted, size, committed, num_bytes, check)

        what = checked_read(self.manifest, array, block, out, self._seen, read)
        return Fault(what, path, array, block.view, block.index) if what else None

    def _read(
        self,
        path: Path,
        out: NDArray[Any] | None,
        size: int,
        committed: str,
        value_bytes: int | None = None,
        check: Check | None = None,
    ) -> str | None:
        """As `read_chunk`."""
        return read_chunk(path, out, size, committed, value_bytes=value_bytes, check=check)

    def _size_fault(self, path: Path, size: int) -> str | None:
        return size_fault(path, size)

    def _metadata_faults(self) -> list[Fault]:
        return metadata_faults(self.path, self.manifest)

    @cached_property
    def _disagreeing(self) -> dict[str, NDArray[np.bool_]]:
        """Array that is the same in all views -> (blocks,), whether its checksums differ."""
        return {
            array: _differ(self.journal.crc32c[array], self.journal.there[array])
            for array, spec in self.manifest.arrays.items()
            if spec.all_views
        }

    def faults(
        self,
        *,
        every_byte: bool,
        num_views: int | None = None,
        on_chunk: Callable[[int], None] | None = None,
    ) -> list[Fault]:
        views = self.manifest.num_views if num_views is None else num_views
        sizes = {
            name: self.manifest.chunk_file_bytes(spec)
            for name, spec in self.manifest.arrays.items()
        }
        there = self.journal.there
        to_read = sum(sizes[a] * int(np.count_nonzero(t[:views])) for a, t in there.items())
        faults = []

        def checked(key: ChunkKey) -> tuple[str, Fault | None]:
            return key[0], self._checked(key, every_byte)

        for array, fault in self._at_once(checked, self._keys(views), to_read * every_byte):
            if on_chunk is not None:
                on_chunk(sizes[array])
            if fault is not None:
                faults.append(fault)
        whole = self._whole_faults() if every_byte else []
        return self.metadata_faults(self.manifest.taps) + whole + faults

    def _at_once(
        self, check: Callable[[ChunkKey], Result], keys: Iterable[ChunkKey], num_bytes: int
    ) -> Iterator[Result]:
        """check(key) of each, in order. num_bytes: that are read for all."""
        return in_threads(check, keys, num_bytes)

    def metadata_faults(self, taps: Collection[str]) -> list[Fault]:
        others = set(self.manifest.taps) - set(taps)
        arrays = {name for name in self.manifest.arrays if tap_of(name) in others}
        return [fault for fault in self._metadata_faults() if fault.file.parent.name not in arrays]

    def _whole_faults(self) -> list[Fault]:
        faults = (self._whole(name, *shape)[1] for name, shape in self.manifest.whole.items())
        return [fault for fault in faults if fault is not None]

    def _keys(self, num_views: int) -> Iterable[ChunkKey]:
        """The committed chunks of the first views, listed view by view."""
        for array, there in self.journal.there.items():
            for view in np.flatnonzero(there[:num_views].any(axis=1)).tolist():
                for block in np.flatnonzero(there[view]).tolist():
                    yield array, view, block

    def _checked(self, key: ChunkKey, every_byte: bool) -> Fault | None:
        array, view, index = key
        block = self.manifest.block(view, index)
        return self.fault_of(array, block) if every_byte else self.size_fault(array, block)

    def size_fault(self, array: str, block: Block) -> Fault | None:
        spec = self.manifest.arrays[array]
        path = chunk_path(self.path, array, spec, block)
        what = self._size_fault(path, self.manifest.chunk_file_bytes(spec))
        return Fault(what, path, array, block.view, block.index) if what else None


def _differ(crc32c: NDArray[np.uint32], there: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(views, blocks) checksums -> (blocks,): whether those that are there differ."""
    lowest = np.where(there, crc32c, np.uint32(2**32 - 1)).min(axis=0)
    return np.asarray(there.any(axis=0) & (lowest < np.where(there, crc32c, 0).max(axis=0)))


def _refuse_names_without_text(cache: Path, teacher: str) -> None:
    """Raise CacheDamaged where the zarr group holds a name that zarr itself could not list."""
    try:
        names = listed_inside(cache, ZARR_GROUP)
    except FileNotFoundError:
        return
    for name in names:
        if any("\udc80" <= character <= "\udcff" for character in name):  # as os.fsdecode says it
            octal = "".join(f"\\{byte:03o}" for byte in os.fsencode(name))
            command = f"rm -r {shlex.quote(str(cache / ZARR_GROUP))}/$'{octal}' && "
            raise CacheDamaged(
                f"{one_line(cache / ZARR_GROUP / name)} is a name that is not UTF-8: zarr cannot "
                "list the group",
                fix=TeacherPass(teacher, before=command),
            )
