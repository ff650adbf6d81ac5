"""WebDataset: tar shards in which adjacent files with the same stem are one sample.

`a/000017.jpg` and `a/000017.cls` are sample `a/000017`. Samples are numbered across the shards in
name order. Compressed shards and samples with several images are not supported. See
`views.packed.write`. Without labels and test shards, samples are held out by a hash of
`SHARD/a/000017`: new samples and shards keep the choice, but renamed shards change it.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from teach_once.configs.schema import WebDataset
from teach_once.runtime.safe.safe_read import BadFile, open_regular, parse_json
from teach_once.runtime.safe.text import one_line
from teach_once.views.images.decode import MOST_BYTES, shown_path
from teach_once.views.images.encoded import EncodedSource, EncodedSplit, unlabeled_source
from teach_once.views.images.labels import (
    OR_NO_LABELS,
    Label,
    check_label,
    check_label_keys,
    number_labels,
    read_class_names,
)
from teach_once.views.images.listing import (
    HIDDEN,
    IMAGE_SUFFIXES,
    describe_left_out,
    has_hidden_part,
    is_hidden,
)
from teach_once.views.splits import DatasetError, Ids

_BLOCK = 512
_MOST_EXTRA_BYTES = 2**20  # size of an extended header
_LONGEST_NAME = 4096
_EXTENDED = {b"x": "pax", b"g": "global pax", b"L": "GNU long name", b"K": "GNU long link"}


class TarMember(NamedTuple):
    """A regular file with the position of its bytes in the archive."""

    name: str
    offset: int
    size: int


class Tar:
    """A tar archive, opened for each read, because a dataset may have thousands."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, member: TarMember) -> bytes:
        """Return the bytes of a member. Raises DatasetError if the archive cannot be read."""
        with self._opened() as file:
            return self._read(file, member.offset, member.size)

    def members(self) -> Iterator[TarMember]:
        """Yield all regular files in order. Raises DatasetError if the archive is invalid."""
        with self._opened() as file:
            yield from self._members(file, os.fstat(file.fileno()).st_size)

    def _opened(self) -> BinaryIO:
        try:
            return open_regular(self.path, follow=True)
        except (BadFile, OSError) as error:
            shown = shown_path(self.path)
            raise DatasetError(f"cannot read {shown}: {one_line(error)}") from None

    def _members(self, file: BinaryIO, num_bytes: int) -> Iterator[TarMember]:
        position, extra = 0, dict[str, str]()
        while position < num_bytes:
            header = self._read(file, position, _BLOCK)
            if header == bytes(_BLOCK):  # the end
                return
            kind, name, size = self._parsed(header, position)
            size = self._number(extra["size"], position) if "size" in extra else size
            start = position + _BLOCK
            if start + size > num_bytes:
                raise self._wrong(position, "it is truncated")
            if kind in _EXTENDED:
                if size > _MOST_EXTRA_BYTES:
                    raise self._wrong(position, f"a {_EXTENDED[kind]} header of {size:,} bytes")
                extra |= self._extended(kind, self._read(file, start, size), position)
            elif kind in (b"0", b"\0", b"7"):
                yield TarMember(self._checked(extra.get("path", name), position), start, size)
                extra = {}
            elif kind == b"5":  # a folder
                size, extra = 0, {}
            else:
                raise self._wrong(position, f"{one_line(name)} is a link or another special file")
            position = start + -(-size // _BLOCK) * _BLOCK

    def _parsed(self, header: bytes, position: int) -> tuple[bytes, str, int]:
        """Return type, name and size from a header, after checking its checksum."""
        blank = header[:148] + b" " * 8 + header[156:]
        if self._number(_field(header[148:156]), position) != sum(blank):
            raise self._wrong(position, "a header does not match its checksum")
        name = header[:100].split(b"\0")[0]
        if header[257:263] == b"ustar\0" and header[345] != 0:
            name = header[345:500].split(b"\0")[0] + b"/" + name
        if header[124] == 0x80:  # GNU's encoding of large numbers
            size = int.from_bytes(header[125:136], "big")
        else:
            size = self._number(_field(header[124:136]), position)
        return header[156:157], name.decode("utf-8", "surrogateescape"), size

    def _number(self, digits: str, position: int) -> int:
        base = 10 if digits.startswith("+") else 8
        text = digits.lstrip("+")
        if len(text) > 20 or not text.isascii() or not text.isdigit():
            raise self._wrong(position, "an invalid number")
        try:
            return int(text, base)
        except ValueError:
            raise self._wrong(position, "an invalid number") from None

    def _extended(self, kind: bytes, content: bytes, position: int) -> dict[str, str]:
        """Return the next member's name and size (decimal after a "+") from an extended header."""
        if kind == b"L":
            return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
        found, start = {}, 0
        while kind == b"x" and start < len(content):
            length, space, _ = content[start : start + 20].partition(b" ")
            stop = start + int(length) if space and length.isdigit() else start
            record = content[start + len(length) + 1 : max(stop - 1, start)]  # "9 path=x\n"
            key, equals, value = record.partition(b"=")
            is_whole = stop <= len(content) and content[stop - 1 : stop] == b"\n"
            if not equals or not is_whole or key.startswith(b"GNU.sparse"):
                raise self._wrong(position, "an invalid pax header, or that of a sparse file")
            if key in (b"path", b"size"):
                sign = "+" if key == b"size" else ""
                found[key.decode()] = sign + value.decode("utf-8", "surrogateescape")
            start = stop
        return found

    def _checked(self, name: str, position: int) -> str:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise self._wrong(position, f"the name {one_line(name)}, which is not UTF-8") from None
        if not name or len(name) > _LONGEST_NAME or "\0" in name:
            raise self._wrong(position, "an empty or too long name")
        return name

    def _read(self, file: BinaryIO, offset: int, size: int) -> bytes:
        content = os.pread(file.fileno(), size, offset)
        if len(content) != size:
            raise self._wrong(offset, "it is truncated")
        return content

    def _wrong(self, position: int, what: str) -> DatasetError:
        return DatasetError(
            f"{shown_path(self.path)} is not a tar archive of regular files: {what}, at byte "
            f"{position:,}"
        )


def _field(raw: bytes) -> str:
    """Parse tar's octal number, padded with spaces and zeros; "0" if it is empty."""
    return raw.strip(b" \0").decode("latin-1") or "0"


_MOST_LABEL_BYTES = 2**20


class _Sample(NamedTuple):
    """An image in a shard, and its label or None."""

    tar: Tar
    image: TarMember
    label: Label | None


def web_dataset(config: WebDataset) -> EncodedSource:
    """Open the image files in a folder of shards. Raises DatasetError if it cannot be used."""
    check_label_keys(config)
    root = Path(config.root)
    if not root.is_dir():
        raise DatasetError(f"dataset.root: folder {shown_path(root)} not found")
    names = None if config.class_names is None else read_class_names(root / config.class_names)
    left_out = Counter[str]()
    splits = {
        split: _samples_of(shards, config.label, left_out)
        for split, shards in _shards_of(config, root).items()
    }
    hints = tuple(filter(None, [describe_left_out(root, left_out)]))
    if config.label is None:
        encoded = {split: _encoded(some, None) for split, some in splits.items()}
        return unlabeled_source(config, encoded["train"], encoded.get("test"), hints)
    labels = {
        split: [sample.label for sample in some if sample.label is not None]
        for split, some in splits.items()
    }
    class_names, numbers = number_labels(
        labels, names, lambda split, number: _name_of(splits[split][number])
    )
    return EncodedSource(
        config.type,
        class_names,
        _encoded(splits["train"], numbers["train"]),
        _encoded(splits["test"], numbers["test"]),
        hints,
    )


def _encoded(samples: Sequence[_Sample], labels: Ids | None) -> EncodedSplit:
    return EncodedSplit(
        labels,
        [sample.image.name for sample in samples],
        [sample.image.size for sample in samples],
        read=lambda number: samples[number].tar.read(samples[number].image),
        name_of=lambda number: _name_of(samples[number]),
        keys=[f"{sample.tar.path.name}/{_key(sample.image.name)}" for sample in samples],
    )


def _shards_of(config: WebDataset, root: Path) -> dict[str, list[Path]]:
    """Return the shards of each split: those that match the first pattern with any match.

    Images without labels need no test shards.
    """
    names = sorted(name for name in os.listdir(root) if not is_hidden(name))
    tests = [config.test] if config.test else ["*test*.tar", "*val*.tar"]
    shards = {}
    for split, patterns in {"train": [config.train], "test": tests}.items():
        matches = (fnmatch.filter(names, pattern) for pattern in patterns)
        if found := next(filter(None, matches), None):
            shards[split] = [root / name for name in found]
        elif split == "train" or config.label is not None or config.test:
            raise DatasetError(
                f"dataset.root: {shown_path(root)} has no {split} shards ({' or '.join(patterns)})",
                fix=f"set dataset.{split}=PATTERN",
            )
    return shards


def _samples_of(shards: Sequence[Path], label: str | None, left_out: Counter[str]) -> list[_Sample]:
    samples = [sample for shard in shards for sample in _samples_in(Tar(shard), label, left_out)]
    if not samples:
        raise DatasetError(f"{shown_path(shards[0])} and the other shards have no images")
    return samples


def _samples_in(tar: Tar, label: str | None, left_out: Counter[str]) -> Iterator[_Sample]:
    for key, members in itertools.groupby(_shown(tar, left_out), key=lambda each: _key(each.name)):
        by_ending = {member.name[len(key) + 1 :].lower(): member for member in members}
        images = [by_ending[end] for end in by_ending if f".{end}" in IMAGE_SUFFIXES]
        shown = f"sample {one_line(key)} of {shown_path(tar.path)}"
        if len(images) != 1:
            raise DatasetError(f"{shown} has {len(images)} images, expected one")
        if images[0].size > MOST_BYTES:
            raise DatasetError(f"{shown} has an image of {images[0].size:,} bytes, too large")
        found = None if label is None else _label_of(tar, by_ending, label, shown)
        yield _Sample(tar, images[0], found)


def _shown(tar: Tar, left_out: Counter[str]) -> Iterator[TarMember]:
    """Yield members that are not hidden; macOS puts `._000.jpg` between the files of a sample."""
    for member in tar.members():
        if has_hidden_part(member.name):
            left_out[HIDDEN] += 1
        else:
            yield member


def _key(name: str) -> str:
    """Return the path up to the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _label_of(tar: Tar, by_ending: dict[str, TarMember], label: str, shown: str) -> Label:
    ending, _, json_key = label.partition(".")
    if (member := by_ending.get(ending)) is None:
        raise DatasetError(
            f"{shown} has no .{one_line(ending)} file",
            fix=f"set dataset.label=EXTENSION, {OR_NO_LABELS}",
        )
    if member.size > _MOST_LABEL_BYTES:
        raise DatasetError(f"{shown} has a label of {member.size:,} bytes, too large")
    content = tar.read(member)
    try:
        if not json_key:
            return content.decode("utf-8").strip()
        value = parse_json(content, Path(member.name))[json_key]
    except (UnicodeDecodeError, BadFile, KeyError, TypeError, IndexError):
        raise DatasetError(f"{shown}: .{ending} has no label {one_line(json_key)}") from None
    return check_label(value, shown)


def _name_of(sample: _Sample) -> str:
    return f"{one_line(sample.image.name)} of {shown_path(sample.tar.path)}"
