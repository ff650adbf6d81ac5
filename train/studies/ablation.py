"""Train every method with every seed from one cache; finished runs are skipped.

A failed run is reported at the end and does not stop others. Runs with the same seed may share the
loading of images (`train.sessions.joint`). With several jobs, processes that read the same cache
(and share the system's page cache) train in parallel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from teach_once.runtime.command.options import Compute
from teach_once.runtime.command.ray import Cluster
from teach_once.runtime.metrics import format_deciding
from teach_once.train.outputs.shuffle_buffer import jobs_that_fit
from teach_once.train.recording.options import Recording
from teach_once.train.runs.study import Run, Study, held_together
from teach_once.train.studies.executor import Executor, InTurn
from teach_once.train.studies.processes import Processes
from teach_once.train.studies.progress import StudyProgress
from teach_once.train.studies.ray_study import RayTasks

_LOST = "its process ended without a result"


def run_ablation(
    runs: Sequence[Run],
    compute: Compute,
    recording: Recording,
    *,
    jobs: int = 1,
    share: bool | None = None,
    cluster: Cluster | None = None,
) -> dict[Run, str]:
    """Train a study's unfinished runs; returns {run: failure}.

    recording: of each run; its console prints the study's progress instead of epochs. share: True
    if runs with the same seed share the loading of images; None: if images are read in every epoch.
    cluster: trains each run separately. The teacher is not loaded.

    Raises TrainError before anything starts if a method cannot work with this cache, DeviceError if
    the device is missing, ClusterError, or Stopped.
    """
    from teach_once.runtime.machine.devices import check_device  # these load torch
    from teach_once.train.runs.check_methods import check_methods

    console = recording.console or Console(quiet=True)
    check_methods(runs[0].study, list(dict.fromkeys(run.method for run in runs)))
    if cluster is None:
        check_device(compute.device)
    waiting = [run for run in runs if not run.is_finished]
    if len(waiting) < len(runs):
        console.print(f"{len(runs) - len(waiting)} of {len(runs)} runs already finished")
    for text in dict.fromkeys(map(_format_changes, waiting)):
        console.print(text, end="")
    groups = _groups(waiting, jobs, share if cluster is None else False, compute.device)
    fitting = jobs_that_fit(jobs, [held_together(group) for group in groups])
    if fitting < jobs:
        console.print(f"{fitting} of {jobs} jobs in parallel: no memory for more teacher outputs")
    for group in groups:
        if len(group) > 1:
            methods = " ".join(run.method for run in group)
            console.print(f"shared loading for {len(group)} runs: {methods}; seed {group[0].seed}")
    progress = StudyProgress(groups, console)
    quiet = replace(recording, console=None)
    executor: Executor = InTurn(compute, quiet, progress.epoch_done)
    if cluster is not None:
        executor = RayTasks(compute, quiet, cluster)
    elif (jobs := min(fitting, len(groups))) > 1:
        executor = Processes(compute, quiet, jobs)
    failures = {}
    for number, (run, failure) in enumerate(executor.execute(groups), start=1):
        if failure or run.summary is None:
            failures[run] = failure or _LOST
        (progress.ended if executor.reports_epochs else progress.group_ended)(run)
        result, left = _format_result(run, failure), progress.seconds_left
        console.print(f"run {number:3d}/{len(waiting)}  {result}  ETA {left:4.0f} s")
    return {run: failures[run] for run in waiting if run in failures}


def _groups(runs: Sequence[Run], jobs: int, share: bool | None, device: str) -> list[list[Run]]:
    """Group runs that are trained together: each run alone, or runs with shared loading."""
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
    return f"{start}  {format_deciding(summary['last'])}"
