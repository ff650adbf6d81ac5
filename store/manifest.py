"""manifest.json: what a cache is. Its keys are described in FORMAT.md."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c

from runtime.files import write_atomically
from store.errors import CacheDamaged, CacheMismatch, CacheMissing, TeacherPass
from store.identity import FORMAT_VERSION, Identity, canonical_json, identity_sha256
from store.layout import (
    CHECKSUM_BYTES,
    FORMAT_NAME,
    MANIFEST,
    SAMPLE_CRC,
    ArraySpec,
    Block,
    TapSpec,
    arrays_of,
    crc_hex,
)


@dataclass(frozen=True)
class Manifest:
    """What a cache is. measured: of the teacher, by the pass that completed the cache."""

    teacher: str
    identity: Identity
    num_samples: int
    num_views: int
    block_rows: int
    taps: dict[str, TapSpec]
    class_names: list[str]
    preview_shape: list[int]
    whole_crc32c: dict[str, str]
    zarr_crc32c: dict[str, str]
    canary: dict[str, Any]
    versions: dict[str, str]
    measured: dict[str, Any] = field(default_factory=dict)
    sample_crc32c: bool = False  # whether each sample's is stored; older caches lack it

    @property
    def stored(self) -> dict[str, TapSpec]:
        """What each block holds: the taps and, like another tap, the samples' checksums."""
        checksums = {SAMPLE_CRC: TapSpec((), "uint32")} if self.sample_crc32c else {}
        return {**self.taps, **checksums}

    @property
    def arrays(self) -> dict[str, ArraySpec]:
        """All zarr arrays that are written in blocks."""
        return arrays_of(self.stored)

    @property
    def measured_views(self) -> int:
        """How many views the teacher's agreement was measured on: all, unless stated otherwise.

        0 if nothing was measured.
        """
        return int(self.measured.get("views", self.num_views)) if self.measured else 0

    @property
    def measured_with_views(self) -> dict[str, Any]:
        """What was measured, stating on how many views, for a manifest with another number."""
        return {**self.measured, "views": self.measured_views} if self.measured else {}

    @property
    def blocks_per_view(self) -> int:
        return -(-self.num_samples // self.block_rows)

    @property
    def record_bytes(self) -> int:
        return sum(spec.bytes_per_record for spec in self.taps.values())

    def rows_in(self, spec: ArraySpec, block: Block) -> int:
        """How many rows of an array one block fills."""
        return 1 if spec.per_block else block.rows

    def chunk_rows(self, spec: ArraySpec) -> int:
        return 1 if spec.per_block else self.block_rows

    def chunk_file_bytes(self, spec: ArraySpec) -> int:
        return spec.bytes_per_row * self.chunk_rows(spec) + CHECKSUM_BYTES

    def block(self, view: int, index: int) -> Block:
        start = index * self.block_rows
        return Block(view, index, start, min(start + self.block_rows, self.num_samples))

    def blocks(self, num_views: int | None = None) -> Iterator[Block]:
        """The blocks of the first views (default: of all), view by view."""
        for view in range(self.num_views if num_views is None else num_views):
            for index in range(self.blocks_per_view):
                yield self.block(view, index)


def manifest_text(manifest: Manifest) -> bytes:
    """The bytes of manifest.json."""
    content = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, **asdict(manifest)}
    content["identity_sha256"] = identity_sha256(manifest.identity)
    content["manifest_crc32c"] = _json_crc(content)
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def write_manifest(cache: Path, manifest: Manifest) -> None:
    write_atomically(cache / MANIFEST, manifest_text(manifest))


def read_manifest(cache: Path) -> Manifest:
    """Raises CacheMissing, CacheDamaged or (another format version) CacheMismatch."""
    path = cache / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), path)
    except (FileNotFoundError, NotADirectoryError):
        raise CacheMissing(f"{cache} is not a cache: it has no {MANIFEST}") from None


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """The manifest that `manifest_text` wrote; `path` is for the message of an error."""
    try:
        content = json.loads(text)
        stated = content.pop("manifest_crc32c")
        whole = content["format"] == FORMAT_NAME and stated == _json_crc(content)
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise CacheDamaged(
            f"{path} is damaged (its contents do not match its checksum); another pass writes a "
            f"new one and reuses every sound block",
            fix=TeacherPass(teacher_of(path.parent)),
        )
    if content["format_version"] != FORMAT_VERSION:
        raise CacheMismatch(
            f"{path} has format version {content['format_version']}; this program reads "
            f"{FORMAT_VERSION}"
        )
    for derived in ("format", "format_version", "identity_sha256"):
        del content[derived]
    taps = {
        name: TapSpec(**{**tap, "shape": tuple(tap["shape"])})
        for name, tap in content["taps"].items()
    }
    try:
        return Manifest(**{**content, "taps": taps})
    except TypeError as error:
        raise CacheMismatch(
            f"{path} was written by another version of this program: {error}",
            fix=TeacherPass(
                teacher_of(path.parent), before=f"rm -r {shlex.quote(str(path.parent))} && "
            ),
        ) from None


def teacher_of(cache: Path) -> str:
    """The teacher's name, from the name of a cache's folder."""
    return cache.resolve().name.rpartition("-")[0] or "NAME"


def _json_crc(content: Mapping[str, Any]) -> str:
    return crc_hex(google_crc32c.value(canonical_json(content).encode()))
