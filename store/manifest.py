"""manifest.json: what a cache is. Its keys are described in FORMAT.md."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c

from runtime.inside import write_inside
from runtime.names import is_teacher_name
from runtime.reading import BadFile, is_out_of_resources, parse_json, read_bounded
from runtime.text import one_line
from store.documents import Problem, problem_of
from store.errors import CacheDamaged, CacheMismatch, CacheMissing, TeacherPass
from store.identity import CUT_VERSION, FORMAT_VERSION, Identity, canonical_json, identity_sha256
from store.layout import (
    CHECKSUM_BYTES,
    FORMAT_NAME,
    LABELS,
    LABELS_DTYPE,
    MANIFEST,
    PREVIEW,
    SAMPLE_CRC,
    ArraySpec,
    Block,
    TapSpec,
    arrays_of,
    crc_hex,
    tap_of,
)

MAX_MANIFEST_BYTES = 64 * 10**6
_DERIVED = {"format", "format_version", "identity_sha256"}


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

    @cached_property
    def stored(self) -> dict[str, TapSpec]:
        """What each block holds: the taps and, like another tap, the samples' checksums."""
        checksums = {SAMPLE_CRC: TapSpec((), "uint32")} if self.sample_crc32c else {}
        return {**self.taps, **checksums}

    @cached_property
    def arrays(self) -> dict[str, ArraySpec]:
        """All zarr arrays that are written in blocks."""
        return arrays_of(self.stored)

    @property
    def whole(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> shape and dtype of the arrays that are stored in one piece."""
        preview = tuple(self.preview_shape)
        return {LABELS: ((self.num_samples,), LABELS_DTYPE), PREVIEW: (preview, "uint8")}

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

    def scale_of(self, array: str) -> str | None:
        """ "row" or "block" if the array holds the scales of a tap's codes, else None."""
        return self.taps[tap_of(array)].scale if array.endswith(".scale") else None

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
    for tap in content["taps"].values():
        if tap["top"] is None:
            del tap["top"]  # of version 1, whose readers do not know it
        else:
            content["format_version"] = CUT_VERSION
    content["identity_sha256"] = identity_sha256(manifest.identity)
    content["manifest_crc32c"] = _json_crc(content)
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def write_manifest(cache: Path, manifest: Manifest) -> None:
    """Replace the manifest. Raises CacheError where no reader would accept it."""
    text = manifest_text(manifest)
    parse_manifest(text, cache / MANIFEST, fix="change that, then run again")
    write_inside(cache, MANIFEST, text)


def read_manifest(cache: Path) -> Manifest:
    """Raises CacheMissing, CacheDamaged or (another format version) CacheMismatch.

    A damaged one is read again before it is called so: a network may have cut it off.
    """
    try:
        return _read_once(cache)
    except CacheDamaged:
        return _read_once(cache)


def _read_once(cache: Path) -> Manifest:
    path = cache / MANIFEST
    try:
        content = read_bounded(path, MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise CacheMissing(f"{one_line(cache)} is not a cache: it has no {MANIFEST}") from None
    except BadFile as error:
        fix = f"remove it ({shlex.join(['rm', '-r', str(path)])}), then make the cache again"
        raise CacheDamaged(error.problem, fix=fix) from None
    except OSError as error:
        if is_out_of_resources(error):
            raise
        raise CacheDamaged(f"{one_line(path)} cannot be read: {error.strerror}") from None
    return parse_manifest(content, path)


def refuse_other_name(cache: Path, manifest: Manifest) -> None:
    """Raise CacheMismatch where the folder is named for another identity of the same teacher.

    A folder whose name has another form is a user's own, and may be called anything.
    """
    digits = identity_sha256(manifest.identity)[:8]
    named = re.fullmatch(rf"{re.escape(manifest.teacher)}-([0-9a-f]{{8}})", cache.absolute().name)
    if named is not None and named[1] != digits:
        right = cache.with_name(f"{manifest.teacher}-{digits}")
        raise CacheMismatch(
            f"{one_line(cache)} holds the identity {digits}..., not the one that it is named for",
            fix=shlex.join(["mv", str(cache), str(right)]),
        )


def parse_manifest(text: bytes, path: Path, fix: str | TeacherPass | None = None) -> Manifest:
    """The manifest that `manifest_text` wrote. path: for the message of an error.

    fix: of damage; default: another pass. Raises as `read_manifest`.
    """
    fix = fix or TeacherPass(teacher_of(path.parent))
    content = _checked_content(text, path, fix)
    version = content.get("format_version")
    if version not in (FORMAT_VERSION, CUT_VERSION) and isinstance(version, int):
        raise CacheMismatch(
            f"{one_line(path)} has format version {version}; this program reads {FORMAT_VERSION} "
            f"and {CUT_VERSION}"
        )
    document = problem_of(content)
    if isinstance(document, Problem):
        kind = CacheMismatch if document.is_of_another_version else CacheDamaged
        raise kind(f"{one_line(path)}: {document}", fix=fix)
    kept = {key: content[key] for key in content.keys() - _DERIVED}
    return Manifest(**{**kept, "taps": document.tap_specs})


def _checked_content(text: bytes, path: Path, fix: str | TeacherPass) -> dict[str, Any]:
    """The object in these bytes, without its checksum, which is right."""
    problem = "its contents do not match its checksum"
    try:
        content = parse_json(text, path)
        if isinstance(content, dict):
            stated = content.pop("manifest_crc32c", None)
            if stated == _json_crc(content):
                return content
    except BadFile as error:
        problem = error.what
    raise CacheDamaged(
        f"{one_line(path)} is damaged ({problem}); another pass writes a new one and reuses every "
        f"sound block",
        fix=fix,
    )


def teacher_of(cache: Path) -> str:
    """The teacher's name, from the name of a cache's folder."""
    name = os.path.basename(os.path.realpath(cache)).rpartition("-")[0]
    return name if is_teacher_name(name) else "NAME"


def _json_crc(content: Mapping[str, Any]) -> str:
    return crc_hex(google_crc32c.value(canonical_json(content).encode()))
