"""Options for recording a run during training. Does not import torch."""

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
    """Options for a run's checkpoints and metrics.

    checkpoint_minutes: time between checkpoints within an epoch. loggers: trackers that receive the
    metrics, see `train.recording.tracking`. console: prints each epoch; None: nothing is printed.
    on_epoch: called with the result of each epoch.
    """

    checkpoint_minutes: float = 10.0
    loggers: Sequence[str] = ()
    console: Console | None = None
    on_epoch: Callable[[EpochResult], None] | None = None

    def on_rank(self, ranks: Ranks) -> Recording:
        """Return these options on rank 0, and options that report nothing on other ranks."""
        if ranks.is_first:
            return self
        return replace(self, loggers=(), console=None, on_epoch=None)
