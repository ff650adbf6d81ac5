"""Read untrusted files: regular files only, of bounded size.

A FIFO would block, /dev/zero would fill the memory, and a link may lead anywhere. Each is an error
that names the file. JSON must be strict UTF-8: no NaN, no duplicate keys, no deep nesting.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from teach_once.runtime.errors import UserError
from teach_once.runtime.formats import format_size
from teach_once.runtime.safe.text import one_line

MAX_DEPTH = 32
MAX_VALUES = 2_000_000  # values in a document; each takes about 100 bytes of memory
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_INTEGERS = range(-(2**63), 2**64)  # 64 bits, signed or unsigned
_LONGEST_INTEGER = 20  # digits, or 19 and a sign
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class BadFile(UserError, ValueError):
    """A file that differs from what is expected: its `path`, and `what` is wrong."""

    def __init__(self, path: Path, what: str, *, fix: str | None = None) -> None:
        super().__init__(f"{one_line(path)} {what}", fix=fix)
        self.path, self.what = path, what


def open_regular(path: Path, *, follow: bool = False, dir_fd: int | None = None) -> BinaryIO:
    """Open a regular file for reading, unbuffered. The caller closes it.

    follow: follow a symbolic link in the last part of the path. dir_fd: open folder that `path` is
    relative to. Raises BadFile for anything but a regular file, FileNotFoundError and
    PermissionError.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        handle = os.open(path, flags, dir_fd=dir_fd)
    except OSError as error:
        if error.errno == errno.ELOOP:
            what = "is a loop of symbolic links" if follow else "is a symbolic link"
            raise BadFile(path, f"{what}, expected a regular file") from None
        if error.errno in (errno.ENXIO, errno.ENODEV):
            raise BadFile(path, "is a socket or a device, expected a regular file") from None
        if error.errno == errno.ENAMETOOLONG:
            raise BadFile(path, "has a name that is too long") from None
        raise
    if not stat.S_ISREG(mode := os.fstat(handle).st_mode):
        os.close(handle)
        raise BadFile(path, f"is {kind_of_file(mode)}, expected a regular file")
    return os.fdopen(handle, "rb", buffering=0)


def is_out_of_resources(error: BaseException) -> bool:
    """Return True if the error is caused by too many open files or lack of memory.

    Such an error does not mean that a file is damaged, and must not be reported as damage.
    """
    return isinstance(error, OSError) and error.errno in _OUT_OF_RESOURCES


def kind_of_file(mode: int) -> str:
    """Describe st_mode in words, with an article."""
    return next((name for test, name in _KINDS if test(mode)), "a file")


def read_bounded(
    path: Path, max_bytes: int, *, follow: bool = False, dir_fd: int | None = None
) -> bytes:
    """Read a regular file of at most `max_bytes`, whose size is checked before reading.

    Raises BadFile, FileNotFoundError or PermissionError.
    """
    with open_regular(path, follow=follow, dir_fd=dir_fd) as file:
        return read_open(file, path, max_bytes)


def read_open(file: BinaryIO, path: Path, max_bytes: int) -> bytes:
    """Read an open file as `read_bounded` does. path: for messages."""
    size = os.fstat(file.fileno()).st_size
    if size <= max_bytes:
        content = _read_all(file, max_bytes + 1)
        if len(content) <= max_bytes:
            return content
    raise BadFile(path, f"has {format_size(size)}, expected at most {format_size(max_bytes)}")


def _read_all(file: BinaryIO, most: int) -> bytes:
    pieces: list[bytes] = []
    while most > 0 and (piece := file.read(min(most, 2**20))):
        pieces.append(piece)
        most -= len(piece)
    return b"".join(pieces)


def parse_json(
    content: bytes, path: Path, *, max_depth: int = MAX_DEPTH, max_values: int = MAX_VALUES
) -> Any:
    """Parse a JSON document in UTF-8. path: for messages.

    Rejects content on which parsers disagree: a byte-order mark, NaN and infinity, duplicate keys,
    integers beyond 64 bits, lone surrogates and deep nesting. More than `max_values` keys and
    values are rejected before parsing. Raises BadFile.
    """
    try:
        if sum(map(content.count, (b",", b":", b"[", b"{"))) > max_values:
            raise ValueError(f"more than {max_values:,} values")
        text = content.decode("utf-8")
        value = json.loads(
            text, parse_constant=_refused, parse_int=_integer, object_pairs_hook=_object
        )
        _check_values(value, max_depth)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise BadFile(path, f"is not valid JSON: {reason}") from None
    return value


def _refused(word: str) -> Any:
    raise ValueError(f"{word} is not a number")


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_INTEGER:
        raise ValueError(f"an integer has {len(digits):,} digits")
    if (value := int(digits)) not in _INTEGERS:
        raise ValueError(f"{value} does not fit 64 bits")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"duplicate key {_first_twice(key for key, _ in pairs)!r}")
    return found


def _first_twice(keys: Iterable[str]) -> str:
    """Return the first duplicate key, which must exist; one pass, because there may be millions."""
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    raise AssertionError("no key occurs twice")


def _check_values(value: Any, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, float) and item in (float("inf"), float("-inf")):
                raise ValueError("a number is too large")
            elif isinstance(item, str):
                item.encode("utf-8")  # raises for a lone surrogate
        if not inner:
            return
        level = inner
    raise ValueError(f"nesting exceeds {max_depth} levels")
