"""Reads in a few threads: copying from the page cache releases the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from runtime.limits import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_THREADS = 4
_WORTH_BYTES = 8 * 2**20  # for less, starting threads costs more than they save


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], num_bytes: int
) -> Iterator[Result]:
    """function(item) of each item, in order. num_bytes: of all; few are read in this thread."""
    threads = 1 if num_bytes < _WORTH_BYTES else min(_MOST_THREADS, usable_cores())
    if threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="cache-reader") as pool:
        yield from pool.map(function, items)
