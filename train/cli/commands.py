"""python -m train student NAME|PATH --method M [--seed S] [--live-teacher] [key=value ...]

python -m train teacher NAME|PATH [--retrain] [key=value ...]
python -m train ablation NAME|PATH [--seeds "0 1 2"] [--methods "ce kd"] [key=value ...]
python -m train check NAME|PATH [--methods "ce kd"] [key=value ...]
python -m train export NAME|PATH FOLDER [--method M] [--seed S] [--checkpoint best] [key=value ...]
python -m train verify FOLDER
python -m train plan NAME|PATH [--method M] [--seed S] [--no-trial] [key=value ...]
python -m train runs [STUDENT] [--remove [--yes]]

Overrides that begin with `teacher.` change the teacher's file: teacher.dataset.max_per_class=200.
"""

from __future__ import annotations

import functools
from typing import Annotated

import typer

from teach_once.configs.load import load_teacher, teachers_of
from teach_once.runtime.command.frame import new_app, new_console, run_command
from teach_once.runtime.command.options import (
    MIRROR,
    MIRROR_GB,
    Compute,
    Device,
    MirrorFolder,
    MirrorSize,
    OfStudent,
    Overrides,
    TeacherName,
    can_be_quiet,
    takes_option_groups,
)
from teach_once.store.read.mirror import choose_mirror, local_folder
from teach_once.train.cli.ablation import (
    AblationRequest,
    StudyRequest,
    check_study,
    report_command,
    results_table,
    train_study,
)
from teach_once.train.cli.exports import export, list_runs, verify
from teach_once.train.cli.options import (
    CheckpointMinutes,
    CompleteCaches,
    Logger,
    RanksOption,
    Retrain,
    TrainTeacher,
)
from teach_once.train.cli.plan import LiveRunRequest, RunRequest, print_plan
from teach_once.train.cli.student import console_of, joined, train_single
from teach_once.train.recording.options import Recording
from teach_once.train.recording.tracking import check_trackers
from teach_once.train.sessions.missing_weights import train_missing_weights

app = new_app("Train students and teachers, and manage runs.")


@app.command()
@can_be_quiet
@takes_option_groups
def student(
    request: LiveRunRequest,
    compute: Compute,
    retrain: Retrain = False,
    checkpoint_minutes: CheckpointMinutes = 10.0,
    loggers: Logger = None,
) -> None:
    """Train one student from the cache; under runtime.launch or torchrun, in several processes.

    Anyone who can reach the port of torchrun's c10d rendezvous can run programs as you: open it
    only to machines of the job. runtime.launch, for one machine, opens no port to other machines.
    """
    train_single(request, compute, Recording(checkpoint_minutes, loggers or ()), retrain=retrain)


@app.command()
@can_be_quiet
@takes_option_groups
def teacher(
    name: TeacherName,
    compute: Compute,
    overrides: Overrides = None,
    of_student: OfStudent = False,
    retrain: Annotated[bool, typer.Option(help="train again, replacing the weights")] = False,
    agreed: TrainTeacher = False,
    caches: CompleteCaches = None,
    mirror: MirrorFolder = MIRROR,
    mirror_gb: MirrorSize = MIRROR_GB,
    loggers: Logger = None,
) -> None:
    """Train a teacher's weights with the training block of its config, unless they exist."""
    check_trackers(loggers or ())
    with joined(compute.device) as ranks:
        choose_mirror(mirror, mirror_gb)
        folder = caches and local_folder(caches, mirror, mirror_gb)
        recording = Recording(loggers=loggers or (), console=console_of(ranks))
        for teacher_name, changes in teachers_of(name, overrides, of_student=of_student):
            config = load_teacher(teacher_name, changes)
            train_missing_weights(
                config, folder, compute, recording, retrain=retrain, agreed=agreed, ranks=ranks
            )


@app.command()
@can_be_quiet
@takes_option_groups
def ablation(request: AblationRequest) -> None:
    """Train every method with every seed, and print their errors and the report's command."""
    console = new_console()
    result = train_study(request, console)
    if result.has_finished_runs:
        console.print(results_table(result.runs))
        console.print(f"report: {report_command(result.runs)}")
    result.print_failures()
    if result.failures:
        raise typer.Exit(1)


@app.command()
@takes_option_groups
def check(request: StudyRequest, device: Device = "auto") -> None:
    """Check methods and seeds for mistakes before the teacher runs; writes nothing."""
    check_study(request, device, new_console())


@app.command()
@takes_option_groups
def plan(
    request: RunRequest,
    ranks: RanksOption = 1,
    trial: Annotated[bool, typer.Option(help="take a few steps to measure time and memory")] = True,
    device: Device = "auto",
) -> None:
    """Print the existing and missing stages of a run with their cost; writes nothing."""
    print_plan(request, device, new_console(), has_trial=trial, ranks=ranks)


app.command()(export)
app.command()(verify)
app.command("runs")(list_runs)


cli = functools.partial(run_command, app)  # runs a command line and returns its exit status
