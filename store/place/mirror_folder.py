"""The folder of a mirror: its size, its eviction order, and the processes that share it.

Several processes on this machine may use one mirror. Files are added and removed under a lock, so
each process finds the files that others fetched. All processes share one size limit, which covers
every file. The least recently used files are evicted first, then the files that describe caches,
such as manifests, then the files that only other processes need, which fetch them again. Files that
this process needs are never evicted. The lock is `flock`, which ends with its owner.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shlex
import stat
import sys
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from teach_once.runtime.formats import format_size
from teach_once.runtime.safe.confined import (
    OpenRoot,
    create_inside,
    listed_inside,
    open_to_update,
    opened_folder,
    opened_root,
    remove_inside,
    walk_inside,
)
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.runtime.safe.text import one_line
from teach_once.store.errors import CacheBusy, CacheError, CacheFull
from teach_once.store.format.spec import ZARR_GROUP

SILENT_SECONDS = 2.0  # then the user is told about the lock
PATIENCE_SECONDS = 600.0  # without progress, then the wait ends with an error
_POLL_SECONDS = 0.001, 0.05  # first and longest pause between two attempts
_PROCESS = re.compile(rb"[0-9]{1,10}")


def wait_for_lock(handle: int, root: Path) -> None:
    """Lock the open lock file of the mirror `root` and write the process id. Raises CacheBusy."""
    started, is_told = time.monotonic(), False
    last, seen = started, os.fstat(handle).st_mtime_ns
    pause, most = _POLL_SECONDS
    while not _try(handle):
        now, touched = time.monotonic(), os.fstat(handle).st_mtime_ns
        if touched != seen:
            last, seen = now, touched
        if now - last > PATIENCE_SECONDS:
            raise CacheBusy(
                f"{_owner(handle)} has locked the mirror {one_line(root)} and has fetched nothing "
                f"for {PATIENCE_SECONDS / 60:.0f} minutes",
                fix="end it, or name another folder with --mirror (make: MIRROR=FOLDER)",
            )
        if not is_told and now - started > SILENT_SECONDS:
            is_told = True
            told = f"waiting for {_owner(handle)}, which fetches into the mirror {one_line(root)}"
            print(told, file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, most)
    os.ftruncate(handle, 0)
    os.pwrite(handle, b"%d" % os.getpid(), 0)


def show_life(handle: int) -> None:
    """Show processes that wait for this lock that its owner makes progress."""
    os.utime(handle)


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner(handle: int) -> str:
    found = _PROCESS.fullmatch(os.pread(handle, 16, 0))
    return f"process {found[0].decode()}" if found else "another process"


MARK = "mirror.lock"  # also marks a mirror; nothing is removed from other folders
_IN_USE = ".in-use"  # a file per process with one needed file per line
_ANNOUNCEMENT = re.compile(r"[0-9]{1,10}-[0-9a-f]{8}")
_MOST_LINES_BYTES = 2**20
_VIEWS_KEPT = 2  # views per cache: the current one and the next one
_lock = threading.Lock()
_used: list[MirrorFolder] = []
_held: list[int] = []  # the handle of the mark that this process has locked, or waits for
_announced: dict[tuple[Path, int], int] = {}  # mirror and process -> handle of its file


class Needs:
    """The files of a mirror that one reader needs as long as it exists."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._views: dict[int, set[Path]] = {}
        self._always: set[Path] = set()
        _all_needs.add(self)

    def remember(self, view: int, paths: Collection[Path]) -> None:
        """Need these files; of other views, only the last requested one is kept."""
        known = self._views.pop(view, set())
        self._views[view] = known.union(path.absolute() for path in paths)
        while len(self._views) > _VIEWS_KEPT:
            del self._views[next(iter(self._views))]

    def add(self, paths: Iterable[Path]) -> None:
        """Need these files from now on."""
        self._always.update(path.absolute() for path in paths)

    @property
    def paths(self) -> set[Path]:
        return self._always.union(*self._views.values())


_all_needs: weakref.WeakSet[Needs] = weakref.WeakSet()


@dataclass(frozen=True)
class MirrorFolder:
    """A folder with at most `most_bytes` below `root`. All files are written through `locked`."""

    root: Path
    most_bytes: int

    @contextmanager
    def locked(self) -> Iterator[OpenRoot]:
        """Yield the open root with the lock held against all threads and processes.

        Creates the folder. Raises CacheError if it exists and is not a mirror, or if a link or a
        special file has the name of one of its folders or files. Raises CacheBusy if the process
        that has the lock shows no progress for ten minutes.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with _lock, self.refusing_links(), opened_root(self.root) as opened:
            _held[:] = [self._opened_mark(opened)]
            try:
                wait_for_lock(_held[0], self.root)
                yield opened
            finally:
                _let_go()

    @contextmanager
    def refusing_links(self) -> Iterator[None]:
        """Add the fix to an error about a link or special file."""
        try:
            yield
        except BadFile as error:
            path = error.path
            if not path.is_relative_to(self.root):
                raise
            remove = f"rm {'-r ' if path.is_dir() and not path.is_symlink() else ''}"
            raise CacheError(
                error.problem,
                fix=f"{remove}{shlex.quote(str(path))}, then run the same command again; or name "
                f"another folder with --mirror (make: MIRROR=FOLDER)",
            ) from None

    def make_room(self, opened: OpenRoot, num_bytes: int) -> None:
        """Remove files until there is space for `num_bytes`; call it while locked.

        opened: yielded by `locked`. Raises CacheFull if the files that this process needs leave no
        space.
        """
        own, theirs = self._own_needs(), self._needs_of_others(opened)
        removable, kept = [], 0
        for place, status in _files(opened):
            if place in own:
                kept += status.st_size
            else:
                is_needed = _need_of(place) in theirs
                order = is_needed, _describes(place), status.st_mtime_ns
                removable.append((order, place, status.st_size))
        if kept + num_bytes > self.most_bytes:
            raise CacheFull(
                f"the mirror {self.root} may hold {format_size(self.most_bytes)}, but packed "
                f"images, the current and the next view need {format_size(kept + num_bytes)}",
                fix=f"--mirror-gb {(kept + num_bytes) / 1e9 * 1.01:.3g}, or more",
            )
        total = kept + num_bytes + sum(size for *_, size in removable)
        for _, place, size in sorted(removable):
            if total <= self.most_bytes:
                break
            remove_inside(opened, place)
            total -= size
        self._announce(opened, own)

    def announce(self, opened: OpenRoot) -> None:
        """Tell other processes which files this one needs; call it while locked."""
        self._announce(opened, self._own_needs())

    def _opened_mark(self, opened: OpenRoot) -> int:
        names = os.listdir(opened.handle)
        if names and MARK not in names:
            raise CacheError(
                f"{self.root} is not empty, and no mirror: nothing in it is to be removed",
                fix="name another folder with --mirror (make: MIRROR=FOLDER)",
            )
        return open_to_update(opened, MARK)

    def _own_needs(self) -> set[PurePath]:
        root = self.root.absolute()
        paths = set().union(*(each.paths for each in list(_all_needs) if each.root == root))
        return {path.relative_to(root) for path in paths}

    def _needs_of_others(self, opened: OpenRoot) -> set[str]:
        """Collect the needs of running processes, as from `_need_of`; remove files of ended ones.

        A file with another kind of name, or that is not a regular file, is left alone.
        """
        own = _announced.get((self.root.absolute(), os.getpid()))
        lines: set[str] = set()
        try:
            names = listed_inside(opened, _IN_USE)
        except FileNotFoundError:
            return lines
        with opened_folder(opened, _IN_USE) as folder:
            for name in filter(_ANNOUNCEMENT.fullmatch, names):
                lines |= _announced_lines(folder, name, own)
        return lines

    def _announce(self, opened: OpenRoot, own: Collection[PurePath]) -> None:
        key = self.root.absolute(), os.getpid()
        if key in _announced and not os.fstat(_announced[key]).st_nlink:  # the folder was removed
            os.close(_announced.pop(key))
        if key not in _announced:
            name = f"{_IN_USE}/{os.getpid()}-{secrets.token_hex(4)}"
            with create_inside(opened, name) as file:
                _announced[key] = os.dup(file.fileno())
            fcntl.flock(_announced[key], fcntl.LOCK_EX)
        lines = sorted({_need_of(place) for place in own})
        content = "\n".join(lines).encode()[:_MOST_LINES_BYTES]
        os.pwrite(_announced[key], content, 0)
        os.truncate(_announced[key], len(content))


def show_progress() -> None:
    """Show waiting processes that this process is fetching."""
    for handle in list(_held):
        with suppress(OSError):  # just released
            show_life(handle)


def use_mirror(folder: MirrorFolder) -> None:
    """Read files at URLs in configs through this mirror from now on."""
    _used[:] = [folder]


def used_mirror() -> MirrorFolder:
    """Return the mirror of `use_mirror`; by default 50 GB in the folder `mirror`."""
    return _used[0]


def _files(opened: OpenRoot) -> Iterator[tuple[PurePath, os.stat_result]]:
    """List all files that count; remove half-written files of killed processes.

    All files count except the lock, the announcements, and links, which have no bytes.
    """
    for place, folder, status in walk_inside(opened):
        if place == PurePath(MARK) or place.parts[0] == _IN_USE:
            continue
        if place.name.startswith(".") and place.name.endswith(".tmp"):
            with suppress(FileNotFoundError):
                os.unlink(place.name, dir_fd=folder)
        elif stat.S_ISREG(status.st_mode):
            yield place, status


def _describes(place: PurePath) -> bool:
    """Return True for a manifest, journal, index or similar file, which readers need first."""
    in_cache = place.parent.parent.name == ZARR_GROUP
    return not (place.name.startswith("c.") if in_cache else place.suffix == ".h5")


def _announced_lines(folder: int, name: str, own: int | None) -> set[str]:
    """Return the needs of another running process; none for this one or an ended one."""
    try:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(name, flags, dir_fd=folder)
    except OSError:  # missing, or not a file
        return set()
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return set()
        if own is not None and os.path.sameopenfile(handle, own):
            return set()
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)
        return set()
    except BlockingIOError:
        text = os.pread(handle, _MOST_LINES_BYTES, 0)
        return set(text.decode(errors="replace").splitlines())
    finally:
        os.close(handle)


def _need_of(place: PurePath) -> str:
    """Return the announced form of a needed file: the file, or the view of a cache."""
    if place.parent.parent.name != ZARR_GROUP or not place.name.startswith("c."):
        return str(place)
    return f"{place.parent.parent} {place.name.split('.')[1]}"


def _let_go() -> None:
    """Release the lock and forget it."""
    while _held:
        handle = _held.pop()
        fcntl.flock(handle, fcntl.LOCK_UN)  # a forked process may have a copy of the handle
        os.close(handle)


def _begin_in_child() -> None:
    """Forget the locks of the parent process after a fork; they stay with the parent.

    A thread that holds them does not exist in the child and would never release them. Closing a
    copy of a handle releases nothing; keeping it would keep the lock after its owner's death.
    """
    global _lock
    _lock = threading.Lock()
    for handle in [*_held, *_announced.values()]:
        os.close(handle)
    _held.clear()
    _announced.clear()


os.register_at_fork(after_in_child=_begin_in_child)
use_mirror(MirrorFolder(Path("mirror"), 50 * 10**9))
