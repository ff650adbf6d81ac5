"""Copy a cache from one place to another: a folder, or an object store."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from teach_once.runtime.command.program import program_text
from teach_once.runtime.machine.urls import ObjectUrl
from teach_once.runtime.safe.confined import make_folder_inside
from teach_once.runtime.safe.locks import Job, WriterLock, releasing
from teach_once.store.errors import (
    CacheBusy,
    CacheDamaged,
    CacheError,
    CacheMismatch,
    CacheMissing,
    full_disk_as_error,
    refusals_of,
    require_room,
)
from teach_once.store.format.content import (
    metadata_checksums,
    remove_temporary_files,
    replace_metadata,
    write_unless_there,
)
from teach_once.store.format.journal import (
    ChunkKey,
    is_journal_file,
    journal_text,
)
from teach_once.store.format.manifest import Manifest, manifest_text, read_manifest, write_manifest
from teach_once.store.format.metadata import checksum_of, zarr_metadata
from teach_once.store.format.spec import (
    JOURNAL,
    MANIFEST,
    ZARR_GROUP,
    Block,
    cache_path,
    chunk_name,
    crc_hex,
    encode_chunk,
    next_path,
    whole_name,
    with_checksum,
)
from teach_once.store.identity import identity_sha256
from teach_once.store.move.hdf5 import folder_bytes
from teach_once.store.place.bucket import Bucket, NoBucket, in_parallel
from teach_once.store.place.bucket_log import (
    MOST_LINES,
    is_valid,
    line_numbers,
    most_objects,
    no_number_left,
    read_remote_journal,
)
from teach_once.store.place.folder import Folder
from teach_once.store.place.folder_log import FolderLog
from teach_once.store.place.index import remove_index, write_index
from teach_once.store.place.open import place_at
from teach_once.store.place.place import Listed
from teach_once.store.read.evaluation import (
    evaluation_names,
    evaluation_path,
    open_evaluation,
)
from teach_once.store.read.reader import TeacherCache
from teach_once.store.read.zarr_source import ZarrSource, folder_source, remote_manifest

_LARGER = 4  # an existing chunk is only read if it is at most this many times larger


@dataclass
class Copied:
    """The number of copied chunks, and of valid chunks that existed."""

    copied: int = 0
    kept: int = 0


@dataclass(frozen=True)
class _CopyOut:
    """A running copy to a bucket. listed: the objects at the beginning."""

    opened: TeacherCache
    objects: Bucket
    listed: Mapping[str, Listed]
    max_keys: int
    committed: dict[ChunkKey, str] = field(default_factory=dict)

    def chunk(self, item: tuple[str, Block]) -> bool:
        """Copy one chunk; False if it existed."""
        array, block = item
        manifest = self.opened.manifest
        spec = manifest.arrays[array]
        rows = np.empty((manifest.rows_in(spec, block), *spec.shape), spec.dtype)
        self.opened.source.read(array, block, rows)
        data, checksum = encode_chunk(rows, spec, manifest.chunk_rows(spec))
        views = range(manifest.num_views) if spec.all_views else [block.view]
        is_new = self.put(chunk_name(array, spec, block), data.tobytes())
        self.committed.update({(array, v, block.index): crc_hex(checksum) for v in views})
        return is_new

    def put(self, key: str, data: bytes) -> bool:
        """Put a chunk; False if it existed.

        A damaged chunk is replaced. Raises CacheMismatch if another valid one exists.
        """
        there = self.listed.get(key)
        if there is not None and there.tag.strip('"') == _md5(data):
            return False
        if there is None and self.objects.create(key, data):
            return True
        found = self.objects.get_tagged(key, _LARGER * len(data)).content
        if found == data:
            return False
        if found is not None and is_valid(found):
            raise CacheMismatch(
                f"{self.objects.url / key} contains records of another pass of the same teacher",
                fix=f"remove the objects below {self.objects.url}, or copy to another prefix",
            )
        self.objects.replace(key, data)  # damaged
        return True

    def put_text(self, key: str, data: bytes) -> None:
        """Put a document, replacing an older one."""
        there = self.listed.get(key)
        if there is None and self.objects.create(key, data):
            return
        if self._has(key, data):
            return
        if there is None:  # another process put it after this one started
            raise CacheBusy(
                f"{self.objects.url / key} was put by another process",
                fix="run the same command again",
            )
        self.objects.replace(key, data, there.tag)

    def put_journal(self, data: bytes) -> None:
        """Put the journal under the first number above all existing files and lines.

        If two of them contain a chunk, the higher number counts. With a lower number, the journal
        would not describe the copied chunks.
        """
        keys = [each.key for each in self.objects.list_files(JOURNAL, self.max_keys)]
        names = sorted(n for key in keys if is_journal_file(n := key.removeprefix(f"{JOURNAL}/")))
        lines = max((number for number, *_ in line_numbers(keys)), default=0)
        newest = int(names[-1][:6]) if names else 0
        if names and newest >= lines and self._has(f"{JOURNAL}/{names[-1]}", data):
            return
        number = max(newest, lines) + 1
        if number > MOST_LINES:  # another cache's number does not count
            there = read_remote_journal(self.objects, self.opened.manifest, every_line=True)
            number = max(there.newest, *there.numbers.values(), 0) + 1
        if number > MOST_LINES:
            raise no_number_left(self.objects.url / JOURNAL)
        self.put_text(f"{JOURNAL}/{number:06d}-0000.jsonl", data)

    def _has(self, key: str, data: bytes) -> bool:
        return self.objects.get_tagged(key, len(data)).content == data


def copy_to_objects(
    opened: TeacherCache, url: ObjectUrl, on_chunk: Callable[[int], None] = lambda count: None
) -> Copied:
    """Copy a complete cache to `url`, its own prefix; it may grow an existing cache.

    on_chunk: called with the number of finished chunks. Raises CacheMismatch if another cache
    exists, CacheError if the store ignores conditions, ObjectsUnreachable if it does not answer.
    """
    objects = Bucket(url)
    Bucket(url.parent).refuse_unconditional()
    there = _smaller_copy(objects, opened.manifest)
    remove_index(objects)
    most = most_objects(opened.manifest)
    listed = {each.key: each for each in objects.list_files(max_keys=most)}
    copy = _CopyOut(opened, objects, listed, most)
    manifest, counts = opened.manifest, Copied()
    chunks = [
        (array, block)
        for block in manifest.blocks()
        for array, spec in manifest.arrays.items()
        if not (spec.all_views and block.view)
    ]
    for (array, _), is_new in zip(chunks, in_parallel(copy.chunk, chunks), strict=True):
        num_views = manifest.num_views if manifest.arrays[array].all_views else 1
        counts.copied += num_views * is_new
        counts.kept += num_views * (not is_new)
        on_chunk(num_views)
    for name, values in opened.whole.items():
        copy.put(f"{whole_name(name, values.ndim)}", with_checksum(values).tobytes())
    metadata = zarr_metadata(manifest)
    manifest = metadata_checksums(manifest, metadata)
    stated = {} if there is None else there.zarr_crc32c
    changed = {n: t for n, t in metadata.items() if stated.get(n, checksum_of(t)) != checksum_of(t)}
    for name in metadata.keys() - changed.keys():
        copy.put_text(f"{ZARR_GROUP}/{name}", metadata[name])
    for name, text in changed.items():
        copy.put_text(f"{ZARR_GROUP}/{next_path(Path(name))}", text)
    copy.put_journal(journal_text(identity_sha256(manifest.identity), manifest, copy.committed))
    copy.put_text(MANIFEST, manifest_text(manifest))
    for name, text in changed.items():
        objects.replace(f"{ZARR_GROUP}/{name}", text)
    write_index(objects, manifest)
    return counts


def _smaller_copy(objects: Bucket, manifest: Manifest) -> Manifest | None:
    """Return the manifest of an earlier copy; None if there is none, or if it is damaged.

    Raises CacheMismatch unless the earlier copy is a part of this cache.
    """
    try:
        there, _ = remote_manifest(objects)
    except NoBucket:
        raise
    except (CacheMissing, CacheDamaged):
        return None
    refuse_larger(there, manifest, str(objects.url))
    return there


def refuse_larger(there: Manifest, manifest: Manifest, where: str) -> None:
    """Raise CacheMismatch if copying `manifest` over `there` would lose something."""
    is_same = identity_sha256(there.identity) == identity_sha256(manifest.identity)
    if not is_same or there.block_rows != manifest.block_rows:
        raise CacheMismatch(f"{where} contains another cache", fix="copy to another prefix")
    is_part = there.num_views <= manifest.num_views and there.taps.items() <= manifest.taps.items()
    if not is_part:
        raise CacheMismatch(
            f"{where} contains more of this cache: {there.num_views} views of "
            f"{', '.join(there.taps)}, instead of {manifest.num_views} of "
            f"{', '.join(manifest.taps)}",
            fix="copy it in the other direction, or to another place",
        )


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


_MAKE_ROOM = "make room, then run the same command again"


def copy_to_folder(
    opened: TeacherCache, target: Path, on_chunk: Callable[[int], None] = lambda count: None
) -> Copied:
    """Copy a complete cache into `target`, its own folder.

    on_chunk: called with the number of finished chunks. Raises CacheMismatch if another cache
    exists, CacheBusy, CacheFull, CacheNotWritable.
    """
    with full_disk_as_error(target, _MAKE_ROOM), refusals_of(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _refuse_other(opened, target)
        make_folder_inside(target.parent, target.name)  # refuses links
        with releasing(WriterLock(target, Job(), CacheBusy)):
            return _copied(opened, target, on_chunk)


def _refuse_other(opened: TeacherCache, target: Path) -> None:
    if os.path.lexists(target / MANIFEST):
        there, manifest = read_manifest(target), opened.manifest
        refuse_larger(there, manifest, str(target))
        if (there.num_views, there.taps) != (manifest.num_views, manifest.taps):
            raise CacheMismatch(
                f"{target} contains less of this cache, and a folder does not grow by copying",
                fix="remove it first, or copy to another folder",
            )
    elif not target.exists():
        needed = folder_bytes(opened.manifest)
        require_room(target.parent, needed, where=target, fix=_MAKE_ROOM)


@dataclass(frozen=True)
class _CopyIn:
    """A running copy to a folder. there: the target's chunks. shared: checksums of view-independent
    arrays.
    """

    opened: TeacherCache
    there: ZarrSource
    log: FolderLog
    shared: dict[tuple[str, int], int] = field(default_factory=dict)

    def block(self, block: Block) -> tuple[Block, dict[str, int], int]:
        """Copy the missing chunks of a block; return the block, all its checksums, and the number
        copied.

        The checksums are empty if no chunk was copied.
        """
        manifest, checksums, num_copied = self.opened.manifest, {}, 0
        for array, spec in manifest.arrays.items():
            key = (array, block.index)
            if spec.all_views and block.view:
                checksums[array] = self.shared[key]
                num_copied += not self.there.journal.there[array][block.view, block.index]
                continue
            if self._is_there(array, block):
                checksums[array] = int(self.there.journal.crc32c[array][block.view, block.index])
            else:
                rows = np.empty((manifest.rows_in(spec, block), *spec.shape), spec.dtype)
                self.opened.source.read(array, block, rows)
                data, checksums[array] = encode_chunk(rows, spec, manifest.chunk_rows(spec))
                self.log.write_chunk(array, block, data)
                num_copied += 1
            if spec.all_views:
                self.shared[key] = checksums[array]
        return block, checksums if num_copied else {}, num_copied

    def _is_there(self, array: str, block: Block) -> bool:
        """Return True if the target has committed a valid chunk that is equal to the source's."""
        position = (block.view, block.index)
        if not self.there.journal.there[array][position]:
            return False
        if self.there.fault_of(array, block) is not None:
            return False
        source, ours = self.opened.source, self.there.journal.crc32c[array][position]
        if isinstance(source, ZarrSource) and source.journal.crc32c[array][position] != ours:
            raise CacheMismatch(
                f"{self.there.path} contains records of another pass of the same teacher",
                fix="remove it first, or copy to another folder",
            )
        return True


def _copied(opened: TeacherCache, target: Path, on_chunk: Callable[[int], None]) -> Copied:
    remove_index(Folder(target))
    remove_temporary_files(target, opened.manifest)
    metadata = zarr_metadata(opened.manifest)
    manifest = metadata_checksums(opened.manifest, metadata)
    there = _manifest_there(target)
    if there is not None and there.zarr_crc32c != manifest.zarr_crc32c:
        replace_metadata(
            target, manifest
        )  # written by another version of zarr; readers accept both
    for name, text in metadata.items():
        write_unless_there(target, f"{ZARR_GROUP}/{name}", text)
    for name, values in opened.whole.items():
        write_unless_there(target, whole_name(name, values.ndim), with_checksum(values).tobytes())
    log, counts = FolderLog(target, manifest), Copied()
    copy = _CopyIn(opened, folder_source(target, manifest, log.read()), log)
    num_arrays = len(manifest.arrays)
    try:
        for view in range(manifest.num_views):
            blocks = [manifest.block(view, i) for i in range(manifest.blocks_per_view)]
            for block, checksums, num_copied in in_parallel(copy.block, blocks):
                if checksums:
                    log.append(block, checksums)
                counts.copied += num_copied
                counts.kept += num_arrays - num_copied
                on_chunk(num_arrays)
    finally:
        log.close()
    if _manifest_there(target) != manifest:
        write_manifest(target, manifest)
    write_index(Folder(target), manifest)
    return counts


def _manifest_there(target: Path) -> Manifest | None:
    try:
        return read_manifest(target)
    except CacheMissing:
        return None


def copy_cache(
    opened: TeacherCache, dest: Path, on_chunk: Callable[[int], None] = lambda count: None
) -> tuple[Path, Copied]:
    """Copy a complete cache below `dest`, a folder or a URL; returns its path and the counts.

    The evaluation caches inside it are copied first, so that its index can list them. on_chunk:
    called with the number of finished chunks. Raises CacheError.
    """
    target = cache_path(dest, opened.manifest.teacher, opened.manifest.identity)
    for name in evaluation_names(opened.path):
        evaluation = open_evaluation(opened.path, opened.identity, name)
        _copy_to(evaluation, evaluation_path(target, name), lambda count: None)
    return target, _copy_to(opened, target, on_chunk)


def _copy_to(opened: TeacherCache, target: Path, on_chunk: Callable[[int], None]) -> Copied:
    dest, place = target.parent, place_at(target)
    if isinstance(place, Bucket):
        return copy_to_objects(opened, place.url, on_chunk)
    if dest.suffix == ".h5":
        words = [program_text("store"), "export", shlex.quote(str(opened.path)), str(dest)]
        raise CacheError(f"{dest} is not a folder", fix=" ".join(words))
    if not isinstance(opened.source, ZarrSource):
        words = [program_text("store"), "import", shlex.quote(str(opened.path)), str(dest)]
        raise CacheError(f"{opened.path} is one file", fix=" ".join(words))
    return copy_to_folder(opened, target, on_chunk)


def num_chunks(manifest: Manifest) -> int:
    """Return the number of chunks of such a cache in all views."""
    return len(manifest.arrays) * manifest.num_views * manifest.blocks_per_view
