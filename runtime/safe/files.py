"""Writes files so that a crash leaves the old one or the new one, never half of one.

A killed process leaves its temporary file behind. The next writer of the same name removes it, if
that process is gone. On a shared folder the process may belong to another machine or container,
where it cannot be looked up: such a file is removed only if nothing was written to it for a day.
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
    """Yield a temporary path beside `path`; at the end it is renamed to `path`.

    The content and the rename are flushed to disk. On an error the temporary file is removed and
    `path` stays as it was. suffix: of the temporary name, for writers that insist on one. For files
    of folders that may come from somebody else, see `runtime.safe.confined`. Raises BadFile where
    `path` is a folder or another special file; a link is replaced, not followed.
    """
    if not path.is_symlink() and path.exists() and not path.is_file():
        raise BadFile(path, f"is {kind_of_file(path.stat().st_mode)}, expected a regular file")
    for abandoned in _abandoned(path, rf"(?:[0-9a-f]{{8}}\.)?([0-9]+)\.tmp{re.escape(suffix)}"):
        abandoned.unlink(missing_ok=True)
    token = secrets.token_hex(4)  # unpredictable: nobody can put a link there
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
    """Yield a new folder beside `folder`, which takes its name at the end: whole, and flushed.

    own: the names of the files that will be in it. An earlier folder of nothing but such files is
    replaced as a whole. On an error, or a kill, nothing of the new one has that name; what a killed
    process left beside it is removed by the next. Raises BadFile where anything else is there.
    """
    if folder.is_symlink() and not folder.exists():
        raise BadFile(folder, "is a link that leads nowhere")
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    _refuse_foreign(folder, own)
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
    """Two renames where there was an earlier folder: in between there is none of that name.

    If the second one fails the earlier folder gets its name back, after a kill by the next process.
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


def _refuse_foreign(folder: Path, own: Collection[str]) -> None:
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise BadFile(folder, f"is {kind_of_file(folder.lstat().st_mode)}, expected a folder")
    for file in folder.iterdir():
        if file.name not in own or not stat.S_ISREG(file.lstat().st_mode):
            raise BadFile(
                folder,
                f"holds {one_line(file.name)}, which would be lost: the folder is replaced whole",
                fix="name a new folder, or one that holds nothing but an earlier export",
            )


def _remove_abandoned(folder: Path) -> None:
    """What killed processes left of the same folder; an earlier one that lost its name gets it."""
    for abandoned in _abandoned(folder, r"new\.([0-9]+)\.tmp"):
        shutil.rmtree(abandoned, ignore_errors=True)
    for earlier in _abandoned(folder, r"old\.([0-9]+)\.tmp"):
        if folder.exists():
            shutil.rmtree(earlier, ignore_errors=True)
        else:
            earlier.rename(folder)


def _abandoned(path: Path, ending: str) -> list[Path]:
    """List the temporary files or folders of `path` whose process is gone.

    ending: pattern of the name behind ".NAME.", whose group is the number of the process.
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
