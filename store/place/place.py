"""`Place`: the storage of a cache's files: a folder, a bucket, or a mirror of a bucket.

A file is named by its key below the place, such as `teacher.zarr/logits/c.0.3.0`, with the same key
and the same bytes everywhere. Readers, writers and copies only use this protocol. The places differ
as follows.

- A folder's writers hold its lock (`runtime.safe.locks`), so `replace` compares and then renames,
  in two steps. A bucket has no locks; each of its replacements is one conditional request.
- A folder answers in microseconds, a bucket in tens of milliseconds. So each place decides how many
  calls run at a time (`at_once`), and how sizes are found (`sizes`: a bucket lists a thousand keys
  per request).
- A mirror fetches the files that it lacks, and verifies each before it gets its name.

Journals are separate (`CommitLog`), because a folder appends to a file and flushes it, while a
bucket creates numbered objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

from numpy.typing import NDArray

from teach_once.runtime.formats import format_size
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.store.errors import CacheError

Item = TypeVar("Item")
Result = TypeVar("Result")


class ListWithoutEnd(CacheError):
    """A place does not end a list, or lists more files than possible."""


MAX_KEYS = 10**7  # per list, if the maximum number is unknown

Check = Callable[[BinaryIO, int], str | None]  # open file and its size -> its fault


class Chunk(NamedTuple):
    """A file of known size and checksum. view: None if the chunk belongs to all views."""

    key: str
    num_bytes: int
    crc32c: str
    view: int | None = None


class FileContent(NamedTuple):
    """The content of a file. content: None if it has more bytes than requested.

    tag: changes whenever the file is replaced; see `Place.replace`.
    """

    content: bytes | None
    size: int
    tag: str


@dataclass(frozen=True)
class Listed:
    """A listed file. tag: its MD5 in hex on most object stores; otherwise any text."""

    key: str
    size: int
    tag: str


class ReadablePlace(Protocol):
    """The files below a path, for reading. Safe to share between threads.

    Each method raises CacheNotWritable if access is not permitted, and ObjectsUnreachable if an
    object store does not answer. A folder follows no link, and raises BadFile for anything but a
    regular file.
    """

    @property
    def path(self) -> Path:
        """Return the user's name of the place: a folder or a URL."""
        ...

    def read(self, key: str, max_bytes: int) -> FileContent | None:
        """Read a file of at most `max_bytes`, or only the size of a larger one; None if missing."""
        ...

    def sizes(self, max_keys: int = MAX_KEYS) -> Callable[[Chunk], str | None]:
        """Return a function that finds the faults of a chunk's size."""
        ...

    def check_chunk(self, chunk: Chunk, check: Check) -> str | None:
        """Open a chunk and return the fault that `check` finds, or the error of opening it.

        A mirror fetches an invalid chunk again, so `check` may be called repeatedly.
        """
        ...

    def map_chunk(self, chunk: Chunk, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return a chunk's values without comparing its checksum, mapped into memory if possible.

        Raises BadFile if the chunk is missing or has another size.
        """
        ...

    def fetch(self, chunks: Sequence[Chunk]) -> None:
        """Prepare chunks that will be read: a mirror fetches the missing ones.

        Raises BadFile for a chunk that is missing or damaged at its origin, CacheFull.
        """
        ...

    def at_once(
        self, function: Callable[[Item], Result], items: Iterable[Item], num_bytes: int
    ) -> Iterator[Result]:
        """Yield function(item) in order, several at a time. num_bytes: read by all of them."""
        ...


class Place(ReadablePlace, Protocol):
    """The files below a path, for reading and writing."""

    @property
    def is_local(self) -> bool:
        """Return True if writing uses a disk of this machine."""
        ...

    def has(self, key: str) -> bool:
        """Return True if there is a file of any kind."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write a new file, whole and flushed. Return False if one exists, which is kept."""
        ...

    def replace(self, key: str, data: bytes, expected: str | None = None) -> None:
        """Replace a file in one step, flushed.

        expected: the tag of the file that is replaced. Raises CacheBusy if it has another one now.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove a file, if there is one."""
        ...

    def list_files(self, prefix: str = "", max_keys: int = MAX_KEYS) -> Iterator[Listed]:
        """List every file below a folder, at any depth, in no order.

        Raises ListWithoutEnd if there are more than `max_keys`.
        """
        ...

    def list_folders(self, prefix: str = "") -> list[str]:
        """List the names of the folders directly below a folder; [] if there is none."""
        ...


def read_document(place: ReadablePlace, key: str, max_bytes: int) -> bytes | None:
    """Read a small file; None if it is missing. Raises BadFile if it is larger than `max_bytes`."""
    found = place.read(key, max_bytes)
    if found is None:
        return None
    if found.content is None:
        what = f"has {format_size(found.size)}, expected at most {format_size(max_bytes)}"
        raise BadFile(place.path / key, what)
    return found.content
