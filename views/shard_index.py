"""The index of a packed dataset in shards: FILE.json beside FILE-00000.h5, FILE-00001.h5 ...

Each shard is a file of packed images that holds some neighbours of one split. The index names them
by the checksums of their headers, which hold those of everything else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.files import write_atomically
from runtime.reading import BadFile, parse_json, read_bounded
from runtime.text import one_line
from views.packed_file import PackedFile
from views.packed_header import Count, Sha256
from views.pictures import shown_path
from views.splits import DatasetError

SUFFIX = ".json"  # of an index
MOST_SHARDS = 512  # all are open at once
_FORMAT, _VERSION = "teach-once-shards", 1
MOST_INDEX_BYTES = 2**20
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)
_AGAIN = "run the command that packed it again"


class Shard(BaseModel):
    """sha256: of the shard's header, which holds the checksums of what is in it."""

    model_config = _STRICT
    split: Literal["train", "test"]
    samples: Count
    sha256: Sha256


class Index(BaseModel):
    """The shards in their order."""

    model_config = _STRICT
    format: Literal["teach-once-shards"]
    version: Literal[1]
    shards: Annotated[list[Shard], Field(min_length=1, max_length=MOST_SHARDS)]
    sha256: Sha256  # of all other fields


def shard_path(index: Path, number: int) -> Path:
    """Of the shard with that number."""
    return index.with_name(f"{index.stem}-{number:05d}.h5")


def open_shards(index: Path, fix: str | None = None) -> tuple[PackedFile, ...]:
    """All shards of an index, which fit it and one another. Raises DatasetError.

    fix: what mends a damaged one; default: packing again.
    """
    files = []
    for number, shard in enumerate(read_index(index).shards):
        file = PackedFile(shard_path(index, number), fix=fix)
        counts = {name: file.num_samples(name) for name in ("train", "test")}
        expected = {"train": 0, "test": 0, shard.split: shard.samples}
        if file.header_sha256 != shard.sha256 or counts != expected:
            raise DatasetError(
                f"{shown_path(file.path)} is not the shard that {shown_path(index)} names",
                fix=_AGAIN,
            )
        files.append(file)
    same = {_shared(file) for file in files}
    if len(same) > 1:
        raise DatasetError(f"the shards of {shown_path(index)} are of different datasets")
    return tuple(files)


def write_index(index: Path, shards: Sequence[tuple[str, PackedFile]]) -> None:
    """shards: the split of each, and its file."""
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
    """What an index says. Raises DatasetError."""
    try:
        content = parse_json(read_bounded(index, MOST_INDEX_BYTES, follow=True), index)
        found = Index.model_validate(content)
    except FileNotFoundError:
        raise DatasetError(f"dataset.file: there is no file {shown_path(index)}") from None
    except BadFile as error:
        raise DatasetError(f"dataset.file: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "it"
        raise DatasetError(
            f"{shown_path(index)} is no index of shards: {one_line(key)}: {one_line(first['msg'])}"
        ) from None
    if found.sha256 != sha256_of({key: value for key, value in content.items() if key != "sha256"}):
        raise DatasetError(
            f"{shown_path(index)} is damaged: it does not match its checksum",
            fix=_AGAIN,
        )
    return found


def sha256_of(value: Any) -> str:
    """Of a value as canonical JSON."""
    plain = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def _shared(file: PackedFile) -> str:
    header = file.header
    return sha256_of([header.kind, header.type, header.class_names, header.job])
