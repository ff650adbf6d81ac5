"""Datasets that are arrays: digits, which come with scikit-learn, and CIFAR, through torchvision.

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
    """scikit-learn's bundled 8x8 scans."""
    images, labels = _read_digits()
    n = DIGITS_TRAIN_SAMPLES
    return _source("digits", tuple("0123456789"), images[:n], labels[:n], images[n:], labels[n:])


def cifar(config: Cifar) -> ImageSource:
    """CIFAR-10 or CIFAR-100 as torchvision keeps it on disk; downloaded once if it is missing.

    torchvision compares every file with its published MD5 before it reads it.
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
        pass  # not there, or not whole
    if not config.download:
        raise DatasetError(
            f"dataset.root: {config.root} does not hold {config.type}, or a damaged one; "
            f"put {kind.filename} there, unpacked, or set dataset.download=true"
        )
    try:
        return kind(config.root, train=train, download=True)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        raise DatasetError(
            f"{config.type} cannot be downloaded from {kind.url} to {config.root}: {error}\n  "
            f"fix: put {kind.filename} there by hand and run again"
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
    """(1797, 8, 8, 1) uint8 and (1797,) int64.

    The table is read straight from scikit-learn's package folder, because importing scikit-learn
    takes longer than everything else that a command with nothing to do needs. Its pixels are
    0 ... 16; times 15 they span 0 ... 240 as uint8.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise DatasetError(
            "the digits dataset comes with scikit-learn", fix=pip_install("scikit-learn")
        )
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not file.is_file():
        raise DatasetError(f"this scikit-learn does not hold its digits at {file}")
    table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    images = (table[:, :64] * 15).astype(np.uint8).reshape(-1, 8, 8, 1)
    return images, np.ascontiguousarray(table[:, 64])
