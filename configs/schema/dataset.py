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
    """Mean of each channel."""
    std: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    """Standard deviation of each channel."""

    @model_validator(mode="after")
    def _same_length(self) -> Normalisation:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std has {len(self.std)}")
        return self


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Samples:
    """Which samples of a dataset are used, and how their pixels are scaled; common to all types."""

    normalisation: Normalisation
    """How pixels are scaled."""
    limit: PositiveInt | None = None
    """Training samples per class, the first ones; `null`: all."""
    validation_fraction: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    """Share of the training samples, chosen by a keyed hash, that is held out to choose the best
    epoch on; 0: it is chosen on the test set."""

    @property
    def must_exist(self) -> bool:
        """Whether the images must already be on the disk, since nothing downloads them."""
        return True


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Digits(Samples):
    """scikit-learn's bundled 8x8 scans: the first 1,000 train, the last 797 (other hands) test."""

    type: Literal["digits"]
    """Which dataset."""

    @property
    def must_exist(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Cifar(Samples):
    """CIFAR-10 or CIFAR-100 in its original form."""

    type: Literal["cifar10", "cifar100"]
    """Which dataset."""
    root: StrictStr = "data"
    """Folder of the files as torchvision stores them."""
    download: StrictBool = True
    """Download them at first use."""

    @property
    def must_exist(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Pictures(Samples):
    """Samples that are encoded images; common to all such types."""

    max_pixels: PositiveInt = 178_000_000
    """An image with more pixels is refused: decoding takes 8 bytes of memory for each."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class ImageFolder(Pictures):
    """A tree `root/train/<class>/*` and `root/test/<class>/*` (or `val/`) of images."""

    type: Literal["imagefolder"]
    """Which dataset."""
    root: StrictStr
    """The folder that holds `train/`."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Packed(Pictures):
    """Images packed into one file, or into shards, by `python -m views pack`."""

    type: Literal["packed"]
    """Which dataset."""
    file: StrictStr
    """The packed file, or the index of the shards."""


DatasetConfig = Annotated[Digits | Cifar | ImageFolder | Packed, Field(discriminator="type")]
