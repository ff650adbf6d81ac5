"""Recodes the files of a split in worker processes, in their order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from views.encoded import EncodedSplit
from views.recode import Recode, recoded
from views.splits import DatasetError

_FILES_AT_ONCE = 16
_TASKS_AHEAD = 4  # of each worker: what waits to be written stays in memory


class _Work:
    """What the workers of a pool do; they are forked with it, since functions do not travel."""

    def __init__(self, split: EncodedSplit, recode: Recode, max_pixels: int) -> None:
        self.split, self.recode, self.max_pixels = split, recode, max_pixels

    def __call__(self, start: int) -> list[bytes]:
        return [self._one(i) for i in range(start, min(start + _FILES_AT_ONCE, len(self.split)))]

    def _one(self, sample: int) -> bytes:
        name = self.split.name_of(sample)
        return recoded(self.split.read(sample), name, self.recode, self.max_pixels)


_work: _Work | None = None  # of this process, where it is a worker


def recoded_files(
    split: EncodedSplit, recode: Recode, max_pixels: int, num_workers: int
) -> Iterator[bytes]:
    """The new bytes of each file. num_workers: 0: this process. Raises DatasetError."""
    work, starts = _Work(split, recode, max_pixels), range(0, len(split), _FILES_AT_ONCE)
    if num_workers == 0:
        for start in starts:
            yield from work(start)
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
            "a process that reads images died",
            fix="run again, with fewer --workers if memory was short",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, starts: range, most_ahead: int) -> Iterator[bytes]:
    waiting: deque[Future[list[bytes]]] = deque()
    for start in starts:
        if len(waiting) == most_ahead:
            yield from waiting.popleft().result()
        waiting.append(pool.submit(_do, start))
    while waiting:
        yield from waiting.popleft().result()


def _become_worker(work: _Work, parent: int) -> None:
    """Signals to the whole group are the parent's to answer; a worker ends when it is gone."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _do(start: int) -> list[bytes]:
    assert _work is not None
    return _work(start)
