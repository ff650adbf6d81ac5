"""A cache on an object store, read through a folder on this machine.

What is read is fetched into a folder of the ordinary layout, many chunks at a time, each verified
when it arrives; from there on the cache is a local one. The folder has a limit: what was not read
for the longest time goes first, never what the last two views that were asked for need, which are a
training's current one and its next one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from runtime.inside import remove_inside, write_inside
from runtime.urls import BadUrl, ObjectUrl
from store.chunks import content_fault, size_fault
from store.content import holds_bytes
from store.errors import CacheDamaged, CacheMissing
from store.faults import Fault
from store.folder import FolderSource
from store.identity import identity_sha256
from store.journal import journal_text
from store.layout import JOURNAL, MANIFEST, ZARR_GROUP, Block, chunk_path, crc_hex
from store.manifest import MAX_MANIFEST_BYTES
from store.metadata import checksum_of, zarr_metadata
from store.mirror_folder import MirrorFolder, Needs, use_mirror
from store.objects import Objects, in_parallel
from store.remote import RemoteSource, remote_damage
from store.values import Check

_CACHE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .,+=@~_-]{0,180}")
_attached: dict[Path, Mirror] = {}  # folder of caches, absolute -> what it mirrors


class Mirror(NamedTuple):
    """What is mirrored, below which folder, and how many bytes may lie there."""

    url: ObjectUrl
    root: Path
    most_bytes: int

    @property
    def folder(self) -> MirrorFolder:
        return MirrorFolder(self.root, self.most_bytes)


def attach(url: ObjectUrl, root: Path, most_bytes: int, names: Sequence[str] | None = None) -> Path:
    """The folder below `root` that mirrors the caches at `url`, with their manifests.

    names: of the caches that are looked for; default: all. Opening a cache of that folder in this
    process reads through to the store. Raises NoBucket, ObjectsUnreachable; CacheError where `root`
    is a folder of something else.
    """
    folder, mirror = root / url.bucket / url.key, Mirror(url, root, most_bytes)
    every = Objects(url).names()[0] if names is None else names
    wanted = [name for name in every if _CACHE_NAME.fullmatch(name) and ".." not in name]
    contents = list(in_parallel(lambda name: _manifest(url / name), wanted))
    with mirror.folder.locked():
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in zip(wanted, contents, strict=True):
            if content is not None:
                (folder / name).mkdir(exist_ok=True)
                _write(folder / name, MANIFEST, content)
        if names is None:
            for gone in {each.name for each in folder.iterdir()} - set(wanted):
                if (folder / gone).is_dir():
                    remove_inside(folder / gone, MANIFEST)
    attach_again({folder.absolute(): mirror})
    return folder


def choose_mirror(root: Path, most_gb: float) -> None:
    """Packed images at a URL come through this mirror, too. most_gb: in 10^9 bytes."""
    use_mirror(MirrorFolder(root, int(most_gb * 1e9)))


def local_folder(caches: Path, root: Path, most_gb: float) -> Path:
    """The folder to read caches from: `caches`, or the one in the mirror that mirrors a URL.

    most_gb: as of `choose_mirror`, which this calls. Raises as `attach`.
    """
    choose_mirror(root, most_gb)
    if isinstance(caches, ObjectUrl):
        return attach(caches, root, int(most_gb * 1e9))
    return caches


def local_caches(
    caches: Path, cache: Path | None, root: Path, most_gb: float
) -> tuple[Path, Path | None]:
    """The folder of caches, and the path of the one that was named, as `local_folder`.

    Of a cache that is named by a URL, only the folder around it is attached.
    """
    if not isinstance(cache, ObjectUrl):
        return local_folder(caches, root, most_gb), cache
    if not cache.key:
        raise BadUrl(f"{cache} is a bucket, not a cache", fix="s3://bucket/prefix/cache")
    choose_mirror(root, most_gb)
    around = ObjectUrl(*cache.parent.parts)
    folder = attach(around, root, int(most_gb * 1e9), [cache.name])
    return folder, folder / cache.name


def named_as(caches_dir: Path) -> Path:
    """What the user calls a folder of caches: of one in a mirror, the URL."""
    mirror = mirror_of(caches_dir)
    return caches_dir if mirror is None else mirror.url


def shown_path(cache: Path) -> Path:
    """What the user calls a cache: of one in a mirror, its URL."""
    return named_as(cache.parent) / cache.name if mirror_of(cache.parent) else cache


def attached() -> dict[Path, Mirror]:
    """The mirrors of this process, for another one: see `attach_again`."""
    return dict(_attached)


def attach_again(mirrors: dict[Path, Mirror]) -> None:
    """Read through to the store below these folders, too."""
    _attached.update(mirrors)


def mirror_of(caches_dir: Path) -> Mirror | None:
    """What the caches in a folder mirror; None for an ordinary folder."""
    return _attached.get(caches_dir.absolute())


def _manifest(url: Path) -> bytes | None:
    try:
        return Objects(ObjectUrl(*url.parts)).get(MANIFEST, MAX_MANIFEST_BYTES)
    except (CacheMissing, CacheDamaged):  # what is no cache keeps nobody from the others
        return None


class _Wanted(NamedTuple):
    """A file of the cache, the bytes that it must have, and its checksum."""

    path: Path
    size: int
    committed: str


@dataclass(frozen=True)
class MirroredSource(FolderSource):
    """Reads a cache's folder, and fetches what that lacks."""

    remote: RemoteSource = field(kw_only=True)
    mirror: Mirror = field(kw_only=True)
    needs: Needs = field(kw_only=True, repr=False, compare=False)

    @classmethod
    def through(cls, path: Path, mirror: Mirror) -> MirroredSource:
        """The cache at `path`, a folder in the mirror. Raises as `RemoteSource.at`."""
        remote = RemoteSource.at(ObjectUrl(*(mirror.url / path.name).parts))
        manifest = remote.manifest
        needs = Needs(mirror.root)
        with mirror.folder.locked():
            path.mkdir(parents=True, exist_ok=True)  # in a process on another machine
            for name, text in zarr_metadata(manifest).items():
                key = f"{ZARR_GROUP}/{name}"
                own = checksum_of(text) == manifest.zarr_crc32c[name]
                if not holds_bytes(path, key, text):
                    _write(path, key, text if own else remote.objects.get(key))
            identity = identity_sha256(manifest.identity)
            text = journal_text(identity, manifest, remote.journal.committed)
            _write(path, f"{JOURNAL}/000001-0000.jsonl", text)
        return cls(path, manifest, remote.journal, remote=remote, mirror=mirror, needs=needs)

    def damaged(self, fault: Fault) -> CacheDamaged:
        return remote_damage(self.manifest.teacher, fault, self.remote.path)

    def fetch(self, chunks: Sequence[tuple[str, Block]]) -> None:
        """Fetch what is missing of these chunks, many at a time. Raises CacheFull, CacheDamaged."""
        wanted = {self._wanted(*chunk): chunk[1].view for chunk in chunks}
        for view in dict.fromkeys(wanted.values()):
            self.needs.remember(view, [each.path for each, of in wanted.items() if of == view])
        if not _absent(wanted):
            return
        with self.mirror.folder.locked():
            absent = _absent(wanted)  # others may have fetched some meanwhile
            self.mirror.folder.make_room(sum(each.size for each in absent))
            for _ in in_parallel(self._bring, absent):
                pass

    def mapped(self, array: str, block: Block) -> NDArray[Any]:
        self.fetch([(array, block)])
        try:
            return super().mapped(array, block)
        except CacheDamaged:  # another process has just removed it
            with self.mirror.folder.locked():
                self._bring_again(self._wanted(array, block))
                return super().mapped(array, block)

    def _read(
        self,
        path: Path,
        out: NDArray[Any] | None,
        size: int,
        committed: str,
        value_bytes: int | None = None,
        check: Check | None = None,
    ) -> str | None:
        as_read = out, size, committed, value_bytes, check
        if super()._read(path, *as_read) is None:
            return None
        with self.mirror.folder.locked():  # missing or damaged here, or just fetched by another
            if super()._read(path, *as_read) is not None:
                self._bring_again(_Wanted(path, size, committed))
            return super()._read(path, *as_read)

    def _size_fault(self, path: Path, size: int) -> str | None:
        return None  # what is missing here is fetched when it is read

    def _wanted(self, array: str, block: Block) -> _Wanted:
        spec = self.manifest.arrays[array]
        checksum = crc_hex(int(self.journal.crc32c[array][block.view, block.index]))
        path = chunk_path(self.path, array, spec, block)
        return _Wanted(path, self.manifest.chunk_file_bytes(spec), checksum)

    def _bring_again(self, wanted: _Wanted) -> None:
        with suppress(FileNotFoundError, IsADirectoryError):
            wanted.path.unlink()
        self.mirror.folder.make_room(wanted.size)
        self._bring(wanted)

    def _bring(self, wanted: _Wanted) -> None:
        """Fetch one file, and verify it before it has its name."""
        key = str(wanted.path.relative_to(self.path))
        url = self.remote.path / key
        try:
            content = self.remote.objects.get_array(key, wanted.size)
        except CacheMissing:
            raise self.damaged(Fault("chunk missing", url)) from None
        what = content_fault(content, wanted.size, wanted.committed)
        if what is not None:
            raise self.damaged(Fault(what, url))
        write_inside(self.path, key, content, flush=False)


def _absent(wanted: Iterable[_Wanted]) -> list[_Wanted]:
    """Those that are not here; the others count as used now."""
    absent = []
    for each in wanted:
        if size_fault(each.path, each.size) is not None:
            absent.append(each)
        else:
            with suppress(FileNotFoundError):
                os.utime(each.path)
    return sorted(absent)


def _write(cache: Path, name: str, content: bytes) -> None:
    if not holds_bytes(cache, name, content):
        write_inside(cache, name, content)
