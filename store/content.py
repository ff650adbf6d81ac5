"""What a cache is to hold, and what becomes of it: a new manifest, or an old one made larger."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.files import flush_folder, write_atomically
from store.chunks import file_checksum
from store.differences import Difference, differences
from store.errors import CacheDamaged, CacheMismatch
from store.identity import Identity
from store.journal import ChunkKey, forget
from store.layout import (
    LABELS,
    LABELS_DTYPE,
    PREVIEW,
    SAMPLE_CRC,
    ZARR_GROUP,
    Block,
    TapSpec,
    crc32c,
    crc_hex,
    default_block_rows,
    is_opt_in,
    next_path,
    tap_of,
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
    grown = dataclasses.replace(
        manifest, taps=taps, num_views=num_views, measured=manifest.measured_with_views
    )
    forget(path, beyond(manifest))
    return replace_metadata(path, grown, metadata_of(grown, content.whole)), False


def beyond(manifest: Manifest) -> Callable[[ChunkKey], bool]:
    """Whether a chunk is none that this manifest plans (left by a trim that was interrupted).

    Where a cache grows again, such a chunk must not be taken for one of the new tap.
    """
    arrays = manifest.arrays
    return lambda key: key[0] not in arrays or key[1] >= manifest.num_views


def unfinished(
    manifest: Manifest,
    has: Callable[[str, Block], bool],
    num_views: int,
    taps: Collection[str],
) -> Iterator[tuple[Block, set[str]]]:
    """Every block, and the taps of it that are to be computed for `num_views` views of `taps`.

    has: whether an array's block is committed. Views and taps that are not asked for are kept as
    whole as they are: other views that are whole get the taps, and other taps come along where the
    teacher runs over a block anyway. What a growth that was given up left open stays so.
    """
    arrays = list(manifest.arrays)
    absent = {
        block: {tap_of(array) for array in arrays if not has(array, block)}
        for block in manifest.blocks()
    }
    first = (block.view for block, gone in absent.items() if not all(map(is_opt_in, gone)))
    whole = min(first, default=manifest.num_views)
    for block, gone in absent.items():
        is_asked = block.view < max(num_views, whole) and not gone.isdisjoint({*taps, SAMPLE_CRC})
        yield block, gone if is_asked else set()


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
    manifest = draft_manifest(content, block_rows)
    manifest = metadata_checksums(manifest, metadata_of(manifest, content.whole))
    write_manifest(path, manifest)  # first of all; the zarr.json files follow
    return manifest


def replace_metadata(path: Path, manifest: Manifest, metadata: Mapping[str, bytes]) -> Manifest:
    """Exchange a cache's manifest and zarr.json files; it is sound at every moment.

    What a zarr.json will be is written beside it; then the manifest; then each is renamed.
    """
    manifest = metadata_checksums(manifest, metadata)
    for name, data in metadata.items():
        file = path / ZARR_GROUP / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file_checksum(file) != manifest.zarr_crc32c[name]:
            write_atomically(next_path(file), data)
    write_manifest(path, manifest)
    settle_metadata(path, manifest)
    return manifest


def settle_metadata(path: Path, manifest: Manifest) -> None:
    """Do the renames that `replace_metadata` may have left; drop what never came to count."""
    for name, checksum in manifest.zarr_crc32c.items():
        file = path / ZARR_GROUP / name
        found = file_checksum(next_path(file))
        if found == checksum:
            next_path(file).replace(file)
        elif found is not None:
            next_path(file).unlink()


def metadata_checksums(manifest: Manifest, metadata: Mapping[str, bytes]) -> Manifest:
    """The manifest with the checksums of these zarr.json files."""
    checksums = {name: _bytes_crc(data) for name, data in metadata.items()}
    return dataclasses.replace(manifest, zarr_crc32c=checksums)


def metadata_of(manifest: Manifest, whole: Mapping[str, NDArray[Any]]) -> dict[str, bytes]:
    """Path below the group -> zarr.json; whole: the arrays stored in a single chunk."""
    m = manifest
    return zarr_metadata(m.arrays, whole, m.num_samples, m.num_views, m.block_rows)


def _rows_on_disk(path: Path) -> int | None:
    """The block size of a cache whose manifest is lost, from its zarr metadata."""
    try:
        text = (path / ZARR_GROUP / "logits" / "zarr.json").read_text()
        return int(json.loads(text)["chunk_grid"]["configuration"]["chunk_shape"][1])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def refuse_another(path: Path, manifest: Manifest, content: CacheContent) -> None:
    """Raise CacheMismatch unless the cache at `path` was made for this content."""
    differing = differences(content.identity, manifest.identity)
    for tap, spec in content.taps.items():
        theirs = manifest.taps.get(tap, spec)
        if theirs != spec:
            differing.append(Difference(f"taps.{tap}", spec, theirs))
    differing += whole_differences(content.whole, manifest)
    if differing:
        raise CacheMismatch(f"{path} belongs to another configuration", differences=differing)


def whole_differences(
    whole: Mapping[str, NDArray[Any]], manifest: Manifest
) -> Iterator[Difference]:
    """Which of these arrays are not the cache's own, by checksum."""
    for name, values in whole.items():
        expected, found = crc_hex(crc32c(values)), manifest.whole_crc32c[name]
        if expected != found:
            yield Difference(name, f"crc32c {expected}", f"crc32c {found}")


def _bytes_crc(data: bytes) -> str:
    return crc_hex(crc32c(np.frombuffer(data, dtype=np.uint8)))
