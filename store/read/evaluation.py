"""Evaluation caches: caches of one view of a held-out split, inside a cache.

`<cache>/evaluation/<name>/` is a complete cache with its own manifest, arrays and journal, and the
same code reads and writes it: open a writer or a `TeacherCache` at `evaluation_path`. Its identity
contains its parent's, so the outputs of one teacher are never mistaken for another's.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from teach_once.runtime.safe.text import one_line
from teach_once.store.errors import CacheError, CacheMismatch, Fault
from teach_once.store.format.spec import MANIFEST
from teach_once.store.identity import EVALUATION, NAME_PATTERN, PARENT, Identity, identity_sha256
from teach_once.store.place.open import place_at
from teach_once.store.read.hdf5 import (
    hdf5_evaluations,
    hdf5_group,
    is_hdf5,
    read_hdf5_manifest,
)
from teach_once.store.read.mirror import attach, mirror_of
from teach_once.store.read.reader import TeacherCache
from teach_once.store.read.zarr_source import manifest_at

TEST = "test"
PROBES = ("probe-train", "probe-test")
_DIGITS = 8  # of the identity's sha256, in a name
_OTHER_PARENT = "belongs to another cache than the one around it"


def evaluation_path(cache: Path, name: str) -> Path:
    """Return the path of an evaluation cache. Raises CacheError if it cannot have that name."""
    if not _is_name(name):
        raise CacheError(f"{one_line(name)!r} is not a name of an evaluation cache")
    return cache / EVALUATION / name


def evaluation_name(identity: Identity, prefix: str = TEST) -> str:
    """Return the name of an evaluation cache. prefix: `TEST`, or one of `PROBES`."""
    return f"{prefix}-{identity_sha256(identity)[:_DIGITS]}"


def evaluation_names(cache: Path) -> list[str]:
    """Return the names of the evaluation caches inside a cache, in order.

    cache: a folder, a URL or an exported file.
    """
    _attach(cache)
    place = place_at(cache)
    if place.is_local and cache.is_file():
        return list(filter(_is_name, hdf5_evaluations(cache))) if is_hdf5(cache) else []
    names = filter(_is_name, place.list_folders(EVALUATION))
    return sorted(name for name in names if place.has(f"{EVALUATION}/{name}/{MANIFEST}"))


def open_evaluation(cache: Path, parent: Identity, name: str) -> TeacherCache:
    """Open an evaluation cache. Raises CacheError, also if it belongs to another parent."""
    path = evaluation_path(cache, name)
    _attach(cache)
    opened = TeacherCache.open(path)
    if opened.identity.get(PARENT) != identity_sha256(parent):
        raise CacheMismatch(
            f"{one_line(opened.path)} {_OTHER_PARENT}",
            fix="move it away, then evaluate the teacher again",
        )
    return opened


def _attach(cache: Path) -> None:
    """Mirror the evaluation caches of a cache that is read through a mirror."""
    if (mirror := mirror_of(cache.parent)) is not None:
        attach(mirror.url / cache.name / EVALUATION, mirror.root, mirror.most_bytes)


def parent_faults(cache: Path, parent: Identity) -> list[Fault]:
    """Return a fault for each evaluation cache inside `cache` that belongs to another parent.

    A cache with an unreadable manifest is skipped, because checking it reports the error.
    """
    faults = []
    for name in evaluation_names(cache):
        path = evaluation_path(cache, name)
        with suppress(CacheError):
            if _identity_at(path).get(PARENT) != identity_sha256(parent):
                faults.append(Fault(_OTHER_PARENT, path))
    return faults


def _identity_at(path: Path) -> Identity:
    if (found := hdf5_group(path)) is not None:
        return read_hdf5_manifest(*found).identity
    return manifest_at(place_at(path)).identity


def _is_name(name: str) -> bool:
    return re.fullmatch(NAME_PATTERN, name) is not None and ".." not in name
