"""Turns a disk's refusals into errors that say what to do: no permission, no room."""

from __future__ import annotations

import errno
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.reading import BadFile
from store.errors import CacheDamaged, CacheFull, CacheNotWritable, TeacherPass

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EROFS, errno.EACCES, errno.EPERM)


def is_full(error: OSError) -> bool:
    """Whether the error says that the disk, or the user's share of it, is full."""
    return error.errno in _NO_ROOM


def full_error(cache: Path, teacher: str, needed_bytes: int, free_bytes: int) -> CacheFull:
    return CacheFull(
        f"the disk of {cache} is too full: {needed_bytes:,} bytes are still to be written, "
        f"{free_bytes:,} are free; committed blocks are saved",
        fix=TeacherPass(teacher, before="make room, then: "),
    )


@contextmanager
def refusals_of(path: Path) -> Iterator[None]:
    """Raise CacheNotWritable where the system does not permit to write to `path`.

    CacheDamaged where links, or files of another kind, are in the way: nothing is written through
    them.
    """
    try:
        yield
    except BadFile as error:
        raise CacheDamaged(
            error.problem,
            fix=f"remove it ({shlex.join(['rm', '-r', str(error.path)])}), then run again",
        ) from None
    except OSError as error:
        if error.errno not in _NO_PERMISSION:
            raise
        raise CacheNotWritable(
            f"{path} cannot be written to: {error.strerror}",
            fix="make it writable, or choose another folder with --caches DIR",
        ) from None


@contextmanager
def refusing_full(cache: Path, teacher: str, needed_bytes: Callable[[], int]) -> Iterator[None]:
    """As `refusals_of`; raise CacheFull, too, where the disk has no room for what is to come."""
    try:
        with refusals_of(cache):
            yield
    except OSError as error:
        if not is_full(error):
            raise
        free = shutil.disk_usage(cache).free
        raise full_error(cache, teacher, needed_bytes(), free) from None
