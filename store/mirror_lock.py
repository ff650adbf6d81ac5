"""Waits for the lock of a mirror, and says for whom; ends if that process shows no sign of life.

Whoever has the lock writes its number into the file, and touches that with each file it fetches: a
large download may take hours. A process that was stopped, or that hangs, keeps a lock for ever.
"""

from __future__ import annotations

import fcntl
import os
import re
import sys
import time
from pathlib import Path

from runtime.text import one_line
from store.errors import CacheBusy

SILENT_SECONDS = 2.0  # after which the user is told what is waited for
PATIENCE_SECONDS = 600.0  # without a sign of life, after which the wait ends with an error
_POLL_SECONDS = 0.001, 0.05  # between two looks: at first, and at most
_PROCESS = re.compile(rb"[0-9]{1,10}")


def wait_for_lock(handle: int, root: Path) -> None:
    """Lock the opened mark of the mirror `root`, and sign it. Raises CacheBusy."""
    started, is_told = time.monotonic(), False
    last, seen = started, os.fstat(handle).st_mtime_ns
    pause, most = _POLL_SECONDS
    while not _try(handle):
        now, touched = time.monotonic(), os.fstat(handle).st_mtime_ns
        if touched != seen:
            last, seen = now, touched
        if now - last > PATIENCE_SECONDS:
            raise CacheBusy(
                f"{_owner(handle)} has locked the mirror {one_line(root)} and has fetched nothing "
                f"for {PATIENCE_SECONDS / 60:.0f} minutes",
                fix="end it, or name another folder with --mirror (make: MIRROR=FOLDER)",
            )
        if not is_told and now - started > SILENT_SECONDS:
            is_told = True
            told = f"waiting for {_owner(handle)}, which fetches into the mirror {one_line(root)}"
            print(told, file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, most)
    os.ftruncate(handle, 0)
    os.pwrite(handle, b"%d" % os.getpid(), 0)


def show_life(handle: int) -> None:
    """Tell the processes that wait for this lock that its owner makes progress."""
    os.utime(handle)


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner(handle: int) -> str:
    found = _PROCESS.fullmatch(os.pread(handle, 16, 0))
    return f"process {found[0].decode()}" if found else "another process"
