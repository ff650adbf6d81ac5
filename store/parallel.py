"""A few threads for reading: copying from the page cache releases the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_THREADS = min(4, os.cpu_count() or 1)
_WORTH_BYTES = 8 * 2**20  # below, starting threads costs more than they save


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], num_bytes: int
) -> Iterator[Result]:
    """function(item) of each, in order; in the caller's thread where `num_bytes` in all are few."""
    if num_bytes < _WORTH_BYTES or _THREADS == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="cache-reader") as pool:
        yield from pool.map(function, items)
