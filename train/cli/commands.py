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

import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from teach_once.configs.load import load_teacher, teachers_of
from teach_once.runtime.command.frame import new_app, new_console, run_command
from teach_once.runtime.command.options import (
    MIRROR,
    MIRROR_GB,
    CacheOrUrl,
    CachesOrUrl,
    ClusterAddress,
    Device,
    MirrorFolder,
    MirrorSize,
    OfStudent,
    Overrides,
    StudentName,
    TeacherName,
    Workers,
)
from teach_once.runtime.command.program import portable_program, program_text
from teach_once.runtime.command.ray import Cluster
from teach_once.runtime.machine.resources import num_ranks
from teach_once.store.read.mirror import choose_mirror, local_caches, local_folder
from teach_once.train.cli.exports import export, list_runs, verify
from teach_once.train.cli.options import (
    CheckpointMinutes,
    CompleteCaches,
    CpusPerRun,
    FeedOption,
    GpusPerRun,
    Jobs,
    LiveBatchNorm,
    LiveTeacher,
    Method,
    Methods,
    RanksOption,
    Redo,
    Runs,
    Seed,
    Seeds,
    ShareReading,
    Track,
    TrainTeacher,
    console_of,
    joined,
    train_single,
)
from teach_once.train.cli.plan import (
    ALL_FINISHED,
    check_runs,
    open_configs,
    open_named_study,
    parse_seeds,
    plan_lines,
    slow_precision,
)
from teach_once.train.errors import TrainError
from teach_once.train.recording.tracking import check_trackers
from teach_once.train.runs.retrain import begin_again
from teach_once.train.runs.study import Run
from teach_once.train.sessions.missing_weights import train_missing_weights
from teach_once.train.studies.ablation import commands_behind, train_and_report

app = new_app("Train students from a cache; train teachers; look at runs.")


@app.command()
def student(
    name: StudentName,
    overrides: Overrides = None,
    method: Method = "cd+gkd+edt",
    seed: Seed = 0,
    live_teacher: LiveTeacher = False,
    live_bn: LiveBatchNorm = False,
    redo: Redo = False,
    caches: CachesOrUrl = Path("caches"),
    mirror: MirrorFolder = MIRROR,
    mirror_gb: MirrorSize = MIRROR_GB,
    runs: Runs = Path("runs"),
    cache: CacheOrUrl = None,
    device: Device = "auto",
    workers: Workers = None,
    feed: FeedOption = "auto",
    checkpoint_minutes: CheckpointMinutes = 10.0,
    track: Track = None,
) -> None:
    """Train one student from the cache; under runtime.launch or torchrun, in several processes.

    Whoever reaches the port of torchrun's c10d rendezvous can run programs as you: open it to the
    machines of the job only. runtime.launch, for one machine, opens none that others reach.
    """
    check_trackers(track or ())

    def opened() -> Run:
        local = local_caches(caches, cache, mirror, mirror_gb)
        study = open_named_study(name, overrides, *local, runs, feed)
        return study.run(method, seed, live_teacher, live_bn)

    train_single(
        opened,
        redo=redo,
        device=device,
        num_workers=workers,
        checkpoint_minutes=checkpoint_minutes,
        track=track or (),
    )


@app.command()
def teacher(
    name: TeacherName,
    overrides: Overrides = None,
    of_student: OfStudent = False,
    retrain: Annotated[bool, typer.Option(help="train again, replacing the weights")] = False,
    agreed: TrainTeacher = False,
    caches: CompleteCaches = None,
    mirror: MirrorFolder = MIRROR,
    mirror_gb: MirrorSize = MIRROR_GB,
    device: Device = "auto",
    workers: Workers = None,
    track: Track = None,
) -> None:
    """Train a teacher's weights as its config's training block says, unless they exist."""
    check_trackers(track or ())
    with joined(device) as ranks:
        choose_mirror(mirror, mirror_gb)
        folder = caches and local_folder(caches, mirror, mirror_gb)
        for teacher_name, changes in teachers_of(name, overrides, of_student=of_student):
            train_missing_weights(
                load_teacher(teacher_name, changes),
                folder,
                retrain=retrain,
                agreed=agreed,
                device=device,
                num_workers=workers,
                track=track or (),
                console=console_of(ranks),
                ranks=ranks,
            )


@app.command()
def ablation(
    name: StudentName,
    overrides: Overrides = None,
    seeds: Seeds = "0 1 2",
    methods: Methods = "",
    caches: CachesOrUrl = Path("caches"),
    mirror: MirrorFolder = MIRROR,
    mirror_gb: MirrorSize = MIRROR_GB,
    runs: Runs = Path("runs"),
    cache: CacheOrUrl = None,
    device: Device = "auto",
    workers: Workers = None,
    feed: FeedOption = "auto",
    jobs: Jobs = 1,
    share: ShareReading = None,
    cluster: ClusterAddress = None,
    cpus_per_run: CpusPerRun = 1,
    gpus_per_run: GpusPerRun = None,
    redo: Redo = False,
    track: Track = None,
) -> None:
    """Train every method with every seed, then write the report."""
    if num_ranks() > 1:
        raise TrainError(
            "several processes train one student: each of these would train the whole study",
            fix=f"{program_text('train')} ablation, with --jobs; or `train student` in its place",
        )
    if cluster and (jobs > 1 or share):
        raise TrainError("on a cluster each run is a task: --jobs and --share are for one machine")
    check_trackers(track or ())
    console = new_console()
    local = local_caches(caches, cache, mirror, mirror_gb)
    study = open_named_study(name, overrides, *local, runs, feed)
    asked_methods = methods.split() or list(study.config.methods)
    asked_seeds = parse_seeds(seeds)
    asked_runs = [study.run(method, seed) for method in asked_methods for seed in asked_seeds]
    if redo:
        begin_again(asked_runs, device)
    commands = [
        shlex.join([*portable_program("train"), *sys.argv[1:]]),
        *commands_behind(study, name, overrides or [], caches),
    ]
    connection = None
    if cluster and not all(run.is_finished for run in asked_runs):
        connection = Cluster(cluster, console, cpus=cpus_per_run, gpus=gpus_per_run)
    with connection or nullcontext():
        status = train_and_report(
            asked_runs,
            commands,
            device=device,
            num_workers=workers,
            jobs=jobs,
            share=share,
            cluster=connection,
            console=console,
            track=track or (),
        )
    if status:
        raise typer.Exit(status)


@app.command()
def check(
    name: StudentName,
    overrides: Overrides = None,
    methods: Methods = "",
    seeds: Seeds = "0",
    caches: CachesOrUrl = Path("caches"),
    cache: CacheOrUrl = None,
    mirror: MirrorFolder = MIRROR,
    mirror_gb: MirrorSize = MIRROR_GB,
    runs: Runs = Path("runs"),
    device: Device = "auto",
    workers: Workers = None,
    feed: FeedOption = "auto",
    jobs: Jobs = 1,
) -> None:
    """Find every mistake that can be found before the teacher runs; write nothing."""
    asked_seeds = parse_seeds(seeds)
    config, teacher_config = open_configs(name, overrides)
    folder, path = local_caches(caches, cache, mirror, mirror_gb)
    asked_methods = methods.split() or list(config.methods)
    found = check_runs(
        config,
        teacher_config,
        asked_methods,
        asked_seeds,
        caches_dir=folder,
        runs_dir=runs,
        cache_path=path,
        device=device,
    )
    console = new_console()
    if found != ALL_FINISHED and (hint := slow_precision(config, teacher_config, folder, device)):
        console.print(hint)
    which = f"{', '.join(asked_methods)} with seed {' '.join(map(str, asked_seeds))}"
    console.print(f"{config.name}: no mistake in {which}: {found}")


@app.command()
def plan(
    name: StudentName,
    overrides: Overrides = None,
    method: Method = "cd+gkd+edt",
    seed: Seed = 0,
    caches: CachesOrUrl = Path("caches"),
    mirror: MirrorFolder = MIRROR,
    mirror_gb: MirrorSize = MIRROR_GB,
    runs: Runs = Path("runs"),
    cache: CacheOrUrl = None,
    ranks: RanksOption = 1,
    trial: Annotated[bool, typer.Option(help="take a few steps to measure time and memory")] = True,
    device: Device = "auto",
    workers: Workers = None,
    feed: FeedOption = "auto",
) -> None:
    """Print what exists, what is missing and what that costs; write nothing."""
    config, teacher_config = open_configs(name, overrides)
    folder, path = local_caches(caches, cache, mirror, mirror_gb)
    check_runs(
        config,
        teacher_config,
        [method],
        [seed],
        caches_dir=folder,
        runs_dir=runs,
        cache_path=path,
        device=device,
        ranks=ranks,
    )
    lines = plan_lines(
        config,
        teacher_config,
        method,
        seed,
        caches_dir=folder,
        runs_dir=runs,
        cache_path=path,
        device=device if trial else None,
        ranks=ranks,
    )
    new_console().print("\n".join(lines))


app.command()(export)
app.command()(verify)
app.command("runs")(list_runs)


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(app, arguments)
