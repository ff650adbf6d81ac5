"""Reads chunk files straight into arrays and checks every byte; also says which are unsound.

Plain zarr slicing gives the same values; this path skips its per-chunk copies, and compares the
checksum with the journal's besides the one behind the chunk, so that a chunk that was exchanged for
another, itself whole, is found too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from store.errors import CacheDamaged
from store.journal import Journal
from store.layout import (
    CHECKSUM_BYTES,
    ZARR_GROUP,
    Block,
    Manifest,
    chunk_file_bytes,
    chunk_path,
    crc32c,
    crc_hex,
)


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


def read_chunk(
    cache: Path, manifest: Manifest, journal: Journal, tap: str, block: Block, out: NDArray[Any]
) -> None:
    """Fill `out` (rows of the block, *tap shape), C-contiguous; raises CacheDamaged."""
    spec = manifest.taps[tap]
    path = chunk_path(cache, tap, spec, block)
    fault = _read_checked(path, out, manifest, tap, journal.committed[tap, block.view, block.index])
    if fault:
        raise damaged(manifest, [Fault(fault, path, tap, block.view, block.index)])


def _read_checked(
    path: Path, out: NDArray[Any], manifest: Manifest, tap: str, committed: str
) -> str | None:
    """Read one chunk file; None if every byte is right, else what is wrong with it."""
    spec = manifest.taps[tap]
    size = chunk_file_bytes(spec, manifest.block_rows)
    payload = out.reshape(-1).view(np.uint8)
    padding = np.empty(size - CHECKSUM_BYTES - payload.size, dtype=np.uint8)
    trailer = np.empty(CHECKSUM_BYTES, dtype=np.uint8)
    try:
        with path.open("rb", buffering=0) as file:
            got = sum(_read_into(file, part) for part in (payload, padding, trailer))
            rest = file.read(1)
    except FileNotFoundError:
        return "chunk missing"
    except OSError as error:
        return f"chunk unreadable ({error.strerror})"
    if got != size or rest:
        return f"chunk has not its {size:,} bytes"
    checksum = crc32c(payload)
    if padding.size:
        checksum = _extended(checksum, padding)
    if checksum != int(trailer.view("<u4")[0]):
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


def _extended(checksum: int, data: NDArray[np.uint8]) -> int:
    import google_crc32c

    return int(google_crc32c.extend(checksum, data))


def chunk_faults(
    cache: Path, manifest: Manifest, journal: Journal, taps: Iterable[str], *, read: bool
) -> list[Fault]:
    """What is wrong with the committed chunks: by size alone, or (read=True) by every byte."""
    wanted = set(taps)
    faults = []
    for (tap, view, index), committed in journal.committed.items():
        if tap not in wanted or view >= manifest.num_views:
            continue
        block = manifest.block(view, index)
        spec = manifest.taps[tap]
        path = chunk_path(cache, tap, spec, block)
        if read:
            rows = np.empty((block.rows, *spec.shape), dtype=spec.dtype)
            what = _read_checked(path, rows, manifest, tap, committed)
        else:
            what = _wrong_size(path, chunk_file_bytes(spec, manifest.block_rows))
        if what:
            faults.append(Fault(what, path, tap, view, index))
    return faults


def _wrong_size(path: Path, expected_bytes: int) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "chunk missing"
    return None if size == expected_bytes else f"chunk has {size:,} bytes, not {expected_bytes:,}"


def metadata_faults(cache: Path, manifest: Manifest) -> list[Fault]:
    """What is wrong with the zarr.json files."""
    faults = []
    for name, expected in manifest.zarr_crc32c.items():
        path = cache / ZARR_GROUP / name
        try:
            found = crc_hex(crc32c(np.frombuffer(path.read_bytes(), dtype=np.uint8)))
        except FileNotFoundError:
            faults.append(Fault("zarr metadata missing", path))
            continue
        if found != expected:
            faults.append(Fault("zarr metadata damaged", path))
    return faults


def damaged(manifest: Manifest, faults: list[Fault]) -> CacheDamaged:
    """The error for a list of faults; it names the first five."""
    lines = [f"  {fault}" for fault in faults[:5]]
    if len(faults) > 5:
        lines.append(f"  and {len(faults) - 5} more")
    return CacheDamaged("\n".join(["the cache is damaged", *lines]), mend=mend_command(manifest))


def mend_command(manifest: Manifest) -> str:
    return f"make cache-teacher TEACHER={manifest.teacher}"
