"""A file of configs/student: what a run is, for each of its methods."""

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

# Keys that came after runs were first identified, see `configs.schema.scalars.as_identity`.
LATER_STUDENT_KEYS = ("options", "init", "thinner", "relu_to_signed")


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class ThinNet:
    """A network of which the loss `residual` trains two: student and assistant."""

    arch: StrictStr
    """Name of the network, or `python:package.module:function`."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First layers of a ResNet: one 3x3 convolution, or a 7x7 one with stride 2 and pooling."""
    options: dict[StrictStr, Option] = field(default_factory=dict)
    """More arguments of the network's constructor."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class StudentNet:
    """The student network."""

    arch: StrictStr
    """Name of the network, `timm:NAME`, or `python:package.module:function`."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First layers of a ResNet: one 3x3 convolution, or a 7x7 one with stride 2 and pooling."""
    connector: Literal["auto", "conv-bn-relu", "conv-bn", "none"] = "auto"
    """Trained layers from each stage of the student to the channels of the teacher's, and a linear
    one between their embeddings. `auto`: they end in ReLU, or where the cache holds negative means
    without it; `none`: the channels must agree."""
    relu_to_signed: bool = False
    """Accept `connector: conv-bn-relu` for negative means, which ReLU cannot reach."""
    stages: tuple[StrictStr, ...] | None = None
    """Names of the modules that end a stage; `null`: those of the architecture."""
    options: dict[StrictStr, Option] = field(default_factory=dict)
    """More arguments of the network's constructor, such as `{drop_path_rate: 0.1}`."""
    init: StrictStr | None = None
    """Weights to start from: a file, `torchvision:NAME` or `timm:MODEL`; `null`: random ones."""
    thinner: ThinNet | None = None
    """The network of which `residual` trains two in place of `arch`, about half as costly; `null`:
    `arch` with 0.7 of its channels, of the CIFAR ResNets."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class StudentConfig:
    """What a run is, for each of its methods."""

    name: FolderName
    """Of the file; not a key."""
    source: FromCommandLine = field(default=None, compare=False, repr=False)
    teacher: StrictStr
    """Name of the teacher's config, or path to its file; of several, the first."""
    teachers: Annotated[tuple[StrictStr, ...], Field(min_length=2)] | None = None
    """In place of `teacher`: several teachers of the same data and views, each with a cache of its
    own. Students learn from the mean of their probabilities, and from the means of each."""
    teacher_weights: tuple[PositiveFloat, ...] | None = None
    """How much each of `teachers` counts; `null`: 1 each."""
    student: StudentNet
    """The network that learns."""
    training: StudentTraining
    """Its recipe."""
    methods: Annotated[dict[FolderName, Method], Field(min_length=1)]
    """The loss terms of each method, by its name."""
    num_views: NumViews | None = None
    """Train on the first so many views of the cache; `null`: `views.count` of the teacher."""

    @model_validator(mode="after")
    def _fine_tuning_has_weights(self) -> StudentConfig:
        self.training.refuse_without_init(self.student.init, "student.init")
        return self

    @model_validator(mode="before")
    @classmethod
    def _first_of_several(cls, values: Any) -> Any:
        """`teachers` alone is enough: the first one's data and views are the run's."""
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
            raise ValueError("teachers: each only once; count one more with teacher_weights")
        return self

    @property
    def weight_of_each(self) -> tuple[float, ...]:
        """One number for each teacher."""
        return self.teacher_weights or (1.0,) * len(self.teachers or (self.teacher,))
