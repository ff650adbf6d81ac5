"""How much work something is, whatever the machine and what else runs on it: calls of functions."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType

# A second or so.
AT_ONCE = 1_000_000


@contextlib.contextmanager
def few_calls(limit: int = AT_ONCE) -> Iterator[None]:
    """Fails if more functions are called within, Python's and C's, on this thread."""
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
