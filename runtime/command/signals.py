"""Ctrl-C and SIGTERM: the work stops where it can be resumed; a second signal stops it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from teach_once.runtime.errors import Stopped


class StopRequest:
    """A context manager that records the first signal in `signal_number` while it is open.

    The second one raises Stopped, and `is_urgent` says so. A request that nothing has answered when
    the context ends, since the work came to its end first, raises Stopped there: whoever has more
    to do must not go on with it.
    Only the main thread may handle signals; elsewhere nothing is recorded. A signal that is
    ignored stays ignored: the processes of an ablation leave Ctrl-C to the one that started them.
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
            raise Stopped(self.signal_number, "stopped; what was being done is finished")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            self.is_urgent = True
            raise Stopped(number, "stopped at once; what was saved before is safe")
        self.signal_number = number
