"""The teacher's outputs for the samples that one of several ranks trains on, and for no others.

A rank holds the rows of its own samples, in the order in which it will see them: a batch is then a
slice of them. The ranks of a machine hold a view, and the next one, once between them. As other
samples are a rank's own in each epoch, it reads each epoch's view anew, block by block: from the
disk once per machine, since the system's file cache gives it to the other ranks, which verify what
they take for themselves.

Left out: one copy of whole views in shared memory. Containers often have 64 MB of it, GPUs would
need copies, and a kill would leave it behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from teach_once.runtime.formats import format_size
from teach_once.store import TeacherCache
from teach_once.train.outputs.device_copies import copy_in_background, mark_as_used, pinned
from teach_once.train.outputs.teacher_outputs import (
    Expansion,
    Ids,
    Placement,
    as_tensor,
    check_view,
    view_bytes,
)
from teach_once.views.augment.parameters import view_of_epoch
from teach_once.views.pixels.batches import ViewBatch
from teach_once.views.seeds import permutation


class _Rows(NamedTuple):
    """rows: name -> (M, ...) of the samples `ids` (M,), whose places among them place_of[id] says.

    place_of: (N,), -1 for the samples of other ranks.
    """

    ids: Ids
    place_of: Ids
    rows: dict[str, Tensor]


class OwnRows:
    """`TeacherSource` of one rank: whole views, of which it holds its samples' rows."""

    def __init__(
        self,
        cache: TeacherCache,
        taps: Sequence[str],
        num_views: int,
        device: torch.device,
        own_ids: Callable[[int], Ids],
        share: float,
        location: Placement = "device",
    ) -> None:
        """own_ids: epoch -> this rank's samples, in the order in which it will see them.

        share: of all samples, about how many these are.
        """
        self._cache, self._taps = cache, list(taps)
        self._num_views, self._device, self._own_ids = num_views, device, own_ids
        self._is_on_device = location == "device"
        size = format_size(int(view_bytes(cache, taps) * share))
        self.where = f"in {location} memory, this process's part of one view ({size}) at a time"
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="teacher-feed")
        self._next: tuple[int, Future[_Rows]] | None = None
        self._view = -1  # none yet
        self._held = _Rows(np.empty(0, np.int64), np.empty(0, np.int64), {})
        self._expanded = Expansion(cache)

    def order(self, seed: int, epoch: int, num_samples: int) -> Ids:
        return permutation(seed, epoch, num_samples)

    def start_epoch(self, epoch: int, order: Ids) -> None:
        """Make the epoch's rows current and begin to read those of the next epoch."""
        is_read = self._next is not None and self._next[0] == epoch
        reading = self._next[1] if is_read and self._next else self._pool.submit(self._read, epoch)
        self._held = reading.result()
        mark_as_used(self._held.rows)
        self._view = view_of_epoch(epoch, self._num_views)
        self._next = epoch + 1, self._pool.submit(self._read, epoch + 1)

    def outputs(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Raises WrongView."""
        check_view(batch, self._view)
        ids, held = batch.host_ids.numpy(), self._held
        start = int(held.place_of[ids[0]])
        stop = start + len(ids)
        assert start >= 0, "a sample of another rank"
        assert np.array_equal(held.ids[start:stop], ids), "another order than the epoch's"
        rows = {
            tap: values[start:stop].to(self._device, non_blocking=True)
            for tap, values in held.rows.items()
        }
        return self._expanded(rows)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _read(self, epoch: int) -> _Rows:
        view, manifest = view_of_epoch(epoch, self._num_views), self._cache.manifest
        ids = self._own_ids(epoch)
        blocks = [manifest.block(view, index) for index in range(manifest.blocks_per_view)]
        self._cache.fetch_blocks(blocks, self._taps)
        by_sample = np.argsort(ids)  # a block's samples are then neighbours
        ends = np.searchsorted(ids[by_sample], [block.stop for block in blocks])
        rows: dict[str, Tensor] = {}
        for block, first, end in zip(blocks, [0, *ends[:-1]], ends, strict=True):
            read = self._cache.read_block(block, self._taps, compact=True)
            places = torch.from_numpy(by_sample[first:end])
            of_block = torch.from_numpy(ids[by_sample[first:end]] - block.start)
            for tap, values in read.items():
                some = as_tensor(values)
                if tap not in rows:
                    rows[tap] = torch.empty((len(ids), *some.shape[1:]), dtype=some.dtype)
                rows[tap][places] = some[of_block]
        place_of = np.full(self._cache.num_samples, -1)
        place_of[ids] = np.arange(len(ids))
        if self._is_on_device:
            return _Rows(ids, place_of, copy_in_background(rows, self._device))
        return _Rows(ids, place_of, {tap: pinned(each, self._device) for tap, each in rows.items()})
