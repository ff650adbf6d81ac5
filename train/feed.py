"""Where a training step gets the teacher's answers from.

Two sources with one interface: the cache, one view's slab per epoch with the next one read ahead in
the background; and the live teacher, which runs in the loop and is there to prove the first right.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from nets.teacher import Teacher
from store import TeacherCache
from views.augment import view_of_epoch
from views.pixels import ViewBatch


class TeacherSource(Protocol):
    """Teacher outputs for one batch after another."""

    def start_epoch(self, epoch: int) -> None: ...

    def outputs(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Taps of the current epoch's view of the batch: name -> (B, ...) on the device."""
        ...

    def close(self) -> None: ...


class NoTeacher:
    """For methods without a teacher."""

    def start_epoch(self, epoch: int) -> None:
        pass

    def outputs(self, batch: ViewBatch) -> dict[str, Tensor]:
        return {}

    def close(self) -> None:
        pass


class CachedTeacher:
    """Rows of the current view's slab, which lies on the training device."""

    def __init__(
        self, cache: TeacherCache, taps: Sequence[str], num_views: int, device: torch.device
    ) -> None:
        self._cache, self._taps = cache, list(taps)
        self._num_views, self._device = num_views, device
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="teacher-feed")
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._view: int | None = None
        self._slab: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}

    def start_epoch(self, epoch: int) -> None:
        """Make the epoch's view current and begin to read the one after it."""
        view = view_of_epoch(epoch, self._num_views)
        if view != self._view:
            self._slab = self._read_ahead(view).result()
            self._view = view
        following = view_of_epoch(epoch + 1, self._num_views)
        if following != view:
            self._next = (following, self._reader.submit(self._read, following))

    def outputs(self, batch: ViewBatch) -> dict[str, Tensor]:
        return {
            tap: gather_rows(values, batch.ids, self._rows.setdefault(tap, values[:0].clone()))
            for tap, values in self._slab.items()
        }

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)

    def _read_ahead(self, view: int) -> Future[dict[str, Tensor]]:
        if self._next is not None and self._next[0] == view:
            return self._next[1]
        return self._reader.submit(self._read, view)

    def _read(self, view: int) -> dict[str, Tensor]:
        records = self._cache.read_view(view, self._taps)
        return {tap: torch.from_numpy(values).to(self._device) for tap, values in records.items()}


def gather_rows(slab: Tensor, sample_ids: Tensor, kept: Tensor) -> Tensor:
    """Rows of (N, ...) into memory that is kept from step to step: (B, ...), a view of `kept`.

    Fresh memory for each batch would cost more, in page faults, than the copy itself. The rows are
    those of the last call, so they must not be needed after the step.
    """
    if len(kept) < len(sample_ids):
        kept.resize_(len(sample_ids), *slab.shape[1:])
    return torch.index_select(slab, 0, sample_ids, out=kept[: len(sample_ids)])


class LiveTeacher:
    """The teacher itself, run on the very pixels that the student sees."""

    def __init__(self, teacher: Teacher, taps: Sequence[str]) -> None:
        self._teacher, self._taps = teacher, list(taps)

    def start_epoch(self, epoch: int) -> None:
        pass

    def outputs(self, batch: ViewBatch) -> dict[str, Tensor]:
        found = self._teacher.outputs(batch.inputs, batch.labels)
        return {tap: found[tap].clone() for tap in self._taps}  # out of inference mode

    def close(self) -> None:
        pass
