"""python -m train student NAME|PATH --method M [--seed S] [--live-teacher] [key=value ...]

python -m train teacher NAME|PATH [--retrain] [key=value ...]
python -m train ablation NAME|PATH [--seeds "0 1 2"] [--methods "ce kd"] [key=value ...]
python -m train check NAME|PATH [--methods "ce kd"] [key=value ...]
python -m train export NAME|PATH FOLDER [--method M] [--seed S] [--which best] [key=value ...]
python -m train plan NAME|PATH [--method M] [--seed S] [--no-trial] [key=value ...]
python -m train runs [STUDENT] [--remove [--yes]]

Overrides that begin with `teacher.` change the teacher's file: teacher.dataset.limit=200.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from configs.commands import cache_command, teacher_command
from configs.load import (
    load_student,
    load_teacher,
    refuse_missing_data,
    split_overrides,
)
from configs.paths import no_weights
from configs.schema import StudentConfig, TeacherConfig
from nets.weights_file import is_downloadable, weights_file
from runtime.commands import new_app, new_console, run_command
from store.errors import CacheError
from train.plan import plan_lines
from train.reporting import write_report
from train.runs import format_result
from train.study import (
    MOST_SEED,
    Feed,
    Run,
    Study,
    TrainError,
    cache_in_place_of_weights,
    open_study,
)
from train.teacher import existing_weights, training_folder
from views.datasets import load_dataset

app = new_app("Stage 2.")

Name = Annotated[str, typer.Argument(help="configs/student/NAME.yaml, or a path to a YAML file")]
TeacherName = Annotated[str, typer.Argument(help="configs/teacher/NAME.yaml, or a path")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")]
Method = Annotated[str, typer.Option(help="one of the config's methods")]
Seed = Annotated[
    int, typer.Option(min=0, max=MOST_SEED, help="initial weights and order of the samples")
]
Caches = Annotated[Path, typer.Option(help="folder of the caches")]
Runs = Annotated[Path, typer.Option(help="folder of the runs")]
CachePath = Annotated[Path | None, typer.Option(help="use this cache, wherever it lies")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
Workers = Annotated[int | None, typer.Option(min=0, help="processes that read images")]
Minutes = Annotated[float, typer.Option(min=0, help="between checkpoints within an epoch")]
FeedOption = Annotated[
    Literal["auto", "device", "host", "window"],
    typer.Option(help="where a view's teacher outputs are held while its epoch runs"),
]
Seeds = Annotated[str, typer.Option(help='seeds, as in "0 1 2"')]
Jobs = Annotated[int, typer.Option(min=1, help="runs trained side by side")]
Trial = Annotated[bool, typer.Option(help="take a few steps, for time and memory")]
Redo = Annotated[bool, typer.Option(help="train again, replacing the runs asked for")]
LiveTeacher = Annotated[
    bool, typer.Option(help="run the teacher in the loop instead of reading the cache")
]


_HOURS_TO_AGREE_TO = 1 / 6  # a longer training of a teacher asks for --train-teacher


@app.command()
def student(
    name: Name,
    overrides: Overrides = None,
    method: Method = "cd+gkd+edt",
    seed: Seed = 0,
    live_teacher: LiveTeacher = False,
    redo: Redo = False,
    caches: Caches = Path("caches"),
    runs: Runs = Path("runs"),
    cache: CachePath = None,
    device: Device = "auto",
    workers: Workers = None,
    feed: FeedOption = "auto",
    checkpoint_minutes: Minutes = 10.0,
) -> None:
    """Train one student from the cache."""
    console = _console()
    study = _open(name, overrides, caches, runs, cache, feed)
    run = study.run(method, seed, live_teacher)
    if redo:
        _forget([run], device)
    if (summary := run.summary) is not None:
        console.print(f"{run.folder} is finished: nothing to do.")
    else:
        from train.student import train_student

        if changes := run.changes():
            console.print("\n  ".join([f"differs from the last run of {run}:", *changes]))
        console.print(f"{run}, from {study.cache.path} into {run.folder}")
        summary = train_student(
            run,
            device=device,
            num_workers=workers,
            checkpoint_minutes=checkpoint_minutes,
            console=console,
        )
    console.print(format_result(summary, run.folder))


@app.command()
def teacher(
    name: TeacherName,
    overrides: Overrides = None,
    retrain: Annotated[bool, typer.Option(help="train again, replacing the weights")] = False,
    agreed: Annotated[
        bool, typer.Option("--train-teacher", help="also if it takes more than ten minutes")
    ] = False,
    caches: Annotated[
        Path | None, typer.Option(help="train nothing that a complete cache here makes needless")
    ] = None,
    device: Device = "auto",
    workers: Workers = None,
) -> None:
    """Train a teacher's weights from its config's training block, where there are none."""
    console = _console()
    config = load_teacher(name, overrides or [])
    refuse_missing_data(config)
    weights = weights_file(config.teacher.weights)
    if not retrain and (why := _no_training_needed(config, caches)):
        console.print(why)
        return
    if is_downloadable(config.teacher.weights):
        raise TrainError(
            f"teacher.weights: {config.teacher.weights} is not trained here\n  fix: set "
            f"teacher.weights=PATH"
        )
    if config.training is None:
        raise TrainError(
            f"{no_weights(config, weights)}, and {config.name} has no training block "
            f"to make it\n  fix: put the file there, or set teacher.weights=PATH"
        )
    from train.check import check_teacher
    from train.teacher import train_teacher

    check_teacher(config, load_dataset(config.dataset))
    record = train_teacher(
        config,
        device=device,
        console=console,
        num_workers=workers,
        retrain=retrain,
        limit_hours=math.inf if retrain or agreed else _HOURS_TO_AGREE_TO,
    )
    last = record["last"]
    top5 = f", {last['top5_error']:.2f} % top-5" if record["num_classes"] > 5 else ""
    console.print(
        f"{weights}: test error {last['top1_error']:.2f} % top-1{top5}, {record['seconds']:.0f} s "
        f"(metrics in {training_folder(weights)})"
    )


def _no_training_needed(config: TeacherConfig, caches: Path | None) -> str:
    """Why there is nothing to train, to be printed; empty if there is."""
    weights = config.teacher.weights
    if (found := existing_weights(config)) is not None:
        last = found.summary.get("last")
        error = f": test error {last['top1_error']:.2f} % top-1" if last else ""
        there = f"{weights_file(weights)} is there{error}: nothing to do."
        return "\n  ".join([there, *found.notes])
    if caches is not None and (cache := cache_in_place_of_weights(config, caches)) is not None:
        return (
            f"{weights} is not there, and not needed: {cache.path} is complete. To train it all "
            f"the same: {teacher_command(config)}"
        )
    return f"{weights} is downloaded when it is needed." if is_downloadable(weights) else ""


@app.command()
def ablation(
    name: Name,
    overrides: Overrides = None,
    seeds: Seeds = "0 1 2",
    methods: Annotated[str, typer.Option(help="methods; default: all of the config")] = "",
    caches: Caches = Path("caches"),
    runs: Runs = Path("runs"),
    cache: CachePath = None,
    device: Device = "auto",
    workers: Workers = None,
    feed: FeedOption = "auto",
    jobs: Jobs = 1,
    redo: Redo = False,
) -> None:
    """Train every method with every seed, then write the report."""
    console = _console()
    study = _open(name, overrides, caches, runs, cache, feed)
    wanted = methods.split() or list(study.config.methods)
    numbers = _parsed_seeds(seeds)
    all_runs = [study.run(method, seed) for method in wanted for seed in numbers]
    if redo:
        _forget(all_runs, device)
    failures: dict[Run, str] = {}
    if all(run.is_finished for run in all_runs):
        console.print(f"all {len(all_runs)} runs are finished: nothing to train.")
    else:
        from train.ablation import run_ablation

        failures = run_ablation(
            all_runs, device=device, num_workers=workers, jobs=jobs, console=console
        )
    status = 0
    if len(failures) < len(all_runs):
        commands = [
            shlex.join(["python", "-m", "train", *sys.argv[1:]]),
            _command_of_one_run(name, overrides or [], caches, runs),
            cache_command(study.teacher, caches_dir=caches),
        ]
        asked = f"{' '.join(wanted)}; seeds {' '.join(map(str, numbers))}"
        status = write_report(study, asked, commands, console)
    for run, failure in failures.items():
        print(f"{run} failed: {failure}", file=sys.stderr)
    if failures or status:
        raise typer.Exit(status or 1)


def _command_of_one_run(name: str, overrides: list[str], caches: Path, runs: Path) -> str:
    """With METHOD and SEED to be filled in."""
    start = ["python", "-m", "train", "student", name, "--method", "METHOD", "--seed", "SEED"]
    return shlex.join([*start, "--caches", str(caches), "--runs", str(runs), *overrides])


@app.command()
def export(
    name: Name,
    folder: Annotated[Path, typer.Argument(help="where the files go")],
    overrides: Overrides = None,
    method: Method = "cd+gkd+edt",
    seed: Seed = 0,
    which: Annotated[Literal["best", "last"], typer.Option(help="of the run's epochs")] = "best",
    caches: Caches = Path("caches"),
    runs: Runs = Path("runs"),
    cache: CachePath = None,
    device: Device = "auto",
) -> None:
    """Write a finished student as a plain state dict and as a torch.export program."""
    study = _open(name, overrides, caches, runs, cache, "auto")
    run = study.run(method, seed)
    from train.export import export_student

    card = export_student(run, which, folder, device=device)
    _console().print(
        f"{folder}/student.pt, .pt2 and .json: {card['model']}, epoch {card['epoch']}; loaded "
        f"again, top-1 error {card['top1_error']:.2f} %, as program "
        f"{card['program_top1_error']:.2f} %"
    )


@app.command()
def check(
    name: Name,
    overrides: Overrides = None,
    methods: Annotated[str, typer.Option(help="methods; default: all of the config")] = "",
    seeds: Seeds = "0",
    caches: Caches = Path("caches"),
    cache: CachePath = None,
    runs: Runs = Path("runs"),
    device: Device = "auto",
    workers: Workers = None,
    feed: FeedOption = "auto",
    jobs: Jobs = 1,
) -> None:
    """Find every mistake that can be found before the teacher runs; do nothing."""
    numbers = _parsed_seeds(seeds)
    config, teacher_config = _configs(name, overrides)
    wanted = methods.split() or list(config.methods)
    pairs = [(method, number) for method in wanted for number in numbers]
    _check(config, teacher_config, pairs, caches, runs, device, cache)


@app.command()
def plan(
    name: Name,
    overrides: Overrides = None,
    method: Method = "cd+gkd+edt",
    seed: Seed = 0,
    caches: Caches = Path("caches"),
    runs: Runs = Path("runs"),
    cache: CachePath = None,
    trial: Trial = True,
    device: Device = "auto",
    workers: Workers = None,
    feed: FeedOption = "auto",
) -> None:
    """Say what is there, what is missing and what that costs; write nothing."""
    config, teacher_config = _configs(name, overrides)
    _check(config, teacher_config, [(method, seed)], caches, runs, device, cache)
    lines = plan_lines(
        config,
        teacher_config,
        method,
        seed,
        caches_dir=caches,
        runs_dir=runs,
        cache_path=cache,
        device=device if trial else None,
    )
    _console().print("\n".join(lines))


def _check(
    config: StudentConfig,
    teacher: TeacherConfig,
    runs: list[tuple[str, int]],
    caches_dir: Path,
    runs_dir: Path,
    device: str,
    cache_path: Path | None,
) -> None:
    """Raise what is wrong with these runs; without torch where all of them are finished."""
    methods = list(dict.fromkeys(method for method, _ in runs))
    for method in methods:
        _check_method(config, method)
    try:
        study = open_study(
            config, teacher, caches_dir=caches_dir, runs_dir=runs_dir, cache_path=cache_path
        )
    except CacheError:
        study = None  # there is none yet: what the teacher's file says counts
    if study is not None and all(study.run(*run).is_finished for run in runs):
        return
    from runtime.devices import check_device
    from train.check import check_study
    from train.needs import missing_taps

    check_device(device)
    taps, stages = ([], []) if study is None else (study.cache.taps, study.teacher_stages)
    if study is None or missing_taps(config, methods, list(stages), taps):
        check_study(config, teacher, methods, caches_dir)


@app.command("runs")
def list_runs(
    name: Annotated[str | None, typer.Argument(help="of one student; default: of all")] = None,
    runs: Runs = Path("runs"),
    remove: Annotated[
        bool, typer.Option("--remove", help="delete unfinished and superseded ones, after asking")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="delete without asking")] = False,
) -> None:
    """List runs: state, error, size, age, and what differs between those of one method."""
    from train.runs import removable, remove_run, runs_below, table_of

    student_name = Path(name).stem if name and name.endswith((".yaml", ".yml")) else name
    found = runs_below(runs, student_name)
    if not found:
        print(f"{runs / (student_name or '')} holds no run")
        return
    if not remove:
        print(table_of(found, time.time()))
        return
    surplus = removable(found)
    print("".join(f"{folder}: {why}\n" for folder, why in surplus.items()), end="")
    size = sum(run.num_bytes for run in found if run.folder in surplus) / 1e6
    question = f"delete these {len(surplus)} of {len(found)} runs, {size:,.1f} MB?"
    if not surplus or not (yes or typer.confirm(question)):
        print("nothing deleted")
        return
    for folder in surplus:
        remove_run(folder)
    print(f"deleted {len(surplus)} of {len(found)} runs, {size:,.1f} MB")


def _forget(runs: list[Run], device: str) -> None:
    """Delete runs that are to be trained again, after checking that they can be."""
    from runtime.devices import check_device
    from train.runs import remove_run
    from train.student import check_methods

    check_methods(runs[0].study, [run.method for run in runs])
    check_device(device)
    for run in runs:
        if run.folder.is_dir():
            remove_run(run.folder)


def _console() -> Console:
    return new_console()


def _configs(name: str, overrides: list[str] | None) -> tuple[StudentConfig, TeacherConfig]:
    own, teachers = split_overrides(overrides or [])
    config = load_student(name, own)
    teacher_config = load_teacher(config.teacher, teachers)
    refuse_missing_data(teacher_config)
    return config, teacher_config


def _open(
    name: str,
    overrides: list[str] | None,
    caches: Path,
    runs: Path,
    cache: Path | None,
    feed: Feed,
) -> Study:
    config, teacher_config = _configs(name, overrides)
    return open_study(
        config, teacher_config, caches_dir=caches, runs_dir=runs, cache_path=cache, feed=feed
    )


def _check_method(config: StudentConfig, method: str) -> None:
    if method not in config.methods:
        raise TrainError(
            f"unknown method {method!r}: {config.name} has {', '.join(config.methods)}"
        )


def _parsed_seeds(text: str) -> list[int]:
    """Different whole numbers of at most 64 bits."""
    words = text.split()
    if not words or not all(re.fullmatch("[0-9]{1,20}", word) for word in words):
        raise TrainError(f'--seeds {text!r}: expected whole numbers, as in "0 1 2"')
    numbers = list(dict.fromkeys(int(word) for word in words))
    if max(numbers) > MOST_SEED:
        raise TrainError(f"--seeds: {max(numbers)} is too large; the largest is {MOST_SEED}")
    return numbers


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line; a mistake of the user's is one message and exit status 2."""
    return run_command(app, arguments)


if __name__ == "__main__":
    sys.exit(cli())
