"""python -m report FOLDER [RUN ...] [--method M] [--cache PATH] [--asked TEXT] [--command TEXT]

Reads the finished runs of one student (runs/digits-resnet8), prints their table and writes
report.html, ablation.md, ablation.csv and ablation.png to the same folder. If runs are selected, or
settings differ from each other or from those of report.html, the names have a suffix, as in
report-all.html. `teach-once ablation` ends with this report.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from teach_once.runtime.command.frame import new_app, new_console, run_command
from teach_once.runtime.safe.text import visible

if TYPE_CHECKING:
    from teach_once.report.write import WrittenReport

app = new_app()


@app.command()
def main(
    folder: Annotated[
        Path, typer.Argument(help="folder of one student's runs, such as runs/digits-resnet8")
    ],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="folder names of the runs to report, in this order; default: all finished runs, "
            "with a row for each group of settings",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="report only this method; may be repeated"),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="cache to read the teacher's errors from if the runs lack them"),
    ] = None,
    asked: Annotated[str, typer.Option(help="requested runs in words, quoted in the report")] = "",
    command: Annotated[
        list[str] | None, typer.Option(help="command to print in the report; the first one made it")
    ] = None,
) -> None:
    """Write the report of a folder of runs and print its table."""
    from teach_once.report.write import write_report

    written = write_report(
        folder,
        names or (),
        methods=method or (),
        cache=cache,
        asked=asked,
        commands=command or (),
    )
    print_written(written, folder, new_console())


def print_written(written: WrittenReport, folder: Path, console: Console) -> None:
    """Print a report's table and the paths of its files, and the omitted runs to stderr."""
    console.print(written.table)
    for line in written.left_out:
        print(visible(line), file=sys.stderr)
    end = written.suffix
    console.print(f"written to {folder}/report{end}.html, ablation{end}.md, .csv and .png")


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(app, arguments)
