"""The content of a cache that is new or grows, and the files that describe it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teach_once.runtime.safe.confined import (
    Root,
    listed_inside,
    make_folder_inside,
    open_inside,
    remove_inside,
    remove_leftovers,
    rename_inside,
    write_inside,
)
from teach_once.runtime.safe.files import flush_folder
from teach_once.runtime.safe.safe_read import read_bounded
from teach_once.store.errors import CacheDamaged, CacheMismatch, CacheMissing
from teach_once.store.format.journal import ChunkKey, forget
from teach_once.store.format.manifest import Manifest, read_manifest, write_manifest
from teach_once.store.format.metadata import (
    MAX_METADATA_BYTES,
    file_checksum,
    metadata_faults,
    zarr_metadata,
)
from teach_once.store.format.salvage import salvage
from teach_once.store.format.spec import (
    JOURNAL,
    LABELS,
    LABELS_DTYPE,
    PREVIEW,
    ZARR_GROUP,
    TapSpec,
    bytes_crc32c,
    crc32c,
    crc_hex,
    default_block_rows,
    next_path,
    whole_name,
    with_checksum,
)
from teach_once.store.identity import Difference, Identity, differences


@dataclass(frozen=True)
class CacheContent:
    """The planned content of a cache.

    labels: (N,) int64; None, like `class_names`, for samples without classes. preview: (n, H, W, C)
    uint8, the first n views of sample 0, to look at a cache without its dataset.
    """

    teacher: str
    identity: Identity
    taps: Mapping[str, TapSpec]
    num_samples: int
    labels: NDArray[np.int64] | None
    num_views: int
    class_names: Sequence[str] | None
    canary: Mapping[str, Any]
    preview: NDArray[np.uint8]
    versions: Mapping[str, str]

    @property
    def whole(self) -> dict[str, NDArray[Any]]:
        """Return the arrays that are stored in one piece."""
        preview = {PREVIEW: np.ascontiguousarray(self.preview)}
        if self.labels is None:
            return preview
        return {LABELS: np.ascontiguousarray(self.labels, dtype=LABELS_DTYPE), **preview}

    @property
    def num_classes(self) -> int:
        """Return the number of classes of the logits; 0 without classes and logits."""
        if self.class_names is not None:
            return len(self.class_names)
        return self.taps["logits"].shape[0] if "logits" in self.taps else 0


def manifest_for(
    path: Path, content: CacheContent, block_rows: int | None
) -> tuple[Manifest, bool]:
    """Return the cache's manifest (existing, grown or new), and True if it was salvaged.

    It is salvaged if the old manifest cannot be read, or if an interrupted import has not written
    one. Every byte of the cache must then be checked.
    """
    try:
        manifest = read_manifest(path)
    except (CacheDamaged, CacheMissing) as error:
        if isinstance(error, CacheMissing) and not os.path.lexists(path / JOURNAL):
            return _written_anew(path, content, block_rows), False
        content, rows_there = with_salvaged(path, content, _array_names(path), partial(_read, path))
        return _written_anew(path, content, rows_there or block_rows), True
    refuse_another(path, manifest, content)
    if (grown := grown_manifest(manifest, content)) is None:
        return manifest, False
    forget(path, beyond(manifest), grown)
    return replace_metadata(path, grown), False


def grown_manifest(manifest: Manifest, content: CacheContent) -> Manifest | None:
    """Return the manifest with further views and taps of `content`; None if it has them all."""
    taps = {**manifest.taps, **content.taps}
    num_views = max(manifest.num_views, content.num_views)
    if (taps, num_views) == (manifest.taps, manifest.num_views):
        return None
    return dataclasses.replace(
        manifest, taps=taps, num_views=num_views, measured=manifest.measured_with_views
    )


def beyond(manifest: Manifest) -> Callable[[ChunkKey], bool]:
    """Return True if a chunk is outside the manifest's plan, left over from an interrupted trim.

    If the cache grows again, such a chunk must not be mistaken for a chunk of the new tap.
    """
    arrays = manifest.arrays
    return lambda key: key[0] not in arrays or key[1] >= manifest.num_views


def draft_manifest(content: CacheContent, block_rows: int | None = None) -> Manifest:
    """Return the manifest of a new cache, without the checksums of the zarr metadata."""
    return Manifest(
        teacher=content.teacher,
        identity=content.identity,
        num_samples=content.num_samples,
        num_views=content.num_views,
        block_rows=block_rows or default_block_rows(content.taps, content.num_samples),
        taps=dict(content.taps),
        class_names=None if content.class_names is None else list(content.class_names),
        preview_shape=list(content.preview.shape),
        whole_crc32c={name: crc_hex(crc32c(values)) for name, values in content.whole.items()},
        zarr_crc32c={},
        canary=dict(content.canary),
        versions=dict(content.versions),
    )


def _written_anew(path: Path, content: CacheContent, block_rows: int | None) -> Manifest:
    flush_folder(path.parent)
    manifest = draft_manifest(content, block_rows)
    manifest = metadata_checksums(manifest, zarr_metadata(manifest))
    write_manifest(path, manifest)  # first; the zarr.json files follow
    return manifest


def replace_metadata(path: Path, manifest: Manifest) -> Manifest:
    """Replace a cache's manifest and zarr.json files; the cache is valid at every moment.

    Each new zarr.json is written next to the old one, then the manifest is replaced, then each
    zarr.json is renamed.
    """
    metadata = zarr_metadata(manifest)
    manifest = metadata_checksums(manifest, metadata)
    for name, data in metadata.items():
        if file_checksum(path, f"{ZARR_GROUP}/{name}") != manifest.zarr_crc32c[name]:
            write_inside(path, f"{ZARR_GROUP}/{next_path(Path(name))}", data)
    write_manifest(path, manifest)
    settle_metadata(path, manifest)
    return manifest


def settle_metadata(path: Path, manifest: Manifest) -> None:
    """Finish the renames of an interrupted `replace_metadata`; remove files without a manifest."""
    for name, checksum in manifest.zarr_crc32c.items():
        successor = next_path(Path(ZARR_GROUP, name))
        there = file_checksum(path, str(successor))
        if there == checksum:
            rename_inside(path, successor, Path(name).name)
        elif there is not None:
            remove_inside(path, successor)


def lay_out(path: Path, manifest: Manifest, content: CacheContent) -> Manifest:
    """Write zarr metadata, labels and preview if they are missing or damaged.

    The caller holds the lock, so temporary files belong to a writer that died. Returns the
    manifest, which changes if another version of zarr writes the metadata differently.
    """
    folders = [f"{ZARR_GROUP}/{name}" for name in manifest.array_names]
    for folder in folders:
        make_folder_inside(path, folder)
    make_folder_inside(path, JOURNAL)
    remove_temporary_files(path, manifest)
    settle_metadata(path, manifest)
    if metadata_faults(path, manifest):
        metadata = zarr_metadata(manifest)
        if metadata_checksums(manifest, metadata) != manifest:
            manifest = replace_metadata(path, manifest)
        for name, data in metadata.items():
            write_unless_there(path, f"{ZARR_GROUP}/{name}", data)
    for name, values in content.whole.items():
        expected = with_checksum(values)
        if not holds(path, whole_name(name, values.ndim), expected):
            write_inside(path, whole_name(name, values.ndim), expected)
    return manifest


def remove_temporary_files(path: Path, manifest: Manifest) -> None:
    """Remove leftovers of killed writers, copies and imports from all folders of the cache.

    The caller holds the lock, and no other process of its job runs.
    """
    arrays = [f"{ZARR_GROUP}/{name}" for name in manifest.array_names]
    for folder in ("", JOURNAL, ZARR_GROUP, *arrays):
        with suppress(FileNotFoundError):
            remove_leftovers(path, folder)


def holds(cache: Root, name: str, expected: NDArray[np.uint8]) -> bool:
    """Return True if a file of the cache contains exactly these bytes. Raises BadFile."""
    try:
        with open_inside(cache, name) as file:
            is_as_long = os.fstat(file.fileno()).st_size == expected.size
            return is_as_long and file.read(expected.size) == expected.tobytes()
    except FileNotFoundError:
        return False


def write_unless_there(cache: Path, name: str, content: bytes) -> None:
    """Write a file of the cache, unless it contains exactly these bytes."""
    if not holds_bytes(cache, name, content):
        write_inside(cache, name, content)


def holds_bytes(cache: Root, name: str, expected: bytes) -> bool:
    """Return True if a file of the cache contains exactly these bytes; `holds` for bytes."""
    return holds(cache, name, np.frombuffer(expected, np.uint8))


def metadata_checksums(manifest: Manifest, metadata: Mapping[str, bytes]) -> Manifest:
    """Return the manifest with the checksums of these zarr.json files."""
    checksums = {name: crc_hex(bytes_crc32c(data)) for name, data in metadata.items()}
    return dataclasses.replace(manifest, zarr_crc32c=checksums)


def with_salvaged(
    cache: Path,
    content: CacheContent,
    names: Collection[str],
    read: Callable[[str], bytes | None],
) -> tuple[CacheContent, int | None]:
    """Add the views and taps of a cache without a manifest; return the content and the block size.

    names: the existing arrays. read, and the errors: see `store.format.salvage.salvage`.
    """
    if not names:
        return content, None
    found = salvage(cache, names, read, content.taps, content.num_samples, content.num_classes)
    content = dataclasses.replace(
        content,
        taps={**content.taps, **{t: s for t, s in found.taps.items() if t not in content.taps}},
        num_views=max(content.num_views, found.num_views or 0),
    )
    return content, found.block_rows


def _array_names(cache: Path) -> list[str]:
    """Return the names in the group of a cache folder."""
    try:
        return listed_inside(cache, ZARR_GROUP)
    except FileNotFoundError:
        return []


def _read(cache: Path, name: str) -> bytes | None:
    try:
        return read_bounded(cache / name, MAX_METADATA_BYTES)
    except FileNotFoundError:
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
    """Yield the arrays whose checksums differ from the cache's, and missing labels."""
    for name, values in whole.items():
        expected, found = crc_hex(crc32c(values)), manifest.whole_crc32c.get(name)
        if expected != found:
            yield Difference(name, f"crc32c {expected}", found and f"crc32c {found}")
    if LABELS in manifest.whole_crc32c and LABELS not in whole:
        yield Difference(LABELS, None, f"crc32c {manifest.whole_crc32c[LABELS]}")
