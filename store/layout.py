"""What lies where in a cache directory, and the exact bytes of a chunk and of the manifest.

FORMAT.md is the prose of this file. The zarr metadata are made by zarr itself; chunks are written
and read directly (C order, little endian, four bytes of crc32c behind), because a commit has to be
flushed to disk before it is journalled, which zarr offers no way to do.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from store.errors import CacheDamaged, CacheMismatch, CacheMissing
from store.identity import FORMAT_VERSION, Identity, canonical_json, identity_sha256

FORMAT_NAME = "teach-once-cache"
MANIFEST = "manifest.json"
ZARR_GROUP = "teacher.zarr"
JOURNAL = "journal"
LABELS = "labels"
LABELS_DTYPE = "int64"
CHECKSUM_BYTES = 4

MAX_CHUNK_BYTES = 16 * 2**20
MAX_BLOCK_ROWS = 4096  # so that a kill costs seconds of teacher time, not minutes

_FILL: dict[str, float | int] = {"float16": math.nan, "float32": math.nan, "uint8": 255}


@dataclass(frozen=True)
class TapSpec:
    """Shape of one record's values, and their dtype ("float16", "float32" or "uint8")."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes_per_record(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def fill_value(self) -> float | int:
        """What a row that was never written reads as: NaN, or 255 for small integers."""
        return _FILL[self.dtype]


@dataclass(frozen=True, order=True)
class Block:
    """Samples `start` to `stop` (exclusive) of one view."""

    view: int
    index: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Manifest:
    """manifest.json: what the cache is. `measured` is what the pass found out about the teacher."""

    teacher: str
    identity: Identity
    num_samples: int
    num_views: int
    block_rows: int
    taps: dict[str, TapSpec]
    labels_crc32c: str
    zarr_crc32c: dict[str, str]
    canary: dict[str, Any]
    versions: dict[str, str]
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def blocks_per_view(self) -> int:
        return -(-self.num_samples // self.block_rows)

    def block(self, view: int, index: int) -> Block:
        start = index * self.block_rows
        return Block(view, index, start, min(start + self.block_rows, self.num_samples))

    def blocks(self) -> Iterator[Block]:
        """All blocks, view by view."""
        for view in range(self.num_views):
            for index in range(self.blocks_per_view):
                yield self.block(view, index)


def default_block_rows(taps: Mapping[str, TapSpec], num_samples: int) -> int:
    """The power of two that keeps the widest chunk within 16 MiB and little of it unused."""
    widest = max(spec.bytes_per_record for spec in taps.values())
    fitting = max(1, MAX_CHUNK_BYTES // widest)
    rows = min(1 << (fitting.bit_length() - 1), MAX_BLOCK_ROWS)
    return min(rows, 1 << (num_samples - 1).bit_length())


def cache_path(caches_dir: Path, teacher: str, identity: Mapping[str, Any]) -> Path:
    return caches_dir / f"{teacher}-{identity_sha256(identity)[:8]}"


def chunk_path(cache: Path, tap: str, spec: TapSpec, block: Block) -> Path:
    """The file of one chunk: `teacher.zarr/<tap>/c.<view>.<block>` and `.0` per inner dimension."""
    inner = ".0" * len(spec.shape)
    return cache / ZARR_GROUP / tap / f"c.{block.view}.{block.index}{inner}"


def chunk_file_bytes(spec: TapSpec, block_rows: int) -> int:
    return spec.bytes_per_record * block_rows + CHECKSUM_BYTES


def crc32c(data: NDArray[Any]) -> int:
    """CRC-32C (Castagnoli) of an array's bytes in C order."""
    flat = data.reshape(-1).view(np.uint8)
    return int(google_crc32c.value(flat))


def crc_hex(value: int) -> str:
    return f"{value:08x}"


def encode_chunk(
    rows: NDArray[Any], spec: TapSpec, block_rows: int
) -> tuple[NDArray[np.uint8], int]:
    """A chunk file's bytes, short blocks padded with the fill value, and their crc32c."""
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    payload = np.full((block_rows, *spec.shape), spec.fill_value, dtype=dtype)
    payload[: len(rows)] = rows
    checksum = crc32c(payload)
    trailer = np.array([checksum], dtype="<u4")
    return np.concatenate([payload.reshape(-1).view(np.uint8), trailer.view(np.uint8)]), checksum


# ---- zarr metadata


def zarr_metadata(
    taps: Mapping[str, TapSpec], num_samples: int, num_views: int, block_rows: int
) -> dict[str, bytes]:
    """Path below the group -> the bytes of its zarr.json, as zarr itself writes them."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    memory = MemoryStore(files)
    zarr.create_group(memory, zarr_format=3)
    common: dict[str, Any] = {
        "store": memory,
        "serializer": BytesCodec(endian="little"),
        "compressors": [Crc32cCodec()],
        "filters": None,
        "chunk_key_encoding": {"name": "default", "separator": "."},
    }
    for name, spec in taps.items():
        zarr.create_array(
            name=name,
            shape=(num_views, num_samples, *spec.shape),
            chunks=(1, block_rows, *spec.shape),
            dtype=spec.dtype,
            fill_value=spec.fill_value,
            dimension_names=("view", "sample", *_inner_names(spec)),
            **common,
        )
    zarr.create_array(
        name=LABELS,
        shape=(num_samples,),
        chunks=(num_samples,),
        dtype=LABELS_DTYPE,
        fill_value=-1,
        dimension_names=("sample",),
        **common,
    )
    return {key: value.to_bytes() for key, value in files.items() if key.endswith("zarr.json")}


def _inner_names(spec: TapSpec) -> tuple[str, ...]:
    return {0: (), 1: ("channel",), 3: ("channel", "row", "column")}[len(spec.shape)]


# ---- manifest


def write_manifest(cache: Path, manifest: Manifest) -> None:
    content = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, **asdict(manifest)}
    content["identity_sha256"] = identity_sha256(manifest.identity)
    content["manifest_crc32c"] = _json_crc(content)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(cache / MANIFEST, text.encode())


def read_manifest(cache: Path) -> Manifest:
    """Raises CacheMissing, CacheDamaged or (another format version) CacheMismatch."""
    path = cache / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        stated = content.pop("manifest_crc32c")
        is_ours = content.pop("format") == FORMAT_NAME
    except FileNotFoundError:
        raise CacheMissing(f"{cache} is not a cache: it has no {MANIFEST}") from None
    except (ValueError, KeyError, AttributeError):
        raise _damaged_manifest(path) from None
    content["format"] = FORMAT_NAME
    if not is_ours or stated != _json_crc(content):
        raise _damaged_manifest(path)
    if content["format_version"] != FORMAT_VERSION:
        raise CacheMismatch(
            f"{cache} has format version {content['format_version']}; this program reads "
            f"{FORMAT_VERSION}"
        )
    for derived in ("format", "format_version", "identity_sha256"):
        del content[derived]
    taps = {name: TapSpec(tuple(t["shape"]), t["dtype"]) for name, t in content["taps"].items()}
    return Manifest(**{**content, "taps": taps})


def _damaged_manifest(path: Path) -> CacheDamaged:
    return CacheDamaged(
        f"{path} is damaged (its contents do not match its checksum)",
        mend=f"move {path.parent} away and run: make cache-teacher",
    )


def _json_crc(content: Mapping[str, Any]) -> str:
    return crc_hex(google_crc32c.value(canonical_json(content).encode()))


# ---- files


def write_atomically(path: Path, data: bytes | NDArray[np.uint8]) -> None:
    """Write aside, flush, rename: after a crash the old file is there, or the new one, whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(cast(Any, data))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make a rename or a new file in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
