"""Whole files of an object store, such as shards of images, in the mirror that caches share.

They are fetched in parts, many at a time, and verified before they have their names. All files of a
dataset are needed as long as a process reads it: a training sees its samples in random order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from runtime.commands import new_console
from runtime.formats import counted, format_size
from runtime.inside import write_inside
from runtime.progress import Progress
from runtime.urls import ObjectUrl
from store.mirror_folder import Needs, used_mirror
from store.objects import Objects, in_parallel

_PART_BYTES = 16 * 2**20
_SHOWN_BYTES = 2**28  # of fewer no progress is shown
_read_here: dict[Path, Needs] = {}  # mirror -> the files that this process reads


class _Part(NamedTuple):
    """Of a file that is being fetched: to which file, from where, how much."""

    aside: Path
    key: str
    start: int
    num_bytes: int


class MirrorFiles:
    """The files of one folder at a URL, by their names."""

    def __init__(self, url: ObjectUrl) -> None:
        self._objects, self._mirror = Objects(url), used_mirror()
        self._folder = self._mirror.root / url.bucket / url.key

    def path(self, name: str) -> Path:
        """Where the file is, or will be."""
        return self._folder / name

    def small(self, name: str, most_bytes: int) -> Path:
        """Fetch a small file. Raises CacheMissing, CacheDamaged (too large), as `Objects.get`."""
        content = self._objects.get(name, most_bytes)
        with self._mirror.locked():
            self._folder.mkdir(parents=True, exist_ok=True)
            write_inside(self._folder, name, content, flush=False)
        return self.path(name)

    def start(self, name: str, num_bytes: int) -> bytes:
        """The first bytes of the file at the URL."""
        return self._objects.part(name, 0, num_bytes)

    def fetch(
        self,
        names: Sequence[str],
        is_right: Callable[[str, Path], bool],
        verify: Callable[[str, Path], None],
    ) -> None:
        """Fetch whatever is not here or not right.

        is_right: of a name and a file that is here, without reading all of it. verify: reads all of
        a new one, and raises an error where that is damaged. Raises CacheFull; as `Objects.get`.
        """
        paths = {name: self.path(name) for name in names}
        root = self._mirror.root.absolute()
        _read_here.setdefault(root, Needs(root)).add(paths.values())
        with self._mirror.locked():
            absent = [n for n, path in paths.items() if not (path.exists() and is_right(n, path))]
            for name, path in paths.items():
                if name in absent:
                    path.unlink(missing_ok=True)
                else:
                    os.utime(path)
            self._bring(absent, verify)

    def _bring(self, names: Sequence[str], verify: Callable[[str, Path], None]) -> None:
        sizes = dict(zip(names, in_parallel(self._objects.size, names), strict=True))
        self._mirror.make_room(sum(sizes.values()))
        if not names:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        aside = {name: self._folder / f".{name}.{os.getpid()}.tmp" for name in names}
        try:
            self._download(aside, sizes)
            for name in names:
                verify(name, aside[name])
                aside[name].replace(self.path(name))
        finally:
            for path in aside.values():
                path.unlink(missing_ok=True)

    def _download(self, files: dict[str, Path], sizes: dict[str, int]) -> None:
        for path in files.values():
            path.write_bytes(b"")
        parts = [
            _Part(path, name, start, min(_PART_BYTES, sizes[name] - start))
            for name, path in files.items()
            for start in range(0, sizes[name], _PART_BYTES)
        ]
        total, console = sum(sizes.values()), new_console()
        console.quiet = total < _SHOWN_BYTES
        what = f"{counted(len(files), 'file')}, {format_size(total)}"
        console.print(f"fetching {what}, from {self._objects.url}")
        with Progress(total // 10**6, "MB", console) as progress:
            for num_bytes in in_parallel(self._write_part, parts):
                progress.advance(num_bytes // 10**6)

    def _write_part(self, part: _Part) -> int:
        content = self._objects.part(part.key, part.start, part.num_bytes)
        with part.aside.open("r+b") as file:
            file.seek(part.start)
            file.write(content)
        return len(content)
