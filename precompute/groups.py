"""Which blocks are computed together: those of the same samples, whose images are read once."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from store.work import Work

_Alike = tuple[int, tuple[str, ...]]  # first sample, taps


class Groups:
    """Hands out every block once, each time the first one waiting and others of its samples.

    Takes a constant time per block, however many there are.
    """

    def __init__(self, work: Sequence[Work]) -> None:
        self._order = iter(work)
        self._alike: dict[_Alike, deque[Work]] = {}
        for item in work:
            self._alike.setdefault(_key(item), deque()).append(item)

    def next(self, most: int) -> list[Work]:
        """At most `most` blocks of the same samples and taps, in the order given; [] at the end."""
        for first in self._order:
            # Blocks are taken from the front: this one was taken unless it stands there.
            waiting = self._alike[_key(first)]
            if waiting and waiting[0] is first:
                return [waiting.popleft() for _ in range(min(most, len(waiting)))]
        return []


def _key(item: Work) -> _Alike:
    return item.block.start, item.taps
