"""What is wrong with the bytes of a cache: which array, view, block and file."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime.reading import BadFile
from runtime.text import one_line
from store.errors import CacheDamaged, TeacherPass

_NAMED_FAULTS = 5


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong. tap, view and block are None where it concerns all of them."""

    what: str
    file: Path
    tap: str | None = None
    view: int | None = None
    block: int | None = None

    def __str__(self) -> str:
        position = [
            f"{name} {value}"
            for name, value in (("tap", self.tap), ("view", self.view), ("block", self.block))
            if value is not None
        ]
        return ", ".join([*position, f"{self.what}: {one_line(self.file)}"])


def damage_error(fix: str | TeacherPass, faults: Sequence[Fault]) -> CacheDamaged:
    """The error that names the first few of these faults; fix: what repairs the cache."""
    lines = [f"  {fault}" for fault in faults[:_NAMED_FAULTS]]
    if len(faults) > _NAMED_FAULTS:
        lines.append(f"  and {len(faults) - _NAMED_FAULTS} more")
    return CacheDamaged("\n".join(["the cache is damaged", *lines]), fix=fix)


@contextmanager
def damage_as_error(teacher: str) -> Iterator[None]:
    """Raise CacheDamaged where a file of the cache is not a regular one, or cannot be read."""
    try:
        yield
    except BadFile as error:
        before = f"rm -r {shlex.quote(str(error.path))} && "
        raise CacheDamaged(error.problem, fix=TeacherPass(teacher, before=before)) from None
