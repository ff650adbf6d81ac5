"""Reads the answers of an object store: bodies and lists, never further than what was asked for.

A store may announce ten bytes and send on and on, or end no list. Bodies are therefore read piece
by piece and counted, lists page by page, counted and timed. What is not bounded here, because
obstore reads it as a whole, is the text of one page of a list and of an error: it ends with the
time that a request may take, 30 seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from store.errors import CacheDamaged, CacheError

Result = TypeVar("Result")

PAGE_KEYS = 1000
LIST_SECONDS = 200.0  # for the first page, with obstore's repetitions, which end after 180
_SECONDS_PER_PAGE = 5.0  # for each further one
_PIECE_BYTES = 2**18


class ListWithoutEnd(CacheError):
    """A store does not end a list."""


def received(found: Any, num_bytes: int, where: object) -> NDArray[np.uint8]:
    """The body of an answer, (bytes,): `num_bytes`, or fewer where it ends before.

    found: a GetResult of obstore. where: the object, for the message. Raises CacheDamaged where the
    body is longer.
    """
    content, done = np.empty(num_bytes, np.uint8), 0
    for piece in found.stream(min_chunk_size=_PIECE_BYTES):
        end = done + len(piece)
        if end > num_bytes:
            raise CacheDamaged(f"the store sends more of {where} than {num_bytes:,} bytes")
        content[done:end] = np.frombuffer(piece, np.uint8)
        done = end
    return content[:done]


def pages(stream: Any, most_keys: int, where: object) -> Iterator[Sequence[Any]]:
    """The pages of a list. stream: a ListStream of obstore. Raises ListWithoutEnd."""
    started, num_keys, num_pages = time.monotonic(), 0, 0
    while True:
        allowed = LIST_SECONDS + _SECONDS_PER_PAGE * num_pages
        page = within(started + allowed - time.monotonic(), lambda: _next(stream), where)
        if page is None:
            return
        num_keys, num_pages = num_keys + len(page), num_pages + 1
        if num_keys > most_keys:
            raise ListWithoutEnd(f"{where} lists more than {most_keys:,} objects", fix=_FIX)
        yield page


def within(seconds: float, start: Callable[[], Awaitable[Result]], where: object) -> Result:
    """The result of a request that is ended after so many seconds. Raises ListWithoutEnd."""

    async def wait() -> Result:
        return await asyncio.wait_for(start(), max(0.0, seconds))

    try:
        return _run(wait)
    except TimeoutError:
        raise ListWithoutEnd(
            f"{where}: the store has not ended a list in {LIST_SECONDS:.0f} seconds", fix=_FIX
        ) from None


_FIX = "look at AWS_ENDPOINT_URL, and at what is there with the store's own programs"


def _run(wait: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(1) as pool:  # called from a notebook, or another running loop
        return pool.submit(lambda: asyncio.run(wait())).result()


async def _next(stream: Any) -> Sequence[Any] | None:
    async for page in stream:
        found: Sequence[Any] = page
        return found
    return None
