"""Progress of a study's runs and the estimated time left. Does not import torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from teach_once.runtime.formats import counted
from teach_once.train.runs.study import Run

if TYPE_CHECKING:
    from teach_once.train.engine.epoch_result import EpochResult


class StudyProgress:
    """Progress counted in epochs, because runs of a group end together and differ in length.

    groups: the runs that are trained together. clock: returns seconds.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Run]],
        console: Console,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._console, self._clock, self._started = console, clock, clock()
        self._group = {run: group for group in groups for run in group}
        self._left = {run: run.training.epochs for run in self._group}
        self._done = 0  # epochs trained since the start

    @property
    def seconds_left(self) -> float:
        """Estimated time left if all epochs take equally long; 0 before the first one."""
        left = sum(self._left.values())
        return (self._clock() - self._started) / max(1, self._done) * left if self._done else 0.0

    def epoch_done(self, run: Run, result: EpochResult) -> None:
        """Print a line when all runs of a group of several have trained an epoch."""
        self._done += 1
        self._left[run] = run.training.epochs - result.epoch
        group = self._group[run]
        if len(group) > 1 and all(self._left[each] <= self._left[run] for each in group):
            self._console.print(
                f"epoch {result.epoch:3d}/{run.training.epochs} of {counted(len(group), 'run')}"
                f"  ETA {self.seconds_left:4.0f} s"
            )

    def ended(self, run: Run) -> None:
        """Count a run that has failed, or has ended in this process with its epochs counted."""
        self._left[run] = 0

    def group_ended(self, run: Run) -> None:
        """Count a run whose group has ended in another process, without reported epochs."""
        for each in self._group[run]:
            self._done += self._left[each]
            self._left[each] = 0
