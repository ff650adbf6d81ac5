"""Reads a cache of an object store through its folder in a mirror, which lacks some of it.

What is read is fetched into the folder, many chunks at a time, each verified when it arrives.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from numpy.typing import NDArray

from teach_once.runtime.machine.urls import ObjectUrl
from teach_once.runtime.safe.confined import (
    OpenRoot,
    opened_folder,
    opened_root,
    remove_inside,
    write_inside,
)
from teach_once.store.errors import CacheDamaged, CacheMissing, Fault, TeacherPass
from teach_once.store.format.journal import journal_text
from teach_once.store.format.metadata import MAX_METADATA_BYTES, checksum_of, zarr_metadata
from teach_once.store.format.spec import JOURNAL, ZARR_GROUP, Block, chunk_name, crc_hex
from teach_once.store.format.values import Check
from teach_once.store.identity import identity_sha256
from teach_once.store.place.mirror_folder import Needs, show_progress
from teach_once.store.place.objects import in_parallel
from teach_once.store.read.bucket import RemoteSource
from teach_once.store.read.chunks import content_fault
from teach_once.store.read.folder import FolderSource
from teach_once.store.read.mirror import Mirror


class _Wanted(NamedTuple):
    """A file of the cache, the bytes that it must have, and its checksum."""

    name: str  # below the cache
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
        needs = Needs(mirror.root)
        documents = {f"{path.name}/{name}": text for name, text in _described(remote, path).items()}
        with mirror.folder.locked() as opened:
            mirror.write(opened, needs, documents)
        manifest, journal = remote.manifest, remote.journal
        return cls(path, manifest, journal, remote=remote, mirror=mirror, needs=needs)

    @property
    def _place(self) -> PurePath:
        """The cache's folder, below the mirror's root."""
        return self.mirror.place / self.path.name

    @property
    def fix(self) -> TeacherPass:
        return self.remote.fix

    def fetch(self, chunks: Sequence[tuple[str, Block]]) -> None:
        """Fetch what is missing of these chunks, many at a time. Raises CacheFull, CacheDamaged."""
        wanted = {self._wanted(*chunk): chunk for chunk in chunks}
        self._remember(wanted)
        try:
            with opened_root(self.mirror.root) as opened, self.mirror.folder.refusing_links():
                if not self._absent(opened, wanted):
                    return
        except FileNotFoundError:  # the mirror was removed, and is made anew
            pass
        with self.mirror.folder.locked() as opened:
            absent = self._absent(opened, wanted)  # others may have fetched some meanwhile
            self.mirror.folder.make_room(opened, sum(each.size for each in absent))
            for _ in in_parallel(lambda each: self._bring(opened, each), absent):
                show_progress()

    def _remember(self, wanted: Mapping[_Wanted, tuple[str, Block]]) -> None:
        """Need these: checksums of samples always, records of the current and the next view."""
        of_view: dict[int, list[Path]] = {}
        for each, (array, block) in wanted.items():
            if self.manifest.arrays[array].all_views:
                self.needs.add([self.mirror.root / self._place / each.name])
            else:
                of_view.setdefault(block.view, []).append(
                    self.mirror.root / self._place / each.name
                )
        for view, paths in of_view.items():
            self.needs.remember(view, paths)

    def mapped(self, array: str, block: Block) -> NDArray[Any]:
        self.fetch([(array, block)])
        try:
            return super().mapped(array, block)
        except CacheDamaged:  # another process has just removed it
            with self.mirror.folder.locked() as opened:
                self._bring_again(opened, self._wanted(array, block))
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
        with self.mirror.folder.locked() as opened:  # missing or damaged here, or just fetched
            if super()._read(path, *as_read) is not None:
                name = str(path.relative_to(self.path))
                self._bring_again(opened, _Wanted(name, size, committed))
            return super()._read(path, *as_read)

    def _size_fault(self, path: Path, size: int) -> str | None:
        return None  # what is missing here is fetched when it is read

    def _wanted(self, array: str, block: Block) -> _Wanted:
        spec = self.manifest.arrays[array]
        checksum = crc_hex(int(self.journal.crc32c[array][block.view, block.index]))
        name = chunk_name(array, spec, block)
        return _Wanted(name, self.manifest.chunk_file_bytes(spec), checksum)

    def _absent(self, opened: OpenRoot, wanted: Iterable[_Wanted]) -> list[_Wanted]:
        """Those that are not here; the others count as used now."""
        absent, of_folder = [], dict[str, list[_Wanted]]()
        for each in wanted:
            of_folder.setdefault(each.name.rpartition("/")[0], []).append(each)
        for place, files in of_folder.items():
            try:
                with opened_folder(opened, self._place / place) as folder:
                    absent += [each for each in files if not _is_here(folder, each)]
            except FileNotFoundError:
                absent += files
        return sorted(absent)

    def _bring_again(self, opened: OpenRoot, wanted: _Wanted) -> None:
        with suppress(FileNotFoundError, IsADirectoryError):
            remove_inside(opened, self._place / wanted.name)
        self.mirror.folder.make_room(opened, wanted.size)
        self._bring(opened, wanted)

    def _bring(self, opened: OpenRoot, wanted: _Wanted) -> None:
        """Fetch one file, and verify it before it has its name."""
        url = self.remote.path / wanted.name
        try:
            content = self.remote.objects.get_array(wanted.name, wanted.size)
        except CacheMissing:
            raise self.damaged(Fault("chunk missing", url)) from None
        what = content_fault(content, wanted.size, wanted.committed)
        if what is not None:
            raise self.damaged(Fault(what, url))
        write_inside(opened, self._place / wanted.name, content, flush=False)


def _is_here(folder: int, wanted: _Wanted) -> bool:
    """Return True, and count the file as used now, if it is a regular one of the right size."""
    name = wanted.name.rpartition("/")[2]
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode) or status.st_size != wanted.size:
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                os.unlink(name, dir_fd=folder)
            return False
        os.utime(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _described(remote: RemoteSource, path: Path) -> dict[str, bytes]:
    """The zarr metadata and the journal of a cache: name below it -> content, compared.

    Raises CacheDamaged where a zarr.json is not the manifest's.
    """
    manifest, documents = remote.manifest, dict[str, bytes]()
    for name, text in zarr_metadata(manifest).items():
        key, checksum = f"{ZARR_GROUP}/{name}", manifest.zarr_crc32c[name]
        if checksum_of(text) != checksum:  # another version of zarr spells it otherwise
            text = remote.objects.get(key, MAX_METADATA_BYTES)
            if checksum_of(text) != checksum:
                raise remote.damaged(Fault("zarr metadata damaged", remote.path / key))
        documents[key] = text
    identity = identity_sha256(manifest.identity)
    text = journal_text(identity, manifest, remote.journal.committed)
    return {**documents, f"{JOURNAL}/000001-0000.jsonl": text}
