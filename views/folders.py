"""Image folders: a tree of encoded files, decoded when asked for."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

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


def image_folder(root: Path) -> Source:
    """`root/train/<class>/*` and `root/test/<class>/*` (or `val/`), in the order of the names."""
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
        train=_folder_split(train_paths, train_labels),
        test=_folder_split(test_paths, test_labels),
        digest_of=lambda ids: _folder_digest([train_paths[i] for i in ids], train_labels[ids]),
        test_digest=lambda: _folder_digest(test_paths, test_labels),
    )


def _folder_split(paths: list[Path], labels: NDArray[np.int64]) -> Split:
    return Split(
        labels,
        load=lambda ids: _decode_all([paths[i] for i in ids]),
        read_each=lambda ids: (_decode(paths[i]) for i in ids),
        read_checksums=lambda ids: _checksums_of([paths[i] for i in ids]),
        name_of=lambda sample: str(paths[sample]),
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


def _decode_all(paths: list[Path]) -> tuple[NDArray[np.uint8], Checksums]:
    first, _ = _decode(paths[0])
    images = np.empty((len(paths), *first.shape), dtype=np.uint8)
    checksums = np.empty(len(paths), dtype=np.uint32)

    def decode_into(index: int) -> None:
        image, checksums[index] = _decode(paths[index])
        refuse_other_size(first.shape, image, str(paths[index]), str(paths[0]))
        images[index] = image

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode_into, range(len(paths))):
            pass
    return images, checksums


def _decode(path: Path) -> tuple[NDArray[np.uint8], int]:
    """A file's image and the crc32c of its bytes."""
    content = _content(path)
    return decode_bytes(content, str(path)), crc32c(content)


def _checksums_of(paths: list[Path]) -> Checksums:
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda path: crc32c(_content(path)), paths)
        return np.fromiter(found, dtype=np.uint32, count=len(paths))


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"cannot read the image {path}: {error}") from None


def decode_bytes(content: bytes, name: str) -> NDArray[np.uint8]:
    """An encoded image as (H, W, 3) uint8, turned upright as its EXIF orientation says.

    Grey becomes RGB of equal channels, of 16 bits their upper 8; transparency is dropped, as
    torchvision's loader does. Raises DatasetError with `name` where it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            upright = _of_eight_bits(ImageOps.exif_transpose(image), image.format, name)
            if upright.mode == "P" and "transparency" in upright.info:
                upright = upright.convert("RGBA")  # from a palette, Pillow drops it only this way
            return np.asarray(upright.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        reason = str(error).replace(repr(content), "its content")
        raise DatasetError(f"cannot read the image {name}: {reason}") from None


def _of_eight_bits(image: Image.Image, file_format: str | None, name: str) -> Image.Image:
    """Grey of 16 bits as 8; Pillow would clip it, and most of it would be white.

    Pillow reads such PNG files in mode I;16 and such PGM files, scaled to 16 bits, in mode I.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DatasetError(
            f"{name} holds numbers of 32 bits (Pillow's mode {image.mode}), of which nothing says "
            f"what is black and what white\n  fix: convert it to grey or RGB of 8 or 16 bits"
        )
    return image
