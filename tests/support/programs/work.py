"""Measure work by calls of functions, which do not depend on the machine or its load."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType

# About a second.
AT_ONCE = 1_000_000


@contextlib.contextmanager
def few_calls(limit: int = AT_ONCE) -> Iterator[None]:
    """Fail if more functions of Python and C are called in the context, on this thread."""
    count, outer = 0, sys.getprofile()

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        if event in ("call", "c_call"):
            count += 1
            if count > limit:
                sys.setprofile(outer)
                raise AssertionError(f"more than {limit:,} calls of functions")

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(outer)
    assert count <= limit, f"more than {limit:,} calls of functions"  # its error may be caught
