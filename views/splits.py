"""What every dataset comes down to: labels, a reader of images by id, a digest of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from views.seeds import HELD_OUT_STREAM, draws

Ids = NDArray[np.int64]


class DatasetError(ValueError):
    """A dataset that cannot be used: what is wrong and in which file or folder."""


@dataclass(frozen=True, eq=False)
class Split:
    """Samples in their fixed order; `labels` is (N,) int64.

    read_some: sample ids (M,) -> images (M, H, W, C) uint8; refuses images of different sizes.
    read_each: sample ids (M,) -> the images one after the other, (H, W, C) uint8 of any size.
    name_of: sample id -> what to call its image in a message.
    """

    labels: Ids
    read_some: Callable[[Ids], NDArray[np.uint8]]
    read_each: Callable[[Ids], Iterable[NDArray[np.uint8]]]
    name_of: Callable[[int], str]
    paths: tuple[Path, ...] | None = None  # of a folder's files, in the samples' order

    @cached_property
    def images(self) -> NDArray[np.uint8]:
        """(N, H, W, C) uint8, read at first use."""
        return self.read_some(np.arange(len(self)))

    @cached_property
    def first_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the first image."""
        height, width, channels = next(iter(self.read_each(np.array([0])))).shape
        return height, width, channels

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, ids: Ids) -> Split:
        """Some of the samples, in the order of `ids`."""
        return Split(
            self.labels[ids],
            lambda some: self.read_some(ids[some]),
            lambda some: self.read_each(ids[some]),
            lambda sample: self.name_of(int(ids[sample])),
            None if self.paths is None else tuple(self.paths[i] for i in ids),
        )


def array_split(images: NDArray[np.uint8], labels: Ids, name: str) -> Split:
    """A split whose images (N, H, W, C) are in memory."""
    return Split(
        labels, images.__getitem__, images.__getitem__, lambda sample: f"sample {sample} of {name}"
    )


def refuse_other_size(
    expected: tuple[int, ...], image: NDArray[np.uint8], name: str, other: str = "the first"
) -> None:
    """Raise DatasetError, with both names, unless the image has the expected shape."""
    if image.shape != expected:
        raise DatasetError(
            f"images differ in size: {other} is {expected[1]}x{expected[0]}, {name} is "
            f"{image.shape[1]}x{image.shape[0]}\n  fix: resize them to one size, or set "
            f"views.augment={{kind: random-resized-crop}}, which takes any size"
        )


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset before any sample is left out.

    digest_of pins training samples by their ids, test_digest the whole test split.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    digest_of: Callable[[Ids], str]
    test_digest: Callable[[], str]


def chosen_ids(labels: Ids, limit: int | None, validation_fraction: float) -> tuple[Ids, Ids]:
    """Which samples to train on and which to hold out, both ascending.

    A sample is held out by a hash of its number, so the choice stays whatever else changes; the
    first `limit` per class of the others are trained on (all if None).
    """
    words = draws(0, 0, len(labels), 1, stream=HELD_OUT_STREAM)[:, 0]
    is_held = words < np.uint64(int(validation_fraction * 2.0**64))
    held, rest = np.flatnonzero(is_held), np.flatnonzero(~is_held)
    if limit is not None:
        per_class = [rest[labels[rest] == label][:limit] for label in np.unique(labels)]
        rest = np.sort(np.concatenate(per_class))
    return rest, held
