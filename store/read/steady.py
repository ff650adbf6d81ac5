"""Open a cache while another process grows or trims it: either the old one or the new one.

A writer replaces the manifest in one step. Everything else stays readable with the current
manifest, because it changes in this order:

    growing   zarr.json.next, [on a store: journal], manifest, zarr.json, chunks, journal lines
    trimming  zarr.json.next, manifest, zarr.json, journal lines, chunks

A reader takes several steps: manifest, journal, zarr.json, labels. If the manifest is replaced in
between, the following files may belong only to the new one. So an error only counts if the manifest
has not changed; otherwise the cache is opened again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from teach_once.runtime.safe.safe_read import BadFile
from teach_once.store.errors import (
    CacheDamaged,
    CacheError,
    CacheIncomplete,
    CacheMissing,
    UnknownTap,
    UnknownView,
)
from teach_once.store.format.spec import MANIFEST
from teach_once.store.place.bucket import NoBucket
from teach_once.store.place.place import Place

Opened = TypeVar("Opened")

_TRIES = 8
_MAY_BE_HALF = (CacheDamaged, CacheIncomplete, CacheMissing, UnknownTap, UnknownView)


def open_steadily(place: Place, attempt: Callable[[], Opened]) -> Opened:
    """Return attempt(), repeated while the manifest at `place` is replaced; raises its error.

    A bucket's manifest tag is requested only after an error, because it costs a request.
    """
    before = _tag(place) if place.is_local else None
    for _ in range(_TRIES):
        try:
            return attempt()
        except _MAY_BE_HALF as error:
            if isinstance(error, NoBucket):
                raise
            after = _tag(place)
            if after == before:
                raise
            before = after
    return attempt()


def _tag(place: Place) -> str | None:
    """Return a value that changes whenever the manifest is replaced; None without a manifest."""
    try:
        found = place.read(MANIFEST, 0)
    except (OSError, CacheError, BadFile):
        return None
    return None if found is None else found.tag
