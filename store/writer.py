"""Creates a cache or takes one up again, and commits whole blocks to it.

Order of a commit: every tap's chunk is written aside, flushed and renamed; then one journal line is
flushed. Whatever happens in between, a block is there entirely or not at all.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.chunks import chunk_faults, metadata_faults
from store.errors import BadTeacherOutput, CacheMismatch
from store.identity import Identity, differing_fields
from store.journal import JournalWriter, read_journal
from store.layout import (
    LABELS,
    LABELS_DTYPE,
    MANIFEST,
    ZARR_GROUP,
    Block,
    Manifest,
    TapSpec,
    chunk_path,
    crc32c,
    crc_hex,
    default_block_rows,
    encode_chunk,
    flush_folder,
    read_manifest,
    write_atomically,
    write_manifest,
    zarr_metadata,
)


class CacheWriter:
    """One process's hold on a cache that is being filled. Use as a context manager."""

    def __init__(self, path: Path, manifest: Manifest, rank: int = 0) -> None:
        self.path = path
        self.manifest = manifest
        self._rank = rank
        self._journal: JournalWriter | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        teacher: str,
        identity: Identity,
        taps: Mapping[str, TapSpec],
        labels: NDArray[np.int64],
        num_views: int,
        canary: Mapping[str, Any],
        versions: Mapping[str, str],
        block_rows: int | None = None,
        rank: int = 0,
    ) -> CacheWriter:
        """Create the cache at `path`, or take it up if it is there and of the same identity.

        labels: (N,) int64. block_rows (a power of two) is a new cache's block size; one that exists
        keeps its own. Raises CacheMismatch if what lies there is something else.
        """
        if (path / MANIFEST).exists():
            manifest = _taken_up(path, identity, taps, labels, num_views)
        else:
            rows = block_rows or default_block_rows(taps, len(labels))
            metadata = zarr_metadata(taps, len(labels), num_views, rows)
            manifest = Manifest(
                teacher=teacher,
                identity=identity,
                num_samples=len(labels),
                num_views=num_views,
                block_rows=rows,
                taps=dict(taps),
                labels_crc32c=_labels_crc(labels),
                zarr_crc32c={name: _bytes_crc(data) for name, data in metadata.items()},
                canary=dict(canary),
                versions=dict(versions),
            )
            path.mkdir(parents=True, exist_ok=True)
            flush_folder(path.parent)
            write_manifest(path, manifest)
        writer = cls(path, manifest, rank)
        writer._lay_out(labels)
        return writer

    def pending(self, *, check_every_byte: bool = False) -> list[Block]:
        """Blocks that are not committed for every tap, or whose chunks are not sound."""
        journal = read_journal(self.path)
        faults = chunk_faults(
            self.path, self.manifest, journal, self.manifest.taps, read=check_every_byte
        )
        unsound = {(fault.view, fault.block) for fault in faults}
        return [
            block
            for block in self.manifest.blocks()
            if (block.view, block.index) in unsound
            or any(
                (tap, block.view, block.index) not in journal.committed
                for tap in self.manifest.taps
            )
        ]

    def write_block(self, block: Block, records: Mapping[str, NDArray[Any]]) -> None:
        """Commit one whole block: tap -> (rows of the block, *tap shape).

        Raises BadTeacherOutput, naming tap, view and sample, where a value is not finite or
        overflows the tap's dtype; ValueError if taps or shapes are not those of the cache.
        """
        if self._journal is None:
            self._journal = JournalWriter(self.path, self._rank)
        if set(records) != set(self.manifest.taps):
            raise ValueError(f"taps {sorted(records)} given, {sorted(self.manifest.taps)} expected")
        encoded = {
            tap: encode_chunk(
                _stored(tap, self.manifest.taps[tap], block, values),
                self.manifest.taps[tap],
                self.manifest.block_rows,
            )
            for tap, values in records.items()
        }
        for tap, (data, _) in encoded.items():
            write_atomically(chunk_path(self.path, tap, self.manifest.taps[tap], block), data)
        self._journal.commit(block, {tap: checksum for tap, (_, checksum) in encoded.items()})

    def record_measured(self, measured: Mapping[str, Any]) -> None:
        """Keep what the pass found out about the teacher (its errors) in the manifest."""
        self.manifest = dataclasses.replace(self.manifest, measured=dict(measured))
        write_manifest(self.path, self.manifest)

    def _lay_out(self, labels: NDArray[np.int64]) -> None:
        """Write what is missing or damaged of the zarr metadata and the labels."""
        group = self.path / ZARR_GROUP
        for tap in (*self.manifest.taps, LABELS):
            (group / tap).mkdir(parents=True, exist_ok=True)
        _remove_leftovers(group)
        if metadata_faults(self.path, self.manifest):
            self._rewrite_metadata()
        data = labels.astype(LABELS_DTYPE)
        trailer = np.array([crc32c(data)], dtype="<u4")
        expected = data.tobytes() + trailer.tobytes()
        file = group / LABELS / "c.0"
        if not file.is_file() or file.read_bytes() != expected:
            write_atomically(file, expected)

    def _rewrite_metadata(self) -> None:
        m = self.manifest
        metadata = zarr_metadata(m.taps, m.num_samples, m.num_views, m.block_rows)
        for name, data in metadata.items():
            write_atomically(self.path / ZARR_GROUP / name, data)
        checksums = {name: _bytes_crc(data) for name, data in metadata.items()}
        if checksums != m.zarr_crc32c:  # another version of zarr spells them differently
            self.manifest = dataclasses.replace(m, zarr_crc32c=checksums)
            write_manifest(self.path, self.manifest)

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._journal is not None:
            self._journal.__exit__(kind, error, trace)
            self._journal = None


def _taken_up(
    path: Path,
    identity: Identity,
    taps: Mapping[str, TapSpec],
    labels: NDArray[np.int64],
    num_views: int,
) -> Manifest:
    manifest = read_manifest(path)
    differences = differing_fields(identity, manifest.identity)
    if taps != manifest.taps:
        ours = {name: str(spec) for name, spec in taps.items()}
        theirs = {name: str(spec) for name, spec in manifest.taps.items()}
        differences += differing_fields(ours, theirs, "taps.")
    if _labels_crc(labels) != manifest.labels_crc32c:
        differences.append("labels: the dataset's differ from those in the cache")
    if differences:
        raise CacheMismatch("\n  ".join([f"{path} is the cache of something else", *differences]))
    return manifest


def _stored(tap: str, spec: TapSpec, block: Block, values: NDArray[Any]) -> NDArray[Any]:
    """`values` in the tap's dtype, checked for shape and for numbers that it cannot hold."""
    if values.shape != (block.rows, *spec.shape):
        raise ValueError(f"tap {tap} has shape {values.shape}, not {(block.rows, *spec.shape)}")
    with np.errstate(over="ignore"):
        stored = values.astype(spec.dtype)
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        row = int(np.argwhere(~np.isfinite(stored))[0][0])
        worst = values[row].ravel()[np.argmax(~np.isfinite(stored[row].ravel()))]
        raise BadTeacherOutput(
            f"the teacher's output {worst} of tap {tap}, view {block.view}, sample "
            f"{block.start + row} does not fit {spec.dtype}"
        )
    return stored


def _remove_leftovers(group: Path) -> None:
    """Files that a writer which died had not yet renamed."""
    for path in group.glob("*/.*.tmp"):
        owner = int(path.name.split(".")[-2])
        if not _alive(owner):
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _labels_crc(labels: NDArray[np.int64]) -> str:
    return crc_hex(crc32c(np.ascontiguousarray(labels, dtype=LABELS_DTYPE)))


def _bytes_crc(data: bytes) -> str:
    return crc_hex(crc32c(np.frombuffer(data, dtype=np.uint8)))
