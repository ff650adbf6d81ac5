"""Format of a file of packed images: a header and arrays that are read without HDF5.

    head    one line: teach-once-images VERSION BYTES SHA256      of the header that follows
    header  JSON: kind, type, class names (null: the images have no labels), digests; per split
            and array the offset in this file, the dtype, the shape, and the crc32c
    zeros   up to a power of two
    HDF5    class_names, <split>/<array> ...: for other programs

The file is an HDF5 file with the header in its user block, which HDF5 reserves for applications.
The arrays are contiguous. This project finds arrays by the header alone, and an array must be
within the file. The HDF5 structure must agree with the header, so that other programs read the same
classes, shapes and values.

    <split>/labels         (N,) int64; images without labels have neither this nor class_names
    <split>/crc32c         (N,) uint32, of each sample's bytes in this file
    kind pixels:
    <split>/images         (N, H, W, C) uint8
    <split>/source_digest  (N, 16) uint8: BLAKE2b-128 of the bytes that each was packed from
    kind encoded:
    <split>/bytes          uint8: the files' original bytes, concatenated
    <split>/offsets        (N + 1,) int64, where each begins
    <split>/names          uint8: `<class>/<file>` in UTF-8, each followed by a zero byte
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from teach_once.runtime.command.program import program_text
from teach_once.runtime.safe.files import write_atomically
from teach_once.runtime.safe.safe_read import BadFile, open_regular, parse_json, read_bounded
from teach_once.runtime.safe.text import one_line
from teach_once.views.images.decode import MOST_BYTES, shown_path
from teach_once.views.splits import (
    DIGEST_BYTES,
    DatasetError,
    Digests,
    Ids,
    check_class_name,
    crc32c,
)

FORMAT_NAME = "teach-once-images"
FORMAT_VERSION = 1

Count = Annotated[int, Field(ge=0, le=2**48)]
Crc = Annotated[int, Field(ge=0, lt=2**32)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)


class ArrayPlace(BaseModel):
    """Location of an array in the file. crc32c: of its bytes; None if each sample has its own."""

    model_config = _STRICT
    offset: Count
    dtype: Literal["<i8", "<u4", "|u1"]
    shape: Annotated[list[Count], Field(min_length=1, max_length=4)]
    crc32c: Crc | None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Recoded(BaseModel):
    """How files were re-encoded; see `views.packed.recode`."""

    model_config = _STRICT
    short_side_px: Count | None
    max_side_px: Count | None
    quality: Annotated[int, Field(ge=1, le=100)]
    encoder: Annotated[str, Field(max_length=200)]


class Header(BaseModel):
    """The header of a packed file.

    class_names: None for images without labels, which have no array of labels. digests: dataset
    digests by subset of the training samples (the sha256 of their ids, or "all"),
    and "test". recoded: how the files were re-encoded. job, part: for shards, see
    `views.packed.write`.
    """

    model_config = _STRICT
    kind: Literal["pixels", "encoded"]
    type: Annotated[str, Field(pattern="^[a-z0-9]{1,32}$")]
    class_names: Annotated[list[str], Field(min_length=1, max_length=2**20)] | None
    digests: Annotated[
        dict[Annotated[str, Field(max_length=64)], Sha256], Field(max_length=1000)
    ] = {}
    splits: dict[Literal["train", "test"], dict[str, ArrayPlace]]
    recoded: Recoded | None = None
    job: Sha256 | None = None
    part: Annotated[int, Field(ge=0, lt=2**20)] | None = None

    @property
    def arrays(self) -> Mapping[str, tuple[str, int]]:
        """Return the arrays of each split: name -> dtype and number of dimensions."""
        every = ARRAYS[self.kind]
        has_labels = self.class_names is not None
        return {name: each for name, each in every.items() if has_labels or name != LABELS}

    def to_bytes(self) -> bytes:
        """Return the head and the header as bytes."""
        body = json.dumps(self.model_dump(), separators=(",", ":")).encode()
        sha256 = hashlib.sha256(body).hexdigest()
        head = f"{FORMAT_NAME} {FORMAT_VERSION:04d} {len(body):012d} {sha256}\n"
        return head.encode() + body


_ERRORS = (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError)  # raised by h5py
_LONGEST_NAME = 2**10


def structure_fault(handle: int, header: Header) -> str | None:
    """Return how the HDF5 structure differs from the header; None if they agree."""
    try:
        with os.fdopen(os.dup(handle), "rb") as raw, h5py.File(raw, "r") as file:
            _check(file, handle, header)
    except _ERRORS as error:
        return f"its HDF5 structure does not match its header: {one_line(error)}"
    return None


def _check(file: h5py.File, handle: int, header: Header) -> None:
    """Compare the HDF5 structure with the header. Raises ValueError or any error of h5py."""
    names = header.class_names
    _check_members(file, "", [*([] if names is None else ["class_names"]), *header.splits])
    if names is not None:
        _check_class_names(file, handle, names)
    for split, arrays in header.splits.items():
        _require_plain(file, split)
        _check_members(file[split], f"{split}/", list(arrays))
        _check_arrays(file, split, arrays)


def _check_members(group: h5py.Group, where: str, expected: list[str]) -> None:
    if group.id.get_num_objs() != len(expected):
        raise ValueError(f"{where or 'the file'} has other members than {', '.join(expected)}")


def _check_arrays(file: h5py.File, split: str, arrays: Mapping[str, ArrayPlace]) -> None:
    for name, place in arrays.items():
        dataset = _dataset(file, f"{split}/{name}")
        kind = h5py.h5t.py_create(np.dtype(place.dtype))
        if dataset.shape != tuple(place.shape) or not dataset.get_type().equal(kind):
            raise ValueError(
                f"{split}/{name} is {dataset.dtype} of shape {dataset.shape}, expected "
                f"{np.dtype(place.dtype)} of {tuple(place.shape)}"
            )
        if place.num_bytes and dataset.get_offset() != place.offset:
            raise ValueError(f"{split}/{name} has another offset")


def _check_class_names(file: h5py.File, handle: int, names: list[str]) -> None:
    dataset = _dataset(file, "class_names")
    kind = dataset.get_type()
    is_text = isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str()
    if not is_text or dataset.shape != (len(names),) or kind.get_size() > _LONGEST_NAME:
        raise ValueError(f"class_names are not {len(names)} names")
    size = kind.get_size()
    content = os.pread(handle, size * len(names), int(dataset.get_offset()))
    found = [content[start : start + size].rstrip(b"\0") for start in range(0, len(content), size)]
    if found != [name.encode() for name in names]:
        raise ValueError("class_names differ in content or order")


def _require_plain(file: h5py.File, name: str) -> None:
    if file.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise ValueError(f"{name} is a link")


def _dataset(file: h5py.File, name: str) -> h5py.h5d.DatasetID:
    """Return the dataset called `name`, checked to be contiguous in this file."""
    _require_plain(file, name)
    found = h5py.h5o.open(file.id, name.encode())
    if not isinstance(found, h5py.h5d.DatasetID):
        raise ValueError(f"{name} is not a dataset")
    properties = found.get_create_plist()
    is_plain = properties.get_layout() == h5py.h5d.CONTIGUOUS
    if not is_plain or properties.get_external_count() or properties.get_nfilters():
        raise ValueError(f"{name} is not a contiguous dataset of this file")
    return found


SPLITS = ("train", "test")
LABELS = "labels"
# Per kind: array -> dtype and number of dimensions.
ARRAYS: Mapping[str, Mapping[str, tuple[str, int]]] = {
    "pixels": {
        LABELS: ("<i8", 1),
        "crc32c": ("<u4", 1),
        "images": ("|u1", 4),
        "source_digest": ("|u1", 2),
    },
    "encoded": {
        LABELS: ("<i8", 1),
        "crc32c": ("<u4", 1),
        "bytes": ("|u1", 1),
        "offsets": ("<i8", 1),
        "names": ("|u1", 1),
    },
}
CHECKED_BY_SAMPLE = ("images", "bytes")
_HEAD = re.compile(rb"([a-z-]{17}) ([0-9]{4}) ([0-9]{12}) ([0-9a-f]{64})\n")
HEAD_BYTES = 17 + 1 + 4 + 1 + 12 + 1 + 64 + 1
_MOST_HEADER_BYTES = 2**26
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_PACK_AGAIN = "pack the images again: {views} pack NAME|PATH {file}"


def key_of(ids: Ids) -> str:
    """Return the key of `digests` for a subset of samples."""
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").tobytes()).hexdigest()


def sha256_in_head(start: bytes) -> str | None:
    """Return the header's sha256 from a file's first HEAD_BYTES; None for another kind of file."""
    head = _HEAD.fullmatch(start)
    return head[4].decode() if head is not None and head[1] == FORMAT_NAME.encode() else None


class PackedFile:
    """An open file of packed images with a verified header.

    It stays open, so that replacing the path does not change the content. Readers verify images and
    bytes sample by sample; this class verifies everything else.
    """

    def __init__(self, path: Path, *, called: Path | None = None, fix: str | None = None) -> None:
        """Open and check a file. Raises DatasetError if it is missing, damaged or of another kind.

        called: the file's name in messages. fix: fix for a damaged file; default: packing again.
        """
        self.path = path
        self._shown = shown_path(called or path)
        self._other_fix, self._fix = (
            fix,
            fix or _PACK_AGAIN.format(views=program_text("views"), file=self._shown),
        )
        try:
            with open_regular(path, follow=True) as file:
                self._handle = os.dup(file.fileno())
        except FileNotFoundError:
            raise DatasetError(f"dataset.file: file {shown_path(path)} not found") from None
        except BadFile as error:
            raise DatasetError(f"dataset.file: {error}") from None
        weakref.finalize(self, os.close, self._handle)
        self.num_bytes = os.fstat(self._handle).st_size
        self.header_sha256, header = self._read_header()
        self.header = self._checked(header)

    def array(self, split: str, name: str) -> NDArray[np.generic]:
        """Return a whole array. Raises DatasetError if it does not match its checksum."""
        place = self._place(split, name)
        content = self._read(place.offset, place.num_bytes)
        if place.crc32c is None or crc32c(content) != place.crc32c:
            raise self.damaged(f"{split}/{name} does not match its checksum")
        return np.frombuffer(content, dtype=place.dtype).reshape(place.shape)

    def labels(self, split: str) -> Ids | None:
        """Return labels (N,) int64, checked to be valid classes; None for images without labels."""
        if (names := self.header.class_names) is None:
            return None
        labels = self.array(split, LABELS).astype(np.int64)
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
            raise self.damaged(f"{split}/labels: not all labels are classes")
        return labels

    def checksums(self, split: str) -> NDArray[np.uint32]:
        """Return (N,) uint32, the crc32c of each sample's bytes in this file."""
        return self.array(split, "crc32c").astype(np.uint32)

    def source_digests(self, split: str) -> Digests:
        """Return (N, 16) uint8 digests of the source bytes of each sample, for kind pixels."""
        return self.array(split, "source_digest").astype(np.uint8)

    def offsets(self, split: str) -> Ids:
        """Return (N + 1,) int64 offsets, ascending from 0 to the number of bytes."""
        offsets = self.array(split, "offsets").astype(np.int64)
        sizes = np.diff(offsets)
        ends = (int(offsets[0]), int(offsets[-1]))
        if ends != (0, self._place(split, "bytes").num_bytes) or (
            len(sizes) and not 0 <= sizes.min() <= sizes.max() <= MOST_BYTES
        ):
            raise self.damaged(f"{split}/offsets do not divide {split}/bytes")
        return offsets

    def names(self, split: str) -> list[str]:
        """Return the name `<class>/<file>` of each sample."""
        content = self.array(split, "names").tobytes()
        try:
            names = content.decode("utf-8").split("\0")
        except UnicodeDecodeError:
            names = []
        if len(names) != self.num_samples(split) + 1 or names[-1]:
            raise self.damaged(f"{split}/names do not have one UTF-8 name per sample")
        return names[:-1]

    def image_shape(self, split: str) -> tuple[int, int, int]:
        """Return (H, W, C) of all images of kind pixels."""
        _, height, width, channels = self._place(split, "images").shape
        return height, width, channels

    def part(self, split: str, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Return bytes `start` to `stop` of a uint8 array, not verified."""
        place = self._place(split, name)
        assert 0 <= start <= stop <= place.num_bytes
        return np.frombuffer(self._read(place.offset + start, stop - start), dtype=np.uint8)

    def num_samples(self, split: str) -> int:
        return self._place(split, "crc32c").shape[0]

    def damaged(self, what: str) -> DatasetError:
        """Return the error for content that contradicts the header."""
        return DatasetError(f"{self._shown} is damaged: {what}", fix=self._fix)

    def _place(self, split: str, name: str) -> ArrayPlace:
        return self.header.splits[split][name]  # type: ignore[index]

    def _read(self, offset: int, num_bytes: int) -> bytes:
        pieces = []
        while num_bytes:
            piece = os.pread(self._handle, min(num_bytes, 2**30), offset)
            if not piece:
                raise self.damaged("it is truncated")
            pieces.append(piece)
            offset, num_bytes = offset + len(piece), num_bytes - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_header(self) -> tuple[str, Header]:
        """Read the header; returns its sha256 and the header."""
        shown = self._shown
        start = os.pread(self._handle, HEAD_BYTES, 0)
        if start.startswith(_HDF5_SIGNATURE):
            raise DatasetError(
                f"{shown} is an HDF5 file, but does not contain packed images",
                fix=self._fix,
            )
        head = _HEAD.fullmatch(start)
        if head is None or head[1] != FORMAT_NAME.encode():
            problem = f"{shown} does not contain packed images, or is damaged"
            raise DatasetError(problem, fix=self._other_fix)
        if int(head[2]) != FORMAT_VERSION:
            raise DatasetError(
                f"{shown} has format version {int(head[2])}, expected {FORMAT_VERSION}",
                fix=self._fix,
            )
        if int(head[3]) > min(_MOST_HEADER_BYTES, self.num_bytes):
            raise self.damaged("its header is too long")
        body = self._read(HEAD_BYTES, int(head[3]))
        if hashlib.sha256(body).hexdigest() != head[4].decode():
            raise self.damaged("its header does not match its checksum")
        try:
            return head[4].decode(), Header.model_validate(parse_json(body, self.path))
        except BadFile as error:
            raise DatasetError(f"{error}: its header") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise self.damaged(f"header, {one_line(key)}: {one_line(first['msg'])}") from None

    def _checked(self, header: Header) -> Header:
        """Check that all arrays are inside the file and consistent; returns the header."""
        names = header.class_names or []
        for name in names:
            check_class_name(name, shown_path(self.path))
        if len(set(names)) != len(names):
            raise self.damaged("header, class_names: duplicate name")
        if set(header.splits) != set(SPLITS):
            raise self.damaged(f"header, splits: expected {' and '.join(SPLITS)}")
        for split, arrays in header.splits.items():
            self._check_arrays(header.arrays, split, arrays)
        if (fault := structure_fault(self._handle, header)) is not None:
            raise self.damaged(fault)
        return header

    def _check_arrays(
        self,
        expected: Mapping[str, tuple[str, int]],
        split: str,
        arrays: Mapping[str, ArrayPlace],
    ) -> None:
        if set(arrays) != set(expected):
            raise self.damaged(f"header, splits.{split}: expected {', '.join(expected)}")
        num_samples = arrays[next(iter(expected))].shape[0]
        for name, place in arrays.items():
            dtype, num_dimensions = expected[name]
            rows = num_samples + 1 if name == "offsets" else num_samples
            fits = place.dtype == dtype and len(place.shape) == num_dimensions
            if name not in ("bytes", "names"):
                fits = fits and place.shape[0] == rows
            if name == "images":
                fits = fits and all(size > 0 for size in place.shape[1:])
            if name == "source_digest":
                fits = fits and place.shape[1:] == [DIGEST_BYTES]
            if (place.crc32c is None) != (name in CHECKED_BY_SAMPLE):
                fits = False
            if not fits or place.offset + place.num_bytes > self.num_bytes:
                raise self.damaged(
                    f"header, splits.{split}.{name}: it does not match the other arrays "
                    f"or the file's {self.num_bytes:,} bytes"
                )


SUFFIX = ".json"  # suffix of an index
MOST_SHARDS = 512  # all are open at once
_FORMAT, _VERSION = "teach-once-shards", 1
MOST_INDEX_BYTES = 2**20
_AGAIN = "run the command that packed it again"


class Shard(BaseModel):
    """A shard. sha256: of its header, which contains the checksums of its arrays."""

    model_config = _STRICT
    split: Literal["train", "test"]
    samples: Count
    sha256: Sha256


class Index(BaseModel):
    """The shards in order."""

    model_config = _STRICT
    format: Literal["teach-once-shards"]
    version: Literal[1]
    shards: Annotated[list[Shard], Field(min_length=1, max_length=MOST_SHARDS)]
    sha256: Sha256  # hash of all other fields


def shard_path(index: Path, number: int) -> Path:
    """Return the path of shard `number`."""
    return index.with_name(f"{index.stem}-{number:05d}.h5")


def open_shards(index: Path, fix: str | None = None) -> tuple[PackedFile, ...]:
    """Open all shards of an index and check that they match it and one another.

    fix: fix for a damaged shard; default: packing again. Raises DatasetError if one is missing or
    damaged.
    """
    files = []
    for number, shard in enumerate(read_index(index).shards):
        file = PackedFile(shard_path(index, number), fix=fix)
        counts = {name: file.num_samples(name) for name in ("train", "test")}
        expected = {"train": 0, "test": 0, shard.split: shard.samples}
        if file.header_sha256 != shard.sha256 or counts != expected:
            raise DatasetError(
                f"{shown_path(file.path)} is not the shard in {shown_path(index)}",
                fix=_AGAIN,
            )
        files.append(file)
    same = {_shared(file) for file in files}
    if len(same) > 1:
        raise DatasetError(f"the shards of {shown_path(index)} belong to different datasets")
    return tuple(files)


def write_index(index: Path, shards: Sequence[tuple[str, PackedFile]]) -> None:
    """Write an index; shards: (split, file) of each."""
    content: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "shards": [
            {"split": split, "samples": file.num_samples(split), "sha256": file.header_sha256}
            for split, file in shards
        ],
    }
    content["sha256"] = sha256_of(content)
    write_atomically(index, json.dumps(content, indent=1).encode())


def read_index(index: Path) -> Index:
    """Read an index. Raises DatasetError if it is missing or damaged."""
    try:
        content = parse_json(read_bounded(index, MOST_INDEX_BYTES, follow=True), index)
        found = Index.model_validate(content)
    except FileNotFoundError:
        raise DatasetError(f"dataset.file: file {shown_path(index)} not found") from None
    except BadFile as error:
        raise DatasetError(f"dataset.file: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "it"
        raise DatasetError(
            f"{shown_path(index)} is not an index of shards: "
            f"{one_line(key)}: {one_line(first['msg'])}"
        ) from None
    if found.sha256 != sha256_of({key: value for key, value in content.items() if key != "sha256"}):
        raise DatasetError(
            f"{shown_path(index)} is damaged: it does not match its checksum",
            fix=_AGAIN,
        )
    return found


def sha256_of(value: object) -> str:
    """Hash a value as canonical JSON."""
    plain = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def _shared(file: PackedFile) -> str:
    header = file.header
    return sha256_of([header.kind, header.type, header.class_names, header.job])
