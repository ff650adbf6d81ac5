"""Finds the cache of an identity among those of a folder or a URL, whatever it is called."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from teach_once.store.errors import (
    CacheAmbiguous,
    CacheError,
    CacheMismatch,
    CacheMissing,
    CacheNotWritable,
    PassCommand,
)
from teach_once.store.format.spec import MANIFEST, cache_path
from teach_once.store.identity import (
    Difference,
    Identity,
    differences,
    identity_sha256,
    with_weights_of,
)
from teach_once.store.place.bucket import NoBucket, ObjectsUnreachable
from teach_once.store.place.open import place_at
from teach_once.store.read.reader import TeacherCache
from teach_once.store.read.zarr_source import manifest_at


def find_cache(
    caches_dir: Path,
    teacher: str,
    identity: Identity,
    *,
    num_views: int | None = None,
    taps: Collection[str] | None = None,
) -> TeacherCache:
    """Open the cache of exactly this identity. num_views and taps as in `TeacherCache.open`.

    Where the weights file is missing, so that the identity does not know its weights, the one cache
    that agrees in all that is known; CacheAmbiguous if there are several. Raises CacheMissing where
    `teacher` has no cache at all, else CacheMismatch with the differences from the nearest one.
    """
    exact = cache_folder(caches_dir, teacher, identity)
    if has_manifest(exact):
        return TeacherCache.open(exact, num_views=num_views, taps=taps)
    compared = [
        (path, _differences_but_unknown_weights(identity, theirs))
        for path, theirs in _identities(caches_dir)
    ]
    agreeing = [path for path, differing in compared if not differing]
    if len(agreeing) == 1:
        return TeacherCache.open(agreeing[0], num_views=num_views, taps=taps)
    if agreeing:
        names = ", ".join(path.name for path in agreeing)
        raise CacheAmbiguous(
            f"the teacher's weights file is missing, and several caches fit: {names}",
            fix="name one with --cache PATH (make train-student CACHE=PATH)",
        )
    of_teacher = [each for each in compared if each[0].name.startswith(f"{teacher}-")]
    raise _not_found(caches_dir, teacher, of_teacher)


def _not_found(
    caches_dir: Path, teacher: str, others: list[tuple[Path, list[Difference]]]
) -> CacheError:
    fix = PassCommand(teacher)
    if not others:
        return CacheMissing(f"{caches_dir} holds no cache of the teacher {teacher!r}", fix=fix)
    path, differing = min(others, key=lambda each: len(each[1]))
    return CacheMismatch(
        f"{caches_dir} holds no cache of this configuration; {path.name} differs in",
        differences=differing,
        fix=fix,
    )


def cache_folder(caches_dir: Path, teacher: str, identity: Identity) -> Path:
    """The folder of the cache of this identity, existing or to be created.

    A folder of the usual name comes first, even if its manifest cannot be read.
    """
    usual = cache_path(caches_dir, teacher, identity)
    theirs = _identity_at(usual)
    if has_manifest(usual) and (theirs is None or _are_equal(theirs, identity)):
        return usual
    return next((p for p, other in _identities(caches_dir) if _are_equal(other, identity)), usual)


def has_manifest(path: Path) -> bool:
    """Return True if a cache is, or was, at `path`; its manifest may be damaged."""
    return place_at(path).has(MANIFEST)


def other_dataset_state(caches_dir: Path, identity: Identity) -> TeacherCache | None:
    """The newest complete cache that differs from `identity` in the samples alone, if any."""
    paths = [p for p, other in _identities(caches_dir) if differs_in_samples_alone(identity, other)]
    for path in sorted(paths, key=_seconds, reverse=True):
        try:
            return TeacherCache.open(path)
        except CacheError:
            continue
    return None


def _seconds(path: Path) -> float:
    """Return when a cache's folder was last changed; 0 for every cache of a bucket."""
    return path.stat().st_mtime if place_at(path).is_local else 0.0


def differs_in_samples_alone(identity: Identity, other: Identity) -> bool:
    """Return True if nothing but the dataset's digest differs. Unknown weights may be any."""
    differing = _differences_but_unknown_weights(identity, other)
    return [each.field for each in differing] == ["dataset.digest"]


def _differences_but_unknown_weights(identity: Identity, other: Identity) -> list[Difference]:
    return differences(with_weights_of(identity, other), other)


def _identities(caches_dir: Path) -> Iterator[tuple[Path, Identity]]:
    """Every cache in a folder, or below a URL, with a manifest that can be read, by name."""
    place = place_at(caches_dir)
    paths = [caches_dir / name for name in sorted(place.list_folders())]
    for path, identity in zip(paths, place.at_once(_identity_at, paths, len(paths)), strict=True):
        if identity is not None:
            yield path, identity


def _identity_at(path: Path) -> Identity | None:
    """Raises ObjectsUnreachable, NoBucket."""
    try:
        return manifest_at(place_at(path)).identity
    except (ObjectsUnreachable, NoBucket, CacheNotWritable):
        raise
    except CacheError:
        return None


def _are_equal(one: Identity, other: Identity) -> bool:
    return identity_sha256(one) == identity_sha256(other)
