"""Every key of the YAML files, with its type, range and default.

One frozen dataclass per YAML block. Unknown keys are refused; numbers, booleans and strings are not
converted into one another. What can be derived from other settings is a property, never a key.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, StrictStr, model_validator
from pydantic.dataclasses import dataclass

_MOST = 2**31 - 1  # what counts samples, pixels or epochs; more is a typing error
PositiveInt = Annotated[int, Field(strict=True, ge=1, le=_MOST)]
NaturalInt = Annotated[int, Field(strict=True, ge=0, le=_MOST)]
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
# The losses of train/losses.py, and the options that each takes.
LOSS_OPTIONS: dict[str, frozenset[str]] = {
    "ce": frozenset(),
    "kd": frozenset({"temperature"}),
    "gkd": frozenset({"temperature"}),
    "cd": frozenset(),
    "at": frozenset(),
    "rkd": frozenset({"distance_weight", "angle_weight"}),
    "fitnets": frozenset(),
    "dkd": frozenset({"temperature", "alpha", "beta"}),
    "dist": frozenset({"temperature"}),
    "lskd": frozenset({"temperature"}),
}


def _known_loss(name: str) -> str:
    if name in LOSS_OPTIONS or re.fullmatch(r"[\w.]+:\w+", name):
        return name
    close = difflib.get_close_matches(name, LOSS_OPTIONS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"unknown loss{hint or '.'} Known: {', '.join(LOSS_OPTIONS)}, and package.module:name"
    )


# A key of LOSS_OPTIONS, or the user's own as package.module:name.
LossName = Annotated[StrictStr, AfterValidator(_known_loss)]

MOST_VIEWS = 2**16  # what `views.seeds.distinct_codes` can number

_forbid = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Source:
    """How a user named a config on the command line; for messages that repeat it."""

    name: str  # of a file in configs/, or a path
    overrides: tuple[str, ...] = ()
    # Of relative paths in its file that lead nowhere: {dotted key: the places that were tried}.
    not_found: Mapping[str, str] = field(default_factory=dict)


# Of a config; part of no identity, nor of what is printed.
FromCommandLine = Annotated[Source | None, Field(exclude=True)]


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
    """A tree `root/train/<class>/*` and `root/test/<class>/*` (or `val/`) of images."""

    type: Literal["imagefolder"]
    root: StrictStr


@dataclass(frozen=True, kw_only=True, config=_forbid)
class Packed(Samples):
    """A file that `python -m views pack` made of an image folder."""

    type: Literal["packed"]
    file: StrictStr


DatasetConfig = Annotated[Digits | Cifar | ImageFolder | Packed, Field(discriminator="type")]


Interpolation = Literal["bilinear", "bicubic"]
Range = tuple[PositiveFloat, PositiveFloat]


@dataclass(frozen=True, kw_only=True, config=_forbid)
class ColourJitter:
    """Brightness, contrast and saturation by a factor in [1 - x, 1 + x], hue by [-x, x] turns."""

    brightness: NonNegativeFloat = 0.0
    contrast: NonNegativeFloat = 0.0
    saturation: NonNegativeFloat = 0.0
    hue: Annotated[float, Field(strict=True, ge=0, le=0.5)] = 0.0


@dataclass(frozen=True, kw_only=True, config=_forbid)
class TrivialAugment:
    """One of 14 operations at one of `bins` strengths (the "wide" space of the paper)."""

    bins: Annotated[int, Field(strict=True, ge=2)] = 31


@dataclass(frozen=True, kw_only=True, config=_forbid)
class Erasing:
    """With `probability`, fill one box: its share of the area and its aspect ratio are drawn."""

    probability: Fraction = 0.25
    scale: Range = (0.02, 0.33)
    ratio: Range = (0.3, 3.3)
    fill: Annotated[tuple[Byte, ...], Field(min_length=1)] = (124, 116, 104)  # ImageNet's mean

    @model_validator(mode="after")
    def _ranges_ascend(self) -> Erasing:
        _check_ascending(scale=self.scale, ratio=self.ratio)
        return self


@dataclass(frozen=True, kw_only=True, config=_forbid)
class Mix:
    """Mix each view with the same view of another sample; labels become a pair of weights.

    The share of the other sample is drawn from Beta(alpha, alpha). mixup blends the whole images,
    cutmix pastes a box of the other one.
    """

    kind: Literal["mixup", "cutmix"]
    alpha: PositiveFloat = 1.0
    probability: Fraction = 1.0


@dataclass(frozen=True, kw_only=True, config=_forbid)
class Extras:
    """What may be added to any crop; `null` leaves it out."""

    trivial_augment: TrivialAugment | None = None
    colour_jitter: ColourJitter | None = None
    erasing: Erasing | None = None
    mix: Mix | None = None

    @property
    def has_extras(self) -> bool:
        extras = (self.trivial_augment, self.colour_jitter, self.erasing, self.mix)
        return any(extra is not None for extra in extras)


@dataclass(frozen=True, kw_only=True, config=_forbid)
class PadCropFlip(Extras):
    """Pad by `pad_px` on every side, cut out a window of the original size, flip half of them."""

    kind: Literal["pad-crop-flip"] = "pad-crop-flip"
    pad_px: NaturalInt = 4
    padding: Literal["reflect", "zero"] = "reflect"
    flip: StrictBool = True

    @model_validator(mode="after")
    def _can_be_counted(self) -> PadCropFlip:
        most = (math.isqrt(MOST_VIEWS // (2 if self.flip else 1)) - 1) // 2
        if self.num_crops > MOST_VIEWS:
            raise ValueError(
                f"pad_px is {self.pad_px}: {self.num_crops:,} different crops, of which only "
                f"{MOST_VIEWS:,} can be numbered; use pad_px: {most} or less"
            )
        return self

    @property
    def num_crops(self) -> int:
        """How many crops and flips one image has: (2 * pad_px + 1)^2, twice that with flips."""
        return int((2 * self.pad_px + 1) ** 2 * (2 if self.flip else 1))

    @property
    def num_distinct_views(self) -> int | None:
        """How many different views one image has; None where nobody can count them."""
        return None if self.has_extras else self.num_crops


@dataclass(frozen=True, kw_only=True, config=_forbid)
class RandomResizedCrop(Extras):
    """Cut out a box of random area and aspect ratio, resize it to a square, flip half of them."""

    kind: Literal["random-resized-crop"] = "random-resized-crop"
    size_px: PositiveInt = 224
    scale: Range = (0.08, 1.0)  # of the image's area
    ratio: Range = (0.75, 4 / 3)  # width : height
    interpolation: Interpolation = "bilinear"
    antialias: StrictBool = True
    flip: StrictBool = True

    @model_validator(mode="after")
    def _possible(self) -> RandomResizedCrop:
        _check_ascending(scale=self.scale, ratio=self.ratio)
        if self.scale[1] > 1:
            raise ValueError(f"scale ends at {self.scale[1]}, more than the whole image")
        if not self.antialias and self.interpolation != "bilinear":
            raise ValueError("antialias: false exists for interpolation: bilinear only")
        return self

    @property
    def num_distinct_views(self) -> int | None:
        return None


@dataclass(frozen=True, kw_only=True, config=_forbid)
class Centre(Extras):
    """The image as it is; or its short side resized to `resize_px`, and the middle cut out."""

    kind: Literal["centre"] = "centre"
    resize_px: PositiveInt | None = None
    crop_px: PositiveInt | None = None
    interpolation: Interpolation = "bilinear"
    flip: StrictBool = False

    @model_validator(mode="after")
    def _crop_is_within(self) -> Centre:
        if self.resize_px and not self.crop_px:
            raise ValueError("resize_px needs a crop_px, so that all views have one size")
        if self.resize_px and self.crop_px and self.crop_px > self.resize_px:
            raise ValueError(f"crop_px {self.crop_px} is more than resize_px {self.resize_px}")
        return self

    @property
    def num_crops(self) -> int:
        return 2 if self.flip else 1

    @property
    def num_distinct_views(self) -> int | None:
        return None if self.has_extras else self.num_crops


AugmentConfig = Annotated[PadCropFlip | RandomResizedCrop | Centre, Field(discriminator="kind")]


def _one_way(shown: Centre) -> Centre:
    random = ("flip", "trivial_augment", "colour_jitter", "erasing", "mix")
    if used := [name for name in random if getattr(shown, name)]:
        raise ValueError(f"a test image is always shown in the same way: remove {', '.join(used)}")
    return shown


# How test images are shown: nothing about it is drawn.
Evaluation = Annotated[Centre, AfterValidator(_one_way)]


def _check_ascending(**ranges: tuple[float, float]) -> None:
    for name, (low, high) in ranges.items():
        if low > high:
            raise ValueError(f"{name} begins at {low} and ends at {high}")


@dataclass(frozen=True, kw_only=True, config=_forbid)
class ViewsConfig:
    """Which augmented versions of each sample the cache holds."""

    augment: AugmentConfig
    seed: Seed = 0
    count: PositiveInt | Literal["all"] = 16
    # How test and validation images are shown. Default: as they are; after random-resized-crop the
    # middle `size_px` of an image whose short side was made 8/7 of that.
    evaluation: Evaluation | None = None

    @model_validator(mode="after")
    def _within_the_space(self) -> ViewsConfig:
        space = self.augment.num_distinct_views
        if space is None and self.count == "all":
            raise ValueError("count: all needs an augmentation whose views can be counted")
        if space is not None and self.count != "all" and self.count > space:
            raise ValueError(
                f"count is {self.count}, but this augmentation has only {space} different views; "
                f"use count: {space} or count: all"
            )
        return self

    @property
    def num_views(self) -> int:
        return (self.augment.num_distinct_views or 0) if self.count == "all" else int(self.count)

    @property
    def eval_transform(self) -> Centre:
        augment = self.augment
        if self.evaluation is not None:
            return self.evaluation
        if isinstance(augment, RandomResizedCrop):
            return Centre(
                resize_px=round(augment.size_px * 8 / 7),
                crop_px=augment.size_px,
                interpolation=augment.interpolation,
            )
        if isinstance(augment, Centre):
            return Centre(
                resize_px=augment.resize_px,
                crop_px=augment.crop_px,
                interpolation=augment.interpolation,
            )
        return Centre()


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
    # Published top-1 error (%) on the test split; a pass that measures another one says so.
    expected_error: Annotated[float, Field(strict=True, ge=0, le=100)] | None = None


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
    milestones: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    gamma: PositiveFloat = 0.1


@dataclass(frozen=True, kw_only=True, config=_forbid)
class OneCycle:
    """Rise linearly over `warmup_fraction` of all steps, then fall as a cosine to zero."""

    kind: Literal["onecycle"]
    warmup_fraction: Fraction = 0.3


Schedule = Annotated[MultiStep | OneCycle, Field(discriminator="kind")]


def _closer(milestones: tuple[int, ...], epochs: int) -> list[int]:
    """The same milestones, scaled so that a sixth of the run follows the last one."""
    scale = epochs * 5 / 6 / max(milestones)
    return sorted({max(1, round(milestone * scale)) for milestone in milestones})


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
    evaluate_every: PositiveInt = 1  # epochs between tests; the last epoch is always tested
    compile: StrictBool = False  # the network by torch.compile; faster steps, a slow first one

    @model_validator(mode="after")
    def _milestones_are_reached(self) -> Training:
        if isinstance(self.schedule, MultiStep) and max(self.schedule.milestones) > self.epochs:
            raise ValueError(
                f"schedule.milestones {list(self.schedule.milestones)} go beyond the last epoch, "
                f"{self.epochs}; use such as {_closer(self.schedule.milestones, self.epochs)}"
            )
        return self

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
    source: FromCommandLine = field(default=None, compare=False, repr=False)
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
    warmup_epochs: NaturalInt = 0  # the weight rises linearly over so many, from start_epoch on
    temperature: PositiveFloat | None = None  # default: the loss's own, as for what follows
    alpha: NonNegativeFloat | None = None
    beta: NonNegativeFloat | None = None
    distance_weight: NonNegativeFloat | None = None
    angle_weight: NonNegativeFloat | None = None
    options: dict[StrictStr, Float] = Field(default_factory=dict)  # of a loss of the user's own

    @model_validator(mode="after")
    def _options_have_a_use(self) -> LossTerm:
        known = LOSS_OPTIONS.get(self.loss, frozenset())
        for name in ("temperature", "alpha", "beta", "distance_weight", "angle_weight"):
            if getattr(self, name) is not None and name not in known:
                raise ValueError(f"the loss {self.loss!r} has no {name}")
        if self.options and self.loss in LOSS_OPTIONS:
            raise ValueError("options are for a loss of your own; name this one's by themselves")
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
    source: FromCommandLine = field(default=None, compare=False, repr=False)
    teacher: StrictStr  # the name of, or path to, the teacher's file
    student: StudentNet
    training: StudentTraining
    methods: Annotated[dict[StrictStr, Method], Field(min_length=1)]
    num_views: PositiveInt | None = None  # the first k views; default: the teacher's views.count


def as_plain(config: Any) -> dict[str, Any]:
    """The config as nested dicts and lists, defaults included; what YAML and JSON can hold."""
    from pydantic import TypeAdapter

    plain: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return plain
