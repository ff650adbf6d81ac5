"""Writes files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from runtime.reading import BadFile, kind_of_file


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
