"""A cache in a bucket, read through its folder in a mirror, which lacks some of the files.

Requested chunks are fetched into the folder, many at a time, and each is verified before it gets
its name. From then on they are read as in any folder. Files are added under the mirror's lock
(`store.place.mirror_folder`). Another process may have evicted a chunk in the meantime, so a
missing or damaged chunk is fetched once more, and read before the lock is released.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from numpy.typing import NDArray

from teach_once.runtime.safe.confined import (
    OpenRoot,
    opened_folder,
    opened_root,
    remove_inside,
    write_inside,
)
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.store.errors import CacheMissing
from teach_once.store.place.bucket import Bucket, in_parallel
from teach_once.store.place.chunks import content_fault
from teach_once.store.place.folder import Folder
from teach_once.store.place.mirror_folder import MirrorFolder, Needs, show_progress
from teach_once.store.place.place import MAX_KEYS, Check, Chunk, FileContent, Item, Result


@dataclass(frozen=True)
class MirrorOfBucket:
    """The fetched files of `origin` in the folder `path` of a mirror.

    below: that folder, relative to the mirror's root. needs: the files this reader needs.
    """

    path: Path
    origin: Bucket
    mirror: MirrorFolder
    below: PurePath
    needs: Needs = field(repr=False, compare=False)

    @property
    def _here(self) -> Folder:
        return Folder(self.path)

    def read(self, key: str, max_bytes: int) -> FileContent | None:
        return self._here.read(key, max_bytes)

    def sizes(self, max_keys: int = MAX_KEYS) -> Callable[[Chunk], str | None]:
        """Return a function that finds no faults, because a missing chunk is fetched when it is
        read.
        """
        return lambda chunk: None

    def check_chunk(self, chunk: Chunk, check: Check) -> str | None:
        if self._here.check_chunk(chunk, check) is None:
            return None
        with self.mirror.locked() as opened:
            if self._here.check_chunk(chunk, check) is None:  # another process fetched it
                return None
            self._bring_again(opened, chunk)
            return self._here.check_chunk(chunk, check)

    def map_chunk(self, chunk: Chunk, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        self.fetch([chunk])
        try:
            return self._here.map_chunk(chunk, dtype, shape)
        except BadFile:  # another process has just removed it
            with self.mirror.locked() as opened:
                self._bring_again(opened, chunk)
                return self._here.map_chunk(chunk, dtype, shape)

    def fetch(self, chunks: Sequence[Chunk]) -> None:
        self._remember(chunks)
        wanted = list(dict.fromkeys(chunks))
        try:
            with opened_root(self.mirror.root) as opened, self.mirror.refusing_links():
                if not self._absent(opened, wanted):
                    return
        except FileNotFoundError:  # the mirror was removed and is recreated
            pass
        with self.mirror.locked() as opened:
            absent = self._absent(opened, wanted)  # other processes may have fetched some
            self.mirror.make_room(opened, sum(each.num_bytes for each in absent))
            for _ in in_parallel(lambda each: self._bring(opened, each), absent):
                show_progress()

    def at_once(
        self, function: Callable[[Item], Result], items: Iterable[Item], num_bytes: int
    ) -> Iterator[Result]:
        return self._here.at_once(function, items, num_bytes)

    def _remember(self, chunks: Sequence[Chunk]) -> None:
        """Keep these chunks: view-independent ones always, records of the current and the next
        view.
        """
        of_view: dict[int, list[Path]] = {}
        for chunk in chunks:
            if chunk.view is None:
                self.needs.add([self.path / chunk.key])
            else:
                of_view.setdefault(chunk.view, []).append(self.path / chunk.key)
        for view, paths in of_view.items():
            self.needs.remember(view, paths)

    def _absent(self, opened: OpenRoot, chunks: Iterable[Chunk]) -> list[Chunk]:
        """Return the chunks that are not in the folder; mark the others as used now."""
        absent, of_folder = [], dict[str, list[Chunk]]()
        for chunk in chunks:
            of_folder.setdefault(chunk.key.rpartition("/")[0], []).append(chunk)
        for place, some in of_folder.items():
            try:
                with opened_folder(opened, self.below / place) as folder:
                    absent += [chunk for chunk in some if not _is_here(folder, chunk)]
            except FileNotFoundError:
                absent += some
        return sorted(absent, key=lambda chunk: chunk.key)

    def _bring_again(self, opened: OpenRoot, chunk: Chunk) -> None:
        with suppress(FileNotFoundError, IsADirectoryError):
            remove_inside(opened, self.below / chunk.key)
        self.mirror.make_room(opened, chunk.num_bytes)
        self._bring(opened, chunk)

    def _bring(self, opened: OpenRoot, chunk: Chunk) -> None:
        """Fetch one file, and verify it before it gets its name. Raises BadFile."""
        url = self.origin.url / chunk.key
        try:
            content = self.origin.get_array(chunk.key, chunk.num_bytes)
        except CacheMissing:
            raise BadFile(url, "chunk missing") from None
        if (what := content_fault(content, chunk.num_bytes, chunk.crc32c)) is not None:
            raise BadFile(url, what)
        write_inside(opened, self.below / chunk.key, content, flush=False)


def _is_here(folder: int, chunk: Chunk) -> bool:
    """Return True, and mark the file as used now, if it is a regular one of the expected size."""
    name = chunk.key.rpartition("/")[2]
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode) or status.st_size != chunk.num_bytes:
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                os.unlink(name, dir_fd=folder)
            return False
        os.utime(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
