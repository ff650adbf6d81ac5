"""The order of an epoch where only a window of blocks is in memory at a time.

Blocks are put into a random order, `window_rows` worth of them make a window, and the samples of
each window are put into a random order: a pure function of (seed, epoch), as `views.seeds` has it
for a whole data set. The larger the window, the nearer to a true shuffle. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from views.seeds import permutation

Ids = NDArray[np.int64]

_BLOCKS_SEED_OFFSET = 2**63  # keeps the order of blocks apart from that of samples


@dataclass(frozen=True)
class WindowedOrder:
    """Of `num_samples` in blocks of `block_rows`; a window holds at least one block."""

    num_samples: int
    block_rows: int
    window_rows: int

    @property
    def blocks_per_window(self) -> int:
        return max(1, self.window_rows // self.block_rows)

    def order(self, seed: int, epoch: int) -> Ids:
        """(N,) int64: every sample once."""
        num_blocks = -(-self.num_samples // self.block_rows)
        blocks = permutation((seed + _BLOCKS_SEED_OFFSET) % 2**64, epoch, num_blocks)
        # Sorted by window, and within a window by the sample's own place in a true shuffle.
        window_of_block = np.empty(num_blocks, dtype=np.int64)
        window_of_block[blocks] = np.arange(num_blocks) // self.blocks_per_window
        shuffled = permutation(seed, epoch, self.num_samples)
        windows = window_of_block[shuffled // self.block_rows]
        return shuffled[np.argsort(windows, kind="stable")]

    def rows(self, order: Ids) -> tuple[Ids, Ids, list[Ids]]:
        """Each sample's row within its window, and its window; and each window's blocks.

        The blocks of a window are read in ascending order.
        """
        blocks_seen = order // self.block_rows
        _, first_seen = np.unique(blocks_seen, return_index=True)
        by_time = np.argsort(first_seen, kind="stable")
        # A window's blocks are first seen before any block of the next window.
        windows = [
            np.sort(by_time[start : start + self.blocks_per_window])
            for start in range(0, len(by_time), self.blocks_per_window)
        ]
        row_of, window_of = (
            np.empty(self.num_samples, np.int64),
            np.empty(self.num_samples, np.int64),
        )
        for number, blocks in enumerate(windows):
            row = 0
            for block in blocks:
                start = int(block) * self.block_rows
                stop = min(start + self.block_rows, self.num_samples)
                row_of[start:stop] = np.arange(row, row + stop - start)
                window_of[start:stop] = number
                row += stop - start
        return row_of, window_of, windows
