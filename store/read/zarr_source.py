"""A cache of zarr chunks at a place, which are read directly into arrays and checked.

Plain zarr slicing returns the same values. This module avoids its copies, and also compares each
checksum with the journal's, which detects a chunk that was replaced by another valid one.

The keys below `s3://bucket/prefix/<cache>` are the files of a cache's folder, with the same bytes.
A bucket is read directly for inspecting, checking and copying; training reads it through a mirror.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from teach_once.runtime.safe.confined import listed_inside
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.runtime.safe.text import one_line
from teach_once.store.errors import (
    CacheDamaged,
    CacheMissing,
    Fault,
    PassCommand,
    caches_folder,
    damage_as_error,
    damage_error,
    remote_fix,
)
from teach_once.store.format.index import INDEX, MAX_INDEX_BYTES, parse_index
from teach_once.store.format.journal import ChunkKey, Coverage, Journal, journal_text, read_journal
from teach_once.store.format.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    parse_manifest,
    read_manifest,
    refuse_other_name,
    teacher_of,
)
from teach_once.store.format.metadata import (
    MAX_METADATA_BYTES,
    checksum_of,
    metadata_faults,
    zarr_metadata,
)
from teach_once.store.format.spec import (
    CHECKSUM_BYTES,
    JOURNAL,
    LABELS,
    MANIFEST,
    ZARR_GROUP,
    Block,
    chunk_name,
    crc_hex,
    tap_of,
    whole_name,
)
from teach_once.store.format.values import Check, Seen, checked_read, label_fault
from teach_once.store.identity import identity_sha256
from teach_once.store.place.bucket import Bucket, NoBucket
from teach_once.store.place.bucket_log import most_objects, read_remote_journal
from teach_once.store.place.chunks import read_opened, wrong_size
from teach_once.store.place.folder import Folder
from teach_once.store.place.index import index_faults, read_indexed_journal
from teach_once.store.place.mirror import MirrorOfBucket
from teach_once.store.place.mirror_folder import Needs
from teach_once.store.place.place import Chunk, Item, Place, ReadablePlace, Result, read_document
from teach_once.store.read.mirror import Mirror


@dataclass(frozen=True)
class ZarrSource:
    """Reads the arrays of a cache at a place, with the methods of `store.read.source.Source`.

    fix: the command that repairs damage.
    """

    place: ReadablePlace
    manifest: Manifest
    journal: Journal
    fix: PassCommand
    _seen: Seen = field(default_factory=dict, repr=False, compare=False)

    @property
    def path(self) -> Path:
        return self.place.path

    @property
    def unreadable_lines(self) -> list[str]:
        return self.journal.damaged_lines

    @property
    def coverage(self) -> Coverage:
        return Coverage(self.manifest, self.journal.there)

    def read(self, array: str, block: Block, out: NDArray[Any]) -> None:
        if (fault := self.fault_of(array, block, out)) is not None:
            raise damage_error(self.fix, [fault])

    def verify(self, array: str, block: Block) -> None:
        if (fault := self.fault_of(array, block)) is not None:
            raise damage_error(self.fix, [fault])

    def fetch(self, chunks: Sequence[tuple[str, Block]]) -> None:
        with self._damage_as_error():
            self.place.fetch([self._chunk(*chunk) for chunk in chunks])

    def at_once(
        self, function: Callable[[Item], Result], items: Iterable[Item], num_bytes: int
    ) -> Iterator[Result]:
        return self.place.at_once(function, items, num_bytes)

    @contextmanager
    def _damage_as_error(self) -> Iterator[None]:
        """Raise CacheDamaged if a chunk is missing or damaged at its origin."""
        try:
            yield
        except BadFile as error:
            raise damage_error(self.fix, [Fault(error.what, error.path)]) from None

    def _chunk(self, array: str, block: Block) -> Chunk:
        spec = self.manifest.arrays[array]
        return Chunk(
            chunk_name(array, spec, block),
            self.manifest.chunk_file_bytes(spec),
            crc_hex(int(self.journal.crc32c[array][block.view, block.index])),
            None if spec.all_views else block.view,
        )

    def mapped(self, array: str, block: Block) -> NDArray[Any]:
        spec = self.manifest.arrays[array]
        shape = (self.manifest.rows_in(spec, block), *spec.shape)
        try:
            return self.place.map_chunk(self._chunk(array, block), spec.dtype, shape)
        except BadFile as error:
            fault = Fault(error.what, error.path, array, block.view, block.index)
            raise damage_error(self.fix, [fault]) from None

    def read_whole(self, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        values, fault = self._whole(name, shape, dtype)
        if fault is not None:
            raise damage_error(self.fix, [fault])
        return values

    def _whole(
        self, name: str, shape: tuple[int, ...], dtype: str
    ) -> tuple[NDArray[Any], Fault | None]:
        """Return the array and its fault."""
        size = math.prod(shape) * np.dtype(dtype).itemsize + CHECKSUM_BYTES
        chunk = Chunk(whole_name(name, len(shape)), size, self.manifest.whole_crc32c[name])
        values, path = np.empty(0, dtype), self.path / chunk.key

        def check(file: BinaryIO, found: int) -> str | None:
            nonlocal values
            if found != size:  # before memory is allocated for missing bytes
                return wrong_size(found, size)
            values = np.empty(shape, dtype)
            return read_opened(file, found, values, size, chunk.crc32c)

        if (what := self._check(chunk, check)) is not None:
            return values, Fault(f"{name} damaged" if values.size else f"{name}: {what}", path)
        what = label_fault(values, self.manifest.num_classes) if name == LABELS else None
        return values, Fault(f"{name}: {what}", path) if what else None

    def _check(self, chunk: Chunk, check: Callable[[BinaryIO, int], str | None]) -> str | None:
        with self._damage_as_error():
            return self.place.check_chunk(chunk, check)

    def fault_of(self, array: str, block: Block, out: NDArray[Any] | None = None) -> Fault | None:
        """Read one committed chunk, into `out` if given. Return its fault, or None."""
        spec, chunk = self.manifest.arrays[array], self._chunk(array, block)
        path = self.path / chunk.key
        if spec.all_views and self._disagreeing[array][block.index]:
            return Fault("differs between views", path, array, block.view, block.index)

        def read(wanted: NDArray[Any] | None, num_bytes: int, check: Check | None) -> str | None:
            def read_open(file: BinaryIO, found: int) -> str | None:
                size, committed = chunk.num_bytes, chunk.crc32c
                return read_opened(file, found, wanted, size, committed, num_bytes, check)

            return self._check(chunk, read_open)

        what = checked_read(self.manifest, array, block, out, self._seen, read)
        return Fault(what, path, array, block.view, block.index) if what else None

    @cached_property
    def _disagreeing(self) -> dict[str, NDArray[np.bool_]]:
        """Return {array that is the same in all views: (blocks,) True if its checksums differ}."""
        return {
            array: _differ(self.journal.crc32c[array], self.journal.there[array])
            for array, spec in self.manifest.arrays.items()
            if spec.all_views
        }

    def faults(
        self,
        *,
        every_byte: bool,
        num_views: int | None = None,
        on_chunk: Callable[[int], None] | None = None,
    ) -> list[Fault]:
        views = self.manifest.num_views if num_views is None else num_views
        sizes = {
            name: self.manifest.chunk_file_bytes(spec)
            for name, spec in self.manifest.arrays.items()
        }
        there = self.journal.there
        to_read = sum(sizes[a] * int(np.count_nonzero(t[:views])) for a, t in there.items())
        faults = []

        def checked(key: ChunkKey) -> tuple[str, Fault | None]:
            return key[0], self._checked(key, every_byte)

        for array, fault in self.at_once(checked, self._keys(views), to_read * every_byte):
            if on_chunk is not None:
                on_chunk(sizes[array])
            if fault is not None:
                faults.append(fault)
        whole = self._whole_faults() + index_faults(self.place, self.manifest) if every_byte else []
        return self.metadata_faults(self.manifest.taps) + whole + faults

    def metadata_faults(self, taps: Collection[str]) -> list[Fault]:
        others = set(self.manifest.taps) - set(taps)
        arrays = {name for name in self.manifest.arrays if tap_of(name) in others}
        faults = metadata_faults(self.path, self.manifest, partial(read_metadata, self.place))
        return [fault for fault in faults if fault.file.parent.name not in arrays]

    def _whole_faults(self) -> list[Fault]:
        faults = (self._whole(name, *shape)[1] for name, shape in self.manifest.whole.items())
        return [fault for fault in faults if fault is not None]

    def _keys(self, num_views: int) -> Iterable[ChunkKey]:
        """Yield the committed chunks of the first views, view by view."""
        for array, there in self.journal.there.items():
            for view in np.flatnonzero(there[:num_views].any(axis=1)).tolist():
                for block in np.flatnonzero(there[view]).tolist():
                    yield array, view, block

    def _checked(self, key: ChunkKey, every_byte: bool) -> Fault | None:
        array, view, index = key
        block = self.manifest.block(view, index)
        return self.fault_of(array, block) if every_byte else self.size_fault(array, block)

    @cached_property
    def _size_fault(self) -> Callable[[Chunk], str | None]:
        return self.place.sizes(most_objects(self.manifest))

    def size_fault(self, array: str, block: Block) -> Fault | None:
        chunk = self._chunk(array, block)
        what = self._size_fault(chunk)
        path = self.path / chunk.key
        return Fault(what, path, array, block.view, block.index) if what else None


def _differ(crc32c: NDArray[np.uint32], there: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Reduce (views, blocks) checksums to (blocks,): True if the existing ones differ."""
    lowest = np.where(there, crc32c, np.uint32(2**32 - 1)).min(axis=0)
    return np.asarray(there.any(axis=0) & (lowest < np.where(there, crc32c, 0).max(axis=0)))


def _refuse_names_without_text(cache: Path, teacher: str) -> None:
    """Raise CacheDamaged if the zarr group contains a name that zarr itself could not list."""
    try:
        names = listed_inside(cache, ZARR_GROUP)
    except FileNotFoundError:
        return
    for name in names:
        if any(
            "\udc80" <= character <= "\udcff" for character in name
        ):  # the encoding of os.fsdecode
            octal = "".join(f"\\{byte:03o}" for byte in os.fsencode(name))
            command = f"rm -r {shlex.quote(str(cache / ZARR_GROUP))}/$'{octal}' && "
            raise CacheDamaged(
                f"{one_line(cache / ZARR_GROUP / name)} is a name that is not UTF-8: zarr cannot "
                "list the group",
                fix=PassCommand(teacher, before=command),
            )


def open_folder(path: Path, manifest: Manifest | None = None) -> ZarrSource:
    """Read the journal of a cache folder, and the manifest if it is not given.

    Raises CacheMissing, CacheDamaged, CacheMismatch.
    """
    if manifest is None:
        manifest = read_manifest(path)
        refuse_other_name(path, manifest)
    with damage_as_error(manifest.teacher):
        _refuse_names_without_text(path, manifest.teacher)
        return folder_source(path, manifest, read_journal(path, manifest))


def folder_source(path: Path, manifest: Manifest, journal: Journal) -> ZarrSource:
    """Return the source of a cache folder whose manifest and journal were read."""
    fix = PassCommand(manifest.teacher, caches=caches_folder(path), full_check=True)
    return ZarrSource(Folder(path), manifest, journal, fix)


def open_bucket(bucket: Bucket) -> ZarrSource:
    """Open a cache in a bucket. Raises CacheMissing, CacheDamaged, CacheMismatch,
    ObjectsUnreachable.
    """
    manifest, _ = remote_manifest(bucket)
    refuse_other_name(bucket.path, manifest)
    return bucket_source(bucket, manifest, read_remote_journal(bucket, manifest).committed)


def bucket_source(bucket: Bucket, manifest: Manifest, journal: Journal) -> ZarrSource:
    """Return the source of a cache in a bucket whose manifest and journal were read."""
    return ZarrSource(bucket, manifest, journal, remote_fix(bucket.path, manifest.teacher))


def open_indexed(place: ReadablePlace) -> ZarrSource:
    """Open a complete cache at a place that cannot list its files, by its index.

    Raises CacheMissing if there is no manifest or no index, CacheDamaged, CacheMismatch.
    """
    cache, documents = place.path, dict[str, bytes | None]()
    for name, most_bytes in ((MANIFEST, MAX_MANIFEST_BYTES), (INDEX, MAX_INDEX_BYTES)):
        documents[name] = read_document(place, name, most_bytes)
        if documents[name] is None:
            raise CacheMissing(f"{cache} is not a complete cache: it has no {name}")
    manifest = parse_manifest(documents[MANIFEST] or b"", cache / MANIFEST)
    with damage_as_error(manifest.teacher):
        index = parse_index(documents[INDEX] or b"", cache / INDEX, manifest)
        journal = read_indexed_journal(place, manifest, index)
    return ZarrSource(place, manifest, journal, PassCommand(manifest.teacher, full_check=True))


def open_mirrored(path: Path, mirror: Mirror) -> ZarrSource:
    """Open the cache at `path`, a folder in the mirror. Raises as `open_bucket`."""
    origin = Bucket(mirror.url / path.name)
    remote = open_bucket(origin)
    needs = Needs(mirror.root)
    described = _described(origin, remote)
    documents = {f"{path.name}/{name}": text for name, text in described.items()}
    with mirror.folder.locked() as opened:
        mirror.write(opened, needs, documents)
    place = MirrorOfBucket(path, origin, mirror.folder, mirror.place / path.name, needs)
    return ZarrSource(place, remote.manifest, remote.journal, remote.fix)


def _described(origin: Bucket, remote: ZarrSource) -> Mapping[str, bytes]:
    """Return the zarr metadata and the journal of a cache, verified: key -> content.

    Raises CacheDamaged if a zarr.json does not match the manifest.
    """
    manifest, documents = remote.manifest, dict[str, bytes]()
    for name, text in zarr_metadata(manifest).items():
        key, checksum = f"{ZARR_GROUP}/{name}", manifest.zarr_crc32c[name]
        if checksum_of(text) != checksum:  # another version of zarr writes it differently
            text = origin.get(key, MAX_METADATA_BYTES)
            if checksum_of(text) != checksum:
                fault = Fault("zarr metadata damaged", remote.path / key)
                raise damage_error(remote.fix, [fault])
        documents[key] = text
    identity = identity_sha256(manifest.identity)
    text = journal_text(identity, manifest, remote.journal.committed)
    return {**documents, f"{JOURNAL}/000001-0000.jsonl": text}


def remote_manifest(bucket: Bucket) -> tuple[Manifest, bytes]:
    """Return the manifest of a cache in a bucket, and its bytes. Raises as `read_manifest`."""
    try:
        return _fetched_manifest(bucket)
    except CacheDamaged:
        return _fetched_manifest(bucket)  # the damage may be in the transfer only


def _fetched_manifest(bucket: Bucket) -> tuple[Manifest, bytes]:
    try:
        content = bucket.get(MANIFEST, MAX_MANIFEST_BYTES)
    except NoBucket:
        raise
    except CacheMissing:
        raise CacheMissing(f"{bucket.path} is not a cache: it has no {MANIFEST}") from None
    return parse_remote_manifest(bucket, content), content


def manifest_at(place: Place) -> Manifest:
    """Return the manifest of the cache at a place. Raises as `read_manifest`."""
    return remote_manifest(place)[0] if isinstance(place, Bucket) else read_manifest(place.path)


def parse_remote_manifest(bucket: Bucket, content: bytes) -> Manifest:
    """Return the manifest in these bytes. Raises as `parse_manifest`."""
    url = bucket.path
    return parse_manifest(content, url / MANIFEST, fix=remote_fix(url, teacher_of(url)))


def read_metadata(place: ReadablePlace, key: str) -> bytes | None:
    """Read a zarr.json; None if it is missing. Raises BadFile if it is too large."""
    return read_document(place, key, MAX_METADATA_BYTES)
