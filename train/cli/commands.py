"""python -m train student NAME|PATH --method M [--seed S] [--live-teacher] [key=value ...]

python -m train teacher NAME|PATH [--retrain] [key=value ...]
python -m train ablation NAME|PATH [--seeds "0 1 2"] [--methods "ce kd"] [key=value ...]
python -m train check NAME|PATH [--methods "ce kd"] [key=value ...]
python -m train export NAME|PATH FOLDER [--method M] [--seed S] [--which best] [key=value ...]
python -m train verify FOLDER
python -m train plan NAME|PATH [--method M] [--seed S] [--no-trial] [key=value ...]
python -m train runs [STUDENT] [--remove [--yes]]

Overrides that begin with `teacher.` change the teacher's file: teacher.dataset.limit=200.
"""

from __future__ import annotations

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
    StudentName,
    TeacherName,
    takes_option_groups,
)
from teach_once.store.read.mirror import choose_mirror, local_folder
from teach_once.train.cli.ablation import (
    Execution,
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
    FeedOption,
    LiveBatchNorm,
    LiveTeacher,
    Method,
    Methods,
    RanksOption,
    Redo,
    Seed,
    Seeds,
    StudyStorage,
    Track,
    TrainTeacher,
    console_of,
    joined,
    train_single,
)
from teach_once.train.cli.plan import StudentRequest, print_plan
from teach_once.train.recording.tracking import check_trackers
from teach_once.train.sessions.missing_weights import train_missing_weights

app = new_app("Train students from a cache; train teachers; look at runs.")


@app.command()
@takes_option_groups
def student(
    name: StudentName,
    overrides: Overrides = None,
    method: Method = "cd+gkd+edt",
    seed: Seed = 0,
    live_teacher: LiveTeacher = False,
    live_bn: LiveBatchNorm = False,
    redo: Redo = False,
    storage: StudyStorage = StudyStorage(),
    compute: Compute = Compute(),
    feed: FeedOption = "auto",
    checkpoint_minutes: CheckpointMinutes = 10.0,
    track: Track = None,
) -> None:
    """Train one student from the cache; under runtime.launch or torchrun, in several processes.

    Whoever reaches the port of torchrun's c10d rendezvous can run programs as you: open it to the
    machines of the job only. runtime.launch, for one machine, opens none that others reach.
    """
    check_trackers(track or ())

    request = StudentRequest(name, overrides, method, seed, storage, feed)
    train_single(
        lambda: request.open_run(live_teacher, live_bn),
        compute,
        redo=redo,
        checkpoint_minutes=checkpoint_minutes,
        track=track or (),
    )


@app.command()
@takes_option_groups
def teacher(
    name: TeacherName,
    overrides: Overrides = None,
    of_student: OfStudent = False,
    retrain: Annotated[bool, typer.Option(help="train again, replacing the weights")] = False,
    agreed: TrainTeacher = False,
    caches: CompleteCaches = None,
    mirror: MirrorFolder = MIRROR,
    mirror_gb: MirrorSize = MIRROR_GB,
    compute: Compute = Compute(),
    track: Track = None,
) -> None:
    """Train a teacher's weights as its config's training block says, unless they exist."""
    check_trackers(track or ())
    with joined(compute.device) as ranks:
        choose_mirror(mirror, mirror_gb)
        folder = caches and local_folder(caches, mirror, mirror_gb)
        for teacher_name, changes in teachers_of(name, overrides, of_student=of_student):
            train_missing_weights(
                load_teacher(teacher_name, changes),
                folder,
                retrain=retrain,
                agreed=agreed,
                device=compute.device,
                num_workers=compute.workers,
                track=track or (),
                console=console_of(ranks),
                ranks=ranks,
            )


@app.command()
@takes_option_groups
def ablation(
    name: StudentName,
    overrides: Overrides = None,
    seeds: Seeds = "0 1 2",
    methods: Methods = "",
    storage: StudyStorage = StudyStorage(),
    compute: Compute = Compute(),
    feed: FeedOption = "auto",
    execution: Execution = Execution(),
    redo: Redo = False,
    track: Track = None,
) -> None:
    """Train every method with every seed, and print their errors and the report's command."""
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
def check(
    name: StudentName,
    overrides: Overrides = None,
    methods: Methods = "",
    seeds: Seeds = "0",
    storage: StudyStorage = StudyStorage(),
    device: Device = "auto",
    feed: FeedOption = "auto",
) -> None:
    """Find every mistake that can be found before the teacher runs; write nothing."""
    compute = Compute(device)
    request = StudyRequest(name, overrides or (), methods, seeds, storage, compute, feed)
    check_study(request, new_console())


@app.command()
@takes_option_groups
def plan(
    name: StudentName,
    overrides: Overrides = None,
    method: Method = "cd+gkd+edt",
    seed: Seed = 0,
    storage: StudyStorage = StudyStorage(),
    ranks: RanksOption = 1,
    trial: Annotated[bool, typer.Option(help="take a few steps to measure time and memory")] = True,
    device: Device = "auto",
    feed: FeedOption = "auto",
) -> None:
    """Print what exists, what is missing and what that costs; write nothing."""
    request = StudentRequest(name, overrides, method, seed, storage, feed)
    print_plan(request, device, new_console(), has_trial=trial, ranks=ranks)


app.command()(export)
app.command()(verify)
app.command("runs")(list_runs)


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(app, arguments)
