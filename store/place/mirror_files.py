"""Whole files of an object store, such as shards of images, in the mirror that caches share.

They are fetched in parts, many at a time, and verified before they get their names. All files of a
dataset are kept as long as a process reads it, because training reads samples in random order.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple

from teach_once.runtime.command.frame import new_console
from teach_once.runtime.command.progress import Progress
from teach_once.runtime.formats import counted, format_size
from teach_once.runtime.machine.urls import ObjectUrl
from teach_once.runtime.safe.confined import (
    OpenRoot,
    new_aside,
    opened_folder,
    path_of,
    write_inside,
)
from teach_once.store.place.bucket import Bucket, in_parallel
from teach_once.store.place.mirror_folder import Needs, show_progress, used_mirror

_PART_BYTES = 16 * 2**20
_SHOWN_BYTES = 2**28  # no progress is shown for fewer bytes
_read_here: dict[Path, Needs] = {}  # mirror -> the files that this process reads


class _Part(NamedTuple):
    """A part of a file that is being fetched: the file, the offset and the number of bytes."""

    aside: BinaryIO
    key: str
    start: int
    num_bytes: int


class MirrorFiles:
    """The files of one folder at a URL, by name."""

    def __init__(self, url: ObjectUrl) -> None:
        self._objects, self._mirror = Bucket(url), used_mirror()
        self._place = PurePath(url.bucket, url.key)

    def path(self, name: str) -> Path:
        """Return the local path of a file, which may not have been fetched yet."""
        return self._mirror.root / self._place / name

    def small(self, name: str, most_bytes: int) -> Path:
        """Fetch a small file. Raises CacheMissing, CacheDamaged (too large), as `Bucket.get`."""
        content = self._objects.get(name, most_bytes)
        self._need([name])
        with self._mirror.locked() as opened:
            self._mirror.make_room(opened, len(content))
            write_inside(opened, self._place / name, content, flush=False)
        return self.path(name)

    def _need(self, names: Sequence[str]) -> None:
        root = self._mirror.root.absolute()
        _read_here.setdefault(root, Needs(root)).add(map(self.path, names))

    def start(self, name: str, num_bytes: int) -> bytes:
        """Return the first bytes of the file at the URL."""
        return self._objects.part(name, 0, num_bytes)

    def fetch(
        self,
        names: Sequence[str],
        is_right: Callable[[str, Path], bool],
        verify: Callable[[str, Path], None],
    ) -> None:
        """Fetch the files that are missing or invalid.

        is_right: called with a name and a local file; checks it without reading all of it. verify:
        reads all of a new file, and raises an error if it is damaged. Raises CacheFull, and as
        `Bucket.get`.
        """
        self._need(names)
        with (
            self._mirror.locked() as opened,
            opened_folder(opened, self._place, create=True) as folder,
        ):
            absent = [name for name in names if not _is_here(folder, name, is_right)]
            self._bring(opened, folder, absent, verify)

    def _bring(
        self,
        opened: OpenRoot,
        folder: int,
        names: Sequence[str],
        verify: Callable[[str, Path], None],
    ) -> None:
        sizes = dict(zip(names, in_parallel(self._objects.size, names), strict=True))
        self._mirror.make_room(opened, sum(sizes.values()))
        if not names:
            return
        asides = {name: new_aside(folder, name) for name in names}
        try:
            self._download({name: file for name, (_, file) in asides.items()}, sizes)
            for name, (aside, _) in asides.items():
                verify(name, path_of(folder, aside))
                os.rename(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
                show_progress()
        finally:
            for aside, file in asides.values():
                file.close()
                with suppress(FileNotFoundError):
                    os.unlink(aside, dir_fd=folder)

    def _download(self, files: Mapping[str, BinaryIO], sizes: Mapping[str, int]) -> None:
        parts = [
            _Part(file, name, start, min(_PART_BYTES, sizes[name] - start))
            for name, file in files.items()
            for start in range(0, sizes[name], _PART_BYTES)
        ]
        total, console = sum(sizes.values()), new_console()
        console.quiet = total < _SHOWN_BYTES
        what = f"{counted(len(files), 'file')}, {format_size(total)}"
        console.print(f"fetching {what}, from {self._objects.url}")
        with Progress(total // 10**6, "MB", console) as progress:
            for num_bytes in in_parallel(self._write_part, parts):
                show_progress()
                progress.advance(num_bytes // 10**6)

    def _write_part(self, part: _Part) -> int:
        content = self._objects.part(part.key, part.start, part.num_bytes)
        os.pwrite(part.aside.fileno(), content, part.start)
        return len(content)


def _is_here(folder: int, name: str, is_right: Callable[[str, Path], bool]) -> bool:
    """Return True, and mark the file as used now, if it is valid; otherwise remove it."""
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISREG(status.st_mode) and is_right(name, path_of(folder, name)):
            os.utime(name, dir_fd=folder, follow_symlinks=False)
            return True
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        pass
    return False
