"""What manifest.json must be: every key, its type and its bounds.

A manifest may come from a stranger, and its checksum from the same hand. Nothing of it is
allocated, looped over, printed or made into a path before it has passed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from runtime.names import TEACHER_NAMES, is_teacher_name
from runtime.text import one_line
from store.certificate import RANGES, RECORDS, STEPS
from store.identity import canonical_json, identity_sha256
from store.layout import (
    LABELS,
    MAX_BLOCK_ROWS,
    PREVIEW,
    SAMPLE_CRC,
    TapSpec,
    arrays_of,
    metadata_names,
)
from store.names import NAME_PATTERN, TAP_NAMES, is_tap_name

MAX_SAMPLES = 10**8
MAX_VIEWS = 10**6
MAX_CHUNKS = 2**28  # of all arrays and views
MAX_CHUNK_BYTES = 2**30
MAX_CLASSES = 2**20
MAX_CUT_CLASSES = 2**16  # which uint16 can number
_MAX_PREVIEW_BYTES = 2**28
_MAX_IDENTITY_CHARS = 2**16
_MISSING, _UNKNOWN = "a value", "no such key"

Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Extent = Annotated[int, Field(ge=1, le=2**31 - 1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Problem(NamedTuple):
    """A field that is not what it must be. expected: in words."""

    field: str
    expected: str
    found: object

    @property
    def is_of_another_version(self) -> bool:
        """Whether keys are missing or unknown: then a program of another version wrote them."""
        return self.expected in (_MISSING, _UNKNOWN)

    def __str__(self) -> str:
        return f"{one_line(self.field)}: expected {self.expected}, found {in_short(self.found)}"


class _Document(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TapDocument(_Document):
    """How a tap is stored."""

    shape: Annotated[list[Extent], Field(max_length=6)]
    dtype: Literal["float16", "float32", "uint8"]
    scale: Literal["row", "block"] | None = None
    stage: Annotated[str, Field(pattern=rf"^{NAME_PATTERN}$")] | None = None
    top: Annotated[int, Field(ge=1, le=MAX_CLASSES)] | None = None


class CanaryDocument(_Document):
    """Which views were hashed, and their hash."""

    samples: Annotated[list[Count], Field(max_length=1000)] = []
    views: Annotated[list[Count], Field(max_length=1000)] = []
    sha256: Annotated[str, Field(max_length=64)] = ""


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
    """The keys of manifest.json, but for its own checksum."""

    format: Literal["teach-once-cache"]
    format_version: int
    teacher: Annotated[str, AfterValidator(_teacher)]
    identity: dict[str, Any]
    identity_sha256: Sha256
    num_samples: Annotated[int, Field(ge=1, le=MAX_SAMPLES)]
    num_views: Annotated[int, Field(ge=1, le=MAX_VIEWS)]
    block_rows: Annotated[int, Field(ge=1, le=2**30)]
    taps: Annotated[
        dict[Annotated[str, AfterValidator(_tap)], TapDocument], Field(min_length=1, max_length=256)
    ]
    class_names: Annotated[
        list[Annotated[str, Field(max_length=1000)]], Field(min_length=1, max_length=MAX_CLASSES)
    ]
    preview_shape: Annotated[list[Extent], Field(min_length=4, max_length=4)]
    whole_crc32c: Annotated[dict[str, Checksum], Field(max_length=2)]
    zarr_crc32c: Annotated[dict[str, Checksum], Field(max_length=1000)]
    canary: CanaryDocument
    versions: Annotated[dict[Word, Word], Field(max_length=100)]
    measured: Annotated[dict[Word, int | Number], Field(max_length=100)] = {}
    sample_crc32c: bool = False

    @property
    def tap_specs(self) -> dict[str, TapSpec]:
        return {
            name: TapSpec(tuple(tap.shape), tap.dtype, tap.scale, tap.stage, tap.top)
            for name, tap in self.taps.items()
        }


def problem_of(content: object) -> Problem | ManifestDocument:
    """The document, or the first thing that is wrong with it."""
    try:
        document = ManifestDocument.model_validate(content)
    except ValidationError as error:
        return first_problem(error)
    return next(_inconsistencies(document), document)


def first_problem(error: ValidationError) -> Problem:
    """The first field that does not fit, in the words of this project."""
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
    """A value for a message: of a list or an object only its size."""
    if isinstance(value, dict):
        return f"an object of {len(value):,} keys"
    if isinstance(value, list | tuple) and len(value) > 8:
        return f"a list of {len(value):,}"
    return "nothing" if value is None else one_line(repr(value), 100)


def _inconsistencies(document: ManifestDocument) -> Iterator[Problem]:
    yield from _wrong_identity(document)
    yield from _wrong_blocks(document)
    for name, spec in document.tap_specs.items():
        yield from _wrong_tap(name, spec, len(document.class_names))
    yield from _wrong_sizes(document)
    yield from _wrong_measured(document)
    whole = {LABELS, PREVIEW}
    if document.whole_crc32c.keys() != whole:
        yield Problem("whole_crc32c", f"the keys {sorted(whole)}", sorted(document.whole_crc32c))
    names = metadata_names(_arrays(document))
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


def _wrong_tap(name: str, spec: TapSpec, num_classes: int) -> Iterator[Problem]:
    if name == "correct":
        if spec != TapSpec((), "uint8"):
            yield Problem("taps.correct", "uint8 of shape []", [list(spec.shape), spec.dtype])
    elif (spec.dtype == "uint8") != (spec.scale is not None):
        yield Problem(f"taps.{name}.scale", f"what {spec.dtype} needs", spec.scale)
    elif spec.scale is not None and len(spec.shape) != 1:
        yield Problem(f"taps.{name}.shape", "one dimension, because of the scale", spec.shape)
    if spec.top is not None and (name, spec.dtype) != ("logits", "float16"):
        yield Problem(f"taps.{name}.top", "null, but for float16 logits", spec.top)
    elif spec.top is not None and not (spec.top < num_classes <= MAX_CUT_CLASSES):
        expected = f"less than the number of classes, which is at most {MAX_CUT_CLASSES:,}"
        yield Problem("taps.logits.top", expected, f"{spec.top} of {num_classes:,}")
    if name == "logits" and spec.shape != (num_classes,):
        expected = f"[{num_classes}], the number of class_names"
        yield Problem("taps.logits.shape", expected, list(spec.shape))


def _arrays(document: ManifestDocument) -> dict[str, Any]:
    checksums = {SAMPLE_CRC: TapSpec((), "uint32")} if document.sample_crc32c else {}
    return dict(arrays_of({**document.tap_specs, **checksums}))


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
