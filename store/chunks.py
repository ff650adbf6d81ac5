"""The source of a cache that is a folder: chunk files, read straight into arrays and checked.

Plain zarr slicing gives the same values; this path skips its per-chunk copies, and compares the
checksum with the journal's besides the one behind the chunk, so that a chunk that was exchanged for
another, itself whole, is found too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from store.errors import CacheDamaged, TeacherPass
from store.journal import ChunkKey, Journal
from store.layout import (
    CHECKSUM_BYTES,
    LABELS,
    LABELS_DTYPE,
    PREVIEW,
    ZARR_GROUP,
    Block,
    chunk_path,
    crc32c,
    crc_hex,
    next_path,
    tap_of,
    whole_path,
)
from store.manifest import Manifest
from store.parallel import in_threads

_PIECE_BYTES = 256 * 1024


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: in which tap, view and block (None: all of them) and which file."""

    what: str
    file: Path
    tap: str | None = None
    view: int | None = None
    block: int | None = None

    def __str__(self) -> str:
        place = [
            f"{name} {value}"
            for name, value in (("tap", self.tap), ("view", self.view), ("block", self.block))
            if value is not None
        ]
        return ", ".join([*place, f"{self.what}: {self.file}"])


@dataclass(frozen=True)
class FolderSource:
    """Reads the arrays of a cache folder."""

    path: Path
    manifest: Manifest
    journal: Journal

    def has(self, array: str, block: Block) -> bool:
        return (array, block.view, block.index) in self.journal.committed

    def read(self, array: str, block: Block, out: NDArray[Any]) -> None:
        """Fill `out` (rows of the block, ...), C-contiguous; raises CacheDamaged."""
        fault = self.fault_of(array, block, out)
        if fault is not None:
            raise damaged(self.manifest, [fault])

    def read_whole(self, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """An array that is stored in a single chunk; raises CacheDamaged."""
        fault = self._whole_fault(name, shape, dtype)
        if fault is not None:
            raise damaged(self.manifest, [fault])
        data = whole_path(self.path, name, len(shape)).read_bytes()[:-CHECKSUM_BYTES]
        return np.frombuffer(data, dtype=dtype).reshape(shape)

    def _whole_fault(self, name: str, shape: tuple[int, ...], dtype: str) -> Fault | None:
        file = whole_path(self.path, name, len(shape))
        try:
            data = np.frombuffer(file.read_bytes(), dtype=np.uint8)
        except FileNotFoundError:
            return Fault(f"{name} missing", file)
        payload, trailer = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
        expected_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        sums = {
            crc32c(payload),
            int(self.manifest.whole_crc32c[name], 16),
            int.from_bytes(trailer, "little"),
        }
        whole = payload.size == expected_bytes and len(sums) == 1
        return None if whole else Fault(f"{name} damaged", file)

    def fault_of(self, array: str, block: Block, out: NDArray[Any] | None = None) -> Fault | None:
        """Read one chunk, into `out` if given; what is wrong with it, or None."""
        spec = self.manifest.arrays[array]
        path = chunk_path(self.path, array, spec, block)
        committed = self.journal.committed[array, block.view, block.index]
        if spec.all_views and self._views_disagree(array, block.index):
            return Fault("not the same in all views", path, array, block.view, block.index)
        what = _read_checked(path, out, self.manifest.chunk_file_bytes(spec), committed)
        return Fault(what, path, array, block.view, block.index) if what else None

    def _views_disagree(self, array: str, index: int) -> bool:
        keys = ((array, view, index) for view in range(self.manifest.num_views))
        found = {self.journal.committed[key] for key in keys if key in self.journal.committed}
        return len(found) > 1

    def faults(
        self,
        *,
        read: bool,
        num_views: int | None = None,
        on_chunk: Callable[[int], None] | None = None,
    ) -> list[Fault]:
        """Unsound chunks of the first views: by size alone, or (read) by every byte.

        `on_chunk` is called with the bytes of each chunk looked at.
        """
        views = self.manifest.num_views if num_views is None else num_views
        keys = list(self._keys(views))
        sizes = {
            name: self.manifest.chunk_file_bytes(spec)
            for name, spec in self.manifest.arrays.items()
        }
        to_read = sum(sizes[array] for array, _, _ in keys) if read else 0
        faults = []
        looks = in_threads(lambda key: self._looked_at(key, read), keys, to_read)
        for (array, _, _), fault in zip(keys, looks, strict=True):
            if on_chunk is not None:
                on_chunk(sizes[array])
            if fault is not None:
                faults.append(fault)
        whole = self._whole_faults() if read else []
        return self.metadata_faults(self.manifest.taps) + whole + faults

    def metadata_faults(self, taps: Collection[str]) -> list[Fault]:
        """What is wrong with the zarr.json files, but for those of other taps than these."""
        others = set(self.manifest.taps) - set(taps)
        arrays = {name for name in self.manifest.arrays if tap_of(name) in others}
        return [
            fault
            for fault in metadata_faults(self.path, self.manifest)
            if fault.file.parent.name not in arrays
        ]

    def _whole_faults(self) -> list[Fault]:
        manifest = self.manifest
        shapes = {
            LABELS: ((manifest.num_samples,), LABELS_DTYPE),
            PREVIEW: (tuple(manifest.preview_shape), "uint8"),
        }
        found = (self._whole_fault(name, *shape) for name, shape in shapes.items())
        return [fault for fault in found if fault is not None]

    def _keys(self, num_views: int) -> Iterable[ChunkKey]:
        arrays = self.manifest.arrays
        blocks = self.manifest.blocks_per_view
        for array, view, index in self.journal.committed:
            if array in arrays and view < num_views and index < blocks:
                yield array, view, index

    def _looked_at(self, key: ChunkKey, read: bool) -> Fault | None:
        array, view, index = key
        block, spec = self.manifest.block(view, index), self.manifest.arrays[array]
        if read:
            return self.fault_of(array, block)
        path = chunk_path(self.path, array, spec, block)
        what = _wrong_size(path, self.manifest.chunk_file_bytes(spec))
        return Fault(what, path, array, view, index) if what else None


def _read_checked(path: Path, out: NDArray[Any] | None, size: int, committed: str) -> str | None:
    """Read one chunk file, into `out` if given; None if every byte is right, else what is wrong.

    The checksum is taken piece by piece, while a piece still lies in the processor's cache.
    """
    payload_bytes = size - CHECKSUM_BYTES
    kept = np.empty(0, np.uint8) if out is None else out.reshape(-1).view(np.uint8)
    scratch = np.empty(min(_PIECE_BYTES, max(payload_bytes, CHECKSUM_BYTES)), dtype=np.uint8)
    checksum = done = 0
    try:
        with path.open("rb", buffering=0) as file:
            while done < payload_bytes:
                end = min(done + _PIECE_BYTES, payload_bytes)
                if done < kept.size:  # rows that are wanted, then padding that is not
                    end = min(end, kept.size)
                    piece = kept[done:end]
                else:
                    piece = scratch[: end - done]
                if _read_into(file, piece) < end - done:
                    return f"chunk has not its {size:,} bytes"
                checksum = int(google_crc32c.extend(checksum, piece))
                done = end
            trailer = file.read(CHECKSUM_BYTES + 1)
    except FileNotFoundError:
        return "chunk missing"
    except OSError as error:
        return f"chunk unreadable ({error.strerror})"
    if len(trailer) != CHECKSUM_BYTES:
        return f"chunk has not its {size:,} bytes"
    if checksum != int.from_bytes(trailer, "little"):
        return "checksum wrong"
    if crc_hex(checksum) != committed:
        return "checksum is not the journal's"
    return None


def _read_into(file: Any, part: NDArray[np.uint8]) -> int:
    view = memoryview(cast(Any, part))
    total = 0
    while total < len(view):
        got = file.readinto(view[total:])
        if not got:
            break
        total += got
    return total


def _wrong_size(path: Path, expected_bytes: int) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "chunk missing"
    return None if size == expected_bytes else f"chunk has {size:,} bytes, not {expected_bytes:,}"


def metadata_faults(cache: Path, manifest: Manifest) -> list[Fault]:
    """What is wrong with the zarr.json files, or with what they are about to become."""
    faults = []
    for name, expected in manifest.zarr_crc32c.items():
        path = cache / ZARR_GROUP / name
        found = file_checksum(path)
        if found != expected and file_checksum(next_path(path)) != expected:
            faults.append(Fault(f"zarr metadata {'damaged' if found else 'missing'}", path))
    return faults


def file_checksum(path: Path) -> str | None:
    """The crc32c of a file, None if there is none."""
    try:
        return crc_hex(crc32c(np.frombuffer(path.read_bytes(), dtype=np.uint8)))
    except FileNotFoundError:
        return None


def damaged(manifest: Manifest, faults: list[Fault]) -> CacheDamaged:
    """The error for a list of faults; it names the first five."""
    lines = [f"  {fault}" for fault in faults[:5]]
    if len(faults) > 5:
        lines.append(f"  and {len(faults) - 5} more")
    return CacheDamaged(
        "\n".join(["the cache is damaged", *lines]), fix=TeacherPass(manifest.teacher)
    )
