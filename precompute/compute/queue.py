"""The queue from which a process, each rank of a job or a Ray driver takes the blocks of a pass.

A pass works in rounds: its own share of the blocks first, then blocks left by other ranks, until
none is left. In a round, the queue returns groups of blocks of the same samples, so that each image
is decoded once for several views.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from teach_once.store.errors import CacheError
from teach_once.store.write.pending_blocks import Work

_Alike = tuple[int, tuple[str, ...]]  # first sample, taps


class BlockQueue:
    """The blocks of one round; each is taken once.

    Taking a block takes constant time, for any number of blocks.
    """

    def __init__(self, work: Sequence[Work], group_size: int) -> None:
        """Create a queue of blocks. group_size: largest number of blocks in a group."""
        self.num_blocks = len(work)
        self.num_images = sum(item.block.rows for item in work)
        self._group_size = group_size
        self._order = iter(work)
        self._alike: dict[_Alike, deque[Work]] = {}
        for item in work:
            self._alike.setdefault(_key(item), deque()).append(item)

    def take(self) -> list[Work]:
        """Return the next block and others of its samples and taps, in order; [] at the end."""
        for first in self._order:
            # Blocks are taken from the front: this one was already taken unless it is there.
            waiting = self._alike[_key(first)]
            if waiting and waiting[0] is first:
                return [waiting.popleft() for _ in range(min(self._group_size, len(waiting)))]
        return []


def _key(item: Work) -> _Alike:
    return item.block.start, item.taps


class Unfinished(Protocol):
    """A writer of a cache that returns the remaining work."""

    def left_over(self) -> list[Work] | None: ...


class Rounds:
    """The rounds of one pass; afterwards `is_complete`, unless other ranks are still running.

    If another program removes committed blocks, the rounds would never end; this is an error.
    """

    def __init__(self, cache: Path, writer: Unfinished, own: Sequence[Work]) -> None:
        """Create the rounds of a pass. own: the blocks of this process."""
        self._cache, self._writer, self._own = cache, writer, own
        self.is_complete = False

    def __iter__(self) -> Iterator[Sequence[Work]]:
        """Yield the blocks of each round. Raises CacheError if a round leaves as many as before."""
        if self._own:
            yield self._own
        num_left: int | None = None
        while work := self._writer.left_over():
            if num_left is not None and len(work) >= num_left:
                raise CacheError(
                    f"{self._cache}: {len(work):,} blocks are missing or damaged, after a round "
                    f"that committed {num_left:,}: another program changes committed blocks",
                    fix="stop the other program, then run the same command again",
                )
            num_left = len(work)
            yield work
        self.is_complete = work is not None
