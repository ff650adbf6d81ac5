"""Read the teacher's outputs from a cache in the background, by view or by window of blocks.

The rows of a view and of the next view are kept on the device or in (pinned) host memory. If two
views do not fit, a window of blocks and the next window are kept in host memory.

Several ranks of a machine together keep one copy of a view, and of the next one, since each rank
keeps only its samples' rows. Each epoch assigns samples to ranks anew, so each rank rereads the
view block by block. The disk is read once per machine, because the system's page cache serves the
other ranks, which verify the blocks themselves.

Whole views are not kept in shared memory: containers often have only 64 MB of it, GPUs would need
copies, and a kill would leave it allocated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teach_once.runtime.formats import format_size
from teach_once.store import TeacherCache
from teach_once.store.format.spec import compact_names
from teach_once.train.outputs.device_copies import (
    Buffers,
    copy_in_background,
    gather_rows,
    mark_as_used,
    pin,
)
from teach_once.train.outputs.shuffle_buffer import find_windows
from teach_once.train.outputs.teacher_outputs import Ids, TeacherOutputs, check_view
from teach_once.views.pixels.batches import ViewBatch
from teach_once.views.pixels.resident import free_memory

Placement = Literal["device", "host"]

_DEVICE_FRACTION = 0.5  # fraction of the device's free memory that two views may use


@dataclass(frozen=True, eq=False)
class _Selection:
    """The samples of a view whose rows are kept: all, or ascending `ids`."""

    view: int
    ids: Ids | None

    def equals(self, other: _Selection | None) -> bool:
        if other is None or self.view != other.view:
            return False
        if self.ids is None or other.ids is None:
            return self.ids is other.ids
        return np.array_equal(self.ids, other.ids)


class CachedTeacher(TeacherOutputs):
    """Rows of one view at a time, on the device or in host memory."""

    def __init__(
        self,
        cache: TeacherCache,
        taps: Sequence[str],
        device: torch.device,
        placement: Placement = "device",
        *,
        fraction: float = 1.0,
    ) -> None:
        """Open a cache's rows. fraction: approximate fraction of samples that are read."""
        self._cache, self._taps, self._device = cache, list(taps), device
        self._is_on_device = placement == "device"
        size = format_size(int(view_bytes(cache, taps) * fraction))
        part = "one view" if fraction == 1 else "this process's part of one view"
        self.where = f"in {placement} memory, {part} ({size}) at a time"
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="teacher-outputs")
        self._loaded: _Selection | None = None
        self._next: tuple[_Selection, Future[dict[str, Tensor]]] | None = None
        self._kept: dict[str, Tensor] = {}
        self._row_of: Tensor | None = None  # (N,) sample -> row, -1 if not kept; None: identity
        self._row_of_on_device: Tensor | None = None
        self._batch_rows: dict[str, Tensor] = {}
        self._buffers = Buffers(device)
        self._expand = Expansion(cache)

    def start_epoch(self, view: int, ids: Ids) -> None:
        wanted = self._select(view, ids)
        if not wanted.equals(self._loaded):
            self._kept = self._begin(wanted).result()
            mark_as_used(self._kept)
            self._loaded, self._next = wanted, None
            self._number_rows(wanted)

    def prefetch(self, view: int, ids: Ids) -> None:
        wanted = self._select(view, ids)
        if not wanted.equals(self._loaded):
            self._next = wanted, self._begin(wanted)

    def rows(self, batch: ViewBatch) -> dict[str, Tensor]:
        check_view(batch, -1 if self._loaded is None else self._loaded.view)
        ids, host_rows = batch.ids, batch.host_ids
        if self._row_of is not None and self._row_of_on_device is not None:
            host_rows = self._row_of[batch.host_ids]
            assert int(host_rows.min()) >= 0, "a sample that was not passed to start_epoch"
            ids = self._row_of_on_device[ids]
        if not self._is_on_device:
            return self._expand(self._buffers.send([(self._kept, host_rows)]))
        buffers = self._batch_rows
        return self._expand(
            {
                tap: gather_rows(values, ids, buffers.setdefault(tap, values[:0].clone()))
                for tap, values in self._kept.items()
            }
        )

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _select(self, view: int, ids: Ids) -> _Selection:
        return _Selection(view, None if len(ids) == self._cache.num_samples else np.sort(ids))

    def _begin(self, wanted: _Selection) -> Future[dict[str, Tensor]]:
        """Start reading in the background, unless the same selection is already being read."""
        if self._next is not None and wanted.equals(self._next[0]):
            return self._next[1]
        return self._pool.submit(self._read, wanted)

    def _number_rows(self, selection: _Selection) -> None:
        self._row_of = self._row_of_on_device = None
        if selection.ids is not None:
            row_of = np.full(self._cache.num_samples, -1)
            row_of[selection.ids] = np.arange(len(selection.ids))
            self._row_of = torch.from_numpy(row_of)
            self._row_of_on_device = self._row_of.to(self._device)

    def _read(self, wanted: _Selection) -> dict[str, Tensor]:
        if wanted.ids is None:
            records = self._cache.read_view(wanted.view, self._taps, compact=True)
            kept = {tap: as_tensor(values) for tap, values in records.items()}
        else:
            kept = self._read_some(wanted.view, wanted.ids)
        if not self._is_on_device:
            return {tap: pin(values, self._device) for tap, values in kept.items()}
        return copy_in_background(kept, self._device)

    def _read_some(self, view: int, ids: Ids) -> dict[str, Tensor]:
        """Read the rows of ascending ids, block by block."""
        manifest = self._cache.manifest
        blocks = [manifest.block(view, index) for index in range(manifest.blocks_per_view)]
        self._cache.fetch_blocks(blocks, self._taps)
        kept: dict[str, Tensor] = {}
        for block in blocks:
            first, end = np.searchsorted(ids, [block.start, block.stop])
            for tap, values in self._cache.read_block(block, self._taps, compact=True).items():
                rows = as_tensor(values)
                if tap not in kept:
                    kept[tap] = torch.empty((len(ids), *rows.shape[1:]), dtype=rows.dtype)
                kept[tap][first:end] = rows[torch.from_numpy(ids[first:end] - block.start)]
        return kept


class WindowedTeacher(TeacherOutputs):
    """Rows of a window of blocks and of the next one, for an order that follows them."""

    def __init__(
        self, cache: TeacherCache, taps: Sequence[str], device: torch.device, window_rows: int
    ) -> None:
        """Open a cache's rows. window_rows: rows per window of the order's `ShuffleBuffer`."""
        self._cache, self._taps = cache, list(taps)
        self.where = (
            f"in windows of {window_rows:,} of {cache.num_samples:,} samples, shuffled there"
        )
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="teacher-outputs")
        self._buffers = Buffers(device)
        self._expand = Expansion(cache)
        self._windows: list[Future[dict[str, Tensor]]] = []
        self._view = -1  # no view yet

    def start_epoch(self, view: int, ids: Ids) -> None:
        """Start reading the epoch's first two windows, and wait for the first one."""
        for window in self._windows:
            window.cancel()
        num_samples = self._cache.num_samples
        self._view, self._is_kept = view, np.isin(np.arange(num_samples), ids)
        found = find_windows(ids, num_samples, self._cache.manifest.block_rows)
        self._row_of, self._window_of, self._blocks = found
        self._windows, self._first = [], 0
        self._read_until(1)
        self._windows[0].result()

    def rows(self, batch: ViewBatch) -> dict[str, Tensor]:
        check_view(batch, self._view)
        ids = batch.host_ids.numpy()
        windows = self._window_of[ids]
        assert windows.min() >= 0, "a sample that was not passed to start_epoch"
        self._forget_before(int(windows[0]))
        self._read_until(int(windows[-1]) + 1)
        parts = []
        for window in range(int(windows[0]), int(windows[-1]) + 1):
            rows = torch.from_numpy(self._row_of[ids[windows == window]])
            parts.append((self._windows[window - self._first].result(), rows))
        return self._expand(self._buffers.send(parts))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _forget_before(self, window: int) -> None:
        del self._windows[: window - self._first]
        self._first = window

    def _read_until(self, window: int) -> None:
        while self._first + len(self._windows) <= min(window, len(self._blocks) - 1):
            number = self._first + len(self._windows)
            self._windows.append(self._pool.submit(self._read, self._view, number))

    def _read(self, view: int, window: int) -> dict[str, Tensor]:
        manifest = self._cache.manifest
        blocks = [manifest.block(view, int(index)) for index in self._blocks[window]]
        self._cache.fetch_blocks(blocks, self._taps)
        parts = []
        for block in blocks:
            part = self._cache.read_block(block, self._taps, compact=True)
            kept = self._is_kept[block.start : block.stop]
            parts.append(part if kept.all() else {tap: rows[kept] for tap, rows in part.items()})
        return {tap: as_tensor(np.concatenate([part[tap] for part in parts])) for tap in parts[0]}


class Expansion:
    """Expansion of top-k logits to all classes, on the device; other taps are unchanged."""

    def __init__(self, cache: TeacherCache) -> None:
        spec = cache.manifest.taps.get("logits")
        self._num_classes = spec.shape[0] if spec is not None and spec.top else 0

    def __call__(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Expand rows: name -> (B, ...); top-k logits are three arrays, see `store.format.spec`."""
        values, classes, rest = compact_names("logits")
        if not self._num_classes or classes not in rows:
            return rows
        logits = expand_logits(rows[values], rows[classes], rows[rest], self._num_classes)
        whole = {name: tap for name, tap in rows.items() if name not in (values, classes, rest)}
        return {**whole, "logits": logits}


def expand_logits(values: Tensor, classes: Tensor, rest: Tensor, num_classes: int) -> Tensor:
    """Expand values (B, k), classes (B, k) and rest (B,) to (B, num_classes) float32.

    See `store.format.spec`.
    """
    share = rest.float() - math.log(num_classes - values.shape[1])
    logits = share[:, None].repeat(1, num_classes)
    return logits.scatter_(1, classes.long(), values.float())


def as_tensor(values: NDArray[Any]) -> Tensor:
    """Convert to a tensor; uint16 classes become int32, since torch cannot index with uint16."""
    return torch.from_numpy(values.astype(np.int32) if values.dtype == np.uint16 else values)


def view_bytes(cache: TeacherCache, taps: Sequence[str]) -> int:
    """Return the bytes of one view's records in memory."""
    return cache.num_samples * sum(cache.taps[tap].read_bytes_per_record for tap in taps)


def choose_placement(num_bytes: int, device: torch.device) -> Placement:
    """Return "device" if two views of that size fit there, else "host"."""
    return "device" if 2 * num_bytes <= _DEVICE_FRACTION * free_memory(device) else "host"
