"""Converts a cache between its two forms: a folder of zarr chunks, and one HDF5 file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.files import write_atomically
from runtime.locks import Job, WriterLock
from store.content import metadata_checksums
from store.errors import CacheBusy, CacheError, CacheMismatch
from store.hdf5 import write_hdf5
from store.identity import identity_sha256
from store.journal import JournalWriter
from store.layout import (
    LABELS,
    MANIFEST,
    PREVIEW,
    ZARR_GROUP,
    cache_path,
    chunk_path,
    encode_chunk,
    whole_path,
    with_checksum,
)
from store.manifest import write_manifest
from store.metadata import zarr_metadata
from store.reader import TeacherCache


def export_cache(cache: Path, file: Path) -> None:
    """Write the complete cache in folder `cache` to one HDF5 file, every checksum verified.

    An existing file is replaced when the new one is complete. Raises CacheError.
    """
    opened = TeacherCache.open(cache)
    if not file.parent.is_dir():
        raise CacheError(f"there is no folder {file.parent}", fix=f"mkdir -p {file.parent}")
    write_hdf5(file, opened.manifest, _whole(opened), opened.source.read)


def import_cache(file: Path, caches_dir: Path) -> Path:
    """Make a cache folder below `caches_dir` from an exported file; returns its path.

    Equal to the folder that was exported bit for bit, except for the journal, which is new.
    Raises CacheError, also where a cache of that name exists.
    """
    opened = TeacherCache.open(file)
    if file.is_dir():
        raise CacheMismatch(f"{file} is a folder: only an exported HDF5 file can be imported")
    manifest = opened.manifest
    target = cache_path(caches_dir, manifest.teacher, manifest.identity)
    if (target / MANIFEST).exists():
        raise CacheError(f"{target} exists", fix=f"remove {target} first")
    target.mkdir(parents=True, exist_ok=True)
    lock = WriterLock(target, Job(), CacheBusy)
    try:
        _write_folder(target, opened)
    finally:
        lock.release()
    return target


def _write_folder(target: Path, opened: TeacherCache) -> None:
    manifest, whole = opened.manifest, _whole(opened)
    for name in (*manifest.arrays, *whole):
        (target / ZARR_GROUP / name).mkdir(parents=True, exist_ok=True)
    metadata = zarr_metadata(manifest)
    for name, text in metadata.items():
        write_atomically(target / ZARR_GROUP / name, text)
    for name, values in whole.items():
        write_atomically(whole_path(target, name, values.ndim), with_checksum(values))
    journal = JournalWriter(target, identity_sha256(manifest.identity))
    for block in manifest.blocks():
        checksums = {}
        for array, spec in manifest.arrays.items():
            rows = np.empty((manifest.rows_in(spec, block), *spec.shape), dtype=spec.dtype)
            opened.source.read(array, block, rows)
            data, checksums[array] = encode_chunk(rows, spec, manifest.chunk_rows(spec))
            write_atomically(chunk_path(target, array, spec, block), data)
        journal.commit(block, checksums)
    journal.close()
    # Last, so that an interrupted import never passes for a cache.
    write_manifest(target, metadata_checksums(manifest, metadata))


def _whole(opened: TeacherCache) -> dict[str, NDArray[Any]]:
    return {LABELS: opened.labels, PREVIEW: opened.preview}
