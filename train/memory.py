"""How much of the teacher's outputs is held in memory: whole views or windows, for how many runs.

Goes by the memory there is for all processes, not by what is free or by the share of one process:
whether a run reads windows is part of its identity, which must not depend on what else is running.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

from runtime.limits import total_memory
from store.reader import TeacherCache

# Where a view's teacher outputs are held while its epoch runs; see `train.feed`.
Feed = Literal["auto", "device", "host", "window"]

_SLABS_SHARE = 0.5  # of the memory for two views; beyond it a window of blocks is held
_WINDOW_SHARE = 0.125  # of the memory for one window; two are held
_WINDOWS_PER_EPOCH = 8  # at least, where a window is asked for


def window_rows(cache: TeacherCache, taps: Collection[str], feed: Feed) -> int | None:
    """How many samples are shuffled at a time, reading these taps; None: all of them.

    A window is used where it is asked for, or where two views fill the memory.
    """
    row_bytes, memory = record_bytes(cache, taps), total_memory()
    is_too_large = 2 * row_bytes * cache.num_samples > memory * _SLABS_SHARE
    if not row_bytes or not (feed == "window" or (feed == "auto" and is_too_large)):
        return None
    affordable = int(memory * _WINDOW_SHARE / row_bytes)
    rows = min(affordable, -(-cache.num_samples // _WINDOWS_PER_EPOCH))
    return max(rows, cache.manifest.block_rows)


def record_bytes(cache: TeacherCache, taps: Collection[str]) -> int:
    """The bytes of one record's taps in memory."""
    return sum(cache.manifest.taps[tap].read_bytes_per_record for tap in taps)


def jobs_that_fit(jobs: int, held_bytes: Iterable[int]) -> int:
    """How many of `jobs` runs may hold their teacher outputs, of these sizes, side by side."""
    largest = max([1, *held_bytes])
    return min(jobs, max(1, int(_SLABS_SHARE * total_memory() // largest)))
