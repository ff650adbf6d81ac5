"""The folder of a mirror: how much it holds, what may leave it, and who shares it.

Several processes on this machine may use one mirror. Files are added and removed under a lock, so
that what one has fetched the next one finds, and all of them keep one limit. What was not used for
the longest time goes first; then what only other processes need, which fetch it again; never what
this one needs. The lock is `flock`, and dies with its owner.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from runtime.formats import format_size
from runtime.inside import create_inside, open_to_update
from store.errors import CacheError, CacheFull
from store.layout import ZARR_GROUP

MARK = "mirror.lock"  # also tells a mirror from any other folder, of which nothing is removed
_IN_USE = ".in-use"  # a file of each process: what it needs, one line each
_MOST_LINES_BYTES = 2**20
_VIEWS_KEPT = 2  # of a cache: the current one and the next one
_lock = threading.Lock()
_used: list[MirrorFolder] = []
_announced: dict[tuple[Path, int], int] = {}  # mirror and process -> handle of its file


class Needs:
    """The files of a mirror that one reader needs now, until it is gone."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._views: dict[int, set[Path]] = {}
        self._always: set[Path] = set()
        _all_needs.add(self)

    def remember(self, view: int, paths: Collection[Path]) -> None:
        """Need these, and of the other views only the one that was asked for last."""
        known = self._views.pop(view, set())
        self._views[view] = known.union(path.absolute() for path in paths)
        while len(self._views) > _VIEWS_KEPT:
            del self._views[next(iter(self._views))]

    def add(self, paths: Iterable[Path]) -> None:
        """Need these from now on."""
        self._always.update(path.absolute() for path in paths)

    @property
    def paths(self) -> set[Path]:
        return self._always.union(*self._views.values())


_all_needs: weakref.WeakSet[Needs] = weakref.WeakSet()


@dataclass(frozen=True)
class MirrorFolder:
    """At most `most_bytes` of chunks and of whole files lie below `root`."""

    root: Path
    most_bytes: int

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among all threads and processes that use this mirror.

        Makes the folder. Raises CacheError where it exists and is no mirror.
        """
        with _lock:
            handle = self._opened()
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                yield
            finally:
                fcntl.flock(handle, fcntl.LOCK_UN)  # a forked process may have a copy of the handle
                os.close(handle)

    def make_room(self, num_bytes: int) -> None:
        """Remove files until so many bytes more fit in; to be called while locked.

        Raises CacheFull where what this process needs leaves no room.
        """
        own, theirs = self._own_needs(), self._needs_of_others()
        removable, kept = [], 0
        for path, status in self._files():
            if path.absolute() in own:
                kept += status.st_size
            else:
                is_needed = _need_of(self.root, path) in theirs
                removable.append((is_needed, status.st_mtime_ns, path, status.st_size))
        if kept + num_bytes > self.most_bytes:
            raise CacheFull(
                f"the mirror {self.root} may hold {format_size(self.most_bytes)}, but packed "
                f"images, the current and the next view need {format_size(kept + num_bytes)}",
                fix=f"--mirror-gb {(kept + num_bytes) / 1e9 * 1.01:.3g}, or more",
            )
        total = kept + num_bytes + sum(size for *_, size in removable)
        for _, _, path, size in sorted(removable):
            if total <= self.most_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._announce(own)

    def _opened(self) -> int:
        self.root.mkdir(parents=True, exist_ok=True)
        if any(self.root.iterdir()) and not (self.root / MARK).exists():
            raise CacheError(
                f"{self.root} is not empty, and no mirror: nothing in it is to be removed",
                fix="name another folder with --mirror (make: MIRROR=FOLDER)",
            )
        return open_to_update(self.root, MARK)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The chunks and whole files; removes what killed processes left half written."""
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                with suppress(FileNotFoundError):
                    if name.endswith(".tmp") and name.startswith("."):
                        path.unlink()
                    elif _is_counted(path):
                        yield path, path.lstat()

    def _own_needs(self) -> set[Path]:
        root = self.root.absolute()
        return set().union(*(each.paths for each in list(_all_needs) if each.root == root))

    def _needs_of_others(self) -> set[str]:
        """As `_need_of` has them. Forgets processes that have ended."""
        own = _announced.get((self.root.absolute(), os.getpid()))
        lines: set[str] = set()
        for path in (self.root / _IN_USE).glob("*"):
            try:
                handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:  # gone, or none of ours
                continue
            try:
                if own is not None and os.path.sameopenfile(handle, own):
                    continue
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                lines |= set(os.pread(handle, _MOST_LINES_BYTES, 0).decode().splitlines())
            finally:
                os.close(handle)
        return lines

    def _announce(self, own: Collection[Path]) -> None:
        key = self.root.absolute(), os.getpid()
        if key not in _announced:
            name = f"{_IN_USE}/{os.getpid()}-{secrets.token_hex(4)}"
            with create_inside(self.root, name) as file:
                _announced[key] = os.dup(file.fileno())
            fcntl.flock(_announced[key], fcntl.LOCK_EX)
        lines = sorted({_need_of(key[0], path) for path in own})
        content = "\n".join(lines).encode()[:_MOST_LINES_BYTES]
        os.pwrite(_announced[key], content, 0)
        os.truncate(_announced[key], len(content))


def use_mirror(folder: MirrorFolder) -> None:
    """From now on, files at URLs that a config names come through this mirror."""
    _used[:] = [folder]


def used_mirror() -> MirrorFolder:
    """That mirror; by default 50 GB in the folder `mirror`."""
    return _used[0]


def _is_counted(path: Path) -> bool:
    in_cache = path.parent.parent.name == ZARR_GROUP
    return path.name.startswith("c.") if in_cache else path.suffix == ".h5"


def _need_of(root: Path, path: Path) -> str:
    """What a process says of a file that it needs: itself, or the view of a cache that it is of."""
    place = path.relative_to(root)
    if path.parent.parent.name != ZARR_GROUP:
        return str(place)
    return f"{place.parent.parent} {path.name.split('.')[1]}"


use_mirror(MirrorFolder(Path("mirror"), 50 * 10**9))
