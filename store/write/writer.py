"""Create, resume or grow a cache, and commit whole blocks to it.

One process, or the ranks of one job, hold the folder's lock. `store.place.commit_log` explains the
order of a commit.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teach_once.runtime.safe.confined import (
    open_inside,
    remove_inside,
    remove_leftovers,
    rename_inside,
)
from teach_once.runtime.safe.locks import Job, WriterLock, releasing
from teach_once.store.errors import (
    CacheBusy,
    CacheError,
    CacheMissing,
    SamplesChanged,
    full_disk_as_error,
    full_error,
    refusals_of,
    refusing_full,
)
from teach_once.store.format.coding import stored_arrays
from teach_once.store.format.content import (
    CacheContent,
    grown_manifest,
    holds,
    lay_out,
    manifest_for,
    refuse_another,
    remove_temporary_files,
)
from teach_once.store.format.manifest import Manifest, read_manifest, write_manifest
from teach_once.store.format.metadata import metadata_faults
from teach_once.store.format.spec import (
    DIGEST_BYTES,
    SAMPLE_DIGEST,
    ZARR_GROUP,
    Block,
    chunk_name,
    encode_chunk,
)
from teach_once.store.place.commit_log import encode_chunks
from teach_once.store.place.folder import Folder
from teach_once.store.place.folder_log import FolderLog
from teach_once.store.place.index import remove_index, write_index
from teach_once.store.read.source import Source
from teach_once.store.read.zarr_source import open_folder
from teach_once.store.write.pending_blocks import (
    JobList,
    Work,
    bytes_of,
    committed_work,
    damaged_work,
    pending_work,
    read_job_list,
    with_damaged,
    write_job_list,
)
from teach_once.store.write.staging import Written


class CacheWriter:
    """Fills a cache that this process or its job has locked. A context manager."""

    def __init__(
        self, path: Path, manifest: Manifest, asked: CacheContent, lock: WriterLock, job: Job
    ) -> None:
        self.path = path
        self.manifest = manifest
        self._asked, self._lock, self._job = asked, lock, job
        self._log = FolderLog(path, manifest, job.rank)
        self.work: list[Work] = []
        self._damaged: list[Work] = []  # found by reading, not repaired yet
        self._adopted: set[tuple[Block, frozenset[str]]] = set()

    @classmethod
    def open(
        cls,
        path: Path,
        content: CacheContent,
        *,
        block_rows: int | None = None,
        check_every_byte: bool = False,
        job: Job | None = None,
    ) -> CacheWriter:
        """Create the cache at `path`, or resume it if it exists and has the same identity.

        A cache with fewer views or taps grows. A cache with more keeps them, but its other missing
        blocks stay missing. Afterwards `work` contains this process's share of the missing and
        damaged blocks. check_every_byte: find damage by reading every byte, not only by sizes.
        block_rows: a power of two, for a new cache; an existing one keeps its own. Raises
        CacheMismatch, CacheBusy, CacheNotWritable, CacheFull.
        """
        job = job or Job()
        with refusals_of(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = WriterLock(path, job, CacheBusy)
        try:
            with (
                full_disk_as_error(path, "make room, then run again", " to start"),
                refusals_of(path),
            ):
                return cls._prepared(path, content, lock, job, block_rows, check_every_byte)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _prepared(
        cls,
        path: Path,
        content: CacheContent,
        lock: WriterLock,
        job: Job,
        block_rows: int | None,
        check_every_byte: bool,
    ) -> CacheWriter:
        if not lock.leader:
            writer = cls(path, read_manifest(path), content, lock, job)
            refuse_another(path, writer.manifest, content)
            found = read_job_list(path, job, writer.manifest)
            writer._damaged = found.damaged
            left = {
                item.block for item in writer.pending()
            }  # other ranks may have done a late rank's share
            share = found.pending[job.rank :: job.world]
            writer.work = [item for item in share if item.block in left]
            return writer
        if _changes_by_opening(path, content):
            remove_index(Folder(path))
        manifest, salvaged = manifest_for(path, content, block_rows)
        writer = cls(path, lay_out(path, manifest, content), content, lock, job)
        work = writer._find_work(check_every_byte=check_every_byte or salvaged)
        if work:
            remove_index(Folder(path))
        if job.world > 1:
            write_job_list(path, job, JobList(work, writer._damaged))
        lock.let_others_in()
        writer.work = work[job.rank :: job.world]
        return writer

    @property
    def rank(self) -> int:
        """The rank of this process in its job."""
        return self._job.rank

    @property
    def spool_folder(self) -> Path:
        """The folder for records of unfinished blocks."""
        return self.path

    def unused_spool_folders(self) -> Iterator[Path]:
        """Yield the folders of such records that no other process uses, for a complete cache."""
        yield self.path

    def outstanding(self, group: Sequence[Work]) -> list[Work]:
        """Return the blocks that are not committed meanwhile: all, because the cache is locked."""
        return list(group)

    def _find_work(self, *, check_every_byte: bool) -> list[Work]:
        """Return the missing and damaged blocks; damaged ones are remembered until they are
        repaired.
        """
        source, asked = open_folder(self.path, self.manifest), self._asked
        work = pending_work(source, asked.num_views, asked.taps, check_every_byte=check_every_byte)
        self._damaged = committed_work(source, work)
        return work

    def pending(self) -> list[Work]:
        """Return every block with requested taps that are not committed, or damaged.

        Blocks that were valid when the cache was opened are only checked by size.
        """
        source, asked = open_folder(self.path, self.manifest), self._asked
        work = pending_work(source, asked.num_views, asked.taps, check_every_byte=False)
        self._damaged = damaged_work(source, self._damaged)
        return with_damaged(self.manifest, work, self._damaged)

    def left_over(self) -> list[Work] | None:
        """Return the unfinished blocks of other ranks; None while one of them is still running.

        After None this process must not write any more. Later commits go to a new journal file,
        which is newer than the other ranks' files and may replace their lines.
        """
        self._adopted.clear()  # blocks damaged since then are written again
        self._log.close()
        if not self._lock.alone():
            return None
        remove_temporary_files(self.path, self.manifest)  # left by killed ranks
        return self.pending()

    def bytes_of(self, work: Sequence[Work]) -> int:
        """Bytes on disk of the chunks of `work`."""
        return bytes_of(work, self.manifest)

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.path).free

    def refuse_if_too_full(self, work: Sequence[Work]) -> None:
        """Raise CacheFull unless the disk has room for `work`."""
        needed, free = self.bytes_of(work), self.free_bytes()
        if needed > free:
            raise full_error(self.path, self.manifest.teacher, needed, free)

    def write_block(self, block: Block, records: Mapping[str, NDArray[Any]]) -> None:
        """Commit one whole block of some taps: tap -> (rows of the block, *tap shape).

        "sample_digest" counts as a tap here. Raises SamplesChanged if other views of these samples
        were computed from other bytes, BadTeacherOutput if a value is not finite or overflows the
        tap's dtype, ValueError if taps or shapes do not fit the cache, CacheFull, CacheNotWritable.
        """
        arrays = stored_arrays(self.manifest.stored, block, records)
        if SAMPLE_DIGEST in records:
            self._refuse_changed_samples(block, records[SAMPLE_DIGEST])
        with self.refusing_full():
            self._log.commit(block, encode_chunks(self.manifest, arrays))

    def refusing_full(self) -> AbstractContextManager[None]:
        """Raise CacheFull if the disk is full, CacheNotWritable if writing is not permitted."""
        teacher = self.manifest.teacher
        return refusing_full(self.path, teacher, lambda: self.bytes_of(self.pending()))

    def copy_block(self, item: Work, source: Source) -> None:
        """Commit a block copied from another cache, with every checksum verified.

        Both caches must number these samples alike. Raises CacheDamaged.
        """
        arrays = copied_arrays(item, source, self.manifest)
        self._log.commit(item.block, encode_chunks(self.manifest, arrays))

    def finish(self, measured: Mapping[str, Any]) -> None:
        """Write the pass's metrics of the teacher to the manifest, then the index."""
        self.manifest = dataclasses.replace(self.manifest, measured=dict(measured))
        write_manifest(self.path, self.manifest)
        write_index(Folder(self.path), self.manifest)

    def commit_written(self, written: Written) -> bool:
        """Commit a block that another process wrote to temporary files (`store.write.staging`).

        Returns False and removes the files if this writer has already committed the block. Raises
        SamplesChanged, CacheMissing if the files are missing, CacheNotWritable.
        """
        block, arrays = written.block, self.manifest.arrays
        names = {
            array: PurePath(chunk_name(array, arrays[array], block)) for array in written.chunks
        }
        asides = {array: str(names[array].with_name(written.chunks[array][0])) for array in names}
        key = block, frozenset(names)
        if key in self._adopted:
            for aside in asides.values():
                remove_inside(self.path, aside)
            return False
        for array, aside in asides.items():
            self._refuse_unless_there(aside, self.manifest.chunk_file_bytes(arrays[array]))
        if SAMPLE_DIGEST in asides:
            self._refuse_changed_samples(block, self._digests_in(asides[SAMPLE_DIGEST], block))
        with self.refusing_full():
            for array, aside in asides.items():
                rename_inside(self.path, aside, names[array].name)
            crc32c = {array: checksum for array, (_, checksum) in written.chunks.items()}
            self._log.append(block, crc32c)
        self._adopted.add(key)
        return True

    def _digests_in(self, aside: str, block: Block) -> NDArray[Any]:
        """Return the samples' digests that a node wrote: (rows of the block, 16) uint8."""
        with open_inside(self.path, aside) as file:
            content = file.read(DIGEST_BYTES * block.rows)
        return np.frombuffer(content, np.uint8).reshape(-1, DIGEST_BYTES)

    def _refuse_unless_there(self, aside: str, size: int) -> None:
        try:
            with open_inside(self.path, aside) as file:
                found = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            found = None
        if found != size:
            raise CacheMissing(
                f"{self.path / aside}, which another node wrote, is "
                f"{'missing' if found is None else f'truncated: {found:,} of {size:,} bytes'}",
                fix="choose a folder that all nodes share, with --caches DIR",
            )

    def remove_asides(self) -> None:
        """Remove temporary files of nodes that will not be committed, after the work is done."""
        for array in self.manifest.arrays:
            remove_leftovers(self.path, f"{ZARR_GROUP}/{array}")

    def _refuse_changed_samples(self, block: Block, digests: NDArray[Any]) -> None:
        """Raise SamplesChanged if any process committed a view computed from other bytes."""
        spec = self.manifest.arrays[SAMPLE_DIGEST]
        name = chunk_name(SAMPLE_DIGEST, spec, block)
        data, _ = encode_chunk(digests, spec, self.manifest.block_rows)
        if not os.path.lexists(self.path / name) or holds(self.path, name, data):
            return
        source = open_folder(self.path, self.manifest)
        before = np.empty((block.rows, DIGEST_BYTES), dtype=spec.dtype)
        for view in np.flatnonzero(source.coverage.there[SAMPLE_DIGEST][:, block.index]).tolist():
            other = dataclasses.replace(block, view=view)
            if not source.fault_of(SAMPLE_DIGEST, other, before):
                changed = np.flatnonzero((before != digests).any(axis=1))
                raise SamplesChanged(self.path, block.start + changed)

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with releasing(self._lock):
            self._log.close()


def _changes_by_opening(path: Path, content: CacheContent) -> bool:
    """Return True if opening a writer changes files that an index lists."""
    try:
        manifest = read_manifest(path)
    except CacheError:
        return True
    is_grown = grown_manifest(manifest, content) is not None
    return is_grown or bool(metadata_faults(path, manifest))


def copied_arrays(item: Work, source: Source, manifest: Manifest) -> dict[str, NDArray[Any]]:
    """Read a block from another cache: array name -> rows of the block. Raises CacheDamaged."""
    arrays = {}
    for tap in item.taps:
        for name, spec in manifest.stored[tap].arrays(tap).items():
            rows = manifest.rows_in(spec, item.block)
            arrays[name] = np.empty((rows, *spec.shape), dtype=spec.dtype)
            source.read(name, item.block, arrays[name])
    return arrays
