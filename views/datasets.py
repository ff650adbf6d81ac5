"""Datasets as labels plus uint8 images in one fixed order, with a digest that pins them.

Images are read from disk only when asked for: to know whether a cache fits, the digest is enough.
Leaves out images of different sizes; every image here has the size of the first.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from configs.schema import Digits, ImageFolder, Packed
from views.seeds import choice

DIGITS_TRAIN_SAMPLES = 1000
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm")
_HASHED_FILES = (
    1024  # of a folder, this many files (chosen by key) enter the digest with their bytes
)


class DatasetError(ValueError):
    """A dataset that cannot be used: what is wrong and in which file or folder."""


@dataclass(frozen=True, eq=False)
class Split:
    """Samples in their fixed order; `labels` is (N,) int64.

    `read_some` maps sample ids (M,) to images (M, H, W, C) uint8.
    """

    labels: NDArray[np.int64]
    read_some: Callable[[NDArray[np.int64]], NDArray[np.uint8]]
    paths: tuple[Path, ...] | None = None  # of a folder's files, in the samples' order

    @cached_property
    def images(self) -> NDArray[np.uint8]:
        """(N, H, W, C) uint8, read at first use."""
        return self.read_some(np.arange(len(self)))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split; `digest` (sha256, hex) pins the training samples and labels."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    digest: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def load_dataset(config: Digits | ImageFolder | Packed) -> Dataset:
    """Open the dataset that `config` describes; raises DatasetError."""
    if isinstance(config, Digits):
        return _digits(config.limit)
    if isinstance(config, Packed):
        from views.packed import open_packed

        return open_packed(Path(config.file), config.limit)
    return _image_folder(Path(config.root), config.limit)


# ---- digits


def _digits(limit: int | None) -> Dataset:
    images, labels = _read_digits()
    train = np.arange(DIGITS_TRAIN_SAMPLES)
    train = train[first_per_class(labels[train], limit)]
    test = np.arange(DIGITS_TRAIN_SAMPLES, len(labels))
    digest = hashlib.sha256(images[train].tobytes() + labels[train].tobytes())
    return Dataset(
        name="digits",
        class_names=tuple("0123456789"),
        train=Split(labels[train], images[train].__getitem__),
        test=Split(labels[test], images[test].__getitem__),
        digest=digest.hexdigest(),
    )


def _read_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(1797, 8, 8, 1) uint8 and (1797,) int64.

    The table is read straight from scikit-learn's package folder, because importing scikit-learn
    takes longer than everything else that a command with nothing to do needs. Its pixels are
    0 ... 16; times 15 they span 0 ... 240 as uint8.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise DatasetError("the digits dataset comes with scikit-learn: pip install scikit-learn")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not file.is_file():
        raise DatasetError(f"this scikit-learn does not hold its digits at {file}")
    table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    images = (table[:, :64] * 15).astype(np.uint8).reshape(-1, 8, 8, 1)
    return images, np.ascontiguousarray(table[:, 64])


# ---- image folders


def _image_folder(root: Path, limit: int | None) -> Dataset:
    if not root.is_dir():
        raise DatasetError(f"dataset.root: there is no folder {root}")
    train_dir = root / "train"
    if not train_dir.is_dir():
        raise DatasetError(f"dataset.root: {root} has no folder train/ with one folder per class")
    test_dir = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if test_dir is None:
        raise DatasetError(f"dataset.root: {root} has neither a folder test/ nor a folder val/")
    class_names = _class_names(train_dir)
    train_paths, train_labels = _list_images(train_dir, class_names)
    test_paths, test_labels = _list_images(test_dir, class_names)
    kept = first_per_class(train_labels, limit)
    train_paths, train_labels = [train_paths[i] for i in kept], train_labels[kept]
    return Dataset(
        name=root.name,
        class_names=class_names,
        train=_folder_split(train_paths, train_labels),
        test=_folder_split(test_paths, test_labels),
        digest=_folder_digest(train_dir, train_paths, train_labels),
    )


def _folder_split(paths: list[Path], labels: NDArray[np.int64]) -> Split:
    return Split(labels, lambda ids: _decode_all([paths[i] for i in ids]), tuple(paths))


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    if len(names) < 2:
        found = f"only {names[0]!r}" if names else "none"
        raise DatasetError(
            f"{folder} needs a folder for each of at least two classes; found {found}"
        )
    return names


def _list_images(
    folder: Path, class_names: tuple[str, ...]
) -> tuple[list[Path], NDArray[np.int64]]:
    unknown = {entry.name for entry in folder.iterdir() if entry.is_dir()} - set(class_names)
    if unknown:
        raise DatasetError(
            f"{folder} has classes that train/ does not: {', '.join(sorted(unknown))}"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        files = _images_of_class(folder / name)
        if not files and folder.name == "train":
            raise DatasetError(f"{folder / name} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise DatasetError(f"{folder} holds no image")
    return paths, np.array(labels, dtype=np.int64)


def _images_of_class(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _folder_digest(folder: Path, paths: list[Path], labels: NDArray[np.int64]) -> str:
    """Over every relative path, size and label, and the bytes of some files chosen by key."""
    listing = [
        [path.relative_to(folder).as_posix(), path.stat().st_size, int(label)]
        for path, label in zip(paths, labels, strict=True)
    ]
    digest = hashlib.sha256(json.dumps(listing).encode())
    for index in choice(0, len(paths), min(_HASHED_FILES, len(paths))):
        digest.update(paths[index].read_bytes())
    return digest.hexdigest()


def _decode_all(paths: list[Path]) -> NDArray[np.uint8]:
    first = _decode(paths[0])
    images = np.empty((len(paths), *first.shape), dtype=np.uint8)

    def decode_into(index: int) -> None:
        image = _decode(paths[index])
        refuse_other_size(first.shape, image, str(paths[index]), str(paths[0]))
        images[index] = image

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode_into, range(len(paths))):
            pass
    return images


def refuse_other_size(
    expected: tuple[int, ...], image: NDArray[np.uint8], name: str, other: str = "the first"
) -> None:
    """Raise DatasetError, with both names, unless the image has the expected shape."""
    if image.shape != expected:
        raise DatasetError(
            f"images differ in size: {other} is {expected[1]}x{expected[0]}, {name} is "
            f"{image.shape[1]}x{image.shape[0]}; resize them to one size"
        )


def _decode(path: Path) -> NDArray[np.uint8]:
    try:
        return decode_bytes(path.read_bytes(), str(path))
    except OSError as error:
        raise DatasetError(f"cannot read the image {path}: {error}") from None


def decode_bytes(content: bytes, name: str) -> NDArray[np.uint8]:
    """An encoded image as (H, W, 3) uint8, turned upright as its EXIF orientation says.

    Raises DatasetError with `name` where it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        reason = str(error).replace(repr(content), "its content")
        raise DatasetError(f"cannot read the image {name}: {reason}") from None


def first_per_class(labels: NDArray[np.int64], limit: int | None) -> NDArray[np.int64]:
    """Indices, ascending, of the first `limit` samples of every class (all if None)."""
    if limit is None:
        return np.arange(len(labels))
    kept = [np.flatnonzero(labels == label)[:limit] for label in np.unique(labels)]
    return np.sort(np.concatenate(kept))
