"""Writes files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from runtime.reading import BadFile, kind_of_file
from runtime.text import one_line


@contextmanager
def written_aside(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path beside `path`; at the end it is renamed to `path`.

    The content and the rename are flushed to disk. On an error the temporary file is removed and
    `path` stays as it was. suffix: of the temporary name, for writers that insist on one. For files
    of folders that may come from somebody else, see `runtime.inside`. Raises BadFile where `path`
    is a folder or another special file; a link is replaced, not followed.
    """
    if not path.is_symlink() and path.exists() and not path.is_file():
        raise BadFile(path, f"is {kind_of_file(path.stat().st_mode)}, expected a regular file")
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp{suffix}")
    aside.unlink(missing_ok=True)  # what a killed process of the same number left, or a link
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
    _refuse_foreign(folder, own)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    aside = _aside(folder, os.getpid())
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


def _aside(folder: Path, process: int, of: str = "new") -> Path:
    return folder.with_name(f".{folder.name}.{of}.{process}.tmp")


def _take_place(new: Path, folder: Path) -> None:
    """Two renames where there was an earlier folder: in between there is none of that name."""
    if not folder.exists():
        new.rename(folder)
        return
    old = _aside(folder, os.getpid(), "old")
    folder.rename(old)
    new.rename(folder)
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
    """What killed processes left of the same folder."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.(?:new|old)\.([0-9]+)\.tmp")
    for each in folder.parent.iterdir():
        found = pattern.fullmatch(each.name)
        if found and not each.is_symlink() and not _is_running(int(found[1])):
            shutil.rmtree(each, ignore_errors=True)


def _is_running(process: int) -> bool:
    return process != os.getpid() and Path(f"/proc/{process}").exists()


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
