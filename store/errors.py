"""The errors of a cache. Each message contains the problem, the place, and the command that fixes
it.

The store identifies a teacher by the name of its file. A program that has the user's own words (a
path, overrides, another folder of caches) wraps its calls in `fixes_spelled_by`, so that the
printed command repeats them.
"""

from __future__ import annotations

import errno
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from teach_once.runtime.command.program import in_repository, program, program_text
from teach_once.runtime.errors import Busy, UserError
from teach_once.runtime.formats import format_size
from teach_once.runtime.safe.names import is_teacher_name
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.runtime.safe.text import one_line
from teach_once.store.identity import EVALUATION, Difference, told

Spell = Callable[[list[str]], str]  # overrides to add, such as ["views.count=8"] -> the command


@dataclass(frozen=True)
class PassCommand:
    """A fix: the command that creates, completes, grows or repairs a teacher's cache.

    teacher: name of its file. overrides: to add to the user's own. before: printed in front of the
    command, such as "make room, then: ". caches: the folder or URL that contains the cache.
    full_check: for a repair, for which the pass reads every byte of a large cache too.
    """

    teacher: str
    overrides: tuple[str, ...] = ()
    before: str = ""
    caches: Path = Path("caches")
    full_check: bool = False

    def text(self, spell: Spell) -> str:
        command = spell(list(self.overrides))
        if self.full_check:
            command += " FULL_CHECK=1" if command.startswith("make ") else " --full-check"
        return self.before + command

    def __str__(self) -> str:
        where = "" if self.caches == Path("caches") else str(self.caches)
        return self.text(lambda more: make_command(self.teacher, more, CACHES=where))


def make_command(teacher: str, overrides: Sequence[str] = (), **settings: str) -> str:
    """Return `make cache-teacher` for a teacher's file. settings: such as FULL_CHECK="1".

    Outside the repository, which has the Makefile, the program itself is returned. A name that a
    shell or make would interpret is never printed, because it may be forged.
    """
    shown = teacher if is_teacher_name(teacher) else "NAME"
    if not in_repository():
        options = [f"--caches={settings['CACHES']}"] if settings.get("CACHES") else []
        options += ["--full-check"] if settings.get("FULL_CHECK") else []
        return shlex.join([*program("precompute"), shown, *options, *overrides])
    words = {"TEACHER": shown, "ARGS": " ".join(overrides), **settings}
    given = [f"{key}={shlex.quote(word)}" for key, word in words.items() if word]
    return " ".join(["make cache-teacher", *given])


@dataclass(frozen=True)
class RemoteFix(PassCommand):
    """A fix of a damaged cache below `caches`, a URL: its pass; `also` names an alternative."""

    @property
    def also(self) -> str:
        """Return the line about the command that puts the objects of a valid copy there."""
        copy = f"{program_text('store')} copy CACHE {shlex.quote(str(self.caches))}"
        return f"with a valid copy of it, CACHE, also: {copy}"


def remote_fix(cache: Path, teacher: str) -> RemoteFix:
    """Return the fix of the cache at a URL."""
    return RemoteFix(teacher, caches=caches_folder(cache), full_check=True)


def caches_folder(cache: Path) -> Path:
    """Return the folder of caches of a cache; of an evaluation cache, of the cache around it."""
    is_inside = cache.parent.name == EVALUATION
    return cache.parent.parent.parent if is_inside else cache.parent


class CacheError(UserError):
    """Base of all errors that the store raises on purpose."""

    def __init__(self, problem: str, *, fix: str | PassCommand | None = None) -> None:
        super().__init__(problem, fix=None if fix is None else str(fix))
        self._also = f"\n  {fix.also}" if isinstance(fix, RemoteFix) else ""
        self.teacher_pass = fix if isinstance(fix, PassCommand) else None

    def __str__(self) -> str:
        return self.problem + self._also + (f"\n  fix: {self.fix}" if self.fix else "")


@contextmanager
def fixes_spelled_by(spell: Spell) -> Iterator[None]:
    """Let errors raised inside print the user's own command if the fix is a pass of the teacher."""
    try:
        yield
    except CacheError as error:
        if error.teacher_pass is not None:
            error.fix = error.teacher_pass.text(spell)
            error.teacher_pass = None  # the innermost caller with the user's words decides
        raise


class CacheMissing(CacheError, FileNotFoundError):
    """There is no cache at that path, or none of that teacher."""


class CacheMismatch(CacheError, ValueError):
    """The cache belongs to another configuration: `differences` names the fields, if known."""

    def __init__(
        self,
        problem: str,
        *,
        differences: Sequence[Difference] = (),
        fix: str | PassCommand | None = None,
    ) -> None:
        super().__init__("\n  ".join([problem, *told(differences)]), fix=fix)
        self.differences = tuple(differences)


class CacheAmbiguous(CacheMismatch):
    """Several caches match, because the expected identity is only partly known."""


class CacheIncomplete(CacheError, LookupError):
    """The teacher's pass is not finished."""


class CacheDamaged(CacheError, OSError):
    """Bytes on disk are not those that were committed."""


class CacheBusy(CacheError, Busy):
    """Another process is writing this cache."""


class CacheFull(CacheError, OSError):
    """The disk has too little room for the remaining work."""


class CacheNotWritable(CacheError, PermissionError):
    """The system or the store does not permit writing."""


class BadTeacherOutput(CacheError, ArithmeticError):
    """The teacher returned a number that the tap's dtype cannot represent."""


class SamplesChanged(CacheMismatch):
    """Samples differ from those of other views; `samples` are their ids."""

    def __init__(self, cache: Path, samples: Iterable[int]) -> None:
        self.samples = [int(sample) for sample in samples]
        super().__init__(
            f"{len(self.samples)} samples have changed since {cache} was begun; the first is "
            f"sample {self.samples[0]}",
            fix=f"restore them, or remove {cache} and run again",
        )


class UnknownTap(CacheError, KeyError):
    """The cache has no such tap."""


class UnknownView(CacheError, IndexError):
    """The cache has no such view or sample."""


_NAMED_FAULTS = 5


@dataclass(frozen=True)
class Fault:
    """A single problem. tap, view and block are None if it concerns all of them."""

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


def damage_error(fix: str | PassCommand, faults: Sequence[Fault]) -> CacheDamaged:
    """Return the error that names the first few of these faults; fix: repairs the cache."""
    lines = [f"  {fault}" for fault in faults[:_NAMED_FAULTS]]
    if len(faults) > _NAMED_FAULTS:
        lines.append(f"  and {len(faults) - _NAMED_FAULTS} more")
    return CacheDamaged("\n".join(["the cache is damaged", *lines]), fix=fix)


@contextmanager
def damage_as_error(teacher: str) -> Iterator[None]:
    """Raise CacheDamaged if a file of the cache is not a regular one, or cannot be read."""
    try:
        yield
    except BadFile as error:
        before = f"rm -r {shlex.quote(str(error.path))} && "
        raise CacheDamaged(error.problem, fix=PassCommand(teacher, before=before)) from None


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_PERMISSION = (errno.EROFS, errno.EACCES, errno.EPERM)


def is_full(error: OSError) -> bool:
    """Return True if the error means that the disk, or the user's quota, is full."""
    return error.errno in NO_ROOM


def full_error(cache: Path, teacher: str, needed_bytes: int, free_bytes: int) -> CacheFull:
    return CacheFull(
        f"the disk of {cache} is too full: {needed_bytes:,} bytes are still to be written, "
        f"{free_bytes:,} are free; committed blocks are saved",
        fix=PassCommand(teacher, before="make room, then: "),
    )


@contextmanager
def refusals_of(path: Path) -> Iterator[None]:
    """Raise CacheNotWritable if the system does not permit writing to `path`.

    Raises CacheDamaged if links, or files of another kind, are in the way: nothing is written
    through them.
    """
    try:
        yield
    except BadFile as error:
        raise CacheDamaged(
            error.problem,
            fix=f"remove it ({shlex.join(['rm', '-r', str(error.path)])}), then run again",
        ) from None
    except OSError as error:
        if error.errno not in NO_PERMISSION:
            raise
        raise CacheNotWritable(
            f"{path} cannot be written to: {error.strerror}",
            fix="make it writable, or choose another folder with --caches DIR",
        ) from None


def require_room(folder: Path, needed_bytes: int, *, where: Path, fix: str) -> None:
    """Raise CacheFull unless the disk of `folder` has space. where: the path in the message."""
    if needed_bytes > (free := shutil.disk_usage(folder).free):
        raise CacheFull(
            f"the disk of {where} is too full: {format_size(needed_bytes)} are needed, "
            f"{format_size(free)} are free",
            fix=fix,
        )


@contextmanager
def full_disk_as_error(where: Path, fix: str | PassCommand, purpose: str = "") -> Iterator[None]:
    """Raise CacheFull if a write fails for lack of space. purpose: ends the message."""
    try:
        yield
    except OSError as error:
        if isinstance(error, CacheError) or not is_full(error):
            raise
        raise CacheFull(f"the disk of {where} is too full{purpose}", fix=fix) from None


@contextmanager
def refusing_full(cache: Path, teacher: str, needed_bytes: Callable[[], int]) -> Iterator[None]:
    """Raise as `refusals_of`, and CacheFull if the disk lacks space for the remaining bytes."""
    try:
        with refusals_of(cache):
            yield
    except OSError as error:
        if not is_full(error):
            raise
        free = shutil.disk_usage(cache).free
        raise full_error(cache, teacher, needed_bytes(), free) from None
