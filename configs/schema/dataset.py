"""The block `dataset`: the images, and how their pixels are scaled."""

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
    """The selected samples of a dataset and the scaling of their pixels; common to all types."""

    normalization: Normalization
    """Normalization of the pixels."""
    max_per_class: PositiveInt | None = None
    """Number of training samples per class, the first ones; `null`: all."""
    max_samples: PositiveInt | None = None
    """Number of training samples, chosen by a keyed hash; `null`: all."""
    train_fraction: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0
    """Fraction of each class's training samples, chosen by a keyed hash, at least one; the others
    are not used."""
    validation_fraction: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    """Fraction of the training samples, chosen by a keyed hash, that is held out to select the best
    epoch; 0: the best epoch is selected on the test set."""

    @property
    def must_exist(self) -> bool:
        """True if the images must already be on disk, because they are not downloaded."""
        return True

    @property
    def packed_as(self) -> str | None:
        """File with the packed images, read in place of the original; None for other types."""
        return None


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Digits(Samples):
    """scikit-learn's bundled 8x8 scans: the first 1,000 train, the last 797 (other hands) test."""

    type: Literal["digits"]
    """Type of the dataset."""

    @property
    def must_exist(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Cifar(Samples):
    """CIFAR-10 or CIFAR-100 in its original form."""

    type: Literal["cifar10", "cifar100"]
    """Type of the dataset."""
    root: StrictStr = "data"
    """Folder of the files, as torchvision stores them."""
    download: StrictBool = True
    """Download them at first use."""

    @property
    def must_exist(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Pictures(Samples):
    """Samples stored as encoded images; common to all such types."""

    max_pixels: PositiveInt = 178_000_000
    """Maximum number of pixels per image; decoding takes 8 bytes of memory for each."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class ImageFolder(Pictures):
    """A tree `root/train/<class>/*` and `root/test/<class>/*` of images."""

    type: Literal["imagefolder"]
    """Type of the dataset."""
    root: StrictStr
    """Folder that contains `train/`, or with `test_fraction` the class folders themselves."""
    test: StrictStr | None = None
    """Folder of the test images in `root`; `null`: the first existing one of `test`, `val`, `valid`
    and `validation`."""
    test_fraction: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    """Fraction of the training images, chosen by a keyed hash of their names, that is held out as
    the test set if there is no folder of test images."""
    test_seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    """Seed of the hash of `test_fraction`."""
    class_names: StrictStr | None = None
    """File in `root` that lists the class folders, one per line, in the order of the teacher's
    outputs; `null`: sorted by name."""

    @model_validator(mode="after")
    def _one_test_set(self) -> ImageFolder:
        if self.test is not None and self.test_fraction:
            raise ValueError("set test or test_fraction, not both: each selects the test images")
        return self


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Images(Pictures):
    """Images without labels: all that are in a folder, at any depth."""

    type: Literal["images"]
    """Type of the dataset."""
    root: StrictStr
    """Folder of the images; links to other folders are not followed."""
    holdout_fraction: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = None
    """Fraction of the images, chosen by a keyed hash of their paths, that is held out as the test
    set; `null`: 2 %, or about 100 images if these are more, but at most 10 %."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Packed(Pictures):
    """Images packed into one file or into shards by `python -m views pack`."""

    type: Literal["packed"]
    """Type of the dataset."""
    file: StrictStr
    """The packed file, or the index of the shards."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class PackedOnce(Pictures):
    """Images without random access, which `python -m views pack NAME` must pack first."""

    packed: StrictStr
    """Destination of packing: the index of shards, such as `photos.json`, or one `.h5` file."""
    label: StrictStr | None
    """Location of the labels; `null`: the images have none."""
    holdout_fraction: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = None
    """With `label: null` and no test images: fraction of the training images, chosen by a keyed
    hash, that packing holds out as the test set; `null`: 2 %, or about 100 images if these are
    more, but at most 10 %."""

    @property
    def packed_as(self) -> str:
        return self.packed


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class WebDataset(PackedOnce):
    """Tar shards of image files, each next to its label, if any: `000017.jpg`, `000017.cls`."""

    type: Literal["webdataset"]
    """Type of the dataset."""
    root: StrictStr
    """Folder of the shards; samples are ordered by shard name."""
    train: StrictStr = "*train*.tar"
    """Names of the training shards, with wildcards."""
    test: StrictStr | None = None
    """Names of the test shards; `null`: `*test*.tar`, or `*val*.tar` if there are none."""
    label: StrictStr | None = "cls"
    """Extension of the label files; `json.label` reads the key `label` of a `.json` file; `null`:
    the images have no labels, and label files are not read."""
    class_names: StrictStr | None = None
    """File in `root` with one class name per line, if labels are numbers; `null`: the numbers are
    the names."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class HuggingFace(PackedOnce):
    """A dataset of the package `datasets`, which packing requires."""

    type: Literal["huggingface"]
    """Type of the dataset."""
    path: StrictStr
    """Folder written by `save_to_disk`, or the name of a dataset to download."""
    subset: StrictStr | None = None
    """Configuration of the dataset, if its name has several."""
    train: StrictStr = "train"
    """Name of the training split."""
    test: StrictStr | None = None
    """Name of the test split; `null`: `test`, or `validation` if there is no `test`."""
    image: StrictStr = "image"
    """Column of the images."""
    label: StrictStr | None = "label"
    """Column of the labels: class labels, integers or names; `null`: the images have no labels."""


DatasetConfig = Annotated[
    Digits | Cifar | ImageFolder | Images | Packed | WebDataset | HuggingFace,
    Field(discriminator="type"),
]
