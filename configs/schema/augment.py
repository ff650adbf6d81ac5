"""The block `views.augment`: what is done to an image at random."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, StrictBool, model_validator
from pydantic.dataclasses import dataclass

from configs.schema.scalars import (
    BLOCK,
    Byte,
    Fraction,
    NaturalInt,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)

MOST_VIEWS = 2**16  # what `views.seeds.distinct_codes` can number


Interpolation = Literal["bilinear", "bicubic"]
Range = tuple[PositiveFloat, PositiveFloat]


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class ColourJitter:
    """Brightness, contrast and saturation by a factor in [1 - x, 1 + x], hue by [-x, x] turns."""

    brightness: NonNegativeFloat = 0.0
    contrast: NonNegativeFloat = 0.0
    saturation: NonNegativeFloat = 0.0
    hue: Annotated[float, Field(strict=True, ge=0, le=0.5)] = 0.0


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class TrivialAugment:
    """One of 14 operations at one of `bins` strengths (the "wide" space of the paper)."""

    bins: Annotated[int, Field(strict=True, ge=2)] = 31


@dataclass(frozen=True, kw_only=True, config=BLOCK)
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


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Mix:
    """Mix each view with the same view of another sample; labels become a pair of weights.

    The share of the other sample is drawn from Beta(alpha, alpha). mixup blends the whole images,
    cutmix pastes a box of the other one.
    """

    kind: Literal["mixup", "cutmix"]
    alpha: PositiveFloat = 1.0
    probability: Fraction = 1.0


@dataclass(frozen=True, kw_only=True, config=BLOCK)
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

    @property
    def output_px(self) -> int | None:
        """Height and width of a view; None: those of the image."""
        return None

    @property
    def needs_pillow(self) -> bool:
        """Whether images are worked on one by one before a batch can be made of them."""
        recolours = self.trivial_augment is not None or self.colour_jitter is not None
        return recolours or self.output_px is not None


@dataclass(frozen=True, kw_only=True, config=BLOCK)
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
        """How many different views one image has; None where they cannot be counted."""
        return None if self.has_extras else self.num_crops

    @property
    def eval_transform(self) -> Centre:
        """How test images are transformed by default."""
        return Centre()


@dataclass(frozen=True, kw_only=True, config=BLOCK)
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
    def output_px(self) -> int:
        return self.size_px

    @property
    def num_distinct_views(self) -> None:
        return None

    @property
    def eval_transform(self) -> Centre:
        """The middle `size_px` of an image whose short side is resized to 8/7 of that."""
        return Centre(
            resize_px=round(self.size_px * 8 / 7),
            crop_px=self.size_px,
            interpolation=self.interpolation,
        )


@dataclass(frozen=True, kw_only=True, config=BLOCK)
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
    def output_px(self) -> int | None:
        return self.crop_px

    @property
    def num_crops(self) -> int:
        return 2 if self.flip else 1

    @property
    def num_distinct_views(self) -> int | None:
        return None if self.has_extras else self.num_crops

    @property
    def eval_transform(self) -> Centre:
        """The same crop, without the flip and the extras."""
        return Centre(
            resize_px=self.resize_px, crop_px=self.crop_px, interpolation=self.interpolation
        )


AugmentConfig = Annotated[PadCropFlip | RandomResizedCrop | Centre, Field(discriminator="kind")]


def _check_ascending(**ranges: tuple[float, float]) -> None:
    for name, (low, high) in ranges.items():
        if low > high:
            raise ValueError(f"{name} begins at {low} and ends at {high}")
