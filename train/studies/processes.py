"""Train groups of runs in parallel processes that stop and resume together."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from ctypes import c_byte
from dataclasses import dataclass
from functools import partial
from multiprocessing.queues import SimpleQueue
from types import FrameType
from typing import Any

from teach_once.runtime.command.options import Compute
from teach_once.runtime.command.signals import StopRequest
from teach_once.runtime.errors import Stopped
from teach_once.runtime.machine.resources import Share
from teach_once.train.recording.options import Recording
from teach_once.train.runs.study import Run, Study
from teach_once.train.sessions.changed import changed_since_planned
from teach_once.train.studies.executor import Ended, StudyRecipe, train_group

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Processes:
    """Executor that trains groups in `jobs` parallel processes that stop and resume together."""

    compute: Compute
    recording: Recording
    jobs: int
    reports_epochs = False

    def execute(self, groups: Sequence[Sequence[Run]]) -> Iterator[Ended]:
        """Train as `Executor.execute`; after a signal every process saves a checkpoint."""
        context = multiprocessing.get_context("spawn")
        turns = context.SimpleQueue()
        for turn in range(self.jobs):
            turns.put(Share(turn, self.jobs))
        stopping = context.RawValue("b", 0)
        train = partial(train_group, compute=self.compute, recording=self.recording)
        pool = ProcessPoolExecutor(
            self.jobs,
            mp_context=context,
            initializer=_begin,
            initargs=(StudyRecipe.of(groups[0][0].study), train, turns, stopping),
        )
        with StopRequest() as stop:
            futures = {
                pool.submit(_train, [_named(run) for run in group]): group for group in groups
            }
            # A pool lists the processes to watch before it starts the process for a new run.
            # Without one more call it would not notice the death of the last process.
            pool.submit(_nothing)
            try:
                while futures:
                    done, _ = wait(futures, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                    for future in done:
                        if stop.signal_number is None or future.exception() is None:
                            group = futures.pop(future)
                            yield from zip(group, _results_of(future, len(group)), strict=True)
                    if stop.signal_number is not None:
                        stopping.value = 1
                        _pass_on(futures)
                        raise Stopped(
                            stop.signal_number, "stopped; the same command resumes every run"
                        )
            finally:
                pool.shutdown(cancel_futures=True)


def _results_of(future: Future[list[str]], num_runs: int) -> list[str]:
    try:
        return future.result()
    except BrokenProcessPool:
        return ["its process, or a parallel one, died (out of memory?)"] * num_runs


def _pass_on(futures: Iterable[Future[list[str]]]) -> None:
    """Let the processes save their checkpoints, as on SIGTERM, and wait for them.

    Runs that have not started end at once in their processes. They are not canceled, because Python
    3.11 prints a traceback for a canceled run in a pool in which a process has died.
    """
    for process in multiprocessing.active_children():
        process.terminate()
    wait(futures, timeout=60)


# ---- in a process of the pool

TrainGroup = Callable[[Sequence[Run]], Iterator[Ended]]


class _Worker:
    """A process of the pool: the study, how it trains, and whether it is to stop.

    stopping: shared number, nonzero if the parent has asked all processes to stop.
    """

    def __init__(self, stopping: c_byte) -> None:
        self._stopping = stopping
        self.study_and_train: tuple[Study, TrainGroup] | None = None
        self.is_training = False

    @property
    def is_stopping(self) -> bool:
        return bool(self._stopping.value)

    def stop_outside_of_steps(self, number: int, frame: FrameType | None) -> None:
        """Stop a run that is being prepared; otherwise wait for the other processes.

        A pool ends all its processes as soon as one has died, even while a checkpoint is being
        saved.
        """
        if not self.is_stopping:
            os._exit(128 + number)
        if self.is_training:
            raise Stopped(number, "stopped before its first step")


_worker: _Worker | None = None  # a pool's tasks reach their process through nothing else


def _begin(
    recipe: StudyRecipe, train: TrainGroup, turns: SimpleQueue[Share], stopping: c_byte
) -> None:
    global _worker
    _worker = _Worker(stopping)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # outside training; the parent forwards it
    signal.signal(signal.SIGTERM, _worker.stop_outside_of_steps)
    os.environ.update(turns.get().environment())
    _worker.study_and_train = recipe.open(), train


def _nothing() -> None:
    pass


_Named = tuple[str, int, bool, dict[str, Any]]  # a run in the form sent to another process


def _named(run: Run) -> _Named:
    return run.method, run.seed, run.live_teacher, run.identity


def _train(names: Sequence[_Named]) -> list[str]:
    """Train a group; returns the failure of each run, "" if it succeeded.

    Once the parent has asked to stop, nothing more is trained or returned.
    """
    worker = _worker
    assert worker is not None
    assert worker.study_and_train is not None
    study, train = worker.study_and_train
    try:
        worker.is_training = True
        if worker.is_stopping:
            return []
        planned = {study.run(*name[:3]): name[3] for name in names}
        changed = {run: changed_since_planned(run, planned[run]) for run in planned}
        failures = changed | dict(train([run for run in planned if not changed[run]]))
        return [failures[run] for run in planned]
    except Stopped as stopped:
        if worker.is_stopping:
            return []
        # The checkpoints are saved. The signal came from a pool in which another process has died,
        # not from the parent. The pool waits for this process, which would wait for its next runs.
        os._exit(stopped.exit_code)
    finally:
        worker.is_training = False
