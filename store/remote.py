"""A cache on an object store, read straight from there: every chunk is fetched and checked.

The keys below `s3://bucket/prefix/<cache>` are the files of a cache's folder, with the same bytes.
For looking, checking and copying; training reads through a mirror (`store.mirror`).
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.program import program_text
from runtime.reading import BadFile
from runtime.urls import ObjectUrl
from store.chunks import read_opened
from store.errors import CacheDamaged, CacheMissing
from store.faults import Fault, damage_error
from store.folder import FolderSource
from store.journal import Journal, is_journal_file, most_journal_bytes, read_journal_file
from store.layout import JOURNAL, LABELS, MANIFEST, PREVIEW, Block, chunk_path
from store.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest, refuse_other_name
from store.metadata import MAX_METADATA_BYTES, metadata_faults
from store.objects import NoBucket, Objects, in_parallel
from store.values import Check


@dataclass(frozen=True)
class RemoteSource(FolderSource):
    """Reads the arrays of a cache on an object store. Keeps nothing."""

    objects: Objects = field(kw_only=True)

    @classmethod
    def at(cls, url: ObjectUrl) -> RemoteSource:
        """Raises CacheMissing, CacheDamaged, CacheMismatch, ObjectsUnreachable."""
        objects = Objects(url)
        manifest, _ = remote_manifest(objects)
        refuse_other_name(url, manifest)
        return cls(url, manifest, remote_journal(objects, manifest), objects=objects)

    def damaged(self, fault: Fault) -> CacheDamaged:
        return remote_damage(self.manifest.teacher, fault, self.path)

    def mapped(self, array: str, block: Block) -> NDArray[Any]:
        spec = self.manifest.arrays[array]
        content = self.objects.get(self._key(chunk_path(self.path, array, spec, block)))
        if len(content) != self.manifest.chunk_file_bytes(spec):
            raise self.damaged(Fault("chunk has the wrong size", self.path, array, block.view))
        shape = (self.manifest.rows_in(spec, block), *spec.shape)
        little = np.dtype(spec.dtype).newbyteorder("<")
        return np.frombuffer(content, little, int(np.prod(shape))).reshape(shape)

    def _read(
        self,
        path: Path,
        out: NDArray[Any] | None,
        size: int,
        committed: str,
        value_bytes: int | None = None,
        check: Check | None = None,
    ) -> str | None:
        try:
            content = self.objects.get(self._key(path), size)
        except CacheMissing:
            return "chunk missing"
        except CacheDamaged:
            return f"chunk has more than {size:,} bytes"
        file: Any = io.BytesIO(content)
        return read_opened(file, len(content), out, size, committed, value_bytes, check)

    def _size_fault(self, path: Path, size: int) -> str | None:
        if path.parent.name in (LABELS, PREVIEW):
            return None  # compared when it is read, which takes one request instead of a list
        found = self._sizes.get(self._key(path))
        if found is None:
            return "chunk missing"
        return None if found == size else f"chunk has {found:,} bytes, expected {size:,}"

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {each.key: each.size for each in self.objects.listed()}

    def _metadata_faults(self) -> list[Fault]:
        return metadata_faults(self.path, self.manifest, self._metadata)

    def _metadata(self, name: str) -> bytes | None:
        try:
            return self.objects.get(name, MAX_METADATA_BYTES)
        except CacheMissing:
            return None
        except CacheDamaged as error:
            raise BadFile(self.path / name, error.problem) from None

    def _key(self, path: Path) -> str:
        return "/".join(path.parts[len(self.path.parts) :])


def remote_manifest(objects: Objects) -> tuple[Manifest, bytes]:
    """What a cache on a store is, and the bytes that say so. Raises as `read_manifest`."""
    url = objects.url
    try:
        content = objects.get(MANIFEST, MAX_MANIFEST_BYTES)
    except NoBucket:
        raise
    except CacheMissing:
        raise CacheMissing(f"{url} is not a cache: it has no {MANIFEST}") from None
    return parse_manifest(content, url / MANIFEST, fix=copy_again(url)), content


def remote_journal(objects: Objects, manifest: Manifest) -> Journal:
    """What is committed of a cache on a store. Needs a request, and one for each file."""
    journal = Journal.empty(manifest)
    _, found = objects.names(JOURNAL)
    names = sorted(key for each in found if is_journal_file((key := each.key).rpartition("/")[2]))
    most = most_journal_bytes(manifest)
    contents = in_parallel(lambda name: objects.get(name, most), names)
    for name, content in zip(names, contents, strict=True):
        file: Any = io.BytesIO(content)
        try:
            read_journal_file(file, objects.url / name, len(content), manifest, journal)
        except BadFile as error:
            raise CacheDamaged(error.problem, fix=copy_again(objects.url)) from None
    return journal


def remote_damage(teacher: str, fault: Fault, url: Path) -> CacheDamaged:
    """The error that names a fault of a cache on a store."""
    return CacheDamaged(damage_error(teacher, [fault]).problem, fix=copy_again(url))


def copy_again(url: Path) -> str:
    """The command that mends a cache on a store, from a sound one."""
    return f"{program_text('store')} copy CACHE {url.parent}, from a sound CACHE"
