"""Every method with every seed from one cache; what is finished already is not trained again.

A run that fails is reported at the end and stops no other. With several jobs, processes that read
the same cache (and share the system's page cache) train side by side.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.schema import StudentConfig, TeacherConfig
from nets.archs import ArchError
from nets.taps import TapError
from runtime.devices import check_device
from runtime.errors import Stopped
from runtime.limits import Share
from runtime.signals import StopRequest
from store.errors import CacheError
from train.run import check_methods, train_student
from train.study import Feed, Study, TrainError, open_study
from views.datasets import DatasetError

Run = tuple[str, int]  # method, seed
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class RunOptions:
    """How runs are carried out, which decides none of their results."""

    device: str = "auto"
    num_workers: int | None = None
    jobs: int = 1


@dataclass(frozen=True)
class Outcome:
    """Of one run: its summary, or why there is none."""

    run: Run
    summary: dict[str, Any] | None
    failure: str = ""


def run_ablation(
    study: Study,
    methods: Sequence[str],
    seeds: Sequence[int],
    options: RunOptions,
    console: Console,
) -> list[Outcome]:
    """Train what is missing; the outcomes, method by method. The teacher is not loaded.

    Raises TrainError before anything starts where a method cannot work with this cache, DeviceError
    where the device is missing; Stopped.
    """
    check_methods(study, methods)
    check_device(options.device)
    runs = [(method, seed) for method in methods for seed in seeds]
    outcomes = {run: Outcome(run, study.finished(*run)) for run in runs}
    waiting = [run for run in runs if outcomes[run].summary is None]
    if len(waiting) < len(runs):
        console.print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already")
    for text in dict.fromkeys(_format_changes(study, *run) for run in waiting):
        console.print(text, end="")
    started = time.perf_counter()
    jobs = study.jobs_that_fit(options.jobs, methods)
    if jobs < options.jobs:
        console.print(f"{jobs} of {options.jobs} jobs: the memory holds no more views side by side")
    options = replace(options, jobs=max(1, min(jobs, len(waiting))))
    train = _one_by_one if options.jobs == 1 else _side_by_side
    for number, outcome in enumerate(train(study, waiting, options), start=1):
        outcomes[outcome.run] = outcome
        left = (time.perf_counter() - started) / number * (len(waiting) - number)
        console.print(f"run {number:3d}/{len(waiting)}  {_told(outcome)}  ETA {left:4.0f} s")
    return [outcomes[run] for run in runs]


def _format_changes(study: Study, method: str, seed: int) -> str:
    changes = study.changes(method, seed)
    if not changes:
        return ""
    return "\n  ".join([f"{method} differs from its last run:", *changes]) + "\n"


def _told(outcome: Outcome) -> str:
    method, seed = outcome.run
    if outcome.summary is None:
        return f"{method:<12} seed {seed}  FAILED: {outcome.failure.splitlines()[0]}"
    return f"{method:<12} seed {seed}  top-1 error {outcome.summary['last']['top1_error']:6.2f} %"


def _one_by_one(study: Study, runs: Sequence[Run], options: RunOptions) -> Iterator[Outcome]:
    for run in runs:
        yield _outcome(study, run, options)


def _outcome(study: Study, run: Run, options: RunOptions) -> Outcome:
    try:
        return Outcome(
            run,
            train_student(study, *run, device=options.device, num_workers=options.num_workers),
        )
    except Stopped:
        raise
    except (TrainError, DatasetError, CacheError, ArchError, TapError) as error:
        return Outcome(run, None, f"{type(error).__name__}: {error}")
    except Exception as error:  # whatever a run dies of, the others go on; nobody foresaw this one
        return Outcome(run, None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


# ---- several processes


def _side_by_side(study: Study, runs: Sequence[Run], options: RunOptions) -> Iterator[Outcome]:
    """Outcomes as they come. On a signal every process keeps its state; then Stopped is raised."""
    context = multiprocessing.get_context("spawn")
    turns = context.SimpleQueue()
    for turn in range(options.jobs):
        turns.put(turn)
    pool = ProcessPoolExecutor(
        options.jobs,
        mp_context=context,
        initializer=_begin,
        initargs=(_Opened.of(study), options, turns),
    )
    with StopRequest() as stop:
        futures: dict[Future[Outcome], Run] = {pool.submit(_train, run): run for run in runs}
        # A pool lists the processes to watch when a run is handed in, before it starts the process
        # for it: without one more call the death of the last one would go unnoticed.
        pool.submit(_nothing)
        try:
            while futures:
                done, _ = wait(futures, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    if stop.signal_number is None or future.exception() is None:
                        yield _result_of(future, futures.pop(future))
                if stop.signal_number is not None:
                    _pass_on(futures)
                    raise Stopped(
                        stop.signal_number,
                        "stopped; every run is kept, and the same command goes on from there",
                    )
        finally:
            pool.shutdown(cancel_futures=True)


def _result_of(future: Future[Outcome], run: Run) -> Outcome:
    try:
        return future.result()
    except BrokenProcessPool:
        return Outcome(run, None, "its process, or one beside it, died (out of memory?)")


def _pass_on(futures: dict[Future[Outcome], Run]) -> None:
    """Let the processes keep their state, as they do on SIGTERM, and wait for it."""
    for future in futures:
        future.cancel()
    for process in multiprocessing.active_children():
        process.terminate()
    wait([future for future in futures if not future.cancelled()], timeout=60)


@dataclass(frozen=True)
class _Opened:
    """What another process needs to open the same study."""

    config: StudentConfig
    teacher: TeacherConfig
    cache_path: Path
    num_views: int
    runs_dir: Path
    feed: Feed

    @classmethod
    def of(cls, study: Study) -> _Opened:
        return cls(
            replace(study.config, num_views=study.num_views),
            study.teacher,
            study.cache.path,
            study.num_views,
            study.runs_dir,
            study.feed,
        )


_open_here: tuple[Study, RunOptions] | None = None  # in a process of the pool


def _begin(opened: _Opened, options: RunOptions, turns: SimpleQueue[int]) -> None:
    global _open_here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # outside of training; the parent passes it on
    os.environ.update(Share(turns.get(), options.jobs).environment())
    study = open_study(
        opened.config,
        opened.teacher,
        caches_dir=opened.cache_path.parent,
        runs_dir=opened.runs_dir,
        cache_path=opened.cache_path,
        feed=opened.feed,
    )
    _open_here = study, options


def _nothing() -> None:
    pass


def _train(run: Run) -> Outcome:
    assert _open_here is not None
    try:
        return _outcome(_open_here[0], run, _open_here[1])
    except Stopped as stopped:
        # The state is kept. Whoever sent the signal waits for this process to end, and a pool's
        # process would go on to wait for its next run.
        os._exit(stopped.exit_code)
