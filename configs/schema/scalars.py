"""Types of single values, and settings shared by all blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
)
from pydantic.dataclasses import dataclass

from teach_once.runtime.safe.names import TEACHER_NAMES, is_teacher_name
from teach_once.runtime.safe.text import one_line

_LARGEST_COUNT = 2**31 - 1  # samples, pixels or epochs; larger values are typing errors
_LONGEST_NAME = 100
PositiveInt = Annotated[int, Field(strict=True, ge=1, le=_LARGEST_COUNT)]
NaturalInt = Annotated[int, Field(strict=True, ge=0, le=_LARGEST_COUNT)]
# Limit of counts that are looped over or allocated: more than needed, but harmless.
Epochs = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]
BatchSize = Annotated[int, Field(strict=True, ge=1, le=2**20)]
NumViews = Annotated[int, Field(strict=True, ge=1, le=2**16)]
SizePx = Annotated[int, Field(strict=True, ge=1, le=8192)]
Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
FractionBelowOne = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**64)]
Byte = Annotated[int, Field(strict=True, ge=0, le=255)]


def _folder_name(name: str) -> str:
    """Check a name that becomes a folder's name: of a config file or of a method."""
    if name[:1] in ("", ".", "-") or len(name) > _LONGEST_NAME or one_line(name) != name:
        raise ValueError(f"at most {_LONGEST_NAME} printable characters, beginning with a letter")
    if "/" in name:
        raise ValueError("it becomes the name of a folder, so it must not contain /")
    return name


FolderName = Annotated[StrictStr, AfterValidator(_folder_name)]


def _teacher_name(name: str) -> str:
    """Check a teacher's name, which begins its cache's folder name and is in its manifest."""
    if not is_teacher_name(name):
        raise ValueError(f"the file's name becomes the cache's name and must be {TEACHER_NAMES}")
    return name


TeacherName = Annotated[StrictStr, AfterValidator(_teacher_name)]

_LARGEST_OPTION = 10**6  # otherwise depth: 100000000 would allocate a list of that length
_LONGEST_OPTION = 1000  # characters


def _option(value: bool | int | float | str) -> bool | int | float | str:
    if isinstance(value, str) and len(value) > _LONGEST_OPTION:
        raise ValueError(f"an option must have at most {_LONGEST_OPTION:,} characters")
    if isinstance(value, int) and abs(value) > _LARGEST_OPTION:
        raise ValueError(f"a whole number must be at most {_LARGEST_OPTION:,}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number must be finite")
    return value


# An argument of a network's constructor.
Option = Annotated[StrictBool | StrictInt | StrictFloat | StrictStr, AfterValidator(_option)]

FloatDtype = Literal["float16", "float32"]
TapDtype = Literal["float16", "float32", "uint8"]  # uint8: codes with a scale, see store/FORMAT.md
Precision = Literal["float32", "tf32", "bfloat16", "float16"]


# Settings of every dataclass here: unknown keys are rejected.
BLOCK = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class ConfigSource:
    """The name and overrides of a config on the command line, for messages that repeat them."""

    name: str  # name of a file in configs/, or a path
    overrides: tuple[str, ...] = ()
    # Relative paths in the file that do not exist: {dotted key: tried locations}.
    not_found: Mapping[str, str] = field(default_factory=dict)


# The source of a config; excluded from identities and from printed configs.
FromCommandLine = Annotated[ConfigSource | None, Field(exclude=True)]


def as_plain(config: Any) -> dict[str, Any]:
    """Return the config as nested dicts and lists with defaults, for YAML and JSON."""
    plain: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return plain
