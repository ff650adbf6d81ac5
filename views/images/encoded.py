"""Datasets as encoded files: the common form of folders, tar shards and tables before packing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from teach_once.configs.schema import HuggingFace, WebDataset
from teach_once.views.images.decode import (
    check_image_header,
    picture_size,
    read_picture,
    shown_path,
)
from teach_once.views.images.folder_layout import choose_held_out
from teach_once.views.images.folders import digest_of_files, hashed_files
from teach_once.views.splits import DatasetError, Ids, ImageSource, Split


@dataclass(frozen=True, eq=False)
class EncodedSplit:
    """Image files in their fixed order, each with a name, and a label (N,) int64 or none.

    names: `<class>/<file>` or similar, in UTF-8, possibly not printable. sizes: bytes of each file.
    read: returns a file's bytes; raises DatasetError. name_of: a file's name for messages. keys:
    names by which `unlabeled_source` holds out samples; they may repeat.
    """

    labels: Ids | None
    names: Sequence[str]
    sizes: Sequence[int]
    read: Callable[[int], bytes]
    name_of: Callable[[int], str]
    keys: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def digest(self) -> str:
        """Return the digest of every name, size and label, and of the bytes of some files."""
        hashed = map(self.read, hashed_files(len(self)).tolist())
        return digest_of_files(self.names, self.sizes, self.labels, hashed)

    def subset(self, ids: Ids) -> EncodedSplit:
        """Return samples `ids` (M,), in that order."""
        return EncodedSplit(
            None if self.labels is None else self.labels[ids],
            [self.names[i] for i in ids],
            [self.sizes[i] for i in ids],
            read=lambda sample: self.read(int(ids[sample])),
            name_of=lambda sample: self.name_of(int(ids[sample])),
        )


@dataclass(frozen=True, eq=False)
class EncodedSource:
    """A dataset of encoded files.

    type: the config's dataset type. class_names: None without labels. hints: lines for the user.
    """

    type: str
    class_names: tuple[str, ...] | None
    train: EncodedSplit
    test: EncodedSplit
    hints: tuple[str, ...] = ()

    @property
    def splits(self) -> Mapping[str, EncodedSplit]:
        return {"train": self.train, "test": self.test}

    def files(self, max_pixels: int) -> Iterator[bytes]:
        """Yield all files, split by split. Raises DatasetError if a file is not an image."""
        for split in self.splits.values():
            for sample in range(len(split)):
                content = split.read(sample)
                check_image_header(content, split.name_of(sample), max_pixels)
                yield content

    @cached_property
    def digests(self) -> list[str]:
        """Return the digests of both splits."""
        return [split.digest for split in self.splits.values()]


def unlabeled_source(
    config: WebDataset | HuggingFace,
    train: EncodedSplit,
    test: EncodedSplit | None,
    hints: tuple[str, ...] = (),
) -> EncodedSource:
    """Return images without labels.

    test: None: training images are held out by a hash of their keys, as in
    `views.images.folder_layout.split_unlabeled`. Equal keys are counted in the order of the
    samples. Raises DatasetError if a split would be empty, or if both `test` and
    `holdout_fraction` choose the test images.
    """
    if min(len(train), len(train if test is None else test)) < (2 if test is None else 1):
        raise DatasetError(
            "dataset: there are too few images for a training and a test split",
            fix="add images: each split needs at least one",
        )
    if test is not None:
        if config.holdout_fraction is not None:
            raise DatasetError(
                "dataset.holdout_fraction chooses test images, but the dataset has a test split",
                fix="set dataset.holdout_fraction=null",
            )
        return EncodedSource(config.type, None, train, test, hints)
    is_held = choose_held_out(_numbered(train.keys), len(train), config.holdout_fraction)
    kept, held = (train.subset(np.flatnonzero(some)) for some in (~is_held, is_held))
    return EncodedSource(config.type, None, kept, held, hints)


def _numbered(keys: Iterable[str]) -> Iterator[str]:
    """Yield the keys; each further one of equal keys has its number appended."""
    counts = Counter[str]()
    for key in keys:
        yield f"{key}\0{counts[key]}" if counts[key] else key
        counts[key] += 1


def encoded_folder(source: ImageSource) -> EncodedSource:
    """Return the files of an image folder. Raises DatasetError if the source is not a folder."""
    return EncodedSource(
        source.type,
        source.class_names,
        _files_of(source.train),
        _files_of(source.test),
        source.hints,
    )


def _files_of(split: Split) -> EncodedSplit:
    paths, folder = split.paths, split.folder
    if paths is None or folder is None:
        raise DatasetError(
            "only an image folder can be packed as encoded bytes", fix="omit --encoded"
        )
    return EncodedSplit(
        split.labels,
        [_utf8_name(path, folder) for path in paths],
        [picture_size(path) for path in paths],
        read=lambda sample: read_picture(paths[sample]),
        name_of=lambda sample: shown_path(paths[sample]),
    )


def _utf8_name(path: Path, folder: Path) -> str:
    name = path.relative_to(folder).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DatasetError(
            f"the name of {shown_path(path)} is not UTF-8", fix="rename the file"
        ) from None
    return name
