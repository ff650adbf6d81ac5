"""The header of a packed file: what it holds and where; `views.packed_file` has the format."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

FORMAT_NAME = "teach-once-images"
FORMAT_VERSION = 4

Count = Annotated[int, Field(ge=0, le=2**48)]
Crc = Annotated[int, Field(ge=0, lt=2**32)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)


class ArrayPlace(BaseModel):
    """Where an array lies in the file. crc32c: of its bytes; None where each sample has one."""

    model_config = _STRICT
    offset: Count
    dtype: Literal["<i8", "<u4", "|u1"]
    shape: Annotated[list[Count], Field(min_length=1, max_length=4)]
    crc32c: Crc | None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Recoded(BaseModel):
    """How files were made smaller; see `views.recode`."""

    model_config = _STRICT
    short_side_px: Count | None
    max_side_px: Count | None
    quality: Annotated[int, Field(ge=1, le=100)]
    encoder: Annotated[str, Field(max_length=200)]


class Header(BaseModel):
    """digests: of choices of training samples by the sha256 of their ids, "all", and "test".

    recoded: how the files were made smaller. job, part: of a shard, see `views.shards`.
    """

    model_config = _STRICT
    kind: Literal["pixels", "encoded"]
    type: Annotated[str, Field(pattern="^[a-z0-9]{1,32}$")]
    class_names: Annotated[list[str], Field(min_length=1, max_length=2**20)]
    digests: Annotated[
        dict[Annotated[str, Field(max_length=64)], Sha256], Field(max_length=1000)
    ] = {}
    splits: dict[Literal["train", "test"], dict[str, ArrayPlace]]
    recoded: Recoded | None = None
    job: Sha256 | None = None
    part: Annotated[int, Field(ge=0, lt=2**20)] | None = None

    def to_bytes(self) -> bytes:
        """The head and the header."""
        body = json.dumps(self.model_dump(), separators=(",", ":")).encode()
        sha256 = hashlib.sha256(body).hexdigest()
        head = f"{FORMAT_NAME} {FORMAT_VERSION:04d} {len(body):012d} {sha256}\n"
        return head.encode() + body
