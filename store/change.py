"""A finished cache folder that is changed in place: by one process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.locks import Job, WriterLock, releasing
from store.disk import refusals_of
from store.errors import CacheBusy
from store.manifest import Manifest, read_manifest


@contextmanager
def changing(path: Path) -> Iterator[Manifest]:
    """The manifest of the cache at `path`, which no other process writes meanwhile.

    Raises CacheBusy where one writes it now, CacheMissing, CacheDamaged, CacheNotWritable.
    """
    read_manifest(path)  # first, because the lock leaves a file even in a folder without a cache
    with refusals_of(path):
        lock = WriterLock(path, Job(), CacheBusy)
    with releasing(lock), refusals_of(path):
        yield read_manifest(path)
