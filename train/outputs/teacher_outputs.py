"""The teacher's outputs for each batch: the interface for training steps, and simple members.

An implementation has a placement (where rows are kept until their batch) and an origin:

                        from the cache                  from the live teacher
one view, on the device `CachedTeacher("device")`       computed in the step: `LiveTeacher`
one view, host memory   `CachedTeacher("host")`
blocks, host memory     `WindowedTeacher`

Wrappers have the same interface: `TeacherEnsemble` for several teachers, `SharedOutputs` for
several students, and `FillingTeacher` for a cache that lacks views. With several ranks, each rank
passes only its samples' ids to `start_epoch` and loads only these. `train.outputs.shuffle_buffer`
determines the order of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from teach_once.nets.teacher.taps import Tap
from teach_once.nets.teacher.teacher import Teacher
from teach_once.train.errors import TrainError
from teach_once.views.pixels.batches import ViewBatch

Ids = NDArray[np.int64]


class WrongView(TrainError):
    """A batch of another view than the loaded teacher outputs."""


class TeacherOutputs(Protocol):
    """A source of the teacher's outputs, batch by batch and epoch by epoch."""

    where: str  # description of where the outputs are kept

    def start_epoch(self, view: int, ids: Ids) -> None:
        """Load the outputs of `view` for samples `ids` (M,), in the order of their batches."""
        return

    def prefetch(self, view: int, ids: Ids) -> None:
        """Start loading the next epoch's view and samples in the background."""
        return

    def rows(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Return the taps of the batch: name -> (B, ...) on the device.

        The next call may overwrite them. Raises WrongView if the batch belongs to another view.
        """
        ...

    def end_epoch(self) -> None:
        """Keep what the epoch's steps have computed; called after its last step."""
        return

    def close(self) -> None:
        """Stop reading."""
        return


class NoTeacher(TeacherOutputs):
    """No outputs, for methods without a teacher."""

    where = "not used"

    def rows(self, batch: ViewBatch) -> dict[str, Tensor]:
        return {}


class LiveTeacher(TeacherOutputs):
    """The teacher run on the student's inputs, which is the reference for cached outputs."""

    where = "computed in the loop"

    def __init__(self, teacher: Teacher, taps: Sequence[Tap]) -> None:
        self._teacher, self._taps = teacher, list(taps)

    def rows(self, batch: ViewBatch) -> dict[str, Tensor]:
        values = self._teacher.outputs(batch.inputs, batch.labels, self._taps)
        return {tap: value.clone() for tap, value in values.items()}  # out of inference mode


def check_view(batch: ViewBatch, view: int) -> None:
    """Raise WrongView unless the batch belongs to the loaded view; -1: none is loaded."""
    if batch.view != view:
        loaded = f"the outputs of view {view} are loaded" if view >= 0 else "no epoch has started"
        raise WrongView(
            f"the teacher's outputs were requested for a batch of view {batch.view}, but {loaded}",
            fix="call start_epoch(view, ids) with the view of the epoch's batches",
        )
