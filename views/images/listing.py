"""List an image folder and store the list as an index.

Listing a million files over a network takes minutes, and every program needs the list. The index is
next to the caches. It is valid while no folder of the tree has another modification time, which
adding, removing or renaming a file changes. Overwriting a file in place does not change its folder;
the sample digests in caches detect that.

Names and sizes are arrays instead of a million objects, which would be copied into every process
that reads images.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from teach_once.runtime.safe.confined import opened_folder, write_inside
from teach_once.runtime.safe.safe_read import BadFile, parse_json, read_bounded
from teach_once.runtime.safe.text import one_line
from teach_once.views.splits import DatasetError, Ids, LazyPaths, check_class_name

IMAGE_SUFFIXES = (
    *(".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)  # suffixes of the formats in views.images.decode.FORMATS
HIDDEN = "hidden"  # reasons other than a file's suffix
LOOSE = "in no class"
LINKED = "links to folders"
_SUFFIXES = tuple(os.fsencode(suffix) for suffix in IMAGE_SUFFIXES)
_LONGEST_ENDING = 12
_NAMED_ENDINGS = 5
_MAC_METADATA = "__MACOSX"
_Entry = os.DirEntry[str]


@dataclass
class FoundImages:
    """The images of one folder: names relative to it, in bytes, and sizes.

    folders: every visited folder, relative to `folder`, with its modification time. left_out:
    number of skipped entries by reason.
    """

    names: list[bytes] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    folders: list[tuple[str, int]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def is_hidden(name: str) -> bool:
    """Return True for names that begin with a dot and for macOS's metadata folders."""
    return name.startswith(".") or name == _MAC_METADATA


def has_hidden_part(path: str) -> bool:
    """Return True if any part of a `/`-separated path is hidden; a leading `./` is not."""
    return any(is_hidden(part) for part in path.split("/") if part not in ("", ".", ".."))


def find_classes(folder: Path) -> tuple[tuple[str, ...], Counter[str]]:
    """Return the sorted names of the class folders, and the number of other entries by reason.

    Raises DatasetError if the folder cannot be listed.
    """
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


def find_images(folder: Path, name: str, follow: bool = True) -> FoundImages:
    """Return the images of `folder/name` and its subfolders, folder by folder.

    follow: include folders that are symbolic links. Raises DatasetError if one cannot be listed.
    """
    found = FoundImages()
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
        images, folders = _sorted_out(path, found.left_out, follow)
        listed[inside] = images
        pending += [(os.path.join(inside, each), around | {key}) for each in folders]
    for inside, images in sorted(listed.items()):
        prefix = os.fsencode(inside) + b"/" if inside else b""
        for _, raw, size in sorted(images):
            found.names.append(prefix + raw)
            found.sizes.append(size)
    return found


def describe_left_out(folder: Path, left_out: Mapping[str, int]) -> str:
    """Return a note about entries of `folder` that were skipped, or ""."""
    if not left_out:
        return ""
    endings = {name: n for name, n in left_out.items() if name not in (HIDDEN, LOOSE, LINKED)}
    parts = []
    if endings:
        ordered = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
        some = [f"{count:,} {name or 'without a suffix'}" for name, count in ordered]
        more = f", {len(some) - _NAMED_ENDINGS} more suffixes" if len(some) > _NAMED_ENDINGS else ""
        shown = ", ".join(some[:_NAMED_ENDINGS]) + more
        parts.append(f"{sum(endings.values()):,} with non-image suffixes ({shown})")
    if count := left_out.get(LOOSE):
        parts.append(f"{count:,} outside class folders")
    if count := left_out.get(LINKED):
        parts.append(f"{count:,} links to folders")
    if count := left_out.get(HIDDEN):
        parts.append(f"{count:,} hidden (named .* or {_MAC_METADATA})")
    return f"note: left out of {one_line(folder)}: {'; '.join(parts)}"


def _sorted_out(
    folder: Path, left_out: Counter[str], follow: bool
) -> tuple[list[tuple[str, bytes, int]], list[str]]:
    """Return name, name in bytes and size of each image (a file or a link to one); subfolders."""
    images, folders = [], []
    for entry in _entries(folder):
        raw = os.fsencode(entry.name)
        if is_hidden(entry.name):
            left_out[HIDDEN] += 1
        elif raw.lower().endswith(_SUFFIXES):
            images.append((entry.name, raw, _size_of(entry)))
        elif not follow and entry.is_symlink() and entry.is_dir():
            left_out[LINKED] += 1
        elif entry.is_dir(follow_symlinks=False) or (follow and _is_folder(entry)):
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
            f"{one_line(entry.path)} has an image's suffix, but is not a regular file",
            fix=f"rename or remove {one_line(entry.path)}",
        )
    return status.st_size


def _is_folder(entry: _Entry) -> bool:
    try:
        if entry.is_symlink():
            os.stat(entry.path)  # raises if the link is broken
        if not entry.is_dir():
            return False
        if entry.is_symlink() and Path(entry.path).parent.resolve().is_relative_to(
            Path(entry.path).resolve()
        ):
            raise _endless(entry.path)
    except OSError as error:
        raise DatasetError(
            f"{one_line(entry.path)} is a broken symbolic link: {error.strerror}",
            fix=f"remove the link {one_line(entry.path)}",
        ) from None
    return True


def _endless(path: str) -> DatasetError:
    return DatasetError(
        f"{one_line(path)} is a symbolic link to a parent folder, which makes an endless tree",
        fix=f"remove the link {one_line(path)}",
    )


INDEX_FOLDER = ".listings"
_KEPT = re.compile(r"[0-9a-f]+\.(?:index|digest)")
_VERSION = 1
_NAMES_AT_ONCE = 65_536
_SETTLED_NS = 2_000_000_000  # until then, a folder may change without a new timestamp
_MOST_INDEX_BYTES = 2**34
_MOST_HEADER_BYTES = 2**26


@dataclass(frozen=True, eq=False)
class Listing:
    """The images in `folder/<class>/`, class by class, in sorted order; or without classes.

    sizes, labels: (N,) int64. names: names within the class folders, concatenated; ends: (N,)
    int64, end of each name. Without labels, `labels` is None, there are no class names, names are
    relative to `folder`, and images are in the order of the bytes of their names. folders: every
    folder of the tree, relative to `folder`, with its modification time. left_out: number of
    skipped entries by reason.
    """

    folder: Path
    class_names: tuple[str, ...]
    sizes: NDArray[np.int64]
    labels: Ids | None
    names: bytes
    ends: NDArray[np.int64]
    folders: tuple[tuple[str, int], ...]
    left_out: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.sizes)

    def relative_names(self, ids: Ids) -> Iterator[str]:
        """Yield each path relative to `folder`, an image's name in digests and packed files."""
        labels = self.labels
        for first in range(0, len(ids), _NAMES_AT_ONCE):
            some = ids[first : first + _NAMES_AT_ONCE]
            starts = np.where(some > 0, self.ends[some - 1], 0).tolist()
            names = (
                _text(self.names[start:end])
                for start, end in zip(starts, self.ends[some].tolist(), strict=True)
            )
            if labels is None:
                yield from names
            else:
                for name, label in zip(names, labels[some].tolist(), strict=True):
                    yield f"{self.class_names[label]}/{name}"

    def fingerprint(self, ids: Ids) -> bytes:
        """Return the sha256 of names, sizes and labels; equal for equal digest texts."""
        found = hashlib.sha256(json.dumps(self.class_names).encode())
        for part in (self.labels, self.sizes, self.ends, ids):
            found.update(b"" if part is None else part.tobytes())
        found.update(self.names)
        return found.digest()

    def path(self, index: int) -> Path:
        return self.folder / next(self.relative_names(np.array([index])))

    @property
    def paths(self) -> Sequence[Path]:
        """Return all paths; each is created when it is accessed."""
        return LazyPaths(self.path, np.arange(len(self)))


def listing_of(
    folder: Path, class_names: tuple[str, ...] | None, kept_in: Path | None = None
) -> Listing:
    """List `folder`, or read its index if it is still valid.

    class_names: classes of the training images, if `folder` has other images; None: the folder's
    own classes. kept_in: folder of caches next to which the index is stored; None: always list.
    Raises DatasetError if the folder cannot be used.
    """
    found = None if kept_in is None else _indexed(folder, kept_in, has_classes=True)
    if found is None or (class_names is not None and found.class_names != class_names):
        found = _listed(folder, class_names)
        if kept_in is not None:
            _keep(found, kept_in)
    return found


def unlabeled_listing(folder: Path, kept_in: Path | None = None) -> Listing:
    """List all images of `folder` at any depth, as `listing_of`, without classes."""
    found = None if kept_in is None else _indexed(folder, kept_in, has_classes=False)
    if found is None:
        found = _listed_without_classes(folder)
        if kept_in is not None:
            _keep(found, kept_in)
    return found


def forget_listings(kept_in: Path) -> None:
    """Delete all indexes, so that folders are listed again. Raises BadFile for a link elsewhere."""
    try:
        with suppress(FileNotFoundError), opened_folder(kept_in, INDEX_FOLDER) as folder:
            for name in filter(_KEPT.fullmatch, os.listdir(folder)):
                os.unlink(name, dir_fd=folder)
    except BadFile as error:
        fix = f"rm {shlex.quote(str(error.path))}, then run the same command again"
        raise BadFile(error.path, error.what, fix=fix) from None


def kept_digest(key: bytes, compute: Callable[[], str], kept_in: Path | None) -> str:
    """Return `compute()`, or its stored result for the same key.

    key: determines the result. kept_in: folder of caches next to which results are stored; None:
    always compute.
    """
    if kept_in is None:
        return compute()
    name = Path(INDEX_FOLDER) / f"{key.hex()[:32]}.digest"
    try:
        digest = read_bounded(kept_in / name, 64).decode("ascii")
        if len(digest) == 64 and digest.isalnum():
            return digest
    except (OSError, BadFile, ValueError):
        pass
    digest = compute()
    with suppress(OSError, BadFile):  # disk full or read-only: computed again next time
        write_inside(kept_in, name, digest.encode())
    return digest


# ---- listing


def _listed(folder: Path, class_names: tuple[str, ...] | None) -> Listing:
    changed = os.stat(folder).st_mtime_ns
    there, left_out = find_classes(folder)
    if class_names is None:
        class_names = there
        if len(there) < 2:
            found = f"only {there[0]!r}" if there else "none"
            raise DatasetError(
                f"{folder} needs class folders for at least two classes, found {found}"
            )
    elif unknown := set(there) - set(class_names):
        raise DatasetError(f"{folder} has classes that train/ lacks: {', '.join(sorted(unknown))}")
    names: list[bytes] = []
    sizes: list[int] = []
    counts, folders = [], [("", changed)]
    for name in class_names:
        images = find_images(folder, name) if name in there else FoundImages()
        counts.append(len(images.names))
        names += images.names
        sizes += images.sizes
        folders += images.folders
        left_out += images.left_out
    return Listing(
        folder,
        class_names,
        np.array(sizes, dtype=np.int64),
        np.repeat(np.arange(len(class_names)), counts),
        b"".join(names),
        np.cumsum(list(map(len, names)), dtype=np.int64),
        tuple(folders),
        left_out,
    )


def _listed_without_classes(folder: Path) -> Listing:
    images = find_images(folder, "", follow=False)
    order = sorted(range(len(images.names)), key=images.names.__getitem__)
    names = [images.names[i] for i in order]
    return Listing(
        folder,
        (),
        np.array([images.sizes[i] for i in order], dtype=np.int64),
        None,
        b"".join(names),
        np.cumsum(list(map(len, names)), dtype=np.int64),
        tuple(images.folders),
        images.left_out,
    )


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")  # twice as fast as os.fsdecode


# ---- the index


def _index_name(folder: Path, has_classes: bool) -> Path:
    key = os.fsencode(folder.resolve()) + (b"" if has_classes else b"\0without classes")
    where = hashlib.sha256(key).hexdigest()[:16]
    return Path(INDEX_FOLDER) / f"{where}.index"


def _keep(listing: Listing, kept_in: Path) -> None:
    """Write the index, unless a folder was changed so recently that it may still change."""
    if time.time_ns() - max(changed for _, changed in listing.folders) < _SETTLED_NS:
        return
    labels = listing.labels
    rows: list[tuple[str | None, int]] = [(None, len(listing))]
    if labels is not None:
        counts = np.bincount(labels, minlength=len(listing.class_names))
        rows = list(zip(listing.class_names, counts.tolist(), strict=True))
    payload = b"".join([listing.sizes.tobytes(), listing.ends.tobytes(), listing.names])
    header = {
        "version": _VERSION,
        "folder": os.fsencode(listing.folder.resolve()).hex(),
        "classes": rows,
        "folders": [[os.fsencode(name).hex(), changed] for name, changed in listing.folders],
        "left_out": dict(listing.left_out),
    }
    content = json.dumps(header).encode() + b"\n" + payload
    checked = b"%08x\n" % google_crc32c.value(content) + content
    try:
        kept_in.mkdir(parents=True, exist_ok=True)
        write_inside(kept_in, _index_name(listing.folder, labels is not None), checked)
    except (OSError, BadFile):
        return  # full disk or no permission: the next program lists again


def _indexed(folder: Path, kept_in: Path, *, has_classes: bool) -> Listing | None:
    """Return the index of `folder` if it exists and is still valid."""
    path = kept_in / _index_name(folder, has_classes)
    try:
        content = read_bounded(path, _MOST_INDEX_BYTES)
        checksum, _, content = content.partition(b"\n")
        if checksum != b"%08x" % google_crc32c.value(content):
            return None
        text, _, payload = content.partition(b"\n")
        if len(text) > _MOST_HEADER_BYTES:
            return None
        return _parsed(folder, parse_json(text, path), payload)
    except (OSError, BadFile, AttributeError, KeyError, TypeError, ValueError):
        return None


def _parsed(folder: Path, header: dict[str, Any], payload: bytes) -> Listing | None:
    rows, left_out = header["classes"], header["left_out"]
    if header["version"] != _VERSION or not isinstance(rows, list):
        return None
    if header["folder"] != os.fsencode(folder.resolve()).hex():
        return None
    folders = [(os.fsdecode(bytes.fromhex(name)), changed) for name, changed in header["folders"]]
    if any(os.stat(folder / name).st_mtime_ns != changed for name, changed in folders):
        return None
    names, counts = zip(*rows, strict=True)
    has_classes, total = names != (None,), sum(counts)
    sizes, ends = np.frombuffer(payload, np.int64, 2 * total).reshape(2, total)
    return Listing(
        folder,
        tuple(names) if has_classes else (),
        sizes,
        np.repeat(np.arange(len(names)), counts) if has_classes else None,
        payload[16 * total :],
        ends,
        tuple(folders),
        {str(reason): int(count) for reason, count in left_out.items()},
    )
