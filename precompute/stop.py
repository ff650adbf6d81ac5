"""Ctrl-C and SIGTERM: finish the block that is under way, then end; a second one ends at once."""

from __future__ import annotations

import signal
from types import FrameType


class Stopped(Exception):
    """The pass was asked to stop, and has; `exit_code` is 128 + the signal's number."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopRequest:
    """While open, remembers the first signal in `signal_number`. A context manager."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __enter__(self) -> StopRequest:
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise Stopped(number, "stopped at once; what is committed is kept")
        self.signal_number = number
