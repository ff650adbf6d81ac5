"""Reads in a few threads: copying from the page cache releases the interpreter's lock.

However many items there are, only a few are taken at a time: a cache may have 15 million chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from teach_once.runtime.machine.resources import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_THREADS = 4
_AHEAD = 2  # items of each thread that are taken before their results are asked for
_WORTH_BYTES = 8 * 2**20  # for less, starting threads costs more than they save


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], num_bytes: int
) -> Iterator[Result]:
    """function(item) of each item, in order. num_bytes: of all; few are read in this thread."""
    threads = 1 if num_bytes < _WORTH_BYTES else min(_MOST_THREADS, usable_cores())
    if threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="cache-reader") as pool:
        yield from in_order(pool, threads, function, items)


def in_order(
    pool: ThreadPoolExecutor,
    threads: int,
    function: Callable[[Item], Result],
    items: Iterable[Item],
) -> Iterator[Result]:
    """function(item) of each item, in order, computed by the threads of a pool."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        if len(waiting) >= threads * _AHEAD:
            yield waiting.popleft().result()
        waiting.append(pool.submit(function, item))
    while waiting:
        yield waiting.popleft().result()
