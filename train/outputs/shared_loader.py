"""Shared loading for several runs: each batch of views and its teacher rows are read once.

The runs must advance together, as in `train.sessions.joint`: a batch exists until the first run
requests the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields

import numpy as np
from torch import Tensor

from teach_once.train.errors import TrainError
from teach_once.train.outputs.teacher_outputs import Ids, TeacherOutputs
from teach_once.views.pixels.batches import Pixels, ViewBatch


class SharedPixels:
    """The views of a split, shared by several readers that receive the same batches: `Pixels`."""

    def __init__(self, pixels: Pixels) -> None:
        self.shape, self.where, self.is_streamed = pixels.shape, pixels.where, pixels.is_streamed
        self._pixels = pixels
        self._reading: _Reading | None = None

    def __len__(self) -> int:
        return len(self._pixels)

    @property
    def current(self) -> ViewBatch:
        """The most recent batch."""
        assert self._reading is not None
        assert self._reading.batch is not None
        return self._reading.batch

    def batches(self, views: Sequence[int], ids: Ids, batch_size: int) -> Iterator[ViewBatch]:
        """Yield as `Pixels.batches` does; a reader that requests the current batch shares it.

        Raises TrainError if another reader has modified a batch in place.
        """
        reading = self._reading
        number = None if reading is None else reading.number_of(views, ids, batch_size)
        if reading is None or number is None:
            reading, number = _Reading(self._pixels, views, ids, batch_size), 0
            self._reading = reading
        while (batch := reading.at(number)) is not None:
            yield batch
            number += 1


class _Reading:
    """Batches in order; the last one is kept."""

    def __init__(self, pixels: Pixels, views: Sequence[int], ids: Ids, batch_size: int) -> None:
        self._views, self._ids, self._batch_size = tuple(views), ids, batch_size
        self._batches = pixels.batches(views, ids, batch_size)
        self._number = -1  # number of the batch, from 0
        self.batch: ViewBatch | None = None  # None before the first and after the last batch
        self._unchanged = Unchanged("the images of a batch")
        self._error: Exception | None = None

    def number_of(self, views: Sequence[int], ids: Ids, batch_size: int) -> int | None:
        """Return the number of the current or next batch if it starts with these ids; else None."""
        first = len(self._ids) - len(ids)
        number, rest = divmod(first, batch_size)
        number *= len(views)
        is_rest = (
            first >= 0
            and rest == 0
            and number in (self._number, self._number + 1)
            and (tuple(views), batch_size) == (self._views, self._batch_size)
            and np.array_equal(self._ids[first:], ids)
        )
        return number if is_rest else None

    def at(self, number: int) -> ViewBatch | None:
        """Return batch `number`, the current one or the next; None after the last one."""
        if number == self._number + 1:
            self._advance()
        assert number == self._number, "its readers must advance together"
        if self._error is not None:
            raise self._error  # raised in every reader, as if it had read alone
        self._unchanged.check()
        return self.batch

    def _advance(self) -> None:
        self._number += 1
        self.batch = None
        try:
            self.batch = next(self._batches, None)
        except Exception as error:
            self._error = error
        values = [getattr(self.batch, each.name, None) for each in fields(ViewBatch)]
        self._unchanged.note([each for each in values if isinstance(each, Tensor)])


class SharedOutputs:
    """The outputs of one teacher for the current batch of `pixels`, read once for all runs.

    source: returns all taps that any run reads.
    """

    def __init__(self, source: TeacherOutputs, pixels: SharedPixels) -> None:
        self.source, self.where = source, source.where
        self._pixels = pixels
        self._epoch: tuple[int, Ids] | None = None
        self._batch: ViewBatch | None = None  # batch of the loaded rows
        self._rows: Mapping[str, Tensor] = {}
        self._unchanged = Unchanged("the teacher's outputs for a batch")

    def select_taps(self, taps: Sequence[str]) -> TeacherOutputs:
        """Return the outputs for one run; closing them keeps the source open for other runs."""
        return _SelectedTaps(self, taps)

    def start_epoch(self, view: int, ids: Ids) -> None:
        epoch = self._epoch
        if epoch is None or epoch[0] != view or not np.array_equal(epoch[1], ids):
            self.source.start_epoch(view, ids)
            self._epoch = view, ids

    def rows(self, part: ViewBatch) -> Mapping[str, Tensor]:
        """Return the rows of the current batch, or of consecutive samples of it."""
        batch = self._pixels.current
        if batch is not self._batch:
            self._rows, self._batch = self.source.rows(batch), batch
            self._unchanged.note(list(self._rows.values()))
        self._unchanged.check()
        if part is batch:
            return self._rows
        (start,) = (batch.host_ids == part.host_ids[0]).nonzero()[0].tolist()
        return {tap: rows[start : start + len(part.ids)] for tap, rows in self._rows.items()}

    def close(self) -> None:
        self.source.close()


class _SelectedTaps(TeacherOutputs):
    """Some taps of shared outputs, for one run."""

    def __init__(self, shared: SharedOutputs, taps: Sequence[str]) -> None:
        self._shared, self._taps, self.where = shared, list(taps), shared.where

    def start_epoch(self, view: int, ids: Ids) -> None:
        self._shared.start_epoch(view, ids)

    def prefetch(self, view: int, ids: Ids) -> None:
        self._shared.source.prefetch(view, ids)

    def rows(self, batch: ViewBatch) -> dict[str, Tensor]:
        rows = self._shared.rows(batch)
        return {tap: rows[tap] for tap in self._taps}


class Unchanged:
    """Tensors that must not be modified in place, because other readers share them."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._tensors: Sequence[Tensor] = ()
        self._versions: list[int] = []

    def note(self, tensors: Sequence[Tensor]) -> None:
        """Watch these tensors instead of the previous ones."""
        self._tensors, self._versions = tensors, [each._version for each in tensors]

    def check(self) -> None:
        """Raise TrainError if a tensor was modified."""
        if [each._version for each in self._tensors] != self._versions:
            raise TrainError(
                f"a network or a loss of another run has changed {self._what} in place, which the "
                f"runs share",
                fix="train without shared loading: SHARED_LOADING=0 or --no-shared-loading",
            )
