"""Commands for trained students: export a student, verify an export, list runs.

`train.cli.commands` registers them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from teach_once.runtime.command.frame import new_console
from teach_once.runtime.command.options import (
    Device,
    Overrides,
    StudentName,
    takes_option_groups,
)
from teach_once.runtime.metrics import format_deciding, format_values
from teach_once.train.cli.options import (
    Checkpoint,
    Method,
    RemoveRuns,
    Runs,
    Seed,
    StudyStorage,
    Superseded,
)
from teach_once.train.cli.plan import open_named_study
from teach_once.train.errors import TrainError
from teach_once.train.runs.folder import offer_removal, runs_below, table_of
from teach_once.train.runs.study import trained_by_any_number


@takes_option_groups
def export(
    name: StudentName,
    folder: Annotated[Path, typer.Argument(help="folder to write the files to")],
    overrides: Overrides = None,
    method: Method = "cd+gkd+edt",
    seed: Seed = 0,
    checkpoint: Checkpoint = "best",
    storage: StudyStorage = StudyStorage(),
    device: Device = "auto",
) -> None:
    """Write a finished student as a plain state dict and as a torch.export program."""
    study = open_named_study(name, overrides, storage, reads_outputs=False)
    run = trained_by_any_number(study.run(method, seed))
    from teach_once.train.recording.export import export_student, weights_of
    from teach_once.train.runs.files import EMA

    exported = weights_of(run, checkpoint)
    cards = export_student(run, exported, folder, device=device)
    for weights, card in zip(exported, cards, strict=True):
        new_console().print(
            f"{folder}/student{EMA if weights.endswith(EMA) else ''}.pt, .pt2 and .json: "
            f"{card['model']}, epoch {card['epoch']}; reloaded: "
            f"{format_deciding(card['metrics'])}, program: "
            f"{format_values(card['program_metrics'])}"
        )


def verify(
    folder: Annotated[Path, typer.Argument(help="folder written by `export`")],
) -> None:
    """Compare an exported student's files with the checksums in its card."""
    from teach_once.train.recording.exported import verify_export

    try:
        cards = verify_export(folder)
    except FileNotFoundError as error:
        raise TrainError(
            f"file {error.filename} not found", fix="export the student again"
        ) from None
    for card in cards:
        new_console().print(
            f"{folder} is valid: {card['model']}, epoch {card['epoch']}, "
            f"{format_deciding(card['metrics'])} on the test images"
        )


def list_runs(
    name: Annotated[str | None, typer.Argument(help="a student; default: all students")] = None,
    runs: Runs = Path("runs"),
    remove: RemoveRuns = False,
    superseded: Superseded = False,
    yes: Annotated[bool, typer.Option("--yes", help="delete without asking")] = False,
) -> None:
    """List runs with state, error, size, age and differences between runs of a student.

    Ends with exit status 1 if a run's files cannot be read.
    """
    if superseded and not remove:
        raise TrainError("--superseded requires --remove", fix="use --remove --superseded")
    if runs.exists() and not runs.is_dir():
        raise TrainError(f"{runs} is a file, expected a folder of runs", fix="use --runs FOLDER")
    student_name = Path(name).stem if name and name.endswith((".yaml", ".yml")) else name
    existing, console = runs_below(runs, student_name), new_console()
    if not existing:
        console.print(f"no runs found in {runs / (student_name or '')}")
    elif remove:
        offer_removal(
            existing,
            console,
            lambda question: yes or typer.confirm(question),
            superseded=superseded,
        )
    else:
        console.print(table_of(existing, time.time()))
    problems = [run.problem for run in existing if run.problem]
    for problem in problems:
        console.print(problem)
    if problems:
        raise typer.Exit(1)
