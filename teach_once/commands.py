"""teach-once cache-teacher NAME | train-student NAME | ablation NAME: from nothing to a result.

Each builds whatever is missing first, in the order teacher weights, cache, student, report, and
skips what exists. `make cache-teacher`, `make train-student` and `make ablation` run them.
"""

from __future__ import annotations

import functools
import shlex
import sys
from typing import Annotated

import typer
from rich.console import Console

from teach_once.configs.load import teachers_of
from teach_once.report.command import print_written
from teach_once.runtime.command.frame import new_app, new_console, run_command
from teach_once.runtime.command.options import (
    CacheStorage,
    ClusterAddress,
    Compute,
    Overrides,
    TeacherName,
    can_be_quiet,
    takes_option_groups,
)
from teach_once.runtime.command.program import in_repository
from teach_once.stages import Stages, TeacherOptions, Teachers, run_stages
from teach_once.store.place.open import place_at
from teach_once.train.cli.ablation import (
    AblationRequest,
    StudyRequest,
    StudyResult,
    check_study,
    commands_behind,
    finished_runs,
    format_asked,
    train_study,
)
from teach_once.train.cli.options import Logger, Retrain
from teach_once.train.cli.plan import RunRequest, print_plan
from teach_once.train.cli.student import train_single
from teach_once.train.errors import TrainError
from teach_once.train.recording.options import Recording
from teach_once.train.recording.tracking import check_trackers

FillCache = Annotated[
    bool,
    typer.Option(
        "--fill-cache",
        help="train at once: views that the cache lacks are computed in the loop and added to it",
    ),
]

app = new_app("Build whatever is missing first, then train.")


@app.command()
@can_be_quiet
@takes_option_groups
def cache_teacher(
    name: TeacherName,
    storage: CacheStorage,
    compute: Compute,
    teaching: TeacherOptions,
    overrides: Overrides = None,
    cluster: ClusterAddress = None,
) -> None:
    """Train a teacher's weights if they are missing, and fill its cache."""
    named = teachers_of(name, overrides, of_student=False)
    teachers = Teachers(named, storage, compute, teaching, cluster)
    run_stages(teachers.stages(new_console()), teaching)


@app.command()
@can_be_quiet
@takes_option_groups
def train_student(
    request: RunRequest,
    compute: Compute,
    teaching: TeacherOptions,
    retrain: Retrain = False,
    loggers: Logger = None,
    cluster: ClusterAddress = None,
    fill_cache: FillCache = False,
) -> None:
    """Print what is missing and what it costs, build it, and train one student."""
    console, recording = new_console(), Recording(loggers=loggers or ())
    check_trackers(recording.loggers)
    if fill_cache:
        _check_filling(request, teaching, cluster)
    teachers = _teachers_of_student(request, compute, teaching, cluster)
    if teaching.stage is None:
        print_plan(
            request,
            compute.device,
            console,
            has_trial=False,
            ranks=teaching.nproc,
            is_missing_only=True,
        )
    train = functools.partial(train_single, request, compute, recording, retrain=retrain)
    stages: Stages = {**teachers.stages(console), "student": train}
    if fill_cache:
        del stages["cache"]
        stages["student"] = lambda: train(fillers=teachers.open_fillers(console))
    run_stages(stages, teaching)


def _check_filling(request: RunRequest, teaching: TeacherOptions, cluster: str | None) -> None:
    """Raise TrainError if the training process cannot fill its caches."""
    excluded = {
        "--cache": request.storage.cache is not None,
        "--nproc": teaching.nproc > 1,
        "--cluster": cluster is not None,
        "--caches URL": not place_at(request.storage.caches).is_local,
    }
    if given := [option for option, is_given in excluded.items() if is_given]:
        raise TrainError(
            f"--fill-cache runs the teacher in one training process, into a local folder; it "
            f"excludes {', '.join(given)}",
            fix="omit --fill-cache: the cache is then filled before the training",
        )


@app.command()
@can_be_quiet
@takes_option_groups
def ablation(request: AblationRequest, teaching: TeacherOptions) -> None:
    """Build what is missing, train every method with every seed, and write the report."""
    console, cluster = new_console(), request.execution.cluster
    teachers = _teachers_of_student(request, request.compute, teaching, cluster)
    if teaching.stage is None:
        request.check()
        check_study(request, request.compute.device, console, is_shown_if_finished=False)
    run_stages(teachers.stages(console), teaching)
    if teaching.stage is None:
        result = train_study(request, console)
        try:
            if result.has_finished_runs:
                _write_report(request, result, console)
        finally:
            result.print_failures()
        if result.failures:
            raise typer.Exit(1)


def _teachers_of_student(
    request: RunRequest | StudyRequest,
    compute: Compute,
    teaching: TeacherOptions,
    cluster: str | None,
) -> Teachers:
    """Return the teachers in a student's file, or none if its cache is given."""
    is_given = request.storage.cache is not None
    named = [] if is_given else teachers_of(request.name, request.overrides)
    return Teachers(named, request.storage, compute, teaching, cluster)


def _write_report(request: StudyRequest, result: StudyResult, console: Console) -> None:
    """Write the report of the study's finished runs, with the commands that lead to it."""
    from teach_once.report.write import write_report  # loads the plotting library

    study = result.runs[0].study
    start = ["python", "-m", "teach_once"] if in_repository() else ["teach-once"]
    written = write_report(
        study.folder,
        [run.folder.name for run in finished_runs(study)],
        cache=study.cache.path,
        asked=format_asked(result.runs),
        commands=[shlex.join([*start, *sys.argv[1:]]), *commands_behind(study, request)],
    )
    print_written(written, study.folder, console)


cli = functools.partial(run_command, app)  # its arguments begin with the command's name
