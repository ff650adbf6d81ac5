"""Train from a cache that lacks views: the teacher runs in the loop, and its outputs are added.

An epoch trains on exactly one view. If the cache has it, it is read. Otherwise, the teacher runs on
the student's batches, the losses get its outputs as the cache will return them, and the view is
committed at the end of the epoch. So this run equals a later run from the cache. A view is
completed before its epoch instead if the student's inputs are not the teacher's (another
normalization), or if `ViewFiller.begin` cannot collect it.

The teacher, the cache's plan and its writer are on the other side of `ViewFiller`: training never
imports the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from teach_once.store import TapSpec, TeacherCache
from teach_once.train.outputs.teacher_outputs import Ids, TeacherOutputs, check_view
from teach_once.views.pixels.batches import ViewBatch


class ViewFiller(Protocol):
    """Adds views to one cache."""

    @property
    def path(self) -> Path: ...

    @property
    def taps(self) -> Mapping[str, TapSpec]:
        """The taps of every view that is added."""
        ...

    def digests(self) -> NDArray[np.uint8] | None:
        """Return the digests of all samples, (N, 16) uint8; None until view 0 is complete."""
        ...

    def opened(self, view: int) -> TeacherCache | None:
        """Return the cache with views 0 to `view`; None if it lacks one."""
        ...

    def complete(self, view: int) -> TeacherCache:
        """Commit everything that views 0 to `view` lack; returns the cache with these views."""
        ...

    def begin(self, view: int, taps: Sequence[str]) -> bool:
        """Start to collect a view batch by batch; returns False if `complete` must compute it.

        taps: the taps that the run reads.
        """
        ...

    def outputs(self, batch: ViewBatch) -> Mapping[str, Tensor]:
        """Run the teacher on a batch of the view and keep its outputs; returns them as stored."""
        ...


class FillingTeacher(TeacherOutputs):
    """Outputs from the cache, or of the teacher in the loop, view by view."""

    def __init__(
        self,
        filler: ViewFiller,
        taps: Sequence[str],
        open_outputs: Callable[[TeacherCache], TeacherOutputs],
        *,
        shares_inputs: bool = True,
    ) -> None:
        """Fill with `filler`.

        open_outputs: opens the taps of a cache that has the view. shares_inputs: True if the
        student's inputs are the teacher's.
        """
        self._filler, self._taps, self._open = filler, list(taps), open_outputs
        self._shares_inputs = shares_inputs
        self.where = f"read from {filler.path}, or computed in the loop and added to it"
        self._cached: TeacherOutputs | None = None
        self._num_views = 0  # views that can be read
        self._view = -1  # view that is computed in the loop; -1: none

    def start_epoch(self, view: int, ids: Ids) -> None:
        self.end_epoch()
        if view >= self._num_views:
            cache = self._filler.opened(view)
            if cache is None and self._shares_inputs and self._filler.begin(view, self._taps):
                self._view = view
                return
            self._read_from(cache or self._filler.complete(view))
        assert self._cached is not None
        self._cached.start_epoch(view, ids)

    def prefetch(self, view: int, ids: Ids) -> None:
        if self._cached is not None and view < self._num_views:
            self._cached.prefetch(view, ids)

    def rows(self, batch: ViewBatch) -> dict[str, Tensor]:
        if self._view < 0:
            assert self._cached is not None
            return self._cached.rows(batch)
        check_view(batch, self._view)
        values = self._filler.outputs(batch)
        return {tap: values[tap] for tap in self._taps}

    def end_epoch(self) -> None:
        if self._view >= 0:
            self._filler.complete(self._view)
            self._view = -1

    def close(self) -> None:
        if self._cached is not None:
            self._cached.close()

    def _read_from(self, cache: TeacherCache) -> None:
        self.close()
        self._cached, self._num_views = self._open(cache), cache.num_views
