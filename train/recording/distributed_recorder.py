"""The files of a run that several ranks train: rank 0 writes them, all of them act alike.

Every rank resumes from the same checkpoint, saves (or has rank 0 save) one after the same step, and
ends after the same step when any of them is asked to. What `train.recording.recorder` says of a
run's files holds here too; a single process uses its recorder as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

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
from teach_once.train.recording.recorder import RunRecorder
from teach_once.train.runs.files import CHECKPOINT_FILE


class Recorder(Protocol):
    """What training writes to: see `train.recording.recorder.RunRecorder`."""

    partial: Partial | None
    first_epoch: int
    threads_before: int | None

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...
    def is_due(self) -> bool: ...
    def save(self, partial: Partial) -> None: ...
    def end_if_asked(self, epoch: int) -> None: ...
    def epoch_done(self, result: EpochResult) -> None: ...
    def finish(self, extra: Callable[[], Mapping[str, Any]]) -> dict[str, Any]: ...


def open_recorder(
    run: AnyRun,
    train_state: TrainState,
    *,
    checkpoint_minutes: float,
    stop: StopRequest,
    clock: Callable[[], float] = time.perf_counter,
) -> Recorder:
    """The recorder of a run, on each of its ranks. Raises as `RunRecorder` does, and TrainError
    where a rank does not see the checkpoint that rank 0 resumes from.
    """
    if train_state.ranks.is_alone:
        return RunRecorder(
            run, train_state, checkpoint_minutes=checkpoint_minutes, stop=stop, clock=clock
        )
    return RankRecorder(run, train_state, checkpoint_minutes, stop, clock)


class RankRecorder:
    """`Recorder` on one of several ranks; only that of rank 0 writes."""

    def __init__(
        self,
        run: AnyRun,
        train_state: TrainState,
        checkpoint_minutes: float,
        stop: StopRequest,
        clock: Callable[[], float],
    ) -> None:
        self._run, self._train_state, self._stop = run, train_state, stop
        self._ranks = train_state.ranks
        self._max_reduce = AsyncMaxReduce(self._ranks)
        self._agreed = StopRequest()  # what all ranks have been asked to, as far as all know
        self._writer: RunRecorder | None = None
        self.partial: Partial | None = None
        self.first_epoch = 1
        self.threads_before: int | None = None
        self._ranks.check_equal(
            identity_sha256(run.identity),
            "what they are to train: their settings, their caches or their data",
            "give all of them the same configs, caches and data",
        )
        if self._ranks.is_first:
            self._writer = RunRecorder(
                run,
                train_state,
                checkpoint_minutes=checkpoint_minutes,
                stop=self._agreed,
                clock=clock,
            )
        try:
            self._follow_first()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def is_due(self) -> bool:
        """Whether all ranks are to save a checkpoint now; known one step after one of them asks."""
        signal_number, due = self._max_reduce.wait(2)
        is_due = self._writer is not None and self._writer.is_due() and not due
        self._max_reduce.start([self._stop.signal_number or 0, int(is_due)])
        self._agreed.signal_number = signal_number or None
        return bool(signal_number or due)

    def save(self, partial: Partial) -> None:
        """Save a checkpoint within an epoch. Raises Stopped, on all ranks, if one was asked to."""
        try:
            if self._writer is not None:
                self._writer.save(partial)
        finally:
            self._ranks.barrier()  # a rank that ends has the launcher end the others
        self._end_if_asked(f"in epoch {partial.epoch} after step {partial.step:,}")

    def end_if_asked(self, epoch: int) -> None:
        """Raise Stopped, on all ranks, if one was asked to end; the epoch is saved."""
        self._max_reduce.wait(2)  # the values of the last step of the epoch
        self._max_reduce.start([self._stop.signal_number or 0, 0])
        signal_number, _ = self._max_reduce.wait(2)
        self._agreed.signal_number = signal_number or None
        self._end_if_asked(f"after epoch {epoch}")

    def _end_if_asked(self, where: str) -> None:
        if (number := self._agreed.signal_number) is not None:
            raise Stopped(number, f"stopped {where}; the same command resumes there")

    def epoch_done(self, result: EpochResult) -> None:
        """Append the epoch to the metrics and save a checkpoint."""
        if self._writer is not None:
            self._writer.epoch_done(result)

    def finish(self, extra: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Write the last weights and the summary; returns the summary, on other ranks nothing."""
        summary = self._writer.finish(extra) if self._writer is not None else {}
        self._ranks.barrier()
        return summary

    def _follow_first(self) -> None:
        """Resume on all ranks where rank 0 does: from the file that it has resumed from."""
        path = self._run.folder / CHECKPOINT_FILE
        resumed = torch.zeros(33, dtype=torch.int64)
        writer = self._writer
        if writer is not None and (writer.first_epoch > 1 or writer.partial is not None):
            state = read_checkpoint(path, identity_sha256(self._run.identity))
            assert state is not None
            resumed[0] = 1
            resumed[1:] = torch.tensor(list(bytes.fromhex(checkpoint_digest(state))))
        is_resumed, *digest = self._ranks.broadcast(resumed).tolist()
        if is_resumed and writer is None:
            state = read_checkpoint(path, identity_sha256(self._run.identity))
            if state is None or checkpoint_digest(state) != bytes(digest).hex():
                raise TrainError(
                    f"rank {self._ranks.rank} does not see the checkpoint that rank 0 resumes "
                    f"from: {path}",
                    fix="put the runs into a folder that all machines share: --runs DIR",
                )
            progress = restore(state, self._train_state, path)
            self.first_epoch, self.partial = progress.epoch + 1, progress.partial
        elif writer is not None:
            self.first_epoch, self.partial = writer.first_epoch, writer.partial
            self.threads_before = writer.threads_before
        self._ranks.barrier()  # rank 0 may write again
