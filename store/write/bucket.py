"""Create, resume or grow a cache on an object store, and commit whole blocks to it.

Any number of writers on any machines, of one job or several, may do so at the same time without a
lock. Each computes its share, then the blocks that are still missing, until none is. So the others
take over the share of a killed writer. `store.place.bucket_log` describes a commit.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from teach_once.runtime.errors import Busy
from teach_once.runtime.machine.urls import ObjectUrl
from teach_once.runtime.safe.locks import Job, WriterLock, numbered_folder, releasing
from teach_once.store.errors import PassCommand, full_disk_as_error, refusals_of
from teach_once.store.format.coding import stored_arrays
from teach_once.store.format.content import CacheContent
from teach_once.store.format.journal import Coverage
from teach_once.store.format.manifest import Manifest
from teach_once.store.format.spec import Block
from teach_once.store.place.bucket import Bucket, in_parallel
from teach_once.store.place.bucket_log import (
    Before,
    BucketLog,
    Position,
    RemoteJournal,
    put_whole_journal,
    read_remote_journal,
)
from teach_once.store.place.commit_log import encode_chunks
from teach_once.store.place.index import remove_index, write_index
from teach_once.store.read.source import Source
from teach_once.store.read.zarr_source import ZarrSource, bucket_source, remote_manifest
from teach_once.store.write.bucket_content import begin_cache, replace_measured
from teach_once.store.write.pending_blocks import Work, bytes_of, missing_work, pending_work
from teach_once.store.write.writer import copied_arrays


class RemoteBlocks:
    """Commits whole blocks of the cache at `url`.

    spool_folder: this process's own folder on this machine for records of unfinished blocks.
    """

    rank = 0  # this process is alone in its spool folder

    def __init__(
        self, url: ObjectUrl, manifest: Manifest, spool_folder: Path, before: Before
    ) -> None:
        self.url, self.manifest, self.spool_folder = url, manifest, spool_folder
        self._bucket = Bucket(url)
        self._log = BucketLog(self._bucket, manifest, before)

    @property
    def before(self) -> Before:
        """This writer's knowledge of older lines, for writers on other nodes."""
        return self._log.before

    def write_block(self, block: Block, records: Mapping[str, NDArray[Any]]) -> None:
        """Commit one whole block of some taps: tap -> (rows of the block, *tap shape).

        An existing chunk of another writer is adopted. "sample_digest" counts as a tap here. Raises
        SamplesChanged if other views of these samples were computed from other bytes,
        BadTeacherOutput if a value is not finite or overflows the tap's dtype, ValueError if taps
        or shapes do not fit the cache, ObjectsUnreachable.
        """
        arrays = stored_arrays(self.manifest.stored, block, records)
        self._log.commit(block, encode_chunks(self.manifest, arrays))

    def outstanding(self, group: Sequence[Work]) -> list[Work]:
        """Return the blocks that no other writer has committed meanwhile."""
        there = in_parallel(lambda item: self._log.has_line(item.block), group)
        return [item for item, is_done in zip(group, there, strict=True) if not is_done]

    def refuse_if_too_full(self, work: Sequence[Work]) -> None:
        """Do nothing: a bucket has no size limit."""

    @contextmanager
    def refusing_full(self) -> Iterator[None]:
        """Raise CacheFull if this machine has no space for records of unfinished blocks."""
        fix = PassCommand(self.manifest.teacher, before="make room, then: ")
        purpose = " for the records of unfinished blocks; committed blocks are saved"
        with full_disk_as_error(self.spool_folder, fix, purpose), refusals_of(self.spool_folder):
            yield


_MANY_LINES = 1000  # reading each takes a request


class RemoteWriter(RemoteBlocks):
    """Fills a cache on an object store. A context manager."""

    def __init__(
        self, url: ObjectUrl, manifest: Manifest, asked: CacheContent, folder: Path, job: Job
    ) -> None:
        with refusals_of(folder):
            own, self._lock = numbered_folder(folder, job.rank)
        super().__init__(url, manifest, own, Before())
        self.path = url
        self._asked, self._job = asked, job
        self._damaged: list[Work] = []
        self.work: list[Work] = []

    @classmethod
    def open(
        cls,
        url: ObjectUrl,
        content: CacheContent,
        *,
        folder: Path,
        block_rows: int | None = None,
        check_every_byte: bool = False,
        job: Job | None = None,
    ) -> RemoteWriter:
        """Create the cache at `url`, or resume it if it exists and has the same identity.

        A cache with fewer views or taps grows. Afterwards `work` contains this process's share of
        the missing and damaged blocks. folder: on this machine, for records of unfinished blocks.
        The other arguments are as in `CacheWriter.open`. Raises CacheMismatch, CacheError if the
        store ignores conditions, ObjectsUnreachable, CacheNotWritable.
        """
        Bucket(url.parent).refuse_unconditional()
        objects = Bucket(url)
        remove_index(objects)
        manifest, is_salvaged = begin_cache(objects, content, block_rows)
        writer = cls(url, manifest, content, folder, job or Job())
        try:
            writer._find_work(check_every_byte or is_salvaged)
        except BaseException:
            writer._lock.release()
            raise
        return writer

    def _find_work(self, check_every_byte: bool) -> None:
        journal = self._log.read_lines()
        if journal.num_loose >= _MANY_LINES:  # other processes need not read them again
            journal = put_whole_journal(self._bucket, self.manifest, journal)
        source = bucket_source(self._bucket, self.manifest, journal.committed)
        asked = self._asked
        pending = pending_work(
            source, asked.num_views, asked.taps, check_every_byte=check_every_byte
        )
        self._log.before = _before(self.manifest, journal, pending)
        self._damaged = [item for item in pending if _position(item) in self.before.invalid]
        self.work = [item for item in pending if self._is_own(item.block)]
        if self._job.world == 1 and journal.numbers:
            self.work = _shuffled(
                self.work
            )  # another writer may be active, starting at the first block

    def _is_own(self, block: Block) -> bool:
        """Return True if a block is in this rank's share, whatever others have committed since."""
        manifest, world = self.manifest, self._job.world
        number = block.index
        if manifest.blocks_per_view < world:  # otherwise one rank has all views of a sample
            number += block.view * manifest.blocks_per_view
        return number % world == self._job.rank

    def left_over(self) -> list[Work]:
        """Return the missing blocks of all shares in random order.

        If there are none, all commits have been put as one whole journal.
        """
        journal = self._log.read_lines()
        coverage = Coverage(self.manifest, journal.committed.there)
        asked = self._asked
        source = bucket_source(self._bucket, self.manifest, journal.committed)
        self._damaged = [item for item in self._damaged if _is_damaged(item, source)]
        missing = missing_work(self.manifest, coverage, asked.num_views, asked.taps)
        work = list(dict.fromkeys([*missing, *self._damaged]))
        self._log.before = _before(self.manifest, journal, work)
        if not work and journal.num_loose:
            self._put_whole(journal)
        return _shuffled(work)

    def _put_whole(self, journal: RemoteJournal) -> None:
        """Put a whole journal that also contains the plan of another pass."""
        manifest, _ = remote_manifest(self._bucket)
        if (manifest.num_views, manifest.taps) != (self.manifest.num_views, self.manifest.taps):
            journal = read_remote_journal(self._bucket, manifest, every_line=True)
        put_whole_journal(self._bucket, manifest, journal)

    def bytes_of(self, work: Sequence[Work]) -> int:
        """Bytes of the chunks of `work`."""
        return bytes_of(work, self.manifest)

    def copy_block(self, item: Work, source: Source) -> None:
        """Commit a block copied from another cache, with every checksum verified.

        Both caches must number these samples alike. Raises CacheDamaged.
        """
        arrays = copied_arrays(item, source, self.manifest)
        self._log.commit(item.block, encode_chunks(self.manifest, arrays))

    def finish(self, measured: Mapping[str, Any]) -> None:
        """Write the pass's metrics of the teacher to the manifest, then the index.

        If another pass has grown the cache meanwhile, that pass writes the index.
        """
        self.manifest = replace_measured(self._bucket, measured)
        write_index(self._bucket, self.manifest)
        there, _ = remote_manifest(self._bucket)
        if there.zarr_crc32c != self.manifest.zarr_crc32c:
            remove_index(self._bucket)

    def unused_spool_folders(self) -> Iterator[Path]:
        """Yield the folders of unfinished blocks' records that no other process uses."""
        yield self.spool_folder
        for folder in sorted(self.spool_folder.parent.iterdir()):
            if folder != self.spool_folder and folder.is_dir():
                with suppress(Busy), releasing(WriterLock(folder, Job())):
                    yield folder

    def __enter__(self) -> RemoteWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()


def _before(manifest: Manifest, journal: RemoteJournal, work: Sequence[Work]) -> Before:
    """Return the known state of the blocks that will be committed."""
    there, first = journal.committed.there, journal.newest + 1
    numbers, invalid = {}, {}
    for item in work:
        view, block = position = _position(item)
        arrays = (array for tap in item.taps for array in manifest.stored[tap].arrays(tap))
        committed = tuple(array for array in arrays if there[array][view, block])
        number = journal.next_number(view, block)
        if committed or number != first:
            numbers[position] = number
        if committed:
            invalid[position] = committed
    return Before(first, numbers, invalid)


def _is_damaged(item: Work, source: ZarrSource) -> bool:
    """Return True if a chunk does not match its line, as if a pass repeated an older line."""
    stored = source.manifest.stored
    arrays = [array for tap in item.taps for array in stored[tap].arrays(tap)]
    faults = in_parallel(lambda array: source.fault_of(array, item.block), arrays)
    return any(fault is not None for fault in faults)


def _position(item: Work) -> Position:
    return item.block.view, item.block.index


def _shuffled(work: Sequence[Work]) -> list[Work]:
    """Shuffle differently in each process, so that few blocks are computed twice."""
    return random.Random(secrets.randbits(64)).sample(work, len(work))
