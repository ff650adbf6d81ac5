"""The schema of a file in configs/teacher: a cache."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, StrictStr, ValidationInfo, field_validator, model_validator
from pydantic.dataclasses import dataclass

from teach_once.configs.schema.dataset import DatasetConfig
from teach_once.configs.schema.scalars import (
    BLOCK,
    FloatDtype,
    FromCommandLine,
    Option,
    PositiveInt,
    Precision,
    TapDtype,
    TeacherName,
)
from teach_once.configs.schema.training import TeacherTraining
from teach_once.configs.schema.views import ViewsConfig


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class TeacherNet:
    """The teacher network, its weights and its precision."""

    arch: StrictStr
    """Architecture: a name, `timm:NAME` or `python:package.module:function`."""
    weights: StrictStr
    """File of a state dict (`.pt`, `.safetensors`), `torchvision:NAME`, or `timm:pretrained` for
    the weights that timm publishes for `arch`."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """Stem of a ResNet: `cifar` is a 3x3 convolution; `imagenet` a 7x7 one with stride 2 and
    pooling."""
    options: dict[StrictStr, Option] = field(default_factory=dict)
    """Additional arguments of the network's constructor, such as `{drop_path_rate: 0.1}`."""
    num_classes: PositiveInt | None = None
    """Number of classes of the weights' classifier, required to store logits of images without
    labels; `null`: the classes of the images."""
    bn: Literal["eval", "recalibrated"] = "eval"
    """Batch norm statistics: `eval` uses those stored in the weights; `recalibrated` estimates them
    on view 0 of the cached samples, for a teacher that was trained on other data."""
    precision: Precision = "float32"
    """Precision of the teacher pass; `float32` disables TF32."""
    expected_error: Annotated[float, Field(strict=True, ge=0, le=100)] | None = None
    """Published top-1 test error (%); a pass that measures a different error prints a warning."""

    @field_validator("weights")
    @classmethod
    def _of_the_arch(cls, weights: str, info: ValidationInfo) -> str:
        """Replace `timm:pretrained` by `timm:NAME` of the arch, the identity of its weights."""
        if weights != "timm:pretrained":
            return weights
        arch = str(info.data.get("arch", "timm:"))
        if not arch.startswith("timm:"):
            raise ValueError(f"timm:pretrained requires an arch timm:NAME, but arch is {arch}")
        return arch


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Hint:
    """The whole feature map of one stage, (C, H, W) per record; large, so check `--plan` first."""

    stage: Annotated[str, Field(pattern=r"^stage[1-9][0-9]?$")]
    """Name of the stage, such as `stage2`."""
    dtype: FloatDtype = "float16"
    """Type of the stored values."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class TopLogits:
    """The largest logits of each record, plus the log-sum-exp of the rest."""

    top_k: Annotated[int, Field(strict=True, ge=1, lt=2**16)]
    """Number of logits to store; less than the number of classes."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class TapsConfig:
    """The stored outputs of the teacher and their types."""

    logits: TapDtype | TopLogits | None = "float16"
    """Type of the logits; `uint8` stores codes with a scale, see `store/FORMAT.md`; `{top_k: 32}`
    stores the 32 largest. `null`: neither logits nor `correct` are stored, and the weights need no
    matching classifier."""
    channel_means: TapDtype | None = "float16"
    """Type of each stage's channel means, `stage1` ... `stageL`; `null`: not stored."""
    attention: FloatDtype | None = None
    """Type of each stage's attention map, `attention1` ... `attentionL`; `null`: not stored."""
    hint: Hint | None = None
    """One whole feature map, for the loss `fitnets`; `null`: not stored."""
    embedding: FloatDtype | None = None
    """Type of the embedding, the classifier's input; `null`: not stored."""
    stages: tuple[StrictStr, ...] | None = None
    """Names of the modules that end the stages; `null`: the architecture's own stages."""

    @model_validator(mode="after")
    def _store_something(self) -> TapsConfig:
        if not (self.logits or self.embedding or self.reads_stages):
            raise ValueError(
                "nothing is stored: set logits, channel_means, embedding, attention or hint"
            )
        return self

    @property
    def reads_stages(self) -> bool:
        """True if any tap is read at a stage."""
        return any(tap is not None for tap in (self.channel_means, self.attention, self.hint))


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Probe:
    """Labeled images that measure an embedding: by its nearest neighbors, and by a classifier."""

    train: StrictStr | None = None
    """Folder with a folder of images per class; `null`: the dataset's own training images."""
    test: StrictStr | None = None
    """Folder of the same classes with other images; `null`: the dataset's own test images."""

    @model_validator(mode="after")
    def _both_or_neither(self) -> Probe:
        if (self.train is None) != (self.test is None):
            raise ValueError("set both train and test, or neither")
        return self


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class TeacherConfig:
    """The definition of a cache."""

    name: TeacherName
    """Name of the file; not a key."""
    source: FromCommandLine = field(default=None, compare=False, repr=False)
    dataset: DatasetConfig
    """Images of the cache."""
    views: ViewsConfig
    """Augmented views of the images."""
    teacher: TeacherNet
    """Teacher network."""
    taps: TapsConfig = TapsConfig()
    """Stored outputs of the teacher."""
    probe: Probe | None = None
    """Labeled images on which the embeddings of teacher and students are compared; `null`: none."""
    training: TeacherTraining | None = None
    """Training recipe, used if the weights are missing; `null`: the weights must exist."""
