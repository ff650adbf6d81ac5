"""What a cache is to hold, and what becomes of it: a new manifest, or an old one made larger."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import CacheDamaged, CacheMismatch
from store.files import flush_folder
from store.identity import Identity, differing_fields
from store.layout import (
    LABELS,
    LABELS_DTYPE,
    PREVIEW,
    SAMPLE_CRC,
    ZARR_GROUP,
    TapSpec,
    crc32c,
    crc_hex,
    default_block_rows,
    zarr_metadata,
)
from store.manifest import Manifest, read_manifest, write_manifest


@dataclass(frozen=True)
class CacheContent:
    """What a cache is to hold.

    labels: (N,) int64. preview: (n, H, W, C) uint8, the first n views of sample 0, kept so that a
    cache can be looked at without its dataset. sample_crc32c: whether a new cache keeps each
    sample's checksum; one that exists stays as it was made.
    """

    teacher: str
    identity: Identity
    taps: Mapping[str, TapSpec]
    labels: NDArray[np.int64]
    num_views: int
    class_names: Sequence[str]
    canary: Mapping[str, Any]
    preview: NDArray[np.uint8]
    versions: Mapping[str, str]
    sample_crc32c: bool = False

    @property
    def whole(self) -> dict[str, NDArray[Any]]:
        """The arrays that are stored in a single chunk."""
        labels = np.ascontiguousarray(self.labels, dtype=LABELS_DTYPE)
        return {LABELS: labels, PREVIEW: np.ascontiguousarray(self.preview)}


def manifest_for(
    path: Path, content: CacheContent, block_rows: int | None
) -> tuple[Manifest, bool]:
    """The cache's manifest, taken up and grown, or new; and whether it had to be salvaged."""
    try:
        manifest = read_manifest(path)
    except CacheDamaged:
        there = _rows_on_disk(path)
        if there is not None:
            kept = (path / ZARR_GROUP / SAMPLE_CRC).is_dir()
            content = dataclasses.replace(content, sample_crc32c=kept)
        return _written_anew(path, content, there or block_rows), True
    except FileNotFoundError:
        return _written_anew(path, content, block_rows), False
    refuse_another(path, manifest, content)
    taps = {**manifest.taps, **content.taps}
    num_views = max(manifest.num_views, content.num_views)
    if (taps, num_views) == (manifest.taps, manifest.num_views):
        return manifest, False
    grown = dataclasses.replace(manifest, taps=taps, num_views=num_views, measured={})
    return _withmetadata_of(path, grown, content), False


def draft_manifest(content: CacheContent, block_rows: int | None = None) -> Manifest:
    """What the manifest of a new cache would say, without the checksums of the zarr metadata."""
    return Manifest(
        teacher=content.teacher,
        identity=content.identity,
        num_samples=len(content.labels),
        num_views=content.num_views,
        block_rows=block_rows or default_block_rows(content.taps, len(content.labels)),
        taps=dict(content.taps),
        class_names=list(content.class_names),
        preview_shape=list(content.preview.shape),
        whole_crc32c={name: crc_hex(crc32c(values)) for name, values in content.whole.items()},
        zarr_crc32c={},
        canary=dict(content.canary),
        versions=dict(content.versions),
        sample_crc32c=content.sample_crc32c,
    )


def _written_anew(path: Path, content: CacheContent, block_rows: int | None) -> Manifest:
    flush_folder(path.parent)
    return _withmetadata_of(path, draft_manifest(content, block_rows), content)


def _withmetadata_of(path: Path, manifest: Manifest, content: CacheContent) -> Manifest:
    """Note the checksums of the zarr metadata to be written, and write the manifest first."""
    manifest = metadata_checksums(manifest, metadata_of(manifest, content))
    write_manifest(path, manifest)
    return manifest


def metadata_checksums(manifest: Manifest, metadata: Mapping[str, bytes]) -> Manifest:
    """The manifest with the checksums of these zarr.json files."""
    checksums = {name: _bytes_crc(data) for name, data in metadata.items()}
    return dataclasses.replace(manifest, zarr_crc32c=checksums)


def metadata_of(manifest: Manifest, content: CacheContent) -> dict[str, bytes]:
    m = manifest
    return zarr_metadata(m.arrays, content.whole, m.num_samples, m.num_views, m.block_rows)


def _rows_on_disk(path: Path) -> int | None:
    """The block size of a cache whose manifest is lost, from its zarr metadata."""
    try:
        text = (path / ZARR_GROUP / "logits" / "zarr.json").read_text()
        return int(json.loads(text)["chunk_grid"]["configuration"]["chunk_shape"][1])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def refuse_another(path: Path, manifest: Manifest, content: CacheContent) -> None:
    differences = differing_fields(content.identity, manifest.identity)
    for tap, spec in content.taps.items():
        theirs = manifest.taps.get(tap, spec)
        if theirs != spec:
            differences.append(f"taps.{tap}: expected {spec}, found {theirs}")
    for name, values in content.whole.items():
        if crc_hex(crc32c(values)) != manifest.whole_crc32c[name]:
            differences.append(f"{name}: the dataset's differ from those in the cache")
    if differences:
        raise CacheMismatch("\n  ".join([f"{path} is the cache of something else", *differences]))


def _bytes_crc(data: bytes) -> str:
    return crc_hex(crc32c(np.frombuffer(data, dtype=np.uint8)))
