"""Write files atomically: after a crash the old file or the new one exists, never a partial one.

A killed process leaves its temporary file behind. The next writer of the same name removes it if
that process no longer runs. On a shared folder the process may belong to another machine or
container and cannot be looked up; then the file is removed if it was not written to for a day.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from teach_once.runtime.safe.safe_read import BadFile, kind_of_file
from teach_once.runtime.safe.text import one_line

_MOST_PROCESSES = 10_000_000  # Linux has at most 2**22
_SECONDS_TO_KEEP = 24 * 3600


@contextmanager
def written_aside(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path next to `path`; at the end it is renamed to `path`.

    The content and the rename are flushed to disk. On an error the temporary file is removed and
    `path` does not change. suffix: suffix of the temporary name, for writers that require one. A
    link is replaced, not followed. Raises BadFile if `path` is a folder or another special file.
    For folders from untrusted sources use `runtime.safe.confined`.
    """
    if not path.is_symlink() and path.exists() and not path.is_file():
        raise BadFile(path, f"is {kind_of_file(path.stat().st_mode)}, expected a regular file")
    for abandoned in _abandoned(path, rf"(?:[0-9a-f]{{8}}\.)?([0-9]+)\.tmp{re.escape(suffix)}"):
        abandoned.unlink(missing_ok=True)
    token = secrets.token_hex(4)  # unpredictable, so that no link can be placed there
    aside = path.with_name(f".{path.name}.{token}.{_own_number()}.tmp{suffix}")
    try:
        yield aside
        with aside.open("rb") as done:
            os.fsync(done.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    flush_folder(path.parent)


@contextmanager
def folder_written_aside(folder: Path, own: Collection[str]) -> Iterator[Path]:
    """Yield a new folder next to `folder` that takes its name at the end, complete and flushed.

    own: names of the files that it will contain. An existing folder with only such files is
    replaced. After an error or a kill, `folder` is not the new folder, and the next call removes
    leftovers. Raises BadFile if `folder` contains any other file.
    """
    if folder.is_symlink() and not folder.exists():
        raise BadFile(folder, "is a broken link")
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    _check_no_foreign(folder, own)
    aside = _aside(folder)
    aside.mkdir()
    try:
        yield aside
        for file in aside.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        flush_folder(aside)
        _take_place(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    flush_folder(folder.parent)


def _aside(folder: Path, of: str = "new") -> Path:
    return folder.with_name(f".{folder.name}.{of}.{_own_number()}.tmp")


def _take_place(new: Path, folder: Path) -> None:
    """Replace an existing folder by two renames; in between, no folder has the name.

    If the second rename fails, the old folder is restored; after a kill, by the next process.
    """
    if not folder.exists():
        new.rename(folder)
        return
    old = _aside(folder, "old")
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def _check_no_foreign(folder: Path, own: Collection[str]) -> None:
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise BadFile(folder, f"is {kind_of_file(folder.lstat().st_mode)}, expected a folder")
    for file in folder.iterdir():
        if file.name not in own or not stat.S_ISREG(file.lstat().st_mode):
            raise BadFile(
                folder,
                f"contains {one_line(file.name)}, which would be lost: the folder is replaced",
                fix="choose a new folder, or one that contains only an earlier export",
            )


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left of `folder`, and restore an old folder without its name."""
    for abandoned in _abandoned(folder, r"new\.([0-9]+)\.tmp"):
        shutil.rmtree(abandoned, ignore_errors=True)
    for earlier in _abandoned(folder, r"old\.([0-9]+)\.tmp"):
        if folder.exists():
            shutil.rmtree(earlier, ignore_errors=True)
        else:
            earlier.rename(folder)


def _abandoned(path: Path, ending: str) -> list[Path]:
    """List the temporary files or folders of `path` whose process no longer runs.

    ending: pattern of the name after ".NAME.", whose group is the number of the process.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{ending}")
    found = []
    for name in os.listdir(path.parent):
        match = pattern.fullmatch(name)
        each = path.with_name(name)
        if match and not each.is_symlink() and not _may_be_in_use(each, int(match[1])):
            found.append(each)
    return found


def _may_be_in_use(file: Path, number: int) -> bool:
    """Return True if the process of that number runs, or cannot be looked up from here."""
    if number == _own_number():
        return False
    namespace, process = divmod(number, _MOST_PROCESSES)
    if namespace == _namespace():
        return Path(f"/proc/{process}").exists()
    try:
        return time.time() - file.stat().st_mtime < _SECONDS_TO_KEEP
    except FileNotFoundError:
        return False


def _own_number() -> int:
    """Return this process's number, unique among the machines and containers of a shared folder."""
    return _namespace() * _MOST_PROCESSES + os.getpid()


@functools.cache
def _namespace() -> int:
    """Return a number of 32 bits for the numbers that processes have here until the next boot."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    name = boot + os.readlink("/proc/self/ns/pid")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])


def write_atomically(path: Path, data: bytes | NDArray[np.uint8]) -> None:
    """Write bytes through `written_aside`."""
    with written_aside(path) as aside, aside.open("wb") as file:
        file.write(cast(Any, data))


def flush_folder(folder: Path) -> None:
    """Make a rename or a new file in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
