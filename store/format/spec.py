"""The files of a cache folder, and the exact bytes of a chunk.

FORMAT.md contains the same in prose. zarr itself writes the zarr metadata. Chunks are written and
read directly (C order, little endian, followed by four bytes of crc32c), because a chunk must be
flushed to disk before its journal line is written, which zarr cannot do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from teach_once.store.identity import identity_sha256

CLASS, REST = ".class", ".rest"  # suffixes of the arrays next to the values


def cut_rows(values: NDArray[np.float32], k: int) -> dict[str, NDArray[np.generic]]:
    """Truncate values (R, K) float32 to the k < K largest of each row.

    Returns {"": values (R, k) float16, ".class": their classes (R, k) uint16, ".rest": log-sum-exp
    of the other values (R,) float16}. Equal values are kept in the order of their classes.
    """
    order = np.argsort(-values, axis=1, kind="stable")
    classes, others = order[:, :k], np.take_along_axis(values, order[:, k:], axis=1)
    largest = others.max(axis=1).astype(np.float64)
    sums = np.exp(others.astype(np.float64) - largest[:, None]).sum(axis=1)
    return {
        "": np.take_along_axis(values, classes, axis=1).astype(np.float16),
        CLASS: classes.astype(np.uint16),
        REST: (largest + np.log(sums)).astype(np.float16),
    }


def expanded_rows(
    values: NDArray[np.float16],
    classes: NDArray[np.uint16],
    rest: NDArray[np.float16],
    num_classes: int,
) -> NDArray[np.float32]:
    """Invert `cut_rows`, with equal values for the rest: (R, num_classes) float32."""
    share = rest.astype(np.float32) - np.float32(math.log(num_classes - values.shape[1]))
    rows = np.repeat(share[:, None], num_classes, axis=1)
    np.put_along_axis(rows, classes.astype(np.int64), values.astype(np.float32), axis=1)
    return rows


def compact_names(tap: str) -> tuple[str, str, str]:
    """Return the arrays of a truncated tap: values, classes, rest."""
    return tap, tap + CLASS, tap + REST


def expanded(
    arrays: Mapping[str, NDArray[np.generic]], tap: str, num_classes: int
) -> NDArray[np.float32]:
    """Apply `expanded_rows` to arrays by name."""
    values, classes, rest = (arrays[name] for name in compact_names(tap))
    return expanded_rows(values, classes, rest, num_classes)  # type: ignore[arg-type]


FORMAT_NAME = "teach-once-cache"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ZARR_GROUP = "teacher.zarr"
JOURNAL = "journal"
LABELS = "labels"
LABELS_DTYPE = "int64"
PREVIEW = "preview"
SAMPLE_DIGEST = "sample_digest"
DIGEST_BYTES = 16  # BLAKE2b-128
CHECKSUM_BYTES = 4
SUFFIXES = (".scale", CLASS, REST)  # of a tap's additional arrays

MAX_CHUNK_BYTES = 16 * 2**20
MAX_BLOCK_ROWS = 4096  # a killed pass loses seconds of teacher time, not minutes

_FILL: dict[str, float | int] = {
    "float16": math.nan,
    "float32": math.nan,
    "uint8": 255,
    "uint16": 65535,
    "uint32": 0,
}


@dataclass(frozen=True)
class ArraySpec:
    """One zarr array of the group: the shape and dtype of a row, and the meaning of a row.

    A row belongs to a sample of one view, or (per_block) to a block, or (all_views) to a sample in
    every view. An array of the last kind has no dimension of views.
    """

    shape: tuple[int, ...]
    dtype: str
    per_block: bool = False
    all_views: bool = False

    @property
    def bytes_per_row(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def fill_value(self) -> float | int:
        """The value of rows that were never written: NaN, or 255 for small integers."""
        return _FILL[self.dtype]


@dataclass(frozen=True)
class TapSpec:
    """Shape of one record's values, and the dtype in which they are stored.

    dtype: "float16", "float32" or "uint8". stage: for a hint, the stage of its map. scale: of uint8
    codes, "row" (lowest value and step of each record) or "block" (lowest value and step of each
    channel in a block); None for values. top: number of the largest logits that are stored, see
    `cut_rows`; None for all. Taps with `scale` or `top` are read as float32.
    """

    shape: tuple[int, ...]
    dtype: str
    scale: str | None = None
    stage: str | None = None
    top: int | None = None

    @property
    def bytes_per_record(self) -> int:
        """Bytes on disk, without the per-block scales, which are small."""
        rows = [spec for spec in self.arrays("").values() if not spec.per_block]
        return sum(spec.bytes_per_row for spec in rows)

    @property
    def read_dtype(self) -> str:
        return "float32" if self.scale or self.top else self.dtype

    @property
    def read_bytes_per_record(self) -> int:
        """Bytes in memory, where a truncated tap is kept as it is stored."""
        if self.top:
            return self.bytes_per_record
        return math.prod(self.shape) * np.dtype(self.read_dtype).itemsize

    def arrays(self, name: str) -> dict[str, ArraySpec]:
        """Return {name: zarr array} of the arrays of the tap called `name`."""
        if self.top:
            return {
                name: ArraySpec((self.top,), self.dtype),
                name + CLASS: ArraySpec((self.top,), "uint16"),
                name + REST: ArraySpec((), self.dtype),
            }
        values = {name: ArraySpec(self.shape, self.dtype, all_views=name == SAMPLE_DIGEST)}
        if self.scale == "row":
            return {**values, f"{name}.scale": ArraySpec((2,), "float32")}
        if self.scale == "block":
            return {**values, f"{name}.scale": ArraySpec((2, *self.shape), "float32", True)}
        return values


DIGEST_SPEC = TapSpec((DIGEST_BYTES,), "uint8")  # `sample_digest`, one row for all views


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


def arrays_of(taps: Mapping[str, TapSpec]) -> dict[str, ArraySpec]:
    return {
        name: spec
        for tap, taps_spec in taps.items()
        for name, spec in taps_spec.arrays(tap).items()
    }


def tap_of(array: str) -> str:
    """Return the tap that an array belongs to."""
    return next((array.removesuffix(end) for end in SUFFIXES if array.endswith(end)), array)


def is_opt_in(tap: str) -> bool:
    """Return True if a cache may lack this tap."""
    return kind_of(tap) in ("attention", "hint", "embedding")


def optional_taps(taps: Iterable[str]) -> set[str]:
    """Return the opt-in taps; none if the cache has only opt-in taps, which it then requires."""
    taps = set(taps)
    opt_in = set(filter(is_opt_in, taps))
    return opt_in if opt_in < taps else set()


def kind_of(tap: str) -> str:
    """Return a tap's name without the number of its stage: "attention3" -> "attention"."""
    return tap.rstrip("0123456789")


def default_block_rows(taps: Mapping[str, TapSpec], num_samples: int) -> int:
    """Return the largest power of two of rows with chunks of at most 16 MiB.

    It is at most 4096, and at most the smallest power of two that covers all samples.
    """
    widest = max(spec.bytes_per_record for spec in taps.values())
    fitting = max(1, MAX_CHUNK_BYTES // widest)
    rows = min(1 << (fitting.bit_length() - 1), MAX_BLOCK_ROWS)
    return min(rows, 1 << (num_samples - 1).bit_length())


def cache_path(caches_dir: Path, teacher: str, identity: Mapping[str, Any]) -> Path:
    return caches_dir / f"{teacher}-{identity_sha256(identity)[:8]}"


def chunk_name(array: str, spec: ArraySpec, block: Block) -> str:
    """Return the key of a chunk in a cache: `teacher.zarr/<array>/c.<view>.<block>`.

    Another `.0` follows for each inner dimension. An array that is the same in all views has
    `c.<block>`.
    """
    inner = ".0" * len(spec.shape)
    view = "" if spec.all_views else f".{block.view}"
    return f"{ZARR_GROUP}/{array}/c{view}.{block.index}{inner}"


def chunk_path(cache: Path, array: str, spec: ArraySpec, block: Block) -> Path:
    """Return the path of a chunk."""
    return cache / chunk_name(array, spec, block)


def crc32c(data: NDArray[Any]) -> int:
    """Compute the CRC-32C (Castagnoli) of an array's bytes in C order."""
    flat = data.reshape(-1).view(np.uint8)
    return int(google_crc32c.value(flat))


def bytes_crc32c(data: bytes) -> int:
    """Compute the CRC-32C (Castagnoli) of bytes."""
    return int(google_crc32c.value(data))


def crc_hex(value: int) -> str:
    return f"{value:08x}"


def encode_chunk(
    rows: NDArray[Any], spec: ArraySpec, chunk_rows: int
) -> tuple[NDArray[np.uint8], int]:
    """Encode rows as a chunk file's bytes, padded with the fill value; returns them and their
    crc32c.
    """
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    payload = np.full((chunk_rows, *spec.shape), spec.fill_value, dtype=dtype)
    payload[: len(rows)] = rows
    checksum = crc32c(payload)
    return with_checksum(payload), checksum


def with_checksum(payload: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the bytes of an array, followed by the four bytes of their crc32c."""
    trailer = np.array([crc32c(payload)], dtype="<u4")
    return np.concatenate([payload.reshape(-1).view(np.uint8), trailer.view(np.uint8)])


def whole_names(class_names: Sequence[str] | None) -> set[str]:
    """Return the names of the arrays in one piece; without classes there are no labels."""
    return {PREVIEW} if class_names is None else {LABELS, PREVIEW}


def metadata_names(arrays: Iterable[str]) -> set[str]:
    """Return the zarr.json files of a cache with these arrays, below the group."""
    return {"zarr.json", *(f"{name}/zarr.json" for name in arrays)}


def next_path(file: Path) -> Path:
    """Return the path of a new zarr.json before the manifest contains its checksum."""
    return file.with_name(f"{file.name}.next")


def whole_name(name: str, num_dims: int) -> str:
    """Return the key of the only chunk of an array that is stored in one piece."""
    return f"{ZARR_GROUP}/{name}/c" + ".0" * num_dims
