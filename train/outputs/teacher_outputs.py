"""Where a training step gets the teacher's outputs.

Two sources with one interface: the cache, read ahead in the background; and the live teacher, which
runs in the loop and is there to prove the first right.

What is read of the cache is held in one of three locations. On the device, or in (pinned) host
memory: one view's slab and the next one. Where two slabs do not fit into memory, a window of blocks
and the next one; samples are then shuffled by block and within the window, instead of all together.
A batch of another view than the epoch's is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teach_once.nets.teacher.taps import Tap
from teach_once.nets.teacher.teacher import Teacher
from teach_once.runtime.formats import format_size
from teach_once.store import TeacherCache
from teach_once.store.format.spec import compact_names
from teach_once.train.errors import TrainError
from teach_once.train.outputs.device_copies import (
    Buffers,
    copy_in_background,
    gather_rows,
    mark_as_used,
    pinned,
)
from teach_once.train.outputs.shuffle_buffer import ShuffleBuffer
from teach_once.views.augment.parameters import view_of_epoch
from teach_once.views.pixels.batches import ViewBatch
from teach_once.views.pixels.resident import free_memory
from teach_once.views.seeds import permutation

Ids = NDArray[np.int64]
Placement = Literal["device", "host"]

_DEVICE_SHARE = 0.5  # of the device's free memory may be taken by two slabs


class WrongView(TrainError):
    """A batch that shows another view than the one whose teacher outputs are loaded."""


class TeacherOutputs(Protocol):
    """Gives a step the teacher's outputs for its batch."""

    def outputs(self, batch: ViewBatch) -> dict[str, Tensor]:
        """The taps of these samples in the batch's view: name -> (B, ...) on the device."""
        ...


class TeacherSource(TeacherOutputs, Protocol):
    """Teacher outputs for one batch after another, epoch by epoch; to be closed."""

    @property
    def where(self) -> str:
        """Where they come from, in words."""
        ...

    def order(self, seed: int, epoch: int, num_samples: int) -> Ids:
        """(N,) int64: the order in which the epoch visits the samples."""
        ...

    def start_epoch(self, epoch: int, order: Ids) -> None:
        """Load the epoch's view. epoch: from 1; order: as `order` returned it."""
        ...

    def close(self) -> None: ...


class _Shuffled:
    """All samples in one random order."""

    def order(self, seed: int, epoch: int, num_samples: int) -> Ids:
        return permutation(seed, epoch, num_samples)

    def start_epoch(self, epoch: int, order: Ids) -> None:
        pass

    def close(self) -> None:
        pass


class NoTeacher(_Shuffled):
    """For methods without a teacher."""

    where = "not used"

    def outputs(self, batch: ViewBatch) -> dict[str, Tensor]:
        return {}


class LiveTeacher(_Shuffled):
    """The teacher itself, run on the pixels that the student sees."""

    where = "computed in the loop"

    def __init__(self, teacher: Teacher, taps: Sequence[Tap]) -> None:
        self._teacher, self._taps = teacher, list(taps)

    def outputs(self, batch: ViewBatch) -> dict[str, Tensor]:
        values = self._teacher.outputs(batch.inputs, batch.labels, self._taps)
        return {tap: value.clone() for tap, value in values.items()}  # out of inference mode


class CachedTeacher(_Shuffled):
    """Rows of the current view's slab, on the device or in host memory."""

    def __init__(
        self,
        cache: TeacherCache,
        taps: Sequence[str],
        num_views: int,
        device: torch.device,
        location: Placement = "device",
    ) -> None:
        self._cache, self._taps = cache, list(taps)
        self._num_views, self._device = num_views, device
        self._is_on_device = location == "device"
        size = format_size(view_bytes(cache, taps))
        self.where = f"in {location} memory, one view ({size}) at a time"
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="teacher-feed")
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._view = -1  # none yet
        self._slab: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}
        self._buffers = Buffers(device)
        self._expanded = Expansion(cache)

    def start_epoch(self, epoch: int, order: Ids) -> None:
        """Make the epoch's view current and begin to read the one after it."""
        view = view_of_epoch(epoch, self._num_views)
        if view != self._view:
            self._slab = self._read_ahead(view).result()
            mark_as_used(self._slab)
            self._view = view
        following = view_of_epoch(epoch + 1, self._num_views)
        if following != view:
            self._next = (following, self._pool.submit(self._read, following))

    def outputs(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Raises WrongView."""
        check_view(batch, self._view)
        if not self._is_on_device:
            return self._expanded(self._buffers.sent([(self._slab, batch.host_ids)]))
        rows = {
            tap: gather_rows(values, batch.ids, self._rows.setdefault(tap, values[:0].clone()))
            for tap, values in self._slab.items()
        }
        return self._expanded(rows)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _read_ahead(self, view: int) -> Future[dict[str, Tensor]]:
        if self._next is not None and self._next[0] == view:
            return self._next[1]
        return self._pool.submit(self._read, view)

    def _read(self, view: int) -> dict[str, Tensor]:
        records = self._cache.read_view(view, self._taps, compact=True)
        slab = {tap: as_tensor(values) for tap, values in records.items()}
        if not self._is_on_device:
            return {tap: pinned(values, self._device) for tap, values in slab.items()}
        return copy_in_background(slab, self._device)


class WindowedTeacher:
    """Rows of a window of blocks, in the order that such windows allow."""

    def __init__(
        self,
        cache: TeacherCache,
        taps: Sequence[str],
        num_views: int,
        device: torch.device,
        window_rows: int,
        own: Callable[[Ids], Ids] = lambda order: order,
    ) -> None:
        """own: of an epoch's order, the samples whose rows are held."""
        self._cache, self._taps, self._num_views = cache, list(taps), num_views
        self._own = own
        self._layout = ShuffleBuffer(cache.num_samples, cache.manifest.block_rows, window_rows)
        self.where = (
            f"in windows of {window_rows:,} of {cache.num_samples:,} samples, shuffled there"
        )
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="teacher-feed")
        self._buffers = Buffers(device)
        self._expanded = Expansion(cache)
        self._windows: list[Future[dict[str, Tensor]]] = []
        self._view = -1  # none yet

    def order(self, seed: int, epoch: int, num_samples: int) -> Ids:
        return self._layout.order(seed, epoch)

    def start_epoch(self, epoch: int, order: Ids) -> None:
        """Begin to read the epoch's first two windows."""
        for window in self._windows:
            window.cancel()
        self._view = view_of_epoch(epoch, self._num_views)
        self._is_held = np.isin(np.arange(self._cache.num_samples), self._own(order))
        rows = self._layout.rows(order, self._is_held)
        self._row_of, self._window_of, self._blocks = rows
        self._windows, self._first = [], 0
        self._read_until(1)
        self._windows[0].result()

    def outputs(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Raises WrongView."""
        check_view(batch, self._view)
        ids = batch.host_ids.numpy()
        windows = self._window_of[ids]
        self._forget_before(int(windows[0]))
        self._read_until(int(windows[-1]) + 1)
        parts = []
        for window in range(int(windows[0]), int(windows[-1]) + 1):
            rows = torch.from_numpy(self._row_of[ids[windows == window]])
            parts.append((self._windows[window - self._first].result(), rows))
        return self._expanded(self._buffers.sent(parts))

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
            held = self._is_held[block.start : block.stop]
            parts.append(part if held.all() else {tap: rows[held] for tap, rows in part.items()})
        return {tap: as_tensor(np.concatenate([part[tap] for part in parts])) for tap in parts[0]}


class Expansion:
    """Makes whole logits of cut ones, batch by batch on the device; leaves all else as it is."""

    def __init__(self, cache: TeacherCache) -> None:
        spec = cache.manifest.taps.get("logits")
        self._num_classes = spec.shape[0] if spec is not None and spec.top else 0

    def __call__(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """rows: name -> (B, ...); of cut logits the three arrays that `store.format.spec` names."""
        values, classes, rest = compact_names("logits")
        if not self._num_classes or classes not in rows:
            return rows
        logits = expand_logits(rows[values], rows[classes], rows[rest], self._num_classes)
        whole = {name: tap for name, tap in rows.items() if name not in (values, classes, rest)}
        return {**whole, "logits": logits}


def expand_logits(values: Tensor, classes: Tensor, rest: Tensor, num_classes: int) -> Tensor:
    """(B, num_classes) float32 of (B, k) values, (B, k) classes and (B,) rest: `format.spec`."""
    share = rest.float() - math.log(num_classes - values.shape[1])
    logits = share[:, None].repeat(1, num_classes)
    return logits.scatter_(1, classes.long(), values.float())


def as_tensor(values: NDArray[Any]) -> Tensor:
    """torch's own operations do not know uint16: classes become int32."""
    return torch.from_numpy(values.astype(np.int32) if values.dtype == np.uint16 else values)


def check_view(batch: ViewBatch, view: int) -> None:
    if batch.view != view:
        loaded = f"those of view {view} are loaded" if view >= 0 else "no epoch has started"
        raise WrongView(
            f"the teacher's outputs were requested for a batch of view {batch.view}, but {loaded}",
            fix="call start_epoch(epoch, order), and show view_of_epoch(epoch, num_views)",
        )


def view_bytes(cache: TeacherCache, taps: Sequence[str]) -> int:
    """The bytes of one view's records in memory."""
    return cache.num_samples * sum(cache.taps[tap].read_bytes_per_record for tap in taps)


def choose_placement(num_bytes: int, device: torch.device) -> Placement:
    """Where two slabs of that size fit: on the device, else in host memory."""
    return "device" if 2 * num_bytes <= _DEVICE_SHARE * free_memory(device) else "host"
