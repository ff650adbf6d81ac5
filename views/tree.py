"""Which entries of an image folder are images, and which are left out and counted.

Subfolders of a class are walked as torchvision's ImageFolder walks them: folder by folder in the
order of their paths, the files of each by name. Names that programs leave behind (`.DS_Store`,
`._000.jpg`, `.ipynb_checkpoints`, `__MACOSX`) are neither classes nor images.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runtime.text import one_line
from views.splits import DatasetError, check_class_name

IMAGE_SUFFIXES = (
    *(".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)  # of the formats in views.pictures.FORMATS
HIDDEN = "hidden"  # reasons, besides the ending of a name
LOOSE = "in no class"
_SUFFIXES = tuple(os.fsencode(suffix) for suffix in IMAGE_SUFFIXES)
_LONGEST_ENDING = 12
_NAMED_ENDINGS = 5
_MAC_METADATA = "__MACOSX"
_Entry = os.DirEntry[str]


@dataclass
class Images:
    """The images of one class: names relative to its folder, in bytes, and sizes.

    folders: every walked folder, relative to `folder`, with its modification time. left_out: the
    number of entries that were not taken, by reason.
    """

    names: list[bytes] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    folders: list[tuple[str, int]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def is_hidden(name: str) -> bool:
    """Return True for a name that programs leave behind: one that begins with a dot, or macOS's."""
    return name.startswith(".") or name == _MAC_METADATA


def has_hidden_part(path: str) -> bool:
    """Return True if any part of a `/`-separated path is hidden; a leading `./` is not."""
    return any(is_hidden(part) for part in path.split("/") if part not in ("", ".", ".."))


def find_classes(folder: Path) -> tuple[tuple[str, ...], Counter[str]]:
    """Return the class folders' names, sorted, and what else is there. Raises DatasetError."""
    names, left_out = [], Counter[str]()
    for entry in _entries(folder):
        if is_hidden(entry.name):
            left_out[HIDDEN] += 1
        elif _is_folder(entry):
            names.append(entry.name)
        else:
            left_out[LOOSE] += 1
    for name in names:
        check_class_name(name, one_line(folder / name))
    return tuple(sorted(names)), left_out


def find_images(folder: Path, name: str) -> Images:
    """Return the images of `folder/name` and its subfolders. Raises DatasetError."""
    found = Images()
    listed: dict[str, list[tuple[str, bytes, int]]] = {}
    pending = [("", frozenset[tuple[int, int]]())]
    while pending:
        inside, around = pending.pop()
        path = folder / name / inside
        status = _stat(path)
        key = (status.st_dev, status.st_ino)
        if key in around:
            raise _endless(str(path))
        found.folders.append((os.path.join(name, inside).rstrip("/"), status.st_mtime_ns))
        images, folders = _sorted_out(path, found.left_out)
        listed[inside] = images
        pending += [(os.path.join(inside, each), around | {key}) for each in folders]
    for inside, images in sorted(listed.items()):
        prefix = os.fsencode(inside) + b"/" if inside else b""
        for _, raw, size in sorted(images):
            found.names.append(prefix + raw)
            found.sizes.append(size)
    return found


def describe_left_out(folder: Path, left_out: Mapping[str, int]) -> str:
    """Return a line about the entries of `folder` that are not among its images, or ""."""
    if not left_out:
        return ""
    endings = {name: n for name, n in left_out.items() if name not in (HIDDEN, LOOSE)}
    parts = []
    if endings:
        ordered = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
        some = [f"{count:,} {name or 'without an ending'}" for name, count in ordered]
        more = f", {len(some) - _NAMED_ENDINGS} other endings" if len(some) > _NAMED_ENDINGS else ""
        shown = ", ".join(some[:_NAMED_ENDINGS]) + more
        parts.append(f"{sum(endings.values()):,} with other endings than images ({shown})")
    if count := left_out.get(LOOSE):
        parts.append(f"{count:,} in no class's folder")
    if count := left_out.get(HIDDEN):
        parts.append(f"{count:,} hidden (named .* or {_MAC_METADATA})")
    return f"note: left out of {one_line(folder)}: {'; '.join(parts)}"


def _sorted_out(
    folder: Path, left_out: Counter[str]
) -> tuple[list[tuple[str, bytes, int]], list[str]]:
    """Name, name in bytes and size of each image (a regular file or a link to one); subfolders."""
    images, folders = [], []
    for entry in _entries(folder):
        raw = os.fsencode(entry.name)
        if is_hidden(entry.name):
            left_out[HIDDEN] += 1
        elif raw.lower().endswith(_SUFFIXES):
            images.append((entry.name, raw, _size_of(entry)))
        elif _is_folder(entry):
            folders.append(entry.name)
        else:
            ending = os.path.splitext(entry.name)[1].lower()
            left_out[one_line(ending, longest=_LONGEST_ENDING)] += 1
    return images, folders


def _entries(folder: Path) -> Iterator[_Entry]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        where = one_line(error.filename or folder)
        raise DatasetError(f"cannot list {where}: {error.strerror}") from None


def _stat(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise DatasetError(f"cannot list {one_line(path)}: {error.strerror}") from None


def _size_of(entry: _Entry) -> int:
    try:
        status = entry.stat()
    except OSError as error:
        raise DatasetError(f"cannot list {one_line(entry.path)}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise DatasetError(
            f"{one_line(entry.path)} is named like an image, but is no regular file",
            fix=f"rename or remove {one_line(entry.path)}",
        )
    return status.st_size


def _is_folder(entry: _Entry) -> bool:
    try:
        if entry.is_symlink():
            os.stat(entry.path)  # raises where it leads nowhere
        if not entry.is_dir():
            return False
        if entry.is_symlink() and Path(entry.path).parent.resolve().is_relative_to(
            Path(entry.path).resolve()
        ):
            raise _endless(entry.path)
    except OSError as error:
        raise DatasetError(
            f"{one_line(entry.path)} is a symbolic link that leads nowhere: {error.strerror}",
            fix=f"remove the link {one_line(entry.path)}",
        ) from None
    return True


def _endless(path: str) -> DatasetError:
    return DatasetError(
        f"{one_line(path)} is a symbolic link to a folder around it: an endless tree",
        fix=f"remove the link {one_line(path)}",
    )
