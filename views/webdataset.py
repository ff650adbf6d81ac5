"""WebDataset: tar shards in which neighbours of one name are one sample; see `views.pack`.

`a/000017.jpg` and `a/000017.cls` are sample `a/000017`. Samples are numbered through the shards in
the order of their names. Leaves out compressed shards and samples of several images.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from configs.schema import WebDataset
from runtime.reading import BadFile, parse_json
from runtime.text import one_line
from views.encoded import EncodedSource, EncodedSplit
from views.labels import Label, check_label, number_labels, read_class_names
from views.pictures import MOST_BYTES, shown_path
from views.splits import DatasetError, Ids
from views.tar_files import Tar, TarMember
from views.tree import HIDDEN, IMAGE_SUFFIXES, describe_left_out, has_hidden_part, is_hidden

_MOST_LABEL_BYTES = 2**20


class _Sample(NamedTuple):
    """An image in a shard, and its label."""

    tar: Tar
    image: TarMember
    label: Label


def web_dataset(config: WebDataset) -> EncodedSource:
    """The image files in the shards of a folder. Raises DatasetError."""
    root = Path(config.root)
    if not root.is_dir():
        raise DatasetError(f"dataset.root: there is no folder {shown_path(root)}")
    names = None if config.class_names is None else read_class_names(root / config.class_names)
    shards = {
        "train": _shards(root, "train", [config.train]),
        "test": _shards(
            root, "test", [config.test] if config.test else ["*test*.tar", "*val*.tar"]
        ),
    }
    left_out = Counter[str]()
    splits = {name: _samples_of(some, config.label, left_out) for name, some in shards.items()}
    labels = {split: [sample.label for sample in some] for split, some in splits.items()}
    class_names, numbers = number_labels(
        labels, names, lambda split, number: _name_of(splits[split][number])
    )
    return EncodedSource(
        config.type,
        class_names,
        _encoded(splits["train"], numbers["train"]),
        _encoded(splits["test"], numbers["test"]),
        tuple(filter(None, [describe_left_out(root, left_out)])),
    )


def _encoded(samples: Sequence[_Sample], labels: Ids) -> EncodedSplit:
    return EncodedSplit(
        labels,
        [sample.image.name for sample in samples],
        [sample.image.size for sample in samples],
        read=lambda number: samples[number].tar.read(samples[number].image),
        name_of=lambda number: _name_of(samples[number]),
    )


def _shards(root: Path, split: str, patterns: Sequence[str]) -> list[Path]:
    """Those that the first pattern finds that finds any."""
    names = sorted(name for name in os.listdir(root) if not is_hidden(name))
    for pattern in patterns:
        if found := fnmatch.filter(names, pattern):
            return [root / name for name in found]
    raise DatasetError(
        f"dataset.root: {shown_path(root)} holds no {split} shards ({' or '.join(patterns)})",
        fix=f"set dataset.{split}=PATTERN",
    )


def _samples_of(shards: Sequence[Path], label: str, left_out: Counter[str]) -> list[_Sample]:
    samples = [sample for shard in shards for sample in _samples_in(Tar(shard), label, left_out)]
    if not samples:
        raise DatasetError(f"{shown_path(shards[0])} and the other shards hold no image")
    return samples


def _samples_in(tar: Tar, label: str, left_out: Counter[str]) -> Iterator[_Sample]:
    for key, members in itertools.groupby(_shown(tar, left_out), key=lambda each: _key(each.name)):
        by_ending = {member.name[len(key) + 1 :].lower(): member for member in members}
        images = [by_ending[end] for end in by_ending if f".{end}" in IMAGE_SUFFIXES]
        shown = f"sample {one_line(key)} of {shown_path(tar.path)}"
        if len(images) != 1:
            raise DatasetError(f"{shown} has {len(images)} images, expected one")
        if images[0].size > MOST_BYTES:
            raise DatasetError(f"{shown}: an image of {images[0].size:,} bytes")
        yield _Sample(tar, images[0], _label_of(tar, by_ending, label, shown))


def _shown(tar: Tar, left_out: Counter[str]) -> Iterator[TarMember]:
    """The members that are not hidden; macOS puts `._000.jpg` between the files of a sample."""
    for member in tar.members():
        if has_hidden_part(member.name):
            left_out[HIDDEN] += 1
        else:
            yield member


def _key(name: str) -> str:
    """The path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _label_of(tar: Tar, by_ending: dict[str, TarMember], label: str, shown: str) -> Label:
    ending, _, json_key = label.partition(".")
    if (member := by_ending.get(ending)) is None:
        raise DatasetError(f"{shown} has no .{one_line(ending)} file", fix="set dataset.label")
    if member.size > _MOST_LABEL_BYTES:
        raise DatasetError(f"{shown}: a label of {member.size:,} bytes")
    content = tar.read(member)
    try:
        if not json_key:
            return content.decode("utf-8").strip()
        value = parse_json(content, Path(member.name))[json_key]
    except (UnicodeDecodeError, BadFile, KeyError, TypeError, IndexError):
        raise DatasetError(f"{shown}: .{ending} holds no label {one_line(json_key)}") from None
    return check_label(value, shown)


def _name_of(sample: _Sample) -> str:
    return f"{one_line(sample.image.name)} of {shown_path(sample.tar.path)}"
