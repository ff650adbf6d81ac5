"""Read in a few threads, because copying from the page cache releases the interpreter's lock.

Only a few items are taken at a time, because a cache may have 15 million chunks.
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
_AHEAD = 2  # items per thread that are taken before their results are requested
_WORTH_BYTES = 8 * 2**20  # below this, starting threads costs more than they save


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], num_bytes: int
) -> Iterator[Result]:
    """Yield function(item) in order. num_bytes: total; small totals are read in this thread."""
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
    """Yield function(item) in order, computed by the threads of a pool."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        if len(waiting) >= threads * _AHEAD:
            yield waiting.popleft().result()
        waiting.append(pool.submit(function, item))
    while waiting:
        yield waiting.popleft().result()
