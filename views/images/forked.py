"""Run a function over ranges of samples in worker processes, which inherit it by forking."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from teach_once.views.splits import DatasetError

_TASKS_AHEAD = 4  # per worker; finished results stay in memory until they are used
Result = TypeVar("Result")

_work: Callable[[int], object] | None = None  # set in worker processes


def run_forked(
    work: Callable[[int], Result], starts: Sequence[int], num_workers: int
) -> Iterator[Result]:
    """Yield `work(start)` for each start, in order.

    num_workers: processes; 0: this process. Raises DatasetError if a worker dies.
    """
    if num_workers == 0:
        yield from map(work, starts)
        return
    pool = ProcessPoolExecutor(
        num_workers,
        multiprocessing.get_context("fork"),
        initializer=_become_worker,
        initargs=(work, os.getpid()),
    )
    try:
        yield from _in_order(pool, starts, num_workers * _TASKS_AHEAD)
    except BrokenProcessPool:
        raise DatasetError(
            "a worker process that reads images died",
            fix="run the command again; use fewer --workers if memory ran out",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, starts: Sequence[int], most_ahead: int) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    for start in starts:
        if len(waiting) == most_ahead:
            yield waiting.popleft().result()
        waiting.append(pool.submit(_do, start))
    while waiting:
        yield waiting.popleft().result()


def _become_worker(work: Callable[[int], object], parent: int) -> None:
    """Ignore signals, which the parent handles for the group, and end when the parent is gone."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _do(start: int) -> object:
    assert _work is not None
    return _work(start)
