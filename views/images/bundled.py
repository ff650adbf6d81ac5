"""Datasets stored as arrays: digits, bundled with scikit-learn, and CIFAR, through torchvision.

Their digest covers every byte.
"""

from __future__ import annotations

import hashlib
import importlib.util
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from teach_once.configs.schema import Cifar
from teach_once.runtime.command.program import pip_install
from teach_once.views.splits import DatasetError, Ids, ImageSource, array_split

DIGITS_TRAIN_SAMPLES = 1000

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10


def digits() -> ImageSource:
    """Open scikit-learn's bundled 8x8 scans of digits."""
    images, labels = _read_digits()
    n = DIGITS_TRAIN_SAMPLES
    return _source("digits", tuple("0123456789"), images[:n], labels[:n], images[n:], labels[n:])


def cifar(config: Cifar) -> ImageSource:
    """Open CIFAR-10 or CIFAR-100 in torchvision's format; downloads it once if it is missing.

    torchvision checks the published MD5 of every file before reading it. Raises DatasetError if the
    files are missing or damaged.
    """
    from teach_once.runtime.machine.torchvision_shim import import_torchvision

    import_torchvision()
    from torchvision import datasets

    kind = datasets.CIFAR10 if config.type == "cifar10" else datasets.CIFAR100
    train, test = (_read_cifar(kind, config, train=train) for train in (True, False))
    return _source(
        config.type,
        tuple(train.classes),
        train.data,
        np.array(train.targets, dtype=np.int64),
        test.data,
        np.array(test.targets, dtype=np.int64),
    )


def _read_cifar(kind: type[CIFAR10], config: Cifar, *, train: bool) -> CIFAR10:
    try:
        return kind(config.root, train=train)
    except RuntimeError:
        pass  # missing or incomplete
    if not config.download:
        raise DatasetError(
            f"dataset.root: {config.type} in {config.root} is missing or damaged",
            fix=f"put {kind.filename} there, unpacked, or set dataset.download=true",
        )
    try:
        return kind(config.root, train=train, download=True)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        raise DatasetError(
            f"{config.type} cannot be downloaded from {kind.url} to {config.root}: {error}",
            fix=f"put {kind.filename} there and run the command again",
        ) from None


def _source(
    name: str,
    class_names: tuple[str, ...],
    train_images: NDArray[np.uint8],
    train_labels: Ids,
    test_images: NDArray[np.uint8],
    test_labels: Ids,
) -> ImageSource:
    def digest(images: NDArray[np.uint8], labels: Ids) -> str:
        return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()

    return ImageSource(
        name,
        name,
        class_names,
        train=array_split(train_images, train_labels, name),
        test=array_split(test_images, test_labels, f"{name}, test"),
        digest_of=lambda ids: digest(train_images[ids], train_labels[ids]),
        test_digest=lambda: digest(test_images, test_labels),
    )


def _read_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return (1797, 8, 8, 1) uint8 images and (1797,) int64 labels.

    The table is read directly from scikit-learn's folder, because importing scikit-learn takes
    longer than all other work of a command that has nothing to do. Its pixels are 0 ... 16;
    multiplied by 15 they are 0 ... 240 in uint8.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise DatasetError(
            "the digits dataset comes with scikit-learn", fix=pip_install("scikit-learn")
        )
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not file.is_file():
        raise DatasetError(f"scikit-learn's digits not found at {file}")
    table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    images = (table[:, :64] * 15).astype(np.uint8).reshape(-1, 8, 8, 1)
    return images, np.ascontiguousarray(table[:, 64])
