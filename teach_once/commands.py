"""teach-once cache-teacher NAME | train-student NAME | ablation NAME: from nothing to a result.

Each builds whatever is missing first, in the order of teacher weights, cache, student, report, and
leaves alone what is there. They are `make cache-teacher`, `make train-student`, `make ablation`.
"""

from __future__ import annotations

import shlex
import sys

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
    StudentName,
    TeacherName,
    takes_option_groups,
)
from teach_once.runtime.command.program import in_repository
from teach_once.stages import TeacherOptions, Teachers, run_stages
from teach_once.train.cli.ablation import (
    Execution,
    StudyRequest,
    StudyResult,
    check_study,
    commands_behind,
    finished_runs,
    format_asked,
    train_study,
)
from teach_once.train.cli.options import (
    FeedOption,
    Method,
    Methods,
    Redo,
    Seed,
    Seeds,
    StudyStorage,
    Track,
    train_single,
)
from teach_once.train.cli.plan import StudentRequest, print_plan
from teach_once.train.recording.tracking import check_trackers

app = new_app("Build whatever is missing, in order, and train from it.")


@app.command()
@takes_option_groups
def cache_teacher(
    name: TeacherName,
    overrides: Overrides = None,
    storage: CacheStorage = CacheStorage(),
    compute: Compute = Compute(),
    teaching: TeacherOptions = TeacherOptions(),
    cluster: ClusterAddress = None,
) -> None:
    """Train a teacher's weights if they are missing, and fill its cache."""
    named = teachers_of(name, overrides, of_student=False)
    teachers = Teachers(named, storage, compute, teaching, cluster)
    run_stages(teachers.stages(new_console()), teaching)


@app.command()
@takes_option_groups
def train_student(
    name: StudentName,
    overrides: Overrides = None,
    method: Method = "cd+gkd+edt",
    seed: Seed = 0,
    redo: Redo = False,
    storage: StudyStorage = StudyStorage(),
    compute: Compute = Compute(),
    feed: FeedOption = "auto",
    track: Track = None,
    teaching: TeacherOptions = TeacherOptions(),
    cluster: ClusterAddress = None,
) -> None:
    """Print what is missing and what it costs, build it, and train one student."""
    check_trackers(track or ())
    console, request = new_console(), StudentRequest(name, overrides, method, seed, storage, feed)
    teachers = _teachers_of_student(name, overrides, storage, compute, teaching, cluster)
    if teaching.stage is None:
        print_plan(request, compute.device, console, has_trial=False, ranks=teaching.nproc)

    def train() -> None:
        train_single(request.open_run, compute, redo=redo, track=track or ())

    run_stages({**teachers.stages(console), "student": train}, teaching)


@app.command()
@takes_option_groups
def ablation(
    name: StudentName,
    overrides: Overrides = None,
    methods: Methods = "",
    seeds: Seeds = "0 1 2",
    redo: Redo = False,
    storage: StudyStorage = StudyStorage(),
    compute: Compute = Compute(),
    feed: FeedOption = "auto",
    track: Track = None,
    execution: Execution = Execution(),
    teaching: TeacherOptions = TeacherOptions(),
) -> None:
    """Build what is missing, train every method with every seed, and write the report."""
    console = new_console()
    request = StudyRequest(
        name,
        overrides or (),
        methods,
        seeds,
        storage,
        compute,
        feed,
        execution,
        redo,
        track or (),
    )
    teachers = _teachers_of_student(name, overrides, storage, compute, teaching, execution.cluster)
    if teaching.stage is None:
        request.check()
        check_study(request, console)
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
    name: str,
    overrides: list[str] | None,
    storage: StudyStorage,
    compute: Compute,
    teaching: TeacherOptions,
    cluster: str | None,
) -> Teachers:
    """The teachers that a student's file names; none of them if its cache is given."""
    named = teachers_of(name, overrides) if storage.cache is None else []
    return Teachers(named, storage, compute, teaching, cluster)


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


def cli(arguments: list[str]) -> int:
    """Run a command line, which begins with the command's name, and return its exit status."""
    return run_command(app, arguments)
