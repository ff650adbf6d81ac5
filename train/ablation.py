"""Every method with every seed from one cache; what is finished already is not trained again.

A run that fails is reported at the end and stops no other. With several jobs, processes that read
the same cache (and share the system's page cache) train side by side.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from rich.console import Console

from configs.commands import cache_command
from configs.schema import StudentConfig, TeacherConfig
from runtime.errors import Stopped, UserError
from runtime.limits import Share
from runtime.program import program
from runtime.signals import StopRequest
from runtime.text import visible
from train.runs import FoundRun, finished_alike, runs_below
from train.study import Run, Study, open_study
from train.windows import Feed, jobs_that_fit

_POLL_SECONDS = 0.2
_ROOT = Path(__file__).parent.parent


def train_and_report(
    runs: Sequence[Run],
    commands: Sequence[str],
    *,
    device: str = "auto",
    num_workers: int | None = None,
    jobs: int = 1,
    console: Console,
    track: Sequence[str] = (),
) -> int:
    """Train the unfinished ones of a study's runs, write the report; returns the exit status.

    commands: to be printed in the report. Raises as `run_ablation` does.
    """
    failures: dict[Run, str] = {}
    if all(run.is_finished for run in runs):
        console.print(f"all {len(runs)} runs are finished: nothing to train.")
    else:
        failures = run_ablation(
            runs, device=device, num_workers=num_workers, jobs=jobs, console=console, track=track
        )
    status = 1 if failures else 0
    if len(failures) < len(runs):
        status = write_report(runs, commands, console) or status
    for run, failure in failures.items():
        print(visible(f"{run} failed: {failure}"), file=sys.stderr)
    return status


def commands_behind(
    study: Study, name: str, overrides: Sequence[str], caches_dir: Path
) -> list[str]:
    """What trains one run, with METHOD and SEED to be filled in, and what makes each cache.

    name, overrides: as the user gave them.
    """
    words = [*program("train"), "student", name, "--method", "METHOD", "--seed", "SEED"]
    words += ["--caches", str(caches_dir), "--runs", str(study.runs_dir), *overrides]
    teachers = (study.teacher, *(other.config for other in study.further))
    return [shlex.join(words), *(cache_command(each, caches_dir=caches_dir) for each in teachers)]


def run_ablation(
    runs: Sequence[Run],
    *,
    device: str = "auto",
    num_workers: int | None = None,
    jobs: int = 1,
    console: Console,
    track: Sequence[str] = (),
) -> dict[Run, str]:
    """Train the unfinished ones of a study's runs; returns {run: why it failed}.

    The teacher is not loaded. Raises TrainError before anything starts where a method cannot work
    with this cache, DeviceError where the device is missing; Stopped.
    """
    from runtime.devices import check_device  # these load torch
    from train.check import check_methods
    from train.student import train_student

    check_methods(runs[0].study, list(dict.fromkeys(run.method for run in runs)))
    check_device(device)
    waiting = [run for run in runs if not run.is_finished]
    if len(waiting) < len(runs):
        console.print(f"{len(runs) - len(waiting)} of {len(runs)} runs already finished")
    for text in dict.fromkeys(map(_format_changes, waiting)):
        console.print(text, end="")
    fitting = jobs_that_fit(jobs, [run.held_bytes for run in runs])
    if fitting < jobs:
        console.print(f"{fitting} of {jobs} jobs: memory holds no more teacher outputs")
    train = functools.partial(train_student, device=device, num_workers=num_workers, track=track)
    if (jobs := min(fitting, len(waiting))) > 1:
        done = _side_by_side(waiting, train, jobs)
    else:
        done = ((run, _failure_of(run, train)) for run in waiting)
    failures, started = {}, time.perf_counter()
    for number, (run, failure) in enumerate(done, start=1):
        if failure:
            failures[run] = failure
        left = (time.perf_counter() - started) / number * (len(waiting) - number)
        result = _format_result(run, failure)
        console.print(f"run {number:3d}/{len(waiting)}  {result}  ETA {left:4.0f} s")
    return {run: failures[run] for run in waiting if run in failures}


def _format_changes(run: Run) -> str:
    changes = run.changes()
    if not changes:
        return ""
    return "\n  ".join([f"{run.method} differs from its last run:", *changes]) + "\n"


def _format_result(run: Run, failure: str) -> str:
    start = f"{run.method:<12} seed {run.seed}"
    if failure:
        return f"{start}  FAILED: {failure.splitlines()[0]}"
    summary = run.summary
    assert summary is not None
    return f"{start}  top-1 error {summary['last']['top1_error']:6.2f} %"


def _failure_of(run: Run, train: Callable[[Run], object]) -> str:
    """Train; returns what went wrong, empty if nothing did. Raises Stopped."""
    try:
        train(run)
    except Stopped:
        raise
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # unexpected, but the other runs go on
        return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    return ""


# ---- the report


def finished_of(study: Study) -> list[FoundRun]:
    """The finished runs of a study, whatever was asked for now: in the order of its methods."""
    own = {method: study.run(method, 0).identity for method in study.config.methods}
    return finished_alike(runs_below(study.runs_dir, study.config.name), own)


def write_report(asked: Sequence[Run], commands: Sequence[str], console: Console) -> int:
    """Run `python -m report` on a study's finished runs; returns its exit status.

    Prints what it prints. `train` is below `report` and cannot import it. asked: the runs that were
    asked for now, of one study.
    """
    study = asked[0].study
    methods = dict.fromkeys(run.method for run in asked)
    seeds = dict.fromkeys(str(run.seed) for run in asked)
    names = [run.folder.name for run in finished_of(study)]
    call = ["report", "--cache", str(study.cache.path), "--asked"]
    call.append(f"{' '.join(methods)}; seeds {' '.join(seeds)}")
    call += [word for command in commands for word in ("--command", command)]
    # Finds the project's package from any folder; -P ignores a report.py in that folder.
    result = subprocess.run(
        [sys.executable, "-P", "-m", *call, "--", str(study.folder), *names],
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    console.print(result.stdout.rstrip("\n"))
    print(result.stderr, end="", file=sys.stderr)
    return result.returncode


# ---- several processes


def _side_by_side(
    runs: Sequence[Run], train: Callable[[Run], object], jobs: int
) -> Iterator[tuple[Run, str]]:
    """Runs and their failures as they come.

    On a signal every process saves a checkpoint; then Stopped is raised.
    """
    context = multiprocessing.get_context("spawn")
    turns = context.SimpleQueue()
    for turn in range(jobs):
        turns.put(Share(turn, jobs))
    pool = ProcessPoolExecutor(
        jobs,
        mp_context=context,
        initializer=_begin,
        initargs=(_Recipe.of(runs[0].study), train, turns),
    )
    with StopRequest() as stop:
        futures = {pool.submit(_train, run.method, run.seed, run.live_teacher): run for run in runs}
        # A pool lists the processes to watch when a run is handed in, before it starts the process
        # for it: without one more call the death of the last one would go unnoticed.
        pool.submit(_nothing)
        try:
            while futures:
                done, _ = wait(futures, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    if stop.signal_number is None or future.exception() is None:
                        yield futures.pop(future), _result_of(future)
                if stop.signal_number is not None:
                    _pass_on(futures)
                    raise Stopped(
                        stop.signal_number,
                        "stopped; the same command resumes every run",
                    )
        finally:
            pool.shutdown(cancel_futures=True)


def _result_of(future: Future[str]) -> str:
    try:
        return future.result()
    except BrokenProcessPool:
        return "its process, or one beside it, died (out of memory?)"


def _pass_on(futures: Iterable[Future[str]]) -> None:
    """Let the processes save their checkpoints, as they do on SIGTERM, and wait for them."""
    futures = list(futures)
    for future in futures:
        future.cancel()
    for process in multiprocessing.active_children():
        process.terminate()
    wait([future for future in futures if not future.cancelled()], timeout=60)


@dataclass(frozen=True)
class _Recipe:
    """What another process needs to open the same study."""

    config: StudentConfig
    teacher: TeacherConfig
    cache_path: Path
    runs_dir: Path
    feed: Feed

    @classmethod
    def of(cls, study: Study) -> _Recipe:
        config = replace(study.config, num_views=study.num_views)
        return cls(config, study.teacher, study.cache.path, study.runs_dir, study.feed)

    def opened(self) -> Study:
        return open_study(
            self.config,
            self.teacher,
            caches_dir=self.cache_path.parent,
            runs_dir=self.runs_dir,
            cache_path=self.cache_path,
            feed=self.feed,
        )


_here: tuple[Study, Callable[[Run], object]] | None = None  # in a process of the pool


def _begin(recipe: _Recipe, train: Callable[[Run], object], turns: SimpleQueue[Share]) -> None:
    global _here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # outside of training; the parent passes it on
    os.environ.update(turns.get().environment())
    _here = recipe.opened(), train


def _nothing() -> None:
    pass


def _train(method: str, seed: int, live_teacher: bool) -> str:
    assert _here is not None
    study, train = _here
    try:
        return _failure_of(study.run(method, seed, live_teacher), train)
    except Stopped as stopped:
        # The checkpoint is saved. Whoever sent the signal waits for this process to end, and a
        # pool's process would otherwise wait for its next run.
        os._exit(stopped.exit_code)
