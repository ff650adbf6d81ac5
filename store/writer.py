"""Creates a cache, takes one up again or makes it larger, and commits whole blocks to it.

Order of a commit: every array's chunk is written aside, flushed and renamed; then one journal line
is flushed. Whatever happens in between, a block is there entirely or not at all.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.files import write_atomically
from runtime.locks import Job, WriterLock
from store.chunks import FolderSource, metadata_faults
from store.content import (
    CacheContent,
    manifest_for,
    metadata_checksums,
    metadata_of,
    refuse_another,
    settle_metadata,
    unfinished,
)
from store.errors import (
    BadTeacherOutput,
    CacheBusy,
    CacheFull,
    CacheNotWritable,
    SamplesChanged,
    TeacherPass,
)
from store.identity import identity_sha256
from store.journal import JournalWriter, read_journal
from store.layout import (
    JOURNAL,
    LABELS,
    PREVIEW,
    SAMPLE_CRC,
    ZARR_GROUP,
    Block,
    TapSpec,
    chunk_path,
    encode_chunk,
    tap_of,
    whole_path,
    with_checksum,
)
from store.manifest import Manifest, read_manifest, write_manifest
from store.quantise import quantise_channels, quantise_rows
from store.reader import Source

_JOB_FILE = "job.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Work:
    """A block, and the taps of it that are not there yet."""

    block: Block
    taps: tuple[str, ...]


class CacheWriter:
    """One process's hold on a cache that is being filled. Use as a context manager."""

    def __init__(
        self, path: Path, manifest: Manifest, asked: CacheContent, lock: WriterLock, job: Job
    ) -> None:
        self.path = path
        self.manifest = manifest
        self._asked, self._lock, self._job = asked, lock, job
        self._journal: JournalWriter | None = None
        self.work: list[Work] = []

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
        """Create the cache at `path`, or take it up if it is there and of the same identity.

        A cache with fewer views or taps is made larger; one with more keeps them, but what of them
        is missing stays so. Afterwards `work` is this process's share of what is missing or, as
        far as looked, damaged.
        block_rows (a power of two) is a new cache's; one that exists keeps its own.
        Raises CacheMismatch, CacheBusy, CacheNotWritable, CacheFull.
        """
        job = job or Job()
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = WriterLock(path, job, CacheBusy)
        try:
            with explained(path):
                return cls._prepared(path, content, lock, job, block_rows, check_every_byte)
        except OSError as error:
            lock.release()
            if error.errno not in _FULL:
                raise
            raise CacheFull(
                f"the disk of {path} is too full to begin", fix="make room, then run again"
            ) from None
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
            still = set(writer.pending())  # a latecomer's share may have been done for it
            share = writer._agreed_work()[job.rank :: job.world]
            writer.work = [item for item in share if item in still]
            return writer
        manifest, salvaged = manifest_for(path, content, block_rows)
        writer = cls(path, manifest, content, lock, job)
        writer._lay_out(content)
        pending = writer.pending(check_every_byte=check_every_byte or salvaged)
        if job.world > 1:
            writer._agree_on(pending)
        lock.let_others_in()
        writer.work = pending[job.rank :: job.world]
        return writer

    def pending(self, *, check_every_byte: bool = False) -> list[Work]:
        """Every block with the taps that are asked for and not committed, or not sound."""
        journal = read_journal(self.path, identity_sha256(self.manifest.identity))
        source = FolderSource(self.path, self.manifest, journal)
        unsound = {(f.tap, f.view, f.block) for f in source.faults(read=check_every_byte)}
        asked = self._asked.num_views, self._asked.taps
        found = []
        for block, missing in unfinished(self.manifest, source.has, *asked):
            damaged = {
                tap_of(array)
                for array in self.manifest.arrays
                if (array, block.view, block.index) in unsound
            }
            if missing or damaged:
                taps = tuple(tap for tap in self.manifest.stored if tap in damaged | missing)
                if SAMPLE_CRC in taps:  # of other bytes, perhaps, than those the others are of
                    taps = tuple(self.manifest.stored)
                found.append(Work(block, taps))
        return found

    def left_over(self) -> list[Work] | None:
        """What the job's other processes left undone; None while one of them is still at work.

        After None this process must not write any more.
        """
        return self.pending() if self._lock.alone() else None

    def bytes_of(self, work: Sequence[Work]) -> int:
        """Bytes on disk of the chunks of `work`."""
        sizes = {
            tap: sum(map(self.manifest.chunk_file_bytes, spec.arrays(tap).values()))
            for tap, spec in self.manifest.stored.items()
        }
        return sum(sizes[tap] for item in work for tap in item.taps)

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.path).free

    def refuse_if_too_full(self, work: Sequence[Work]) -> None:
        """Raise CacheFull unless the disk has room for `work`."""
        needed, free = self.bytes_of(work), self.free_bytes()
        if needed > free:
            raise self._full(needed, free)

    def write_block(self, block: Block, records: Mapping[str, NDArray[Any]]) -> None:
        """Commit one whole block of some taps: tap -> (rows of the block, *tap shape).

        "sample_crc32c" counts as a tap here, where the cache keeps it. Raises SamplesChanged where
        it is not what other views of these samples were computed from;

        Raises BadTeacherOutput, naming tap, view and sample, where a value is not finite or
        overflows the tap's dtype; ValueError if taps or shapes are not those of the cache;
        CacheFull, CacheNotWritable.
        """
        stored = self.manifest.stored
        unknown = set(records) - set(stored)
        if unknown:
            raise ValueError(f"taps {sorted(unknown)} are not among {sorted(stored)}")
        if SAMPLE_CRC in records:
            self._refuse_changed_samples(block, records[SAMPLE_CRC])
        arrays = {
            array: values
            for tap, given in records.items()
            for array, values in _stored(tap, stored[tap], block, given).items()
        }
        try:
            with explained(self.path):
                self._commit(block, arrays)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise self._full(self.bytes_of(self.pending()), self.free_bytes()) from None

    def copy_block(self, item: Work, source: Source) -> None:
        """Commit a block as another cache holds it, every checksum verified.

        Its samples there must be those of the same numbers here. Raises CacheDamaged.
        """
        arrays = {}
        for tap in item.taps:
            for name, spec in self.manifest.stored[tap].arrays(tap).items():
                rows = self.manifest.rows_in(spec, item.block)
                arrays[name] = np.empty((rows, *spec.shape), dtype=spec.dtype)
                source.read(name, item.block, arrays[name])
        self._commit(item.block, arrays)

    def record_measured(self, measured: Mapping[str, Any]) -> None:
        """Keep what the pass found out about the teacher (its errors) in the manifest."""
        self.manifest = dataclasses.replace(self.manifest, measured=dict(measured))
        write_manifest(self.path, self.manifest)

    def _commit(self, block: Block, arrays: Mapping[str, NDArray[Any]]) -> None:
        if self._journal is None:
            identity = identity_sha256(self.manifest.identity)
            self._journal = JournalWriter(self.path, identity, self._job.rank)
        checksums = {}
        for array, values in arrays.items():
            spec = self.manifest.arrays[array]
            chunk = encode_chunk(values, spec, self.manifest.chunk_rows(spec))
            data, checksums[array] = chunk
            file = chunk_path(self.path, array, spec, block)
            if not (spec.all_views and _holds(file, chunk)):  # written with another view already
                write_atomically(file, data)
        self._journal.commit(block, checksums)

    def _refuse_changed_samples(self, block: Block, checksums: NDArray[Any]) -> None:
        """Compare with what is committed of these samples in any view, by any process."""
        spec = self.manifest.arrays[SAMPLE_CRC]
        file = chunk_path(self.path, SAMPLE_CRC, spec, block)
        if not file.exists() or _holds(
            file, encode_chunk(checksums, spec, self.manifest.block_rows)
        ):
            return
        journal = read_journal(self.path, identity_sha256(self.manifest.identity))
        source = FolderSource(self.path, self.manifest, journal)
        before = np.empty(block.rows, dtype=spec.dtype)
        for view in range(self.manifest.num_views):
            other = dataclasses.replace(block, view=view)
            if source.has(SAMPLE_CRC, other) and not source.fault_of(SAMPLE_CRC, other, before):
                raise SamplesChanged(self.path, block.start + np.flatnonzero(before != checksums))

    def _full(self, needed: int, free: int) -> CacheFull:
        return CacheFull(
            f"the disk of {self.path} is too full: {needed:,} bytes are still to be written, "
            f"{free:,} are free; what is committed is kept",
            fix=TeacherPass(self.manifest.teacher, before="make room, then: "),
        )

    def _lay_out(self, content: CacheContent) -> None:
        """Write what is missing or damaged of the zarr metadata and of the whole arrays."""
        group = self.path / ZARR_GROUP
        for name in (*self.manifest.arrays, LABELS, PREVIEW):
            (group / name).mkdir(parents=True, exist_ok=True)
        _remove_leftovers(self.path)
        settle_metadata(self.path, self.manifest)
        if metadata_faults(self.path, self.manifest):
            metadata = metadata_of(self.manifest, content.whole)
            for name, data in metadata.items():
                write_atomically(group / name, data)
            manifest = metadata_checksums(self.manifest, metadata)
            if manifest != self.manifest:  # another version of zarr may spell them differently
                self.manifest = manifest
                write_manifest(self.path, manifest)
        for name, values in content.whole.items():
            file = whole_path(self.path, name, values.ndim)
            expected = with_checksum(values).tobytes()
            if not file.is_file() or file.read_bytes() != expected:
                write_atomically(file, expected)

    def _agree_on(self, pending: Sequence[Work]) -> None:
        """Leave the list for the job's other processes, so that all split the same one."""
        (self.path / JOURNAL).mkdir(exist_ok=True)
        plain = [[w.block.view, w.block.index, list(w.taps)] for w in pending]
        content = {"job": self._job.name, "pending": plain}
        write_atomically(self.path / JOURNAL / _JOB_FILE, json.dumps(content).encode())

    def _agreed_work(self) -> list[Work]:
        """The list that the job's leader left. Raises CacheBusy where it is another job's."""
        file = self.path / JOURNAL / _JOB_FILE
        try:
            content = json.loads(file.read_bytes())
        except (FileNotFoundError, ValueError):
            content = {"job": None}
        if content["job"] != self._job.name:
            raise CacheBusy(
                f"{file} is not this job's: expected job {self._job.name!r}, "
                f"found {content['job']!r}",
                fix="start all processes of the job again; what is committed is kept",
            )
        return [
            Work(self.manifest.block(view, index), tuple(taps))
            for view, index, taps in content["pending"]
        ]

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._lock.release()


def _stored(tap: str, spec: TapSpec, block: Block, values: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """`values` as the tap's arrays, checked for shape and for numbers that they cannot hold."""
    if values.shape != (block.rows, *spec.shape):
        raise ValueError(f"tap {tap} has shape {values.shape}, not {(block.rows, *spec.shape)}")
    with np.errstate(over="ignore"):
        stored = values.astype(spec.read_dtype)
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        row = int(np.argwhere(~np.isfinite(stored))[0][0])
        worst = values[row].ravel()[np.argmax(~np.isfinite(stored[row].ravel()))]
        raise BadTeacherOutput(
            f"the teacher's output {worst} of tap {tap}, view {block.view}, sample "
            f"{block.start + row} does not fit {spec.dtype}"
        )
    if spec.scale is None:
        return {tap: stored}
    codes, scale = (quantise_rows if spec.scale == "row" else quantise_channels)(stored)
    return {tap: codes, f"{tap}.scale": scale}


def _holds(file: Path, chunk: tuple[NDArray[np.uint8], int]) -> bool:
    """Whether the file is exactly this chunk."""
    return file.is_file() and file.read_bytes() == chunk[0].tobytes()


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say of a folder that may not be written to that this is so."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise CacheNotWritable(
            f"{path} cannot be written to: {error.strerror}",
            fix="make it writable, or choose another folder with --caches DIR",
        ) from None


def _remove_leftovers(cache: Path) -> None:
    """Files that a writer which died had not yet renamed; the lock says that there is no other."""
    for folder in (cache, cache / JOURNAL, *(cache / ZARR_GROUP).iterdir()):
        for path in folder.glob(".*.tmp") if folder.is_dir() else []:
            path.unlink(missing_ok=True)
