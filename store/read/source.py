"""The interface of every backend that reads a cache's arrays, and the backend of a path.

tests/support/caches/store_contract.py is the suite that each backend passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from teach_once.store.errors import Fault, PassCommand
from teach_once.store.format.journal import Coverage
from teach_once.store.format.manifest import Manifest
from teach_once.store.format.spec import Block
from teach_once.store.place.bucket import Bucket
from teach_once.store.place.open import place_at
from teach_once.store.place.place import Item, Place, Result
from teach_once.store.read.hdf5 import Hdf5Source, hdf5_group, is_hdf5
from teach_once.store.read.mirror import mirror_of
from teach_once.store.read.steady import open_steadily
from teach_once.store.read.zarr_source import open_bucket, open_folder, open_mirrored


class Source(Protocol):
    """The arrays of one cache. Safe to share between threads and across `fork`."""

    @property
    def path(self) -> Path: ...

    @property
    def manifest(self) -> Manifest: ...

    @property
    def unreadable_lines(self) -> Sequence[str]:
        """The positions of unreadable journal lines."""
        ...

    @property
    def fix(self) -> str | PassCommand:
        """The command that repairs damage."""
        ...

    @property
    def coverage(self) -> Coverage:
        """The committed chunks."""
        ...

    def read(self, array: str, block: Block, out: NDArray[Any]) -> None:
        """Fill `out`, (rows of the block, ...) and C-contiguous. Raises CacheDamaged."""
        ...

    def verify(self, array: str, block: Block) -> None:
        """Compare the block's checksum, without keeping its rows. Raises CacheDamaged."""
        ...

    def fetch(self, chunks: Sequence[tuple[str, Block]]) -> None:
        """Fetch chunks that will be read, many at a time, if the cache is remote."""
        ...

    def at_once(
        self, function: Callable[[Item], Result], items: Iterable[Item], num_bytes: int
    ) -> Iterator[Result]:
        """Yield function(item) in order, several at a time as suits the place.

        num_bytes: read by all of them.
        """
        ...

    def mapped(self, array: str, block: Block) -> NDArray[Any]:
        """Map the rows of the block, (rows, ...), into memory as they are stored.

        Compares no checksum. Raises CacheDamaged if the file is missing or has another size.
        """
        ...

    def size_fault(self, array: str, block: Block) -> Fault | None:
        """Return the fault of a committed block that is visible without reading it."""
        ...

    def read_whole(self, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """Read an array that is stored in one piece (labels, preview). Raises CacheDamaged."""
        ...

    def metadata_faults(self, taps: Collection[str]) -> list[Fault]:
        """Return the faults in the description of the arrays of these taps."""
        ...

    def faults(
        self,
        *,
        every_byte: bool,
        num_views: int | None = None,
        on_chunk: Callable[[int], None] | None = None,
    ) -> list[Fault]:
        """Return the faults of committed blocks in the first views (default: all).

        every_byte: compare every checksum, including labels and preview; otherwise only properties
        that need no reading, such as sizes. on_chunk: called with the bytes of each checked block.
        """
        ...


def open_source(path: Path) -> Source:
    """Open the arrays at `path`, complete or not.

    Raises CacheMissing, CacheDamaged, CacheMismatch.
    """
    return open_steadily(changed_place(path), partial(_open, path))


def changed_place(path: Path) -> Place:
    """Return the place at which other processes change the cache: a mirror's origin."""
    if (found := hdf5_group(path)) is not None:
        path, _ = found
    mirror = mirror_of(path.parent)
    return place_at(path if mirror is None else mirror.url / path.name)


def _open(path: Path) -> Source:
    if hdf5_group(path) is not None:
        return Hdf5Source.open(path)
    if (mirror := mirror_of(path.parent)) is not None:
        return open_mirrored(path, mirror)
    place = place_at(path)
    if isinstance(place, Bucket):
        return open_bucket(place)
    if path.is_file() and is_hdf5(path):
        return Hdf5Source.open(path)
    return open_folder(path)
