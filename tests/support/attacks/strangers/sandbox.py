"""Run a command in a forked process with limits on time, memory and file sizes.

A fork of a process that has imported everything takes milliseconds. Import the modules that the
commands need, and start no thread, before the first call.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

CPU_SECONDS = 5
WALL_SECONDS = 150.0  # only a hang takes this long, even on a busy machine
MEMORY_BYTES = 2**30
FILE_BYTES = 2**28
CRASHED = 70  # exit status of an uncaught exception
_MOST_OUTPUT = 2**20


@dataclass(frozen=True)
class Outcome:
    """The ending of a command. status: its exit status; None if a signal ended it."""

    status: int | None
    signal_number: int
    output: str
    seconds: float
    peak_bytes: int
    is_timed_out: bool = False

    @property
    def ending(self) -> str:
        if self.is_timed_out:
            return f"no end after {self.seconds:.0f} s"
        if self.status is None:
            return f"ended by {signal.Signals(self.signal_number).name}"
        return f"exit {self.status}"


def run_limited(
    work: Callable[[], int],
    folder: Path,
    *,
    seconds: float = WALL_SECONDS,
    cpu_seconds: int = CPU_SECONDS,
) -> Outcome:
    """Call `work` in a forked process with `folder` as its working directory.

    It is killed after `seconds` or after `cpu_seconds` of processor time.
    """
    output = os.memfd_create("output")
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads
        child = os.fork()
    if child == 0:
        _become_command(work, folder, output, cpu_seconds)
    is_timed_out = not _ends(child, seconds)
    if is_timed_out:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    text = os.pread(output, _MOST_OUTPUT, 0).decode("utf-8", "backslashreplace")
    os.close(output)
    return Outcome(
        os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        text,
        time.perf_counter() - started,
        usage.ru_maxrss * 1024,
        is_timed_out,
    )


def _ends(child: int, seconds: float) -> bool:
    handle = os.pidfd_open(child)
    try:
        waiting = select.poll()
        waiting.register(handle, select.POLLIN)
        return bool(waiting.poll(1000 * seconds))
    finally:
        os.close(handle)


def _become_command(
    work: Callable[[], int], folder: Path, output: int, cpu_seconds: int
) -> NoReturn:
    """Run the command in the fork; never returns, and skips the parent's exit handlers."""
    status = CRASHED
    try:
        _limit(cpu_seconds)
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdin = os.fdopen(0)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        logging.raiseExceptions = False
        faulthandler.disable()  # pytest's handler would print into another file
        warnings.resetwarnings()
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _limit(cpu_seconds: int) -> None:
    memory = _data_bytes() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    cpu = int(used) + cpu_seconds
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))


def _data_bytes() -> int:
    """Return the writable memory of this process; torch alone takes hundreds of megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("VmData:"))
    return int(kilobytes) * 1024
