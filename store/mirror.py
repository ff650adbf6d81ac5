"""A cache on an object store, read through a folder on this machine.

What is read is fetched into a folder of the ordinary layout, many chunks at a time, each verified
when it arrives; from there on the cache is a local one. The folder has a limit: what was not read
for the longest time goes first, never what the last two views that were asked for need, which are a
training's current one and its next one.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from runtime.formats import format_size
from runtime.inside import remove_inside, write_inside
from runtime.urls import ObjectUrl
from store.chunks import read_opened, size_fault
from store.content import holds_bytes
from store.errors import CacheDamaged, CacheFull, CacheMissing
from store.faults import Fault
from store.folder import FolderSource
from store.identity import identity_sha256
from store.journal import journal_text
from store.layout import JOURNAL, MANIFEST, ZARR_GROUP, Block, chunk_path, crc_hex
from store.manifest import MAX_MANIFEST_BYTES
from store.metadata import checksum_of, zarr_metadata
from store.objects import Objects, in_parallel
from store.remote import RemoteSource, remote_damage
from store.values import Check

_CACHE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .,+=@~_-]{0,180}")
_VIEWS_KEPT = 2
_attached: dict[Path, Mirror] = {}  # folder of caches, absolute -> what it mirrors


class Mirror(NamedTuple):
    """What is mirrored, below which folder, and how many bytes may lie there."""

    url: ObjectUrl
    root: Path
    most_bytes: int


def attach(url: ObjectUrl, root: Path, most_bytes: int) -> Path:
    """The folder below `root` that mirrors the caches at `url`, with their manifests.

    Opening a cache of that folder in this process reads through to the store. Raises NoBucket,
    ObjectsUnreachable.
    """
    folder = root / url.bucket / url.key
    folder.mkdir(parents=True, exist_ok=True)
    names = [n for n in Objects(url).names()[0] if _CACHE_NAME.fullmatch(n) and ".." not in n]
    for name, content in zip(names, in_parallel(lambda n: _manifest(url / n), names), strict=True):
        if content is not None:
            (folder / name).mkdir(exist_ok=True)
            _write(folder / name, MANIFEST, content)
    for gone in {each.name for each in folder.iterdir()} - set(names):
        if (folder / gone).is_dir():
            remove_inside(folder / gone, MANIFEST)
    attach_again({folder.absolute(): Mirror(url, root, most_bytes)})
    return folder


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
    _recent: dict[int, set[Path]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def through(cls, path: Path, mirror: Mirror) -> MirroredSource:
        """The cache at `path`, a folder in the mirror. Raises as `RemoteSource.at`."""
        remote = RemoteSource.at(ObjectUrl(*(mirror.url / path.name).parts))
        manifest = remote.manifest
        path.mkdir(parents=True, exist_ok=True)  # in a process on another machine
        for name, text in zarr_metadata(manifest).items():
            key = f"{ZARR_GROUP}/{name}"
            own = checksum_of(text) == manifest.zarr_crc32c[name]
            if not holds_bytes(path, key, text):
                _write(path, key, text if own else remote.objects.get(key))
        identity = identity_sha256(manifest.identity)
        text = journal_text(identity, manifest, remote.journal.committed)
        _write(path, f"{JOURNAL}/000001-0000.jsonl", text)
        return cls(path, manifest, remote.journal, remote=remote, mirror=mirror)

    def damaged(self, fault: Fault) -> CacheDamaged:
        return remote_damage(self.manifest.teacher, fault, self.remote.path)

    def fetch(self, chunks: Sequence[tuple[str, Block]]) -> None:
        """Fetch what is missing of these chunks, many at a time. Raises CacheFull, CacheDamaged."""
        wanted = {chunk: self._wanted(*chunk) for chunk in chunks}
        for (_, block), each in wanted.items():
            self._remember(block.view, each.path)
        absent = {each for each in wanted.values() if size_fault(each.path, each.size) is not None}
        for each in set(wanted.values()) - absent:
            with suppress(FileNotFoundError):
                os.utime(each.path)
        if absent:
            self._make_room(sum(each.size for each in absent))
            for _ in in_parallel(self._bring, sorted(absent)):
                pass

    def mapped(self, array: str, block: Block) -> NDArray[Any]:
        self.fetch([(array, block)])
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
        what = super()._read(path, out, size, committed, value_bytes, check)
        if what is not None:  # missing, or damaged here
            self._bring(_Wanted(path, size, committed))
            what = super()._read(path, out, size, committed, value_bytes, check)
        return what

    def _size_fault(self, path: Path, size: int) -> str | None:
        return None  # what is missing here is fetched when it is read

    def _wanted(self, array: str, block: Block) -> _Wanted:
        spec = self.manifest.arrays[array]
        checksum = crc_hex(int(self.journal.crc32c[array][block.view, block.index]))
        path = chunk_path(self.path, array, spec, block)
        return _Wanted(path, self.manifest.chunk_file_bytes(spec), checksum)

    def _bring(self, wanted: _Wanted) -> None:
        """Fetch one file, and verify it before it has its name."""
        key = str(wanted.path.relative_to(self.path))
        url = self.remote.path / key
        try:
            content = self.remote.objects.get(key, wanted.size)
        except CacheMissing:
            raise self.damaged(Fault("chunk missing", url)) from None
        file: Any = io.BytesIO(content)
        what = read_opened(file, len(content), None, wanted.size, wanted.committed)
        if what is not None:
            raise self.damaged(Fault(what, url))
        write_inside(self.path, key, content)

    def _remember(self, view: int, path: Path) -> None:
        paths = self._recent.pop(view, set())
        self._recent[view] = paths | {path}
        while len(self._recent) > _VIEWS_KEPT:
            del self._recent[next(iter(self._recent))]

    def _make_room(self, needed: int) -> None:
        """Remove what was not read for the longest time, until so many bytes fit in."""
        needed_now = set().union(*self._recent.values())
        others, kept = [], 0
        for path, status in _files(self.mirror.root):
            if path in needed_now:
                kept += status.st_size
            else:
                others.append((status.st_mtime_ns, path, status.st_size))
        if kept + needed > self.mirror.most_bytes:
            raise CacheFull(
                f"the mirror {self.mirror.root} may hold {format_size(self.mirror.most_bytes)}, "
                f"but the current and the next view need {format_size(kept + needed)}",
                fix=f"--mirror-gb {(kept + needed) / 1e9 * 1.01:.3g}, or more",
            )
        total = kept + needed + sum(size for _, _, size in others)
        for _, path, size in sorted(others):
            if total <= self.mirror.most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


def _files(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The chunks in a mirror."""
    for path in _chunks_below(root):
        with suppress(FileNotFoundError):
            yield path, path.lstat()


def _chunks_below(root: Path) -> Iterable[Path]:
    return root.rglob(f"{ZARR_GROUP}/*/c.*")


def _write(cache: Path, name: str, content: bytes) -> None:
    if not holds_bytes(cache, name, content):
        write_inside(cache, name, content)
