"""A cache on an object store, read through a folder on this machine.

Requested chunks are fetched into a folder with the usual layout, many at a time, and verified on
arrival; from then on the cache is local. The folder has a size limit with LRU eviction. The files
of the last two requested views are never evicted, because training needs them as its current and
next view.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from teach_once.runtime.formats import format_size
from teach_once.runtime.machine.urls import BadUrl, ObjectUrl
from teach_once.runtime.safe.confined import (
    OpenRoot,
    listed_inside,
    make_folder_inside,
    remove_inside,
    write_inside,
)
from teach_once.store.errors import CacheDamaged, CacheError, CacheFull, CacheMissing
from teach_once.store.format.content import holds_bytes
from teach_once.store.format.manifest import MAX_MANIFEST_BYTES
from teach_once.store.format.spec import MANIFEST
from teach_once.store.place.bucket import Bucket, in_parallel
from teach_once.store.place.mirror_folder import MirrorFolder, Needs, use_mirror

_CACHE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .,+=@~_-]{0,180}")
_MOST_MANIFESTS_BYTES = 2**28  # of all caches at a URL
_MOST_CACHES = 10_000  # at a URL; each takes a request
_attached: dict[Path, Mirror] = {}  # absolute folder of caches -> its mirror
_attached_needs: dict[Path, Needs] = {}  # the manifests there


class Mirror(NamedTuple):
    """A mirrored URL, the mirror's folder, and its maximum size in bytes."""

    url: ObjectUrl
    root: Path
    most_bytes: int

    @property
    def folder(self) -> MirrorFolder:
        return MirrorFolder(self.root, self.most_bytes)

    @property
    def place(self) -> PurePath:
        """The folder of the caches, relative to `root`."""
        return PurePath(self.url.bucket, self.url.key)

    def write(self, opened: OpenRoot, needs: Needs, documents: Mapping[str, bytes]) -> None:
        """Write the small files that differ from the existing ones, and mark all of them as needed.

        opened: the locked root. documents: name below `place` -> content. Raises CacheFull.
        """
        needs.add(self.root / self.place / name for name in documents)
        absent = {
            self.place / name: content
            for name, content in documents.items()
            if not holds_bytes(opened, str(self.place / name), content)
        }
        if absent:
            self.folder.make_room(opened, sum(map(len, absent.values())))
        else:  # no need to list the mirror's files
            self.folder.announce(opened)
        for place, content in absent.items():
            write_inside(opened, place, content)


def attach(url: ObjectUrl, root: Path, most_bytes: int, names: Sequence[str] | None = None) -> Path:
    """Return the folder below `root` that mirrors the caches at `url`, with their manifests.

    names: the requested caches; default: all. Opening a cache of that folder in this process reads
    through to the store. Raises NoBucket, ObjectsUnreachable, or CacheError if `root` is not a
    mirror.
    """
    folder, mirror = root / url.bucket / url.key, Mirror(url, root, most_bytes)
    every = Bucket(url).names()[0] if names is None else names
    wanted = [name for name in every if _CACHE_NAME.fullmatch(name) and ".." not in name]
    manifests = _manifests(mirror, wanted)
    with mirror.folder.locked() as opened:
        make_folder_inside(opened, mirror.place)
        needs = _attached_needs[folder.absolute()] = Needs(root)
        mirror.write(opened, needs, manifests)
        if names is None:
            for gone in set(listed_inside(opened, mirror.place)) - set(wanted):
                if not (folder / gone).is_file():
                    remove_inside(opened, mirror.place / gone / MANIFEST)
    attach_again({folder.absolute(): mirror})
    return folder


def choose_mirror(root: Path, most_gb: float) -> None:
    """Read packed images at URLs through this mirror, too. most_gb: in 10^9 bytes."""
    use_mirror(MirrorFolder(root, int(most_gb * 1e9)))


def local_folder(caches: Path, root: Path, most_gb: float) -> Path:
    """Return the folder to read caches from: `caches`, or its mirror if it is a URL.

    most_gb: as of `choose_mirror`, which this calls. Raises as `attach`.
    """
    choose_mirror(root, most_gb)
    if isinstance(caches, ObjectUrl):
        return attach(caches, root, int(most_gb * 1e9))
    return caches


def local_caches(
    caches: Path, cache: Path | None, root: Path, most_gb: float
) -> tuple[Path, Path | None]:
    """Return the folder of caches and the path of `cache`, as `local_folder`.

    If `cache` is a URL, only its parent is attached.
    """
    if not isinstance(cache, ObjectUrl):
        return local_folder(caches, root, most_gb), cache
    if not cache.key:
        raise BadUrl(f"{cache} is a bucket, not a cache", fix="s3://bucket/prefix/cache")
    choose_mirror(root, most_gb)
    folder = attach(cache.parent, root, int(most_gb * 1e9), [cache.name])
    return folder, folder / cache.name


def named_as(caches_dir: Path) -> Path:
    """Return the user's name of a folder of caches: the URL of a mirrored one."""
    mirror = mirror_of(caches_dir)
    return caches_dir if mirror is None else mirror.url


def shown_path(cache: Path) -> Path:
    """Return the user's name of a cache: the URL of a mirrored one."""
    return named_as(cache.parent) / cache.name if mirror_of(cache.parent) else cache


def attached() -> dict[Path, Mirror]:
    """Return the mirrors of this process, for another process's `attach_again`."""
    return dict(_attached)


def attach_again(mirrors: dict[Path, Mirror]) -> None:
    """Read through to the store below these folders, too."""
    _attached.update(mirrors)


def mirror_of(caches_dir: Path) -> Mirror | None:
    """Return the mirror that a folder of caches belongs to; None for an ordinary folder."""
    return _attached.get(caches_dir.absolute())


def _manifests(mirror: Mirror, names: Sequence[str]) -> dict[str, bytes]:
    """Fetch the caches' manifests: {name below the mirror's folder: bytes}. Raises CacheFull."""
    found, total = dict[str, bytes](), 0
    if len(names) > _MOST_CACHES:
        raise CacheError(
            f"{mirror.url} contains {len(names):,} folders, too many to look for caches in each",
            fix=f"name the cache: --cache {mirror.url}/CACHE",
        )
    most = min(_MOST_MANIFESTS_BYTES, mirror.most_bytes)

    def manifest(name: str) -> bytes | None:
        objects = Bucket(mirror.url / name)
        try:
            return objects.get(MANIFEST, min(most, MAX_MANIFEST_BYTES))
        except (
            CacheMissing,
            CacheDamaged,
        ):  # other folders may still be caches
            return None

    for name, content in zip(names, in_parallel(manifest, names), strict=True):
        if content is not None:
            found[f"{name}/{MANIFEST}"] = content
            if (total := total + len(content)) > most:
                raise CacheFull(
                    f"the manifests of the caches at {mirror.url} have more than "
                    f"{format_size(total)}, but {mirror.root} is limited to {format_size(most)}",
                    fix=f"name the cache: --cache {mirror.url}/CACHE",
                )
    return found
