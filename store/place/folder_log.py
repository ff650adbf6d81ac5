"""The commit log of a cache folder: chunks are renamed into place, lines are appended and flushed.

The caller holds the folder's lock, alone or with the other processes of its job, each of which
appends to a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from teach_once.runtime.safe.confined import write_inside
from teach_once.store.format.journal import Journal, JournalWriter, read_journal
from teach_once.store.format.manifest import Manifest
from teach_once.store.format.spec import Block, chunk_name
from teach_once.store.identity import identity_sha256
from teach_once.store.place.commit_log import Chunks, stated_crc32c
from teach_once.store.place.folder import Folder


class FolderLog:
    """Commits blocks to the cache in a folder. rank: rank of this process in its job.

    The first commit creates the log's file, with a higher number than all existing files.
    """

    def __init__(self, cache: Path, manifest: Manifest, rank: int = 0) -> None:
        self._cache, self._manifest, self._rank = cache, manifest, rank
        self._file: JournalWriter | None = None

    def read(self) -> Journal:
        return read_journal(self._cache, self._manifest)

    def commit(self, block: Block, chunks: Chunks) -> None:
        self._open()
        checksums = {}
        for array, data in chunks:
            self.write_chunk(array, block, data)
            checksums[array] = stated_crc32c(data)
        self.append(block, checksums)

    def write_chunk(self, array: str, block: Block, data: NDArray[np.uint8]) -> None:
        """Write one chunk to a temporary file and rename it; the block does not exist before its
        line.

        A chunk of all views that another view has written is left alone.
        """
        spec = self._manifest.arrays[array]
        name = chunk_name(array, spec, block)
        if spec.all_views:
            found = Folder(self._cache).read(name, data.size)
            if found is not None and found.content == data.tobytes():
                return
        write_inside(self._cache, name, data)

    def append(self, block: Block, crc32c: Mapping[str, int]) -> None:
        """Append the line of a block whose chunks were written. crc32c: of each array's chunk."""
        self._open().commit(block, crc32c)

    def close(self) -> None:
        """Close the file; the next commit makes a newer one."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _open(self) -> JournalWriter:
        if self._file is None:
            identity = identity_sha256(self._manifest.identity)
            self._file = JournalWriter(self._cache, identity, self._rank)
        return self._file
