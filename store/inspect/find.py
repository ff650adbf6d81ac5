"""Find the cache of an identity in a folder or below a URL, whatever its folder's name."""

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

    If the weights file is missing, the identity is incomplete, and the only cache that agrees with
    its known part is opened.

    Raises CacheAmbiguous if several caches agree, CacheMissing if `teacher` has no cache, otherwise
    CacheMismatch with the differences from the most similar cache.
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
        return CacheMissing(f"{caches_dir} contains no cache of the teacher {teacher!r}", fix=fix)
    path, differing = min(others, key=lambda each: len(each[1]))
    return CacheMismatch(
        f"{caches_dir} contains no cache of this configuration; {path.name} differs in",
        differences=differing,
        fix=fix,
    )


def cache_folder(caches_dir: Path, teacher: str, identity: Identity) -> Path:
    """Return the folder of the cache of this identity, existing or to be created.

    A folder with the default name is preferred, even if its manifest cannot be read.
    """
    usual = cache_path(caches_dir, teacher, identity)
    theirs = _identity_at(usual)
    if has_manifest(usual) and (theirs is None or _are_equal(theirs, identity)):
        return usual
    return next((p for p, other in _identities(caches_dir) if _are_equal(other, identity)), usual)


def has_manifest(path: Path) -> bool:
    """Return True if there is or was a cache at `path`; its manifest may be damaged."""
    return place_at(path).has(MANIFEST)


def other_dataset_state(caches_dir: Path, identity: Identity) -> TeacherCache | None:
    """Return the newest complete cache that differs from `identity` only in the samples; None if
    none.
    """
    paths = [p for p, other in _identities(caches_dir) if differs_in_samples_alone(identity, other)]
    for path in sorted(paths, key=_seconds, reverse=True):
        try:
            return TeacherCache.open(path)
        except CacheError:
            continue
    return None


def _seconds(path: Path) -> float:
    """Return the time when a cache's folder was last changed; 0 for every cache in a bucket."""
    return path.stat().st_mtime if place_at(path).is_local else 0.0


def differs_in_samples_alone(identity: Identity, other: Identity) -> bool:
    """Return True if only the dataset's digest differs. Unknown weights count as equal."""
    differing = _differences_but_unknown_weights(identity, other)
    return [each.field for each in differing] == ["dataset.digest"]


def _differences_but_unknown_weights(identity: Identity, other: Identity) -> list[Difference]:
    return differences(with_weights_of(identity, other), other)


def _identities(caches_dir: Path) -> Iterator[tuple[Path, Identity]]:
    """Yield (path, identity) of every cache with a readable manifest below a folder or URL."""
    place = place_at(caches_dir)
    paths = [caches_dir / name for name in sorted(place.list_folders())]
    for path, identity in zip(paths, place.at_once(_identity_at, paths, len(paths)), strict=True):
        if identity is not None:
            yield path, identity


def _identity_at(path: Path) -> Identity | None:
    """Return the identity of a cache; None if its manifest cannot be read.

    Raises ObjectsUnreachable, NoBucket, CacheNotWritable.
    """
    try:
        return manifest_at(place_at(path)).identity
    except (ObjectsUnreachable, NoBucket, CacheNotWritable):
        raise
    except CacheError:
        return None


def _are_equal(one: Identity, other: Identity) -> bool:
    return identity_sha256(one) == identity_sha256(other)
