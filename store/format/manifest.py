"""manifest.json: the description of a cache. FORMAT.md describes its keys."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from teach_once.runtime.safe.confined import write_inside
from teach_once.runtime.safe.names import TEACHER_NAMES, is_teacher_name
from teach_once.runtime.safe.safe_read import (
    BadFile,
    is_out_of_resources,
    parse_json,
    read_bounded,
)
from teach_once.runtime.safe.text import one_line
from teach_once.store.errors import CacheDamaged, CacheMismatch, CacheMissing, PassCommand
from teach_once.store.format.certificate import RANGES, RECORDS, STEPS
from teach_once.store.format.spec import (
    CHECKSUM_BYTES,
    DIGEST_SPEC,
    FORMAT_NAME,
    FORMAT_VERSION,
    LABELS,
    LABELS_DTYPE,
    MANIFEST,
    MAX_BLOCK_ROWS,
    PREVIEW,
    SAMPLE_DIGEST,
    ArraySpec,
    Block,
    TapSpec,
    arrays_of,
    bytes_crc32c,
    crc_hex,
    metadata_names,
    tap_of,
    whole_names,
)
from teach_once.store.identity import (
    NAME_PATTERN,
    TAP_NAMES,
    Identity,
    canonical_json,
    identity_sha256,
    is_tap_name,
)

MAX_SAMPLES = 10**8
MAX_VIEWS = 10**6
MAX_CHUNKS = 2**28  # over all arrays and views
MAX_CHUNK_BYTES = 2**30
MAX_CLASSES = 2**20
MAX_CUT_CLASSES = 2**16  # class ids are uint16
_MAX_PREVIEW_BYTES = 2**28
_MAX_IDENTITY_CHARS = 2**16
_MISSING, _UNKNOWN = "a value", "no such key"

Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Extent = Annotated[int, Field(ge=1, le=2**31 - 1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Problem(NamedTuple):
    """A field with a wrong value. expected: description of the valid values."""

    field: str
    expected: str
    found: object

    @property
    def is_of_another_version(self) -> bool:
        """True if a program of another version wrote the document, with other keys."""
        return self.expected in (_MISSING, _UNKNOWN) or self.field == "format_version"

    def __str__(self) -> str:
        return f"{one_line(self.field)}: expected {self.expected}, found {in_short(self.found)}"


class _Document(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TapDocument(_Document):
    """The storage format of a tap."""

    shape: Annotated[list[Extent], Field(max_length=6)]
    dtype: Literal["float16", "float32", "uint8"]
    scale: Literal["row", "block"] | None
    stage: Annotated[str, Field(pattern=rf"^{NAME_PATTERN}$")] | None
    top: Annotated[int, Field(ge=1, le=MAX_CLASSES)] | None


class CanaryDocument(_Document):
    """The views that were hashed, and their hash."""

    samples: Annotated[list[Count], Field(max_length=1000)]
    views: Annotated[list[Count], Field(max_length=1000)]
    sha256: Annotated[str, Field(max_length=64)]


def _teacher(name: str) -> str:
    if not is_teacher_name(name):
        raise ValueError(TEACHER_NAMES)
    return name


def _tap(name: str) -> str:
    if not is_tap_name(name):
        raise ValueError(TAP_NAMES)
    return name


Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+~!-]{1,64}$")]


class ManifestDocument(_Document):
    """The keys of manifest.json except its own checksum."""

    format: Literal["teach-once-cache"]
    format_version: Literal[1]
    teacher: Annotated[str, AfterValidator(_teacher)]
    identity: dict[str, Any]
    identity_sha256: Sha256
    num_samples: Annotated[int, Field(ge=1, le=MAX_SAMPLES)]
    num_views: Annotated[int, Field(ge=1, le=MAX_VIEWS)]
    block_rows: Annotated[int, Field(ge=1, le=2**30)]
    taps: Annotated[
        dict[Annotated[str, AfterValidator(_tap)], TapDocument], Field(min_length=1, max_length=256)
    ]
    class_names: (
        Annotated[
            list[Annotated[str, Field(max_length=1000)]],
            Field(min_length=1, max_length=MAX_CLASSES),
        ]
        | None
    )
    preview_shape: Annotated[list[Extent], Field(min_length=4, max_length=4)]
    whole_crc32c: Annotated[dict[str, Checksum], Field(max_length=2)]
    zarr_crc32c: Annotated[dict[str, Checksum], Field(max_length=1000)]
    canary: CanaryDocument
    versions: Annotated[dict[Word, Word], Field(max_length=100)]
    measured: Annotated[dict[Word, int | Number], Field(max_length=100)]

    @property
    def tap_specs(self) -> dict[str, TapSpec]:
        return {
            name: TapSpec(tuple(tap.shape), tap.dtype, tap.scale, tap.stage, tap.top)
            for name, tap in self.taps.items()
        }


def check_document(content: object) -> Problem | ManifestDocument:
    """Validate a parsed manifest; return the document or its first problem."""
    if isinstance(content, dict) and _has_other_version(content.get("format_version")):
        return Problem("format_version", str(FORMAT_VERSION), content["format_version"])
    try:
        document = ManifestDocument.model_validate(content)
    except ValidationError as error:
        return first_problem(error)
    return next(_inconsistencies(document), document)


def _has_other_version(version: object) -> bool:
    return (
        isinstance(version, int) and version != FORMAT_VERSION
    )  # checked first because the other keys differ


def first_problem(error: ValidationError) -> Problem:
    """Return the first field that does not fit, in the words of this project."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "the document"
    if first["type"] == "missing":
        return Problem(field, _MISSING, None)
    if first["type"] == "extra_forbidden":
        return Problem(field, _UNKNOWN, first["input"])
    expected = first["msg"]
    for start in ("Input should be ", "Value error, ", "should have "):
        expected = expected.removeprefix(start)
    return Problem(field, expected, first["input"])


def in_short(value: object) -> str:
    """Format a value for a message; of a list or an object only its size."""
    if isinstance(value, dict):
        return f"an object of {len(value):,} keys"
    if isinstance(value, list | tuple) and len(value) > 8:
        return f"a list of {len(value):,}"
    return "nothing" if value is None else one_line(repr(value), 100)


def _inconsistencies(document: ManifestDocument) -> Iterator[Problem]:
    yield from _wrong_identity(document)
    yield from _wrong_blocks(document)
    for name, spec in document.tap_specs.items():
        yield from _wrong_tap(name, spec, document.class_names)
    yield from _wrong_sizes(document)
    yield from _wrong_measured(document)
    whole = whole_names(document.class_names)
    if document.whole_crc32c.keys() != whole:
        yield Problem("whole_crc32c", f"the keys {sorted(whole)}", sorted(document.whole_crc32c))
    names = metadata_names((*_arrays(document), *whole))
    if odd := names ^ document.zarr_crc32c.keys():
        name = min(odd)
        found = "one" if name in document.zarr_crc32c else "nothing"
        expected = "a checksum" if name in names else "no checksum"
        yield Problem(f"zarr_crc32c.{name}", expected, found)


def _wrong_identity(document: ManifestDocument) -> Iterator[Problem]:
    if len(canonical_json(document.identity)) > _MAX_IDENTITY_CHARS:
        yield Problem("identity", f"at most {_MAX_IDENTITY_CHARS:,} characters", "more")
    sha256 = identity_sha256(document.identity)
    if sha256 != document.identity_sha256:
        yield Problem("identity_sha256", f"{sha256} (of the identity)", document.identity_sha256)


def _wrong_blocks(document: ManifestDocument) -> Iterator[Problem]:
    most = max(MAX_BLOCK_ROWS, 1 << (document.num_samples - 1).bit_length())
    if document.block_rows.bit_count() != 1 or document.block_rows > most:
        expected = f"a power of two of at most {most:,}, for {document.num_samples:,} samples"
        yield Problem("block_rows", expected, document.block_rows)


def _wrong_tap(name: str, spec: TapSpec, class_names: list[str] | None) -> Iterator[Problem]:
    num_classes = math.prod(spec.shape) if class_names is None else len(class_names)
    if name == "correct":
        if class_names is None:
            yield Problem("taps.correct", "no such tap, without class_names", list(spec.shape))
        if spec != TapSpec((), "uint8"):
            yield Problem("taps.correct", "uint8 of shape []", [list(spec.shape), spec.dtype])
    elif (spec.dtype == "uint8") != (spec.scale is not None):
        yield Problem(f"taps.{name}.scale", f"a scale that fits {spec.dtype}", spec.scale)
    elif spec.scale is not None and len(spec.shape) != 1:
        yield Problem(f"taps.{name}.shape", "one dimension, because of the scale", spec.shape)
    if spec.top is not None and (name, spec.dtype) != ("logits", "float16"):
        yield Problem(f"taps.{name}.top", "null except for float16 logits", spec.top)
    elif spec.top is not None and not (spec.top < num_classes <= MAX_CUT_CLASSES):
        expected = f"less than the number of classes, which is at most {MAX_CUT_CLASSES:,}"
        yield Problem("taps.logits.top_k", expected, f"{spec.top} of {num_classes:,}")
    if name == "logits" and spec.shape != (num_classes,):
        expected = "one dimension, the number of class_names if there are any"
        yield Problem("taps.logits.shape", expected, list(spec.shape))


def _arrays(document: ManifestDocument) -> dict[str, Any]:
    return arrays_of({**document.tap_specs, SAMPLE_DIGEST: DIGEST_SPEC})


def _wrong_sizes(document: ManifestDocument) -> Iterator[Problem]:
    arrays = _arrays(document)
    for name, spec in arrays.items():
        rows = 1 if spec.per_block else document.block_rows
        if spec.bytes_per_row * rows > MAX_CHUNK_BYTES:
            expected = f"chunks of at most {MAX_CHUNK_BYTES:,} bytes"
            yield Problem(f"taps.{name}", expected, spec.bytes_per_row * rows)
    blocks = -(-document.num_samples // document.block_rows)
    if (chunks := blocks * document.num_views * len(arrays)) > MAX_CHUNKS:
        yield Problem("num_views", f"at most {MAX_CHUNKS:,} chunks in all", chunks)
    num, height, width, channels = document.preview_shape
    if num > 1000 or num * height * width * channels > _MAX_PREVIEW_BYTES:
        yield Problem("preview_shape", "a few pictures", document.preview_shape)


def _wrong_measured(document: ManifestDocument) -> Iterator[Problem]:
    counts = ("views", RECORDS, STEPS)
    ranges = {
        "views": (1, document.num_views),
        "test_top1_error": (0, 100),
        "test_top5_error": (0, 100),
        "train_agreement": (0, 1),
        "images_per_second": (0, float("inf")),
        **RANGES,
    }
    for key, (lowest, highest) in ranges.items():
        value = document.measured.get(key, lowest)
        if not lowest <= value <= highest or (key in counts and not isinstance(value, int)):
            yield Problem(f"measured.{key}", f"a number from {lowest} to {highest}", value)


MAX_MANIFEST_BYTES = 64 * 10**6
_DERIVED = {"format", "format_version", "identity_sha256"}


@dataclass(frozen=True)
class Manifest:
    """The description of a cache. measured: metrics from the pass that completed the cache."""

    teacher: str
    identity: Identity
    num_samples: int
    num_views: int
    block_rows: int
    taps: dict[str, TapSpec]
    class_names: list[str] | None  # None: the samples have neither classes nor labels
    preview_shape: list[int]
    whole_crc32c: dict[str, str]
    zarr_crc32c: dict[str, str]
    canary: dict[str, Any]
    versions: dict[str, str]
    measured: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def stored(self) -> dict[str, TapSpec]:
        """The contents of each block: the taps and, like another tap, the samples' digests."""
        return {**self.taps, SAMPLE_DIGEST: DIGEST_SPEC}

    @cached_property
    def arrays(self) -> dict[str, ArraySpec]:
        """All zarr arrays that are written in blocks."""
        return arrays_of(self.stored)

    @property
    def whole(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> shape and dtype of the arrays that are stored in one piece."""
        shapes = {
            LABELS: ((self.num_samples,), LABELS_DTYPE),
            PREVIEW: (tuple(self.preview_shape), "uint8"),
        }
        return {name: shapes[name] for name in shapes if name in whole_names(self.class_names)}

    @property
    def array_names(self) -> tuple[str, ...]:
        """The names of all arrays, in blocks and in one piece."""
        return (*self.arrays, *self.whole)

    @property
    def num_classes(self) -> int:
        """The number of classes of the logits; 0 without classes and logits."""
        if self.class_names is not None:
            return len(self.class_names)
        return self.taps["logits"].shape[0] if "logits" in self.taps else 0

    @property
    def measured_views(self) -> int:
        """The number of views in the teacher's agreement: all unless stated otherwise.

        0 if nothing was measured.
        """
        return int(self.measured.get("views", self.num_views)) if self.measured else 0

    @property
    def measured_with_views(self) -> dict[str, Any]:
        """The metrics with their number of views, for a manifest with another number of views."""
        return {**self.measured, "views": self.measured_views} if self.measured else {}

    @property
    def blocks_per_view(self) -> int:
        return -(-self.num_samples // self.block_rows)

    @property
    def record_bytes(self) -> int:
        return sum(spec.bytes_per_record for spec in self.taps.values())

    def scale_of(self, array: str) -> str | None:
        """Return "row" or "block" if the array contains the scales of a tap's codes, else None."""
        return self.taps[tap_of(array)].scale if array.endswith(".scale") else None

    def rows_in(self, spec: ArraySpec, block: Block) -> int:
        """Return the number of rows of an array in one block."""
        return 1 if spec.per_block else block.rows

    def chunk_rows(self, spec: ArraySpec) -> int:
        return 1 if spec.per_block else self.block_rows

    def chunk_file_bytes(self, spec: ArraySpec) -> int:
        return spec.bytes_per_row * self.chunk_rows(spec) + CHECKSUM_BYTES

    def block(self, view: int, index: int) -> Block:
        start = index * self.block_rows
        return Block(view, index, start, min(start + self.block_rows, self.num_samples))

    def blocks(self, num_views: int | None = None) -> Iterator[Block]:
        """Yield the blocks of the first views (default: all), view by view."""
        for view in range(self.num_views if num_views is None else num_views):
            for index in range(self.blocks_per_view):
                yield self.block(view, index)


def manifest_text(manifest: Manifest) -> bytes:
    """Return the bytes of manifest.json."""
    content = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, **asdict(manifest)}
    content["identity_sha256"] = identity_sha256(manifest.identity)
    content["manifest_crc32c"] = _json_crc(content)
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def write_manifest(cache: Path, manifest: Manifest) -> None:
    """Replace the manifest. Raises CacheError if readers would not accept it."""
    text = manifest_text(manifest)
    parse_manifest(text, cache / MANIFEST, fix="correct it, then run again")
    write_inside(cache, MANIFEST, text)


def read_manifest(cache: Path) -> Manifest:
    """Read a folder's manifest.

    Raises CacheMissing if there is none, CacheDamaged if it is damaged, CacheMismatch if it has
    another format version. A damaged manifest is read twice, since a network may have truncated it.
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
    """Raise CacheMismatch if the folder's name contains another identity of the same teacher.

    A folder whose name has another form was named by a user, and may have any name.
    """
    digits = identity_sha256(manifest.identity)[:8]
    named = re.fullmatch(rf"{re.escape(manifest.teacher)}-([0-9a-f]{{8}})", cache.absolute().name)
    if named is not None and named[1] != digits:
        right = cache.with_name(f"{manifest.teacher}-{digits}")
        raise CacheMismatch(
            f"{one_line(cache)} contains the identity {digits}..., but has another one in its name",
            fix=shlex.join(["mv", str(cache), str(right)]),
        )


def parse_manifest(text: bytes, path: Path, fix: str | PassCommand | None = None) -> Manifest:
    """Parse the bytes of `manifest_text`. path: for error messages.

    fix: for damage; default: another pass. Raises as `read_manifest`.
    """
    fix = fix or PassCommand(teacher_of(path.parent))
    content = _checked_content(text, path, fix)
    document = check_document(content)
    if isinstance(document, Problem):
        if document.is_of_another_version:
            raise _other_version(path, fix)
        raise CacheDamaged(f"{one_line(path)}: {document}", fix=fix)
    kept = {key: content[key] for key in content.keys() - _DERIVED}
    return Manifest(**{**kept, "taps": document.tap_specs})


def _checked_content(text: bytes, path: Path, fix: str | PassCommand) -> dict[str, Any]:
    """Parse these bytes, compare the checksum, and return the object without it."""
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
        f"valid block",
        fix=fix,
    )


def _other_version(path: Path, fix: str | PassCommand) -> CacheMismatch:
    if path.name == MANIFEST and isinstance(fix, PassCommand):
        cache = shlex.quote(str(path.parent))
        fix = replace(fix, before=f"move {cache} away, then: ")
    return CacheMismatch(
        f"{one_line(path)} was written by another version of Teach Once, whose caches this version "
        "does not read",
        fix=fix,
    )


def teacher_of(cache: Path) -> str:
    """Return the teacher's name from the name of a cache's folder, or of the target of a link."""
    with suppress(TypeError):  # a URL
        cache = Path(os.path.realpath(cache))
    name = cache.name.rpartition("-")[0]
    return name if is_teacher_name(name) else "NAME"


def _json_crc(content: Mapping[str, Any]) -> str:
    return crc_hex(bytes_crc32c(canonical_json(content).encode()))
