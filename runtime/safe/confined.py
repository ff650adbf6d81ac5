"""Writes below a folder without ever leaving it.

A cache or a run may come from somebody else, with links in place of its files and folders. Every
part of a path below the root is therefore opened by itself, relative to the folder before it, and
without following links: no exchange of a folder for a link in between can lead outside. The root is
the user's word and may be a link. A root that is used for longer is opened once (`opened_root`), so
that all of its files are those of one folder, even if another one gets its name.
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
    """A root that is open. path: for messages."""

    path: Path
    handle: int

    def __truediv__(self, relative: PurePath | str) -> Path:
        return self.path / relative


Root = Path | OpenRoot


@contextmanager
def opened_root(path: Path) -> Iterator[OpenRoot]:
    """Open a folder as the root of what is written below it. Raises FileNotFoundError."""
    handle = os.open(path, _FOLDER)
    try:
        yield OpenRoot(path, handle)
    finally:
        os.close(handle)


@contextmanager
def opened_folder(
    root: Root, relative: PurePath | str = "", *, create: bool = False
) -> Iterator[int]:
    """A descriptor of the folder `relative` below `root`. create: make missing folders.

    Raises BadFile where a part is a link or no folder, or leads upward; FileNotFoundError.
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
    """A path by which other libraries reach a file of an opened folder, and no other file."""
    return Path(f"/proc/self/fd/{folder}") / name


@contextmanager
def written_inside(
    root: Root, relative: PurePath | str, *, flush: bool = True
) -> Iterator[BinaryIO]:
    """Yield a new file, which becomes `relative` below `root` at the end: whole, and flushed.

    flush: False for what is verified when it is read, and can be had again. On an error nothing
    changes. Missing folders are made. Raises BadFile as `opened_folder`, and
    where something other than a regular file has the name.
    """
    place = PurePath(relative)
    with opened_folder(root, place.parent, create=True) as folder:
        refuse_special(folder, place.name, root / place)
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
    """Write a new file below `root`: whole, and flushed. Return False if the name is taken.

    The file gets its name as a hard link, because a rename would replace another process's file. On
    a file system without hard links the name is looked up first, which a lock has to protect.
    """
    place = PurePath(relative)
    with opened_folder(root, place.parent, create=True) as folder:
        refuse_special(folder, place.name, root / place)
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
    """A regular file below `root`, made if it is missing, that writes at its end. Raises BadFile.

    A file with a second name (a hard link, as `cp -al` makes it) is left alone: its place is taken
    by a copy, as the other name may be of a snapshot, or of somebody else's file.
    """
    return os.fdopen(_opened(root, PurePath(relative), os.O_WRONLY | os.O_APPEND), "ab")


def open_to_update(root: Root, relative: PurePath | str) -> int:
    """A descriptor of a regular file below `root`, made if it is missing; as `open_to_append`."""
    return _opened(root, PurePath(relative), os.O_RDWR)


def _opened(root: Root, place: PurePath, access: int) -> int:
    with opened_folder(root, place.parent, create=True) as folder:
        refuse_special(folder, place.name, root / place)
        flags = access | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(place.name, flags, 0o644, dir_fd=folder)
        while True:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                os.close(handle)
                raise BadFile(root / place, "is not a regular file")
            if status.st_nlink < 2 or not _take(handle):  # taken: its owner goes on with it
                return handle
            try:
                if _names(folder, place.name, handle):
                    _copy_into_place(folder, place.name)
            finally:
                os.close(handle)
            handle = os.open(place.name, flags, 0o644, dir_fd=folder)


def _take(handle: int) -> bool:
    """Return False if another process has locked the file, as `runtime.safe.locks` does."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _names(folder: int, name: str, handle: int) -> bool:
    """Return True if the name still is that of the opened file."""
    status, found = os.fstat(handle), os.stat(name, dir_fd=folder, follow_symlinks=False)
    return (status.st_dev, status.st_ino) == (found.st_dev, found.st_ino)


def _copy_into_place(folder: int, name: str) -> None:
    """Give a name a file of its own with the same content; other names keep the old file."""
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
    """Write bytes behind the `end` bytes of a file, past its buffer: all, or none of them stay.

    A buffer would keep what the disk refuses, and write it later, when the file is closed.
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
    """A new file below `root`, open for writing. Raises FileExistsError; BadFile as above."""
    place = PurePath(relative)
    with opened_folder(root, place.parent, create=True) as folder:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(place.name, flags, 0o644, dir_fd=folder)
        os.fsync(folder)
        return os.fdopen(handle, "wb")


def open_inside(root: Root, relative: PurePath | str) -> BinaryIO:
    """A regular file below `root`, open for reading, unbuffered; no part of its path is a link.

    Raises BadFile, FileNotFoundError, PermissionError.
    """
    place = PurePath(relative)
    with opened_folder(root, place.parent) as folder:
        try:
            return open_regular(Path(place.name), dir_fd=folder)
        except BadFile as error:
            raise BadFile(root / place, error.what) from None


def listed_inside(root: Root, relative: PurePath | str) -> list[str]:
    """The names in a folder below `root`. Raises BadFile, FileNotFoundError."""
    with opened_folder(root, relative) as folder:
        return os.listdir(folder)


def walk_inside(root: Root) -> Iterator[tuple[PurePath, int, os.stat_result]]:
    """Every file below `root` that is not a folder: its place, its opened folder, and its status.

    No link is followed; each is a file here. The folder is open until the next file is asked for.
    """
    with opened_folder(root) as top:
        for where, _, names, folder in os.fwalk(dir_fd=top):
            for name in names:
                try:
                    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                except FileNotFoundError:  # removed meanwhile
                    continue
                yield PurePath(where, name), folder, status


def make_folder_inside(root: Root, relative: PurePath | str) -> None:
    """Make a folder below `root`, and those above it, where they are missing. Raises BadFile."""
    with opened_folder(root, relative, create=True):
        pass


def rename_inside(root: Root, relative: PurePath | str, name: str) -> None:
    """Give a file below `root` another name in its folder, and flush that. Raises BadFile."""
    place = PurePath(relative)
    with opened_folder(root, place.parent) as folder:
        refuse_special(folder, name, root / place.with_name(name))
        os.rename(place.name, name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)


def remove_inside(root: Root, relative: PurePath | str) -> None:
    """Remove a file below `root`, or a link itself, if it is there. Raises BadFile as above."""
    place = PurePath(relative)
    with opened_folder(root, place.parent) as folder:
        _remove(folder, place.name)


def remove_leftovers(root: Root, relative: PurePath | str = "", name: str = "") -> None:
    """Remove the temporary files of killed processes in a folder that is locked by this one.

    name: of one file only, where the folder is shared.
    """
    with opened_folder(root, relative) as folder:
        for found in os.listdir(folder):
            if _LEFTOVER.fullmatch(found) and found.startswith(f".{name}." if name else "."):
                _remove(folder, found)


def refuse_special(folder: int, name: str, path: Path) -> None:
    """Raise BadFile where `name` in an opened folder is there and no regular file."""
    try:
        mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise BadFile(path, f"is {kind_of_file(mode)}, expected a regular file")


def new_aside(folder: int, name: str) -> tuple[str, BinaryIO]:
    """A new temporary file in an opened folder, for a file `name`: its own name, and the file.

    Nobody can predict the name, so nothing that was put there is opened or removed.
    """
    aside = f".{name}.{secrets.token_hex(4)}.{os.getpid()}.tmp"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return aside, os.fdopen(os.open(aside, flags, 0o644, dir_fd=folder), "w+b")


def _remove(folder: int, name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
