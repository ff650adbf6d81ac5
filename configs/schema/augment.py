"""The block `views.augment`: what is done to an image at random."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, StrictBool, model_validator
from pydantic.dataclasses import dataclass

from teach_once.configs.schema.scalars import BLOCK, Byte, Fraction, NaturalInt, SizePx

MOST_VIEWS = 2**16  # what `views.seeds.distinct_codes` can number


Interpolation = Literal["bilinear", "bicubic"]
Share = Annotated[float, Field(strict=True, gt=0, le=1)]
Ratio = Annotated[float, Field(strict=True, ge=1e-3, le=1e3)]
Factor = Annotated[float, Field(strict=True, ge=0, le=1e3)]


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class ColorJitter:
    """Change the colors, in random order."""

    brightness: Factor = 0.0
    """Multiply the brightness by a factor in [1 - x, 1 + x]."""
    contrast: Factor = 0.0
    """Multiply the contrast by a factor in [1 - x, 1 + x]."""
    saturation: Factor = 0.0
    """Multiply the saturation by a factor in [1 - x, 1 + x]."""
    hue: Annotated[float, Field(strict=True, ge=0, le=0.5)] = 0.0
    """Shift the hue by [-x, x] of the color circle."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class TrivialAugment:
    """Apply one of 14 operations at a random strength (the "wide" space of the paper)."""

    bins: Annotated[int, Field(strict=True, ge=2, le=2**16)] = 31
    """Number of strengths."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class RandomErasing:
    """Fill one random box with a color."""

    probability: Fraction = 0.25
    """How often a box is erased."""
    scale: tuple[Share, Share] = (0.02, 0.33)
    """Smallest and largest share of the image's area."""
    ratio: tuple[Ratio, Ratio] = (0.3, 3.3)
    """Smallest and largest height divided by width."""
    fill: Annotated[tuple[Byte, ...], Field(min_length=1)] = (124, 116, 104)
    """The color, a value per channel or one for all; default: ImageNet's mean."""

    @model_validator(mode="after")
    def _ranges_ascend(self) -> RandomErasing:
        _check_ascending(scale=self.scale, ratio=self.ratio)
        return self


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Mix:
    """Mix each view with the same view of another sample; both labels count, by their shares."""

    type: Literal["mixup", "cutmix"]
    """`mixup` blends the whole images, `cutmix` pastes a box of the other one."""
    alpha: Annotated[float, Field(strict=True, ge=1e-3, le=1e3)] = 1.0
    """The shares are drawn from Beta(alpha, alpha)."""
    probability: Fraction = 1.0
    """How often a view is mixed."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Extras:
    """What may be added to any crop."""

    trivial_augment: TrivialAugment | None = None
    """One random operation on colors or geometry; `null`: none."""
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
        """Whether images are worked on one by one before a batch can be made of them."""
        recolors = self.trivial_augment is not None or self.color_jitter is not None
        return recolors or self.output_px is not None


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class PadCropFlip(Extras):
    """Pad the image and cut out a random window of the original size."""

    type: Literal["pad-crop-flip"] = "pad-crop-flip"
    """Which augmentation."""
    pad_px: NaturalInt = 4
    """Pixels added on every side."""
    padding: Literal["reflect", "zero"] = "reflect"
    """Mirror the image at its edges, or add black."""
    flip: StrictBool = True
    """Mirror a random half of the views, left to right."""

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
        """How many different views one image has; None where they cannot be counted."""
        return None if self.has_extras else self.num_crops

    @property
    def eval_transform(self) -> CenterCrop:
        """How test images are transformed by default."""
        return CenterCrop()


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class RandomResizedCrop(Extras):
    """Cut out a box of random area and aspect ratio, and resize it to a square."""

    type: Literal["random-resized-crop"] = "random-resized-crop"
    """Which augmentation."""
    size_px: SizePx = 224
    """Height and width of a view."""
    scale: tuple[Share, Share] = (0.08, 1.0)
    """Smallest and largest share of the image's area."""
    ratio: tuple[Ratio, Ratio] = (0.75, 4 / 3)
    """Smallest and largest width divided by height."""
    interpolation: Interpolation = "bilinear"
    """How pixels are resampled."""
    antialias: StrictBool = True
    """Average over the pixels that shrink into one; `false` with `bilinear` only."""
    flip: StrictBool = True
    """Mirror a random half of the views, left to right."""

    @model_validator(mode="after")
    def _possible(self) -> RandomResizedCrop:
        _check_ascending(scale=self.scale, ratio=self.ratio)
        if self.scale[1] > 1:
            raise ValueError(f"scale ends at {self.scale[1]}, more than the whole image")
        if not self.antialias and self.interpolation != "bilinear":
            raise ValueError("antialias: false exists for interpolation: bilinear only")
        return self

    @property
    def output_px(self) -> int:
        return self.size_px

    @property
    def num_distinct_views(self) -> None:
        return None

    @property
    def eval_transform(self) -> CenterCrop:
        """The middle `size_px` of an image whose short side is resized to 8/7 of that."""
        return CenterCrop(
            resize_px=round(self.size_px * 8 / 7),
            crop_px=self.size_px,
            interpolation=self.interpolation,
        )


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class CenterCrop(Extras):
    """The image unchanged, or its middle."""

    type: Literal["center-crop"] = "center-crop"
    """Which augmentation."""
    resize_px: SizePx | None = None
    """Resize the short side to so many pixels first; needs `crop_px`. `null`: do not resize."""
    crop_px: SizePx | None = None
    """Height and width of the middle that is cut out; `null`: the whole image."""
    interpolation: Interpolation = "bilinear"
    """How pixels are resampled."""
    flip: StrictBool = False
    """Mirror a random half of the views, left to right."""

    @model_validator(mode="after")
    def _crop_is_within(self) -> CenterCrop:
        if self.resize_px and not self.crop_px:
            raise ValueError("resize_px needs a crop_px, so that all views have one size")
        if self.resize_px and self.crop_px and self.crop_px > self.resize_px:
            raise ValueError(f"crop_px {self.crop_px} is more than resize_px {self.resize_px}")
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
        """The same crop, without the flip and the extras."""
        return CenterCrop(
            resize_px=self.resize_px, crop_px=self.crop_px, interpolation=self.interpolation
        )


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class _Resized(Extras):
    """A middle of one size, cut out of an image that was resized; nothing about it is random."""

    resize_px: SizePx
    """Pixels that sides are resized to first: both of them with `squash`, the long one with
    `border`."""
    crop_px: SizePx
    """Height and width of the middle that is cut out."""
    interpolation: Interpolation = "bilinear"
    """How pixels are resampled."""

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
    """The whole image resized to a square, and its middle; the proportions change."""

    type: Literal["squash"] = "squash"
    """Which augmentation."""

    @model_validator(mode="after")
    def _crop_is_within(self) -> Squash:
        if self.crop_px > self.resize_px:
            raise ValueError(f"crop_px {self.crop_px} is more than resize_px {self.resize_px}")
        return self

    @property
    def eval_transform(self) -> Squash:
        """The same, without the extras."""
        return Squash(
            resize_px=self.resize_px, crop_px=self.crop_px, interpolation=self.interpolation
        )


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Border(_Resized):
    """The whole image resized to fit into a square, with a border where it is shorter."""

    type: Literal["border"] = "border"
    """Which augmentation."""
    fill: Annotated[tuple[Byte, ...], Field(min_length=1)] = (124, 116, 104)
    """The border's color, a value per channel or one for all; default: ImageNet's mean."""

    @property
    def eval_transform(self) -> Border:
        """The same, without the extras."""
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
