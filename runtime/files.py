"""Writes files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray


@contextmanager
def written_aside(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path beside `path`; at the end it is renamed to `path`.

    The content and the rename are flushed to disk. On an error the temporary file is removed and
    `path` stays as it was. suffix: of the temporary name, for writers that insist on one.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp{suffix}")
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
