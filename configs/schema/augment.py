"""The block `views.augment`: the random augmentation of an image."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, StrictBool, model_validator
from pydantic.dataclasses import dataclass

from teach_once.configs.schema.scalars import BLOCK, Byte, Fraction, NaturalInt, SizePx

MOST_VIEWS = 2**16  # limit of `views.seeds.distinct_codes`


Interpolation = Literal["bilinear", "bicubic"]
Share = Annotated[float, Field(strict=True, gt=0, le=1)]
Ratio = Annotated[float, Field(strict=True, ge=1e-3, le=1e3)]
Factor = Annotated[float, Field(strict=True, ge=0, le=1e3)]


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class ColorJitter:
    """Jitter brightness, contrast, saturation and hue in random order."""

    brightness: Factor = 0.0
    """Multiply the brightness by a factor in [1 - x, 1 + x]."""
    contrast: Factor = 0.0
    """Multiply the contrast by a factor in [1 - x, 1 + x]."""
    saturation: Factor = 0.0
    """Multiply the saturation by a factor in [1 - x, 1 + x]."""
    hue: Annotated[float, Field(strict=True, ge=0, le=0.5)] = 0.0
    """Shift the hue by a fraction of the color circle in [-x, x]."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class TrivialAugment:
    """Apply one of 14 operations at a random strength (the wide space of TrivialAugment)."""

    bins: Annotated[int, Field(strict=True, ge=2, le=2**16)] = 31
    """Number of strengths."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class RandomErasing:
    """Fill a random box with a color."""

    probability: Fraction = 0.25
    """Probability that a box is erased."""
    scale: tuple[Share, Share] = (0.02, 0.33)
    """Minimum and maximum fraction of the image's area."""
    ratio: tuple[Ratio, Ratio] = (0.3, 3.3)
    """Minimum and maximum ratio of height to width."""
    fill: Annotated[tuple[Byte, ...], Field(min_length=1)] = (124, 116, 104)
    """Fill color: one value per channel, or one for all; default: ImageNet's mean."""

    @model_validator(mode="after")
    def _ranges_ascend(self) -> RandomErasing:
        _check_ascending(scale=self.scale, ratio=self.ratio)
        return self


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Mix:
    """Mix each view with the same view of another sample, and their labels in proportion."""

    type: Literal["mixup", "cutmix"]
    """`mixup` blends whole images; `cutmix` pastes a box of the other image."""
    alpha: Annotated[float, Field(strict=True, ge=1e-3, le=1e3)] = 1.0
    """Parameter of Beta(alpha, alpha), from which the proportion is sampled."""
    probability: Fraction = 1.0
    """Probability that a view is mixed."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Extras:
    """Augmentations that may follow any crop."""

    trivial_augment: TrivialAugment | None = None
    """One random operation on color or geometry; `null`: none."""
    color_jitter: ColorJitter | None = None
    """Random brightness, contrast, saturation and hue; `null`: none."""
    random_erasing: RandomErasing | None = None
    """A random box filled with a color; `null`: none."""
    mix: Mix | None = None
    """Mixing with another sample; `null`: none."""

    @property
    def has_extras(self) -> bool:
        extras = (self.trivial_augment, self.color_jitter, self.random_erasing, self.mix)
        return any(extra is not None for extra in extras)

    @property
    def output_px(self) -> int | None:
        """Height and width of a view; None: those of the image."""
        return None

    @property
    def needs_pillow(self) -> bool:
        """True if each image needs Pillow before it can be put into a batch."""
        recolors = self.trivial_augment is not None or self.color_jitter is not None
        return recolors or self.output_px is not None


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class PadCropFlip(Extras):
    """Pad the image and take a random crop of the original size."""

    type: Literal["pad-crop-flip"] = "pad-crop-flip"
    """Type of the augmentation."""
    pad_px: NaturalInt = 4
    """Padding on every side, in pixels."""
    padding: Literal["reflect", "zero"] = "reflect"
    """Padding mode: mirror the image at its edges, or add black."""
    flip: StrictBool = True
    """Flip a random half of the views horizontally."""

    @model_validator(mode="after")
    def _can_be_counted(self) -> PadCropFlip:
        most = (math.isqrt(MOST_VIEWS // (2 if self.flip else 1)) - 1) // 2
        if self.num_crops > MOST_VIEWS:
            raise ValueError(
                f"pad_px {self.pad_px} gives {self.num_crops:,} different crops, but at most "
                f"{MOST_VIEWS:,} are supported; use pad_px: {most} or less"
            )
        return self

    @property
    def num_crops(self) -> int:
        """Number of crops and flips per image: (2 * pad_px + 1)^2, doubled with flips."""
        return int((2 * self.pad_px + 1) ** 2 * (2 if self.flip else 1))

    @property
    def num_distinct_views(self) -> int | None:
        """Number of distinct views per image; None if they cannot be counted."""
        return None if self.has_extras else self.num_crops

    @property
    def eval_transform(self) -> CenterCrop:
        """Default transform of test images."""
        return CenterCrop()


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class RandomResizedCrop(Extras):
    """Take a crop of random area and aspect ratio and resize it to a square."""

    type: Literal["random-resized-crop"] = "random-resized-crop"
    """Type of the augmentation."""
    size_px: SizePx = 224
    """Height and width of a view."""
    scale: tuple[Share, Share] = (0.08, 1.0)
    """Minimum and maximum fraction of the image's area."""
    ratio: tuple[Ratio, Ratio] = (0.75, 4 / 3)
    """Minimum and maximum ratio of width to height."""
    interpolation: Interpolation = "bilinear"
    """Interpolation of resizing."""
    antialias: StrictBool = True
    """Antialias when shrinking; `false` requires `bilinear`."""
    flip: StrictBool = True
    """Flip a random half of the views horizontally."""

    @model_validator(mode="after")
    def _possible(self) -> RandomResizedCrop:
        _check_ascending(scale=self.scale, ratio=self.ratio)
        if self.scale[1] > 1:
            raise ValueError(f"scale ends at {self.scale[1]}, but 1 is the whole image")
        if not self.antialias and self.interpolation != "bilinear":
            raise ValueError("antialias: false requires interpolation: bilinear")
        return self

    @property
    def output_px(self) -> int:
        return self.size_px

    @property
    def num_distinct_views(self) -> None:
        return None

    @property
    def eval_transform(self) -> CenterCrop:
        """The central `size_px` of an image whose short side is resized to 8/7 of `size_px`."""
        return CenterCrop(
            resize_px=round(self.size_px * 8 / 7),
            crop_px=self.size_px,
            interpolation=self.interpolation,
        )


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class CenterCrop(Extras):
    """The central crop, or the image unchanged."""

    type: Literal["center-crop"] = "center-crop"
    """Type of the augmentation."""
    resize_px: SizePx | None = None
    """Length of the short side after resizing; requires `crop_px`. `null`: no resizing."""
    crop_px: SizePx | None = None
    """Height and width of the central crop; `null`: the whole image."""
    interpolation: Interpolation = "bilinear"
    """Interpolation of resizing."""
    flip: StrictBool = False
    """Flip a random half of the views horizontally."""

    @model_validator(mode="after")
    def _crop_is_within(self) -> CenterCrop:
        if self.resize_px and not self.crop_px:
            raise ValueError("resize_px requires crop_px, so that all views have the same size")
        if self.resize_px and self.crop_px and self.crop_px > self.resize_px:
            raise ValueError(f"crop_px {self.crop_px} exceeds resize_px {self.resize_px}")
        return self

    @property
    def output_px(self) -> int | None:
        return self.crop_px

    @property
    def num_crops(self) -> int:
        return 2 if self.flip else 1

    @property
    def num_distinct_views(self) -> int | None:
        return None if self.has_extras else self.num_crops

    @property
    def eval_transform(self) -> CenterCrop:
        """This crop without the flip and the extras."""
        return CenterCrop(
            resize_px=self.resize_px, crop_px=self.crop_px, interpolation=self.interpolation
        )


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class _Resized(Extras):
    """A central crop of a resized image, without randomness."""

    resize_px: SizePx
    """Length of the sides after resizing: of both sides with `squash`, of the long one with
    `border`."""
    crop_px: SizePx
    """Height and width of the central crop."""
    interpolation: Interpolation = "bilinear"
    """Interpolation of resizing."""

    @property
    def output_px(self) -> int:
        return self.crop_px

    @property
    def flip(self) -> bool:
        return False

    @property
    def num_crops(self) -> int:
        return 1

    @property
    def num_distinct_views(self) -> int | None:
        return None if self.has_extras else 1


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Squash(_Resized):
    """The central crop of the image resized to a square; proportions are not kept."""

    type: Literal["squash"] = "squash"
    """Type of the augmentation."""

    @model_validator(mode="after")
    def _crop_is_within(self) -> Squash:
        if self.crop_px > self.resize_px:
            raise ValueError(f"crop_px {self.crop_px} exceeds resize_px {self.resize_px}")
        return self

    @property
    def eval_transform(self) -> Squash:
        """This transform without the extras."""
        return Squash(
            resize_px=self.resize_px, crop_px=self.crop_px, interpolation=self.interpolation
        )


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Border(_Resized):
    """The whole image resized to fit into a square, with a border along its short side."""

    type: Literal["border"] = "border"
    """Type of the augmentation."""
    fill: Annotated[tuple[Byte, ...], Field(min_length=1)] = (124, 116, 104)
    """Color of the border: one value per channel, or one for all; default: ImageNet's mean."""

    @property
    def eval_transform(self) -> Border:
        """This transform without the extras."""
        return Border(
            resize_px=self.resize_px,
            crop_px=self.crop_px,
            interpolation=self.interpolation,
            fill=self.fill,
        )


AugmentConfig = Annotated[
    PadCropFlip | RandomResizedCrop | CenterCrop | Squash | Border, Field(discriminator="type")
]
EvaluationConfig = Annotated[CenterCrop | Squash | Border, Field(discriminator="type")]


def _check_ascending(**ranges: tuple[float, float]) -> None:
    for name, (low, high) in ranges.items():
        if low > high:
            raise ValueError(f"{name} begins at {low} and ends at {high}")
