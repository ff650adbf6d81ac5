"""What can be wrong with a cache. Each message says what, where, and the command that fixes it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from runtime.errors import Busy, UserError

_COMMAND = re.compile(
    r"make cache-teacher TEACHER=(?:'[^']*'|\S+)(?: ARGS=(?:\"(?P<several>[^\"]*)\"|(?P<one>\S+)))?"
)


def teacher_command(teacher: str) -> str:
    """What makes, finishes or mends the cache of the teacher file of that name."""
    return f"make cache-teacher TEACHER={shlex.quote(teacher)}"


class CacheError(UserError):
    """Base of everything the store raises on purpose."""

    def with_command(self, command: Callable[[list[str]], str]) -> Self:
        """This error with the user's own command, where the store could only name the teacher.

        command: of overrides to add, such as ["views.count=8"].
        """

        def instead(found: re.Match[str]) -> str:
            return command((found["several"] or found["one"] or "").split())

        if self.fix is not None:
            self.fix = _COMMAND.sub(instead, self.fix)
        return self


@contextmanager
def told_with(command: Callable[[list[str]], str]) -> Iterator[None]:
    """Errors of the store raised inside get the user's own command; see `with_command`."""
    try:
        yield
    except CacheError as error:
        raise error.with_command(command) from None


class CacheMissing(CacheError, FileNotFoundError):
    """There is no cache at that place, or none for that teacher."""


class CacheMismatch(CacheError, ValueError):
    """A cache of something else: its identity, labels, taps or pixels are not those expected."""


class CacheAmbiguous(CacheMismatch):
    """Several caches fit, as far as what is expected is known."""


class CacheIncomplete(CacheError, LookupError):
    """The teacher pass has not been finished."""


class CacheDamaged(CacheError, OSError):
    """Bytes on disk are not those that were committed."""


class CacheBusy(CacheError, Busy):
    """Another process is writing this cache."""


class CacheFull(CacheError, OSError):
    """The disk has no room for what is still to be written."""


class CacheNotWritable(CacheError, PermissionError):
    """The folder may not be written to."""


class BadTeacherOutput(CacheError, ArithmeticError):
    """The teacher gave a number that the tap cannot hold."""


class SamplesChanged(CacheMismatch):
    """Samples (their numbers in `samples`) are not those that other views were computed from."""

    def __init__(self, cache: Path, samples: Iterable[int]) -> None:
        self.samples = [int(sample) for sample in samples]
        super().__init__(
            f"{len(self.samples)} samples have changed since {cache} was begun; the first: sample "
            f"{self.samples[0]}",
            fix=f"restore them, or remove {cache} and run again",
        )


class UnknownTap(CacheError, KeyError):
    """The cache holds no such tap."""


class UnknownView(CacheError, IndexError):
    """The cache holds no such view or sample."""
