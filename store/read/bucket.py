"""A cache on an object store, read straight from there: every chunk is fetched and checked.

The keys below `s3://bucket/prefix/<cache>` are the files of a cache's folder, with the same bytes.
For looking, checking and copying; training reads through a mirror (`store.read.mirror`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from teach_once.runtime.machine.urls import ObjectUrl
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.store.errors import CacheDamaged, CacheMissing, Fault, TeacherPass, remote_fix
from teach_once.store.format.journal import ChunkKey
from teach_once.store.format.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    parse_manifest,
    refuse_other_name,
    teacher_of,
)
from teach_once.store.format.metadata import MAX_METADATA_BYTES, metadata_faults
from teach_once.store.format.spec import LABELS, MANIFEST, PREVIEW, Block, chunk_path
from teach_once.store.format.values import Check
from teach_once.store.place.commit import most_objects, read_remote_journal
from teach_once.store.place.objects import NoBucket, Objects, in_parallel
from teach_once.store.read.chunks import read_opened
from teach_once.store.read.folder import FolderSource

Result = TypeVar("Result")


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
        journal = read_remote_journal(objects, manifest).committed
        return cls(url, manifest, journal, objects=objects)

    @property
    def fix(self) -> TeacherPass:
        return remote_fix(self.path, self.manifest.teacher)

    def mapped(self, array: str, block: Block) -> NDArray[Any]:
        spec = self.manifest.arrays[array]
        size = self.manifest.chunk_file_bytes(spec)
        key = self._key(chunk_path(self.path, array, spec, block))
        content = self.objects.get_tagged(key, size).content
        if content is None or len(content) != size:
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
        listed = self.objects.listed(most_keys=most_objects(self.manifest))
        return {each.key: each.size for each in listed}

    def _at_once(
        self, check: Callable[[ChunkKey], Result], keys: Iterable[ChunkKey], num_bytes: int
    ) -> Iterator[Result]:
        return in_parallel(check, keys) if num_bytes else map(check, keys)

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
    try:
        return _fetched_manifest(objects)
    except CacheDamaged:
        return _fetched_manifest(objects)  # it may only have arrived so


def _fetched_manifest(objects: Objects) -> tuple[Manifest, bytes]:
    url = objects.url
    try:
        content = objects.get(MANIFEST, MAX_MANIFEST_BYTES)
    except NoBucket:
        raise
    except CacheMissing:
        raise CacheMissing(f"{url} is not a cache: it has no {MANIFEST}") from None
    return parse_remote_manifest(objects, content), content


def parse_remote_manifest(objects: Objects, content: bytes) -> Manifest:
    """The manifest in these bytes. Raises as `parse_manifest`."""
    url = objects.url
    return parse_manifest(content, url / MANIFEST, fix=remote_fix(url, teacher_of(url)))
