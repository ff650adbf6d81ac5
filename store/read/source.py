"""Where the arrays of a cache lie: what every backend offers, and which backend a path names.

tests/support/store_contract.py is the suite that each backend passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from teach_once.runtime.machine.urls import ObjectUrl
from teach_once.store.errors import Fault, TeacherPass
from teach_once.store.format.journal import Coverage
from teach_once.store.format.manifest import Manifest
from teach_once.store.format.spec import Block
from teach_once.store.read.bucket import RemoteSource
from teach_once.store.read.folder import FolderSource
from teach_once.store.read.hdf5 import Hdf5Source, is_hdf5
from teach_once.store.read.mirror import mirror_of
from teach_once.store.read.mirrored import MirroredSource
from teach_once.store.read.steady import open_steadily


class Source(Protocol):
    """The arrays of one cache. Safe to share between threads and across `fork`."""

    @property
    def path(self) -> Path: ...

    @property
    def manifest(self) -> Manifest: ...

    @property
    def unreadable_lines(self) -> Sequence[str]:
        """The places of journal lines that are there but cannot be read."""
        ...

    @property
    def fix(self) -> str | TeacherPass:
        """What repairs damage."""
        ...

    @property
    def coverage(self) -> Coverage:
        """Which chunks are committed."""
        ...

    def read(self, array: str, block: Block, out: NDArray[Any]) -> None:
        """Fill `out`, (rows of the block, ...) and C-contiguous. Raises CacheDamaged."""
        ...

    def verify(self, array: str, block: Block) -> None:
        """Compare the block's checksum, without keeping its rows. Raises CacheDamaged."""
        ...

    def fetch(self, chunks: Sequence[tuple[str, Block]]) -> None:
        """Bring chunks that are about to be read here, many at a time, where they lie elsewhere."""
        ...

    def mapped(self, array: str, block: Block) -> NDArray[Any]:
        """The rows of the block, (rows, ...), as its file holds them, mapped into memory.

        Compares no checksum. Raises CacheDamaged where the file is gone or has another size.
        """
        ...

    def size_fault(self, array: str, block: Block) -> Fault | None:
        """What is wrong with a committed block as far as it can be told without reading it."""
        ...

    def read_whole(self, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """An array that is stored in one piece (labels, preview). Raises CacheDamaged."""
        ...

    def metadata_faults(self, taps: Collection[str]) -> list[Fault]:
        """What is wrong with the description of the arrays, other taps than these left out."""
        ...

    def faults(
        self,
        *,
        every_byte: bool,
        num_views: int | None = None,
        on_chunk: Callable[[int], None] | None = None,
    ) -> list[Fault]:
        """Committed blocks of the first views (default: of all) that are not sound.

        every_byte: compare every checksum, of labels and preview too; else only what needs no
        reading, such as sizes. on_chunk: called with the bytes of each block that was checked.
        """
        ...


def open_source(path: Path) -> Source:
    """The arrays at `path`, complete or not. Raises CacheMissing, CacheDamaged, CacheMismatch."""
    return open_steadily(changed_place(path), partial(_opened, path))


def changed_place(path: Path) -> Path:
    """Where other processes change the cache at `path`: of one in a mirror, its URL."""
    mirror = None if isinstance(path, ObjectUrl) else mirror_of(path.parent)
    return path if mirror is None else ObjectUrl(*(mirror.url / path.name).parts)


def _opened(path: Path) -> Source:
    if isinstance(path, ObjectUrl):
        return RemoteSource.at(path)
    if (mirror := mirror_of(path.parent)) is not None:
        return MirroredSource.through(path, mirror)
    if path.is_file() and is_hdf5(path):
        return Hdf5Source.open(path)
    return FolderSource.open(path)
