"""Run interleaved work: generators that end with a result, each with its own clock."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")


def last_of(work: Generator[Any, None, Result]) -> Result:
    """Run a generator to its end and return its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: Result = end.value
            return result


class OwnTime:
    """A clock in seconds that is paused while other generators run."""

    def __init__(self) -> None:
        self._paused_seconds = 0.0

    def __call__(self) -> float:
        return time.perf_counter() - self._paused_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused_seconds += time.perf_counter() - began
