"""A folder as a `Place`. Written data is flushed to the disk before a call returns."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from teach_once.runtime.safe.confined import (
    OpenRoot,
    create_whole,
    open_inside,
    opened_folder,
    remove_inside,
    walk_inside,
    write_inside,
)
from teach_once.runtime.safe.files import flush_folder
from teach_once.runtime.safe.safe_read import (
    BadFile,
    is_out_of_resources,
    kind_of_file,
    open_regular,
    read_open,
)
from teach_once.store.errors import CacheBusy
from teach_once.store.place.chunks import map_file, wrong_size
from teach_once.store.place.parallel import in_threads
from teach_once.store.place.place import (
    MAX_KEYS,
    Check,
    Chunk,
    FileContent,
    Item,
    Listed,
    ListWithoutEnd,
    Result,
)


@dataclass(frozen=True)
class Folder:
    """The files of a folder. `replace` and `delete` are called under the folder's lock."""

    path: Path

    @property
    def is_local(self) -> bool:
        return True

    def read(self, key: str, max_bytes: int) -> FileContent | None:
        try:
            with open_inside(self.path, key) as file:
                status = os.fstat(file.fileno())
                if status.st_size > max_bytes:
                    return FileContent(None, status.st_size, _tag(status))
                content = read_open(file, self.path / key, max_bytes)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return FileContent(content, len(content), _tag(status))

    def has(self, key: str) -> bool:
        return os.path.lexists(self.path / key)

    def create(self, key: str, data: bytes) -> bool:
        return create_whole(self.path, key, data)

    def replace(self, key: str, data: bytes, expected: str | None = None) -> None:
        if expected is not None:
            found = self.read(key, 0)
            if found is None or found.tag != expected:
                raise CacheBusy(
                    f"{self.path / key} was changed by another process",
                    fix="run the same command again",
                )
        write_inside(self.path, key, data)

    def delete(self, key: str) -> None:
        with suppress(FileNotFoundError):
            remove_inside(self.path, key)
            flush_folder((self.path / key).parent)

    def list_files(self, prefix: str = "", max_keys: int = MAX_KEYS) -> Iterator[Listed]:
        """List the regular files, without temporary files of writers."""
        try:
            with opened_folder(self.path, prefix) as handle:
                found = walk_inside(OpenRoot(self.path / prefix, handle))
                for number, (below, _, status) in enumerate(found):
                    if number >= max_keys:
                        where = self.path / prefix
                        raise ListWithoutEnd(f"{where} has more than {max_keys:,} files")
                    is_leftover = below.name.startswith(".") and below.name.endswith(".tmp")
                    if stat.S_ISREG(status.st_mode) and not is_leftover:
                        key = "/".join(filter(None, [prefix, *below.parts]))
                        yield Listed(key, status.st_size, _tag(status))
        except FileNotFoundError:
            return

    def list_folders(self, prefix: str = "") -> list[str]:
        """List the names of folders, and of links to folders, which a user may have made."""
        try:
            names = os.listdir(self.path / prefix)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [name for name in names if os.path.isdir(self.path / prefix / name)]

    def sizes(self, max_keys: int = MAX_KEYS) -> Callable[[Chunk], str | None]:
        return self._size_fault

    def _size_fault(self, chunk: Chunk) -> str | None:
        try:
            status = os.lstat(self.path / chunk.key)
        except (FileNotFoundError, NotADirectoryError):
            return "chunk missing"
        if not stat.S_ISREG(status.st_mode):
            return f"chunk is {kind_of_file(status.st_mode)}, expected a regular file"
        is_right = status.st_size == chunk.num_bytes
        return None if is_right else wrong_size(status.st_size, chunk.num_bytes)

    def check_chunk(self, chunk: Chunk, check: Check) -> str | None:
        try:
            with open_regular(self.path / chunk.key) as file:
                return check(file, os.fstat(file.fileno()).st_size)
        except FileNotFoundError:
            return "chunk missing"
        except BadFile as error:
            return f"chunk {error.what}"
        except OSError as error:
            if is_out_of_resources(error):
                raise
            return f"chunk unreadable ({error.strerror})"

    def map_chunk(self, chunk: Chunk, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        path = self.path / chunk.key
        if (what := self._size_fault(chunk)) is not None:
            raise BadFile(path, what)
        return map_file(path, dtype, shape)

    def fetch(self, chunks: Sequence[Chunk]) -> None:
        """Do nothing: the chunks are local."""

    def at_once(
        self, function: Callable[[Item], Result], items: Iterable[Item], num_bytes: int
    ) -> Iterator[Result]:
        return in_threads(function, items, num_bytes)


def _tag(status: os.stat_result) -> str:
    return f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"
