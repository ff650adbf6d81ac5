"""Converts a cache between its two forms: a folder of zarr chunks, and one HDF5 file."""

from __future__ import annotations

import math
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.formats import format_size
from runtime.inside import make_folder_inside, write_inside
from runtime.locks import Job, WriterLock
from runtime.text import one_line
from store.content import metadata_checksums, remove_temporary_files
from store.disk import is_full, refusals_of
from store.errors import CacheBusy, CacheDamaged, CacheError, CacheFull, CacheMismatch
from store.hdf5_write import write_hdf5
from store.identity import identity_sha256
from store.journal import JournalWriter
from store.layout import (
    LABELS,
    MANIFEST,
    PREVIEW,
    ZARR_GROUP,
    cache_path,
    chunk_name,
    encode_chunk,
    whole_name,
    with_checksum,
)
from store.manifest import Manifest, write_manifest
from store.metadata import zarr_metadata
from store.reader import TeacherCache

_MOST_GROWTH = 4  # times the file's own bytes; blocks are padded in a folder
_SPARE_BYTES = 256 * 2**20


def export_cache(cache: Path, file: Path) -> None:
    """Write the complete cache in folder `cache` to one HDF5 file, every checksum verified.

    An existing file is replaced when the new one is complete. Raises CacheError.
    """
    opened = TeacherCache.open(cache)
    if not file.parent.is_dir():
        fix = shlex.join(["mkdir", "-p", str(file.parent)])
        raise CacheError(f"there is no folder {file.parent}", fix=fix)
    write_hdf5(file, opened.manifest, _whole(opened), opened.source.read)


def import_cache(file: Path, caches_dir: Path) -> Path:
    """Make a cache folder below `caches_dir` from an exported file; returns its path.

    Equal to the folder that was exported bit for bit, except for the journal, which is new.
    Raises CacheError, also where a cache of that name exists.
    """
    if file.is_dir():
        raise CacheMismatch(f"{file} is a folder: only an exported HDF5 file can be imported")
    opened = TeacherCache.open(file)
    target = cache_path(caches_dir, opened.manifest.teacher, opened.manifest.identity)
    if os.path.lexists(target / MANIFEST):
        fix = f"remove it first: {shlex.join(['rm', '-r', str(target)])}"
        raise CacheError(f"{target} exists", fix=fix)
    try:
        with refusals_of(target):
            caches_dir.mkdir(parents=True, exist_ok=True)
            _refuse_growth(file, opened.manifest, caches_dir)
            make_folder_inside(caches_dir, target.name)  # and not through a link
            _write_locked(target, opened)
    except OSError as error:
        if isinstance(error, CacheError) or not is_full(error):
            raise
        raise CacheFull(f"the disk of {target} is too full", fix=_MAKE_ROOM) from None
    return target


_MAKE_ROOM = "make room, then run the same command again"


def _refuse_growth(file: Path, manifest: Manifest, caches_dir: Path) -> None:
    """Raise CacheFull, or CacheDamaged where the file holds far less than it would become."""
    needed, held = folder_bytes(manifest), file.stat().st_size
    if needed > _MOST_GROWTH * held + _SPARE_BYTES:
        raise CacheDamaged(
            f"{one_line(file)} has {format_size(held)} and would become {format_size(needed)}, "
            f"almost all of it padding: its blocks are far larger than its views",
            fix="ask whoever made it for an export of smaller blocks",
        )
    free = shutil.disk_usage(caches_dir).free
    if needed > free:
        raise CacheFull(
            f"the disk of {caches_dir} is too full: {format_size(needed)} are needed, "
            f"{format_size(free)} are free",
            fix=_MAKE_ROOM,
        )


def folder_bytes(manifest: Manifest) -> int:
    """Bytes of a complete cache's chunks."""
    m, whole = manifest, 0
    for shape, dtype in m.whole.values():
        whole += math.prod(shape) * np.dtype(dtype).itemsize
    views = {name: 1 if spec.all_views else m.num_views for name, spec in m.arrays.items()}
    chunks = (m.chunk_file_bytes(spec) * views[name] for name, spec in m.arrays.items())
    return whole + m.blocks_per_view * sum(chunks)


def _write_locked(target: Path, opened: TeacherCache) -> None:
    lock = WriterLock(target, Job(), CacheBusy)
    try:
        _write_folder(target, opened)
    finally:
        lock.release()


def _write_folder(target: Path, opened: TeacherCache) -> None:
    manifest, whole = opened.manifest, _whole(opened)
    remove_temporary_files(target, manifest)
    metadata = zarr_metadata(manifest)
    for name, text in metadata.items():
        write_inside(target, f"{ZARR_GROUP}/{name}", text)
    for name, values in whole.items():
        write_inside(target, whole_name(name, values.ndim), with_checksum(values))
    journal = JournalWriter(target, identity_sha256(manifest.identity))
    for block in manifest.blocks():
        checksums = {}
        for array, spec in manifest.arrays.items():
            rows = np.empty((manifest.rows_in(spec, block), *spec.shape), dtype=spec.dtype)
            opened.source.read(array, block, rows)
            data, checksums[array] = encode_chunk(rows, spec, manifest.chunk_rows(spec))
            write_inside(target, chunk_name(array, spec, block), data)
        journal.commit(block, checksums)
    journal.close()
    # Last, so that an interrupted import never passes for a cache.
    write_manifest(target, metadata_checksums(manifest, metadata))


def _whole(opened: TeacherCache) -> dict[str, NDArray[Any]]:
    return {LABELS: opened.labels, PREVIEW: opened.preview}
