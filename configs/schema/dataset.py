"""The block `dataset`: which images, and how their pixels are scaled."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictStr, model_validator
from pydantic.dataclasses import dataclass

from configs.schema.scalars import BLOCK, Float, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Normalisation:
    """Per-channel mean and standard deviation of pixel values scaled to [0, 1]."""

    mean: Annotated[tuple[Float, ...], Field(min_length=1)]
    std: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _same_length(self) -> Normalisation:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std has {len(self.std)}")
        return self


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Samples:
    """Which samples of a dataset are used, and how their pixels are scaled; common to all types."""

    normalisation: Normalisation
    limit: PositiveInt | None = None  # training samples kept per class, the first ones
    # Of the training samples, held out by a keyed hash; the best epoch is then chosen on them
    # instead of on the test set.
    validation_fraction: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0

    @property
    def must_exist(self) -> bool:
        """Whether the images must already be on the disk, since nothing downloads them."""
        return True


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Digits(Samples):
    """scikit-learn's bundled 8x8 scans: the first 1,000 train, the last 797 (other hands) test."""

    type: Literal["digits"]

    @property
    def must_exist(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Cifar(Samples):
    """CIFAR-10 or CIFAR-100 in its original form, downloaded to `root` at first use."""

    type: Literal["cifar10", "cifar100"]
    root: StrictStr = "data"
    download: StrictBool = True

    @property
    def must_exist(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class ImageFolder(Samples):
    """A tree `root/train/<class>/*` and `root/test/<class>/*` (or `val/`) of images."""

    type: Literal["imagefolder"]
    root: StrictStr


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Packed(Samples):
    """A file that `python -m views pack` made of an image folder."""

    type: Literal["packed"]
    file: StrictStr


DatasetConfig = Annotated[Digits | Cifar | ImageFolder | Packed, Field(discriminator="type")]
