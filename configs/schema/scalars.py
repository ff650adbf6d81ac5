"""The types of single values, and the settings that every block shares."""

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

_LARGEST_COUNT = 2**31 - 1  # of samples, pixels or epochs; more is a typing error
_LONGEST_NAME = 100
PositiveInt = Annotated[int, Field(strict=True, ge=1, le=_LARGEST_COUNT)]
NaturalInt = Annotated[int, Field(strict=True, ge=0, le=_LARGEST_COUNT)]
# What is looped over or allocated by: far more than anybody needs, and far from harm.
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
    """A name that folders are called by: of a config's file, or of a method."""
    if name[:1] in ("", ".", "-") or len(name) > _LONGEST_NAME or one_line(name) != name:
        raise ValueError(f"expected at most {_LONGEST_NAME} printable characters, first a letter")
    if "/" in name:
        raise ValueError("folders are named by it: use no /")
    return name


FolderName = Annotated[StrictStr, AfterValidator(_folder_name)]


def _teacher_name(name: str) -> str:
    """A cache's folder begins with it, and its manifest holds it."""
    if not is_teacher_name(name):
        raise ValueError(f"caches are named by this file, so its name must be {TEACHER_NAMES}")
    return name


TeacherName = Annotated[StrictStr, AfterValidator(_teacher_name)]

_LARGEST_OPTION = 10**6  # depth: 100000000 would fill the memory with a list of its numbers
_LONGEST_OPTION = 1000  # characters


def _option(value: bool | int | float | str) -> bool | int | float | str:
    if isinstance(value, str) and len(value) > _LONGEST_OPTION:
        raise ValueError(f"an option has more than {_LONGEST_OPTION:,} characters")
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


# Of every dataclass here: unknown keys are refused.
BLOCK = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class ConfigSource:
    """How a user named a config on the command line; for messages that repeat it."""

    name: str  # of a file in configs/, or a path
    overrides: tuple[str, ...] = ()
    # Of relative paths in its file that lead nowhere: {dotted key: the places that were tried}.
    not_found: Mapping[str, str] = field(default_factory=dict)


# Of a config; part of no identity, nor of what is printed.
FromCommandLine = Annotated[ConfigSource | None, Field(exclude=True)]


def as_plain(config: Any) -> dict[str, Any]:
    """The config as nested dicts and lists, defaults included; what YAML and JSON can hold."""
    plain: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return plain
