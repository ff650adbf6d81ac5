"""Blocks that one process writes and another commits: a cluster node and its driver.

The node writes chunks into the cache's folder under temporary names, which no reader uses. The
driver, which holds the cache's lock, renames them and appends to the journal. So a block that is
computed twice, or by a node that was considered dead, changes no committed data, and nodes need no
lock.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple, cast

from numpy.typing import NDArray

from teach_once.runtime.safe.confined import create_inside
from teach_once.store.errors import full_error, refusing_full
from teach_once.store.format.coding import stored_arrays
from teach_once.store.format.manifest import Manifest
from teach_once.store.format.spec import Block, chunk_name, encode_chunk
from teach_once.store.write.pending_blocks import Work, bytes_of

_NAME_BITS = 63


class Written(NamedTuple):
    """A block with chunks in temporary files. chunks: array -> file name and crc32c."""

    block: Block
    chunks: dict[str, tuple[str, int]]


class AsideWriter:
    """Writes blocks of the cache at `path` for another process to commit; `written` lists them."""

    def __init__(self, path: Path, manifest: Manifest, work: Sequence[Work]) -> None:
        self.path, self.manifest, self._work = path, manifest, work
        self._number = secrets.randbits(_NAME_BITS)
        self.written: list[Written] = []

    @property
    def rank(self) -> int:
        """A number that no other process has, for unique names."""
        return self._number

    @property
    def spool_folder(self) -> Path:
        """The folder for records of unfinished blocks."""
        return self.path

    def outstanding(self, group: Sequence[Work]) -> list[Work]:
        """Return all of these blocks, because the driver gives each to one process only."""
        return list(group)

    def write_block(self, block: Block, records: Mapping[str, NDArray[Any]]) -> None:
        """Write and flush one whole block of some taps: tap -> (rows of the block, *tap shape).

        Raises as `CacheWriter.write_block`, except SamplesChanged: the committing process compares
        the samples' checksums with other views.
        """
        chunks: dict[str, tuple[str, int]] = {}
        with self.refusing_full():
            for array, values in stored_arrays(self.manifest.stored, block, records).items():
                spec = self.manifest.arrays[array]
                data, checksum = encode_chunk(values, spec, self.manifest.chunk_rows(spec))
                name = aside_of(chunk_name(array, spec, block), secrets.randbits(_NAME_BITS))
                with create_inside(self.path, name) as file:
                    file.write(cast(Any, data))
                    file.flush()
                    os.fsync(file.fileno())
                chunks[array] = PurePath(name).name, checksum
        self.written.append(Written(block, chunks))

    def refuse_if_too_full(self, work: Sequence[Work]) -> None:
        """Raise CacheFull unless the disk has room for `work`."""
        needed, free = bytes_of(work, self.manifest), shutil.disk_usage(self.path).free
        if needed > free:
            raise full_error(self.path, self.manifest.teacher, needed, free)

    def refusing_full(self) -> AbstractContextManager[None]:
        """Raise CacheFull if the disk is full, CacheNotWritable if writing is not permitted."""
        needed = partial(bytes_of, self._work, self.manifest)
        return refusing_full(self.path, self.manifest.teacher, needed)


def aside_of(chunk: str, number: int) -> str:
    """Return a temporary name that `runtime.safe.confined.remove_leftovers` recognizes."""
    place = PurePath(chunk)
    return str(place.with_name(f".{place.name}.{number}.tmp"))
