"""The types of single values, and the settings that every block shares."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

_LARGEST_COUNT = 2**31 - 1  # of samples, pixels or epochs; more is a typing error
PositiveInt = Annotated[int, Field(strict=True, ge=1, le=_LARGEST_COUNT)]
NaturalInt = Annotated[int, Field(strict=True, ge=0, le=_LARGEST_COUNT)]
Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**64)]
Byte = Annotated[int, Field(strict=True, ge=0, le=255)]


FloatDtype = Literal["float16", "float32"]
TapDtype = Literal["float16", "float32", "uint8"]  # uint8: codes with a scale, see store/FORMAT.md
Precision = Literal["float32", "tf32", "bfloat16", "float16"]
TrainingPrecision = Literal["float32", "tf32", "bfloat16"]


# Of every dataclass here: unknown keys are refused.
BLOCK = ConfigDict(extra="forbid")
