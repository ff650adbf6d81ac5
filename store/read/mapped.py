"""Rows of single samples, read from a cache's files that are mapped into memory.

For readers that request a few rows at a time in several processes (`train.dataset`). The system's
page cache is the only copy, shared by all of them, and may be smaller than the cache. Checksums
cover blocks, so each view is verified once, as a whole, before its rows are read; later reads from
the disk are trusted. `TeacherCache.read_view` is faster for whole views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teach_once.store.format.coding import restored
from teach_once.store.format.spec import Block, expanded
from teach_once.store.place.parallel import in_threads
from teach_once.store.read.reader import TeacherCache


class MappedRows:
    """Some taps of a cache, row by row. May be forked; maps the files of one view at a time.

    Raises UnknownTap, CacheIncomplete.
    """

    def __init__(self, cache: TeacherCache, taps: Sequence[str]) -> None:
        cache.refuse_incomplete(taps)
        self._source, self._manifest = cache.source, cache.manifest
        self._specs = {tap: cache.manifest.taps[tap] for tap in taps}
        self._view = -1  # none yet
        self._maps: dict[tuple[str, int], NDArray[Any]] = {}

    def verify(self, view: int) -> None:
        """Compare every checksum of the view's blocks. Raises CacheDamaged."""
        blocks = [self._manifest.block(view, i) for i in range(self._manifest.blocks_per_view)]
        arrays = [array for tap, spec in self._specs.items() for array in spec.arrays(tap)]
        sizes = (self._manifest.chunk_file_bytes(self._manifest.arrays[array]) for array in arrays)
        keys = [(array, block) for block in blocks for array in arrays]
        self._source.fetch(keys)
        for _ in in_threads(lambda key: self._source.verify(*key), keys, sum(sizes) * len(blocks)):
            pass

    def read(self, view: int, sample_ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return rows of one view in the requested order: tap -> (len(sample_ids), *tap shape).

        Raises CacheDamaged if a file is missing or has another size; compares no checksum.
        """
        if view != self._view:
            self._view, self._maps = view, {}
        rows = {
            tap: np.empty((len(sample_ids), *spec.shape), spec.read_dtype)
            for tap, spec in self._specs.items()
        }
        owners = sample_ids // self._manifest.block_rows
        for index in np.unique(owners):
            block = self._manifest.block(view, int(index))
            wanted = np.flatnonzero(owners == index)
            within = sample_ids[wanted] - block.start
            for tap, values in rows.items():
                values[wanted] = self._rows_of(tap, block, within)
        return rows

    def _rows_of(self, tap: str, block: Block, within: NDArray[np.int64]) -> NDArray[Any]:
        spec = self._specs[tap]
        if spec.top:
            arrays = {name: self._map(name, block)[within] for name in spec.arrays(tap)}
            return expanded(arrays, tap, spec.shape[0])
        values = self._map(tap, block)[within]
        if spec.scale is None:
            return values
        scale = self._map(f"{tap}.scale", block)
        return restored(values, scale[within] if spec.scale == "row" else scale, spec.scale)

    def _map(self, array: str, block: Block) -> NDArray[Any]:
        key = (array, block.index)
        if key not in self._maps:
            self._maps[key] = self._source.mapped(array, block)
        return self._maps[key]
