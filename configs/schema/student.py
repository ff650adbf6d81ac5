"""A file of configs/student: what a run is, for each of its methods."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, StrictStr
from pydantic.dataclasses import dataclass

from configs.schema.methods import Method
from configs.schema.origin import FromCommandLine
from configs.schema.scalars import BLOCK, PositiveInt
from configs.schema.training import StudentTraining


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class StudentNet:
    """The network that learns."""

    arch: StrictStr
    stem: Literal["cifar", "imagenet"] = "cifar"
    connector: Literal["conv-bn-relu", "none"] = "conv-bn-relu"
    stages: tuple[StrictStr, ...] | None = None  # module names; default: the architecture's own


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class StudentConfig:
    """One file of configs/student: what a run is, for each of its methods."""

    name: StrictStr  # the file's name
    source: FromCommandLine = field(default=None, compare=False, repr=False)
    teacher: StrictStr  # the name of, or path to, the teacher's file
    student: StudentNet
    training: StudentTraining
    methods: Annotated[dict[StrictStr, Method], Field(min_length=1)]
    num_views: PositiveInt | None = None  # the first k views; default: the teacher's views.count
