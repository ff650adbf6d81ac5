"""The block `dataset`: which images, and how their pixels are scaled."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictStr, model_validator
from pydantic.dataclasses import dataclass

from teach_once.configs.schema.scalars import BLOCK, Float, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Normalization:
    """Per-channel mean and standard deviation of pixel values scaled to [0, 1]."""

    mean: Annotated[tuple[Float, ...], Field(min_length=1)]
    """Mean of each channel."""
    std: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    """Standard deviation of each channel."""

    @model_validator(mode="after")
    def _same_length(self) -> Normalization:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std has {len(self.std)}")
        return self

    @model_validator(mode="after")
    def _of_scaled_pixels(self) -> Normalization:
        for key, values in (("mean", self.mean), ("std", self.std)):
            if not all(0 <= value <= 1 for value in values):
                of_bytes = all(0 <= value <= 255 for value in (*self.mean, *self.std))
                scaled = ", ".join(f"{value / 255:.4g}" for value in values)
                advice = f"; divided by 255: {key}=[{scaled}]" if of_bytes else ""
                raise ValueError(
                    f"{key} is {list(values)}, but pixels are scaled to [0, 1]{advice}"
                )
        return self


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Samples:
    """Which samples of a dataset are used, and how their pixels are scaled; common to all types."""

    normalization: Normalization
    """How pixels are scaled."""
    max_per_class: PositiveInt | None = None
    """Training samples per class, the first ones; `null`: all."""
    validation_fraction: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    """Share of the training samples, chosen by a keyed hash, that is held out to choose the best
    epoch on; 0: it is chosen on the test set."""

    @property
    def must_exist(self) -> bool:
        """Whether the images must already be on the disk, since nothing downloads them."""
        return True

    @property
    def packed_as(self) -> str | None:
        """The packed form that is read in the place of the original; None: there is none."""
        return None


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
    """A tree `root/train/<class>/*` and `root/test/<class>/*` of images."""

    type: Literal["imagefolder"]
    """Which dataset."""
    root: StrictStr
    """The folder that holds `train/`; with `test_fraction` it may hold the classes' folders."""
    test: StrictStr | None = None
    """Folder of the test images in `root`; `null`: the first of `test`, `val`, `valid` and
    `validation` that exists."""
    test_fraction: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    """Fraction of the training images that is held out as the test set, chosen by a keyed hash of
    their names, where there is no folder of test images."""
    test_seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    """Seed of that hash."""
    class_names: StrictStr | None = None
    """File in `root` that lists the classes' folders, one a line, in the order of the teacher's
    outputs; `null`: the order of their text."""

    @model_validator(mode="after")
    def _one_test_set(self) -> ImageFolder:
        if self.test is not None and self.test_fraction:
            raise ValueError("test names a folder of test images and test_fraction chooses others")
        return self


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Packed(Pictures):
    """Images packed into one file, or into shards, by `python -m views pack`."""

    type: Literal["packed"]
    """Which dataset."""
    file: StrictStr
    """The packed file, or the index of the shards."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class PackedOnce(Pictures):
    """Images of a form without random access, which `python -m views pack NAME` packs first."""

    packed: StrictStr
    """Where they are packed to: the index of shards, as in `photos.json`, or one file, `.h5`."""

    @property
    def packed_as(self) -> str:
        return self.packed


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class WebDataset(PackedOnce):
    """Tar shards of image files, each with a label beside it: `000017.jpg`, `000017.cls`."""

    type: Literal["webdataset"]
    """Which dataset."""
    root: StrictStr
    """Folder of the shards; their names' order is the samples'."""
    train: StrictStr = "*train*.tar"
    """Names of the training shards, with wildcards."""
    test: StrictStr | None = None
    """Names of the test shards; `null`: `*test*.tar`, or `*val*.tar` where there are none."""
    label: StrictStr = "cls"
    """What the label's file ends with; `json.label`: the key `label` in a `.json` file."""
    class_names: StrictStr | None = None
    """File in `root` with the name of a class on each line, where labels are numbers; `null`: the
    numbers are their names."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class HuggingFace(PackedOnce):
    """A dataset of the `datasets` package, which packing needs."""

    type: Literal["huggingface"]
    """Which dataset."""
    path: StrictStr
    """Folder that `save_to_disk` wrote, or the name of a dataset to download."""
    subset: StrictStr | None = None
    """Its configuration, where a name has several."""
    train: StrictStr = "train"
    """Name of the training split."""
    test: StrictStr | None = None
    """Name of the test split; `null`: `test`, or `validation` where there is none."""
    image: StrictStr = "image"
    """Column of the images."""
    label: StrictStr = "label"
    """Column of the labels: classes, whole numbers or names."""


DatasetConfig = Annotated[
    Digits | Cifar | ImageFolder | Packed | WebDataset | HuggingFace, Field(discriminator="type")
]
