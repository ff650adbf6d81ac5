"""A file of configs/teacher: what a cache is."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, StrictStr
from pydantic.dataclasses import dataclass

from configs.schema.dataset import DatasetConfig
from configs.schema.origin import FromCommandLine
from configs.schema.scalars import BLOCK, FloatDtype, Precision, TapDtype
from configs.schema.training import TeacherTraining
from configs.schema.views import ViewsConfig


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class TeacherNet:
    """The network that teaches, where its weights lie, and how it is run."""

    arch: StrictStr
    weights: StrictStr
    stem: Literal["cifar", "imagenet"] = "cifar"
    # "eval": the checkpoint's running statistics. "recalibrated": estimated anew on view 0 of the
    # cached samples, then frozen; for a teacher whose data differ from those it learned from.
    bn: Literal["eval", "recalibrated"] = "eval"
    precision: Precision = "float32"  # arithmetic of the teacher pass; "float32" means no TF32
    # Published top-1 error (%) on the test split; a pass that measures another one says so.
    expected_error: Annotated[float, Field(strict=True, ge=0, le=100)] | None = None


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Hint:
    """One stage's feature map, whole: (C, H, W) per record, so look at --plan first."""

    stage: Annotated[str, Field(pattern=r"^stage[1-9][0-9]*$")]
    dtype: FloatDtype = "float16"


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class TapsConfig:
    """What is kept of the teacher: the dtype per kind of tap, and which modules are stages."""

    logits: TapDtype = "float16"
    means: TapDtype = "float16"  # stage1 ... stageL
    energy: FloatDtype | None = None  # opt-in: energy1 ... energyL, attention maps
    hint: Hint | None = None  # opt-in: one stage's whole feature map
    stages: tuple[StrictStr, ...] | None = None  # module names; default: the architecture's own


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class TeacherConfig:
    """One file of configs/teacher: what a cache is."""

    name: StrictStr  # the file's name
    source: FromCommandLine = field(default=None, compare=False, repr=False)
    dataset: DatasetConfig
    views: ViewsConfig
    teacher: TeacherNet
    taps: TapsConfig = TapsConfig()
    training: TeacherTraining | None = None
