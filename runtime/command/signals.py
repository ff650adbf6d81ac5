"""Ctrl-C and SIGTERM: the first stops the work where it can be resumed, the second at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from teach_once.runtime.errors import Stopped


class StopRequest:
    """A context manager that records the first signal in `signal_number` while it is open.

    The second signal sets `is_urgent` and raises Stopped. If the work ends without handling a
    recorded signal, Stopped is raised when the context exits, so that the caller does not continue.

    Only the main thread can handle signals; in other threads nothing is recorded. Ignored signals
    stay ignored: the processes of an ablation leave Ctrl-C to their parent.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.is_urgent = False
        self._listens = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> StopRequest:
        numbers = (signal.SIGINT, signal.SIGTERM) if self._listens else ()
        self._before = {
            number: signal.signal(number, self._note)
            for number in numbers
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None and self.signal_number is not None:
            raise Stopped(self.signal_number, "stopped after the current step")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            self.is_urgent = True
            raise Stopped(number, "stopped at once; saved results remain valid")
        self.signal_number = number
