"""Copies a complete cache to an object store, and goes on where an earlier copy ended.

Every chunk is verified as it is read, put if it is absent, and adopted where the same bytes are
there already: put by this command before, by another one at the same time, or by a request whose
answer was lost. Then follow the journal, as one object, and last the manifest: before that nobody
takes the copy for a cache. Over a smaller copy, which others may be reading, each zarr.json that
changes is put as zarr.json.next before the manifest and in its own place after it, so that the old
manifest, and then the new one, finds its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from runtime.urls import ObjectUrl
from store.commit import MOST_LINES, is_sound, no_number_left
from store.content import metadata_checksums
from store.errors import CacheBusy, CacheDamaged, CacheMismatch, CacheMissing
from store.identity import identity_sha256
from store.journal import ChunkKey, is_journal_file, journal_text
from store.layout import (
    JOURNAL,
    LABELS,
    MANIFEST,
    PREVIEW,
    ZARR_GROUP,
    Block,
    chunk_name,
    crc_hex,
    encode_chunk,
    next_path,
    whole_name,
    with_checksum,
)
from store.manifest import Manifest, manifest_text
from store.metadata import checksum_of, zarr_metadata
from store.objects import Listed, NoBucket, Objects, in_parallel
from store.reader import TeacherCache
from store.remote import remote_manifest
from store.remote_journal import (
    line_numbers,
    most_objects,
    read_remote_journal,
)

_LARGER = 4  # times as large as ours may be a chunk that is looked at before it is replaced


@dataclass
class Copied:
    """How many chunks were copied, and how many were there and sound."""

    copied: int = 0
    kept: int = 0


@dataclass(frozen=True)
class _Copy:
    """One copy on its way. listed: what was there at the beginning."""

    opened: TeacherCache
    objects: Objects
    listed: Mapping[str, Listed]
    most_keys: int
    committed: dict[ChunkKey, str] = field(default_factory=dict)

    def chunk(self, item: tuple[str, Block]) -> bool:
        """Copy one chunk; False where it was there."""
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
        """Put a chunk; False where it was there.

        One that is damaged is replaced. Raises CacheMismatch where another sound one is.
        """
        there = self.listed.get(key)
        if there is not None and there.tag.strip('"') == _md5(data):
            return False
        if there is None and self.objects.put_if_absent(key, data):
            return True
        found = self.objects.get_tagged(key, _LARGER * len(data)).content
        if found == data:
            return False
        if found is not None and is_sound(found):
            raise CacheMismatch(
                f"{self.objects.url / key} holds the records of another pass of the same teacher",
                fix=f"remove what is below {self.objects.url}, or copy to another prefix",
            )
        self.objects.replace(key, data)  # damaged
        return True

    def put_text(self, key: str, data: bytes) -> None:
        """Put a document, over an older one if there is one."""
        there = self.listed.get(key)
        if there is None and self.objects.put_if_absent(key, data):
            return
        if self._has(key, data):
            return
        if there is None:  # put by another process since this one began
            raise CacheBusy(
                f"{self.objects.url / key} was put by another process",
                fix="run the same command again",
            )
        self.objects.replace(key, data, there.tag)

    def put_journal(self, data: bytes) -> None:
        """Put the journal under the first number above those of all files and lines there.

        Of two that name a chunk the higher number counts: below a line that is there, the journal
        would not say what is here.
        """
        keys = [each.key for each in self.objects.listed(JOURNAL, self.most_keys)]
        names = sorted(n for key in keys if is_journal_file(n := key.removeprefix(f"{JOURNAL}/")))
        lines = max((number for number, *_ in line_numbers(keys)), default=0)
        newest = int(names[-1][:6]) if names else 0
        if names and newest >= lines and self._has(f"{JOURNAL}/{names[-1]}", data):
            return
        number = max(newest, lines) + 1
        if number > MOST_LINES:  # that of another cache does not count
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
    """Copy a complete cache to `url`, its own prefix; it may grow one that is there.

    on_chunk: called with the number of chunks that are done. Raises CacheMismatch where another
    cache is there, CacheError where the store ignores conditions, ObjectsUnreachable.
    """
    objects = Objects(url)
    Objects(ObjectUrl(*url.parent.parts)).refuse_unconditional()
    there = _smaller_copy(objects, opened.manifest)
    most = most_objects(opened.manifest)
    listed = {each.key: each for each in objects.listed(most_keys=most)}
    copy = _Copy(opened, objects, listed, most)
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
    for name, values in ((LABELS, opened.labels), (PREVIEW, opened.preview)):
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
    return counts


def _smaller_copy(objects: Objects, manifest: Manifest) -> Manifest | None:
    """The manifest of an earlier copy; None if there is none, or it is damaged.

    Raises CacheMismatch unless what is there is a part of this cache.
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
    """Raise CacheMismatch unless a copy of `manifest` over `there` loses nothing."""
    is_same = identity_sha256(there.identity) == identity_sha256(manifest.identity)
    if not is_same or there.block_rows != manifest.block_rows:
        raise CacheMismatch(f"{where} holds another cache", fix="copy to another prefix")
    is_part = there.num_views <= manifest.num_views and there.taps.items() <= manifest.taps.items()
    if not is_part:
        raise CacheMismatch(
            f"{where} holds more of this cache: {there.num_views} views of "
            f"{', '.join(there.taps)}, instead of {manifest.num_views} of "
            f"{', '.join(manifest.taps)}",
            fix="copy it in the other direction, or to another place",
        )


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
