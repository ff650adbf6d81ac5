"""Errors that the user can fix, and the exception for a requested stop.

Every package derives its errors from `UserError`. A command prints them without a traceback and
ends with their exit code.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_SIMILAR = 0.6  # minimum ratio of difflib for a suggestion
_SHORT, _SHORT_SIMILAR = 6, 0.7  # stricter for short words, such as "limit" and "init"
_TELLING = 8  # first letters that distinguish words
# Names that other projects and earlier versions use, unlike the name here.
_OTHER_NAMES = {
    "energy": "attention",
    "erasing": "random_erasing",
    "every-sample": "check-images",
    "feed": "placement",
    "from": "reuse-from",
    "kind": "type",
    "limit": "max_per_class",
    "means": "channel_means",
    "redo": "retrain",
    "top": "top_k",
    "track": "logger",
    "which": "checkpoint",
    "world": "world-size",
}


class UserError(Exception):
    """A fault of the input, the files or the machine that the user can fix.

    problem: what is wrong and where, the first lines of the message. fix: a command or an
    instruction, printed on its own line.
    """

    exit_code = 2

    def __init__(self, problem: str, *, fix: str | None = None) -> None:
        super().__init__(problem)
        self.problem, self.fix = problem, fix

    def __str__(self) -> str:  # subclasses may be KeyErrors, which quote their text
        return self.problem + (f"\n  fix: {self.fix}" if self.fix else "")


class DeviceError(UserError, ValueError):
    """A device that this machine lacks."""


class Busy(UserError, BlockingIOError):
    """Another process holds the lock of a folder."""


class Stopped(Exception):
    """Work that was stopped on request; `exit_code` is 128 + the signal's number."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(signal_number, message)
        self.message, self.exit_code = message, 128 + signal_number

    def __str__(self) -> str:
        return self.message


def did_you_mean(word: str, known: Iterable[str], most: int = 1) -> str:
    """Return "; did you mean 'that'?" with the known words nearest to `word`; "" if none is near.

    A known word of several parts is near if one of its parts begins like `word`.
    """
    names = {name.lstrip("-"): name for name in known}  # two dashes would make all options alike
    word = word.lstrip("-")
    least = _SIMILAR if len(word) > _SHORT else _SHORT_SIMILAR
    close = [name for name in (_OTHER_NAMES.get(word, ""),) if name in names]
    close += difflib.get_close_matches(word, names, n=most, cutoff=least)
    close += [name for name in names if _has_part_like(word, name)]
    close = [names[each] for each in close]
    *some, last = map(repr, dict.fromkeys(close[:most])) if close else [""]
    return f"; did you mean {' or '.join(filter(None, [', '.join(some), last]))}?" if last else ""


def _has_part_like(word: str, name: str) -> bool:
    begin = word[:_TELLING]
    return len(begin) > 3 and any(part.startswith(begin) for part in re.split("[_-]", name))
