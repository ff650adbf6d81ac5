"""The schema of a file in configs/student: a run for each of its methods."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, StrictStr, model_validator
from pydantic.dataclasses import dataclass

from teach_once.configs.schema.methods import Method
from teach_once.configs.schema.scalars import (
    BLOCK,
    FolderName,
    FromCommandLine,
    NumViews,
    Option,
    PositiveFloat,
)
from teach_once.configs.schema.training import StudentTraining


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class ThinNet:
    """The network that the loss `residual` trains twice: as student and as assistant."""

    arch: StrictStr
    """Architecture: a name or `python:package.module:function`."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """Stem of a ResNet: `cifar` is a 3x3 convolution; `imagenet` a 7x7 one with stride 2 and
    pooling."""
    options: dict[StrictStr, Option] = field(default_factory=dict)
    """Additional arguments of the network's constructor."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class StudentNet:
    """The student network."""

    arch: StrictStr
    """Architecture: a name, `timm:NAME` or `python:package.module:function`."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """Stem of a ResNet: `cifar` is a 3x3 convolution; `imagenet` a 7x7 one with stride 2 and
    pooling."""
    connector: Literal["auto", "conv-bn-relu", "conv-bn", "none"] = "auto"
    """Trained layers that map each stage of the student to the teacher's channels, and its
    embedding to the teacher's. `auto`: `conv-bn-relu`, or `conv-bn` for stages with negative
    channel means in the cache; `none`: no layers, so the channels must agree."""
    relu_to_signed: bool = False
    """Allow `connector: conv-bn-relu` for negative channel means, which ReLU cannot produce."""
    stages: tuple[StrictStr, ...] | None = None
    """Names of the modules that end the stages; `null`: the architecture's own stages."""
    options: dict[StrictStr, Option] = field(default_factory=dict)
    """Additional arguments of the network's constructor, such as `{drop_path_rate: 0.1}`."""
    init: StrictStr | None = None
    """Initial weights: a file, `torchvision:NAME` or `timm:MODEL`; `null`: random weights."""
    thinner: ThinNet | None = None
    """Network that `residual` trains twice in place of `arch`, of about half its cost; `null`:
    `arch` with 0.7 of its channels, for CIFAR ResNets only."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class StudentConfig:
    """The definition of a run, for each of its methods."""

    name: FolderName
    """Name of the file; not a key."""
    source: FromCommandLine = field(default=None, compare=False, repr=False)
    teacher: StrictStr
    """Name of the teacher's config, or path to its file."""
    teachers: Annotated[tuple[StrictStr, ...], Field(min_length=2)] | None = None
    """Several teachers in place of `teacher`, with the same data and views and one cache each.
    Students learn from their mean probabilities and from the channel means of each teacher."""
    teacher_weights: tuple[PositiveFloat, ...] | None = None
    """Weight of each of `teachers`; `null`: 1 each."""
    student: StudentNet
    """Student network."""
    training: StudentTraining
    """Training recipe."""
    methods: Annotated[dict[FolderName, Method], Field(min_length=1)]
    """Loss terms of each method, by the method's name."""
    num_views: NumViews | None = None
    """Number of views to train on, the cache's first ones; `null`: the teacher's `views.count`."""

    @model_validator(mode="after")
    def _fine_tuning_has_weights(self) -> StudentConfig:
        self.training.check_init(self.student.init, "student.init")
        return self

    @model_validator(mode="before")
    @classmethod
    def _first_of_several(cls, values: Any) -> Any:
        """Set `teacher` from `teachers`: the first one's data and views are the run's."""
        given = getattr(values, "kwargs", values)
        several = given.get("teachers") if isinstance(given, dict) else None
        if not isinstance(several, (list, tuple)) or not several:
            return values
        if given.get("teacher", several[0]) != several[0]:
            raise ValueError("give either teacher or teachers, not both")
        return {**given, "teacher": several[0]}

    @model_validator(mode="after")
    def _weights_fit(self) -> StudentConfig:
        count = len(self.teachers or ())
        if self.teacher_weights is not None and len(self.teacher_weights) != count:
            raise ValueError(
                f"teacher_weights: {len(self.teacher_weights)} weights for {count} teachers"
            )
        if len(set(self.teachers or ())) != count:
            raise ValueError("teachers: duplicate teacher; use teacher_weights to weight a teacher")
        return self

    @property
    def weight_of_each(self) -> tuple[float, ...]:
        """Weight of each teacher."""
        return self.teacher_weights or (1.0,) * len(self.teachers or (self.teacher,))
