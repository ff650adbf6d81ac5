"""Opening a cache while another process grows or trims it: the old one or the new one, never both.

A writer replaces the manifest in one step and keeps all around it readable by the manifest that is
there, in this order:

    growing   zarr.json.next, [on a store: journal], manifest, zarr.json, chunks, journal lines
    trimming  zarr.json.next, manifest, zarr.json, journal lines, chunks

A reader takes several steps: manifest, journal, zarr.json, labels. If the manifest is replaced in
between, what follows may belong to the new one only. So an error is believed if the manifest is
still the one from before; else the cache is opened again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from teach_once.runtime.machine.urls import ObjectUrl
from teach_once.store.errors import (
    CacheDamaged,
    CacheError,
    CacheIncomplete,
    CacheMissing,
    UnknownTap,
    UnknownView,
)
from teach_once.store.format.spec import MANIFEST
from teach_once.store.place.objects import NoBucket, Objects

Opened = TypeVar("Opened")

_TRIES = 8
_MAY_BE_HALF = (CacheDamaged, CacheIncomplete, CacheMissing, UnknownTap, UnknownView)


def open_steadily(path: Path, attempt: Callable[[], Opened]) -> Opened:
    """attempt(), again while the manifest below `path` is replaced; raises what that raises.

    path: a folder, or a URL, whose manifest is asked for only after an error.
    """
    before = None if isinstance(path, ObjectUrl) else _stamp(path)
    for _ in range(_TRIES):
        try:
            return attempt()
        except _MAY_BE_HALF as error:
            if isinstance(error, NoBucket):
                raise
            after = _stamp(path)
            if after == before:
                raise
            before = after
    return attempt()


def _stamp(path: Path) -> object:
    """Another value whenever the manifest is another one; None without a manifest."""
    try:
        if isinstance(path, ObjectUrl):
            return Objects(path).get_tagged(MANIFEST, 0).tag
        status = os.stat(path / MANIFEST)
    except (OSError, CacheError):
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
