"""Datasets as encoded files: what folders, tar shards and tables come down to before packing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from runtime.text import one_line
from views.folders import digest_of_files, hashed_files, relative_name
from views.pictures import picture_size, read_picture, refuse_other_files, shown_path
from views.splits import DatasetError, Ids, Source, Split, check_class_name

Label = int | str
_MOST_CLASSES = 2**20


@dataclass(frozen=True, eq=False)
class EncodedSplit:
    """Image files in their fixed order, each with a label (N,) int64 and a name.

    names: `<class>/<file>` or the like, printable or not, in UTF-8. sizes: bytes of each.
    read: its bytes; raises DatasetError. name_of: what to call it in a message.
    """

    labels: Ids
    names: Sequence[str]
    sizes: Sequence[int]
    read: Callable[[int], bytes]
    name_of: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def digest(self) -> str:
        """Of every name, size and label, and the bytes of some."""
        hashed = map(self.read, hashed_files(len(self)).tolist())
        return digest_of_files(self.names, self.sizes, self.labels, hashed)

    def part(self, start: int, stop: int) -> EncodedSplit:
        """Samples `start` to `stop`."""
        return EncodedSplit(
            self.labels[start:stop],
            self.names[start:stop],
            self.sizes[start:stop],
            read=lambda sample: self.read(start + sample),
            name_of=lambda sample: self.name_of(start + sample),
        )


@dataclass(frozen=True, eq=False)
class EncodedSource:
    """A dataset of encoded files. type: as configs name it."""

    type: str
    class_names: tuple[str, ...]
    train: EncodedSplit
    test: EncodedSplit

    @property
    def splits(self) -> Mapping[str, EncodedSplit]:
        return {"train": self.train, "test": self.test}

    def files(self, max_pixels: int) -> Iterator[bytes]:
        """The bytes of all files, split by split. Raises DatasetError for one that is no image."""
        for split in self.splits.values():
            for sample in range(len(split)):
                content = split.read(sample)
                refuse_other_files(content, split.name_of(sample), max_pixels)
                yield content

    @cached_property
    def digests(self) -> list[str]:
        """Of both splits."""
        return [split.digest for split in self.splits.values()]


def labelled(
    labels: Mapping[str, Sequence[Label]],
    class_names: Sequence[str] | None,
    name_of: Callable[[str, int], str],
) -> tuple[tuple[str, ...], dict[str, Ids]]:
    """The names of the classes, and the labels of each split as numbers.

    labels: per split, numbers (also as text) or names. class_names: where they are known; else
    numbers are named by themselves, and names are numbered in their order. name_of: of a sample, by
    its split and number, for messages. Raises DatasetError.
    """
    numbers = all(_is_number(label) for label in labels["train"])
    if class_names is None:
        known = set(map(str, labels["train"]))
        count = max(map(int, known)) + 1 if numbers else 0
        if count > _MOST_CLASSES:
            raise DatasetError(f"a label is {count - 1:,}, expected less than {_MOST_CLASSES:,}")
        class_names = list(map(str, range(count))) if numbers else sorted(known)
    for name in class_names:
        check_class_name(name, f"class {one_line(name)}")
    number_of = {name: number for number, name in enumerate(class_names)}
    if numbers:
        number_of = {str(number): number for number in range(len(class_names))}
    found = {}
    for split, some in labels.items():
        texts = [str(int(label)) if _is_number(label) else str(label) for label in some]
        unknown = next((at for at, text in enumerate(texts) if text not in number_of), None)
        if unknown is not None:
            raise DatasetError(
                f"{name_of(split, unknown)}: the label {one_line(texts[unknown])} is none of the "
                f"{len(class_names):,} classes of the training images"
            )
        found[split] = np.array([number_of[text] for text in texts], dtype=np.int64)
    return tuple(class_names), found


def _is_number(label: Label) -> bool:
    text = str(label)
    return text.isascii() and text.isdigit() and len(text) <= 9


def encoded_folder(source: Source) -> EncodedSource:
    """The files of an image folder. Raises DatasetError where it is none."""
    return EncodedSource(
        source.type, source.class_names, *map(_files_of, (source.train, source.test))
    )


def _files_of(split: Split) -> EncodedSplit:
    if split.paths is None:
        raise DatasetError("only an image folder can be packed as encoded bytes")
    paths = split.paths
    return EncodedSplit(
        split.labels,
        [_utf8_name(path) for path in paths],
        [picture_size(path) for path in paths],
        read=lambda sample: read_picture(paths[sample]),
        name_of=lambda sample: shown_path(paths[sample]),
    )


def _utf8_name(path: Path) -> str:
    name = relative_name(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DatasetError(
            f"{shown_path(path)}: its name is not UTF-8", fix="rename the file"
        ) from None
    return name
