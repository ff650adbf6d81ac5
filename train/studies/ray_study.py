"""Train the runs of a study on a Ray cluster: each is a task, which resumes if its node dies.

Runs, their checkpoints and the cache are in folders that all nodes share.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from teach_once.runtime.command.options import Compute
from teach_once.runtime.command.ray import Cluster, Failure, Ref
from teach_once.runtime.command.signals import StopRequest
from teach_once.runtime.errors import Busy, Stopped
from teach_once.train.recording.options import Recording
from teach_once.train.runs.study import Run, Study
from teach_once.train.sessions.changed import check_unchanged
from teach_once.train.studies.executor import Ended, StudyRecipe

_POLL_SECONDS = 0.2
_SECONDS_TO_SAVE = 60.0
_SECONDS_TO_DIE = 120.0  # within this time a process of a dead node releases its run


@dataclass(frozen=True)
class RayTasks:
    """Executor that trains each run as a task of a Ray cluster."""

    compute: Compute
    recording: Recording
    cluster: Cluster
    reports_epochs = False

    def execute(self, groups: Sequence[Sequence[Run]]) -> Iterator[Ended]:
        """Train as `Executor.execute`; after a signal every worker saves a checkpoint."""
        cluster, compute = self.cluster, self.compute
        if compute.device == "auto" and not cluster.resources.gpus:
            compute = replace(compute, device="cpu")
        runs = [run for group in groups for run in group]
        given = StudyRecipe.of(runs[0].study), compute, self.recording
        with StopRequest() as stop:
            tasks = {
                cluster.submit(
                    train_task, *given, run.method, run.seed, run.live_teacher, run.identity
                ): run
                for run in runs
            }
            try:
                while tasks:
                    for task in cluster.done(tasks, _POLL_SECONDS):
                        run, failure = tasks.pop(task), _failure_of(cluster.result(task))
                        yield run, failure
                    if stop.signal_number is not None:
                        _save_all(cluster, tasks)
                        raise Stopped(
                            stop.signal_number, "stopped; the same command resumes every run"
                        )
            finally:
                cluster.cancel(tasks, at_once=True)


def _failure_of(answer: object) -> str:
    if not isinstance(answer, Failure):
        return ""
    if answer.is_bug:
        return f"{answer.kind}: in a worker of the cluster\n{answer.problem}"
    return f"{answer.kind}: {answer.problem}" + (f"\n  fix: {answer.fix}" if answer.fix else "")


def _save_all(cluster: Cluster, tasks: dict[Ref, Run]) -> None:
    """Interrupt the workers, as Ctrl-C would, and wait until they have saved their checkpoints."""
    cluster.cancel(tasks, at_once=False)
    until, left = time.monotonic() + _SECONDS_TO_SAVE, set(tasks)
    while left and time.monotonic() < until:
        left -= set(cluster.done(left, _POLL_SECONDS))


# ---- in a worker's process

_here: tuple[StudyRecipe, Study] | None = None


def train_task(
    recipe: StudyRecipe,
    compute: Compute,
    recording: Recording,
    method: str,
    seed: int,
    live_teacher: bool,
    planned: Mapping[str, Any],
) -> None:
    """Train the rest of a run. Raises TrainError, CacheError, Stopped or Busy.

    planned: its identity in the process that planned the study.
    """
    global _here
    from teach_once.train.sessions.student import train_run  # loads torch

    if _here is None or _here[0] != recipe:
        _here = recipe, recipe.open()
    run, until = _here[1].run(method, seed, live_teacher), time.monotonic() + _SECONDS_TO_DIE
    check_unchanged(run, planned)
    while not run.is_finished:  # true if a node died between the ends of the run and the task
        try:
            train_run(run, compute, recording)
        except Busy:
            if time.monotonic() > until:
                raise
            time.sleep(1.0)
