"""The common form of all datasets: labels, a reader of images by id, a digest of both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from teach_once.configs.schema import DatasetConfig
from teach_once.runtime.errors import UserError
from teach_once.runtime.safe.text import one_line
from teach_once.views.seeds import HELD_OUT_STREAM, SUBSET_STREAM, choice, draws

Ids = NDArray[np.int64]
Digests = NDArray[np.uint8]  # (M, 16)
Decoded = NDArray[np.uint8] | Image.Image

DIGEST_BYTES = 16
_LONGEST_NAME = 255  # bytes of a class name, the limit of file systems


class DatasetError(UserError, ValueError):
    """A dataset that cannot be used, with the reason and the file or folder."""


class LazyPaths(Sequence[Path]):
    """A sequence of paths, one for each of `ids`, created by `path_of` on access."""

    def __init__(self, path_of: Callable[[int], Path], ids: Ids) -> None:
        self._path_of, self._ids = path_of, ids

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> LazyPaths: ...
    def __getitem__(self, index: int | slice) -> Path | LazyPaths:
        if isinstance(index, slice):
            return LazyPaths(self._path_of, self._ids[index])
        return self._path_of(int(self._ids[index]))

    def __len__(self) -> int:
        return len(self._ids)


@dataclass(frozen=True, eq=False)
class Split:
    """Samples in their fixed order.

    labels: (N,) int64; None: there are none, and `num_unlabeled` is the number of samples.

    A digest is the BLAKE2b-128 of a sample's bytes: of its file, or of its pixels if the dataset
    consists of arrays (`sample_digest`).

    load: sample ids (M,) -> images (M, H, W, C) uint8, all of one size, and digests (M, 16) uint8.
    read_each: sample ids (M,) -> iterator of image (H, W, C) uint8 of any size, and digest.
    read_digests: sample ids (M,) -> digests (M, 16) uint8, of bytes read now but not decoded.
    open_each: as read_each, but images may also be Pillow's, in RGB; None: images are arrays.
    name_of: sample id -> name of its image for messages.
    """

    labels: Ids | None
    load: Callable[[Ids], tuple[NDArray[np.uint8], Digests]]
    read_each: Callable[[Ids], Iterable[tuple[NDArray[np.uint8], bytes]]]
    read_digests: Callable[[Ids], Digests]
    name_of: Callable[[int], str]
    open_each: Callable[[Ids], Iterable[tuple[Decoded, bytes]]] | None = None
    paths: Sequence[Path] | None = None  # files of a folder, in the samples' order
    folder: Path | None = None  # base of the relative names in a digest
    num_unlabeled: int = 0

    @cached_property
    def loaded(self) -> tuple[NDArray[np.uint8], Digests]:
        """Images (N, H, W, C) uint8 and digests (N, 16) of all samples, read at first use."""
        return self.load(np.arange(len(self)))

    def read_some(self, ids: Ids) -> NDArray[np.uint8]:
        """Return images (M, H, W, C) uint8 of samples `ids`, in that order."""
        return self.load(ids)[0]

    @property
    def images(self) -> NDArray[np.uint8]:
        """Images (N, H, W, C) uint8 of all samples, read at first use."""
        return self.loaded[0]

    @cached_property
    def first_shape(self) -> tuple[int, int, int]:
        """Return (H, W, C) of the first image."""
        image, _ = next(iter(self.read_each(np.array([0]))))
        height, width, channels = image.shape
        return height, width, channels

    @property
    def label_values(self) -> Ids:
        """Labels (N,) int64; -1 for samples without labels, which every cross-entropy rejects."""
        return np.full(len(self), -1) if self.labels is None else self.labels

    def __len__(self) -> int:
        return self.num_unlabeled if self.labels is None else len(self.labels)

    def subset(self, ids: Ids) -> Split:
        """Return samples `ids`, in that order, as a split."""
        opened = self.open_each
        return Split(
            None if self.labels is None else self.labels[ids],
            lambda some: self.load(ids[some]),
            lambda some: self.read_each(ids[some]),
            lambda some: self.read_digests(ids[some]),
            lambda sample: self.name_of(int(ids[sample])),
            None if opened is None else lambda some: opened(ids[some]),
            None if self.paths is None else LazyPaths(self.paths.__getitem__, ids),
            self.folder,
            len(ids) if self.labels is None else 0,
        )


def array_split(images: NDArray[np.uint8], labels: Ids, name: str) -> Split:
    """Return a split whose images (N, H, W, C) are in memory."""
    rows = rows_of(images)

    def digests(ids: Ids) -> Digests:
        return stack_digests(map(sample_digest, images[ids]))

    return Split(
        labels,
        load=lambda ids: (rows(ids), digests(ids)),
        read_each=lambda ids: ((image, sample_digest(image)) for image in images[ids]),
        read_digests=digests,
        name_of=lambda sample: f"sample {sample} of {name}",
    )


def sample_digest(data: bytes | NDArray[np.uint8]) -> bytes:
    """Return the 16 bytes of BLAKE2b-128 of a sample's bytes, or of an array in C order.

    It identifies a sample in a dataset. The 4 bytes of a CRC cannot: of 10^8 samples, a million
    pairs would share one.
    """
    content = data if isinstance(data, bytes) else np.ascontiguousarray(data).data
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def stack_digests(digests: Iterable[bytes]) -> Digests:
    """Stack M digests to (M, 16) uint8."""
    return np.frombuffer(bytearray(b"".join(digests)), np.uint8).reshape(-1, DIGEST_BYTES)


def count_copies(digests: Digests) -> int:
    """Return the number of samples (N, 16) whose bytes equal those of another, earlier sample."""
    return len(digests) - len(np.unique(np.ascontiguousarray(digests).view("V16")))


def crc32c(data: bytes | NDArray[np.uint8]) -> int:
    """Return the CRC-32C (Castagnoli) of bytes, or of an array in C order."""
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data).reshape(-1)
    return int(google_crc32c.value(data))


def rows_of(images: NDArray[np.uint8]) -> Callable[[Ids], NDArray[np.uint8]]:
    """Return a reader of rows of (N, ...) in memory; a request for all rows is not copied."""
    every = np.arange(len(images))
    return lambda ids: images if np.array_equal(ids, every) else images[ids]


def check_same_size(
    expected: tuple[int, ...], image: NDArray[np.uint8], name: str, other: str = "the first"
) -> None:
    """Raise DatasetError, with both names, unless the image has the expected shape."""
    if image.shape != expected:
        raise DatasetError(
            f"images differ in size: {other} is {expected[1]}x{expected[0]}, {name} is "
            f"{image.shape[1]}x{image.shape[0]}",
            fix="resize them to one size, or set views.augment={type: random-resized-crop}, which "
            "takes any size",
        )


def check_class_name(name: str, owner: str) -> None:
    """Raise DatasetError for a class name that cannot be printed or stored unchanged.

    owner: description of its folder or file for the message.
    """
    if not name or len(name.encode("utf-8", "replace")) > _LONGEST_NAME or one_line(name) != name:
        raise DatasetError(
            f"{owner}: a class name must be printable UTF-8 text of at most {_LONGEST_NAME} bytes",
            fix="rename it",
        )


@dataclass(frozen=True, eq=False)
class ImageSource:
    """A dataset before any sample is left out.

    type: the config's dataset type; for a packed file, the type of the original dataset. digest_of:
    training ids -> sha256 (hex) that identifies them; test_digest: of the whole test split.
    class_names: None: the images have no labels. hints: lines for the user, such as about skipped
    files. order_hint: a hint for users whose teacher was trained elsewhere, if other programs
    number the classes differently; otherwise "". check_headers: raises DatasetError that lists all
    files of a folder that do not begin like images.
    """

    name: str
    type: str
    class_names: tuple[str, ...] | None
    train: Split
    test: Split
    digest_of: Callable[[Ids], str]
    test_digest: Callable[[], str]
    hints: tuple[str, ...] = ()
    order_hint: str = ""
    check_headers: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Selection:
    """The used part of a training split; the fields are keys of a config's `dataset`."""

    max_per_class: int | None = None
    max_samples: int | None = None
    train_fraction: float = 1.0
    validation_fraction: float = 0.0

    @classmethod
    def of_config(cls, config: DatasetConfig) -> Selection:
        return cls(
            config.max_per_class,
            config.max_samples,
            config.train_fraction,
            config.validation_fraction,
        )

    def choose(self, split: Split) -> tuple[Ids, Ids]:
        """Choose training and held-out samples; returns the ids of both, ascending.

        A sample is held out by a hash of its number, so the choice does not depend on anything
        else. Of the others, `train_fraction` of each class is kept, then the first `max_per_class`,
        and of these, `max_samples`. The choice of `train_fraction` and `max_samples` is keyed: a
        larger value keeps all samples of a smaller one. Raises DatasetError if `max_per_class` is
        set and there are no labels.
        """
        if self.max_per_class is not None and split.labels is None:
            raise DatasetError(
                "dataset.max_per_class is set, but the images have no labels",
                fix="set dataset.max_per_class=null and dataset.max_samples",
            )
        words = draws(0, 0, len(split), 1, stream=HELD_OUT_STREAM)[:, 0]
        is_held = words < np.uint64(int(self.validation_fraction * 2.0**64))
        rest = np.flatnonzero(~is_held)
        keys = draws(0, 0, len(split), 1, stream=SUBSET_STREAM)[:, 0]
        if self.train_fraction < 1 or self.max_per_class is not None:
            labels = split.label_values[rest]
            classes = (rest[labels == label] for label in np.unique(labels))
            rest = np.sort(np.concatenate([self._of_class(ids, keys) for ids in classes]))
        if self.max_samples is not None:
            rest = _smallest(rest, keys, self.max_samples)
        return rest, np.flatnonzero(is_held)

    def _of_class(self, ids: Ids, keys: NDArray[np.uint64]) -> Ids:
        count = max(1, round(self.train_fraction * len(ids)))
        return _smallest(ids, keys, count)[: self.max_per_class]


def _smallest(ids: Ids, keys: NDArray[np.uint64], count: int) -> Ids:
    """Return the `count` ids with the smallest keys, ascending."""
    return np.sort(ids[np.argsort(keys[ids], kind="stable")[:count]])


_READ_AT_ONCE = 512
_LOOKED_AT = 256  # samples read to decide whether the dataset is another one
_MOST_READ = 20_000  # samples read to find the first difference: seconds, even on a slow disk


def changed_samples(split: Split, digests: Digests, ids: Ids) -> Iterator[tuple[int, Ids]]:
    """Read samples `ids` again in small groups; yields the group's size and its changed samples.

    digests: (N, 16) uint8 of all samples, from a cache. Raises DatasetError if a sample cannot be
    read.
    """
    for start in range(0, len(ids), _READ_AT_ONCE):
        some = ids[start : start + _READ_AT_ONCE]
        yield len(some), some[(split.read_digests(some) != digests[some]).any(axis=1)]


def is_other_dataset(
    split: Split,
    class_names: Sequence[str] | None,
    labels: Ids | None,
    digests: Digests,
    names: Sequence[str] | None,
) -> bool:
    """Return True if a cache was made from other images, not from another state of these images.

    class_names: of this dataset; labels (N,) int64, digests (N, 16) uint8, names: of the cache;
    labels and names are None for images without labels. Some samples of this dataset are read.
    """
    same_names = list(class_names or ()) == list(names or ())
    if labels is not None and same_names and same_labels(split.labels, labels):
        return False
    some = choice(0, len(split), min(_LOOKED_AT, len(split)))
    known = set(map(bytes, digests))
    return known.isdisjoint(map(bytes, split.read_digests(np.sort(some))))


def same_labels(labels: Ids | None, others: Ids | None) -> bool:
    """Return True if two sets of samples have the same labels, or neither has labels."""
    if labels is None or others is None:
        return labels is others
    return np.array_equal(labels, others)


def describe_change(split: Split, labels: Ids | None, digests: Digests) -> str:
    """Return, for example, `799 samples, were 800; first difference: sample 412, <file>`.

    labels: (N,) int64, or None without labels, and digests: (N, 16) uint8, from the cache. Reads at
    most 20,000 samples.
    """
    now, before = len(split), len(digests)
    common = min(now, before)
    labels = np.full(before, -1) if labels is None else labels
    counts = f"{now:,} samples, " + (f"were {before:,}" if now != before else "as before")
    other_labels = np.flatnonzero(split.label_values[:common] != labels[:common])
    stop = int(other_labels[0]) if len(other_labels) else common
    has_moved = len(other_labels) > 0 or now != before
    first = stop if has_moved else None
    start = _start_of_class(labels, stop) if has_moved else 0
    looked_at = np.arange(start, min(stop, start + _MOST_READ))
    found = (changed for _, changed in changed_samples(split, digests, looked_at))
    first = next((int(changed[0]) for changed in found if len(changed)), first)
    if first is None:
        return f"{counts}; no difference found in their content, only in names or order"
    if first == now:
        return f"{counts}; the remaining samples are unchanged"
    return f"{counts}; first difference: sample {first}, {split.name_of(first)}"


def _start_of_class(labels: Ids, stop: int) -> int:
    """Return the start of the run of equal labels that ends before `stop`."""
    others = np.flatnonzero(labels[:stop] != labels[max(stop - 1, 0)])
    return int(others[-1]) + 1 if len(others) else 0
