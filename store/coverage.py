"""How much of a cache's plan is committed, counted without a step per planned block.

A manifest may plan a million views of which nothing is there: asking what is missing costs
for the journal, not for the plan.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from store.layout import optional_taps, tap_of
from store.manifest import Manifest

Mask = NDArray[np.bool_]


class Coverage:
    """there: array -> (views, blocks), whether the chunk is committed."""

    def __init__(self, manifest: Manifest, there: Mapping[str, Mask]) -> None:
        self._manifest, self.there = manifest, dict(there)

    @classmethod
    def nothing(cls, manifest: Manifest) -> Coverage:
        """Of a cache that is not begun."""
        shape = (manifest.num_views, manifest.blocks_per_view)
        return cls(manifest, {array: np.zeros(shape, np.bool_) for array in manifest.arrays})

    def within(self, manifest: Manifest) -> Coverage:
        """What this covers of another plan of the same blocks."""
        other = Coverage.nothing(manifest)
        for array, there in self.there.items():
            if array in other.there:
                views, blocks = map(min, there.shape, other.there[array].shape)
                other.there[array][:views, :blocks] = there[:views, :blocks]
        return other

    @property
    def fraction(self) -> float:
        """Of all planned chunks."""
        counts = [np.count_nonzero(mask) / mask.size for mask in self.there.values()]
        return float(sum(counts) / len(counts))

    @property
    def is_complete(self) -> bool:
        return all(bool(mask.all()) for mask in self.there.values())

    @property
    def num_bytes(self) -> int:
        """Bytes on disk of all committed chunks, sound or not."""
        arrays = self._manifest.arrays
        return sum(
            int(np.count_nonzero(mask)) * self._manifest.chunk_file_bytes(arrays[array])
            for array, mask in self.there.items()
        )

    def incomplete_taps(self, num_views: int) -> set[str]:
        """Taps of which the first views lack some chunk."""
        return {tap_of(array) for array, mask in self.there.items() if not mask[:num_views].all()}

    def lacking(self, tap: str, num_views: int) -> Mask:
        """(num_views, blocks): whether an array of this tap is missing there."""
        whole = np.ones((num_views, self._manifest.blocks_per_view), dtype=np.bool_)
        for array, mask in self.there.items():
            if tap_of(array) == tap:
                whole &= mask[:num_views]
        return ~whole

    def lacking_any(self, taps: Collection[str], num_views: int) -> Mask:
        """(num_views, blocks): whether one of these taps is missing there."""
        lacks = np.zeros((num_views, self._manifest.blocks_per_view), dtype=np.bool_)
        for tap in taps:
            lacks |= self.lacking(tap, num_views)
        return lacks

    def first_lacking_view(self, tap: str, num_views: int) -> int | None:
        """The first view that lacks some of the tap; None where all have it."""
        views = self.lacking(tap, num_views).any(axis=1)
        return int(views.argmax()) if views.any() else None

    def num_complete_views(self) -> int:
        """How many views, from the first on, have every tap that a cache cannot lack."""
        optional = optional_taps(self._manifest.taps)
        taps = [tap for tap in self._manifest.stored if tap not in optional]
        lacks = self.lacking_any(taps, self._manifest.num_views)
        return _first_true(np.logical_or.reduce(lacks, axis=1))

    def missing(self, num_views: int | None = None) -> Iterator[tuple[str, int, int]]:
        """(array, view, block index) of what the first views lack, in the order of the blocks."""
        views = self._manifest.num_views if num_views is None else num_views
        lacks = self.lacking_any(list(self._manifest.stored), views)
        for position in np.flatnonzero(lacks):
            view, block = divmod(int(position), lacks.shape[1])
            for array, mask in self.there.items():
                if not mask[view, block]:
                    yield array, view, block

    def num_missing(self, num_views: int | None = None) -> int:
        """How many chunks the first views lack."""
        parts = [mask[:num_views] for mask in self.there.values()]
        return sum(part.size - int(np.count_nonzero(part)) for part in parts)

    def first_missing(self, num: int) -> list[tuple[str, int, int]]:
        return list(islice(self.missing(), num))


def _first_true(mask: Mask) -> int:
    """The index of the first True of a (N,) mask; N where there is none."""
    return int(mask.argmax()) if mask.any() else len(mask)
