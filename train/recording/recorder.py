"""The recorder of a run: when to save a checkpoint, when to stop, and which rank writes.

A single process saves when a checkpoint is due, and stops after a signal. With several ranks, each
contributes its request to a max all-reduce after every step, and all ranks act on the maximum one
step later (see `train.engine.ranks`). Only rank 0 writes files. Every rank resumes from rank 0's
checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch

from teach_once.runtime.command.signals import StopRequest
from teach_once.runtime.errors import Stopped
from teach_once.store.identity import identity_sha256
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.engine.ranks import AsyncMaxReduce
from teach_once.train.engine.step import AnyRun
from teach_once.train.engine.train_state import TrainState
from teach_once.train.errors import TrainError
from teach_once.train.recording.checkpoint import (
    Partial,
    checkpoint_digest,
    read_checkpoint,
    restore,
)
from teach_once.train.recording.run_writer import RunWriter
from teach_once.train.runs.files import CHECKPOINT_FILE


class Recorder:
    """The recorder of one run on each rank; training resumes at `first_epoch` and `partial`."""

    def __init__(
        self,
        run: AnyRun,
        train_state: TrainState,
        *,
        checkpoint_minutes: float = 10.0,
        stop: StopRequest | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Resume or start the run.

        checkpoint_minutes: time between checkpoints within an epoch. stop: a request to save and
        stop. clock: returns the run's seconds. Raises Busy if another process trains this run, and
        TrainError if the checkpoint is unusable, if the ranks have different runs, or if a rank
        does not find rank 0's checkpoint.
        """
        self._run, self._ranks, self._stop = run, train_state.ranks, stop or StopRequest()
        self._checkpoint_seconds = 60 * checkpoint_minutes
        self._max_reduce = AsyncMaxReduce(self._ranks)
        self._agreed_signal = 0  # with several ranks: the signal on which all agree
        self.partial: Partial | None = None
        self.first_epoch = 1
        self.threads_before: int | None = None  # threads of the process that saved the checkpoint
        self._ranks.check_equal(
            identity_sha256(run.identity),
            "their settings, caches or data",
            "use the same configs, caches and data on all ranks",
        )
        self._writer = RunWriter(run, train_state, clock) if self._ranks.is_first else None
        try:
            self._resume(train_state)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the run's folder, whether the run is finished or not."""
        if self._writer is not None:
            self._writer.close()

    def is_due(self) -> bool:
        """Return True if all ranks must save a checkpoint after this step, within an epoch."""
        if self._ranks.is_alone:
            return bool(self._requested_signal) or self._is_checkpoint_due()
        self._agreed_signal, is_due = self._max_reduce.wait(2)
        # Rank 0 does not request the checkpoint again that is saved now.
        asks = self._is_checkpoint_due() and not is_due
        self._max_reduce.start([self._requested_signal, int(asks)])
        return bool(self._agreed_signal or is_due)

    def save(self, partial: Partial) -> None:
        """Save a checkpoint within an epoch. Raises Stopped on all ranks if any rank must stop."""
        try:
            if self._writer is not None:
                self._writer.save_partial(partial)
        finally:
            self._ranks.barrier()  # when a rank ends, the launcher stops the others
        self._stop_if_asked(f"in epoch {partial.epoch} after step {partial.step:,}")

    def end_if_asked(self, epoch: int) -> None:
        """Raise Stopped on all ranks if any rank must stop; the epoch is already saved."""
        if not self._ranks.is_alone:
            self._max_reduce.wait(2)  # the requests of the epoch's last step
            self._max_reduce.start([self._requested_signal, 0])
            self._agreed_signal, _ = self._max_reduce.wait(2)
        self._stop_if_asked(f"after epoch {epoch}")

    def save_epoch(self, result: EpochResult) -> None:
        """Append the epoch to the metrics and save a checkpoint."""
        if self._writer is not None:
            self._writer.save_epoch(result)

    def finish(self, extra: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Write the last weights and the summary; returns the summary, {} on other ranks.

        extra: called on rank 0; returns additional entries of the summary.
        """
        summary = self._writer.finish(extra) if self._writer is not None else {}
        self._ranks.barrier()
        return summary

    @property
    def _requested_signal(self) -> int:
        """Return the number of the signal received by this process; 0: none."""
        return self._stop.signal_number or 0

    def _is_checkpoint_due(self) -> bool:
        writer = self._writer
        return (
            writer is not None and time.perf_counter() - writer.saved_at >= self._checkpoint_seconds
        )

    def _stop_if_asked(self, where: str) -> None:
        number = self._requested_signal if self._ranks.is_alone else self._agreed_signal
        if number:
            raise Stopped(number, f"stopped {where}; the same command resumes there")

    def _resume(self, train_state: TrainState) -> None:
        """Resume on every rank from rank 0's checkpoint."""
        writer = self._writer
        if writer is not None:
            self.first_epoch, self.partial = writer.first_epoch, writer.partial
            self.threads_before = writer.threads_before
        if self._ranks.is_alone:
            return
        is_resumed, *digest = self._ranks.broadcast(self._resumed_digest()).tolist()
        if is_resumed and writer is None:
            path = self._run.folder / CHECKPOINT_FILE
            state = read_checkpoint(path, identity_sha256(self._run.identity))
            if state is None or checkpoint_digest(state) != bytes(digest).hex():
                raise TrainError(
                    f"rank {self._ranks.rank} does not find rank 0's checkpoint {path}",
                    fix="use a folder of runs that all machines share: --runs DIR",
                )
            progress = restore(state, train_state, path)
            self.first_epoch, self.partial = progress.epoch + 1, progress.partial
        self._ranks.barrier()  # rank 0 may write again

    def _resumed_digest(self) -> torch.Tensor:
        """Return 1 and the 32 bytes of the resumed checkpoint's digest; zeros for a new run."""
        resumed = torch.zeros(33, dtype=torch.int64)
        if self._writer is not None and (self.first_epoch > 1 or self.partial is not None):
            path = self._run.folder / CHECKPOINT_FILE
            state = read_checkpoint(path, identity_sha256(self._run.identity))
            assert state is not None
            resumed[0] = 1
            resumed[1:] = torch.tensor(list(bytes.fromhex(checkpoint_digest(state))))
        return resumed
