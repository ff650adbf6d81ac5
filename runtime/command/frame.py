"""The frame of every command: its console, its exit status, and signals around the work.

Exit status: 0 done, 1 the work found something unsound, 2 it cannot be done as asked (one message
on stderr, no traceback), 128 + n ended by signal n. Unexpected errors keep their traceback.
"""

from __future__ import annotations

import atexit
import errno
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console

from teach_once.runtime.command.help import App, WrongUsage, usage_error
from teach_once.runtime.command.make_args import with_words
from teach_once.runtime.errors import Stopped, UserError
from teach_once.runtime.machine.resources import num_ranks
from teach_once.runtime.safe.text import one_line, visible

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
# A file where a folder should be, or the reverse; a link to itself; a socket, a device without one.
_IN_THE_WAY = (
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV),
)


def new_app(help_text: str | None = None) -> typer.Typer:
    """A typer application without shell completion, whose errors `run_command` prints."""
    return App(add_completion=False, pretty_exceptions_enable=False, help=help_text)


class _PlainConsole(Console):
    """Shows the control characters of text instead of sending them to the terminal."""

    def print(self, *objects: Any, **options: Any) -> None:
        shown = (visible(each) if isinstance(each, str) else each for each in objects)
        super().print(*shown, **options)


def new_console() -> Console:
    """Prints text as it is: long lines are not wrapped, nothing is taken for markup or escapes."""
    return _PlainConsole(soft_wrap=True, highlight=False, markup=False, emoji=False)


def run_command(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return its exit status."""
    if arguments is None:
        sys.argv[1:] = arguments = with_words(sys.argv[1:])
    is_our_command = sys.argv[0].partition(" ")[0] == "teach-once"
    with _ended_by_signals():
        try:
            name = sys.argv[0] if is_our_command else None
            status = app(with_words(arguments), prog_name=name, standalone_mode=False)
            return status or 0  # of typer.Exit; a command itself returns None
        except SystemExit as ended:
            return int(ended.code or 0)
        except WrongUsage as usage:
            error = usage_error(usage)
            print(visible(f"error: {error}"), file=sys.stderr)
            return error.exit_code
        except UserError as error:
            print(visible(f"error: {error}"), file=sys.stderr)
            return error.exit_code
        except Stopped as stopped:
            print(visible(str(stopped)), file=sys.stderr)
            return stopped.exit_code
        except OSError as error:
            if (refusal := disk_refusal(error)) is None:
                raise
            print(visible(f"error: {refusal}"), file=sys.stderr)
            return refusal.exit_code


def end_process(status: int) -> NoReturn:
    """End with this exit status.

    One of several ranks ends without taking its modules apart: torch's threads, which outlive the
    group of processes that they served, may abort a process that does (seen with gloo and 2.13).
    """
    if num_ranks() == 1:
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def disk_refusal(error: OSError) -> UserError | None:
    """Return the error for a disk that is full, that refuses, or that holds something else under a
    name, and for too few open files or too little memory.

    Returns None for any other.
    """
    where = one_line(error.filename) if error.filename else "the disk"
    again = "; then run the same command again: what was saved before is sound"
    if error.errno in _NO_ROOM:
        return UserError(f"{where}: {error.strerror}", fix=f"make room{again}")
    if error.errno in _REFUSED:
        return UserError(
            f"{where}: {error.strerror}", fix=f"permit it, or choose another path{again}"
        )
    if error.errno in _TOO_MANY_FILES:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return UserError(
            f"{error.strerror}: this process may open {soft:,}",
            fix=f"ulimit -n {max(hard, 4096)}{again}",
        )
    if error.errno == errno.ENOMEM:
        return UserError(
            f"{where}: {error.strerror}",
            fix=f"free memory, or raise the limit of this shell: ulimit -v unlimited{again}",
        )
    if error.errno in _IN_THE_WAY and error.filename:
        return UserError(
            f"{where}: {error.strerror}: not the file or folder that this program expects there",
            fix="look at what it is, move it away, then run the same command again",
        )
    return None


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Before and after the work a signal ends the command; during it `runtime.command.signals`
    does.
    """
    listens = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if listens else ()
    before = {number: signal.signal(number, _end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    print("stopped", file=sys.stderr)  # nothing is known here of what was saved
    sys.exit(128 + number)
