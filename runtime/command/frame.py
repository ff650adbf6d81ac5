"""The frame of every command: console, exit status, and handling of signals.

Exit status: 0 success; 1 the work found a fault; 2 the request cannot be carried out (one message
on stderr, no traceback); 128 + n ended by signal n. Unexpected errors keep their traceback.
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
# A file in place of a folder or the reverse, a link to itself, a socket, an unusable device.
_IN_THE_WAY = (
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV),
)


def new_app(help_text: str | None = None) -> typer.Typer:
    """Return a typer application without shell completion, whose errors `run_command` prints."""
    return App(add_completion=False, pretty_exceptions_enable=False, help=help_text)


class _PlainConsole(Console):
    """A console that escapes control characters instead of sending them to the terminal."""

    def print(self, *objects: Any, **options: Any) -> None:
        shown = (visible(each) if isinstance(each, str) else each for each in objects)
        super().print(*shown, **options)


def new_console() -> Console:
    """Return a console that prints text unchanged: no wrapping, no markup, no escape sequences."""
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
            return status or 0  # from typer.Exit; commands return None
        except SystemExit as ended:
            return int(ended.code or 0)
        except typer.Abort:  # a question without an answer
            print("aborted", file=sys.stderr)
            return 1
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
    """End the process with an exit status.

    With several ranks, the process ends without unloading its modules. Otherwise threads of torch
    that outlive the process group may abort it (seen with gloo and torch 2.13).
    """
    if num_ranks() == 1:
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def disk_refusal(error: OSError) -> UserError | None:
    """Convert an error of the operating system to a UserError; None if it is unexpected.

    Covers a full disk, missing permission, a file of an unexpected kind, too many open files and
    lack of memory.
    """
    where = one_line(error.filename) if error.filename else "the disk"
    again = "; then run the same command again: saved results remain valid"
    if error.errno in _NO_ROOM:
        return UserError(f"{where}: {error.strerror}", fix=f"make room{again}")
    if error.errno in _REFUSED:
        return UserError(
            f"{where}: {error.strerror}", fix=f"allow access, or choose another path{again}"
        )
    if error.errno in _TOO_MANY_FILES:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return UserError(
            f"{error.strerror}: this process may open {soft:,} files",
            fix=f"ulimit -n {max(hard, 4096)}{again}",
        )
    if error.errno == errno.ENOMEM:
        return UserError(
            f"{where}: {error.strerror}",
            fix=f"free memory, or raise the limit of this shell: ulimit -v unlimited{again}",
        )
    if error.errno in _IN_THE_WAY and error.filename:
        return UserError(
            f"{where}: {error.strerror}: another kind of file is expected there",
            fix="check what it is, move it away, then run the same command again",
        )
    return None


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let a signal end the command before and after its work.

    During the work, `runtime.command.signals` handles signals.
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
    print("stopped", file=sys.stderr)  # what was saved is not known here
    sys.exit(128 + number)
