"""`CommitLog`: the record of the committed blocks of a cache.

A commit always has the same order: first the chunk of every array, each flushed; then one line that
contains their checksums, flushed. Only the line makes the block exist. So a writer may be killed at
any moment. Without the line, its chunks are overwritten or adopted later; with the line, all chunks
exist. The other order would leave lines with missing chunks, which only reading every byte could
find.

A folder and a bucket store their lines differently, and neither emulates the other:

- `FolderLog` appends lines to one file per writer, under the folder's lock. A line is one write and
  one flush. Readers find at most one torn line, at the end of a file.
- `BucketLog` creates one numbered object per line, without a lock. A bucket cannot append, and a
  file of lines that is put repeatedly would lose the lines of other writers.

An exported HDF5 file has no log, because it is written once as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from teach_once.store.format.journal import Journal
from teach_once.store.format.manifest import Manifest
from teach_once.store.format.spec import CHECKSUM_BYTES, Block, encode_chunk

# Array and the bytes of its chunk; a folder takes one at a time, so only one is in memory.
Chunks = Iterable[tuple[str, NDArray[np.uint8]]]


class CommitLog(Protocol):
    """The committed blocks of one cache, and the method that commits another one."""

    def read(self) -> Journal:
        """Return the committed chunks. Raises CacheDamaged, CacheBusy."""
        ...

    def commit(self, block: Block, chunks: Chunks) -> None:
        """Write a block's chunks, then its line. When this returns the block exists.

        chunks: as `encode_chunks` yields them. On an error the block does not exist. Raises OSError
        if the disk refuses a write, ObjectsUnreachable, CacheError.
        """
        ...

    def close(self) -> None:
        """Close open files; a log without commits leaves none behind."""
        ...


def encode_chunks(
    manifest: Manifest, arrays: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield the chunks of a block one at a time. arrays: array -> its rows as they are stored."""
    for array, rows in arrays.items():
        spec = manifest.arrays[array]
        yield array, encode_chunk(rows, spec, manifest.chunk_rows(spec))[0]


def stated_crc32c(chunk: NDArray[np.uint8]) -> int:
    """Return the checksum at the end of a chunk."""
    return int.from_bytes(chunk[-CHECKSUM_BYTES:].tobytes(), "little")
