"""Image folders: a tree of encoded files, decoded when asked for."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.schema import ImageFolder
from views.listing import IMAGE_SUFFIXES, Listing, kept_digest, listing_of
from views.pictures import decode_bytes, decode_picture, is_large, read_picture, shown_path
from views.seeds import choice
from views.splits import (
    Checksums,
    DatasetError,
    Decoded,
    Ids,
    Source,
    Split,
    crc32c,
    refuse_other_size,
)

_READERS = 16  # threads, which wait for the disk most of the time
_ENTRIES_AT_ONCE = 65_536
HASHED_FILES = 1024  # so many files, chosen by key, enter the digest with their bytes


def image_folder(
    root: Path, max_pixels: int = ImageFolder.max_pixels, kept_in: Path | None = None
) -> Source:
    """`root/train/<class>/*` and `root/test/<class>/*` (or `val/`), in the order of the names.

    Links are followed: of images to regular files only. kept_in: the folder of caches beside which
    the listing is stored; see `views.listing`. Raises DatasetError.
    """
    if not root.is_dir():
        raise DatasetError(f"dataset.root: there is no folder {root}")
    train_dir = root / "train"
    if not train_dir.is_dir():
        raise DatasetError(f"dataset.root: {root} has no folder train/ with one folder per class")
    test_dir = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if test_dir is None:
        raise DatasetError(f"dataset.root: {root} has neither a folder test/ nor a folder val/")
    train = listing_of(train_dir, None, kept_in)
    _refuse_empty_classes(train)
    test = listing_of(test_dir, train.class_names, kept_in)
    if not len(test):
        raise DatasetError(f"{test_dir} holds no image")
    return Source(
        name=root.name,
        type="imagefolder",
        class_names=train.class_names,
        train=_folder_split(train, max_pixels),
        test=_folder_split(test, max_pixels),
        digest_of=lambda ids: _folder_digest(train, ids, kept_in),
        test_digest=lambda: _folder_digest(test, np.arange(len(test)), kept_in),
    )


def _refuse_empty_classes(train: Listing) -> None:
    counts = np.bincount(train.labels, minlength=len(train.class_names))
    for name in np.array(train.class_names)[counts == 0][:1]:
        raise DatasetError(f"{train.folder / name} holds no image ({', '.join(IMAGE_SUFFIXES)})")


def _folder_split(listing: Listing, max_pixels: int) -> Split:
    paths = listing.paths

    def decode(path: Path) -> tuple[NDArray[np.uint8], int]:
        content = read_picture(path)
        return decode_bytes(content, shown_path(path), max_pixels), crc32c(content)

    def opened(path: Path) -> tuple[Decoded, int]:
        content = read_picture(path)
        return decode_picture(content, shown_path(path), max_pixels), crc32c(content)

    return Split(
        listing.labels,
        load=lambda ids: _decode_all([paths[i] for i in ids], decode),
        read_each=lambda ids: (decode(paths[i]) for i in ids),
        read_checksums=lambda ids: _checksums_of([paths[i] for i in ids]),
        name_of=lambda sample: shown_path(paths[sample]),
        open_each=lambda ids: (opened(paths[i]) for i in ids),
        paths=paths,
    )


def relative_name(path: Path) -> str:
    """`<class>/<file>`, what a digest and a packed file call an image."""
    return f"{path.parent.name}/{path.name}"


def _folder_digest(listing: Listing, ids: Ids, kept_in: Path | None) -> str:
    def hashed() -> Iterator[bytes]:
        return (read_picture(listing.path(int(ids[i]))) for i in hashed_files(len(ids)))

    def compute() -> str:
        names, sizes, labels = listing.relative_names(ids), listing.sizes[ids], listing.labels[ids]
        return digest_of_files(names, sizes.tolist(), labels, hashed())

    key = hashlib.sha256(listing.fingerprint(ids))
    for content in hashed():
        key.update(content)
    return kept_digest(key.digest(), compute, kept_in)


def hashed_files(num_files: int) -> Ids:
    """The files, chosen by key, whose bytes enter the digest."""
    return choice(0, num_files, min(HASHED_FILES, num_files))


def digest_of_files(
    names: Iterable[str],
    sizes: Iterable[int],
    labels: NDArray[np.int64],
    hashed: Iterable[bytes],
) -> str:
    """Over every file's name, size and label, and the bytes of `hashed_files`."""
    entries = zip(names, sizes, labels.tolist(), strict=True)
    digest, separator = hashlib.sha256(b"["), ""
    while some := list(itertools.islice(entries, _ENTRIES_AT_ONCE)):
        digest.update((separator + json.dumps(some)[1:-1]).encode())  # tuples as lists
        separator = ", "
    digest.update(b"]")
    for content in hashed:
        digest.update(content)
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
