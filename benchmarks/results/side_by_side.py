"""The project's commands, several at a time, which a signal to this process stops."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from teach_once.runtime.machine.resources import usable_cores

_POLL_SECONDS = 0.2


def run_all(commands: Sequence[Sequence[str]], jobs: int) -> None:
    """Run `python -m` each of these, so many side by side. Ends this process where one fails.

    They do not hear Ctrl-C, which this process passes on, once, and waits.
    """
    environment = dict(os.environ)
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(usable_cores() // jobs, 1))
    waiting, running = list(commands), list[subprocess.Popen[bytes]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                words = waiting.pop(0)
                print(f"$ {shlex.join(['python', '-m', *words])}", flush=True)
                running.append(
                    subprocess.Popen(
                        [sys.executable, "-m", *words], env=environment, start_new_session=True
                    )
                )
            for process in [each for each in running if each.poll() is not None]:
                running.remove(process)
                if process.returncode:
                    sys.exit(process.returncode)
            time.sleep(_POLL_SECONDS)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def stop_on_signals() -> None:
    """End this process with 128 + the number of Ctrl-C or SIGTERM; `run_all` passes it on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)
