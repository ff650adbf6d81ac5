"""Every method with every seed from one cache; what is finished already is not trained again.

A run that fails is reported at the end and stops no other. Runs with the same seed may share one
reading of the images (`train.sessions.joint`). With several jobs, processes that read the same
cache (and share the system's page cache) train side by side.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console

from teach_once.runtime.command.options import Compute
from teach_once.runtime.command.ray import Cluster
from teach_once.runtime.errors import Stopped, UserError
from teach_once.train.outputs.shuffle_buffer import jobs_that_fit
from teach_once.train.recording.options import Recording
from teach_once.train.runs.study import Run, Study, held_together
from teach_once.train.studies.processes import side_by_side
from teach_once.train.studies.progress import StudyProgress

if TYPE_CHECKING:
    from teach_once.train.engine.epoch_result import EpochResult

_LOST = "its process ended without a result of it"


def run_ablation(
    runs: Sequence[Run],
    *,
    device: str = "auto",
    num_workers: int | None = None,
    jobs: int = 1,
    share: bool | None = None,
    cluster: Cluster | None = None,
    console: Console,
    track: Sequence[str] = (),
) -> dict[Run, str]:
    """Train the unfinished ones of a study's runs; returns {run: why it failed}.

    share: whether runs with the same seed share one reading of the images; None: where images are
    read for every epoch. cluster: trains each run by itself, instead of this process. The teacher
    is not loaded. Raises TrainError before anything starts where a method cannot work with this
    cache, DeviceError where the device is missing; ClusterError, Stopped.
    """
    from teach_once.runtime.machine.devices import check_device  # these load torch
    from teach_once.train.runs.check_methods import check_methods

    check_methods(runs[0].study, list(dict.fromkeys(run.method for run in runs)))
    if cluster is None:
        check_device(device)
    waiting = [run for run in runs if not run.is_finished]
    if len(waiting) < len(runs):
        console.print(f"{len(runs) - len(waiting)} of {len(runs)} runs already finished")
    for text in dict.fromkeys(map(_format_changes, waiting)):
        console.print(text, end="")
    groups = _groups(waiting, jobs, share if cluster is None else False, device)
    fitting = jobs_that_fit(jobs, [held_together(group) for group in groups])
    if fitting < jobs:
        console.print(f"{fitting} of {jobs} jobs: memory holds no more teacher outputs")
    for group in groups:
        if len(group) > 1:
            methods = " ".join(run.method for run in group)
            console.print(f"one reading for {len(group)} runs: {methods}; seed {group[0].seed}")
    progress = StudyProgress(groups, console)
    train = functools.partial(_train_group, device=device, num_workers=num_workers, track=track)
    told = functools.partial(train, on_epoch=progress.epoch_done)
    is_here = cluster is None and min(fitting, len(groups)) <= 1
    done: Iterator[tuple[Run, str]] = (each for group in groups for each in told(group))
    if cluster is not None:
        from teach_once.train.studies.ray_study import Options, train_on_cluster

        done = train_on_cluster(waiting, cluster, Options(device, num_workers, tuple(track)))
    elif (jobs := min(fitting, len(groups))) > 1:
        done = side_by_side(groups, train, jobs)
    failures = {}
    for number, (run, failure) in enumerate(done, start=1):
        if failure or run.summary is None:
            failures[run] = failure or _LOST
        (progress.ended if is_here else progress.group_ended)(run)
        result, left = _format_result(run, failure), progress.seconds_left
        console.print(f"run {number:3d}/{len(waiting)}  {result}  ETA {left:4.0f} s")
    return {run: failures[run] for run in waiting if run in failures}


def _groups(runs: Sequence[Run], jobs: int, share: bool | None, device: str) -> list[list[Run]]:
    """What is trained together: by itself each run, or those that share a reading."""
    if share is None:
        share = bool(runs) and _reads_every_epoch(runs[0].study, device)
    if not share:
        return [[run] for run in runs]
    from teach_once.train.sessions.joint import groups_of

    return groups_of(runs, jobs=jobs, device=device)


def _reads_every_epoch(study: Study, device: str) -> bool:
    from teach_once.runtime.machine.devices import pick_device
    from teach_once.views.pixels.resident import are_streamed

    return are_streamed(study.dataset.train, study.teacher.views, pick_device(device))


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
    if summary is None:
        return f"{start}  FAILED: {_LOST}"
    return f"{start}  top-1 error {summary['last']['top1_error']:6.2f} %"


def _train_group(
    runs: Sequence[Run],
    *,
    device: str,
    num_workers: int | None,
    track: Sequence[str],
    on_epoch: Callable[[Run, EpochResult], None] | None = None,
) -> Iterator[tuple[Run, str]]:
    """Train; gives each run with what went wrong, empty if nothing did. Raises Stopped."""
    from teach_once.train.sessions.joint import train_together
    from teach_once.train.sessions.student import train_run  # these load torch

    compute, recording = Compute(device, num_workers), Recording(track=track)
    left = list(runs)
    try:
        if len(runs) == 1:
            alone = functools.partial(on_epoch, runs[0]) if on_epoch else None
            train_run(runs[0], compute, replace(recording, on_epoch=alone))
        else:
            for run, error in train_together(runs, compute, recording, on_epoch):
                left.remove(run)
                yield run, "" if error is None else _format_error(error)
        failure = ""
    except Stopped:
        raise
    except Exception as error:  # unexpected, but the other runs go on
        failure = _format_error(error)
    yield from ((run, failure) for run in left)


def _format_error(error: Exception) -> str:
    name = f"{type(error).__name__}: {error}"
    if isinstance(error, UserError):
        return name
    return f"{name}\n{''.join(traceback.format_exception(error))}"
