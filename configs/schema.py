"""Every key of the YAML files, with its type, range and default.

One frozen dataclass per YAML block. Unknown keys are refused; numbers, booleans and strings are not
converted into one another. What can be derived from other settings is a property, never a key.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictBool, StrictStr, model_validator
from pydantic.dataclasses import dataclass

PositiveInt = Annotated[int, Field(strict=True, ge=1)]
NaturalInt = Annotated[int, Field(strict=True, ge=0)]
Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**64)]

FloatDtype = Literal["float16", "float32"]
TapDtype = Literal["float16", "float32", "uint8"]  # uint8: codes with a scale, see store/FORMAT.md
Precision = Literal["float32", "tf32", "bfloat16", "float16"]
TrainingPrecision = Literal["float32", "tf32", "bfloat16"]
LossName = Literal["ce", "kd", "gkd", "cd"]

_forbid = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_forbid)
class Normalisation:
    """Per-channel mean and standard deviation of pixel values scaled to [0, 1]."""

    mean: Annotated[tuple[Float, ...], Field(min_length=1)]
    std: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _same_length(self) -> Normalisation:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std has {len(self.std)}")
        return self


@dataclass(frozen=True, kw_only=True, config=_forbid)
class Samples:
    """Which samples of a dataset are used, and how their pixels are scaled; common to all types."""

    normalisation: Normalisation
    limit: PositiveInt | None = None  # training samples kept per class, the first ones
    # Of the training samples, held out by a keyed hash; the best epoch is then chosen on them
    # instead of on the test set.
    validation_fraction: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0


@dataclass(frozen=True, kw_only=True, config=_forbid)
class Digits(Samples):
    """scikit-learn's bundled 8x8 scans: the first 1,000 train, the last 797 (other hands) test."""

    type: Literal["digits"]


@dataclass(frozen=True, kw_only=True, config=_forbid)
class Cifar(Samples):
    """CIFAR-10 or CIFAR-100 in its original form, downloaded to `root` at first use."""

    type: Literal["cifar10", "cifar100"]
    root: StrictStr = "data"
    download: StrictBool = True


@dataclass(frozen=True, kw_only=True, config=_forbid)
class ImageFolder(Samples):
    """A tree `root/train/<class>/*` and `root/test/<class>/*` (or `val/`) of same-size images."""

    type: Literal["imagefolder"]
    root: StrictStr


@dataclass(frozen=True, kw_only=True, config=_forbid)
class Packed(Samples):
    """A file that `python -m views pack` made of an image folder."""

    type: Literal["packed"]
    file: StrictStr


DatasetConfig = Annotated[Digits | Cifar | ImageFolder | Packed, Field(discriminator="type")]


@dataclass(frozen=True, kw_only=True, config=_forbid)
class PadCropFlip:
    """Pad by `pad_px` on every side, cut out a window of the original size, flip half of them."""

    kind: Literal["pad-crop-flip"] = "pad-crop-flip"
    pad_px: NaturalInt = 4
    padding: Literal["reflect", "zero"] = "reflect"
    flip: StrictBool = True

    @property
    def num_distinct_views(self) -> int:
        """How many different views one image has: (2 * pad_px + 1)^2, twice that with flips."""
        return int((2 * self.pad_px + 1) ** 2 * (2 if self.flip else 1))


@dataclass(frozen=True, kw_only=True, config=_forbid)
class ViewsConfig:
    """Which augmented versions of each sample the cache holds."""

    augment: PadCropFlip
    seed: Seed = 0
    count: PositiveInt | Literal["all"] = 16

    @model_validator(mode="after")
    def _within_the_space(self) -> ViewsConfig:
        space = self.augment.num_distinct_views
        if self.count != "all" and self.count > space:
            raise ValueError(
                f"count is {self.count}, but this augmentation has only {space} different views; "
                f"use count: {space} or count: all"
            )
        return self

    @property
    def num_views(self) -> int:
        return self.augment.num_distinct_views if self.count == "all" else int(self.count)


@dataclass(frozen=True, kw_only=True, config=_forbid)
class TeacherNet:
    """The network that teaches, where its weights lie, and how it is run."""

    arch: StrictStr
    weights: StrictStr
    stem: Literal["cifar", "imagenet"] = "cifar"
    # "eval": the checkpoint's running statistics. "recalibrated": estimated anew on view 0 of the
    # cached samples, then frozen; for a teacher whose data differ from those it learned from.
    bn: Literal["eval", "recalibrated"] = "eval"
    precision: Precision = "float32"  # arithmetic of the teacher pass; "float32" means no TF32


@dataclass(frozen=True, kw_only=True, config=_forbid)
class Hint:
    """One stage's feature map, whole: (C, H, W) per record, so look at --plan first."""

    stage: Annotated[str, Field(pattern=r"^stage[1-9][0-9]*$")]
    dtype: FloatDtype = "float16"


@dataclass(frozen=True, kw_only=True, config=_forbid)
class TapsConfig:
    """What is kept of the teacher: the dtype per kind of tap, and which modules are stages."""

    logits: TapDtype = "float16"
    means: TapDtype = "float16"  # stage1 ... stageL
    energy: FloatDtype | None = None  # opt-in: energy1 ... energyL, attention maps
    hint: Hint | None = None  # opt-in: one stage's whole feature map
    stages: tuple[StrictStr, ...] | None = None  # module names; default: the architecture's own


@dataclass(frozen=True, kw_only=True, config=_forbid)
class MultiStep:
    """Multiply the learning rate by `gamma` after each of `milestones` (in epochs)."""

    kind: Literal["multistep"]
    milestones: tuple[PositiveInt, ...]
    gamma: PositiveFloat = 0.1


@dataclass(frozen=True, kw_only=True, config=_forbid)
class OneCycle:
    """Rise linearly over `warmup_fraction` of all steps, then fall as a cosine to zero."""

    kind: Literal["onecycle"]
    warmup_fraction: Fraction = 0.3


Schedule = Annotated[MultiStep | OneCycle, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True, config=_forbid)
class Training:
    """A recipe: SGD with momentum under one learning-rate schedule."""

    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    schedule: Schedule
    momentum: Fraction = 0.9
    nesterov: StrictBool = False
    weight_decay: NonNegativeFloat = 5e-4  # on every parameter
    precision: TrainingPrecision = "float32"

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Training:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: true needs a momentum above 0")
        return self


@dataclass(frozen=True, kw_only=True, config=_forbid)
class TeacherTraining(Training):
    """How to train the teacher where no weights exist.

    It sees a fresh view in every epoch, drawn like the cache's but never limited to its count.
    """

    seed: Seed = 0
    limit: PositiveInt | None = None  # samples per class; default: all the training split has


@dataclass(frozen=True, kw_only=True, config=_forbid)
class StudentTraining(Training):
    """How to train a student."""

    # While no loss term reaches the classifier, leave it as it is. False lets weight decay
    # shrink it, as the original implementation of Early Decay Teacher does.
    freeze_idle_classifier: StrictBool = True


@dataclass(frozen=True, kw_only=True, config=_forbid)
class TeacherConfig:
    """One file of configs/teacher: what a cache is."""

    name: StrictStr  # the file's name
    dataset: DatasetConfig
    views: ViewsConfig
    teacher: TeacherNet
    taps: TapsConfig = TapsConfig()
    training: TeacherTraining | None = None


@dataclass(frozen=True, kw_only=True, config=_forbid)
class LossTerm:
    """One weighted term of a method; see `train.schedule.weight_at` for how the weight moves."""

    loss: LossName
    weight: NonNegativeFloat = 1.0
    decay: PositiveFloat = 1.0
    decay_epochs: tuple[PositiveInt, ...] = ()
    start_epoch: PositiveInt = 1
    temperature: PositiveFloat | None = None  # default: the loss's own

    @model_validator(mode="after")
    def _temperature_has_a_use(self) -> LossTerm:
        if self.temperature is not None and self.loss not in ("kd", "gkd"):
            raise ValueError(f"the loss {self.loss!r} has no temperature")
        return self


@dataclass(frozen=True, kw_only=True, config=_forbid)
class StudentNet:
    """The network that learns."""

    arch: StrictStr
    stem: Literal["cifar", "imagenet"] = "cifar"
    connector: Literal["conv-bn-relu", "none"] = "conv-bn-relu"
    stages: tuple[StrictStr, ...] | None = None  # module names; default: the architecture's own


Method = Annotated[tuple[LossTerm, ...], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True, config=_forbid)
class StudentConfig:
    """One file of configs/student: what a run is, for each of its methods."""

    name: StrictStr  # the file's name
    teacher: StrictStr  # the name of, or path to, the teacher's file
    student: StudentNet
    training: StudentTraining
    methods: Annotated[dict[StrictStr, Method], Field(min_length=1)]
    num_views: PositiveInt | None = None  # use the cache's first k views; default: all it holds


def as_plain(config: Any) -> dict[str, Any]:
    """The config as nested dicts and lists, defaults included; what YAML and JSON can hold."""
    from pydantic import TypeAdapter

    plain: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return plain
