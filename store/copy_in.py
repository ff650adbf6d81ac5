"""Copies a complete cache into a folder, and goes on where an earlier copy ended.

Every chunk is verified as it is read. A block that is committed in the folder and sound is kept.
The manifest is written last, so that half a copy never passes for a cache.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from runtime.formats import format_size
from runtime.inside import make_folder_inside, write_inside
from runtime.locks import Job, WriterLock
from store.content import (
    metadata_checksums,
    remove_temporary_files,
    replace_metadata,
    write_unless_there,
)
from store.copy_out import Copied, refuse_larger
from store.disk import is_full, refusals_of
from store.errors import CacheBusy, CacheError, CacheFull, CacheMismatch, CacheMissing
from store.folder import FolderSource
from store.identity import identity_sha256
from store.journal import JournalWriter, read_journal
from store.layout import (
    LABELS,
    MANIFEST,
    PREVIEW,
    ZARR_GROUP,
    Block,
    chunk_name,
    encode_chunk,
    whole_name,
    with_checksum,
)
from store.manifest import Manifest, read_manifest, write_manifest
from store.metadata import zarr_metadata
from store.objects import in_parallel
from store.reader import TeacherCache
from store.transfer import folder_bytes

_MAKE_ROOM = "make room, then run the same command again"


def copy_to_folder(
    opened: TeacherCache, target: Path, on_chunk: Callable[[int], None] = lambda count: None
) -> Copied:
    """Copy a complete cache into the folder `target`, its own.

    on_chunk: called with the number of chunks that are done. Raises CacheMismatch where another
    cache is there, CacheBusy, CacheFull, CacheNotWritable.
    """
    try:
        with refusals_of(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _refuse_other(opened, target)
            make_folder_inside(target.parent, target.name)  # and not through a link
            lock = WriterLock(target, Job(), CacheBusy)
            try:
                return _copied(opened, target, on_chunk)
            finally:
                lock.release()
    except OSError as error:
        if isinstance(error, CacheError) or not is_full(error):
            raise
        raise CacheFull(f"the disk of {target} is too full", fix=_MAKE_ROOM) from None


def _refuse_other(opened: TeacherCache, target: Path) -> None:
    if os.path.lexists(target / MANIFEST):
        there, manifest = read_manifest(target), opened.manifest
        refuse_larger(there, manifest, str(target))
        if (there.num_views, there.taps) != (manifest.num_views, manifest.taps):
            raise CacheMismatch(
                f"{target} holds less of this cache, and a folder does not grow by copying",
                fix="remove it first, or copy to another folder",
            )
    elif not target.exists():
        needed, free = folder_bytes(opened.manifest), shutil.disk_usage(target.parent).free
        if needed > free:
            raise CacheFull(
                f"the disk of {target} is too full: {format_size(needed)} are needed, "
                f"{format_size(free)} are free",
                fix=_MAKE_ROOM,
            )


@dataclass(frozen=True)
class _Copy:
    """One copy on its way. there: the target as it was. shared: checksums of all views' arrays."""

    opened: TeacherCache
    there: FolderSource
    shared: dict[tuple[str, int], int] = field(default_factory=dict)

    def block(self, block: Block) -> tuple[Block, dict[str, int], int]:
        """Copy what the target lacks of a block: the checksums of all, and how many were copied.

        No checksums: there was nothing to copy.
        """
        manifest, checksums, num_copied = self.opened.manifest, {}, 0
        for array, spec in manifest.arrays.items():
            key = (array, block.index)
            if spec.all_views and block.view:
                checksums[array] = self.shared[key]
                num_copied += not self.there.journal.there[array][block.view, block.index]
                continue
            if self._is_there(array, block):
                checksums[array] = int(self.there.journal.crc32c[array][block.view, block.index])
            else:
                rows = np.empty((manifest.rows_in(spec, block), *spec.shape), spec.dtype)
                self.opened.source.read(array, block, rows)
                data, checksums[array] = encode_chunk(rows, spec, manifest.chunk_rows(spec))
                write_inside(self.there.path, chunk_name(array, spec, block), data)
                num_copied += 1
            if spec.all_views:
                self.shared[key] = checksums[array]
        return block, checksums if num_copied else {}, num_copied

    def _is_there(self, array: str, block: Block) -> bool:
        """Whether the target has committed the chunk, it is sound, and the source's own."""
        position = (block.view, block.index)
        if not self.there.journal.there[array][position]:
            return False
        if self.there.fault_of(array, block) is not None:
            return False
        source, ours = self.opened.source, self.there.journal.crc32c[array][position]
        if isinstance(source, FolderSource) and source.journal.crc32c[array][position] != ours:
            raise CacheMismatch(
                f"{self.there.path} holds the records of another pass of the same teacher",
                fix="remove it first, or copy to another folder",
            )
        return True


def _copied(opened: TeacherCache, target: Path, on_chunk: Callable[[int], None]) -> Copied:
    remove_temporary_files(target, opened.manifest)
    metadata = zarr_metadata(opened.manifest)
    manifest = metadata_checksums(opened.manifest, metadata)
    there = _manifest_there(target)
    if there is not None and there.zarr_crc32c != manifest.zarr_crc32c:
        replace_metadata(target, manifest)  # spelled by another zarr; readers find either sound
    for name, text in metadata.items():
        write_unless_there(target, f"{ZARR_GROUP}/{name}", text)
    for name, values in ((LABELS, opened.labels), (PREVIEW, opened.preview)):
        write_unless_there(target, whole_name(name, values.ndim), with_checksum(values).tobytes())
    copy = _Copy(opened, FolderSource(target, manifest, read_journal(target, manifest)))
    journal, counts = JournalWriter(target, identity_sha256(manifest.identity)), Copied()
    num_arrays = len(manifest.arrays)
    try:
        for view in range(manifest.num_views):
            blocks = [manifest.block(view, i) for i in range(manifest.blocks_per_view)]
            for block, checksums, num_copied in in_parallel(copy.block, blocks):
                if checksums:
                    journal.commit(block, checksums)
                counts.copied += num_copied
                counts.kept += num_arrays - num_copied
                on_chunk(num_arrays)
    finally:
        journal.close()
    if _manifest_there(target) != manifest:
        write_manifest(target, manifest)
    return counts


def _manifest_there(target: Path) -> Manifest | None:
    try:
        return read_manifest(target)
    except CacheMissing:
        return None
