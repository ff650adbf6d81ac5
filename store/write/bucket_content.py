"""The objects that describe a cache in a bucket: put for a new cache, replaced when it grows.

The manifest is put first, and only if absent. If several writers begin a cache, one wins, and the
others continue with its manifest. The manifest is only replaced if it has not changed since it was
read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from teach_once.store.errors import CacheBusy, CacheDamaged, CacheError, CacheMissing
from teach_once.store.format.content import (
    CacheContent,
    draft_manifest,
    grown_manifest,
    metadata_checksums,
    refuse_another,
    with_salvaged,
)
from teach_once.store.format.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    manifest_text,
    refuse_other_name,
)
from teach_once.store.format.metadata import (
    checksum_of,
    metadata_faults,
    zarr_metadata,
)
from teach_once.store.format.spec import MANIFEST, ZARR_GROUP, next_path, whole_name, with_checksum
from teach_once.store.place.bucket import Bucket, in_parallel
from teach_once.store.place.place import FileContent
from teach_once.store.read.zarr_source import parse_remote_manifest, read_metadata, remote_manifest

Result = TypeVar("Result")

_TRIES = 8  # attempts to change an object while other writers change it


def begin_cache(
    bucket: Bucket, content: CacheContent, block_rows: int | None
) -> tuple[Manifest, bool]:
    """Create the cache, or grow it if needed; return its manifest, and True if it was salvaged.

    Missing or damaged zarr metadata, labels and preview are put. A manifest is salvaged if the old
    one could not be read or was never put; then every byte of the cache must be checked. Raises
    CacheMismatch if another cache exists.
    """
    is_salvaged = False
    for _ in range(_TRIES):
        manifest, was_lost = _begin_manifest(bucket, content, block_rows)
        is_salvaged |= was_lost
        manifest = _put_documents(bucket, manifest, content)
        there, _ = remote_manifest(bucket)
        if there.zarr_crc32c == manifest.zarr_crc32c:
            return manifest, is_salvaged
        # Another pass has grown the cache meanwhile: the metadata must not be older than it.
    raise _busy(bucket, MANIFEST)


def _begin_manifest(
    bucket: Bucket, content: CacheContent, block_rows: int | None
) -> tuple[Manifest, bool]:
    def begun(there: FileContent | None) -> tuple[Manifest, bool]:
        try:
            if there is None:
                raise CacheMissing("")
            if there.content is None:
                raise CacheDamaged("")
            manifest = parse_remote_manifest(bucket, there.content)
        except (CacheMissing, CacheDamaged):
            manifest, is_salvaged = _draft(bucket, content, block_rows)
            _put(bucket, MANIFEST, manifest_text(manifest), there)
            return manifest, is_salvaged or there is not None
        refuse_other_name(bucket.url, manifest)
        refuse_another(bucket.url, manifest, content)
        if (grown := grown_manifest(manifest, content)) is None:
            return manifest, False
        return _with_metadata(bucket, grown, there), False

    return _update_manifest(bucket, begun)


def replace_measured(bucket: Bucket, measured: Mapping[str, Any]) -> Manifest:
    """Write a pass's metrics of the teacher to the manifest, which may have grown meanwhile."""

    def replaced(there: FileContent | None) -> Manifest:
        if there is None or there.content is None:
            raise CacheMissing(f"{bucket.url / MANIFEST} has been removed or damaged")
        manifest = parse_remote_manifest(bucket, there.content)
        manifest = dataclasses.replace(manifest, measured=dict(measured))
        _put(bucket, MANIFEST, manifest_text(manifest), there)
        return manifest

    return _update_manifest(bucket, replaced)


def _put_documents(bucket: Bucket, manifest: Manifest, content: CacheContent) -> Manifest:
    """Put the missing and damaged documents.

    Returns the manifest, which changes if another version of zarr writes the metadata differently.
    """
    metadata = zarr_metadata(manifest)
    if metadata_checksums(manifest, metadata) != manifest:
        if metadata_faults(bucket.url, manifest, partial(read_metadata, bucket)):
            there = bucket.get_tagged(MANIFEST, MAX_MANIFEST_BYTES)
            manifest = _with_metadata(bucket, manifest, there)
        metadata = {}
    documents = {f"{ZARR_GROUP}/{name}": text for name, text in metadata.items()}
    for name, values in content.whole.items():
        documents[whole_name(name, values.ndim)] = with_checksum(values).tobytes()
    for _ in in_parallel(lambda item: _settle(bucket, *item), list(documents.items())):
        pass
    return manifest


def _settle(bucket: Bucket, key: str, data: bytes) -> None:
    """Put an object, possibly over another one, unless it exists with these bytes."""
    for _ in range(_TRIES):
        there = bucket.read(key, len(data))
        if there is not None and there.content == data:
            return
        try:
            _put(bucket, key, data, there)
            return
        except (CacheBusy, CacheMissing):
            continue
    raise _busy(bucket, key)


def _update_manifest(bucket: Bucket, change: Callable[[FileContent | None], Result]) -> Result:
    """Return change(current manifest), repeated if another process changed it meanwhile."""
    for _ in range(_TRIES):
        try:
            return change(_manifest_there(bucket))
        except CacheBusy:
            continue
    raise _busy(bucket, MANIFEST)


def _draft(bucket: Bucket, content: CacheContent, block_rows: int | None) -> tuple[Manifest, bool]:
    """Return a new manifest, and True if a part of the cache exists, whose block size is kept."""
    arrays = bucket.list_folders(ZARR_GROUP)
    content, rows_there = with_salvaged(bucket.url, content, arrays, partial(read_metadata, bucket))
    manifest = draft_manifest(content, rows_there or block_rows)
    return metadata_checksums(manifest, zarr_metadata(manifest)), bool(arrays)


def _with_metadata(bucket: Bucket, manifest: Manifest, there: FileContent) -> Manifest:
    """Replace a manifest and the zarr.json files; concurrent readers always find them valid.

    Each new zarr.json is put next to the old one, then the manifest, then each under its name.
    """
    metadata = zarr_metadata(manifest)
    manifest = metadata_checksums(manifest, metadata)
    read = partial(read_metadata, bucket)
    changed = {
        key: text
        for name, text in metadata.items()
        if checksum_of(read(key := f"{ZARR_GROUP}/{name}")) != manifest.zarr_crc32c[name]
    }
    for key, text in changed.items():
        bucket.replace(str(next_path(Path(key))), text)
    _put(bucket, MANIFEST, manifest_text(manifest), there)
    for key, text in changed.items():
        bucket.replace(key, text)
    return manifest


def _put(bucket: Bucket, key: str, data: bytes, there: FileContent | None) -> None:
    """Put an object if absent, or over `there`. Raises CacheBusy if it has changed."""
    if there is not None:
        bucket.replace(key, data, there.tag)
    elif not bucket.create(key, data):
        raise _busy(bucket, key)


def _manifest_there(bucket: Bucket) -> FileContent | None:
    """Fetch the manifest, twice if it is damaged, because the transfer may have failed."""
    there = bucket.read(MANIFEST, MAX_MANIFEST_BYTES)
    if there is None or there.content is None:
        return there
    try:
        parse_remote_manifest(bucket, there.content)
    except CacheDamaged:
        return bucket.read(MANIFEST, MAX_MANIFEST_BYTES)
    except CacheError:
        pass  # another version, which the caller reports
    return there


def _busy(bucket: Bucket, key: str) -> CacheBusy:
    return CacheBusy(
        f"{bucket.url / key} was changed by another process",
        fix="run the same command again",
    )
