"""How a run is recorded while it is trained. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from teach_once.train.engine.epoch_result import EpochResult
    from teach_once.train.engine.ranks import Ranks


@dataclass(frozen=True)
class Recording:
    """Checkpoints and metrics of a run: made once by a command and handed on whole.

    checkpoint_minutes: between checkpoints within an epoch. loggers: the trackers that receive the
    metrics, see `train.recording.tracking`. console: prints each epoch; None: nothing is printed.
    on_epoch: called with the metrics of each epoch.
    """

    checkpoint_minutes: float = 10.0
    loggers: Sequence[str] = ()
    console: Console | None = None
    on_epoch: Callable[[EpochResult], None] | None = None

    def on_rank(self, ranks: Ranks) -> Recording:
        """Return the same on rank 0, and a recording that reports nothing on the other ranks."""
        if ranks.is_first:
            return self
        return replace(self, loggers=(), console=None, on_epoch=None)
