"""Write inside a folder without ever leaving it.

A cache or a run may come from somebody else, with links in place of files and folders. Therefore
every part of a path inside the root is opened separately, relative to its parent and without
following links. Replacing a folder by a link in between cannot lead outside. The root itself is
chosen by the user and may be a link. A root used for longer is opened once (`opened_root`), so that
all files belong to one folder even if another folder takes its name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from teach_once.runtime.safe.safe_read import BadFile, kind_of_file, open_regular

_LEFTOVER = re.compile(r"\..+\.[0-9]+\.tmp", re.DOTALL)
_NO_LINKS = (errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP)
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class OpenRoot(NamedTuple):
    """An open root folder. path: for messages."""

    path: Path
    handle: int

    def __truediv__(self, relative: PurePath | str) -> Path:
        return self.path / relative


Root = Path | OpenRoot


@contextmanager
def opened_root(path: Path) -> Iterator[OpenRoot]:
    """Open a folder as the root of writes inside it. Raises FileNotFoundError if it is missing."""
    handle = os.open(path, _FOLDER)
    try:
        yield OpenRoot(path, handle)
    finally:
        os.close(handle)


@contextmanager
def opened_folder(
    root: Root, relative: PurePath | str = "", *, create: bool = False
) -> Iterator[int]:
    """Yield a descriptor of the folder `relative` inside `root`. create: create missing folders.

    Raises BadFile if a part is a link, is not a folder, or leads upward, and FileNotFoundError if
    one is missing.
    """
    handle = os.dup(root.handle) if isinstance(root, OpenRoot) else os.open(root, _FOLDER)
    try:
        reached = root / ""
        for part in PurePath(relative).parts:
            reached = reached / part
            if part == ".." or part.startswith("/"):
                raise BadFile(reached, f"leads out of {root / ''}")
            inner = _folder_in(handle, part, reached, create)
            os.close(handle)
            handle = inner
        yield handle
    finally:
        os.close(handle)


def _folder_in(parent: int, name: str, path: Path, create: bool) -> int:
    if create:
        try:
            os.mkdir(name, dir_fd=parent)
            os.fsync(parent)
        except FileExistsError:
            pass
    try:
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
            raise BadFile(path, f"is {kind_of_file(mode)}, expected a folder") from None
        raise


def path_of(folder: int, name: str = "") -> Path:
    """Return a path through which other libraries reach a file of an open folder, and no other."""
    return Path(f"/proc/self/fd/{folder}") / name


@contextmanager
def written_inside(
    root: Root, relative: PurePath | str, *, flush: bool = True
) -> Iterator[BinaryIO]:
    """Yield a new file that becomes `relative` inside `root` at the end, complete and flushed.

    flush: False for files that are verified when read and can be recreated. On an error nothing
    changes. Missing folders are created. Raises BadFile as `opened_folder` does, and if the name
    belongs to something other than a regular file.
    """
    place = PurePath(relative)
    with opened_folder(root, place.parent, create=True) as folder:
        check_regular(folder, place.name, root / place)
        aside, file = new_aside(folder, place.name)
        try:
            with file:
                yield file
                file.flush()
                if flush:
                    os.fsync(file.fileno())
            os.rename(aside, place.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            _remove(folder, aside)
            raise
        if flush:
            os.fsync(folder)


def write_inside(
    root: Root, relative: PurePath | str, data: bytes | NDArray[np.uint8], *, flush: bool = True
) -> None:
    """Write bytes through `written_inside`."""
    with written_inside(root, relative, flush=flush) as file:
        file.write(cast(Any, data))


def create_whole(root: Root, relative: PurePath | str, data: bytes) -> bool:
    """Write a new file inside `root`, complete and flushed; returns False if the name is taken.

    The file gets its name as a hard link, because renaming would replace another process's file. On
    a file system without hard links the name is checked first, which must be protected by a lock.
    """
    place = PurePath(relative)
    with opened_folder(root, place.parent, create=True) as folder:
        check_regular(folder, place.name, root / place)
        aside, file = new_aside(folder, place.name)
        try:
            with file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            is_new = _link(folder, aside, place.name)
        finally:
            _remove(folder, aside)
        os.fsync(folder)
    return is_new


def _link(folder: int, aside: str, name: str) -> bool:
    try:
        os.link(aside, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if name in os.listdir(folder):
            return False
        os.rename(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
    return True


def open_to_append(root: Root, relative: PurePath | str) -> BinaryIO:
    """Open a regular file inside `root` for appending; creates it if missing. Raises BadFile.

    A file with a second name (a hard link, as created by `cp -al`) is replaced by a copy first,
    because the other name may belong to a snapshot or to another user.
    """
    return os.fdopen(_opened(root, PurePath(relative), os.O_WRONLY | os.O_APPEND), "ab")


def open_to_update(root: Root, relative: PurePath | str) -> int:
    """Return a descriptor of a regular file inside `root` for updates; as `open_to_append`."""
    return _opened(root, PurePath(relative), os.O_RDWR)


def _opened(root: Root, place: PurePath, access: int) -> int:
    with opened_folder(root, place.parent, create=True) as folder:
        check_regular(folder, place.name, root / place)
        flags = access | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(place.name, flags, 0o644, dir_fd=folder)
        while True:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                os.close(handle)
                raise BadFile(root / place, "is not a regular file")
            if status.st_nlink < 2 or not _take(handle):  # locked: its owner continues to use it
                return handle
            try:
                if _names(folder, place.name, handle):
                    _copy_into_place(folder, place.name)
            finally:
                os.close(handle)
            handle = os.open(place.name, flags, 0o644, dir_fd=folder)


def _take(handle: int) -> bool:
    """Lock the file as `runtime.safe.locks` does; returns False if another process has the lock."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _names(folder: int, name: str, handle: int) -> bool:
    """Return True if the name still refers to the open file."""
    status, found = os.fstat(handle), os.stat(name, dir_fd=folder, follow_symlinks=False)
    return (status.st_dev, status.st_ino) == (found.st_dev, found.st_ino)


def _copy_into_place(folder: int, name: str) -> None:
    """Replace a name's file by a copy; other names keep the old file."""
    aside, new = new_aside(folder, name)
    with open_regular(Path(name), dir_fd=folder) as old, new:
        try:
            shutil.copyfileobj(old, new)
            new.flush()
            os.fsync(new.fileno())
            os.rename(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            _remove(folder, aside)
            raise
    os.fsync(folder)


def append_whole(file: BinaryIO, data: bytes, end: int) -> None:
    """Append bytes after the first `end` bytes of a file, unbuffered: all are written or none.

    A buffer would keep bytes that failed to be written and write them again when the file is
    closed.
    """
    handle, position = file.fileno(), end
    try:
        while data:
            num_written = os.pwrite(handle, data, position)
            data, position = data[num_written:], position + num_written
    except BaseException:
        with suppress(OSError):
            os.ftruncate(handle, end)
        raise


def create_inside(root: Root, relative: PurePath | str) -> BinaryIO:
    """Create a file inside `root` for writing. Raises FileExistsError, or BadFile as above."""
    place = PurePath(relative)
    with opened_folder(root, place.parent, create=True) as folder:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(place.name, flags, 0o644, dir_fd=folder)
        os.fsync(folder)
        return os.fdopen(handle, "wb")


def open_inside(root: Root, relative: PurePath | str) -> BinaryIO:
    """Open a regular file inside `root` for reading, unbuffered; no part of its path may be a link.

    Raises BadFile, FileNotFoundError or PermissionError.
    """
    place = PurePath(relative)
    with opened_folder(root, place.parent) as folder:
        try:
            return open_regular(Path(place.name), dir_fd=folder)
        except BadFile as error:
            raise BadFile(root / place, error.what) from None


def listed_inside(root: Root, relative: PurePath | str) -> list[str]:
    """Return the names in a folder inside `root`. Raises BadFile or FileNotFoundError."""
    with opened_folder(root, relative) as folder:
        return os.listdir(folder)


def walk_inside(root: Root) -> Iterator[tuple[PurePath, int, os.stat_result]]:
    """Yield relative path, open parent folder and status of every file inside `root`.

    Links are not followed but yielded as files. A folder stays open until the next file is
    requested.
    """
    with opened_folder(root) as top:
        for where, _, names, folder in os.fwalk(dir_fd=top):
            for name in names:
                try:
                    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                except FileNotFoundError:  # removed in the meantime
                    continue
                yield PurePath(where, name), folder, status


def make_folder_inside(root: Root, relative: PurePath | str) -> None:
    """Create a folder inside `root` with its missing parents. Raises BadFile as above."""
    with opened_folder(root, relative, create=True):
        pass


def rename_inside(root: Root, relative: PurePath | str, name: str) -> None:
    """Rename a file inside `root` in its folder and flush the folder. Raises BadFile as above."""
    place = PurePath(relative)
    with opened_folder(root, place.parent) as folder:
        check_regular(folder, name, root / place.with_name(name))
        os.rename(place.name, name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)


def remove_inside(root: Root, relative: PurePath | str) -> None:
    """Remove a file or a link inside `root` if it exists. Raises BadFile as above."""
    place = PurePath(relative)
    with opened_folder(root, place.parent) as folder:
        _remove(folder, place.name)


def remove_leftovers(root: Root, relative: PurePath | str = "", name: str = "") -> None:
    """Remove the temporary files of killed processes in a folder that this process has locked.

    name: only temporary files of this file, if the folder is shared.
    """
    with opened_folder(root, relative) as folder:
        for found in os.listdir(folder):
            if _LEFTOVER.fullmatch(found) and found.startswith(f".{name}." if name else "."):
                _remove(folder, found)


def check_regular(folder: int, name: str, path: Path) -> None:
    """Raise BadFile if `name` in an open folder exists and is not a regular file."""
    try:
        mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise BadFile(path, f"is {kind_of_file(mode)}, expected a regular file")


def new_aside(folder: int, name: str) -> tuple[str, BinaryIO]:
    """Create a temporary file for a file `name` in an open folder; returns its name and the file.

    The name is unpredictable, so no existing file is opened or removed.
    """
    aside = f".{name}.{secrets.token_hex(4)}.{os.getpid()}.tmp"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return aside, os.fdopen(os.open(aside, flags, 0o644, dir_fd=folder), "w+b")


def _remove(folder: int, name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
