"""The order of samples: shuffled over the whole dataset, or by blocks in a shuffle buffer.

If two views of teacher outputs fit into memory, samples are shuffled over the whole dataset.
Otherwise the blocks are put into random order, blocks with a total of `window_rows` samples form a
window, and the samples of each window are put into random order. The result is a pure function of
(seed, epoch), as in `views.seeds` for a whole dataset. Larger windows are closer to a full shuffle.

The memory limit is the machine's memory for all processes, not the free memory or one process's
share, because the size of the windows is part of a run's identity and must not depend on other
programs. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from teach_once.runtime.machine.resources import total_memory
from teach_once.store.read.reader import TeacherCache
from teach_once.views.seeds import permutation

Ids = NDArray[np.int64]

# Where a view's teacher outputs are kept during its epoch; see `train.outputs.teacher_outputs`.
PlacementChoice = Literal["auto", "device", "host", "window"]

_SLABS_SHARE = 0.5  # fraction of the memory for two views; beyond it, windows are used
_WINDOW_SHARE = 0.125  # fraction of the memory for one window; two are kept
_WINDOWS_PER_EPOCH = 8  # at least, if the config requests windows
_BLOCKS_SEED_OFFSET = 2**63  # separates the draws for blocks from those for samples


def window_rows(
    cache: TeacherCache, taps: Collection[str], placement: PlacementChoice
) -> int | None:
    """Return the number of samples per window for these taps; None: shuffle all samples.

    Windows are used if the config requests them, or if two views exceed the memory.
    """
    row_bytes, memory = record_bytes(cache, taps), total_memory()
    is_too_large = 2 * row_bytes * cache.num_samples > memory * _SLABS_SHARE
    if not row_bytes or not (placement == "window" or (placement == "auto" and is_too_large)):
        return None
    affordable = int(memory * _WINDOW_SHARE / row_bytes)
    rows = min(affordable, -(-cache.num_samples // _WINDOWS_PER_EPOCH))
    return max(rows, cache.manifest.block_rows)


def record_bytes(cache: TeacherCache, taps: Collection[str]) -> int:
    """Return the bytes of one record's taps in memory."""
    return sum(cache.manifest.taps[tap].read_bytes_per_record for tap in taps)


def outputs_fit(num_bytes: int, jobs: int) -> bool:
    """Return True if each of `jobs` processes may keep teacher outputs of this size."""
    return jobs * num_bytes <= _SLABS_SHARE * total_memory()


def jobs_that_fit(jobs: int, held_bytes: Iterable[int]) -> int:
    """Return how many of `jobs` runs may keep teacher outputs of these sizes at once."""
    largest = max([1, *held_bytes])
    return min(jobs, max(1, int(_SLABS_SHARE * total_memory() // largest)))


@dataclass(frozen=True)
class ShuffleBuffer:
    """Windows of an order of `num_samples`, in blocks of `block_rows`; at least one block each."""

    num_samples: int
    block_rows: int
    window_rows: int

    @property
    def blocks_per_window(self) -> int:
        return max(1, self.window_rows // self.block_rows)

    def order(self, seed: int, epoch: int) -> Ids:
        """Return the order of all samples, (N,) int64."""
        num_blocks = -(-self.num_samples // self.block_rows)
        blocks = permutation((seed + _BLOCKS_SEED_OFFSET) % 2**64, epoch, num_blocks)
        # Sorted by window, and within a window by the sample's position in a full shuffle.
        window_of_block = np.empty(num_blocks, dtype=np.int64)
        window_of_block[blocks] = np.arange(num_blocks) // self.blocks_per_window
        shuffled = permutation(seed, epoch, self.num_samples)
        windows = window_of_block[shuffled // self.block_rows]
        return shuffled[np.argsort(windows, kind="stable")]


def find_windows(ids: Ids, num_samples: int, block_rows: int) -> tuple[Ids, Ids, list[Ids]]:
    """Group the blocks of an order into windows that are loaded and released one after the other.

    Blocks are in the same window if the order interleaves their samples. A window contains only the
    rows of samples `ids` (M,), by block and sample.

    Returns the row of each sample in its window (N,); its window (N,), -1 if it is not in `ids`;
    and the blocks of each window, ascending.
    """
    blocks_seen = ids // block_rows
    blocks, first = np.unique(blocks_seen, return_index=True)
    last = len(ids) - 1 - np.unique(blocks_seen[::-1], return_index=True)[1]
    by_time = np.argsort(first)
    begins = np.ones(len(blocks), dtype=np.bool_)
    begins[1:] = first[by_time][1:] > np.maximum.accumulate(last[by_time])[:-1]
    window_of_block = np.full(-(-num_samples // block_rows), -1)
    window_of_block[blocks[by_time]] = np.cumsum(begins) - 1
    by_id = np.sort(ids)
    windows = window_of_block[by_id // block_rows]
    counts = np.bincount(windows)
    row_of, window_of = np.full(num_samples, -1), np.full(num_samples, -1)
    row_of[by_id[np.argsort(windows, kind="stable")]] = np.concatenate(
        [np.arange(count) for count in counts]
    )
    window_of[by_id] = windows
    return row_of, window_of, [np.flatnonzero(window_of_block == n) for n in range(len(counts))]
