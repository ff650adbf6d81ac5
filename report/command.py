"""python -m report FOLDER [RUN ...] [--method M] [--cache PATH] [--asked TEXT] [--command TEXT]

Reads the finished runs of one student (runs/digits-resnet8), prints their table and writes
report.html, ablation.md, ablation.csv and ablation.png beside them. Chosen runs, several settings,
and settings other than those of report.html get other names, as in report-all.html.
`teach-once ablation` does the same at its end.
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
    folder: Annotated[Path, typer.Argument(help="one student's runs, such as runs/digits-resnet8")],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="folder names of the runs to report, in this order; default: all finished runs, "
            "where runs with other settings are other rows",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="report this method alone; may be given several times"),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="read the teacher's errors here if the runs lack them")
    ] = None,
    asked: Annotated[str, typer.Option(help="say that these runs were asked for")] = "",
    command: Annotated[
        list[str] | None, typer.Option(help="print this command; the first made the report")
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
    """Print a report's table, where its files are, and on stderr the runs that it leaves out."""
    console.print(written.table)
    for line in written.left_out:
        print(visible(line), file=sys.stderr)
    end = written.suffix
    console.print(f"written to {folder}/report{end}.html, ablation{end}.md, .csv and .png")


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(app, arguments)
