"""Image folders: trees of encoded files, with or without classes, decoded when they are read."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from teach_once.configs.schema import ImageFolder
from teach_once.runtime.command.program import program_text
from teach_once.views.images.decode import (
    check_header,
    decode_bytes,
    decode_picture,
    is_large,
    read_picture,
    shown_path,
)
from teach_once.views.images.folder_layout import (
    FolderLayout,
    FolderSplits,
    ListedSplit,
    find_splits,
    list_labeled,
    split_unlabeled,
)
from teach_once.views.images.listing import Listing, kept_digest
from teach_once.views.seeds import choice
from teach_once.views.splits import (
    DatasetError,
    Decoded,
    Digests,
    Ids,
    ImageSource,
    Split,
    check_same_size,
    sample_digest,
    stack_digests,
)

_AT_ONCE = 1024
_MOST_LISTED = 20
_HEADER_READERS = 16


def check_headers(paths: Iterable[Path], max_pixels: int) -> None:
    """Raise DatasetError that lists all files that do not begin like images."""
    faults: list[str] = []
    with ThreadPoolExecutor(_HEADER_READERS) as pool:
        waiting: list[Path] = []
        for path in paths:
            waiting.append(path)
            if len(waiting) == _AT_ONCE:
                faults += filter(None, pool.map(lambda each: _fault(each, max_pixels), waiting))
                waiting = []
        faults += filter(None, pool.map(lambda each: _fault(each, max_pixels), waiting))
    if faults:
        more = len(faults) - _MOST_LISTED
        listed = "\n  ".join(faults[:_MOST_LISTED] + ([f"... {more:,} more"] if more > 0 else []))
        count = "an image" if len(faults) == 1 else f"{len(faults):,} images"
        raise DatasetError(
            f"{count} cannot be read:\n  {listed}",
            fix=f"replace or remove them; {program_text('views')} check NAME decodes every image",
        )


def _fault(path: Path, max_pixels: int) -> str | None:
    try:
        check_header(path, max_pixels)
    except DatasetError as error:
        return error.problem
    return None


_READERS = 16  # threads, which mostly wait for the disk
_ENTRIES_AT_ONCE = 65_536
HASHED_FILES = 1024  # number of files, chosen by key, whose bytes enter the digest


def image_folder(
    root: Path,
    max_pixels: int = ImageFolder.max_pixels,
    kept_in: Path | None = None,
    layout: FolderLayout | None = None,
) -> ImageSource:
    """Open `root/train/<class>/*` and `root/test/<class>/*`, in the order of the names.

    Links to regular files are followed for images. kept_in: the folder of caches next to which the
    listing is stored; see `views.images.listing`. layout: the folder of the test images, or how
    they are chosen. Raises DatasetError if the folders cannot be used.
    """
    found = find_splits(root, layout or FolderLayout(), kept_in)
    return _source_of(found, root.name, "imagefolder", max_pixels, kept_in)


def labeled_folders(
    train: Path, test: Path, max_pixels: int = ImageFolder.max_pixels, kept_in: Path | None = None
) -> ImageSource:
    """Open `train/<class>/*` and `test/<class>/*`, two folders anywhere, as `image_folder` does."""
    found = list_labeled(train, test, kept_in)
    return _source_of(found, train.name, "imagefolder", max_pixels, kept_in)


def unlabeled_images(
    root: Path,
    max_pixels: int = ImageFolder.max_pixels,
    kept_in: Path | None = None,
    holdout_fraction: float | None = None,
) -> ImageSource:
    """Open all images below `root`, without labels, in the order of the bytes of their paths.

    Links to folders are not followed. The arguments are as in `image_folder` and in
    `views.images.folder_layout.split_unlabeled`. Raises DatasetError if they cannot be used.
    """
    found = split_unlabeled(root, holdout_fraction, kept_in)
    return _source_of(found, root.name, "images", max_pixels, kept_in)


def _source_of(
    found: FolderSplits, name: str, dataset_type: str, max_pixels: int, kept_in: Path | None
) -> ImageSource:
    train, test = found.train, found.test
    return ImageSource(
        name=name,
        type=dataset_type,
        class_names=None if train.listing.labels is None else train.listing.class_names,
        train=_split_of(train, max_pixels),
        test=_split_of(test, max_pixels),
        digest_of=lambda ids: _folder_digest(train.listing, train.ids[ids], kept_in),
        test_digest=lambda: _folder_digest(test.listing, test.ids, kept_in),
        hints=found.hints,
        order_hint=found.order_hint,
        check_headers=lambda: _check_headers((train.listing, test.listing), max_pixels, kept_in),
    )


def _check_headers(listings: Sequence[Listing], max_pixels: int, kept_in: Path | None) -> None:
    """Check every file's header once; unchanged folders are not checked again."""
    key = hashlib.sha256(b"headers" + str(max_pixels).encode())
    for listing in listings:
        key.update(listing.fingerprint(np.arange(len(listing))))

    def check() -> str:
        paths = itertools.chain.from_iterable(listing.paths for listing in listings)
        check_headers(paths, max_pixels)
        return "0" * 64

    kept_digest(key.digest(), check, kept_in)


def _split_of(part: ListedSplit, max_pixels: int) -> Split:
    whole = _folder_split(part.listing, max_pixels)
    return whole if len(part.ids) == len(part.listing) else whole.subset(part.ids)


def _folder_split(listing: Listing, max_pixels: int) -> Split:
    paths = listing.paths

    def decode(path: Path) -> tuple[NDArray[np.uint8], bytes]:
        content = read_picture(path)
        return decode_bytes(content, shown_path(path), max_pixels), sample_digest(content)

    def opened(path: Path) -> tuple[Decoded, bytes]:
        content = read_picture(path)
        return decode_picture(content, shown_path(path), max_pixels), sample_digest(content)

    return Split(
        listing.labels,
        load=lambda ids: _decode_all([paths[i] for i in ids], decode),
        read_each=lambda ids: (decode(paths[i]) for i in ids),
        read_digests=lambda ids: _read_digests([paths[i] for i in ids]),
        name_of=lambda sample: shown_path(paths[sample]),
        open_each=lambda ids: (opened(paths[i]) for i in ids),
        paths=paths,
        folder=listing.folder,
        num_unlabeled=len(listing) if listing.labels is None else 0,
    )


def _folder_digest(listing: Listing, ids: Ids, kept_in: Path | None) -> str:
    def hashed() -> Iterator[bytes]:
        return (read_picture(listing.path(int(ids[i]))) for i in hashed_files(len(ids)))

    def compute() -> str:
        names, sizes = listing.relative_names(ids), listing.sizes[ids]
        labels = None if listing.labels is None else listing.labels[ids]
        return digest_of_files(names, sizes.tolist(), labels, hashed())

    key = hashlib.sha256(listing.fingerprint(ids))
    for content in hashed():
        key.update(content)
    return kept_digest(key.digest(), compute, kept_in)


def hashed_files(num_files: int) -> Ids:
    """Return the files, chosen by key, whose bytes enter the digest."""
    return choice(0, num_files, min(HASHED_FILES, num_files))


def digest_of_files(
    names: Iterable[str],
    sizes: Iterable[int],
    labels: Ids | None,
    hashed: Iterable[bytes],
) -> str:
    """Hash every file's name, size and label if it has one, and the bytes of `hashed_files`."""
    columns = [names, sizes] if labels is None else [names, sizes, labels.tolist()]
    entries = zip(*columns, strict=True)
    digest, separator = hashlib.sha256(b"["), ""
    while some := list(itertools.islice(entries, _ENTRIES_AT_ONCE)):
        digest.update((separator + json.dumps(some)[1:-1]).encode())  # tuples become lists
        separator = ", "
    digest.update(b"]")
    for content in hashed:
        digest.update(content)
    return digest.hexdigest()


def _decode_all(
    paths: list[Path], decode: Callable[[Path], tuple[NDArray[np.uint8], bytes]]
) -> tuple[NDArray[np.uint8], Digests]:
    first, _ = decode(paths[0])
    images = np.empty((len(paths), *first.shape), dtype=np.uint8)
    digests = [b""] * len(paths)

    def decode_into(index: int) -> None:
        image, digests[index] = decode(paths[index])
        check_same_size(first.shape, image, shown_path(paths[index]), shown_path(paths[0]))
        images[index] = image

    # Otherwise each thread would keep the memory of one image.
    most_threads = 1 if is_large(first.shape) else None
    with ThreadPoolExecutor(most_threads) as pool:
        for _ in pool.map(decode_into, range(len(paths))):
            pass
    return images, stack_digests(digests)


def _read_digests(paths: list[Path]) -> Digests:
    with ThreadPoolExecutor(_READERS) as pool:
        return stack_digests(pool.map(lambda path: sample_digest(read_picture(path)), paths))
