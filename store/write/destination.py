"""The destination of a pass: the writers, and the writer of a path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from teach_once.runtime.safe.locks import Job
from teach_once.store.format.content import CacheContent
from teach_once.store.format.manifest import Manifest
from teach_once.store.place.bucket import Bucket
from teach_once.store.place.bucket_log import Before
from teach_once.store.place.open import place_at
from teach_once.store.write.bucket import RemoteBlocks, RemoteWriter
from teach_once.store.write.pending_blocks import Work
from teach_once.store.write.staging import AsideWriter
from teach_once.store.write.writer import CacheWriter

Destination = CacheWriter | RemoteWriter


def open_destination(
    path: Path,
    content: CacheContent,
    *,
    spool_folder: Path,
    block_rows: int | None = None,
    check_every_byte: bool = False,
    job: Job | None = None,
) -> Destination:
    """Open the writer of the cache at `path`, a folder or a URL: new, resumed, or grown.

    spool_folder: on this machine, for records of unfinished blocks of a cache at a URL; a folder
    contains its own. Raises as `CacheWriter.open` and `RemoteWriter.open`.
    """
    place = place_at(path)
    if isinstance(place, Bucket):
        return RemoteWriter.open(
            place.url,
            content,
            folder=spool_folder,
            block_rows=block_rows,
            check_every_byte=check_every_byte,
            job=job,
        )
    return CacheWriter.open(
        path, content, block_rows=block_rows, check_every_byte=check_every_byte, job=job
    )


class Handout(NamedTuple):
    """The data that another machine needs to write blocks. before: for caches at URLs."""

    path: Path
    manifest: Manifest
    before: Before | None


def handout_of(destination: Destination) -> Handout:
    """Return the data that other machines need to write the blocks that `destination` lacks."""
    before = destination.before if isinstance(destination, RemoteWriter) else None
    return Handout(destination.path, destination.manifest, before)


def writer_on_node(
    handout: Handout, work: Sequence[Work], spool_folder: Path
) -> AsideWriter | RemoteBlocks:
    """Return a writer into a shared folder, which the driver commits, or a writer to a store.

    spool_folder: as in `RemoteBlocks`, for a cache at a URL.
    """
    place = place_at(handout.path)
    if isinstance(place, Bucket):
        before = handout.before or Before()
        return RemoteBlocks(place.url, handout.manifest, spool_folder, before)
    return AsideWriter(handout.path, handout.manifest, work)
