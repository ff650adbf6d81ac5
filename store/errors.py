"""What can be wrong with a cache. Each message says what, where, and the command that fixes it.

The store knows a teacher by the name of its file. A program that knows the user's own words (a
path, overrides, another folder of caches) wraps its calls in `fixes_spelled_by`, so that the
printed command repeats them.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import Busy, UserError
from runtime.names import is_teacher_name
from runtime.program import in_repository, program, program_text
from store.differences import Difference, told

Spell = Callable[[list[str]], str]  # overrides to add, such as ["views.count=8"] -> the command


@dataclass(frozen=True)
class TeacherPass:
    """A fix: the command that creates, finishes, grows or repairs a teacher's cache.

    teacher: name of its file. overrides: to add to the user's own. before: what to do first,
    printed in front of the command, such as "make room, then: ". caches: the folder, or URL, that
    holds the cache. recheck: a repair, for which the pass reads every byte of a large cache too.
    """

    teacher: str
    overrides: tuple[str, ...] = ()
    before: str = ""
    caches: Path = Path("caches")
    recheck: bool = False

    def text(self, spell: Spell) -> str:
        command = spell(list(self.overrides))
        if self.recheck:
            command += " RECHECK=1" if command.startswith("make ") else " --recheck"
        return self.before + command

    def __str__(self) -> str:
        where = "" if self.caches == Path("caches") else str(self.caches)
        return self.text(lambda more: make_command(self.teacher, more, CACHES=where))


def make_command(teacher: str, overrides: Sequence[str] = (), **settings: str) -> str:
    """`make cache-teacher` for the teacher's file of that name. settings: such as RECHECK="1".

    Outside the repository, which has the Makefile, the program itself. A name that a shell or make
    would take for more than a name is never printed: somebody may have forged it.
    """
    shown = teacher if is_teacher_name(teacher) else "NAME"
    if not in_repository():
        options = [f"--caches={settings['CACHES']}"] if settings.get("CACHES") else []
        options += ["--recheck"] if settings.get("RECHECK") else []
        return shlex.join([*program("precompute"), shown, *options, *overrides])
    words = {"TEACHER": shown, "ARGS": " ".join(overrides), **settings}
    given = [f"{key}={shlex.quote(word)}" for key, word in words.items() if word]
    return " ".join(["make cache-teacher", *given])


@dataclass(frozen=True)
class RemoteFix(TeacherPass):
    """A fix of a damaged cache below `caches`, a URL: its pass; `also` names another one."""

    @property
    def also(self) -> str:
        """The line about the command that puts the objects of a valid copy there."""
        copy = f"{program_text('store')} copy CACHE {shlex.quote(str(self.caches))}"
        return f"with a valid copy of it, CACHE, also: {copy}"


def remote_fix(cache: Path, teacher: str) -> RemoteFix:
    """What repairs the cache at a URL."""
    return RemoteFix(teacher, caches=cache.parent, recheck=True)


class CacheError(UserError):
    """Base of everything the store raises on purpose."""

    def __init__(self, problem: str, *, fix: str | TeacherPass | None = None) -> None:
        super().__init__(problem, fix=None if fix is None else str(fix))
        self._also = f"\n  {fix.also}" if isinstance(fix, RemoteFix) else ""
        self.teacher_pass = fix if isinstance(fix, TeacherPass) else None

    def __str__(self) -> str:
        return self.problem + self._also + (f"\n  fix: {self.fix}" if self.fix else "")


@contextmanager
def fixes_spelled_by(spell: Spell) -> Iterator[None]:
    """Errors raised inside name the user's own command where the fix is a pass of the teacher."""
    try:
        yield
    except CacheError as error:
        if error.teacher_pass is not None:
            error.fix = error.teacher_pass.text(spell)
            error.teacher_pass = None  # the nearest to the user's words decides
        raise


class CacheMissing(CacheError, FileNotFoundError):
    """There is no cache at that path, or none for that teacher."""


class CacheMismatch(CacheError, ValueError):
    """The cache belongs to another configuration: `differences` names the fields, if known."""

    def __init__(
        self,
        problem: str,
        *,
        differences: Sequence[Difference] = (),
        fix: str | TeacherPass | None = None,
    ) -> None:
        super().__init__("\n  ".join([problem, *told(differences)]), fix=fix)
        self.differences = tuple(differences)


class CacheAmbiguous(CacheMismatch):
    """Several caches fit, because not all that is expected is known."""


class CacheIncomplete(CacheError, LookupError):
    """The teacher's pass is not finished."""


class CacheDamaged(CacheError, OSError):
    """Bytes on disk are not those that were committed."""


class CacheBusy(CacheError, Busy):
    """Another process is writing this cache."""


class CacheFull(CacheError, OSError):
    """The disk has too little room for what is still to be written."""


class CacheNotWritable(CacheError, PermissionError):
    """The folder may not be written to."""


class BadTeacherOutput(CacheError, ArithmeticError):
    """The teacher gave a number that the tap's dtype cannot represent."""


class SamplesChanged(CacheMismatch):
    """Samples differ from those that other views were computed from; `samples` are their ids."""

    def __init__(self, cache: Path, samples: Iterable[int]) -> None:
        self.samples = [int(sample) for sample in samples]
        super().__init__(
            f"{len(self.samples)} samples have changed since {cache} was begun; the first is "
            f"sample {self.samples[0]}",
            fix=f"restore them, or remove {cache} and run again",
        )


class UnknownTap(CacheError, KeyError):
    """The cache holds no such tap."""


class UnknownView(CacheError, IndexError):
    """The cache holds no such view or sample."""
