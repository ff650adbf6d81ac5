"""Image folders: a tree of encoded files, decoded when asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.schema import ImageFolder
from views.pictures import decode_bytes, is_large, read_picture, shown_path
from views.seeds import choice
from views.splits import (
    Checksums,
    DatasetError,
    Source,
    Split,
    crc32c,
    refuse_other_size,
)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm")
_READERS = 16  # threads, which wait for the disk most of the time
HASHED_FILES = 1024  # so many files, chosen by key, enter the digest with their bytes


def image_folder(root: Path, max_pixels: int = ImageFolder.max_pixels) -> Source:
    """`root/train/<class>/*` and `root/test/<class>/*` (or `val/`), in the order of the names.

    Links are followed: of images to regular files only. Raises DatasetError.
    """
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
    return Source(
        name=root.name,
        type="imagefolder",
        class_names=class_names,
        train=_folder_split(train_paths, train_labels, max_pixels),
        test=_folder_split(test_paths, test_labels, max_pixels),
        digest_of=lambda ids: _folder_digest([train_paths[i] for i in ids], train_labels[ids]),
        test_digest=lambda: _folder_digest(test_paths, test_labels),
    )


def _folder_split(paths: list[Path], labels: NDArray[np.int64], max_pixels: int) -> Split:
    def decode(path: Path) -> tuple[NDArray[np.uint8], int]:
        content = read_picture(path)
        return decode_bytes(content, shown_path(path), max_pixels), crc32c(content)

    return Split(
        labels,
        load=lambda ids: _decode_all([paths[i] for i in ids], decode),
        read_each=lambda ids: (decode(paths[i]) for i in ids),
        read_checksums=lambda ids: _checksums_of([paths[i] for i in ids]),
        name_of=lambda sample: shown_path(paths[sample]),
        paths=tuple(paths),
    )


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


def relative_name(path: Path) -> str:
    """`<class>/<file>`, what a digest and a packed file call an image."""
    return f"{path.parent.name}/{path.name}"


def _folder_digest(paths: list[Path], labels: NDArray[np.int64]) -> str:
    names, sizes = map(relative_name, paths), (path.stat().st_size for path in paths)
    return digest_of_files(names, sizes, labels, lambda index: paths[index].read_bytes())


def digest_of_files(
    names: Iterable[str],
    sizes: Iterable[int],
    labels: NDArray[np.int64],
    read: Callable[[int], bytes],
) -> str:
    """Over every file's name, size and label, and the bytes of some, chosen by key."""
    listing = [list(entry) for entry in zip(names, sizes, labels.tolist(), strict=True)]
    digest = hashlib.sha256(json.dumps(listing).encode())
    for index in choice(0, len(listing), min(HASHED_FILES, len(listing))):
        digest.update(read(int(index)))
    return digest.hexdigest()


def _decode_all(
    paths: list[Path], decode: Callable[[Path], tuple[NDArray[np.uint8], int]]
) -> tuple[NDArray[np.uint8], Checksums]:
    first, _ = decode(paths[0])
    images = np.empty((len(paths), *first.shape), dtype=np.uint8)
    checksums = np.empty(len(paths), dtype=np.uint32)

    def decode_into(index: int) -> None:
        image, checksums[index] = decode(paths[index])
        refuse_other_size(first.shape, image, shown_path(paths[index]), shown_path(paths[0]))
        images[index] = image

    # Each thread would keep the memory that one image has taken.
    most_threads = 1 if is_large(first.shape) else None
    with ThreadPoolExecutor(most_threads) as pool:
        for _ in pool.map(decode_into, range(len(paths))):
            pass
    return images, checksums


def _checksums_of(paths: list[Path]) -> Checksums:
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda path: crc32c(read_picture(path)), paths)
        return np.fromiter(found, dtype=np.uint32, count=len(paths))
